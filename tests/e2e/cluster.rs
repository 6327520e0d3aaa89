//! `weightctl cluster`: which node has what, against an API server on loopback.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::api_server::{ApiServer, NODES, PREFETCHES};
use super::harness::{Ran, Sandbox, run};

const REVISION: &str = "0e9e39f249a16976918f6564b8830bc894c89659";

struct Cluster {
    server: ApiServer,
    sandbox: Sandbox,
}

impl Cluster {
    fn new() -> Self {
        let cluster = Self {
            server: ApiServer::start(),
            sandbox: Sandbox::new(),
        };
        cluster.server.write_kubeconfig(&cluster.kubeconfig());
        cluster
    }

    fn kubeconfig(&self) -> PathBuf {
        self.sandbox.path("kubeconfig")
    }

    /// `weightctl cluster --kubeconfig …` with these words.
    fn ask(&self, words: &[&str]) -> Ran {
        let mut command = self.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
        command
            .args(words)
            .arg("--kubeconfig")
            .arg(self.kubeconfig());
        run(&mut command)
    }
}

fn node(name: &str, models: &[&str]) -> Value {
    let labels: serde_json::Map<String, Value> = models
        .iter()
        .map(|model| (format!("model.weightd.io/{model}"), json!(REVISION)))
        .collect();
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": { "name": name, "labels": labels },
    })
}

fn prefetch(name: &str, source: &str, nodes: Vec<Value>) -> Value {
    json!({
        "apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch",
        "metadata": { "name": name }, "spec": { "source": source }, "status": { "nodes": nodes },
    })
}

fn entry(node: &str, phase: &str) -> Value {
    json!({ "name": node, "phase": phase, "bytes": 1000, "bytesDone": 250, "updated": "2026-01-01T00:00:00Z" })
}

#[test]
fn all_nodes_and_objects_are_read_page_by_page() {
    let cluster = Cluster::new();
    let name = |number: usize| format!("node-{number:04}");
    let nodes = (0..1200).map(|number| node(&name(number), &["hf.org.model"]));
    cluster.server.put(NODES, nodes.collect());
    let entries = || {
        (0..200)
            .map(|number| entry(&name(number), "Ready"))
            .collect()
    };
    let objects =
        (0..12).map(|number| prefetch(&format!("set-{number}"), "hf://org/other", entries()));
    cluster.server.put(PREFETCHES, objects.collect());

    let all = cluster.ask(&["--output", "json", "cluster"]).json();

    assert_eq!(all["nodes"].as_array().expect("nodes").len(), 1200);
    let objects = all["prefetches"].as_array().expect("objects");
    let told: usize = objects
        .iter()
        .map(|object| object["nodes"].as_array().expect("nodes").len())
        .sum();
    assert_eq!((objects.len(), told), (12, 2400));
    let asked = |kind: &str| cluster.server.asked(&format!("GET {kind}?"));
    assert_eq!((asked(NODES), asked(PREFETCHES)), (3, 2));
}

#[test]
fn one_model_or_one_node_can_be_asked_for() {
    let cluster = Cluster::new();
    let nodes = vec![
        node("node-a", &["hf.org.model", "hf.org.other"]),
        node("node-b", &["hf.org.model"]),
    ];
    cluster.server.put(NODES, nodes);
    let chat = prefetch(
        "chat",
        "hf://org/model@main",
        vec![entry("node-b", "Fetching"), entry("node-x", "Ready")],
    );
    let other = prefetch("other", "hf://org/other", vec![entry("node-a", "Ready")]);
    cluster.server.put(PREFETCHES, vec![chat, other]);

    let model = cluster.ask(&["cluster", "hf://org/model"]);

    let lines = [
        "MODEL                PREFETCH  NODE    PHASE     DONE            REVISION      SAYS",
        "hf.org.model         -         node-a  Ready     -               0e9e39f249a1  by its label",
        "hf.org.model         -         node-b  Ready     -               0e9e39f249a1  by its label",
        "hf://org/model@main  chat      node-b  Fetching  25 % of 1000 B  -",
        "hf://org/model@main  chat      node-x  Gone      1000 B          -             this node has left the cluster",
    ];
    assert_eq!(model.stdout.lines().collect::<Vec<_>>(), lines, "{model:?}");
    let node = cluster
        .ask(&["--output", "json", "cluster", "--node", "node-a"])
        .json();
    assert_eq!(node["prefetches"][0]["name"], "other");
    assert_eq!(node["prefetches"].as_array().map(Vec::len), Some(1));
    assert_eq!(node["nodes"].as_array().map(Vec::len), Some(1));
    cluster
        .ask(&["cluster", "no model"])
        .failed(2, &["no model"]);
}

#[test]
fn a_cluster_without_the_custom_resource_still_has_labels() {
    let cluster = Cluster::new();
    cluster
        .server
        .put(NODES, vec![node("node-a", &["hf.org.model"])]);

    let ran = cluster.ask(&["cluster"]);

    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("hf.org.model"), "{ran:?}");
    assert!(ran.stderr.contains("CRD comes with the chart"), "{ran:?}");
}

#[test]
fn who_may_not_or_cannot_ask_is_told_what_to_do() {
    let cluster = Cluster::new();
    cluster.server.put(NODES, Vec::new());
    cluster.server.refuse(PREFETCHES, 403);
    cluster.ask(&["cluster"]).failed(
        1,
        &[
            "cannot list modelprefetches",
            "the right to list modelprefetches",
        ],
    );
    cluster.server.refuse(NODES, 401);
    let ran = cluster.ask(&["cluster"]);
    ran.failed(1, &["cannot list nodes", "renew the credentials"]);
    assert!(!ran.stderr.contains("aSecretToken"), "{ran:?}");

    let mut nowhere = cluster.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
    run(nowhere.arg("cluster")).failed(1, &["which cluster?", "--kubeconfig"]);
    let mut missing = cluster.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
    let missing = run(missing.args(["cluster", "--kubeconfig", "/nowhere/config"]));
    missing.failed(1, &["/nowhere/config", "kubectl --kubeconfig"]);
}

#[test]
fn a_server_that_is_away_is_told_at_once() {
    let cluster = Cluster::new();
    let Cluster { server, sandbox } = cluster;
    drop(server);
    let mut command = sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
    command
        .arg("cluster")
        .arg("--kubeconfig")
        .arg(sandbox.path("kubeconfig"));
    run(&mut command).failed(1, &["cannot list nodes", "kubectl get nodes"]);
}
