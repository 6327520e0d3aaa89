//! Blobs in the making: writing, hashing and sealing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;

use self::direct::Direct;
use self::journal::{Journal, Record, checksum};
use self::ranges::Ranges;
use super::evict::remove_if_there;
use super::{At, StoreError, claim};
use crate::buffers::Buffer;
use crate::fault;

mod direct;
mod hash;
mod journal;
mod ranges;
mod seal;
mod stage;

pub use self::hash::HashError;
pub use self::seal::{Checked, Unsealed};
pub use self::stage::{Claim, Claimed, StageKey, Watch};
pub(super) use self::stage::{can_resume, preallocate};

/// Bytes of one write to the page cache: 32 KiB.
///
/// For larger ones the kernel wants larger pieces of free memory, and moves other pages about to make them. Measured where
/// the page cache fills the memory, as it does on each node after a while: 1 GiB took 0.29 to 0.45 s of processor time in
/// writes of 32 KiB, 0.27 to 1.71 s in writes of 128 KiB.
const WRITE_BYTES: usize = 32 << 10;

/// Bytes in memory that a hasher may be behind before no more are taken: 2 MiB, which it does in some milliseconds, and
/// which are still in the processor's cache then.
const BACKLOG_BYTES: u64 = 2 << 20;

/// How often to look whether others have given memory back.
const LOOK: Duration = Duration::from_millis(20);

/// The bytes of one blob in flight, claimed for this process until it is dropped.
#[derive(Debug)]
pub struct Part {
    path: PathBuf,
    size: u64,
    file: claim::Held,
    /// The same file without the page cache; `None` for small files, and where the file system cannot do it.
    direct: Option<Direct>,
    journal: Mutex<Journal>,
    /// Blocks that an earlier process wrote. They are believed once their checksum was seen to hold.
    resumed: Vec<Record>,
    state: Mutex<State>,
    grown: Condvar,
    /// The hasher has got on.
    got_on: Notify,
    /// Bytes that came from the origin, also those that are not written yet.
    arrived: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    present: Ranges,
    /// What is being written now. No two of them overlap, nor one of them with `present`.
    in_flight: Vec<Range<u64>>,
    /// Blocks that are on disk and still in memory, for the hasher, by their first byte.
    held: BTreeMap<u64, Buffer>,
    /// Where the hasher is.
    hashed: u64,
    closed: bool,
    /// The bytes are not what they should be.
    discarded: bool,
}

impl State {
    /// The first bytes of `range` that are neither here nor being written.
    fn hole(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let mut taken = self.present.clone();
        for writing in &self.in_flight {
            taken.insert(writing.clone());
        }
        let mut holes = taken.holes(range.end).into_iter();
        let hole = holes.find(|hole| hole.end > range.start && hole.start < range.end)?;
        Some(hole.start.max(range.start)..hole.end.min(range.end))
    }

    /// Bytes in memory that the hasher could take now.
    fn backlog(&self) -> u64 {
        let mut end = self.hashed;
        for (start, block) in self.held.range(end..) {
            if *start != end {
                break;
            }
            end += block.len() as u64;
        }
        end - self.hashed
    }
}

/// Bytes that one call of [`Part::write`] alone may write. Dropping it lets others.
struct Writing<'a> {
    part: &'a Part,
    range: Range<u64>,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut state = self.part.state();
        state.in_flight.retain(|range| *range != self.range);
        drop(state);
        self.part.grown.notify_all();
    }
}

impl Part {
    /// Size of the file in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bytes that are not on disk yet.
    #[must_use]
    pub fn missing(&self) -> Vec<Range<u64>> {
        self.state().present.holes(self.size)
    }

    /// How many bytes are on disk.
    #[must_use]
    pub fn present(&self) -> u64 {
        self.state().present.bytes()
    }

    /// How many bytes of `range` are on disk.
    #[must_use]
    pub fn present_in(&self, range: &Range<u64>) -> u64 {
        let state = self.state();
        let holes = state.present.holes(self.size);
        let lacking = holes.iter().map(|hole| {
            let (start, end) = (hole.start.max(range.start), hole.end.min(range.end));
            end.saturating_sub(start)
        });
        (range.end - range.start) - lacking.sum::<u64>()
    }

