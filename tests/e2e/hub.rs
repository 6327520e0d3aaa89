//! Models from a Hub: what a user gets, and every way in which it can go wrong.

use std::fs;
use std::path::Path;

use serde_json::Value;
use weightd_standin::{
    Fault, FaultKind, File, Files, Gated, Hub, HubConfig, Origin, Pattern, Repo, generate,
};

use super::harness::{Ran, Running, Sandbox, assert_sound, everything, run, tree, wait_until};

struct Place {
    hub: Hub,
    sandbox: Sandbox,
}

/// A model of two shards and small files.
fn model() -> Files {
    Files::new().model(generate::model(1, 2, 3_000_000))
}

impl Place {
    fn with(config: HubConfig, files: Files) -> Self {
        let hub = Hub::spawn_thread(config).expect("a hub");
        hub.add_repo(Repo::new("org/model").commit("main", files));
        Self {
            hub,
            sandbox: Sandbox::new(),
        }
    }

    fn new() -> Self {
        Self::with(HubConfig::default(), model())
    }

    fn run(&self, words: &[&str]) -> Ran {
        self.run_as("", words)
    }

    fn run_as(&self, token: &str, words: &[&str]) -> Ran {
        self.sandbox.run(
            &[("HF_ENDPOINT", &self.hub.endpoint()), ("HF_TOKEN", token)],
            words,
        )
    }

    fn prefetch(&self, model: &str) -> Value {
        self.run(&["prefetch", model]).json()
    }

    /// Prefetches, and checks that nothing was published or got a name that should not have.
    fn fails(&self, words: &[&str]) {
        self.run(&["prefetch", "hf://org/model"]).failed(1, words);
        assert_sound(&self.sandbox.root());
        assert_eq!(
            self.run(&["ls"]).json(),
            Value::Array(vec![]),
            "something was published"
        );
    }
}

fn path(result: &Value) -> &Path {
    Path::new(result["path"].as_str().expect("a path"))
}

fn generated(seed: u64) -> Vec<(String, Vec<u8>)> {
    let files = generate::model(seed, 2, 3_000_000).into_iter();
    let mut files: Vec<_> = files.map(|(path, bytes)| (path, bytes.to_vec())).collect();
    files.sort();
    files
}

#[test]
fn the_tree_is_the_origins_byte_for_byte_and_a_second_run_fetches_nothing() {
    let place = Place::with(
        HubConfig::default().page_size(2),
        model().lfs("pytorch_model.bin", "pickle"),
    );

    let first = place.prefetch("hf://org/model");
    let second = place.prefetch("hf://org/model@main");

    assert_eq!(tree(path(&first)), generated(1));
    let sha = place.hub.sha("org/model", "main").expect("a commit");
    assert_eq!(first["model"], format!("hf://org/model@{sha}"));
    let bytes: usize = generated(1).iter().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(
        (&first["bytes"], &first["bytes_fetched"]),
        (&bytes.into(), &bytes.into())
    );
    assert_eq!(
        (&second["bytes_fetched"], &second["bytes_reused"]),
        (&0.into(), &bytes.into())
    );
    assert_eq!(first["files"], generated(1).len());
    assert_eq!(first["left_out"]["examples"][0], "pytorch_model.bin");
    let keys = [
        "model",
        "snapshot",
        "path",
        "files",
        "bytes",
        "bytes_fetched",
        "bytes_reused",
        "seconds",
    ];
    assert!(keys.iter().all(|key| first.get(key).is_some()), "{first}");
    assert!(place.hub.token_leaks().is_empty());
}

#[test]
fn another_model_brings_only_the_files_that_differ() {
    let place = Place::new();
    place.prefetch("hf://org/model");
    let tuned = model().lfs(
        "model-00002-of-00002.safetensors",
        generate::model(2, 2, 3_000_000)[6].1.clone(),
    );
    let shard = tuned
        .find("model-00002-of-00002.safetensors")
        .and_then(File::sha256)
        .is_some();
    assert!(shard);
    place.hub.add_repo(
        Repo::new("org/tuned").commit("main", model().file("extra.json", "{\"tuned\": true}")),
    );
    let tuned = place.prefetch("hf://org/tuned");
    assert_eq!(tuned["bytes_fetched"], "{\"tuned\": true}".len());
    let status = place.run(&["status"]).json();
    assert_eq!(status["tiers"][0]["store_bytes"], tuned["bytes"]);
}

