//! Who may work now.

use tokio::sync::{Semaphore, SemaphorePermit};

use super::FetchLimits;

/// How many fetches may work on as many files as one may: fewer, and those that pause because their origin
/// is away would hold up all others. Not many more: with the highest settings, 64 large files and 32 small
/// ones of each, their hashers hold 384 threads of the blocking pool, which has 512.
const FETCHES: usize = 4;

/// How many files are worked on at once. Each has a hasher, which holds a thread of the blocking pool:
/// without a bound for all fetches together the hashers would leave none to the writes they wait for.
pub(super) struct FileTurns {
    part_bytes: u64,
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
            part_bytes: limits.part_bytes,
            // Small files wait for their origin more than for bytes, so more of them go at once.
            small: Semaphore::new(limits.connections.min(32) * fetches),
            large: Semaphore::new(limits.files_in_flight * fetches),
        }
    }

    pub(super) async fn acquire(&self, file_bytes: u64) -> SemaphorePermit<'_> {
        let turns = match file_bytes > self.part_bytes {
            true => &self.large,
            false => &self.small,
        };
        turns.acquire().await.expect("nobody closes it")
    }
}