    /// Counts bytes that came from the origin.
    pub fn count_arrived(&self, bytes: u64) {
        self.arrived.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that came from the origin, also those that are not written yet.
    #[must_use]
    pub fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Waits until the hasher has not much in memory left to do. To fetch more before would not end sooner, but take more
    /// memory than there is.
    pub(crate) async fn caught_up(&self) {
        loop {
            let mut got_on = std::pin::pin!(self.got_on.notified());
            // Before the look: what comes after it wakes us.
            got_on.as_mut().enable();
            if self.state().backlog() <= BACKLOG_BYTES {
                return;
            }
            got_on.await;
        }
    }

    /// Waits while memory is short of which blocks of this file hold some: what comes next would have to go through the page
    /// cache.
    pub(crate) async fn has_room(&self, is_short: impl Fn() -> bool) {
        loop {
            let mut got_on = std::pin::pin!(self.got_on.notified());
            got_on.as_mut().enable();
            let none = self.state().held.is_empty();
            if none || !is_short() {
                return;
            }
            // Others give memory back, too, and say nothing of it.
            let _ = tokio::time::timeout(LOOK, got_on).await;
        }
    }

    /// Whether what is missing will not come any more, or what is here is not to be used.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        let state = self.state();
        state.discarded || state.closed && state.present.bytes() < self.size
    }