#[test]
fn every_kind_of_revision_is_found() {
    let place = Place::new();
    place.hub.update_repo("org/model", |repo| {
        repo.tag("v1")
            .commit("refs/pr/1", model().file("pr.json", "1"))
    });
    place
        .hub
        .add_repo(Repo::new("ownerless").commit("main", Files::new().file("config.json", "{}")));
    let sha = place.hub.sha("org/model", "main").expect("a commit");
    for model in [
        "hf://org/model@v1".to_owned(),
        format!("hf://org/model@{sha}"),
    ] {
        assert_eq!(tree(path(&place.prefetch(&model))), generated(1), "{model}");
    }
    assert!(
        path(&place.prefetch("hf://org/model@refs/pr/1"))
            .join("pr.json")
            .exists()
    );
    assert_eq!(
        tree(path(&place.prefetch("hf://ownerless"))),
        [("config.json".to_owned(), b"{}".to_vec())]
    );
}

#[test]
fn a_commit_that_is_here_needs_no_origin() {
    let place = Place::new();
    let first = place.prefetch("hf://org/model");
    place.hub.fault(Fault::status(503).forever());
    let again = place.prefetch(first["model"].as_str().expect("a model"));
    assert_eq!(
        (&again["path"], &again["bytes_fetched"]),
        (&first["path"], &0.into())
    );
}

#[test]
fn a_branch_that_moves_leaves_the_old_snapshot_where_it_is() {
    let place = Place::new();
    let old = place.prefetch("hf://org/model");
    place.hub.update_repo("org/model", |repo| {
        repo.commit("main", model().file("config.json", "{}"))
    });
    let new = place.prefetch("hf://org/model");
    assert_ne!(old["path"], new["path"]);
    assert_eq!(new["bytes_fetched"], 2);
    assert_eq!(tree(path(&old)), generated(1));
    assert_eq!(
        place.run(&["path", "hf://org/model"]).json()["path"],
        new["path"]
    );
}

#[test]
fn patterns_choose_the_files() {
    let place = Place::with(
        HubConfig::default(),
        model().lfs("sub/x.bin", "1").file("empty.txt", ""),
    );
    let bin = place
        .run(&["prefetch", "hf://org/model", "--include", "*.bin"])
        .json();
    assert_eq!(tree(path(&bin)), [("sub/x.bin".to_owned(), b"1".to_vec())]);
    let rest = place
        .run(&["prefetch", "hf://org/model", "--exclude", "*.safetensors*"])
        .json();
    let names: Vec<String> = tree(path(&rest))
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(
        names.contains(&"empty.txt".to_owned())
            && !names.iter().any(|name| name.contains("safetensors"))
    );
    let none = ["prefetch", "hf://org/model", "--include", "*.gguf"];
    place.run(&none).failed(1, &["none of its", "--include"]);
}

#[test]
fn what_is_here_can_be_listed_held_and_removed() {
    let place = Place::new();
    let plan = place.run(&["plan", "hf://org/model"]).json();
    assert_eq!(
        (&plan["bytes_local"], &plan["published"]),
        (&0.into(), &false.into())
    );
    place
        .run(&["path", "hf://org/model"])
        .failed(1, &["not in the store", "weightctl prefetch"]);
    let fetched = place.prefetch("hf://org/model");
    let plan = place.run(&["plan", "hf://org/model"]).json();
    assert_eq!(
        (&plan["bytes_to_fetch"], &plan["published"]),
        (&0.into(), &true.into())
    );
    assert_eq!(plan["bytes_local"], fetched["bytes"]);

    let ls = place.run(&["ls", "--files"]).json();
    assert_eq!(
        (&ls[0]["model"], &ls[0]["files"]),
        (&fetched["model"], &fetched["files"])
    );
    assert_eq!(
        ls[0]["file_list"].as_array().map(Vec::len),
        fetched["files"].as_u64().map(|n| n as usize)
    );
    place
        .run(&["pin", "hf://org/model", "--as", "serving"])
        .json();
    place
        .run(&["rm", "hf://org/model"])
        .failed(1, &["operator/serving", "unpin"]);
    assert_eq!(
        place
            .run(&["unpin", "hf://org/model", "--as", "serving"])
            .json()["released"],
        true
    );
    assert_eq!(
        place.run(&["rm", "hf://org/model"]).json()["bytes_freed"],
        fetched["bytes"]
    );
    assert!(!path(&fetched).exists());
    assert_eq!(place.run(&["gc"]).json()["blobs"], 0);
    assert_eq!(tree(&place.sandbox.root().join("blobs")), []);
}

