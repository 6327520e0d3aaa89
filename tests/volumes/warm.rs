//! Volumes whose model is read into the page cache, and how fast a mount is read.

use std::path::Path;

use serde_json::Value;
use tonic::Code;

use crate::node::{Ask, Node};

const MODEL: &str = "hf://org/model";

fn warmings(node: &Node) -> Vec<Value> {
    let status = node.weightctl(&["status"]);
    status["warmings"].as_array().expect("an array").clone()
}

async fn becomes_warm(node: &Node) {
    node.until("it is warm", async || {
        warmings(node)
            .iter()
            .any(|warming| warming["state"] == "warm")
    })
    .await;
    let warming = &warmings(node)[0];
    assert_eq!(warming["bytes_warm"], warming["bytes"], "{warming}");
    assert!(
        warming["bytes"].as_u64().is_some_and(|bytes| bytes > 0),
        "{warming}"
    );
}

#[tokio::test]
async fn a_volume_is_warmed_unless_it_says_no_in_both_modes() {
    for mode in ["wait", "async"] {
        let node = Node::running().await;
        let attributes = [("source", MODEL), ("mode", mode), ("warm", "false")];
        node.publish(&Ask::new("pod-1", &attributes))
            .await
            .expect("published");
        let complete = node.root().join("snapshots");
        node.until("it is complete", async || {
            complete
                .read_dir()
                .is_ok_and(|mut dir| dir.next().is_some())
        })
        .await;
        assert_eq!(warmings(&node), [] as [Value; 0], "nobody wants it");

        let attributes = [("source", MODEL), ("mode", mode)];
        node.publish(&Ask::new("pod-2", &attributes))
            .await
            .expect("published");

        becomes_warm(&node).await;
    }
}

#[tokio::test]
async fn a_volume_that_is_mounted_first_is_warmed_when_it_is_complete() {
    let node = Node::running().await;
    let attributes = [("source", MODEL), ("mode", "async"), ("warm", "true")];

    node.publish(&Ask::new("pod-1", &attributes))
        .await
        .expect("published");

    becomes_warm(&node).await;
}

#[tokio::test]
async fn what_warm_may_be_is_said() {
    let node = Node::running().await;

    let error = node
        .publish(&Ask::new("pod-1", &[("source", MODEL), ("warm", "maybe")]))
        .await
        .expect_err("published");

    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("true or false"), "{error}");
}

#[tokio::test]
async fn a_mount_is_measured_against_what_is_behind_it() {
    let node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    let path = node.weightctl(&["path", MODEL])["path"].clone();
    let (mount, store) = (
        node.tree("pod-1"),
        path.as_str().expect("a path").to_owned(),
    );

    let words = ["bench", "read", "--rounds", "2", "--against", &store];
    let measured = node.weightctl(&[&words[..], &[text(&mount)]].concat());

    let all = measured["measurements"].as_array().expect("an array");
    assert_eq!(all.len(), 8, "{measured}");
    for one in all {
        let ratio = one["ratio"].as_f64().expect("a ratio");
        assert!(
            ratio > 0.0 && one["against"]["seconds"].as_f64().is_some(),
            "{one}"
        );
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
