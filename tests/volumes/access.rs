//! Whose volume may hold what. The bytes are on the node; the right to read them is not.

use std::time::Duration;

use tonic::Code;
use weightd_standin::{Fault, Gated, HubConfig, Origin, Repo};

use crate::node::{Ask, Node, contents, files, tree};

const PRIVATE: &str = "hf://org/private";
const GATED: &str = "hf://org/gated";
const TOKEN: &str = "hf_tenantAmayread";

async fn node() -> Node {
    let mut node = Node::new(HubConfig::default().token(TOKEN).token("hf_another"));
    node.hub.add_repo(
        Repo::new("org/private")
            .private()
            .grant(TOKEN)
            .commit("main", files(7)),
    );
    let gated = Repo::new("org/gated").gated(Gated::Manual).grant(TOKEN);
    node.hub.add_repo(gated.commit("main", files(8)));
    node.start().await;
    node
}

#[tokio::test]
async fn what_one_tenants_token_fetched_is_not_anothers() {
    let node = node().await;
    for (number, model) in [PRIVATE, GATED].iter().enumerate() {
        let tenant_a = Ask::model(&format!("a-{number}"), model).secret("hf-token", TOKEN);
        node.mounts(&tenant_a).await;
        assert_eq!(tree(&node.tree(&tenant_a.pod)), contents(7 + number as u64));

        for (pod, token) in [
            ("none", None),
            ("other", Some("hf_another")),
            ("bad", Some("hf_x")),
        ] {
            let mut ask = Ask::model(&format!("{pod}-{number}"), model);
            if let Some(token) = token {
                ask = ask.secret("hf-token", token);
            }
            let status = node
                .publish(&ask)
                .await
                .expect_err("mounted without a right");
            let code = status.code();
            assert!(
                matches!(code, Code::PermissionDenied | Code::NotFound),
                "{pod}: {status}"
            );
            assert!(!status.message().contains("hf_"), "{status}");
            // The layout and the way of mounting open no door either.
            for (key, value) in [("layout", "hf-cache"), ("mode", "async")] {
                ask.attributes.insert(key.to_owned(), value.to_owned());
                node.publish(&ask)
                    .await
                    .expect_err("mounted without a right");
            }
        }
    }
    assert_eq!(node.mounted().len(), 2, "{:?}", node.mounted());
    assert!(!node.logs().contains("hf_"), "a token is in the log");
    for entry in [node.root(), node.path("kubelet")] {
        let found = std::process::Command::new("grep")
            .args(["-r", TOKEN])
            .arg(entry)
            .output();
        assert!(
            found.expect("grep runs").stdout.is_empty(),
            "a token is on disk"
        );
    }
}

#[tokio::test]
async fn what_lies_in_the_shared_tier_is_nobodys_without_a_right() {
    let mut node = Node::new(HubConfig::default().token(TOKEN));
    let gated = Repo::new("org/gated").gated(Gated::Manual).grant(TOKEN);
    node.hub.add_repo(gated.commit("main", files(8)));
    let tier = node.path("tier");
    // As another node does: this one has a store of its own then.
    let fill = node
        .embedded(&["prefetch", GATED])
        .env("HF_ENDPOINT", node.hub.endpoint())
        .env("WEIGHTD_SHARED_ROOT", &tier)
        .env("HF_TOKEN", TOKEN)
        .output()
        .expect("weightctl runs");
    assert!(fill.status.success(), "{fill:?}");
    std::fs::remove_dir_all(node.root()).expect("its store");
    node.config = format!("[shared]\nroot = {tier:?}\n");
    node.start().await;
    node.hub.clear_requests();

    let refused = node.publish(&Ask::model("none", GATED)).await;
    let tenant = Ask::model("a", GATED).secret("hf-token", TOKEN);
    node.mounts(&tenant).await;

    assert_eq!(refused.expect_err("mounted").code(), Code::PermissionDenied);
    assert_eq!(tree(&node.tree("a")), contents(8));
    assert_eq!(node.hub.cdn_bytes_sent(), 0, "it was not copied");
    let found = std::process::Command::new("grep")
        .args(["-r", TOKEN])
        .arg(tier)
        .output();
    let found = found.expect("grep runs");
    assert!(found.stdout.is_empty(), "a token is in the shared tier");
}

#[tokio::test]
async fn a_gated_model_without_a_right_is_denied_with_the_remedy() {
    let node = node().await;
    let status = node
        .publish(&Ask::model("pod-1", GATED))
        .await
        .expect_err("mounted");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    for words in ["gated", "nodePublishSecretRef", "hf-token"] {
        assert!(
            status.message().contains(words),
            "`{words}` is missing: {status}"
        );
    }
}

#[tokio::test]
async fn a_public_model_is_everybodys_whatever_token_comes_along() {
    let node = node().await;
    let ask = Ask::model("pod-1", "hf://org/model").secret("token", "hf_expired");
    node.mounts(&ask).await;
    assert_eq!(tree(&node.tree("pod-1")), contents(1));
}

