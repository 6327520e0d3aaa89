//! What all nodes together say of each ModelPrefetch: one line for `kubectl get`, and no word of nodes that are gone.
//!
//! Every write goes to all daemons, which watch these objects: so there is at most one for an object in a while.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::time::{Instant, interval, timeout};
use weightd_kube::Cause;

use crate::kube::prefetch::{ModelPrefetch, NodePhase};

/// Who writes the summary.
const MANAGER: &str = "weightd-controller";

/// The least time between two writes to one object.
const REST: Duration = Duration::from_secs(10);

/// How often objects and nodes are compared.
const LOOK: Duration = Duration::from_secs(1);

/// How long a node must have been gone before its entries are removed: the two watches do not keep step.
const GONE: Duration = Duration::from_secs(60);

/// Objects of one answer to a list: each may tell of thousands of nodes.
const PAGE: u32 = 10;

/// How long a write may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// Nothing but a Node's metadata is asked for.
type Name = kube::core::PartialObjectMeta<Node>;

/// What is kept of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Told {
    uid: String,
    version: String,
    summary: Option<String>,
    /// In the order of the status.
    nodes: Vec<String>,
    ready: usize,
    failed: usize,
}

impl Told {
    fn of(object: &ModelPrefetch) -> Self {
        let status = object.status.clone().unwrap_or_default();
        let count = |phase| {
            status
                .nodes
                .iter()
                .filter(|node| node.phase == phase)
                .count()
        };
        Self {
            uid: object.uid().unwrap_or_default(),
            version: object.resource_version().unwrap_or_default(),
            summary: status.summary.clone(),
            ready: count(NodePhase::Ready),
            failed: count(NodePhase::Failed),
            nodes: status.nodes.into_iter().map(|node| node.name).collect(),
        }
    }

    fn line(&self) -> String {
        let (ready, failed, all) = (self.ready, self.failed, self.nodes.len());
        match (all, failed) {
            (0, _) => "no node yet".to_owned(),
            (_, 0) => format!("{ready}/{all} ready"),
            _ => format!("{ready}/{all} ready, {failed} failed"),
        }
    }
}

/// What the streams say.
enum News {
    /// One that cannot be read must not keep the others from being watched.
    Object(Box<Event<DeserializeGuard<ModelPrefetch>>>),
    Node(Box<Event<Name>>),
}

/// What is known of objects and nodes.
#[derive(Default)]
struct Board {
    objects: BTreeMap<String, Told>,
    /// None before they were listed once.
    nodes: Option<BTreeSet<String>>,
    /// Those of a list that is under way.
    listed_objects: BTreeMap<String, Told>,
    listed_nodes: BTreeSet<String>,
    /// Since when nodes that objects tell of are missing.
    missing: HashMap<String, Instant>,
    /// When each object was last written.
    written: HashMap<String, Instant>,
}

/// One write.
#[derive(Debug, PartialEq)]
enum Step {
    /// The summary is to be this.
    Say(String, String),
    /// These steps take entries away.
    Prune(String, Value),
}

impl Board {
    fn hear(&mut self, news: News) {
        match news {
            News::Object(event) => match *event {
                Event::Init => self.listed_objects.clear(),
                Event::InitApply(object) => {
                    if let Ok(object) = object.0 {
                        let told = Told::of(&object);
                        self.listed_objects.insert(object.name_any(), told);
                    }
                }
                Event::InitDone => self.objects = std::mem::take(&mut self.listed_objects),
                Event::Apply(object) => match object.0 {
                    Ok(object) => {
                        self.objects.insert(object.name_any(), Told::of(&object));
                    }
                    Err(object) => {
                        self.objects
                            .remove(object.metadata.name.as_deref().unwrap_or_default());
                    }
                },
                Event::Delete(object) => {
                    self.objects.remove(&object.name_any());
                }
            },
            News::Node(event) => match *event {
                Event::Init => self.listed_nodes.clear(),
                Event::InitApply(node) => {
                    self.listed_nodes.insert(node.name_any());
                }
                Event::InitDone => self.nodes = Some(std::mem::take(&mut self.listed_nodes)),
                Event::Apply(node) => {
                    self.nodes.get_or_insert_default().insert(node.name_any());
                }
                Event::Delete(node) => {
                    self.nodes.get_or_insert_default().remove(&node.name_any());
                }
            },
        }
    }

