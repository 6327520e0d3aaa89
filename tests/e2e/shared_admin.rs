//! What is done to the shared tier without a daemon: a cache imported, and what nothing needs collected.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use nix::libc::SIGKILL;
use serde_json::Value;
use weightd_core::digest::{Digest, GitOid};
use weightd_core::shared::SharedStore;
use weightd_core::store::StageKey;

use super::crash::shard;
use super::harness::{Ran, Sandbox, run};

/// Fault points that an import passes.
pub(super) const OF_AN_IMPORT: &[&str] = &["shared.import.linked", "shared.import.named"];

/// Fault points that a collection in the shared tier passes.
pub(super) const OF_A_SHARED_COLLECTION: &[&str] =
    &["shared.collect.renamed", "shared.collect.deleted"];

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A Hugging Face cache with one model, and a shared tier that is not there yet.
struct Scene {
    sandbox: Sandbox,
}

impl Scene {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let scene = Self { sandbox };
        scene.add("model.safetensors", &shard(0, 300_000));
        scene.add("config.json", b"{}");
        fs::create_dir_all(scene.model().join("refs")).expect("refs");
        fs::write(scene.model().join("refs/main"), COMMIT).expect("a ref");
        scene
    }

    fn model(&self) -> PathBuf {
        self.sandbox.path("hf/hub/models--org--model")
    }

    fn add(&self, path: &str, bytes: &[u8]) {
        let hash = match path.ends_with(".safetensors") {
            true => Digest::of(bytes).to_string(),
            false => GitOid::of(bytes).to_string(),
        };
        for folder in ["blobs", "snapshots"] {
            fs::create_dir_all(self.model().join(folder).join(COMMIT)).expect("a folder");
        }
        fs::write(self.model().join("blobs").join(&hash), bytes).expect("a blob");
        let link = self.model().join("snapshots").join(COMMIT).join(path);
        symlink(format!("../../blobs/{hash}"), link).expect("a link");
    }

    fn root(&self) -> PathBuf {
        self.sandbox.path("shared")
    }

    fn store(&self) -> SharedStore {
        SharedStore::open_existing(&self.root()).expect("a shared store")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
        command.env("WEIGHTD_SHARED_ROOT", self.root());
        command.args(["--output", "json"]).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Ran {
        run(&mut self.command(words))
    }

    fn import(&self) -> Ran {
        let home = self.sandbox.path("hf");
        self.run(&["import", home.to_str().expect("UTF-8")])
    }

    fn dies_at(&self, words: &[&str], point: &str) {
        let mut command = self.command(words);
        let ended = command.env("WEIGHTD_FAULT", point).output();
        let ended = ended.expect("the command starts");
        assert_eq!(ended.status.signal(), Some(SIGKILL), "{point}: {ended:?}");
    }

    /// The model was used so many days ago.
    fn set_used(&self, days: u64) {
        for note in fs::read_dir(self.root().join("snapshots")).expect("notes") {
            let note = fs::File::open(note.expect("a note").path()).expect("a note");
            let time = SystemTime::now() - Duration::from_secs(days * 86_400);
            note.set_modified(time).expect("its time");
        }
    }

    fn blobs(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.root().join("blobs")).expect("blobs");
        { entries.map(|entry| entry.expect("a blob").path()) }.collect()
    }
}

/// A fetch can use it, and it is the bytes' own.
fn is_whole(scene: &Scene, bytes: &[u8]) -> bool {
    let key = StageKey::of_digest(Digest::of(bytes));
    let fill = scene
        .store()
        .find(&key, bytes.len() as u64)
        .expect("a look");
    let view = fill.and_then(|fill| Some((fill.look().ok()?, fill.bytes().ok()??)));
    view.is_some_and(|(view, mut file)| {
        let mut found = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut found).expect("a read");
        view.sealed && view.is_whole() && found == bytes
    })
}

fn names(of: &Value) -> Vec<&str> {
    let models = of.as_array().expect("a list").iter();
    models
        .map(|model| model["model"].as_str().expect("a model"))
        .collect()
}

#[test]
fn a_cache_is_imported_and_goes_when_nobody_uses_it() {
    let scene = Scene::new();

    let imported = scene.import().json();

    let model = format!("hf://org/model@{COMMIT}");
    assert_eq!(names(&imported["models"]), [&model]);
    assert_eq!(imported["models"][0]["bytes_linked"], 300_002);
    assert_eq!(imported["damaged"], serde_json::json!([]));
    assert!(is_whole(&scene, &shard(0, 300_000)));
    let again = scene.import().json();
    assert_eq!(again["models"][0]["bytes_hashed"], 0);

    let gc = [
        "gc",
        "--tier",
        "shared",
        "--max-age",
        "30d",
        "--grace",
        "0s",
    ];
    scene.set_used(29);
    assert_eq!(scene.run(&gc).json()["blobs"], 0);
    scene.set_used(31);
    let planned = scene.run(&[&gc[..], &["--dry-run"]].concat()).json();
    assert_eq!(names(&planned["snapshots"]), [&model]);
    assert_eq!(
        (&planned["blobs"], &planned["dry_run"]),
        (&2.into(), &true.into())
    );
    assert_eq!(scene.blobs().len(), 2);
    let removed = scene.run(&gc).json();
    assert_eq!(removed["snapshots"][0]["why"], "age");
    assert_eq!(removed["bytes_freed"], planned["bytes_freed"]);
    assert_eq!(scene.blobs(), Vec::<PathBuf>::new());
}

