//! Models from a real S3 server, through the binary.

use std::fs;

use serde_json::Value;
use weightd_standin::s3::{Checksum, PutOptions, S3Config, S3Server};
use weightd_standin::{Fault, FaultKind, Files, Hub, HubConfig, Repo, generate};

use super::harness::{Sandbox, assert_sound, everything, tree};

struct Bucket {
    server: S3Server,
    sandbox: Sandbox,
}

impl Bucket {
    fn new(config: S3Config) -> Self {
        let server = S3Server::spawn_thread(config).expect("an S3 server");
        server.create_bucket("bucket");
        Self {
            server,
            sandbox: Sandbox::new(),
        }
    }

    fn with_model(prefix: &str) -> (Self, Vec<(String, Vec<u8>)>) {
        let bucket = Self::new(S3Config::default().page_size(3));
        let model = generate::model(1, 2, 300_000);
        for (path, bytes) in &model {
            bucket.put(&format!("{prefix}/{path}"), bytes);
        }
        let mut files: Vec<_> = model
            .into_iter()
            .map(|(path, bytes)| (path, bytes.to_vec()))
            .collect();
        files.sort();
        (bucket, files)
    }

    fn put(&self, key: &str, bytes: &[u8]) {
        self.server
            .put("bucket", key, bytes.to_vec(), PutOptions::default());
    }

    fn environment(&self) -> Vec<(String, String)> {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        vec![
            pair("AWS_ENDPOINT_URL_S3", &self.server.endpoint()),
            pair("AWS_ACCESS_KEY_ID", self.server.access_key()),
            pair("AWS_SECRET_ACCESS_KEY", self.server.secret_key()),
            pair("AWS_REGION", "us-east-1"),
        ]
    }

    fn run(&self, words: &[&str]) -> super::harness::Ran {
        self.run_with(&[], words)
    }

    fn run_with(&self, more: &[(&str, &str)], words: &[&str]) -> super::harness::Ran {
        let own = self.environment();
        let mut all: Vec<(&str, &str)> = own
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        all.extend_from_slice(more);
        self.sandbox.run(&all, words)
    }

    fn prefetch(&self, model: &str) -> Value {
        self.run(&["prefetch", model]).json()
    }
}

fn path(result: &Value) -> &std::path::Path {
    std::path::Path::new(result["path"].as_str().expect("a path"))
}

#[test]
fn a_prefix_becomes_a_tree_whether_it_ends_in_a_slash_or_not() {
    let (bucket, files) = Bucket::with_model("models/x");
    bucket.put("models/xy/config.json", b"another model");
    bucket.put("models/x/", b"");

    let first = bucket.prefetch("s3://bucket/models/x");
    let second = bucket.prefetch("s3://bucket/models/x/");

    assert_eq!(tree(path(&first)), files);
    assert_eq!(first["snapshot"], second["snapshot"]);
    assert_eq!(second["bytes_fetched"], 0);
    assert_eq!(first["bytes_fetched"], first["bytes"]);
    assert_sound(&bucket.sandbox.root());
}

#[test]
fn objects_without_a_digest_are_known_when_they_are_listed_again() {
    let (bucket, _) = Bucket::with_model("models/x");
    let first = bucket.prefetch("s3://bucket/models/x");
    bucket.put("models/x/generation_config.json", b"{\"new\": true}");

    let second = bucket.prefetch("s3://bucket/models/x");

    assert_ne!(first["model"], second["model"], "the revision did not move");
    assert_eq!(second["bytes_fetched"], b"{\"new\": true}".len());
    let pinned = first["model"].as_str().expect("a model");
    bucket.run(&["path", pinned]).json();
    bucket.sandbox.run(&[], &["rm", pinned]).json();
    bucket
        .run(&["prefetch", pinned])
        .failed(1, &["changed since", "hint:"]);
}

#[test]
fn the_same_bytes_from_hub_and_bucket_are_stored_once() {
    let (bucket, _) = Bucket::with_model("models/x");
    let hub = Hub::spawn_thread(HubConfig::default()).expect("a hub");
    hub.add_repo(
        Repo::new("org/model").commit("main", Files::new().model(generate::model(1, 2, 300_000))),
    );
    let hf = bucket
        .run_with(
            &[("HF_ENDPOINT", &hub.endpoint())],
            &["prefetch", "hf://org/model"],
        )
        .json();
    bucket.prefetch("s3://bucket/models/x");
    let status = bucket.run(&["status"]).json();
    assert_eq!(status["tiers"][0]["snapshots"], 2);
    assert_eq!(status["tiers"][0]["store_bytes"], hf["bytes"]);
}

