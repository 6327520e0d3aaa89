//! Who may write the bytes of a blob: keys, claims, and the disk space for it.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirEntryExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex};

use nix::fcntl::{FallocateFlags, OFlag};
use tokio::sync::Notify;

use super::super::collect::remove_journal;
use super::super::evict::remove_if_there;
use super::super::{At, Store, StoreError, claim, entries, is_full};
use super::journal::Journal;
use super::{Direct, Part, State};
use crate::digest::Digest;
use crate::fault;
use crate::source::{RemoteFile, Vouched};

/// A file no larger than this gets its blocks as it is written: to ask for them before would be one more change
/// of the file system for each of thousands of files.
const AS_WRITTEN: u64 = 1 << 20;

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
        let sure = |_: &Digest| file.vouched == Vouched::BySource;
        match (file.claims.sha256.filter(sure), &file.identity) {
            (Some(digest), _) => Self(digest.to_string()),
            (None, Some(identity)) => Self::of_identity(identity),
            (None, None) => Self(uuid::Uuid::new_v4().simple().to_string()),
        }
    }

    /// The key of bytes whose digest is beyond doubt.
    #[must_use]
    pub fn of_digest(digest: Digest) -> Self {
        Self(digest.to_string())
    }

    /// The key of bytes that an origin gives this name to, and no digest.
    #[must_use]
    pub fn of_identity(identity: &str) -> Self {
        Self(Digest::of(identity.as_bytes()).to_string())
    }

    /// Whether every process gives the same bytes the same key.
    #[must_use]
    pub fn is_the_same_everywhere(&self) -> bool {
        self.0.len() == DIGEST_DIGITS
    }
}

/// Whether a key ever names the bytes of this part again.
pub(in crate::store) fn can_resume(part: &Path) -> bool {
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
        remove_journal(path)?;
        remove_if_there(path)?;
        Ok(true)
    }

    /// Whether a part is a blob by now, or was one that went bad: nobody may write to it.
    pub(in crate::store) fn is_sealed(&self, part: &Metadata) -> Result<bool, StoreError> {
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
        if size <= AS_WRITTEN {
            return file.set_len(size).at("size", path);
        }
        let Err(error) = preallocate(file, size) else {
            return Ok(());
        };
        // What was had of the space would else stay taken until the part is stale.
        let _ = file.set_len(0);
        match error {
            error if is_full(&error) => {
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
        let direct = (size > AS_WRITTEN).then(|| Direct::open(file));
        Ok(Arc::new(Part {
            direct: direct.flatten(),
            path: std::mem::take(&mut self.path),
            size,
            file: self.file.take().expect("it is taken only here"),
            journal: Mutex::new(journal),
            resumed,
            state: Mutex::new(state),
            grown: Condvar::new(),
            got_on: Notify::new(),
            arrived: AtomicU64::new(0),
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
pub(in crate::store) fn preallocate(file: &File, size: u64) -> io::Result<()> {
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