#[test]
fn models_go_until_the_rest_fits_and_young_blobs_wait() {
    let scene = Scene::new();
    scene.import().json();
    let gc = |size| {
        scene
            .run(&["gc", "--tier", "shared", "--max-bytes", size])
            .json()
    };

    assert_eq!(gc("1MiB")["snapshots"], serde_json::json!([]));
    let removed = gc("100KB");

    assert_eq!(removed["snapshots"][0]["why"], "room");
    assert_eq!(
        (&removed["blobs"], &removed["blobs_young"]),
        (&0.into(), &2.into())
    );
    let mut text = scene.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
    let root = scene.root();
    text.arg("--shared-root").arg(root);
    let text = run(text.args(["gc", "--tier", "shared"]));
    let kept = "kept 2 unused blobs: changed less than 24h ago";
    assert!(text.stdout.contains(kept), "{text:?}");
}

#[test]
fn a_silent_lease_holds_nothing_back() {
    let scene = Scene::new();
    scene.import().json();
    scene.set_used(31);
    let key = StageKey::of_digest(Digest::of(&shard(0, 300_000)));
    let lease = scene.store().lease(&[key], "node").expect("a lease");
    let gc = ["gc", "--tier", "shared", "--max-age", "1d", "--grace", "0s"];
    let collect = |silence| {
        let mut command = scene.command(&gc);
        run(command.env("WEIGHTD_SHARED_CLAIM_TIMEOUT", silence)).json()
    };

    let (over, ended) = std::sync::mpsc::channel::<()>();
    let busy = std::thread::scope(|scope| {
        scope.spawn(|| {
            let ended = ended;
            for beat in 1.. {
                lease.beat(beat).expect("a beat");
                let pause = Duration::from_millis(100);
                if ended.recv_timeout(pause) != Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    break;
                }
            }
        });
        let collected = collect("1s");
        drop(over);
        collected
    });
    assert_eq!(
        (&busy["snapshots_in_use"], &busy["leases"]),
        (&1.into(), &0.into())
    );
    assert!(is_whole(&scene, &shard(0, 300_000)));

    let silent = collect("10ms");
    assert_eq!(
        (&silent["blobs"], &silent["leases"]),
        (&2.into(), &1.into())
    );
}

#[test]
fn what_a_killed_import_leaves_is_made_good_by_the_next() {
    for point in OF_AN_IMPORT {
        let scene = Scene::new();
        let home = scene.sandbox.path("hf");
        scene.dies_at(&["import", home.to_str().expect("UTF-8")], point);

        scene.import().json();

        assert!(is_whole(&scene, &shard(0, 300_000)), "{point}");
        let mut command = scene.command(&["gc", "--tier", "shared", "--grace", "0s"]);
        let swept = run(command.env("WEIGHTD_SHARED_CLAIM_TIMEOUT", "10ms")).json();
        assert_eq!(
            (&swept["blobs"], &swept["leases"]),
            (&0.into(), &1.into()),
            "{point}"
        );
        for blob in scene.blobs() {
            let files = fs::read_dir(blob).expect("a blob").count();
            assert_eq!(files, 2, "{point}: the bytes and their sums");
        }
    }
}

#[test]
fn what_a_killed_collection_leaves_goes_with_the_next() {
    for point in OF_A_SHARED_COLLECTION {
        let scene = Scene::new();
        scene.import().json();
        scene.set_used(31);
        let gc = ["gc", "--tier", "shared", "--max-age", "1d", "--grace", "0s"];
        scene.dies_at(&gc, point);

        scene.run(&gc).json();

        assert_eq!(scene.blobs(), Vec::<PathBuf>::new(), "{point}");
        let left = fs::read_dir(scene.root().join("refs/hf/org%2Fmodel")).expect("refs");
        assert_eq!(left.count(), 0, "{point}");
    }
}

#[test]
fn a_damaged_file_is_named_and_its_model_left_out() {
    let scene = Scene::new();
    let blob = scene
        .model()
        .join("blobs")
        .join(Digest::of(&shard(0, 300_000)).to_string());
    fs::write(&blob, shard(1, 300_000)).expect("other bytes");

    let ran = scene.import();

    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("is damaged") && ran.stderr.contains("hint: delete it"),
        "{ran:?}"
    );
    let imported: Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(imported["models"], serde_json::json!([]));
    assert_eq!(
        Path::new(imported["damaged"][0]["path"].as_str().expect("a path")),
        { fs::canonicalize(blob).expect("a path") }
    );
}

#[test]
fn mistakes_are_explained() {
    let scene = Scene::new();
    let mut nowhere = scene.command(&["gc", "--tier", "shared"]);
    run(nowhere.env_remove("WEIGHTD_SHARED_ROOT")).failed(2, &["--shared-root DIR"]);
    scene
        .run(&["gc", "--dry-run"])
        .failed(2, &["add --tier shared"]);
    let partial = scene.run(&["gc", "--tier", "shared", "--partial"]);
    partial.failed(2, &["--partial"]);
    let missing = scene.run(&["gc", "--tier", "shared"]);
    missing.failed(
        1,
        &["no shared store at", "hint: is the file system mounted"],
    );
    let empty = scene.sandbox.path("empty");
    fs::create_dir(&empty).expect("a folder");
    let empty = scene.run(&["import", empty.to_str().expect("UTF-8")]);
    empty.failed(1, &["holds no models", "hint: name HF_HOME"]);
    assert!(
        !scene.sandbox.path("store").exists(),
        "a local store was made"
    );
}