    /// What is to be written now.
    fn steps(&mut self, now: Instant) -> Vec<Step> {
        let gone = self.gone(now);
        let (objects, written) = (&self.objects, &mut self.written);
        written.retain(|name, at| objects.contains_key(name) && *at + REST > now);
        let mut steps = Vec::new();
        for (name, told) in objects {
            if written.contains_key(name) {
                continue;
            }
            if told.nodes.iter().any(|node| gone.contains(node)) {
                steps.push(Step::Prune(name.clone(), prune(told, &gone)));
            } else if told.summary.as_deref() != Some(&told.line()) {
                steps.push(Step::Say(name.clone(), told.line()));
            } else {
                continue;
            }
            written.insert(name.clone(), now);
        }
        steps
    }

    /// The nodes that objects tell of, and that have been gone for long enough.
    fn gone(&mut self, now: Instant) -> BTreeSet<String> {
        let Some(nodes) = &self.nodes else {
            return BTreeSet::new();
        };
        let told = self.objects.values().flat_map(|told| &told.nodes);
        let absent: BTreeSet<&String> = told.filter(|node| !nodes.contains(*node)).collect();
        self.missing.retain(|node, _| absent.contains(node));
        for node in absent {
            self.missing.entry(node.clone()).or_insert(now);
        }
        let long = self
            .missing
            .iter()
            .filter(|(_, since)| **since + GONE <= now);
        long.map(|(node, _)| node.clone()).collect()
    }
}

/// Takes away the entries of nodes that are gone, if the object is as it was seen.
fn prune(told: &Told, gone: &BTreeSet<String>) -> Value {
    let version =
        json!({ "op": "test", "path": "/metadata/resourceVersion", "value": told.version });
    let entries = told.nodes.iter().enumerate().rev();
    let old = entries.filter(|(_, node)| gone.contains(*node));
    let steps =
        old.map(|(index, _)| json!({ "op": "remove", "path": format!("/status/nodes/{index}") }));
    [version].into_iter().chain(steps).collect()
}

/// Writes until it is dropped.
pub(super) async fn run(client: Client) {
    let objects: Api<ModelPrefetch> = Api::all(client.clone());
    let readable: Api<DeserializeGuard<ModelPrefetch>> = Api::all(client.clone());
    let of_objects = watcher(readable, watcher::Config::default().page_size(PAGE));
    let of_objects = of_objects
        .default_backoff()
        .map(|one| one.map(Box::new).map(News::Object));
    let of_nodes = watcher(Api::<Name>::all(client), watcher::Config::default());
    let of_nodes = of_nodes
        .default_backoff()
        .map(|one| one.map(Box::new).map(News::Node));
    let mut news = futures::stream::select(of_objects.boxed(), of_nodes.boxed());
    let mut board = Board::default();
    let (mut looks, mut told) = (interval(LOOK), String::new());
    loop {
        tokio::select! {
            Some(event) = news.next() => match event {
                Ok(event) => board.hear(event),
                Err(error) => {
                    let text = Cause::from(error).to_string();
                    if told != text {
                        tracing::warn!(error = text, "watch of ModelPrefetch objects and nodes failed, retrying");
                        told = text;
                    }
                }
            },
            _ = looks.tick() => for step in board.steps(Instant::now()) {
                write(&objects, &board, step).await;
            },
        }
    }
}

