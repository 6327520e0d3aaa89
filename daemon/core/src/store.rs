//! One tier on disk. The directory tree is the index: there is no database.
//!
//! ```text
//! <root>/
//!   FORMAT                            "weightd store 1"
//!   lock                              shared by who links and pins, alone by who removes
//!   reserve.lock                      held by who counts on free space, until it is set aside
//!   blobs/sha256/<aa>/<64 hex>        immutable, 0444
//!   staging/<64 hex>.part, .journal   bytes in flight, and which of them are on disk
//!   staging/<uuid>.tree/              a snapshot in the making, locked by its maker
//!   staging/<uuid>.room               space set aside for files that are not staged yet
//!   snapshots/<snapshot id>/manifest.json, tree/…
//!   refs/<scheme>/<name>/<revision asked>
//!   pins/<kind>/<holder>/<snapshot id>
//!   volumes/csi/<name>/               a mounted tree that is no snapshot's own
//!   known/<aa>/<64 hex>               an origin's name for some bytes → their digest: a symlink to its text
//!   fetches/<64 hex>.json             fetches under way, to be resumed
//!   rates/<scheme>                    bytes per second that a kind of source served
//!   damaged/…                         blobs whose bytes went bad, set aside
//! ```
//!
//! Rules:
//!
//! 1. A blob appears by one link, a snapshot by one `rename`, after its bytes were synced; the
//!    directory is synced after. Nothing under `blobs/` was ever seen with other bytes than its name says.
//! 2. Lease first, look second. A lease is a snapshot in the making: a directory of hard links,
//!    locked by its maker. A blob is linked there *before* it gets its name, so at no moment does it
//!    look unused; who removes holds `lock` alone, who links holds it shared.
//! 3. A blob with link count 1 is needed by no snapshot and no lease. It goes with the snapshot that
//!    needed it last; if it was of a fetch that was not finished, it is garbage like its parts: once
//!    nobody went on with it for long, or under pressure. A snapshot that is pinned or leased is never
//!    evicted.
//! 4. Several processes may use one store. Work on a blob is claimed by locking its `.part`; the lock
//!    dies with its process, and the next one goes on from the journal. Bytes that are sealed from memory
//!    are claimed by nobody: whoever comes second finds the name taken, and takes that blob.
//! 5. Volumes mount from the local tier only.
//! 6. A damaged blob is set aside, and the snapshots that hold it are withdrawn until it is fetched
//!    again: their directories stay where they are, for they may be mounted.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::FlockArg;

use crate::digest::Digest;
use crate::fault;
use crate::model::RelPath;

mod blob;
mod claim;
mod collect;
mod evict;
mod pin;
mod record;
mod snapshot;
#[cfg(test)]
mod tests;
mod verify;
mod volume;

pub use blob::{Checked, Claim, Claimed, HashError, Part, StageKey, Unsealed, Watch};
pub use collect::{Collected, Partial};
pub use evict::{Room, RoomPlan, Usage};
pub use pin::{Holder, HolderError};
pub use record::FetchRecord;
pub(crate) use record::file_name;
pub use snapshot::{Lease, Snapshot, SnapshotLease};
pub(crate) use verify::is_damage;
pub use verify::{Damaged, Verified};
pub use volume::{Layout, Volume, VolumeRecord};

/// Which tier a store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// The node's own disk. Volumes are mounted from here.
    Local,
    /// A file system that all nodes share.
    Shared,
}

/// How much of its file system a store may use, and for how long it keeps what may be resumed.
#[derive(Debug, Clone, Copy)]
pub struct StoreLimits {
    /// Eviction starts when the file system would be fuller than this, in percent.
    pub high_percent: u8,
    /// Eviction goes on until the file system is no fuller than this, in percent.
    pub low_percent: u8,
    /// The most bytes that the store itself may hold.
    pub max_bytes: Option<u64>,
    /// A partial download that nobody works on is garbage after this time; so are the blobs and the record of an
    /// unfinished fetch, and a snapshot that was withdrawn.
    pub keep_partial: Duration,
}

