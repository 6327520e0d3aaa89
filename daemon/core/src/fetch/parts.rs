//! Bringing the bytes of one file: ranges in parallel, hashed as they land.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::pace::Pace;
use super::progress::FileMeter;
use super::range::{Connection, Ranged, Sink};
use super::share::Share;
use super::{FetchLimits, Shared};
use crate::blocking;
use crate::buffers::{ALIGNMENT, Buffers};
use crate::digest::{Digest, Verifier};
use crate::model::Scheme;
use crate::source::{RemoteFile, Source, SourceError};
use crate::store::{HashError, Part, StoreError};

/// Why the bytes of a file could not be brought.
#[derive(Debug)]
pub(super) enum PartsError {
    Source(SourceError),
    Hash(HashError),
}

impl From<SourceError> for PartsError {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<StoreError> for PartsError {
    fn from(error: StoreError) -> Self {
        Self::Hash(HashError::Store(error))
    }
}

/// What all ranges of one fetch share.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) source: Arc<dyn Source>,
    pub(super) scheme: Scheme,
    pub(super) shared: Arc<Shared>,
    pub(super) pace: Arc<Pace>,
    pub(super) meter: Arc<super::progress::Meter>,
}

impl Origin {
    /// Counts bytes that arrived.
    pub(super) fn count(&self, bytes: u64) {
        self.meter.fetched(bytes);
        self.shared.metrics.fetched(self.scheme, bytes);
        self.shared.width.count(bytes);
        if let Some(tier) = &self.shared.tier {
            tier.rates().origin.count(bytes);
        }
    }
}

/// Stops the hasher when the download is given up, also by being dropped.
struct CloseOnDrop<'a>(&'a Part);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Brings what `part` is missing of `file`, and hashes all of it. With `share`, the shared tier takes part.
pub(super) async fn download(
    origin: &Origin,
    file: &Arc<RemoteFile>,
    part: &Arc<Part>,
    meter: &FileMeter<'_>,
    share: Option<&Share>,
) -> Result<Digest, PartsError> {
    let hash = |verifier| {
        let part = Arc::clone(part);
        move || part.hash(verifier)
    };
    let _close = CloseOnDrop(part);
    let found = part.present();
    if file.told.is_some() && found > 0 {
        // What is claimed of them comes only with the first byte.
        part.discard()?;
        return Err(PartsError::Hash(HashError::Torn { bytes: found }));
    }
    let fetching = async {
        let fetched = match share {
            Some(share) => share.fetch(origin, file, part).await,
            None if file.told.is_some() => {
                // Its claims come with the whole of it.
                let all = Ranged::new(origin, file, part, 0..file.size);
                all.fetch(Connection::new(&origin.shared).await).await
            }
            None => fetch_ranges(origin, file, part).await,
        };
        match fetched {
            Err(PartsError::Source(SourceError::NoRanges { .. })) => {
                let mut range = Ranged::new(origin, file, part, 0..file.size);
                range.from_start = true;
                range.fetch(Connection::new(&origin.shared).await).await
            }
            fetched => fetched,
        }
    };
    if origin.shared.limits.is_small(file.size) || file.told.is_some() {
        // It is hashed in no time: a hasher that waits for it would only take a thread.
        tokio::select! {
            fetched = fetching => fetched?,
            never = show(part, meter) => match never {},
        }
        meter.set(part.present());
        let claims = file.all_claims().ok_or_else(|| untold(file))?;
        let hashed = blocking::run(hash(Verifier::new(file.size, claims))).await;
        return hashed.map_err(PartsError::Hash);
    }
    let verifier = Verifier::new(file.size, file.claims).beside(&origin.shared.hashing);
    let mut hashing = tokio::spawn(blocking::run(hash(verifier)));
    // The hasher may fail long before the last byte is here: what follows would be fetched in vain.
    let digest = tokio::select! {
        digest = &mut hashing => digest,
        fetched = fetching => {
            fetched?;
            meter.set(part.present());
            hashing.await
        }
        never = show(part, meter) => match never {},
    };
    let digest = digest.expect("hashing neither panics nor is cancelled");
    digest.map_err(PartsError::Hash)
}

