//! This machine's Node object: what weightd reads of it, and what it says there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node as FullNode, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::watcher;
use kube::{Client, Error, Resource};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::timeout;
use weightd_core::metrics::Metrics;
use weightd_kube::Cause;

use super::TIMEOUTS;
use super::watch::{Name, Seen, follow};

/// The annotation that names models for a node: `NodePool.spec.template.metadata.annotations` puts it there.
pub const PREFETCH: &str = "weightd.io/prefetch";

/// Who reports in Events.
const REPORTER: &str = "weightd.io/node";

/// How long a machine that starts may take until it has registered its Node: 1 min.
const REGISTERS: Duration = Duration::from_secs(60);

/// A Node without its status, which is most of it and comes with every change.
#[derive(Resource, Debug, Clone, Deserialize)]
#[resource(inherit = FullNode)]
pub(super) struct SlimNode {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: SlimSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct SlimSpec {
    /// As the API server has them: a patch has to name them to the letter.
    #[serde(default)]
    taints: Vec<Value>,
}

/// What weightd reads of a Node.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct NodeView {
    pub(super) uid: String,
    pub(super) created: Option<Timestamp>,
    pub(super) labels: BTreeMap<String, String>,
    /// The annotation [`PREFETCH`].
    pub(super) prefetch: Option<String>,
    pub(super) taints: Vec<Value>,
}

impl From<SlimNode> for NodeView {
    fn from(node: SlimNode) -> Self {
        let metadata = node.metadata;
        Self {
            uid: metadata.uid.unwrap_or_default(),
            created: metadata.creation_timestamp.map(|time| time.0),
            labels: metadata.labels.unwrap_or_default(),
            prefetch: metadata
                .annotations
                .and_then(|mut all| all.remove(PREFETCH)),
            taints: node.spec.taints,
        }
    }
}

impl NodeView {
    /// Whether it has a taint of this key, whatever its effect.
    pub(super) fn has_taint(&self, key: &str) -> bool {
        self.taints.iter().any(|taint| taint["key"] == key)
    }
}

/// What the API server knows of this machine. Clones share it.
#[derive(Clone)]
pub(super) struct ThisNode {
    pub(super) client: Client,
    pub(super) name: Arc<str>,
    pub(super) metrics: Arc<Metrics>,
}

impl ThisNode {
    pub(super) fn new(client: Client, name: &str, metrics: Arc<Metrics>) -> Self {
        Self {
            client,
            name: name.into(),
            metrics,
        }
    }

    fn api(&self) -> Api<SlimNode> {
        Api::all(self.client.clone())
    }

    /// Watches the Node, for ever.
    pub(super) async fn watch(&self, seen: &watch::Sender<Seen<NodeView>>) {
        let only = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        let name = Name {
            call: "watch_node",
            what: "this Node",
            remedy: "let the service account get, list and watch nodes, and see that kubernetes.node is the Node's name",
        };
        let metrics = Arc::clone(&self.metrics);
        follow(self.api(), only, name, metrics, seen, NodeView::from).await;
    }

    /// Says for ever if there is no Node of this name: one that was given a wrong name would do nothing, in silence.
    pub(super) async fn tell_if_missing(&self, mut nodes: watch::Receiver<Seen<NodeView>>) {
        let missing = |seen: &Seen<NodeView>| {
            let all = seen.all();
            all.is_some_and(|all| !all.contains_key(&*self.name))
        };
        while nodes.wait_for(missing).await.is_ok() {
            let found = nodes.wait_for(|seen| !missing(seen));
            if timeout(REGISTERS, found).await.is_ok() {
                continue;
            }
            self.metrics.kube_failed("watch_node");
            let remedy =
                "see that kubernetes.node is the Node's name, as `kubectl get nodes` has it";
            tracing::error!(node = %self.name, remedy, "there is no Node of this name: its taints, labels and annotation are left alone");
            if nodes.wait_for(|seen| !missing(seen)).await.is_ok() {
                tracing::info!(node = %self.name, "the Node is there now");
            }
        }
    }

    /// The Node as it is now; `None` if there is none.
    pub(super) async fn now(&self) -> Result<Option<NodeView>, Error> {
        self.named(&self.name).await
    }

    /// The Node of another name; `None` if there is none.
    pub(super) async fn named(&self, name: &str) -> Result<Option<NodeView>, Error> {
        let found = in_time(self.api().get_opt(name)).await?;
        Ok(found.map(NodeView::from))
    }

    /// Changes the Node. The metric counts a failure as one of `call`.
    pub(super) async fn patch(
        &self,
        call: &'static str,
        patch: &Patch<Value>,
    ) -> Result<(), Error> {
        let (nodes, parameters) = (self.api(), PatchParams::default());
        let patched = in_time(nodes.patch(&self.name, &parameters, patch)).await;
        if patched.is_err() {
            self.metrics.kube_failed(call);
        }
        patched.map(drop)
    }

    /// Tells of trouble with the Node in an Event. One that is lost is only in the log.
    pub(super) async fn warn(&self, uid: &str, reason: &str, note: String) {
        let reporter = Reporter {
            controller: REPORTER.to_owned(),
            instance: Some(self.name.to_string()),
        };
        // Not one for all: it would take another note for a repetition of the first, and tell only that.
        let recorder = Recorder::new(self.client.clone(), reporter);
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(note),
            action: "Prefetch".to_owned(),
            secondary: None,
        };
        let node = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(self.name.to_string()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        };
        if let Err(error) = in_time(recorder.publish(&event, &node)).await {
            self.metrics.kube_failed("event");
            let error = Cause::from(error);
            tracing::warn!(%error, reason, "event not written");
        }
    }
}

/// A call that had no answer in time.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
struct Slow(Duration);

/// The failure of a call that had no answer for as long as one may take.
pub(super) fn slow() -> Error {
    Error::Service(Box::new(Slow(TIMEOUTS.call)))
}

/// `call`, for no longer than a call may take.
pub(super) async fn in_time<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let answer = timeout(TIMEOUTS.call, call).await;
    answer.unwrap_or_else(|_| Err(slow()))
}

#[cfg(test)]
mod tests {
    use kube::Config;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_node_that_there_is_none_of_is_told_unless_it_comes_soon() {
        let config = Config::new("http://127.0.0.1:1".parse().unwrap());
        let metrics = Arc::<Metrics>::default();
        let client = Client::try_from(config).unwrap();
        let node = ThisNode::new(client, "node", Arc::clone(&metrics));
        let told = || !metrics.encode().contains("{call=\"watch_node\"} 0");
        let (nodes, seen) = watch::channel(Seen::NotYet);
        let telling = node.tell_if_missing(seen);
        let steps = async {
            tokio::time::sleep(REGISTERS * 2).await;
            assert!(!told(), "while nothing is known");
            nodes.send_replace(Seen::These(BTreeMap::new()));
            tokio::time::sleep(REGISTERS / 2).await;
            let this = BTreeMap::from([("node".to_owned(), NodeView::default())]);
            nodes.send_replace(Seen::These(this));
            tokio::time::sleep(REGISTERS * 2).await;
            assert!(!told(), "it came");
            nodes.send_replace(Seen::These(BTreeMap::new()));
            tokio::time::sleep(REGISTERS * 2).await;
            assert!(told());
        };

        tokio::select! {
            () = telling => unreachable!("somebody still watches"),
            () = steps => {}
        }
    }
}