impl Default for StoreLimits {
    /// What suits a developer's machine. A node's daemon leaves room for kubelet.
    fn default() -> Self {
        Self {
            high_percent: 97,
            low_percent: 95,
            max_bytes: None,
            keep_partial: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

/// One tier: the blobs and snapshots below one directory. All its calls block.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    limits: StoreLimits,
}

/// The version of the layout that this code reads and writes.
const FORMAT: u32 = 1;

impl Store {
    /// Opens the store at `root`, and makes one if there is none.
    ///
    /// # Errors
    ///
    /// [`StoreError::NotAStore`], [`StoreError::NewerFormat`], [`StoreError::ReadOnly`],
    /// [`StoreError::NoHardLinks`] or [`StoreError::Io`].
    pub fn open(root: &Path, limits: StoreLimits) -> Result<Arc<Self>, StoreError> {
        let root = std::path::absolute(root).at("resolve", root)?;
        make_dirs(&root).map_err(|error| read_only("create", &root, error))?;
        let store = Self { root, limits };
        store.check_format()?;
        let folders = [
            "blobs/sha256",
            "staging",
            "snapshots",
            "refs",
            "pins",
            "known",
            "fetches",
            "damaged",
            "volumes",
        ];
        for folder in folders {
            let path = store.root.join(folder);
            make_dirs(&path).map_err(|error| read_only("create", &path, error))?;
        }
        let lock = store.root.join("lock");
        open_lock(&lock).map_err(|error| read_only("open", &lock, error))?;
        store.check_hard_links()?;
        store.finish_set_aside()?;
        Ok(Arc::new(store))
    }

    /// The directory that holds everything.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The limits that it was opened with.
    #[must_use]
    pub fn limits(&self) -> &StoreLimits {
        &self.limits
    }

    /// Whether a blob is here.
    #[must_use]
    pub fn has(&self, digest: Digest) -> bool {
        self.blob_path(digest).exists()
    }

    fn check_format(&self) -> Result<(), StoreError> {
        if Self::recognise(&self.root)? {
            return Ok(());
        }
        let path = self.root.join("FORMAT");
        let write = || write_atomically(&path, format!("weightd store {FORMAT}\n").as_bytes());
        write().map_err(|error| read_only("write", &path, error))?;
        fault::point("store.open.format");
        Ok(())
    }

    /// Whether `root` holds a store that this version can open. It does not if it is empty or not there:
    /// then one can be made. Changes nothing.
    ///
    /// # Errors
    ///
    /// [`StoreError::NotAStore`], [`StoreError::NewerFormat`] or [`StoreError::Io`].
    pub fn recognise(root: &Path) -> Result<bool, StoreError> {
        let path = root.join("FORMAT");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return check_empty(root, &path);
            }
            Err(error) => return Err(error).at("read", &path),
        };
        let version = text
            .trim()
            .strip_prefix("weightd store ")
            .and_then(|v| v.parse::<u32>().ok());
        match version {
            Some(FORMAT) => Ok(true),
            Some(found) if found > FORMAT => Err(StoreError::NewerFormat {
                path: root.to_owned(),
                found,
            }),
            _ => Err(StoreError::NotAStore {
                path: root.to_owned(),
            }),
        }
    }

    fn check_hard_links(&self) -> Result<(), StoreError> {
        // Shared, so that the collector does not take the probe for a dead process's.
        let _shared = self.lock_shared()?;
        let probe = self
            .root
            .join(format!("staging/{}.probe", uuid::Uuid::new_v4()));
        let link = self
            .root
            .join(format!("blobs/{}.probe", uuid::Uuid::new_v4()));
        File::create(&probe).map_err(|error| read_only("write to", &self.root, error))?;
        let linked = fs::hard_link(&probe, &link);
        let _ = fs::remove_file(&link);
        fs::remove_file(&probe).at("remove", &probe)?;
        linked.map_err(|source| StoreError::NoHardLinks {
            path: self.root.clone(),
            source,
        })
    }