    /// Fills `bytes` with those on disk from byte `at` on. They were not verified yet, but are what was written.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`], also if the disk lost what an earlier process wrote there.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), StoreError> {
        let end = at + bytes.len() as u64;
        let inside = |record: &&Record| record.range.start < end && at < record.range.end;
        for record in self.resumed.iter().filter(inside) {
            let bytes = record.range.end - record.range.start;
            let mut block = vec![0; usize::try_from(bytes).expect("a block fits in memory")];
            if !self.holds(record, &mut block)? {
                let torn = io::Error::from(io::ErrorKind::InvalidData);
                return Err(torn).at("believe", &self.path);
            }
        }
        let read = match &self.direct {
            Some(direct) => direct.read(&self.file, bytes, at),
            None => self.file.read_exact_at(bytes, at),
        };
        read.at("read", &self.path)
    }

    /// Where the bytes that follow `from` without a hole end.
    #[must_use]
    pub fn end_of_run(&self, from: u64) -> u64 {
        self.state().present.end_of_run(from)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// Writes the block that starts at byte `offset`, and journals it. Bytes that are here already stay
    /// as they are: the hasher does not read them again. On return all of the block is here.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] if it cannot be written. What was written before stays good.
    ///
    /// # Panics
    ///
    /// If the block reaches past the end of the file.
    pub fn write(&self, offset: u64, block: &[u8]) -> Result<(), StoreError> {
        let range = offset..offset + block.len() as u64;
        assert!(
            range.end <= self.size,
            "a block reaches past the end of the file"
        );
        while let Some(writing) = self.take_hole(&range) {
            let hole = writing.range.clone();
            let inside = |at: u64| usize::try_from(at - offset).expect("within the block");
            let bytes = &block[inside(hole.start)..inside(hole.end)];
            self.write_cached(bytes, hole.start)?;
            let checksum = self.checksum_of(&hole, bytes);
            self.wrote(hole, checksum, None)?;
        }
        Ok(())
    }

    /// Does what [`Part::write`] does, and keeps the block in memory for the hasher as long as memory is plentiful. Then
    /// it need not go through the page cache, which would cost several times what the disk's own transfer does.
    pub(crate) fn write_block(&self, offset: u64, block: Buffer) -> Result<(), StoreError> {
        let range = offset..offset + block.len() as u64;
        assert!(
            range.end <= self.size,
            "a block reaches past the end of the file"
        );
        if !block.is_spare() {
            return self.write(offset, &block);
        }
        let Some(writing) = self.take_hole(&range) else {
            return Ok(());
        };
        if writing.range != range {
            drop(writing);
            return self.write(offset, &block);
        }
        let past_the_cache = match &self.direct {
            Some(direct) => direct.write(&self.file, &block, offset),
            None => Ok(false),
        };
        if !past_the_cache.at("write", &self.path)? {
            self.write_cached(&block, offset)?;
        }
        let checksum = self.checksum_of(&range, &block);
        self.wrote(range, checksum, Some(block))
    }

    fn write_cached(&self, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        let mut at = offset;
        for piece in bytes.chunks(WRITE_BYTES) {
            self.file.write_all_at(piece, at).at("write", &self.path)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// The next bytes of `range` to write; `None` once all are here. Waits for those that somebody else
    /// is writing: if that fails, they are ours.
    fn take_hole(&self, range: &Range<u64>) -> Option<Writing<'_>> {
        let mut state = self.state();
        loop {
            if let Some(hole) = state.hole(range) {
                state.in_flight.push(hole.clone());
                return Some(Writing {
                    part: self,
                    range: hole,
                });
            }
            if state.present.end_of_run(range.start) >= range.end {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// Notes that `range` is on disk, whose bytes have this checksum. A block that is given is held for the hasher.
    fn wrote(
        &self,
        range: Range<u64>,
        checksum: Option<u64>,
        block: Option<Buffer>,
    ) -> Result<(), StoreError> {
        fault::point("part.written");
        if let Some(checksum) = checksum {
            let range = range.clone();
            self.note(Record { range, checksum })?;
        }
        let mut state = self.state();
        // Nobody hashes what was given up.
        if let Some(block) = block.filter(|_| !state.closed) {
            state.held.insert(range.start, block);
        }
        state.present.insert(range);
        Ok(())
    }

    /// What the journal says of these bytes. Nothing if they are the whole file: it is hashed next, and to go on with it
    /// would save nothing.
    fn checksum_of(&self, range: &Range<u64>, bytes: &[u8]) -> Option<u64> {
        (*range != (0..self.size)).then(|| checksum(bytes))
    }

    /// Appends to the journal.
    fn note(&self, record: Record) -> Result<(), StoreError> {
        let mut journal = self.journal.lock().expect("no holder of this lock panics");
        journal
            .append(&record)
            .at("write the journal of", &self.path)?;
        drop(journal);
        fault::point("part.journaled");
        Ok(())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        // The time-out only guards against a lost wake-up.
        let waited = self.grown.wait_timeout(state, Duration::from_secs(1));
        waited.expect("no holder of this lock panics").0
    }

    /// Starts to write `range` back to the disk, so that little is left to sync at the end.
    pub fn start_write_back(&self, range: Range<u64>) {
        // A hint: where a file system does not know it, the sync in `seal` does all the work.
        let _ = sync_file_range(&self.file, range, nix::libc::SYNC_FILE_RANGE_WRITE);
    }

    /// Gives up: [`Part::hash`] returns. The bytes stay for whoever claims them next.
    pub fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.held.clear();
        drop(state);
        self.grown.notify_all();
        self.got_on.notify_waiters();
    }

    /// Removes the bytes: they are not what they should be.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn discard(&self) -> Result<(), StoreError> {
        self.state().discarded = true;
        self.close();
        self.remove_files()
    }

    fn remove_files(&self) -> Result<(), StoreError> {
        // A part that is not ours has a journal that is not ours.
        if !claim::still_at(&self.file, &self.path).at("look at", &self.path)? {
            return Ok(());
        }
        // The journal first: with the part this claim ends, and the next owner writes its own.
        let journal = self.journal.lock().expect("no holder of this lock panics");
        journal.remove().at("remove the journal of", &self.path)?;
        remove_if_there(&self.path)
    }
}

#[allow(unsafe_code, reason = "no crate wraps sync_file_range")]
fn sync_file_range(file: &File, range: Range<u64>, flags: u32) -> io::Result<()> {
    let (Ok(offset), Ok(length)) = (range.start.try_into(), (range.end - range.start).try_into())
    else {
        return Err(io::ErrorKind::FileTooLarge.into());
    };
    // SAFETY: the descriptor is open, and the call touches no memory of ours.
    match unsafe { nix::libc::sync_file_range(file.as_raw_fd(), offset, length, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Nobody finds it again; if it was sealed it is gone already.
        if !can_resume(&self.path) {
            let _ = self.remove_files();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::sync::Arc;

    use super::super::{Store, StoreLimits, entries};
    use super::hash::{Next, RUN_BYTES};
    use super::*;
    use crate::digest::{Claims, Digest, Verifier};
    use crate::model::RelPath;
    use crate::source::RemoteFile;

    fn part(path: PathBuf, file: File, size: u64, resumed: Vec<Record>) -> Part {
        let (mut journal, _) = Journal::open(Journal::path_of(&path), size).unwrap();
        let mut state = State::default();
        for record in &resumed {
            journal.append(record).unwrap();
            state.present.insert(record.range.clone());
        }
        Part {
            // A child that another test starts holds our locks, too, until it is another program.
            file: claim::wait(file, nix::fcntl::FlockArg::LockExclusive).unwrap(),
            direct: None,
            path,
            size,
            journal: Mutex::new(journal),
            resumed,
            state: Mutex::new(state),
            grown: Condvar::new(),
            got_on: Notify::new(),
            arrived: AtomicU64::new(0),
        }
    }

    /// A part whose bytes the disk does not give: the one kind of file that can be had anywhere and says
    /// EIO is a process's memory, where nothing is mapped.
    fn unreadable(dir: &std::path::Path, resumed: Vec<Record>) -> Part {
        let name = "0".repeat(64);
        let file = File::open("/proc/self/mem").unwrap();
        part(dir.join(format!("{name}.part")), file, 10, resumed)
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_memory_short_waits_for_the_hasher_but_not_without_any_block_held() {
        let dir = tempfile::tempdir().unwrap();
        let name = "0".repeat(64);
        let file = tempfile::tempfile().unwrap();
        let part = part(dir.path().join(format!("{name}.part")), file, 10, vec![]);
        part.has_room(|| true).await;

        let block = crate::buffers::Buffers::new(4, 1).take(4);
        part.state().held.insert(0, block);
        part.has_room(|| false).await;
        let waiting = part.has_room(|| true);
        let waited = tokio::time::timeout(Duration::from_secs(10), waiting).await;
        assert!(waited.is_err(), "it went on");

        let hash = async { drop(part.next(0).unwrap()) };
        tokio::join!(part.has_room(|| true), hash);
    }

    #[test]
    fn an_unreadable_block_of_an_earlier_run_is_struck_off() {
        let dir = tempfile::tempdir().unwrap();
        let records = [0..5, 5..10].map(|range| Record { range, checksum: 7 });
        let part = unreadable(dir.path(), records.to_vec());

        let hashed = part.hash(Verifier::new(10, Claims::default()));

        assert!(
            matches!(hashed, Err(HashError::Torn { bytes: 10 })),
            "{hashed:?}"
        );
        assert_eq!(Journal::bytes_at(&Journal::path_of(&part.path)), 0);
    }

    #[test]
    fn unreadable_bytes_of_this_run_are_discarded() {
        let dir = tempfile::tempdir().unwrap();
        let part = unreadable(dir.path(), Vec::new());
        part.state().present.insert(0..10);

        let hashed = part.hash(Verifier::new(10, Claims::default()));

        assert!(
            matches!(hashed, Err(HashError::Torn { bytes: 10 })),
            "{hashed:?}"
        );
        assert!(part.state().closed, "writers go on");
    }

    #[test]
    fn what_the_disk_lost_is_not_handed_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.part");
        fs::write(&path, [1; 10]).unwrap();
        let sound = Record {
            range: 0..5,
            checksum: checksum(&[1; 5]),
        };
        let torn = Record {
            range: 5..10,
            checksum: 7,
        };
        let part = part(
            path.clone(),
            File::open(&path).unwrap(),
            10,
            vec![sound, torn],
        );

        let mut bytes = [0; 5];
        part.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 5]);
        assert!(part.read(4, &mut bytes[..2]).is_err());
        assert!(!part.is_given_up());
        assert!(part.hash(Verifier::new(10, Claims::default())).is_err());
        assert!(part.is_given_up());
    }

    #[test]
    fn a_download_that_is_given_up_does_not_look_for_all_torn_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let record = Record {
            range: 0..5,
            checksum: 7,
        };
        let part = unreadable(dir.path(), vec![record]);
        part.close();

        let struck = part.strike_torn_off();

        assert!(matches!(struck, Err(HashError::Closed)), "{struck:?}");
        let journaled = Journal::bytes_at(&Journal::path_of(&part.path));
        assert_eq!(journaled, 5, "a block was struck off unseen");
    }

    #[test]
    fn the_hasher_looks_often_at_whether_it_is_still_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let part = unreadable(dir.path(), Vec::new());
        part.state().present.insert(0..1 << 40);

        let next = part.next(0);
        assert!(matches!(next, Ok(Next::OnDisk(RUN_BYTES))));
        part.close();
        let closed = part.next(RUN_BYTES);

        assert!(matches!(closed, Err(HashError::Closed)));
    }

    #[test]
    fn bytes_that_cannot_be_synced_are_not_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
        // The one kind of file that can be had anywhere and cannot be synced.
        let path = store.staging().join("x.part");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo = File::options().read(true).write(true).open(&path).unwrap();
        let part = part(path, fifo, 0, Vec::new());
        let file = RemoteFile {
            path: RelPath::new("a").unwrap(),
            size: 0,
            claims: Claims::default(),
            identity: None,
            vouched: crate::source::Vouched::ByNobody,
            xet_hash: None,
            told: None,
        };

        let lease = store.lease().unwrap();
        let sealed = lease.seal(&[Checked {
            bytes: Unsealed::Staged(Arc::new(part)),
            digest: Digest::of(b""),
            file: Arc::new(file),
        }]);

        assert!(matches!(
            sealed[..],
            [Err(StoreError::Io { op: "sync", .. })]
        ));
        drop(lease);
        assert!(entries(&store.staging()).unwrap().is_empty());
    }
}
