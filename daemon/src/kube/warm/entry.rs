//! How far one model of the warm set is.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use weightd_core::errors::Chain;
use weightd_core::fetch::{FetchError, FetchRequest, Phase, Progress};
use weightd_core::model::SnapshotId;
use weightd_core::store::Snapshot;

use super::desired::{Target, Wish};
use super::status;
use crate::kube::prefetch::{NodePhase, NodeStatus};

/// After a failure that passes by itself, and that somebody has to mend: the first pause and the longest.
const SOON: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
const LATER: (Duration, Duration) = (Duration::from_secs(300), Duration::from_secs(3600));

/// What is wanted, and how far it is.
pub(super) struct Entry {
    pub(super) wish: Wish,
    pub(super) phase: NodePhase,
    pub(super) message: String,
    /// What it resolved to, once that is known.
    pub(super) snapshot: Option<SnapshotId>,
    /// It is held from eviction, or is to be.
    revision: Option<String>,
    bytes: Option<u64>,
    done: Option<u64>,
    failures: u32,
    /// When it is to be fetched, if it is.
    pub(super) due: Option<Instant>,
    /// Of the fetch under way.
    pub(super) progress: Option<watch::Receiver<Progress>>,
}

impl Entry {
    pub(super) fn new(wish: Wish) -> Self {
        let (phase, message, due) = match &wish {
            Ok(_) => (NodePhase::Pending, String::new(), Some(Instant::now())),
            Err(reason) => (NodePhase::Failed, reason.clone(), None),
        };
        Self {
            wish,
            phase,
            message,
            snapshot: None,
            revision: None,
            bytes: None,
            done: None,
            failures: 0,
            due,
            progress: None,
        }
    }

    pub(super) fn target(&self) -> Option<&Target> {
        self.wish.as_ref().ok()
    }

    pub(super) fn wants(&self, request: &FetchRequest) -> bool {
        self.target()
            .is_some_and(|target| target.request == *request)
    }

    /// Whether it waits for its turn.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.progress.is_none() && self.due.is_some_and(|due| due <= now)
    }

    pub(super) fn started(&mut self, progress: watch::Receiver<Progress>) {
        self.progress = Some(progress);
        self.due = None;
    }

    /// Takes over how far its fetch is; returns its snapshot when that is learnt.
    pub(super) fn look(&mut self) -> Option<SnapshotId> {
        let progress = self.progress.as_ref()?.borrow().clone();
        // Until it is listed, what went wrong the last time says more.
        if !matches!(progress.phase, Phase::Fetching | Phase::Publishing) {
            return None;
        }
        self.phase = NodePhase::Fetching;
        self.message = pace(&progress);
        self.revision = progress.model.revision().map(str::to_owned);
        (self.bytes, self.done) = (Some(progress.bytes), Some(progress.bytes_done));
        let learnt = progress
            .snapshot
            .filter(|id| self.snapshot.as_ref() != Some(id));
        self.snapshot.clone_from(&learnt);
        learnt
    }

    pub(super) fn ready(&mut self, snapshot: &Snapshot) {
        self.is_here(snapshot);
        self.message.clear();
        self.failures = 0;
        self.due = None;
        self.progress = None;
    }

    fn is_here(&mut self, snapshot: &Snapshot) {
        let manifest = &snapshot.manifest;
        self.phase = NodePhase::Ready;
        self.snapshot = Some(manifest.snapshot.clone());
        self.revision = manifest.model.revision().map(str::to_owned);
        (self.bytes, self.done) = (Some(manifest.bytes()), Some(manifest.bytes()));
    }

    /// Its fetch failed. What `earlier` fetches brought of it still serves.
    pub(super) fn failed(&mut self, error: &FetchError, earlier: Option<&Snapshot>) {
        let hint = error.hint().map(|hint| format!(" ({hint})"));
        let text = format!("{}{}", Chain(error), hint.unwrap_or_default());
        let passes = error.may_pass();
        self.progress = None;
        self.phase = match passes {
            true => NodePhase::Waiting,
            false => NodePhase::Failed,
        };
        self.message = text.clone();
        if let Some(earlier) = earlier.filter(|_| passes) {
            self.is_here(earlier);
            self.message = format!("as it was before; whether it moved cannot be told: {text}");
        }
        let (first, longest) = if passes { SOON } else { LATER };
        let pause = first * 2_u32.saturating_pow(self.failures.min(10));
        self.failures += 1;
        self.due = Some(Instant::now() + pause.min(longest));
    }

    /// It was ready, and is here no longer.
    pub(super) fn lost(&mut self, pin: bool) {
        self.done = Some(0);
        self.snapshot = None;
        if pin {
            self.phase = NodePhase::Pending;
            self.message =
                "it was removed, or set aside as damaged, and is fetched again".to_owned();
            self.due = Some(Instant::now());
        } else {
            self.phase = NodePhase::Waiting;
            self.message =
                "it made room for others; set pin: true to hold it against eviction".to_owned();
        }
    }

    /// What the node `name` says of it.
    pub(super) fn status(&self, name: &str) -> NodeStatus {
        let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        NodeStatus {
            name: name.to_owned(),
            phase: self.phase,
            revision: self.revision.clone(),
            bytes: self.bytes.map(number),
            bytes_done: self.done.map(number),
            message: status::message(&self.message),
            updated: status::now(),
        }
    }
}

/// How fast it comes, in words.
fn pace(progress: &Progress) -> String {
    let rate = progress.bytes_per_second / f64::from(1 << 20);
    match progress.eta {
        Some(eta) if rate >= 0.1 => {
            let minutes = eta.as_secs().div_ceil(60);
            format!("{rate:.1} MiB/s, {minutes} min left")
        }
        _ => String::new(),
    }
}