    /// Shares the store's lock: nothing is removed while it is held.
    fn lock_shared(&self) -> Result<claim::Held, StoreError> {
        self.lock(FlockArg::LockShared)
    }

    /// Holds the store's lock alone: nobody links or pins while it is held.
    fn lock_alone(&self) -> Result<claim::Held, StoreError> {
        self.lock(FlockArg::LockExclusive)
    }

    /// Keeps others from counting on the same free space. It is taken before the store's lock.
    fn lock_reserve(&self) -> Result<claim::Held, StoreError> {
        self.lock_file("reserve.lock", FlockArg::LockExclusive)
    }

    fn lock(&self, how: FlockArg) -> Result<claim::Held, StoreError> {
        self.lock_file("lock", how)
    }

    fn lock_file(&self, name: &str, how: FlockArg) -> Result<claim::Held, StoreError> {
        let path = self.root.join(name);
        open_lock(&path)
            .and_then(|file| claim::wait(file, how))
            .at("lock", &path)
    }

    fn blob_path(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join("blobs/sha256").join(&name[..2]).join(&name)
    }

    fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    /// A new name in `staging/` that nobody else has.
    fn staging_name(&self, ending: &str) -> PathBuf {
        self.root
            .join(format!("staging/{}.{ending}", uuid::Uuid::new_v4()))
    }
}

/// Whether a store was made in `root`, which had no `FORMAT`, meanwhile; refuses a directory that holds
/// something else.
fn check_empty(root: &Path, format: &Path) -> Result<bool, StoreError> {
    for entry in entries(root)? {
        let name = entry.file_name();
        // What a fresh file system holds, or an earlier start that was killed right here.
        let ours = name.to_string_lossy().starts_with("FORMAT.");
        if name != "lost+found" && !ours {
            // Somebody else may have made the store just now.
            let made = format.exists();
            return if made {
                Ok(true)
            } else {
                Err(StoreError::NotAStore {
                    path: root.to_owned(),
                })
            };
        }
    }
    Ok(false)
}

fn open_lock(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

fn make_dirs(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Gives a file a second name, in a folder that is made if it is not there.
fn link_in_folder(from: &Path, to: &Path) -> io::Result<()> {
    in_folder(to, || fs::hard_link(from, to))
}

/// Makes a symlink to `target`, in a folder that is made if it is not there.
fn symlink_in_folder(target: &str, path: &Path) -> io::Result<()> {
    in_folder(path, || std::os::unix::fs::symlink(target, path))
}

/// Makes the entry `path`, and the folder for it if that is not there.
fn in_folder<T>(path: &Path, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match make() {
        // Not before each: thousands of entries have few folders.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_dirs(path.parent().unwrap_or(path))?;
            make()
        }
        made => made,
    }
}

/// What a file that was written outlives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Survives {
    /// The end of this process, not a power loss: after one it may be gone, or empty.
    ThisProcess,
    PowerLoss,
}

/// Writes a small file so that it is there whole, or not at all.
fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_whole(path, bytes, Survives::PowerLoss)
}

fn write_whole(path: &Path, bytes: &[u8], survives: Survives) -> io::Result<()> {
    with_temporary(path, |temporary| {
        let mut file = File::create(temporary)?;
        file.write_all(bytes)?;
        match survives {
            Survives::PowerLoss => file.sync_data(),
            Survives::ThisProcess => Ok(()),
        }
    })?;
    match survives {
        Survives::PowerLoss => sync_parent(path),
        Survives::ThisProcess => Ok(()),
    }
}

/// Makes an entry under another name, and then puts it in the place of `path`.
fn with_temporary(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", uuid::Uuid::new_v4()));
    let temporary = path.with_file_name(name);
    let made = make(&temporary).and_then(|()| fs::rename(&temporary, path));
    if made.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    made
}