#[tokio::test]
async fn a_right_that_is_withdrawn_ends_when_it_is_no_longer_remembered() {
    let mut node = Node::new(HubConfig::default().token(TOKEN));
    let repo = Repo::new("org/private").private().grant(TOKEN);
    node.hub.add_repo(repo.commit("main", files(7)));
    node.config = "[access]\nremember = '1s'\n".to_owned();
    node.start().await;
    node.mounts(&Ask::model("pod-1", PRIVATE).secret("hf-token", TOKEN))
        .await;
    node.hub.remove_repo("org/private");
    tokio::time::sleep(Duration::from_millis(1100)).await;

    let ask = Ask::model("pod-2", PRIVATE).secret("hf-token", TOKEN);
    let status = node
        .publish(&ask)
        .await
        .expect_err("mounted without a right");

    assert_eq!(status.code(), Code::NotFound, "{status}");
    assert_eq!(
        tree(&node.tree("pod-1")),
        contents(7),
        "a running pod lost its files"
    );
}

#[tokio::test]
async fn while_the_hub_is_away_what_it_said_before_holds_and_nothing_else() {
    let mut node = Node::new(HubConfig::default().token(TOKEN));
    let repo = Repo::new("org/private").private().grant(TOKEN);
    node.hub.add_repo(repo.commit("main", files(7)));
    node.config = "[access]\nremember = '1ms'\n".to_owned();
    node.start().await;
    node.mounts(&Ask::model("pod-1", PRIVATE).secret("hf-token", TOKEN))
        .await;
    node.mounts(&Ask::model("pod-2", "hf://org/model")).await;
    node.hub.fault(Fault::status(503).on(Origin::Hub).forever());

    node.mounts(&Ask::model("pod-3", PRIVATE).secret("hf-token", TOKEN))
        .await;
    node.mounts(&Ask::model("pod-4", "hf://org/model")).await;
    let denied = node.publish(&Ask::model("pod-5", PRIVATE)).await;

    let denied = denied.expect_err("mounted without a right");
    assert_eq!(denied.code(), Code::Unavailable, "{denied}");
    assert_eq!(tree(&node.tree("pod-3")), contents(7));
}

#[tokio::test]
async fn a_right_that_the_hub_has_ended_does_not_come_back_when_it_is_away() {
    let mut node = Node::new(HubConfig::default().token(TOKEN).token("hf_another"));
    let repo = Repo::new("org/private").private();
    node.hub
        .add_repo(repo.clone().grant(TOKEN).commit("main", files(7)));
    node.config = "[access]\nremember = '1ms'\n".to_owned();
    node.start().await;
    let ask = |pod| Ask::model(pod, PRIVATE).secret("hf-token", TOKEN);
    node.mounts(&ask("pod-1")).await;
    node.hub.remove_repo("org/private");
    node.hub
        .add_repo(repo.grant("hf_another").commit("main", files(7)));
    // What the branch stood for is known for a moment: its commit is asked for, and refused.
    node.publish(&ask("pod-2")).await.expect_err("mounted");
    // Longer than a no is remembered.
    tokio::time::sleep(Duration::from_secs(6)).await;
    node.hub.fault(Fault::status(503).on(Origin::Hub).forever());

    let status = node.publish(&ask("pod-3")).await.expect_err("mounted");

    assert_eq!(status.code(), Code::Unavailable, "{status}");
}

#[tokio::test]
async fn a_hundred_pods_of_a_model_that_is_here_cost_the_hub_one_answer() {
    let node = Node::running().await;
    node.weightctl(&["prefetch", "hf://org/model"]);
    node.hub.clear_requests();
    let asks = (0..100).map(|number| Ask::model(&format!("pod-{number}"), "hf://org/model"));
    let asks: Vec<_> = asks.collect();

    let published = futures::future::join_all(asks.iter().map(|ask| node.publish(ask))).await;

    for published in published {
        published.expect("mounted");
    }
    let asked = node.hub.requests().len();
    assert!(asked <= 5, "{asked} requests");
}

#[tokio::test]
async fn the_policy_says_which_namespace_may_use_which_model() {
    let mut node = Node::new(HubConfig::default());
    node.config = "[[access.allow]]\nsource = 'hf://org/*'\nnamespace = 'team-*'\n\
        [[access.deny]]\nsource = '*'\nnamespace = 'team-b'\n"
        .to_owned();
    node.start().await;
    let ask = |pod, namespace| Ask::model(pod, "hf://org/model").namespace(namespace);
    node.mounts(&ask("pod-1", "team-a")).await;

    for (pod, namespace) in [("pod-2", "team-b"), ("pod-3", "default")] {
        let status = node
            .publish(&ask(pod, namespace))
            .await
            .expect_err("mounted");
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(status.message().contains(namespace), "{status}");
    }
    // What only kubelet may write cannot be written by a pod's author for another pod.
    let mut forged = node.request(&ask("pod-4", "default"));
    let context = &mut forged.volume_context;
    context.insert("csi.storage.k8s.io/pod.uid".to_owned(), "pod-1".to_owned());
    context.insert(
        "csi.storage.k8s.io/pod.namespace".to_owned(),
        "team-a".to_owned(),
    );
    let status = node
        .client()
        .await
        .node_publish_volume(forged)
        .await
        .expect_err("mounted");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
}
