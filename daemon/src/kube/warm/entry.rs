//! How far one model of the warm set is.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use weightd_core::errors::Chain;
use weightd_core::fetch::{FetchError, FetchRequest, Phase, Progress, Wait};
use weightd_core::model::SnapshotId;
use weightd_core::store::Snapshot;

use super::desired::{Target, Wish};
use super::status;
use crate::kube::prefetch::{NodePhase, NodeStatus};

/// After a failure that passes by itself, and that somebody has to mend: the first pause and the longest.
const SOON: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
const LATER: (Duration, Duration) = (Duration::from_secs(300), Duration::from_secs(3600));

/// How long a fetch must have waited for its origin until that is told: 30 s. Short pauses are part of every fetch.
const WAITS: Duration = Duration::from_secs(30);

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
    /// Since when it waits for its origin.
    waits: Option<Instant>,
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
            waits: None,
        }
    }

    pub(super) fn target(&self) -> Option<&Target> {
        self.wish.as_ref().ok()
    }

    pub(super) fn wants(&self, request: &FetchRequest) -> bool {
        self.target()
            .is_some_and(|target| target.request == *request)
    }

    /// Takes over the priority of a wish that is else the same: that is no reason to begin anew what goes well.
    pub(super) fn rank_as(&mut self, wish: &Wish) {
        let goes_well = !matches!(self.phase, NodePhase::Failed | NodePhase::Waiting);
        if let (true, Ok(target), Ok(wish)) = (goes_well, &mut self.wish, wish) {
            let priority = wish.priority;
            if (Target {
                priority,
                ..target.clone()
            }) == *wish
            {
                target.priority = priority;
            }
        }
    }

    /// Whether nothing more comes by itself: it is here, or was and made room, and is not to be held.
    pub(super) fn is_settled(&self) -> bool {
        let made_room = self.phase == NodePhase::Waiting && self.due.is_none();
        self.phase == NodePhase::Ready || (made_room && self.progress.is_none())
    }

    /// Whether it waits for its turn.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.progress.is_none() && self.due.is_some_and(|due| due <= now)
    }

    pub(super) fn started(&mut self, progress: watch::Receiver<Progress>) {
        self.progress = Some(progress);
        self.waits = None;
        self.due = None;
    }

    /// Takes over how far its fetch is; returns its snapshot when that is learnt.
    pub(super) fn look(&mut self) -> Option<SnapshotId> {
        let progress = self.progress.as_ref()?.borrow().clone();
        let wait = progress.wait.as_ref().filter(|wait| is_for_origin(wait));
        self.waits = wait.map(|_| self.waits.unwrap_or_else(Instant::now));
        let waits = wait.filter(|_| self.waits.is_some_and(|since| since.elapsed() >= WAITS));
        let listed = matches!(progress.phase, Phase::Fetching | Phase::Publishing);
        match waits {
            // What is here of it, and may only have moved, still serves.
            Some(wait) if listed || self.phase != NodePhase::Ready => {
                self.phase = NodePhase::Waiting;
                self.message = format!("waiting for {wait}");
            }
            None if listed => {
                self.phase = NodePhase::Fetching;
                self.message = pace(&progress);
            }
            Some(_) | None => {}
        }
        // Until it is listed, what was before says more.
        if !listed {
            return None;
        }
        self.revision = progress.model.revision().map(str::to_owned);
        (self.bytes, self.done) = (Some(progress.bytes), Some(progress.bytes_done));
        let learnt = progress
            .snapshot
            .filter(|id| self.snapshot.as_ref() != Some(id));
        if learnt.is_some() {
            self.snapshot.clone_from(&learnt);
        }
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

/// What somebody may have to look at who runs the origin, or pays for it. The rest is what this cluster does itself.
fn is_for_origin(wait: &Wait) -> bool {
    match wait {
        Wait::RateLimit { .. } | Wait::Origin { .. } | Wait::Silence => true,
        Wait::Neighbour | Wait::Others | Wait::Turn => false,
    }
}

/// How fast it comes, or what it waits for, in words.
fn pace(progress: &Progress) -> String {
    if let Some(wait) = &progress.wait {
        return format!("waiting for {wait}");
    }
    let rate = progress.bytes_per_second / f64::from(1 << 20);
    match progress.eta {
        Some(eta) if rate >= 0.1 => {
            let minutes = eta.as_secs().div_ceil(60);
            format!("{rate:.1} MiB/s, {minutes} min left")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use weightd_core::model::Patterns;

    use super::*;

    fn target(priority: i32) -> Target {
        Target {
            request: FetchRequest {
                model: "hf://org/model".parse().unwrap(),
                patterns: Patterns::default(),
                pin: None,
            },
            pin: true,
            mark: None,
            priority,
            warm: false,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_fetch_that_is_held_up_by_its_origin_says_so_and_a_short_pause_does_not_count() {
        let mut entry = Entry::new(Ok(target(0)));
        let mut progress = Progress::of("hf://org/model".parse().unwrap());
        let until = SystemTime::now();
        progress.wait = Some(Wait::RateLimit { until });
        let (sender, receiver) = watch::channel(progress.clone());
        entry.started(receiver);

        entry.look();
        assert_eq!(entry.phase, NodePhase::Pending);
        tokio::time::advance(WAITS).await;
        entry.look();
        assert_eq!(entry.phase, NodePhase::Waiting);
        assert!(entry.message.contains("rate limit"), "{}", entry.message);

        progress.phase = Phase::Fetching;
        progress.wait = None;
        sender.send_replace(progress.clone());
        entry.look();
        assert_eq!(entry.phase, NodePhase::Fetching);
        progress.wait = Some(Wait::Neighbour);
        sender.send_replace(progress);
        tokio::time::advance(WAITS).await;
        entry.look();
        assert_eq!(entry.phase, NodePhase::Fetching);
        assert!(entry.message.contains("another node"), "{}", entry.message);
    }

    #[tokio::test]
    async fn a_snapshot_is_learnt_once() {
        let id: SnapshotId = "hf-x-a".parse().unwrap();
        let mut progress = Progress::of("hf://org/model".parse().unwrap());
        progress.phase = Phase::Fetching;
        progress.snapshot = Some(id.clone());
        let (_sender, receiver) = watch::channel(progress);
        let mut entry = Entry::new(Ok(target(0)));
        entry.started(receiver);

        assert_eq!(entry.look(), Some(id.clone()));
        assert_eq!((entry.look(), entry.look()), (None, None));
        assert_eq!(entry.snapshot, Some(id));
    }

    #[tokio::test]
    async fn what_made_room_for_others_keeps_nobody_waiting() {
        let mut entry = Entry::new(Ok(target(0)));
        assert!(!entry.is_settled());
        (entry.phase, entry.due) = (NodePhase::Ready, None);
        assert!(entry.is_settled());
        entry.lost(false);
        assert!(entry.is_settled());
        entry.lost(true);
        assert!(!entry.is_settled());
    }

    #[test]
    fn another_priority_begins_nothing_anew_unless_it_went_wrong() {
        let mut entry = Entry::new(Ok(target(0)));
        entry.rank_as(&Ok(target(7)));
        assert_eq!(entry.wish, Ok(target(7)));

        let mut other = target(9);
        other.pin = false;
        entry.rank_as(&Ok(other));
        assert_eq!(entry.wish, Ok(target(7)));

        entry.phase = NodePhase::Failed;
        entry.rank_as(&Ok(target(9)));
        assert_eq!(entry.wish, Ok(target(7)));
    }
}
