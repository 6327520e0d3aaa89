//! What a node has said in an object stays there when the node is gone. Each node sees to the entry before its own, the first
//! to the last: so each entry is seen to by one node that lives, whichever have gone, and with no node that leads.
//!
//! The controller does the same sooner, where it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::Error;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;
use weightd_kube::Cause;

use super::node::{ThisNode, in_time};
use super::warm::{ObjectView, SlimObject};
use super::watch::Seen;

/// How often it is asked whether the neighbours live.
const LOOK: Duration = Duration::from_secs(3600);

/// The same after the start: not every node lives for an hour.
const FIRST_LOOK: Duration = Duration::from_secs(600);

/// The same after one was found gone: there may be more of them behind it.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// Another node's entry in the status of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub(super) node: String,
    /// Its place in the list.
    pub(super) index: usize,
}

/// The entry before the one at `own`.
pub(super) fn before(own: usize, entries: &[Value]) -> Option<Neighbour> {
    let index = own.checked_sub(1).unwrap_or(entries.len() - 1);
    let node = entries[index]["name"].as_str()?.to_owned();
    (index != own).then_some(Neighbour { node, index })
}

/// Removes, for ever, the entries before our own whose nodes are gone.
pub(super) async fn keep_clean(node: ThisNode, objects: watch::Receiver<Seen<ObjectView>>) {
    let mut pause = FIRST_LOOK;
    loop {
        sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
        let neighbours = neighbours(&objects.borrow());
        pause = match clean(&node, neighbours).await {
            true => LOOK_AGAIN,
            false => LOOK,
        };
    }
}

/// Whether an entry was removed.
async fn clean(node: &ThisNode, neighbours: BTreeMap<String, Neighbour>) -> bool {
    let names: BTreeSet<&str> = neighbours.values().map(|one| &*one.node).collect();
    let mut gone = BTreeSet::new();
    for name in names {
        if is_gone(node, name).await {
            gone.insert(name.to_owned());
        }
    }
    let mut removed = false;
    for (object, neighbour) in neighbours {
        removed |= gone.contains(&neighbour.node) && remove(node, &object, &neighbour).await;
    }
    removed
}

fn neighbours(objects: &Seen<ObjectView>) -> BTreeMap<String, Neighbour> {
    let all = objects.all().into_iter().flatten();
    let with =
        |(name, object): (&String, &ObjectView)| Some((name.clone(), object.before.clone()?));
    all.filter_map(with).collect()
}

/// Only what the API server says counts.
async fn is_gone(node: &ThisNode, name: &str) -> bool {
    match node.named(name).await {
        Ok(found) => found.is_none(),
        Err(error) => {
            let error = Cause::from(error);
            tracing::debug!(node = name, %error, "not known whether a neighbour lives");
            false
        }
    }
}

/// Whether it was done.
async fn remove(node: &ThisNode, object: &str, neighbour: &Neighbour) -> bool {
    let objects: Api<SlimObject> = Api::all(node.client.clone());
    let steps = serde_json::from_value(removal(neighbour)).expect("it is a JSON patch");
    let (parameters, patch) = (PatchParams::default(), Patch::Json::<Value>(steps));
    let error = match in_time(objects.patch_status(object, &parameters, &patch)).await {
        Ok(_) => {
            tracing::info!(
                object,
                node = neighbour.node,
                "entry of a node that is gone removed"
            );
            return true;
        }
        // The list has changed meanwhile, or somebody was faster.
        Err(Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => return false,
        Err(error) => Cause::from(error),
    };
    node.metrics.kube_failed("status");
    tracing::debug!(object, node = neighbour.node, %error, "entry of a node that is gone not removed");
    false
}

/// The patch that takes the entry away, if it is still in its place.
fn removal(Neighbour { node, index }: &Neighbour) -> Value {
    json!([
        { "op": "test", "path": format!("/status/nodes/{index}/name"), "value": node },
        { "op": "remove", "path": format!("/status/nodes/{index}") },
    ])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kube::tests::server::{NODES, OBJECTS, Server};

    #[test]
    fn each_entry_is_seen_to_by_the_next_and_the_last_by_the_first() {
        let entries = ["a", "b", "c"].map(|name| json!({ "name": name }));
        let before = |own| before(own, &entries).map(|one| (one.node, one.index));

        assert_eq!(before(0), Some(("c".to_owned(), 2)));
        assert_eq!(before(1), Some(("a".to_owned(), 0)));
        assert_eq!(before(2), Some(("b".to_owned(), 1)));
        assert_eq!(super::before(0, &entries[..1]), None);
    }

    #[tokio::test]
    async fn only_the_entry_of_a_node_that_is_gone_goes_and_only_from_its_place() {
        let server = Server::start().await;
        server.put(NODES, json!({ "metadata": { "name": "lives" } }));
        let entries = ["gone", "lives", "node"].map(|name| json!({ "name": name }));
        let object = |name| json!({ "metadata": { "name": name }, "status": { "nodes": entries } });
        for name in ["a", "b", "c"] {
            server.put(OBJECTS, object(name));
        }
        let node = ThisNode::new(server.client(), "node", Arc::default());
        let neighbour = |node: &str, index| {
            let node = node.to_owned();
            Neighbour { node, index }
        };
        let neighbours = BTreeMap::from([
            ("a".to_owned(), neighbour("gone", 0)),
            ("b".to_owned(), neighbour("lives", 1)),
            // Seen before the list had changed.
            ("c".to_owned(), neighbour("gone", 1)),
        ]);

        assert!(clean(&node, neighbours).await);

        let left = |name| server.object(OBJECTS, name)["status"]["nodes"].clone();
        assert_eq!(left("a"), json!(entries[1..]));
        assert_eq!(left("b"), json!(entries));
        assert_eq!(left("c"), json!(entries));
    }

    #[tokio::test]
    async fn while_it_cannot_be_told_who_lives_all_entries_stay() {
        let server = Server::start().await;
        server.put(
            OBJECTS,
            json!({ "metadata": { "name": "a" }, "status": { "nodes": [{ "name": "x" }] } }),
        );
        server.refuse("/api/v1/nodes/x", 403, 1);
        let node = ThisNode::new(server.client(), "node", Arc::default());
        let x = Neighbour {
            node: "x".to_owned(),
            index: 0,
        };

        assert!(!clean(&node, BTreeMap::from([("a".to_owned(), x)])).await);
        assert_eq!(server.asked("PATCH").len(), 0);
    }
}