#[test]
fn an_uploaders_digest_saves_the_download() {
    let (bucket, files) = Bucket::with_model("models/x");
    bucket.prefetch("s3://bucket/models/x");
    for (path, bytes) in &files {
        let digest = weightd_core::digest::Digest::of(bytes).to_string();
        let options = PutOptions::default().meta("sha256", &digest);
        bucket.server.put(
            "bucket",
            &format!("models/copy/{path}"),
            bytes.clone(),
            options,
        );
    }
    let copy = bucket.prefetch("s3://bucket/models/copy");
    assert_eq!(copy["bytes_fetched"], 0);
    assert_eq!(tree(path(&copy)), files);

    for (path, bytes) in &files {
        let (key, options) = (
            format!("models/summed/{path}"),
            PutOptions::checksum(Checksum::Sha256),
        );
        bucket.server.put("bucket", &key, bytes.clone(), options);
    }
    let summed = bucket.prefetch("s3://bucket/models/summed");
    assert_eq!(summed["bytes_fetched"], 0);
    assert_eq!(tree(path(&summed)), files);
}

#[test]
fn every_checksum_that_s3_reports_is_checked() {
    for checksum in [Checksum::Crc64Nvme, Checksum::Crc32c, Checksum::Sha256] {
        let bucket = Bucket::new(S3Config::default());
        let bytes = vec![7; 100_000];
        bucket.server.put(
            "bucket",
            "m/weights.json",
            bytes,
            PutOptions::checksum(checksum),
        );
        bucket.server.fault(
            Fault::new(FaultKind::Corrupt {
                at_byte: 500,
                xor: 1,
            })
            .times(1),
        );
        bucket.prefetch("s3://bucket/m");
        assert_sound(&bucket.sandbox.root());

        let broken = Bucket::new(S3Config::default());
        broken.server.put(
            "bucket",
            "m/weights.json",
            vec![7; 100_000],
            PutOptions::checksum(checksum),
        );
        broken.server.fault(
            Fault::new(FaultKind::Corrupt {
                at_byte: 500,
                xor: 1,
            })
            .forever(),
        );
        broken
            .run(&["prefetch", "s3://bucket/m"])
            .failed(1, &["wrong bytes", "weights.json"]);
        assert_eq!(
            tree(&broken.sandbox.root().join("blobs")),
            [],
            "wrong bytes have a name"
        );
    }
}

#[test]
fn an_object_that_changes_under_a_fetch_is_an_error_and_never_a_mixture() {
    let bucket = Bucket::new(S3Config::default());
    bucket.put("m/a.json", &vec![1; 40 << 20]);
    bucket.server.fault(
        Fault::new(FaultKind::Slow {
            bytes_per_second: 20 << 20,
        })
        .method("GET")
        .path("m/a.json")
        .forever(),
    );
    let environment = bucket.environment();
    let mut command = bucket.sandbox.weightctl();
    command
        .envs(environment)
        .args(["prefetch", "s3://bucket/m"]);
    let mut running = super::harness::Running::start(&mut command);
    super::harness::wait_until("bytes flow", || {
        bucket.server.requests().iter().any(|r| r.range.is_some()) || running.ended()
    });
    bucket.put("m/a.json", &vec![2; 40 << 20]);
    // A connection that was open may end with the old bytes; those that follow name the old ETag.
    bucket.server.fault(
        Fault::new(FaultKind::Cut {
            after_bytes: 1 << 20,
        })
        .method("GET")
        .path("m/a.json")
        .times(8),
    );

    let ran = running.finish();

    let root = bucket.sandbox.root();
    if ran.code == Some(0) {
        let result: Value = serde_json::from_str(&ran.stdout).expect("JSON");
        assert_eq!(
            fs::read(path(&result).join("a.json")).expect("readable"),
            vec![1; 40 << 20]
        );
    } else {
        ran.failed(1, &["changed", "run the same command again"]);
    }
    assert_sound(&root);
    bucket.server.clear_faults();
    let again = bucket.prefetch("s3://bucket/m");
    assert_eq!(
        fs::read(path(&again).join("a.json")).expect("readable"),
        vec![2; 40 << 20]
    );
}