#[test]
fn damaged_bytes_are_set_aside_and_only_they_are_fetched_again() {
    let place = Place::new();
    let fetched = place.prefetch("hf://org/model");
    let file = path(&fetched).join("config.json");
    let good = fs::read(&file).expect("readable");
    let mut bad = good.clone();
    bad[0] ^= 1;
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("ours");
    fs::write(&file, bad).expect("written");

    let verify = place.run(&["verify", "hf://org/model"]);

    assert_eq!(verify.code, Some(1), "{verify:?}");
    let found: Value = serde_json::from_str(&verify.stdout).expect("JSON");
    assert_eq!(found["damaged"].as_array().map(Vec::len), Some(1));
    assert_eq!(found["damaged"][0]["snapshots"][0], fetched["snapshot"]);
    assert!(!file.exists(), "wrong bytes can still be opened");
    place
        .run(&["path", "hf://org/model"])
        .failed(1, &["not in the store"]);
    let again = place.prefetch("hf://org/model");
    assert_eq!(
        (&again["path"], &again["bytes_fetched"]),
        (&fetched["path"], &good.len().into())
    );
    assert_eq!(tree(path(&again)), generated(1));
    assert_eq!(
        place.run(&["verify"]).json()["damaged"],
        Value::Array(vec![])
    );
}

#[test]
fn several_models_are_done_one_by_one_whatever_becomes_of_the_others() {
    let place = Place::new();
    place
        .hub
        .add_repo(Repo::new("org/two").commit("main", Files::new().file("config.json", "{}")));
    let ran = place.run(&[
        "prefetch",
        "hf://org/model",
        "hf://org/typo",
        "hf://org/two",
    ]);
    assert_eq!(ran.code, Some(1));
    let lines: Vec<Value> = ran
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 2, "{ran:?}");
    assert!(ran.stderr.contains("org/typo"), "{ran:?}");
}

// What the official client does not survive: HUB-PROTOCOL § 5, row by row.

#[test]
fn a_rate_limit_is_waited_out() {
    let place = Place::new();
    let limit = FaultKind::RateLimit {
        bucket: "api".into(),
        quota: 500,
        window_s: 300,
        reset_s: 1,
        retry_after_s: None,
    };
    place.hub.fault(
        Fault::new(limit)
            .on(Origin::Hub)
            .path("/revision/")
            .times(1),
    );
    assert_eq!(tree(path(&place.prefetch("hf://org/model"))), generated(1));
}

#[test]
fn a_cdn_that_is_out_of_service_is_asked_again() {
    let place = Place::new();
    place.hub.fault(Fault::status(503).on(Origin::Cdn).times(3));
    assert_eq!(tree(path(&place.prefetch("hf://org/model"))), generated(1));
}

#[test]
fn a_cut_body_is_read_on_at_the_byte() {
    let place = Place::new();
    place.hub.fault(
        Fault::new(FaultKind::Cut {
            after_bytes: 1_234_567,
        })
        .on(Origin::Cdn)
        .times(2),
    );
    let fetched = place.prefetch("hf://org/model");
    assert_eq!(tree(path(&fetched)), generated(1));
    assert_eq!(fetched["bytes_fetched"], fetched["bytes"]);
}

#[test]
fn an_address_that_expires_on_the_way_is_renewed() {
    let place = Place::new();
    place.hub.fault(
        Fault::new(FaultKind::Cut {
            after_bytes: 500_000,
        })
        .on(Origin::Cdn)
        .times(2),
    );
    place.hub.fault(
        Fault::new(FaultKind::ExpiredUrl)
            .on(Origin::Cdn)
            .skip(2)
            .times(2),
    );
    assert_eq!(tree(path(&place.prefetch("hf://org/model"))), generated(1));
}

#[test]
fn a_killed_process_is_resumed_from_its_journal() {
    let size = 48 << 20;
    let pattern = Pattern::Noise(5);
    let files = Files::new().lfs_pattern("weights.bin", pattern, size, Some(&pattern.sha256(size)));
    let place = Place::with(HubConfig::default(), files);
    place.hub.fault(
        Fault::new(FaultKind::Slow {
            bytes_per_second: 8 << 20,
        })
        .on(Origin::Cdn)
        .forever(),
    );
    let mut command = place.sandbox.weightctl();
    command.env("HF_ENDPOINT", place.hub.endpoint()).args([
        "prefetch",
        "hf://org/model",
        "--include",
        "*",
    ]);
    let mut first = Running::start(&mut command);
    wait_until("half is sent", || {
        place.hub.cdn_bytes_sent() > size / 2 || first.ended()
    });
    first.kill();
    place.hub.clear_faults();

    let second = run(&mut command).json();

    assert!(
        second["bytes_fetched"].as_u64() < Some(size * 3 / 4),
        "{second}"
    );
    assert_sound(&place.sandbox.root());
}