async fn write(objects: &Api<ModelPrefetch>, board: &Board, step: Step) {
    let (name, patch, parameters) = match step {
        Step::Say(name, line) => {
            let object = json!({
                "apiVersion": "weightd.io/v1alpha1",
                "kind": "ModelPrefetch",
                "metadata": { "name": name, "uid": board.objects[&name].uid },
                "status": { "summary": line },
            });
            (
                name,
                Patch::Apply(object),
                PatchParams::apply(MANAGER).force(),
            )
        }
        Step::Prune(name, steps) => {
            tracing::info!(object = name, "entries of nodes that are gone are removed");
            let steps = serde_json::from_value(steps).expect("it is a patch");
            let parameters = PatchParams {
                field_manager: Some(MANAGER.to_owned()),
                ..PatchParams::default()
            };
            (name, Patch::Json::<Value>(steps), parameters)
        }
    };
    let written = objects.patch_status(&name, &parameters, &patch);
    // What somebody else wrote meanwhile comes by the watch, and leads to another write.
    match timeout(PATIENCE, written).await {
        Ok(Ok(_)) => {}
        Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_not_found() => {}
        Ok(Err(error)) => {
            let error = Cause::from(error);
            tracing::warn!(object = name, %error, "status of a ModelPrefetch not written, trying again");
        }
        Err(_) => tracing::warn!(
            object = name,
            "status of a ModelPrefetch not written in time, trying again"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(version: &str, summary: Option<&str>, nodes: &[(&str, &str)]) -> News {
        let entry = |(name, phase): &(&str, &str)| json!({ "name": name, "phase": phase, "updated": "2026-01-01T00:00:00Z" });
        let nodes: Vec<_> = nodes.iter().map(entry).collect();
        let object = json!({
            "apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch",
            "metadata": { "name": "it", "uid": "u", "resourceVersion": version },
            "spec": { "source": "hf://org/model" },
            "status": { "summary": summary, "nodes": nodes },
        });
        apply(object)
    }

    fn apply(object: Value) -> News {
        News::Object(Box::new(Event::Apply(
            serde_json::from_value(object).unwrap(),
        )))
    }

    fn node(name: &str) -> Name {
        serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap()
    }

    fn nodes(board: &mut Board, names: &[&str]) {
        board.hear(News::Node(Box::new(Event::Init)));
        for name in names {
            board.hear(News::Node(Box::new(Event::InitApply(node(name)))));
        }
        board.hear(News::Node(Box::new(Event::InitDone)));
    }

    #[test]
    fn the_line_says_how_many_nodes_are_ready() {
        let mut board = Board::default();
        let now = Instant::now();
        for (entries, line) in [
            (&[][..], "no node yet"),
            (&[("a", "Ready"), ("b", "Fetching")], "1/2 ready"),
            (
                &[("a", "Ready"), ("b", "Failed"), ("c", "Pending")],
                "1/3 ready, 1 failed",
            ),
        ] {
            board.written.clear();
            board.hear(object("1", None, entries));
            let say = Step::Say("it".to_owned(), line.to_owned());
            assert_eq!(board.steps(now), [say]);
        }
        board.written.clear();
        board.hear(object("2", Some("1/1 ready"), &[("a", "Ready")]));
        assert_eq!(board.steps(now), []);
    }

    #[test]
    fn an_object_that_cannot_be_read_is_left_alone() {
        let mut board = Board::default();
        board.hear(object("1", None, &[("a", "Ready")]));
        let odd = json!({
            "apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch",
            "metadata": { "name": "it", "uid": "u", "resourceVersion": "2" },
            "spec": { "source": ["of tomorrow"] },
        });
        board.hear(apply(odd));
        assert_eq!(board.steps(Instant::now()), []);
    }

    #[test]
    fn an_object_is_written_at_most_once_in_a_while() {
        let mut board = Board::default();
        let now = Instant::now();
        board.hear(object("1", None, &[("a", "Ready")]));
        assert_eq!(board.steps(now).len(), 1);
        board.hear(object(
            "2",
            Some("1/1 ready"),
            &[("a", "Ready"), ("b", "Ready")],
        ));
        assert_eq!(board.steps(now + REST / 2), []);
        assert_eq!(board.steps(now + REST).len(), 1);
    }

    #[test]
    fn entries_of_nodes_that_stay_away_are_removed() {
        let mut board = Board::default();
        let now = Instant::now();
        let told = [("a", "Ready"), ("b", "Ready"), ("c", "Ready")];
        board.hear(object("7", Some("3/3 ready"), &told));
        assert_eq!(board.steps(now), [], "nodes are not known yet");

        nodes(&mut board, &["b"]);
        assert_eq!(board.steps(now), []);
        board.hear(News::Node(Box::new(Event::Apply(node("c")))));
        assert_eq!(board.steps(now + GONE / 2), []);
        let steps = json!([
            { "op": "test", "path": "/metadata/resourceVersion", "value": "7" },
            { "op": "remove", "path": "/status/nodes/0" },
        ]);
        let prune = Step::Prune("it".to_owned(), steps);
        assert_eq!(board.steps(now + GONE), [prune]);

        board.hear(News::Node(Box::new(Event::Apply(node("a")))));
        assert_eq!(board.steps(now + GONE * 3), [], "it is back");
    }
}