#[test]
fn a_versioned_bucket_is_read_at_the_versions_that_were_listed() {
    let bucket = Bucket::new(S3Config::default());
    bucket.server.set_versioned("bucket");
    bucket.put("m/a.json", b"{}");
    bucket.prefetch("s3://bucket/m");
    let gets = bucket.server.requests();
    let versions = gets
        .iter()
        .filter(|request| request.method == "GET" && request.query.contains("versionId"));
    assert_eq!(versions.count(), 1);
}

#[test]
fn a_busy_server_is_asked_again() {
    let (bucket, files) = Bucket::with_model("m");
    bucket.server.fault(Fault::status(503).times(3));
    bucket.server.fault(
        Fault::new(FaultKind::Cut { after_bytes: 1000 })
            .method("GET")
            .path("safetensors")
            .times(2),
    );
    assert_eq!(tree(path(&bucket.prefetch("s3://bucket/m"))), files);
}

#[test]
fn a_public_bucket_needs_no_credentials() {
    let (bucket, files) = Bucket::with_model("m");
    bucket.server.allow_anonymous("bucket");
    let environment = [("AWS_ENDPOINT_URL_S3", bucket.server.endpoint())];
    let environment = environment
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let result = bucket
        .sandbox
        .run(&environment, &["prefetch", "s3://bucket/m"])
        .json();
    assert_eq!(tree(path(&result)), files);
    assert!(
        bucket
            .server
            .requests()
            .iter()
            .all(|request| request.authorization.is_none())
    );
}

#[test]
fn what_goes_wrong_is_said_with_its_remedy() {
    let (bucket, _) = Bucket::with_model("m");
    bucket.put("hostile/../../etc/x", b"x");
    bucket.put("both/a.json", b"x");
    bucket.put("both/a.json/b.json", b"x");
    bucket.put("reserved/.weightd/complete", b"x");
    bucket.put("gguf/model.gguf", b"x");
    for (model, words) in [
        (
            "s3://missing/m",
            &["not found", "NoSuchBucket", "hint:"][..],
        ),
        ("s3://bucket/typo", &["holds nothing under", "hint:"]),
        ("s3://bucket/m/config.json", &["object"]),
        ("s3://bucket/hostile", &["refused", "--exclude"]),
        (
            "s3://bucket/both",
            &["both a file and the folder", "--exclude"],
        ),
        ("s3://bucket/reserved", &["reserved"]),
        ("s3://bucket/gguf", &["model.gguf", "--include"]),
    ] {
        bucket.run(&["prefetch", model]).failed(1, words);
    }
    bucket
        .run(&["prefetch", "s3://bucket/m@main"])
        .failed(2, &["64 hex digits"]);
    bucket
        .run(&["prefetch", "s3://B/m"])
        .failed(2, &["no bucket name"]);
    let wrong = [("AWS_SECRET_ACCESS_KEY", "wrong")];
    bucket
        .run_with(&wrong, &["prefetch", "s3://bucket/m"])
        .failed(1, &["denied", "check the secret key"]);
    let nobody = [("AWS_ACCESS_KEY_ID", "")];
    bucket
        .run_with(&nobody, &["prefetch", "s3://bucket/m"])
        .failed(1, &["denied", "s3:ListBucket"]);
    let nowhere = [("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")];
    bucket
        .run_with(&nowhere, &["prefetch", "s3://bucket/m"])
        .failed(1, &["unavailable", "onnection refused"]);
}

#[test]
fn keys_appear_in_no_log_error_or_file() {
    let (bucket, _) = Bucket::with_model("m");
    let secret = bucket.server.secret_key().to_owned();
    let fine = bucket.run(&["-vv", "prefetch", "s3://bucket/m"]);
    bucket.server.fault(Fault::status(403).forever());
    let denied = bucket.run(&["-vv", "prefetch", "s3://bucket/m", "--include", "*.txt"]);
    assert_eq!((fine.code, denied.code), (Some(0), Some(1)));
    let said = [&fine, &denied]
        .map(|ran| format!("{}{}", ran.stdout, ran.stderr))
        .concat();
    assert!(
        !said.contains(&secret) && !said.contains("Signature="),
        "{said}"
    );
    for (path, bytes) in everything(&bucket.sandbox.root()) {
        let found = bytes
            .windows(secret.len())
            .any(|window| window == secret.as_bytes());
        assert!(!found, "{path} holds the secret key");
    }
}
