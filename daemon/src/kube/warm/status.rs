//! What each node says in a `ModelPrefetch`: its own entry of the status, written by server-side apply.
//!
//! An entry of a node that matches no longer is removed by that node's daemon. One of a node that is gone from the cluster
//! stays until the controller prunes it, as it writes the summary.

use std::time::Duration;

use jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Error};
use serde_json::{Value, json};
use weightd_core::digest::Digest;

use super::desired::SlimObject;
use crate::kube::node::in_time;
use crate::kube::prefetch::{NodePhase, NodeStatus};

/// How often progress is written: 30 s.
const PROGRESS: Duration = Duration::from_secs(30);

/// Of so many nodes each may write that often; more of them write in proportion more seldom, because every write
/// comes to every node, and costs the API server more the more entries there are.
const NODES: u32 = 30;

/// Progress that is worth to be told, in percent.
const STEP_PERCENT: u128 = 5;

/// The longest message that the schema takes, in characters.
const MESSAGE_MAX: usize = 1024;

/// Who writes the entry of the node `name`. At most 128 characters, of which a node's name may have 253.
pub(super) fn field_manager(name: &str) -> String {
    const LONGEST: usize = 128;
    let manager = format!("weightd/{name}");
    if manager.len() <= LONGEST {
        return manager;
    }
    let hash = Digest::of(name.as_bytes()).to_string();
    format!("{}-{}", &manager[..LONGEST - 17], &hash[..16])
}

/// `text`, no longer than the schema takes.
pub(super) fn message(text: &str) -> String {
    match text.chars().count() > MESSAGE_MAX {
        true => text.chars().take(MESSAGE_MAX - 1).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

/// How many times less often than alone a node writes to an object that tells of `nodes`.
pub(super) fn crowd(nodes: usize) -> u32 {
    let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
    nodes.div_ceil(NODES).clamp(1, 100)
}

/// Whether `now` has to be written over `before`, which is `age` old, in the status of an object that tells of `nodes`.
pub(super) fn is_news(
    now: &NodeStatus,
    before: Option<&NodeStatus>,
    age: Duration,
    nodes: usize,
) -> bool {
    let Some(before) = before else {
        return true;
    };
    let same = NodeStatus {
        updated: before.updated,
        ..now.clone()
    };
    if same == *before {
        return false;
    }
    let rested = age >= PROGRESS * crowd(nodes);
    let under_way = match (before.phase, now.phase) {
        (NodePhase::Fetching, NodePhase::Fetching) => now.revision == before.revision,
        // An origin that is away now and then.
        (NodePhase::Waiting, NodePhase::Waiting | NodePhase::Fetching) => return rested,
        _ => false,
    };
    if !under_way {
        return true;
    }
    let done = |status: &NodeStatus| u128::try_from(status.bytes_done.unwrap_or(0)).unwrap_or(0);
    let all = u128::try_from(now.bytes.unwrap_or(0)).unwrap_or(0);
    let step = done(now).abs_diff(done(before)) * 100;
    rested && step >= all * STEP_PERCENT && step > 0
}

/// Writes our entry of the object `name`, or removes it.
pub(super) async fn write(
    client: Client,
    manager: &str,
    name: &str,
    uid: &str,
    entry: Option<&NodeStatus>,
) -> Result<(), Error> {
    let objects: Api<SlimObject> = Api::all(client);
    let parameters = PatchParams::apply(manager).force();
    let patch = Patch::Apply(applied(name, uid, entry));
    in_time(objects.patch_status(name, &parameters, &patch))
        .await
        .map(drop)
}

fn applied(name: &str, uid: &str, entry: Option<&NodeStatus>) -> Value {
    let nodes: Vec<&NodeStatus> = entry.into_iter().collect();
    json!({
        "apiVersion": "weightd.io/v1alpha1",
        "kind": "ModelPrefetch",
        // With the uid, what was meant for an object that is gone does not come into one that has its name.
        "metadata": { "name": name, "uid": uid },
        "status": { "nodes": nodes },
    })
}

/// The time, to the second: more is noise to who reads it.
pub(super) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(phase: NodePhase, done: i64) -> NodeStatus {
        NodeStatus {
            name: "node".to_owned(),
            phase,
            revision: None,
            bytes: Some(1000),
            bytes_done: Some(done),
            message: String::new(),
            updated: now(),
        }
    }

    #[test]
    fn a_phase_is_told_at_once_and_progress_seldom() {
        let fetching = |done| entry(NodePhase::Fetching, done);
        let ready = entry(NodePhase::Ready, 1000);
        let waiting = |done| entry(NodePhase::Waiting, done);
        let seconds = Duration::from_secs;

        for (now, before, age, nodes, expected) in [
            (&fetching(0), None, 0, 1, true),
            (&ready, Some(&fetching(900)), 0, 1, true),
            (&ready, Some(&ready), 900, 1, false),
            (&fetching(500), Some(&fetching(100)), 29, 1, false),
            (&fetching(500), Some(&fetching(100)), 30, 1, true),
            (&fetching(149), Some(&fetching(100)), 300, 1, false),
            (&fetching(500), Some(&fetching(100)), 30, 200, false),
            (&fetching(500), Some(&fetching(100)), 210, 200, true),
            (&waiting(500), Some(&fetching(500)), 0, 1, true),
            (&fetching(500), Some(&waiting(500)), 29, 1, false),
            (&fetching(500), Some(&waiting(500)), 30, 1, true),
            (&waiting(501), Some(&waiting(500)), 29, 1, false),
            (&waiting(501), Some(&waiting(500)), 30, 1, true),
            (&waiting(500), Some(&waiting(500)), 900, 1, false),
        ] {
            let told = is_news(now, before, seconds(age), nodes);
            assert_eq!(told, expected, "{now:?} after {age} s of {before:?}");
        }
    }

    #[test]
    fn a_field_manager_is_not_too_long_and_stays_apart() {
        assert_eq!(field_manager("node-a"), "weightd/node-a");
        let long = "x".repeat(252);
        let (one, other) = (
            field_manager(&format!("{long}a")),
            field_manager(&format!("{long}b")),
        );
        assert!(one.len() == 128 && one != other, "{one} {other}");
    }

    #[test]
    fn an_entry_goes_when_it_is_applied_without() {
        let gone = applied("it", "u", None);

        assert_eq!(gone["status"], json!({ "nodes": [] }));
        let there = applied("it", "u", Some(&entry(NodePhase::Ready, 1000)));
        assert_eq!(there["status"]["nodes"][0]["phase"], "Ready");
        assert_eq!(there["metadata"]["uid"], "u");
    }

    #[test]
    fn a_long_message_is_cut() {
        let text = message(&"ä".repeat(3000));

        assert_eq!(text.chars().count(), MESSAGE_MAX);
    }
}
