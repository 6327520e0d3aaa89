//! `weightctl doctor`: what it learns of its node from the API server.

use std::fs;

use serde_json::{Value, json};

use super::api_server::{ApiServer, CSI_NODES, NODES, PREFETCHES};
use super::doctor::{Node, Report, text};

struct OnNode {
    node: Node,
    server: ApiServer,
}

impl OnNode {
    /// A node that is well.
    fn new() -> Self {
        let on = Self {
            node: Node::new(),
            server: ApiServer::start(),
        };
        on.put_node(json!([]), "False");
        on.put_drivers(&["other.example", "csi.weightd.io"]);
        on.server.put(PREFETCHES, Vec::new());
        on
    }

    fn put_node(&self, taints: Value, disk_pressure: &str) {
        let node = json!({
            "kind": "Node", "apiVersion": "v1", "metadata": { "name": "node-1" }, "spec": { "taints": taints },
            "status": { "conditions": [
                { "type": "DiskPressure", "status": disk_pressure },
                { "type": "Ready", "status": "True" },
            ] },
        });
        self.server.put(NODES, vec![node]);
    }

    fn put_drivers(&self, names: &[&str]) {
        let drivers = names
            .iter()
            .map(|name| json!({ "name": name, "nodeID": "node-1" }));
        let drivers: Vec<Value> = drivers.collect();
        let object = json!({
            "kind": "CSINode", "apiVersion": "storage.k8s.io/v1", "metadata": { "name": "node-1" },
            "spec": { "drivers": drivers },
        });
        self.server.put(CSI_NODES, vec![object]);
    }

    fn doctor(&self) -> Report {
        self.doctor_as("node-1")
    }

    fn doctor_as(&self, name: &str) -> Report {
        let sandbox = &self.node.sandbox;
        let (file, kubeconfig) = (sandbox.path("weightd.toml"), sandbox.path("kubeconfig"));
        self.server.write_kubeconfig(&kubeconfig);
        let settings = format!(
            "root = '{}'\n[kubernetes]\nnode = '{name}'\nkubeconfig = '{}'\n",
            sandbox.root().display(),
            kubeconfig.display()
        );
        fs::write(&file, settings).expect("a file");
        self.node.doctor(&["--config", text(&file)])
    }
}

#[test]
fn a_node_that_is_well_has_only_good_findings() {
    let on = OnNode::new();

    let report = on.doctor();

    for check in [
        "kubernetes",
        "kubernetes-driver",
        "kubernetes-warm-set",
        "kubernetes-rights",
    ] {
        assert_eq!(report.level(check), "ok", "{}", report.finding(check));
    }
    assert!(
        !report.ran.stdout.contains("aSecretToken"),
        "{:?}",
        report.ran
    );
    assert_eq!(on.server.asked("DELETE") + on.server.asked("PATCH"), 0);
}

#[test]
fn a_machine_that_is_no_node_is_not_asked_about() {
    let report = Node::new().doctor(&[]);
    assert_eq!(report.level("kubernetes"), "ok");
    assert!(
        report.finding("kubernetes")["found"]
            .to_string()
            .contains("not asked")
    );
}

#[test]
fn a_driver_that_kubelet_does_not_know_is_an_error() {
    let on = OnNode::new();
    on.put_drivers(&["other.example"]);
    on.doctor().error(
        "kubernetes-driver",
        &["not registered csi.weightd.io", "kubelet.dir"],
    );
    on.server.put(CSI_NODES, Vec::new());
    on.doctor().error("kubernetes-driver", &["not registered"]);
}

#[test]
fn what_keeps_pods_away_is_told() {
    let on = OnNode::new();
    let says = |words: &[&str]| {
        let report = on.doctor();
        let finding = report.finding("kubernetes").to_string();
        assert_eq!(report.level("kubernetes"), "warn", "{finding}");
        assert!(words.iter().all(|word| finding.contains(word)), "{finding}");
    };
    on.put_node(
        json!([{ "key": "csi.weightd.io/agent-not-ready", "effect": "NoExecute" }]),
        "False",
    );
    says(&["agent-not-ready", "registered the driver"]);
    on.put_node(json!([]), "True");
    says(&["DiskPressure", "high_watermark_percent"]);
    on.put_node(
        json!([{ "key": "weightd.io/warming", "effect": "NoSchedule" }]),
        "False",
    );
    says(&["weightd.io/warming", "warming_timeout"]);
}

#[test]
fn models_that_the_node_should_have_and_has_not_are_named() {
    let on = OnNode::new();
    let object = |name: &str, phase: &str, message: &str| {
        let at = "2026-01-01T00:00:00Z";
        json!({
            "apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch",
            "metadata": { "name": name }, "spec": { "source": format!("hf://org/{name}") },
            "status": { "nodes": [
                { "name": "node-1", "phase": phase, "message": message, "updated": at },
                { "name": "node-2", "phase": "Failed", "message": "of another node", "updated": at },
            ] },
        })
    };
    on.server.put(
        PREFETCHES,
        vec![
            object("chat", "Ready", ""),
            object("code", "Waiting", "no room"),
        ],
    );

    let report = on.doctor();

    let finding = report.finding("kubernetes-warm-set").to_string();
    assert_eq!(report.level("kubernetes-warm-set"), "warn", "{finding}");
    assert!(
        finding.contains("1 of 2 models") && finding.contains("code: Waiting: no room"),
        "{finding}"
    );
    assert!(!finding.contains("another node"), "{finding}");
}

#[test]
fn rights_that_are_lacking_are_named() {
    let on = OnNode::new();
    on.server.deny("patch nodes");
    on.server.deny("create events");
    on.doctor().error(
        "kubernetes-rights",
        &["patch nodes", "create events.events.k8s.io", "ClusterRole"],
    );
    on.server.refuse(NODES, 403);
    on.doctor()
        .error("kubernetes", &["cannot get nodes", "ClusterRole"]);
}

#[test]
fn an_api_server_that_is_away_or_knows_another_node_is_told_once() {
    let on = OnNode::new();
    on.doctor_as("node-9")
        .error("kubernetes", &["no Node `node-9`", "kubernetes.node"]);
    on.server.refuse("/", 401);
    let report = on.doctor();
    report.error("kubernetes", &["does not know this account"]);
    assert!(
        !report.ran.stdout.contains("kubernetes-rights"),
        "{:?}",
        report.ran
    );
}
