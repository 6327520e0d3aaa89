//! Who may work now.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::sync::{MutexGuard, Semaphore, SemaphorePermit};

use super::{FetchLimits, Job};
use crate::model::SnapshotId;

/// How often a fetch that waits looks where the files are of the one that it waits for.
const LOOK: Duration = Duration::from_millis(100);

/// How many fetches may work on as many files as one may: fewer, and those that pause because their origin
/// is away would hold up all others. Not many more: with the highest settings, 64 large files and 32 small
/// ones of each, their hashers hold 384 threads of the blocking pool, which has 512.
const FETCHES: usize = 4;

/// How many files are worked on at once. Each has a hasher, which holds a thread of the blocking pool:
/// without a bound for all fetches together the hashers would leave none to the writes they wait for.
pub(super) struct FileTurns {
    limits: FetchLimits,
    small: Semaphore,
    large: Semaphore,
}

impl FileTurns {
    /// Those of one fetch.
    pub(super) fn of_one(limits: &FetchLimits) -> Self {
        Self::new(limits, 1)
    }

    /// Those of all fetches together.
    pub(super) fn of_all(limits: &FetchLimits) -> Self {
        Self::new(limits, FETCHES)
    }

    fn new(limits: &FetchLimits, fetches: usize) -> Self {
        Self {
            limits: *limits,
            // Small files wait for their origin more than for bytes, so more of them go at once.
            small: Semaphore::new(limits.connections.min(32) * fetches),
            large: Semaphore::new(limits.files_in_flight * fetches),
        }
    }

    pub(super) async fn acquire(&self, file_bytes: u64) -> SemaphorePermit<'_> {
        let turns = match self.limits.is_small(file_bytes) {
            true => &self.small,
            false => &self.large,
        };
        turns.acquire().await.expect("nobody closes it")
    }
}

/// The turns of all snapshots that are brought now.
#[derive(Default)]
pub(super) struct SnapshotTurns(Mutex<HashMap<SnapshotId, Weak<SnapshotTurn>>>);

impl SnapshotTurns {
    pub(super) fn of(&self, id: &SnapshotId) -> Arc<SnapshotTurn> {
        let mut turns = self.0.lock().expect("no holder of this lock panics");
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(id).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        turns.insert(id.clone(), Arc::downgrade(&turn));
        turn
    }
}

/// One fetch at a time has it; the others show what that one does.
#[derive(Default)]
pub(super) struct SnapshotTurn {
    turn: tokio::sync::Mutex<()>,
    /// Whose turn it was last.
    job: Mutex<Weak<Job>>,
}

impl SnapshotTurn {
    /// Waits for the turn. Until then `job` shows the progress and the files of whoever has it; its meter
    /// does so until it is told otherwise.
    pub(super) async fn take(&self, job: &Arc<Job>) -> MutexGuard<'_, ()> {
        let mut turn = std::pin::pin!(self.turn.lock());
        let mut looks = tokio::time::interval(LOOK);
        let turn = loop {
            tokio::select! {
                biased;
                turn = &mut turn => break turn,
                _ = looks.tick() => self.show(job),
            }
        };
        *self.job.lock().expect("no holder of this lock panics") = Arc::downgrade(job);
        // The other fetch has ended, and its files are where it published them.
        job.tree.send_replace(None);
        turn
    }

    fn show(&self, job: &Job) {
        let at_work = self.job.lock().expect("no holder of this lock panics");
        let Some(at_work) = at_work.upgrade() else {
            return;
        };
        let tree = at_work.tree.borrow().clone();
        job.tree.send_if_modified(|shown| {
            let changed = *shown != tree;
            *shown = tree;
            changed
        });
        job.meter.follow(Some(Arc::clone(&at_work.meter)));
    }
}
