//! Blobs in the making: staging, the journal, hashing and sealing.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use nix::fcntl::{FallocateFlags, OFlag};

use self::journal::{Journal, Record, checksum};
use self::ranges::Ranges;
use super::evict::remove_if_there;
use super::snapshot::Lease;
use super::{At, Store, StoreError, claim, entries, sync_parent};
use crate::digest::{ClaimMismatch, Digest, Verifier};
use crate::fault;
use crate::source::RemoteFile;

mod journal;
mod ranges;

/// Bytes that are hashed at a time: they stay in a core's second-level cache.
const HASH_BYTES: usize = 256 << 10;

/// Digits of a key that is a digest. A random one has fewer.
const DIGEST_DIGITS: usize = 64;

/// Names bytes that are in flight, before or without a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StageKey(String);

impl StageKey {
    /// The key of a file's bytes. The same bytes have the same key in every process, as far as their
    /// origin lets us know; bytes that it gives no name to cannot be resumed.
    #[must_use]
    pub fn of(file: &RemoteFile) -> Self {
        match (file.claims.sha256.filter(|_| file.vouched), &file.identity) {
            (Some(digest), _) => Self(digest.to_string()),
            (None, Some(identity)) => Self(Digest::of(identity.as_bytes()).to_string()),
            (None, None) => Self(uuid::Uuid::new_v4().simple().to_string()),
        }
    }
}

/// Whether a key ever names the bytes of this part again.
pub(super) fn can_resume(part: &Path) -> bool {
    part.file_stem()
        .is_some_and(|key| key.len() == DIGEST_DIGITS)
}

impl fmt::Display for StageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who works on some bytes.
pub enum Claimed {
    /// The caller, from now on.
    Mine(Claim),
    /// Another task or process.
    Theirs(Watch),
}

/// The right to work on some bytes. First look whether they are here by now, then
/// [`Claim::stage`] them; dropping it leaves everything as it was.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    file: Option<claim::Held>,
}

/// Sees how far somebody else is with the same bytes.
pub struct Watch {
    part: PathBuf,
}

impl Watch {
    /// Bytes that are on disk so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        Journal::bytes_at(&Journal::path_of(&self.part))
    }

    /// Whether nobody works on them any more: they are sealed, or were given up.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn over(&self) -> Result<bool, StoreError> {
        let file = match File::open(&self.part) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(error).at("open", &self.part),
        };
        Ok(claim::try_shared(file).at("lock", &self.part)?.is_some())
    }
}

/// The bytes of one blob in flight, claimed for this process until it is dropped.
#[derive(Debug)]
pub struct Part {
    path: PathBuf,
    size: u64,
    file: claim::Held,
    journal: Mutex<Journal>,
    /// Blocks that an earlier process wrote. They are believed once their checksum was seen to hold.
    resumed: Vec<Record>,
    state: Mutex<State>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct State {
    present: Ranges,
    closed: bool,
}

/// Why a part's bytes have no digest.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// They are not what the source claims. The part must be discarded.
    #[error(transparent)]
    Mismatch(#[from] ClaimMismatch),
    /// Bytes that the journal promised are not on disk. They were struck off: stage the part again.
    #[error("{bytes} bytes of an earlier run are damaged")]
    Torn {
        /// How many.
        bytes: u64,
    },
    /// [`Part::close`] was called first.
    #[error("the download was given up")]
    Closed,
    /// They cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Claims the bytes named `key`.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn claim(&self, key: &StageKey) -> Result<Claimed, StoreError> {
        let path = self.staging().join(format!("{key}.part"));
        match self.claim_file(&path)? {
            Some(file) => {
                fault::point("part.created");
                Ok(Claimed::Mine(Claim {
                    path,
                    file: Some(file),
                }))
            }
            None => Ok(Claimed::Theirs(Watch { part: path })),
        }
    }

