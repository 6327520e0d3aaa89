//! Taints that keep pods away until this node is of use to them, and their removal.
//!
//! `<driver>/agent-not-ready` goes when kubelet lists the driver in the node's CSINode, `weightd.io/warming` when the
//! warm set is ready. Both also go when that takes too long: a node that weightd does not get ready is better than
//! a pod that nobody can schedule. So it does not matter either who put a taint on which node, when, or how often the
//! daemon died meanwhile: the limit holds from when the daemon first saw the taint, and three times it from when the Node
//! was made.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::storage::v1::CSINode;
use kube::Error;
use kube::api::{Api, Patch};
use kube::runtime::watcher;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use weightd_kube::Cause;

use super::node::{NodeView, ThisNode};
use super::watch::{Name, Seen, follow};

/// The taint of a node whose warm set is not ready.
pub const WARMING: &str = "weightd.io/warming";

/// How long the driver may take to register: 10 min.
///
/// Source: the time that the EBS, EFS and S3 CSI drivers watch for it.
const REGISTRATION: Duration = Duration::from_secs(600);

/// How many times a taint's limit a Node may be old, and still keep it: a daemon that dies again and again would never
/// see the limit pass.
const OLD: u32 = 3;

/// The pauses between two attempts to remove a taint.
const PAUSES: std::ops::Range<Duration> = Duration::from_millis(500)..Duration::from_secs(30);

/// How long it is tried with growing pauses, before it is told again.
const ATTEMPTS: Duration = Duration::from_secs(600);

/// The taint of a node on which `driver` does not serve yet.
#[must_use]
pub fn startup_key(driver: &str) -> String {
    format!("{driver}/agent-not-ready")
}

/// Whether the node has what it is to have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Warmth {
    /// Not yet.
    #[default]
    Cold,
    /// All of it.
    Warm,
}

/// One taint of one node.
pub(super) struct Taint {
    pub(super) node: ThisNode,
    /// As metrics call it.
    pub(super) name: &'static str,
    pub(super) key: String,
    pub(super) limit: Duration,
    pub(super) nodes: watch::Receiver<Seen<NodeView>>,
}

impl Taint {
    pub(super) fn of_startup(
        node: ThisNode,
        driver: &str,
        nodes: watch::Receiver<Seen<NodeView>>,
    ) -> Self {
        Self {
            node,
            name: "startup",
            key: startup_key(driver),
            limit: REGISTRATION,
            nodes,
        }
    }

    pub(super) fn of_warming(
        node: ThisNode,
        limit: Duration,
        nodes: watch::Receiver<Seen<NodeView>>,
    ) -> Self {
        Self {
            node,
            name: "warming",
            key: WARMING.to_owned(),
            limit,
            nodes,
        }
    }

    /// Removes the taint whenever the node has it and `ready` says so, or it takes too long. For ever: a Node that is
    /// registered again has its taints again.
    pub(super) async fn keep_off<F: Future<Output = ()>>(mut self, ready: impl Fn() -> F) {
        loop {
            let Some(view) = self.until(true).await else {
                return;
            };
            self.node.metrics.tainted(self.name, true);
            let deadline = Instant::now() + self.patience(&view);
            tracing::info!(taint = %self.key, "the node is tainted until it is ready");
            let in_time = tokio::select! {
                () = ready() => true,
                () = sleep_until(deadline) => false,
                gone = self.until(false) => {
                    if gone.is_none() { return; }
                    self.node.metrics.tainted(self.name, false);
                    continue;
                }
            };
            if !in_time {
                let limit_s = self.limit.as_secs();
                tracing::warn!(taint = %self.key, limit_s, "the node is not ready in time, its taint goes all the same");
            }
            self.remove().await;
            // Else what the watch showed before would look like a new taint.
            if self.until(false).await.is_none() {
                return;
            }
            self.node.metrics.tainted(self.name, false);
        }
    }

    /// Waits until the node has the taint, or has it no more. `None` if nobody watches any longer.
    async fn until(&mut self, tainted: bool) -> Option<NodeView> {
        let (key, name) = (&self.key, &*self.node.name);
        let seen = self.nodes.wait_for(|seen| match view(seen, name) {
            Some(view) => view.has_taint(key) == tainted,
            // A Node that is gone has no taint.
            None => !tainted && seen.all().is_some(),
        });
        let seen = seen.await.ok()?;
        Some(view(&seen, name).cloned().unwrap_or_default())
    }

    fn patience(&self, view: &NodeView) -> Duration {
        patience(self.limit, view.created, Timestamp::now())
    }

