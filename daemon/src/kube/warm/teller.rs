//! Tells the objects how far this node is, with few writes.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use weightd_kube::Cause;

use super::desired::{ObjectView, Origin};
use super::entry::Entry;
use super::status;
use crate::kube::node::ThisNode;
use crate::kube::prefetch::{NodePhase, NodeStatus};

/// After a write that failed: the first pause and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// How long our entry may be missing in what is watched, after it was written, until it is written again.
const SETTLED: Duration = Duration::from_secs(30);

/// Writes at once: with many objects, a start would else be a burst of them.
const AT_ONCE: usize = 8;

/// For how long after a write, or the start, it is not told that an entry is under way: one that is soon here is told as
/// ready, with one write or none. For an object of many nodes in proportion longer.
const UNDER_WAY: Duration = Duration::from_secs(5);

/// Writes the status of objects.
pub(super) struct Teller {
    node: ThisNode,
    manager: String,
    told: BTreeMap<String, Told>,
    writes: JoinSet<Written>,
}

/// What an object was told.
struct Told {
    uid: String,
    entry: Option<NodeStatus>,
    at: Instant,
    /// A write is under way.
    busy: bool,
    /// Writes that failed in a row.
    failures: u32,
    not_before: Instant,
}

struct Written {
    object: String,
    uid: String,
    entry: Option<NodeStatus>,
    outcome: Result<(), Cause>,
}

impl Teller {
    pub(super) fn new(node: ThisNode) -> Self {
        Self {
            manager: status::field_manager(&node.name),
            node,
            told: BTreeMap::new(),
            writes: JoinSet::new(),
        }
    }

    /// Nothing waits to be written.
    pub(super) fn is_idle(&self) -> bool {
        self.writes.is_empty() && self.told.values().all(|told| told.failures == 0)
    }

    /// Starts to write what is news of the entries. Those of objects that are not for this node any more are removed.
    pub(super) fn tell(
        &mut self,
        objects: &BTreeMap<String, ObjectView>,
        entries: &BTreeMap<Origin, Entry>,
    ) {
        while let Some(written) = self.writes.try_join_next() {
            self.note(written.ok());
        }
        self.told.retain(|name, _| objects.contains_key(name));
        for (name, object) in objects {
            // The rest has its turn within a second, when some of these are done.
            if self.writes.len() >= AT_ONCE {
                return;
            }
            let entry = entries.get(&Origin::Object(name.clone()));
            let status = entry.map(|entry| entry.status(&self.node.name));
            if self.told(name, object).is_news(status.as_ref(), object) {
                self.write(name.clone(), object.uid.clone(), status);
            }
        }
    }

    fn told(&mut self, name: &str, object: &ObjectView) -> &mut Told {
        let told = self.told.entry(name.to_owned());
        let told = told.or_insert_with(|| Told::new(object));
        if told.uid != object.uid {
            *told = Told::new(object);
        }
        told
    }

    fn write(&mut self, object: String, uid: String, entry: Option<NodeStatus>) {
        if let Some(told) = self.told.get_mut(&object) {
            told.busy = true;
        }
        let (client, manager) = (self.node.client.clone(), self.manager.clone());
        self.writes.spawn(async move {
            let outcome = status::write(client, &manager, &object, &uid, entry.as_ref()).await;
            Written {
                outcome: outcome.map_err(Cause::from),
                object,
                uid,
                entry,
            }
        });
    }

    fn note(&mut self, written: Option<Written>) {
        let Some(written) = written else {
            return;
        };
        let told = self.told.get_mut(&written.object);
        let Some(told) = told.filter(|told| told.uid == written.uid) else {
            return;
        };
        told.busy = false;
        told.at = Instant::now();
        match written.outcome {
            Ok(()) => {
                told.entry = written.entry;
                told.failures = 0;
            }
            Err(error) => {
                self.node.metrics.kube_failed("status");
                let object = &written.object;
                let remedy = "let the service account patch modelprefetches/status";
                match told.failures {
                    // One alone may be that other nodes wrote at the same time.
                    1 => tracing::warn!(object, %error, remedy, "status not written, retrying"),
                    _ => tracing::debug!(object, %error, "status not written"),
                }
                let pause = PAUSES.0 * 2_u32.saturating_pow(told.failures.min(10));
                told.failures += 1;
                told.not_before = told.at + pause.min(PAUSES.1).mul_f64(0.5 + fastrand::f64());
            }
        }
    }
}

impl Told {
    fn new(object: &ObjectView) -> Self {
        let now = Instant::now();
        Self {
            uid: object.uid.clone(),
            // Of a former daemon: what it said may still hold.
            entry: object.own.clone(),
            at: now,
            busy: false,
            failures: 0,
            not_before: now,
        }
    }

    fn is_news(&mut self, status: Option<&NodeStatus>, object: &ObjectView) -> bool {
        let age = self.at.elapsed();
        if object.own.is_none() && age > SETTLED {
            // Somebody took it away.
            self.entry = None;
        }
        let crowd = status::crowd(object.nodes);
        let under_way = [NodePhase::Pending, NodePhase::Fetching];
        let news = match status {
            Some(status) if under_way.contains(&status.phase) && age < UNDER_WAY * crowd => false,
            Some(status) => status::is_news(status, self.entry.as_ref(), age, object.nodes),
            None => self.entry.is_some(),
        };
        news && !self.busy && Instant::now() >= self.not_before
    }
}