    /// Opens and locks `path`; `None` if somebody else has it.
    fn claim_file(&self, path: &Path) -> Result<Option<claim::Held>, StoreError> {
        let mut denied = 0;
        loop {
            let mut options = File::options();
            options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                // What a symlink leads to is not ours to write to.
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .mode(0o600);
            let file = match options.open(path) {
                // Its owner is about to seal it, or died there. Another denial is the folder's own.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && denied < 3 => {
                    denied += 1;
                    if self.unprotect(path)? {
                        continue;
                    }
                    return Ok(None);
                }
                opened => opened.at("create", path)?,
            };
            let Some(held) = claim::try_exclusive(file).at("lock", path)? else {
                return Ok(None);
            };
            // Its last owner may have sealed or removed it between our open and our lock.
            if claim::still_at(&held, path).at("look at", path)?
                && !self.strike_sealed_off(&held, path)?
            {
                return Ok(Some(held));
            }
        }
    }

    /// Makes a part that nobody works on writable again. False if somebody has it.
    fn unprotect(&self, path: &Path) -> Result<bool, StoreError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(error).at("open", path),
        };
        let Some(held) = claim::try_exclusive(file).at("lock", path)? else {
            return Ok(false);
        };
        // With the lock held and this name in place it does not become a blob.
        if claim::still_at(&held, path).at("look at", path)?
            && !self.strike_sealed_off(&held, path)?
        {
            held.set_permissions(fs::Permissions::from_mode(0o600))
                .at("unprotect", path)?;
        }
        Ok(true)
    }

    /// Takes the name `path` off a blob, which a process left there that died as it sealed it. The
    /// caller holds the part's lock.
    fn strike_sealed_off(&self, part: &File, path: &Path) -> Result<bool, StoreError> {
        if !self.is_sealed(&part.metadata().at("look at", path)?)? {
            return Ok(false);
        }
        remove_if_there(&Journal::path_of(path))?;
        remove_if_there(path)?;
        Ok(true)
    }

    /// Whether a part is a blob by now, or was one that went bad: nobody may write to it.
    pub(super) fn is_sealed(&self, part: &Metadata) -> Result<bool, StoreError> {
        if part.nlink() < 2 {
            return Ok(false);
        }
        // Blobs first: one that is set aside meanwhile gets its new name before it loses the old one.
        if self.blobs()?.contains_key(&part.ino()) {
            return Ok(true);
        }
        let aside = entries(&self.root().join("damaged"))?;
        Ok(aside.iter().any(|entry| entry.ino() == part.ino()))
    }

    /// Disk space that an unfinished download of these bytes has taken already.
    #[must_use]
    pub fn staged_bytes(&self, key: &StageKey) -> u64 {
        let path = self.staging().join(format!("{key}.part"));
        fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Bytes that an unfinished download of these bytes has brought already.
    #[must_use]
    pub fn journaled_bytes(&self, key: &StageKey) -> u64 {
        Journal::bytes_at(&self.staging().join(format!("{key}.journal")))
    }

    fn allocate(&self, file: &File, path: &Path, size: u64) -> Result<(), StoreError> {
        file.set_len(0).at("empty", path)?;
        let Err(error) = preallocate(file, size) else {
            return Ok(());
        };
        // What was had of the space would else stay taken until the part is stale.
        let _ = file.set_len(0);
        match error {
            error if super::is_full(&error) => {
                let available = self.file_system()?.free;
                Err(StoreError::NoSpace {
                    root: self.root.clone(),
                    needed: size,
                    available,
                })
            }
            error => Err(error).at("allocate", path),
        }
    }
}