/// Makes the names in the directory of `path` survive a power loss.
fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// The entries of a directory; none if it is not there.
fn entries(path: &Path) -> Result<Vec<fs::DirEntry>, StoreError> {
    match fs::read_dir(path) {
        Ok(entries) => entries.collect::<Result<_, _>>().at("list", path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).at("list", path),
    }
}

/// Why the store cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk is too full, and not enough can be evicted.
    #[error("no room in {} for {needed} bytes: {available} bytes are free or can be freed", root.display())]
    NoSpace {
        /// The store's directory.
        root: PathBuf,
        /// Bytes asked for.
        needed: u64,
        /// Bytes that could be had.
        available: u64,
    },
    /// Somebody holds it.
    #[error("{snapshot} is held by {}", if holders.is_empty() { "work under way".to_owned() } else { holders.join(", ") })]
    Held {
        /// What is held.
        snapshot: String,
        /// Who holds it; empty for work under way.
        holders: Vec<String>,
    },
    /// There is no such snapshot.
    #[error("{0} is not in the store")]
    Missing(String),
    /// A blob went bad, and was set aside, after a snapshot in the making had linked it.
    #[error("`{0}` was set aside as damaged before the snapshot was published")]
    SetAside(RelPath),
    /// The directory holds something else.
    #[error("{} is not a weightd store, and not empty", path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
    },
    /// A newer version wrote it.
    #[error("the store at {} has format {found}, this version reads format {FORMAT}", path.display())]
    NewerFormat {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It cannot be written to.
    #[error("cannot {op} {}", path.display())]
    ReadOnly {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file system has no hard links.
    #[error("the file system of {} makes no hard links", path.display())]
    NoHardLinks {
        /// The store's directory.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: io::Error,
    },
    /// The operating system said no.
    #[error("cannot {op} `{}`", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoSpace { .. } => {
                "free space on that disk, raise the watermarks, or remove models with \
                                     `weightctl rm` and `weightctl unpin`"
                    .to_owned()
            }
            Self::Held { holders, .. } if holders.is_empty() => {
                "try again when it is done".to_owned()
            }
            Self::Held { .. } => {
                "release it first, for example with `weightctl unpin MODEL --as NAME`".to_owned()
            }
            Self::Missing(_) => {
                "`weightctl ls` lists what is here, `weightctl prefetch MODEL` fetches".to_owned()
            }
            Self::SetAside(_) => "run it again: it fetches that file anew".to_owned(),
            Self::NotAStore { .. } => "choose an empty or a new directory with --root".to_owned(),
            Self::NewerFormat { .. } => {
                "use the version of weightd that wrote it, or another --root".to_owned()
            }
            Self::ReadOnly { .. } => {
                "choose a directory that this user may write with --root, or mount it \
                                      read-write"
                    .to_owned()
            }
            Self::NoHardLinks { .. } => {
                "choose a directory on ext4, XFS or another file system with hard links".to_owned()
            }
            Self::Io { source, .. } if is_full(source) => {
                "free space on that disk, then run it again: it goes on \
                                                           where it stopped"
                    .to_owned()
            }
            Self::Io { .. } if self.is_too_many_links() => {
                "one of its files has as many names as the file system allows (65,000 on ext4): remove \
                 snapshots that hold it, `weightctl ls` lists them, or put the store on XFS"
                    .to_owned()
            }
            Self::Io { .. } => return None,
        })
    }

    /// Whether a file has as many names as the file system allows.
    #[must_use]
    pub fn is_too_many_links(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::TooManyLinks)
    }

    /// Whether the disk is too full for it.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Io { source, .. } | Self::ReadOnly { source, .. } => is_full(source),
            _ => false,
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Adds what was tried, on what, to an error of the operating system.
trait At<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|error| StoreError::Io {
            op,
            path: path.to_owned(),
            source: error.into(),
        })
    }
}

fn read_only(op: &'static str, path: &Path, source: io::Error) -> StoreError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            StoreError::ReadOnly { op, path, source }
        }
        _ => StoreError::Io { op, path, source },
    }
}
