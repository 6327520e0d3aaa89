//! Whose volume may hold what of S3, and of directories.

use std::time::Duration;

use serde_json::Value;
use tonic::Code;
use weightd_core::digest::Digest;
use weightd_standin::s3::{PutOptions, S3Config, S3Server};
use weightd_standin::{Fault, HubConfig, Repo};

use crate::node::{Ask, Node, contents, files, tree};

const PRIVATE: &str = "hf://org/private";
const TOKEN: &str = "hf_tenantAmayread";

/// Who the daemon itself is at S3.
enum Itself {
    Nobody,
    Owner,
}

fn server(bucket: &str) -> S3Server {
    let s3 = S3Server::spawn_thread(S3Config::default()).expect("an S3 server");
    s3.create_bucket(bucket);
    s3
}

/// A server with the model of [`contents`] under `m`.
fn server_with_model(bucket: &str, seed: u64) -> S3Server {
    let s3 = server(bucket);
    for (path, bytes) in contents(seed) {
        s3.put(bucket, &format!("m/{path}"), bytes, PutOptions::default());
    }
    s3
}

fn node(s3: &S3Server, itself: &Itself) -> Node {
    let mut node = Node::new(HubConfig::default().token(TOKEN));
    let repo = Repo::new("org/private").private().grant(TOKEN);
    node.hub.add_repo(repo.commit("main", files(7)));
    let mut environment = vec![
        ("AWS_ENDPOINT_URL_S3", s3.endpoint()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ];
    if matches!(itself, Itself::Owner) {
        environment.push(("AWS_ACCESS_KEY_ID", s3.access_key().to_owned()));
        environment.push(("AWS_SECRET_ACCESS_KEY", s3.secret_key().to_owned()));
    }
    let environment = environment.into_iter();
    node.environment = environment
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    node
}

fn shard(seed: u64) -> Vec<u8> {
    let mut all = contents(seed).into_iter();
    let found = all.find(|(path, _)| path.ends_with(".safetensors"));
    found.expect("a shard").1
}

/// Tenant B's own object: zeros, with the digest of tenant A's shard written beside them.
fn put_a_claim(s3: &S3Server) {
    let secret = shard(7);
    let claim = PutOptions::default().meta("sha256", &Digest::of(&secret).to_string());
    let fake = vec![0_u8; secret.len()];
    s3.put("tenant-b", "m/model.safetensors", fake, claim);
}

#[tokio::test]
async fn naming_a_digest_gives_nobody_the_bytes() {
    let s3 = server("tenant-b");
    let mut node = node(&s3, &Itself::Owner);
    node.start().await;
    node.mounts(&Ask::model("pod-1", PRIVATE).secret("hf-token", TOKEN))
        .await;
    put_a_claim(&s3);

    let status = node.publish(&Ask::model("pod-2", "s3://tenant-b/m")).await;

    let status = status.expect_err("a digest was taken for a right");
    assert_eq!(status.code(), Code::DataLoss, "{status}");
    assert!(node.mounted().iter().all(|line| !line.contains("pod-2")));
    // What an operator brings pods may mount.
    let mut prefetch = node.weightctl_command(&["prefetch", "s3://tenant-b/m"]);
    let output = prefetch.output().expect("weightctl runs");
    assert!(!output.status.success(), "an operator lent the bytes");
}

#[tokio::test]
async fn what_a_user_believed_in_the_nodes_store_is_read_from_its_origin_for_pods() {
    let s3 = server("tenant-b");
    let mut node = node(&s3, &Itself::Owner);
    node.start().await;
    node.mounts(&Ask::model("pod-1", PRIVATE).secret("hf-token", TOKEN))
        .await;
    put_a_claim(&s3);
    let secret = shard(7);
    let honest = PutOptions::default().meta("sha256", &Digest::of(&secret).to_string());
    s3.put("tenant-b", "own/model.safetensors", secret, honest);
    let believe = |source: &str| {
        let mut command = node.embedded(&["prefetch", source]);
        let output = command.output().expect("weightctl runs");
        assert!(output.status.success(), "{output:?}");
        let printed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(printed["bytes_fetched"], 0, "{printed}");
    };
    believe("s3://tenant-b/m");
    believe("s3://tenant-b/own");

    let forged = node.publish(&Ask::model("pod-2", "s3://tenant-b/m")).await;
    let own = node
        .publish(&Ask::model("pod-3", "s3://tenant-b/own"))
        .await;

    let status = forged.expect_err("foreign bytes were mounted");
    assert_eq!(status.code(), Code::DataLoss, "{status}");
    own.expect("the pod's own bytes");
    let file = node.tree("pod-3").join("model.safetensors");
    assert_eq!(std::fs::read(file).expect("readable"), shard(7));
}

#[tokio::test]
async fn naming_a_digest_gives_nobody_the_bytes_after_a_restart_either() {
    let s3 = server("tenant-b");
    let mut node = node(&s3, &Itself::Owner);
    node.start().await;
    node.mounts(&Ask::model("pod-1", PRIVATE).secret("hf-token", TOKEN))
        .await;
    put_a_claim(&s3);
    let ask = Ask::new("pod-2", &[("source", "s3://tenant-b/m"), ("mode", "async")]);
    node.publish(&ask).await.expect("mounted");
    let error = node.tree("pod-2").join(".weightd/error");
    node.until("the volume tells its error", async || error.exists())
        .await;

    node.kill_daemon();
    s3.clear_requests();
    node.start_daemon().await;

    // Whoever believes the digest reads nothing.
    let complete = node.tree("pod-2").join(".weightd/complete");
    let read = || {
        s3.requests()
            .iter()
            .any(|asked| asked.method == "GET" && asked.path.contains("safetensors"))
    };
    node.until("the object itself is read", async || {
        read() || complete.exists()
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(
        !complete.exists(),
        "the volume was completed with foreign bytes"
    );
    assert!(!node.tree("pod-2").join("model.safetensors").exists());
}

fn with_keys(ask: Ask, s3: &S3Server) -> Ask {
    ask.secret("aws-access-key-id", s3.access_key())
        .secret("aws-secret-access-key", s3.secret_key())
}

/// The model that is here, with its revision.
fn pinned(node: &Node) -> String {
    let listed = node.weightctl(&["ls"]);
    listed[0]["model"].as_str().expect("a model").to_owned()
}

async fn denied(node: &Node, ask: &Ask) {
    let status = node
        .publish(ask)
        .await
        .expect_err("mounted without a right");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
}

#[tokio::test]
async fn what_one_tenants_keys_fetched_is_not_for_those_without_keys() {
    let s3 = server_with_model("a-private", 7);
    let mut node = node(&s3, &Itself::Nobody);
    node.start().await;
    let model = "s3://a-private/m";
    node.mounts(&with_keys(Ask::model("pod-1", model), &s3))
        .await;
    let pinned = pinned(&node);

    s3.fault(Fault::status(503).forever());
    for (pod, model) in [("pod-2", model), ("pod-3", &pinned)] {
        let status = node.publish(&Ask::model(pod, model)).await;
        let status = status.expect_err("mounted without a right");
        assert_eq!(status.code(), Code::Unavailable, "{status}");
    }
    s3.clear_faults();
    denied(&node, &Ask::model("pod-4", model)).await;
    denied(&node, &Ask::model("pod-5", &pinned)).await;
    // Their owner has them while S3 is away, too.
    s3.fault(Fault::status(503).forever());
    node.mounts(&with_keys(Ask::model("pod-6", model), &s3))
        .await;
    assert_eq!(tree(&node.tree("pod-6")), contents(7));
}

#[tokio::test]
async fn what_the_node_itself_was_let_in_to_holds_while_s3_is_away() {
    let s3 = server_with_model("models", 7);
    let mut node = node(&s3, &Itself::Owner);
    node.config = "[access]\nremember = '1ms'\n".to_owned();
    node.start().await;
    node.mounts(&Ask::model("pod-1", "s3://models/m")).await;
    let other = Ask::new(
        "pod-3",
        &[("source", "s3://models/m"), ("include", "config.json")],
    );

    s3.fault(Fault::status(503).forever());
    node.mounts(&Ask::model("pod-2", "s3://models/m")).await;
    let status = node.publish(&other).await.expect_err("nobody proved that");

    assert_eq!(tree(&node.tree("pod-2")), contents(7));
    assert_eq!(status.code(), Code::Unavailable, "{status}");
}

#[tokio::test]
async fn keys_for_one_file_do_not_open_the_rest() {
    let s3 = server_with_model("shared", 7);
    let mut node = node(&s3, &Itself::Owner);
    node.start().await;
    node.weightctl(&["prefetch", "s3://shared/m"]);
    // These keys may list, look at all headers, and read what is no shard: the rest is encrypted.
    s3.fault(
        Fault::status(403)
            .method("GET")
            .path("safetensors")
            .forever(),
    );
    let ask = |pod: &str, include: &str| {
        let mut ask = with_keys(Ask::model(pod, "s3://shared/m"), &s3);
        if !include.is_empty() {
            ask.attributes
                .insert("include".to_owned(), include.to_owned());
        }
        ask
    };

    denied(&node, &ask("pod-1", "")).await;
    node.mounts(&ask("pod-2", "config.json")).await;
    denied(&node, &ask("pod-3", "*.safetensors")).await;
    denied(&node, &ask("pod-4", "*")).await;
}

#[tokio::test]
async fn a_revision_that_a_prefix_has_left_is_not_found() {
    let s3 = server_with_model("a-private", 7);
    let mut node = node(&s3, &Itself::Nobody);
    node.start().await;
    node.mounts(&with_keys(Ask::model("pod-1", "s3://a-private/m"), &s3))
        .await;
    let pinned = pinned(&node);
    s3.put(
        "a-private",
        "m/more.json",
        b"{}".to_vec(),
        PutOptions::default(),
    );
    node.kill_daemon();
    node.start_daemon().await;

    let status = node
        .publish(&with_keys(Ask::model("pod-2", &pinned), &s3))
        .await;

    let status = status.expect_err("there is no such revision");
    assert_eq!(status.code(), Code::NotFound, "{status}");
    for words in ["changed since", "ask for s3://a-private/m@"] {
        assert!(status.message().contains(words), "{status}");
    }
}

#[tokio::test]
async fn a_directory_that_is_no_longer_allowed_is_closed_by_whatever_name() {
    let s3 = server("unused");
    let mut node = node(&s3, &Itself::Nobody);
    let dir = node.path("models/x");
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(dir.join("config.json"), "{}").expect("a file");
    let models = node.path("models").display().to_string();
    node.config = format!("[file]\nallow = [{models:?}]\n");
    node.start().await;
    let model = format!("file://{}", dir.display());
    node.mounts(&Ask::model("pod-1", &model)).await;
    let pinned = pinned(&node);
    node.mounts(&Ask::model("pod-2", &pinned)).await;
    node.kill_daemon();
    node.config = String::new();
    node.start_daemon().await;

    denied(&node, &Ask::model("pod-3", &model)).await;
    denied(&node, &Ask::model("pod-4", &pinned)).await;
}

#[tokio::test]
async fn a_denied_prefix_is_closed_from_above_and_from_below() {
    let s3 = server_with_model("models", 7);
    s3.put(
        "models",
        "secret/x/config.json",
        b"{}".to_vec(),
        PutOptions::default(),
    );
    let mut node = node(&s3, &Itself::Owner);
    node.config = "[[access.deny]]\nsource = 's3://models/secret/*'\n".to_owned();
    node.start().await;
    let ask = |pod, source, include| Ask::new(pod, &[("source", source), ("include", include)]);

    denied(&node, &ask("pod-1", "s3://models", "secret/*")).await;
    denied(&node, &ask("pod-2", "s3://models/secret", "*")).await;
    denied(&node, &ask("pod-3", "s3://models/secret/x", "*")).await;
    node.mounts(&Ask::model("pod-4", "s3://models/m")).await;
    assert_eq!(tree(&node.tree("pod-4")), contents(7));
}