#[test]
fn a_flipped_bit_is_found() {
    let place = Place::new();
    let flip = || {
        Fault::new(FaultKind::Corrupt {
            at_byte: 1_000_000,
            xor: 4,
        })
        .on(Origin::Cdn)
    };
    place.hub.fault(flip().times(1));
    assert_eq!(tree(path(&place.prefetch("hf://org/model"))), generated(1));

    let broken = Place::new();
    broken.hub.fault(flip().forever());
    broken.fails(&["wrong bytes", "sha256", "hint:"]);
}

#[test]
fn a_file_past_what_other_clients_refuse_is_planned() {
    // 60 GB, over the 50 GB that the official client takes without xet. Fetching it takes minutes.
    let size = 60_000_000_000;
    let files =
        Files::new().lfs_pattern("weights.bin", Pattern::Zeros, size, Some(&"ab".repeat(32)));
    let place = Place::with(HubConfig::default(), files);
    let plan = place
        .run(&["plan", "hf://org/model", "--include", "*"])
        .json();
    assert_eq!(plan["bytes_to_fetch"], size);
}

#[test]
fn a_connection_that_delivers_nothing_is_replaced() {
    let place = Place::new();
    place.hub.fault(
        Fault::new(FaultKind::Stall {
            after_bytes: 100_000,
        })
        .on(Origin::Cdn)
        .times(1),
    );
    assert_eq!(tree(path(&place.prefetch("hf://org/model"))), generated(1));
}

#[test]
fn a_cdn_that_serves_other_ranges_than_asked_never_gets_through() {
    for what in [
        FaultKind::WrongLength { by: 5 },
        FaultKind::WrongLength { by: -5 },
        FaultKind::ShiftedRange { by: 1 },
    ] {
        let place = Place::new();
        place.hub.fault(Fault::new(what).on(Origin::Cdn).times(2));
        assert_eq!(tree(path(&place.prefetch("hf://org/model"))), generated(1));
    }
    let place = Place::new();
    place
        .hub
        .fault(Fault::new(FaultKind::IgnoreRange).on(Origin::Cdn).forever());
    assert_eq!(tree(path(&place.prefetch("hf://org/model"))), generated(1));
}

#[test]
fn a_file_that_is_not_what_the_tree_lists_is_refused() {
    let place = Place::new();
    let etag = Some("00".repeat(32));
    place.hub.fault(
        Fault::new(FaultKind::ChangedFile { etag, size: None })
            .on(Origin::Hub)
            .forever(),
    );
    place.fails(&["changed", "run the same command again"]);
}

#[test]
fn who_may_not_read_is_told_what_to_do() {
    let config = HubConfig::default().token("hf_good").token("hf_granted");
    let place = Place::with(config, model());
    place.hub.add_repo(
        Repo::new("org/gated")
            .commit("main", model())
            .gated(Gated::Manual)
            .grant("hf_granted"),
    );
    place.hub.add_repo(
        Repo::new("org/private")
            .commit("main", model())
            .private()
            .grant("hf_granted"),
    );
    place
        .hub
        .add_repo(Repo::new("org/disabled").commit("main", model()).disabled());
    for (token, name, words) in [
        ("", "org/gated", &["denied", "HF_TOKEN"][..]),
        ("hf_good", "org/gated", &["denied", "hint:"]),
        ("", "org/private", &["not found, or private", "HF_TOKEN"]),
        ("hf_good", "org/private", &["not found, or private"]),
        ("", "org/typo", &["not found, or private", "hint:"]),
        ("", "org/model@nope", &["nope", "not found"]),
        ("hf_bad", "org/model", &["token", "hint:"]),
        ("", "org/disabled", &["disabled"]),
    ] {
        let ran = place.run_as(token, &["prefetch", &format!("hf://{name}")]);
        ran.failed(1, words);
        assert!(
            !ran.stderr.contains("hf_good") && !ran.stderr.contains("hf_bad"),
            "{ran:?}"
        );
    }
    for name in ["org/gated", "org/private"] {
        let fetched = place
            .run_as("hf_granted", &["prefetch", &format!("hf://{name}")])
            .json();
        assert_eq!(tree(path(&fetched)), generated(1));
    }
    assert!(place.hub.token_leaks().is_empty());
}

