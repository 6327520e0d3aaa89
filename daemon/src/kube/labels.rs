//! Labels by which a Node says which models it has, for preferred placement.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kube::api::Patch;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::store::{Snapshot, Store};
use weightd_kube::Cause;

use super::node::{NodeView, ThisNode};
use super::placement::label_key;
use super::watch::Seen;

/// What all our labels begin with.
pub const PREFIX: &str = "model.weightd.io/";

/// The longest a value may be that Kubernetes takes is 63; a commit has 40 digits.
const DIGITS: usize = 40;

/// How often the store is looked at, and so how often at most a Node is changed.
const LOOK: Duration = Duration::from_secs(30);

/// Keeps the Node's labels those of the models in `store`, at most `most`, for ever. Those that a former daemon left
/// go with the first look.
pub(super) async fn keep(
    node: ThisNode,
    store: Arc<Store>,
    most: usize,
    mut nodes: watch::Receiver<Seen<NodeView>>,
) {
    let mut failing = false;
    if nodes.wait_for(|seen| seen.all().is_some()).await.is_err() {
        return;
    }
    loop {
        let there = {
            let seen = nodes.borrow();
            let view = seen.all().and_then(|all| all.get(&*node.name));
            view.map(|view| view.labels.clone())
        };
        if let Some(there) = there
            && let Some(wanted) = wanted(&store, most).await
            && let Some(patch) = changes(&there, &wanted)
        {
            match node.patch("labels", &Patch::Merge(patch)).await {
                Ok(()) => {
                    tracing::debug!(labels = wanted.len(), "labels of the Node renewed");
                    failing = false;
                }
                Err(error) => {
                    let error = Cause::from(error);
                    let remedy =
                        "let the service account patch nodes, or set kubernetes.labels = 0";
                    match failing {
                        false => {
                            tracing::warn!(%error, remedy, "labels of the Node not renewed, retrying")
                        }
                        true => tracing::debug!(%error, "labels of the Node not renewed again"),
                    }
                    failing = true;
                }
            }
        }
        sleep(LOOK.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
    }
}

async fn wanted(store: &Arc<Store>, most: usize) -> Option<BTreeMap<String, String>> {
    if most == 0 {
        return Some(BTreeMap::new());
    }
    let store = Arc::clone(store);
    match blocking::run(move || store.snapshots()).await {
        Ok(snapshots) => Some(labels(snapshots, most)),
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "models of this node not listed, its labels stay");
            None
        }
    }
}

/// The labels of the `most` models that were used last. A model that is here at several revisions has the one that was
/// used last.
fn labels(mut snapshots: Vec<Snapshot>, most: usize) -> BTreeMap<String, String> {
    snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.last_used));
    let mut labels = BTreeMap::new();
    for snapshot in snapshots {
        let model = &snapshot.manifest.model;
        if let (Some(key), Some(revision)) = (label_key(model), model.revision())
            && labels.len() < most
        {
            let value: String = revision.chars().take(DIGITS).collect();
            labels.entry(key).or_insert(value);
        }
    }
    labels
}

/// The merge patch that turns our labels among `there` into `wanted`. `None` if they are that.
fn changes(there: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> Option<Value> {
    let ours = there.keys().filter(|key| key.starts_with(PREFIX));
    let gone = ours.filter(|key| !wanted.contains_key(*key));
    let new = wanted
        .iter()
        .filter(|(key, value)| there.get(*key) != Some(value));
    let mut labels: BTreeMap<&String, Value> = gone.map(|key| (key, Value::Null)).collect();
    labels.extend(new.map(|(key, value)| (key, json!(value))));
    (!labels.is_empty()).then(|| json!({ "metadata": { "labels": labels } }))
}

#[cfg(test)]
mod tests {
    use weightd_core::manifest::Manifest;
    use weightd_core::model::SnapshotId;

    use super::*;

    fn snapshot(model: &str, revision: char, last_used: i64) -> Snapshot {
        let model = format!("{model}@{}", revision.to_string().repeat(64));
        let digits = if model.starts_with("hf") { 40 } else { 64 };
        let model = model[..model.len() - 64 + digits].parse().unwrap();
        let id: SnapshotId = format!("hf-x-{revision}").parse().unwrap();
        Snapshot {
            manifest: Manifest {
                format: Manifest::FORMAT,
                snapshot: id,
                model,
                patterns: weightd_core::model::Patterns::default(),
                published_at: 0,
                files: Vec::new(),
            },
            path: "/x".into(),
            last_used,
            pinned_by: Vec::new(),
        }
    }

    fn own(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(own).collect()
    }

    #[test]
    fn the_models_that_were_used_last_have_labels_with_their_last_revision() {
        let here = vec![
            snapshot("hf://org/old", 'a', 1),
            snapshot("hf://org/model", 'b', 2),
            snapshot("hf://org/model", 'c', 4),
            snapshot("s3://bucket/x", 'd', 3),
            snapshot("s3://bucket/no label", 'e', 9),
        ];

        let labels = labels(here, 2);

        let expected = [
            ("model.weightd.io/hf.org.model", "c".repeat(40)),
            ("model.weightd.io/s3.bucket.x", "d".repeat(40)),
        ];
        let expected = expected.map(|(key, value)| (key.to_owned(), value));
        assert_eq!(labels, BTreeMap::from(expected));
    }

    #[test]
    fn only_our_own_labels_change_and_only_if_they_must() {
        let there = own(&[
            ("pool", "gpu"),
            ("model.weightd.io/hf.gone", "1"),
            ("model.weightd.io/hf.moved", "1"),
            ("model.weightd.io/hf.same", "1"),
        ]);
        let wanted = own(&[
            ("model.weightd.io/hf.moved", "2"),
            ("model.weightd.io/hf.same", "1"),
            ("model.weightd.io/hf.new", "1"),
        ]);

        let patch = changes(&there, &wanted).expect("a patch");

        let expected = json!({
            "model.weightd.io/hf.gone": null,
            "model.weightd.io/hf.moved": "2",
            "model.weightd.io/hf.new": "1",
        });
        assert_eq!(patch["metadata"]["labels"], expected);
        assert_eq!(changes(&wanted, &wanted), None);
    }
}
