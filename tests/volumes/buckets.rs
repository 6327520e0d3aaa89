//! Whose volume may hold what of S3, and of directories.

use std::time::Duration;

use tonic::Code;
use weightd_core::digest::Digest;
use weightd_standin::HubConfig;
use weightd_standin::Repo;
use weightd_standin::s3::{PutOptions, S3Config, S3Server};

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