    /// Tries until the taint is off.
    async fn remove(&self) {
        let mut begun = Instant::now();
        let mut pause = PAUSES.start;
        loop {
            let error = match self.try_remove().await {
                Ok(()) => {
                    tracing::info!(taint = %self.key, "taint removed");
                    return;
                }
                Err(error) => error,
            };
            // The taints were changed meanwhile: that is no trouble.
            let conflict = matches!(&error, Error::Api(status) if matches!(status.code, 409 | 422));
            let error = Cause::from(error);
            let first = pause == PAUSES.start && !conflict;
            if first || begun.elapsed() > ATTEMPTS {
                let remedy = "let the service account get and patch nodes, or remove the taint with kubectl taint";
                tracing::error!(taint = %self.key, %error, remedy, "taint not removed: pods that do not tolerate it cannot come here; retrying");
                begun = Instant::now();
            }
            sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(PAUSES.end);
        }
    }

    async fn try_remove(&self) -> Result<(), Error> {
        let view = self.node.now().await;
        let view = view.inspect_err(|_| self.node.metrics.kube_failed("taint"))?;
        let Some(patch) = view.and_then(|view| without(&view.taints, &self.key)) else {
            return Ok(());
        };
        let patch = serde_json::from_value(patch).expect("it is a JSON patch");
        self.node.patch("taint", &Patch::Json(patch)).await
    }
}

fn view<'a>(seen: &'a Seen<NodeView>, name: &str) -> Option<&'a NodeView> {
    seen.all()?.get(name)
}

/// How much longer a taint may stay that is seen now for the first time.
fn patience(limit: Duration, created: Option<Timestamp>, now: Timestamp) -> Duration {
    // A clock that is behind that of the API server only makes it the whole limit.
    let age = created.and_then(|created| Duration::try_from(now.duration_since(created)).ok());
    (limit * OLD)
        .saturating_sub(age.unwrap_or_default())
        .min(limit)
}

/// The patch that takes `key` away from `taints`, unless they were changed meanwhile. `None` if it is not there.
fn without(taints: &[Value], key: &str) -> Option<Value> {
    let rest: Vec<&Value> = taints.iter().filter(|taint| taint["key"] != key).collect();
    (rest.len() < taints.len()).then(|| {
        json!([
            { "op": "test", "path": "/spec/taints", "value": taints },
            { "op": "replace", "path": "/spec/taints", "value": rest },
        ])
    })
}

/// Waits until kubelet lists `driver` among those of the node. No failure ends the wait.
pub(super) async fn driver_registered(node: &ThisNode, driver: &str) {
    let only = watcher::Config::default().fields(&format!("metadata.name={}", node.name));
    let name = Name {
        call: "watch_csinode",
        what: "this node's CSINode",
        remedy: "let the service account get, list and watch csinodes",
    };
    let (sender, mut receiver) = watch::channel(Seen::NotYet);
    let lists = |csi_node: CSINode| {
        let mut drivers = csi_node.spec.drivers.iter();
        drivers.any(|listed| listed.name == driver)
    };
    let csi_nodes: Api<CSINode> = Api::all(node.client.clone());
    let metrics = Arc::clone(&node.metrics);
    let watching = follow(csi_nodes, only, name, metrics, &sender, lists);
    let found = receiver.wait_for(|seen| {
        let listed = seen.all().and_then(|all| all.get(&*node.name));
        listed.copied().unwrap_or_default()
    });
    tokio::select! {
        () = watching => {}
        _ = found => {}
    }
}

/// Waits until the node is warm, or nobody sees to that any longer.
pub(super) async fn warm(mut warmth: watch::Receiver<Warmth>) {
    let _ = warmth.wait_for(|warmth| *warmth == Warmth::Warm).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taint(key: &str) -> Value {
        json!({ "key": key, "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z" })
    }

    #[test]
    fn a_taint_goes_by_its_key_and_the_others_stay_as_they_are() {
        let taints = [
            taint("a"),
            taint("csi.weightd.io/agent-not-ready"),
            taint("b"),
        ];

        let patch = without(&taints, &startup_key("csi.weightd.io")).expect("a patch");

        assert_eq!(patch[0]["op"], "test");
        assert_eq!(patch[0]["value"], json!(taints));
        assert_eq!(patch[1]["op"], "replace");
        assert_eq!(patch[1]["value"], json!([taint("a"), taint("b")]));
        assert_eq!(without(&taints, "c"), None);
    }

    #[test]
    fn a_taint_stays_no_longer_than_its_limit_and_not_on_an_old_node() {
        let limit = Duration::from_secs(600);
        let now: Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        for (created, expected) in [
            (None, 600),
            (Some("2026-01-01T00:59:00Z"), 600),
            (Some("2026-01-01T00:35:00Z"), 300),
            (Some("2025-01-01T00:00:00Z"), 0),
            (Some("2026-01-01T01:10:00Z"), 600),
        ] {
            let time = created.map(|text| text.parse().unwrap());
            let left = patience(limit, time, now);
            assert_eq!(left.as_secs(), expected, "{created:?}");
        }
    }
}