/// Brings a file that fits in memory, and its digest.
///
/// In a task of its own: all files of a fetch are followed by one, which would do all of this on one core.
pub(super) async fn gather(
    origin: &Origin,
    file: &Arc<RemoteFile>,
) -> Result<(Vec<u8>, Digest), PartsError> {
    let bytes = usize::try_from(file.size).expect("it fits in memory");
    let sink = Sink::Memory(Vec::with_capacity(bytes));
    let range = Ranged::of(origin, file, sink, 0..file.size);
    let connection = Connection::new(&origin.shared).await;
    let (shared, file) = (Arc::clone(&origin.shared), Arc::clone(file));
    let gathered = AbortOnDropHandle::new(tokio::spawn(async move {
        let bytes = read_whole(range, connection, &shared).await?;
        let claims = file.all_claims().ok_or_else(|| untold(&file))?;
        let mut verifier = Verifier::new(file.size, claims);
        verifier.update(&bytes);
        let digest = verifier.finish().map_err(HashError::Mismatch);
        Ok((bytes, digest.map_err(PartsError::Hash)?))
    }));
    let gathered = gathered.await;
    gathered.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Reads a file into memory, if need be from its first byte on.
async fn read_whole(
    mut range: Ranged,
    connection: Connection,
    shared: &Shared,
) -> Result<Vec<u8>, PartsError> {
    match range.bring(connection).await {
        Err(PartsError::Source(SourceError::NoRanges { .. })) => {
            range.from_start = true;
            range.bring(Connection::new(shared).await).await?;
        }
        brought => brought?,
    }
    match range.sink {
        Sink::Memory(bytes) => Ok(bytes),
        Sink::Part(_) => unreachable!("it is read into memory"),
    }
}

/// A source that did not keep its word.
fn untold(file: &RemoteFile) -> SourceError {
    SourceError::Invalid {
        what: file.path.to_string(),
        detail: "it came without what should be claimed of it".to_owned(),
        hint: None,
    }
}

/// Tells the meter how much of the file is here, until it is dropped.
async fn show(part: &Part, meter: &FileMeter<'_>) -> Infallible {
    let base = part.present();
    let mut refresh = tokio::time::interval(Duration::from_millis(100));
    loop {
        refresh.tick().await;
        meter.set(part.present().max(base));
    }
}

/// Fetches all missing ranges, as many at once as there are connections.
async fn fetch_ranges(
    origin: &Origin,
    file: &Arc<RemoteFile>,
    part: &Arc<Part>,
) -> Result<(), PartsError> {
    let mut missing = VecDeque::from(part.missing());
    let mut under_way = JoinSet::new();
    let limits = &origin.shared.limits;
    // Kept across turns of the loop, so that this file keeps its place among those that wait.
    let connection = || async {
        // The hasher of a small file begins when all of it is here.
        if !limits.is_small(file.size) {
            part.caught_up().await;
            let shared = &origin.shared;
            part.has_room(|| shared.width.is_short() && shared.buffers.is_short())
                .await;
        }
        Connection::new(&origin.shared).await
    };
    let mut next = std::pin::pin!(connection());
    while !(missing.is_empty() && under_way.is_empty()) {
        tokio::select! {
            // A range that pauses holds no connection, but is under way: while the origin is away not
            // all ranges should ask for it in turn.
            connected = &mut next, if !missing.is_empty() && under_way.len() < limits.connections => {
                next.set(connection());
                let bytes = match (limits.is_small(file.size), under_way.len()) {
                    (true, _) => file.size,
                    // It is hashed as it comes.
                    (false, 0) => limits.part_bytes,
                    (false, _) => limits.range_bytes(origin.shared.width.now()),
                };
                let range = cut(&mut missing, bytes).expect("guarded above");
                under_way.spawn(Ranged::new(origin, file, part, range).fetch(connected));
            }
            Some(ended) = under_way.join_next() => {
                ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
            }
        }
    }
    Ok(())
}

/// Takes the first range, up to the next multiple of `bytes`.
fn cut(ranges: &mut VecDeque<Range<u64>>, bytes: u64) -> Option<Range<u64>> {
    let first = ranges.front_mut()?;
    let end = (first.start / bytes + 1) * bytes;
    if end >= first.end {
        return ranges.pop_front();
    }
    let range = first.start..end;
    first.start = end;
    Some(range)
}

/// Cuts ranges into pieces of `part_bytes`, at multiples of it.
pub(super) fn split(missing: Vec<Range<u64>>, part_bytes: u64) -> VecDeque<Range<u64>> {
    let mut pieces = VecDeque::new();
    for range in missing {
        let mut at = range.start;
        while at < range.end {
            let end = ((at / part_bytes + 1) * part_bytes).min(range.end);
            pieces.push_back(at..end);
            at = end;
        }
    }
    pieces
}

/// A range is no shorter, for each waits for its first byte: 2 MiB.
const LEAST_RANGE: u64 = 2 << 20;

impl FetchLimits {
    /// Whether a file of `bytes` comes in one range.
    pub(super) fn is_small(&self, bytes: u64) -> bool {
        bytes <= self.part_bytes
    }

    /// Bytes that a connection gathers before they are written, while there are so many reads at once: the more, the less
    /// often the disk is asked, and other threads are. All connections together gather in a quarter of the memory, and write
    /// from another; in the rest are blocks that wait to be hashed.
    pub(super) fn block_bytes(&self, reads: usize) -> u64 {
        let bytes = self.memory_bytes / (4 * reads as u64);
        bytes.clamp(64 << 10, 1 << 20) & !(ALIGNMENT as u64 - 1)
    }

    /// Bytes of one read of a file while there are so many at once. What all of them bring must have room in memory: before
    /// the last byte of the first one has come, the others are nearly done, and all wait to be hashed. They get half of it:
    /// in a quarter is what is gathered and written, in another what the next reads bring while those still wait.
    fn range_bytes(&self, reads: usize) -> u64 {
        let memory = self.memory_bytes / 2;
        let bytes = (memory / reads as u64).max(LEAST_RANGE);
        let bytes = bytes.min(self.part_bytes);
        bytes - bytes % self.block_bytes(reads).min(bytes)
    }

    /// Memory for the blocks of all connections.
    pub(super) fn buffers(&self) -> Arc<Buffers> {
        let block = self.block_bytes(1);
        let bounded = |number| usize::try_from(number).unwrap_or(usize::MAX);
        Buffers::new(bounded(block), bounded(self.memory_bytes / block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_multiples_of_a_part() {
        assert_eq!(split(vec![3..5, 8..25], 10), [3..5, 8..10, 10..20, 20..25]);
        assert!(split(vec![], 10).is_empty());
    }

    #[test]
    fn a_range_is_cut_from_the_first_of_what_is_missing() {
        let mut missing = VecDeque::from([3..5, 8..25]);
        let cut = std::iter::from_fn(|| cut(&mut missing, 10));
        assert_eq!(cut.collect::<Vec<_>>(), [3..5, 8..10, 10..20, 20..25]);
    }

    #[test]
    fn the_ranges_of_all_reads_fit_in_memory() {
        let limits = FetchLimits::default();
        for (reads, bytes) in [(1, 8 << 20), (4, 6 << 20), (8, 3 << 20), (16, 2 << 20)] {
            let block = limits.block_bytes(reads);
            let range = limits.range_bytes(reads);
            assert!(range <= bytes && range > bytes - block, "{reads}: {range}");
            assert_eq!(range % block, 0, "{reads}");
        }
        assert!(limits.range_bytes(64) > LEAST_RANGE - limits.block_bytes(64));
        let parts = FetchLimits {
            part_bytes: 100,
            ..limits
        };
        assert_eq!(parts.range_bytes(1), 100);
    }
}