#[test]
fn no_network_is_an_error_and_loses_nothing() {
    let place = Place::new();
    let fetched = place.prefetch("hf://org/model");
    let nowhere = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    let ran = place.sandbox.run(&nowhere, &["prefetch", "hf://org/other"]);
    ran.failed(
        1,
        &["127.0.0.1:9 is unavailable", "onnection refused", "hint:"],
    );
    assert_eq!(tree(path(&fetched)), generated(1));
}

#[test]
fn hostile_names_never_become_paths() {
    for name in [
        "../../etc/x",
        "/etc/x",
        ".weightd/complete",
        "a/../../b.json",
        "..",
        "a\u{0}b.json",
    ] {
        let place = Place::with(HubConfig::default(), model().file(name, "x"));
        place.fails(&["refused", "--exclude"]);
    }
}

#[test]
fn broken_weights_are_never_published() {
    let shard = |bytes| {
        Files::new()
            .file("config.json", "{}")
            .lfs("model.safetensors", bytes)
    };
    for files in [
        shard(generate::header_of_length(1 << 63)),
        shard(generate::overlapping()),
        shard(generate::with_hole()),
        shard(generate::truncated()),
    ] {
        Place::with(HubConfig::default(), files).fails(&["model.safetensors is broken", "hint:"]);
    }
    for files in [
        generate::index_naming_absent_shard(1),
        generate::index_naming_absent_tensor(1),
    ] {
        let place = Place::with(HubConfig::default(), Files::new().model(files));
        place.fails(&["model.safetensors.index.json is broken"]);
    }
}

#[test]
fn a_directory_that_is_no_store_of_ours_is_left_alone() {
    let place = Place::new();
    fs::create_dir(place.sandbox.root()).expect("created");
    fs::write(place.sandbox.root().join("thesis.tex"), "x").expect("written");
    place
        .run(&["prefetch", "hf://org/model"])
        .failed(1, &["not a weightd store", "--root"]);
    assert_eq!(tree(&place.sandbox.root()).len(), 1);
    fs::remove_file(place.sandbox.root().join("thesis.tex")).expect("removed");
    fs::write(place.sandbox.root().join("FORMAT"), "weightd store 2\n").expect("written");
    place.run(&["ls"]).failed(
        1,
        &["format 2", "newer", "--root"].map(|word| if word == "newer" { "version" } else { word }),
    );
}

#[test]
fn tokens_and_signed_addresses_appear_in_no_log_error_or_file() {
    let token = "hf_secretsecretsecret";
    let place = Place::with(HubConfig::default().token(token), model());
    place
        .hub
        .update_repo("org/model", |repo| repo.gated(Gated::Auto).grant(token));
    place.hub.fault(
        Fault::new(FaultKind::Cut {
            after_bytes: 10_000,
        })
        .on(Origin::Cdn)
        .times(2),
    );
    let mut said = String::new();
    let mut run = |words: &[&str], code: i32| {
        let environment = [
            ("HF_ENDPOINT", place.hub.endpoint()),
            ("HF_TOKEN", token.into()),
            ("RUST_LOG", "trace".into()),
        ];
        let environment = environment
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        let ran = place.sandbox.run(&environment, words);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        said.push_str(&ran.stdout);
        said.push_str(&ran.stderr);
    };
    run(&["prefetch", "hf://org/model"], 0);
    place
        .hub
        .fault(Fault::new(FaultKind::ExpiredUrl).on(Origin::Cdn).forever());
    place.hub.add_repo(Repo::new("org/other").commit(
        "main",
        Files::new().lfs("other.safetensors", vec![9; 100_000]),
    ));
    run(&["prefetch", "hf://org/other"], 1);
    place.hub.clear_faults();
    place
        .hub
        .fault(Fault::status(500).on(Origin::Cdn).forever());
    run(&["prefetch", "hf://org/other"], 1);
    assert!(said.len() > 1000, "the trace log is missing");
    for secret in [token, "Signature=", "Policy=", "Key-Pair-Id="] {
        let line = said.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "`{secret}` was said");
        for (path, bytes) in everything(&place.sandbox.root()) {
            let found = bytes
                .windows(secret.len())
                .any(|window| window == secret.as_bytes());
            assert!(!found, "{path} holds `{secret}`");
        }
    }
    assert!(place.hub.token_leaks().is_empty());
}