impl Claim {
    /// Readies a file of `size` bytes, with the disk space it needs. Blocks that an earlier process
    /// wrote are kept.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] if it does not fit, else [`StoreError::Io`].
    pub fn stage(mut self, store: &Store, size: u64) -> Result<Arc<Part>, StoreError> {
        let file = self.file.as_ref().expect("it is taken only below");
        let journal_path = Journal::path_of(&self.path);
        if file.metadata().at("look at", &self.path)?.len() != size || size == 0 {
            // Somebody stopped before the space was there, or the origin had another size then.
            let _ = fs::remove_file(&journal_path);
            store.allocate(file, &self.path, size)?;
        }
        fault::point("part.allocated");
        let (journal, resumed) =
            Journal::open(journal_path.clone(), size).at("open", &journal_path)?;
        let mut state = State::default();
        for record in &resumed {
            state.present.insert(record.range.clone());
        }
        Ok(Arc::new(Part {
            path: std::mem::take(&mut self.path),
            size,
            file: self.file.take().expect("it is taken only here"),
            journal: Mutex::new(journal),
            resumed,
            state: Mutex::new(state),
            grown: Condvar::new(),
        }))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // An empty file helps nobody. The name is ours to remove only while it names our file.
        if let Some(file) = &self.file
            && (!can_resume(&self.path) || file.metadata().is_ok_and(|found| found.len() == 0))
            && claim::still_at(file, &self.path).unwrap_or(false)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Gives `file` its size and, where the file system can, the blocks for it.
pub(super) fn preallocate(file: &File, size: u64) -> io::Result<()> {
    let length = i64::try_from(size).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let magic = nix::sys::statfs::fstatfs(file.as_fd())?.filesystem_type();
    // On tmpfs allocation is the write itself: it would double the work.
    if size == 0 || magic == nix::sys::statfs::TMPFS_MAGIC {
        return file.set_len(size);
    }
    match nix::fcntl::fallocate(file.as_fd(), FallocateFlags::empty(), 0, length) {
        Err(nix::Error::EOPNOTSUPP) => file.set_len(size),
        result => Ok(result?),
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

    /// Where the bytes that follow `from` without a hole end.
    #[must_use]
    pub fn end_of_run(&self, from: u64) -> u64 {
        self.state().present.end_of_run(from)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// Writes the block that starts at byte `offset`, and journals it. Blocks must not overlap.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] if it cannot be written. What was written before stays good.
    ///
    /// # Panics
    ///
    /// If the block reaches past the end of the file.
    pub fn write(&self, offset: u64, block: &[Bytes]) -> Result<(), StoreError> {
        let length: u64 = block.iter().map(|piece| piece.len() as u64).sum();
        let range = offset..offset + length;
        assert!(
            range.end <= self.size,
            "a block reaches past the end of the file"
        );
        write_all_at(&self.file, offset, block).at("write", &self.path)?;
        fault::point("part.written");
        let record = Record {
            range: range.clone(),
            crc: journal::checksum_of(block),
        };
        let mut journal = self.journal.lock().expect("no holder of this lock panics");
        journal
            .append(&record)
            .at("write the journal of", &self.path)?;
        drop(journal);
        fault::point("part.journaled");
        self.state().present.insert(range);
        self.grown.notify_all();
        Ok(())
    }

    /// Starts to write `range` back to the disk, so that little is left to sync at the end.
    #[allow(unsafe_code, reason = "no crate wraps sync_file_range")]
    pub fn start_write_back(&self, range: Range<u64>) {
        use std::os::fd::AsRawFd;
        let (Ok(offset), Ok(length)) =
            (range.start.try_into(), (range.end - range.start).try_into())
        else {
            return;
        };
        let flags = nix::libc::SYNC_FILE_RANGE_WRITE;
        // SAFETY: the descriptor is open, and the call touches no memory of ours. It is a hint: where a
        // file system does not know it, the sync in `seal` does all the work.
        unsafe { nix::libc::sync_file_range(self.file.as_raw_fd(), offset, length, flags) };
    }

    /// Gives up: [`Part::hash`] returns. The bytes stay for whoever claims them next.
    pub fn close(&self) {
        self.state().closed = true;
        self.grown.notify_all();
    }

    /// Hashes the file front to back, following the writers, until its last byte is there.
    ///
    /// The bytes are read back from the page cache moments after they were written; only those of an
    /// earlier process come from the disk, and are checked against the journal.
    ///
    /// # Errors
    ///
    /// [`HashError`]; after [`HashError::Mismatch`] call [`Part::discard`].
    pub fn hash(&self, mut verifier: Verifier) -> Result<Digest, HashError> {
        let mut buffer = vec![0; HASH_BYTES];
        let mut at = 0;
        while at < self.size {
            let end = self.wait_for_run(at)?;
            while at < end {
                at = match self.resumed_at(at) {
                    Some(record) => self.hash_resumed(record, &mut verifier, &mut buffer)?,
                    None => {
                        let next = self.next_resumed(at).min(end).min(at + HASH_BYTES as u64);
                        let piece =
                            &mut buffer[..usize::try_from(next - at).expect("at most HASH_BYTES")];
                        self.file.read_exact_at(piece, at).at("read", &self.path)?;
                        verifier.update(piece);
                        next
                    }
                };
            }
        }
        Ok(verifier.finish()?)
    }

    fn wait_for_run(&self, at: u64) -> Result<u64, HashError> {
        let mut state = self.state();
        loop {
            let end = state.present.end_of_run(at);
            if end > at {
                return Ok(end);
            }
            if state.closed {
                return Err(HashError::Closed);
            }
            // The time-out only guards against a lost wake-up.
            let waited = self.grown.wait_timeout(state, Duration::from_secs(1));
            state = waited.expect("no holder of this lock panics").0;
        }
    }

    fn resumed_at(&self, at: u64) -> Option<&Record> {
        let found = self
            .resumed
            .binary_search_by_key(&at, |record| record.range.start);
        found.ok().map(|index| &self.resumed[index])
    }

    fn next_resumed(&self, at: u64) -> u64 {
        let index = self
            .resumed
            .partition_point(|record| record.range.start <= at);
        self.resumed
            .get(index)
            .map_or(u64::MAX, |record| record.range.start)
    }

    fn hash_resumed(
        &self,
        record: &Record,
        verifier: &mut Verifier,
        buffer: &mut Vec<u8>,
    ) -> Result<u64, HashError> {
        let length =
            usize::try_from(record.range.end - record.range.start).expect("a block fits in memory");
        buffer.resize(length.max(HASH_BYTES), 0);
        let block = &mut buffer[..length];
        self.file
            .read_exact_at(block, record.range.start)
            .at("read", &self.path)?;
        if checksum([&*block]) != record.crc {
            return Err(HashError::Torn {
                bytes: self.strike_torn_off()?,
            });
        }
        verifier.update(block);
        Ok(record.range.end)
    }

    /// Rewrites the journal without the blocks of an earlier process that are not on disk as promised.
    fn strike_torn_off(&self) -> Result<u64, StoreError> {
        let mut journal = self.journal.lock().expect("no holder of this lock panics");
        let journal_path = Journal::path_of(&self.path);
        let (_, all) =
            Journal::open(journal_path, self.size).at("read the journal of", &self.path)?;
        let before: u64 = all
            .iter()
            .map(|record| record.range.end - record.range.start)
            .sum();
        let mut sound = Vec::with_capacity(all.len());
        for record in all {
            let length = usize::try_from(record.range.end - record.range.start)
                .expect("a block fits in memory");
            let mut block = vec![0; length];
            self.file
                .read_exact_at(&mut block, record.range.start)
                .at("read", &self.path)?;
            if checksum([&block[..]]) == record.crc {
                sound.push(record);
            }
        }
        journal
            .rewrite(&sound)
            .at("write the journal of", &self.path)?;
        Ok(before
            - sound
                .iter()
                .map(|record| record.range.end - record.range.start)
                .sum::<u64>())
    }

    /// Gives the bytes of `file`, which hash to `digest`, their name, and links them into `lease`.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn seal(
        &self,
        store: &Store,
        digest: Digest,
        lease: &Lease,
        file: &RemoteFile,
    ) -> Result<(), StoreError> {
        // Bytes first, then the name: after a power loss the name must not stand for other bytes.
        if let Err(error) = self.file.sync_data() {
            // What the disk lost the page cache still shows: whoever goes on would believe it.
            let _ = self.discard();
            return Err(error).at("sync", &self.path);
        }
        self.file
            .set_permissions(fs::Permissions::from_mode(0o444))
            .at("protect", &self.path)?;
        fault::point("seal.synced");
        let blob = store.blob_path(digest);
        super::make_dirs(blob.parent().unwrap_or(store.root()))
            .at("create the folder of", &blob)?;
        store.set_aside_other_length(digest, self.size)?;
        let _shared = store.lock_shared()?;
        let linked = lease.link(&self.path, &file.path)?;
        // Only what was hashed may get the name, whatever lies at the part's path by now.
        if !claim::still_at(&self.file, &linked).at("look at", &linked)? {
            remove_if_there(&linked)?;
            let replaced = io::Error::other("another file took its place");
            return Err(replaced).at("seal", &self.path);
        }
        fault::point("seal.linked");
        // Before the name: with it others may take the blob, and must find all of it.
        self.remember(store, file, digest)?;
        match fs::hard_link(&linked, &blob) {
            // Somebody had the same bytes under another key.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                lease.link(&blob, &file.path)?;
            }
            named => named.at("link", &blob)?,
        }
        sync_parent(&blob).at("sync the folder of", &blob)?;
        fault::point("seal.renamed");
        self.remove_files()?;
        fault::point("seal.unjournaled");
        Ok(())
    }

    fn remember(&self, store: &Store, file: &RemoteFile, digest: Digest) -> Result<(), StoreError> {
        match &file.identity {
            Some(identity) => store.remember(identity, digest),
            None => Ok(()),
        }
    }

    /// Removes the bytes: they are not what they should be.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn discard(&self) -> Result<(), StoreError> {
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

impl Drop for Part {
    fn drop(&mut self) {
        // Nobody finds it again; if it was sealed it is gone already.
        if !can_resume(&self.path) {
            let _ = self.remove_files();
        }
    }
}

/// `pwritev` until all of `block` is on its way to the disk.
fn write_all_at(file: &File, mut offset: u64, block: &[Bytes]) -> io::Result<()> {
    // Source: IOV_MAX of Linux.
    for pieces in block.chunks(1024) {
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut slices = &mut slices[..];
        while !slices.is_empty() {
            let at = i64::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
            if slices[0].is_empty() {
                slices = &mut slices[1..];
                continue;
            }
            let written = match nix::sys::uio::pwritev(file.as_fd(), slices, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(nix::Error::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            offset += written as u64;
            IoSlice::advance_slices(&mut slices, written);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::StoreLimits;
    use super::*;
    use crate::digest::Claims;
    use crate::model::RelPath;

    #[test]
    fn bytes_that_cannot_be_synced_are_not_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
        // The one kind of file that can be had anywhere and cannot be synced.
        let path = store.staging().join("x.part");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo = File::options().read(true).write(true).open(&path).unwrap();
        let (journal, _) = Journal::open(Journal::path_of(&path), 0).unwrap();
        let part = Part {
            file: claim::try_exclusive(fifo).unwrap().unwrap(),
            path,
            size: 0,
            journal: Mutex::new(journal),
            resumed: Vec::new(),
            state: Mutex::default(),
            grown: Condvar::new(),
        };
        let file = RemoteFile {
            path: RelPath::new("a").unwrap(),
            size: 0,
            claims: Claims::default(),
            identity: None,
            vouched: false,
            xet_hash: None,
        };

        let lease = store.lease().unwrap();
        let sealed = part.seal(&store, Digest::of(b""), &lease, &file);

        assert!(matches!(sealed, Err(StoreError::Io { op: "sync", .. })));
        drop(lease);
        assert!(entries(&store.staging()).unwrap().is_empty());
    }
}
