//! The shared tier: one directory on a file system that all nodes mount, filled once, by all of them together.
//!
//! ```text
//! <root>/
//!   FORMAT                     "weightd shared store 1", its id, the bytes of a segment
//!   blobs/<key>/               one directory for each blob, named by its digest, or by its origin's name for it
//!     part | blob              bytes in the making, or all of them: one rename apart
//!     <segment>.<turn>.claim   who brings a segment; its content changes as the work goes on
//!     <segment>.sums           the segment is on disk: checksums of its blocks
//!   blobs/<key>.aside.<uuid>/  set aside, because it is damaged or not needed any more
//!   snapshots/<id>.json        what blobs a model needs; touched when a node uses it
//!   refs/<scheme>/<name>/<revision asked>
//!   leases/<uuid>              the blobs that a fetch on some node uses now
//! ```
//!
//! Rules:
//!
//! 1. No locks, no hard links across directories, no clock: what excludes others is that a name can be made once
//!    (`O_EXCL`), and whoever is silent is found out by content that does not change while *the observer's* own
//!    clock runs. What happens in a blob's directory happens through its open descriptor: if the directory is set
//!    aside or the file system goes, nothing lands elsewhere.
//! 2. A claim has turns. Who waits for a silent owner does not touch the old claim, but makes the next turn's: of
//!    several who try one succeeds, and a fresh claim can never be taken for a silent one. An owner that comes
//!    back may finish beside its successor: both write the same bytes.
//! 3. A segment's bytes are on disk before its checksums get their name. Who copies checks each block; who has
//!    all bytes of a blob hashes them against what its origin claims. Nobody trusts a neighbour's bytes, so what
//!    no origin claims anything about is not shared at all ([`is_shareable`]).
//! 4. Damaged bytes are set aside by one rename of the directory, and brought again under the same name.
//! 5. Who collects looks at the leases after it has taken a blob's name away, and gives it back if there is one:
//!    a node leases first and looks second.
//! 6. Any call may fail or hang, for the file system is far away: [`SharedTier`] is the only door, and bounds it.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::fault;
use crate::source::RemoteFile;
use crate::store::StageKey;

pub mod choice;
mod collect;
mod fill;
mod import;
mod lease;
pub mod lustre;
mod rates;
mod snapshot;
#[cfg(test)]
mod tests;
mod tier;

pub use collect::{CollectPolicy, CollectedSnapshot, SharedCollected, Why};
pub use fill::{BadBlock, Fill, Part, SegmentView, SharedClaim, Silence, Sums, View};
pub use import::{DamagedFile, ImportError, Imported, ImportedModel, Left};
pub use lease::SharedLease;
pub use rates::{Rate, Rates, WEIGHT as RATE_WEIGHT, WINDOW as RATE_WINDOW};
pub use snapshot::{SharedFile, SharedSnapshot};
pub use tier::{Egress, SharedConfig, SharedTier, TierState, Trouble};
pub(crate) use tier::{KeptLease, Owed};

/// The version of the layout that this code reads and writes.
pub const FORMAT: u32 = 1;

/// The most that is read of `FORMAT`.
const FORMAT_BYTES: u64 = 64 << 10;

/// Bytes of a segment unless the store was made with others: 256 MiB.
pub const SEGMENT_BYTES: u64 = 256 << 20;

/// Bytes of a block, which has one checksum and is moved at a time: large, sequential and aligned reads are
/// what Lustre is good at.
pub const BLOCK_BYTES: u64 = 4 << 20;

/// What a new store is made with, and what an existing one must be.
#[derive(Debug, Clone, Default)]
pub struct SharedOptions {
    /// Bytes of a segment, a multiple of 1 MiB; that of an existing store stays. `None`: [`SEGMENT_BYTES`].
    pub segment_bytes: Option<u64>,
    /// The type of file system that it must lie on, such as `lustre`: else a mount that is missing would make a
    /// store on the node's own disk.
    pub file_system: Option<String>,
}

/// The directory of the shared tier. All its calls block, for as long as the file system likes.
#[derive(Debug, Clone)]
pub struct SharedStore {
    root: PathBuf,
    id: String,
    segment_bytes: u64,
}

/// Why the shared tier cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The directory holds something else.
    #[error("{} is not a shared store of weightd, and not empty", path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
    },
    /// A newer version wrote it.
    #[error("the shared store at {} has format {found}, this version reads format {FORMAT}", path.display())]
    NewerFormat {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// One of its own folders is a symlink: who may write in the tier would have every node write elsewhere.
    #[error("{} is a symlink, or no directory", path.display())]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The directory lies on another file system than it should.
    #[error("{} lies on {found}, not on {expected}", path.display())]
    WrongFileSystem {
        /// The directory.
        path: PathBuf,
        /// What it lies on.
        found: String,
        /// What it should lie on.
        expected: String,
    },
    /// The operating system said no.
    #[error("cannot {op} `{}` in the shared tier", path.display())]
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

impl SharedError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotAStore { .. } => Some("choose an empty or a new directory as the shared root"),
            Self::NewerFormat { .. } => {
                Some("upgrade weightd on this node, or give the older one a shared root of its own")
            }
            Self::NoFolder { .. } => Some(
                "find out who made it, remove it, and let only weightd write in the shared root",
            ),
            Self::WrongFileSystem { .. } => {
                Some("is the file system mounted? look at the volume, or change shared.filesystem")
            }
            Self::Io { .. } => None,
        }
    }

    /// Whether it can be read, and only writing is no use now.
    #[must_use]
    pub fn is_only_writing(&self) -> bool {
        use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        let Self::Io { source, .. } = self else {
            return false;
        };
        let kinds = [
            StorageFull,
            QuotaExceeded,
            ReadOnlyFilesystem,
            PermissionDenied,
        ];
        kinds.contains(&source.kind())
    }
}

/// Adds what was tried, on what, to an error of the operating system.
trait At<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, SharedError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, SharedError> {
        self.map_err(|error| SharedError::Io {
            op,
            path: path.to_owned(),
            source: error.into(),
        })
    }
}

/// Whether nodes may share a file's bytes: its origin says something about them that each can check, and gives
/// them a name that is the same for all.
#[must_use]
pub fn is_shareable(file: &RemoteFile) -> bool {
    let claims = &file.claims;
    let claimed = claims.sha256.is_some()
        || claims.git_oid.is_some()
        || claims.crc64nvme.is_some()
        || claims.crc32c.is_some();
    claimed && file.size > 0 && StageKey::of(file).is_the_same_everywhere()
}

impl SharedStore {
    /// Opens the shared store at `root`, and makes one if the directory is empty or new. Its parent must exist.
    ///
    /// # Errors
    ///
    /// [`SharedError`].
    pub fn open(root: &Path, options: &SharedOptions) -> Result<Self, SharedError> {
        let root = std::path::absolute(root).at("resolve", root)?;
        check_file_system(&root, options)?;
        make_dir(&root)?;
        let (id, segment_bytes) = match read_format(&root)? {
            Some(found) => found,
            None => {
                write_format(&root, options.segment_bytes.unwrap_or(SEGMENT_BYTES))?;
                let made = read_format(&root)?;
                made.ok_or_else(|| SharedError::NotAStore { path: root.clone() })?
            }
        };
        for folder in ["blobs", "snapshots", "refs", "leases"] {
            let path = root.join(folder);
            make_dir(&path)?;
            if !fs::symlink_metadata(&path).at("look at", &path)?.is_dir() {
                return Err(SharedError::NoFolder { path });
            }
        }
        Ok(Self {
            root,
            id,
            segment_bytes,
        })
    }

    /// Opens the shared store at `root` if there is one.
    ///
    /// # Errors
    ///
    /// [`SharedError`]; [`SharedError::NotAStore`] if there is none.
    pub fn open_existing(root: &Path) -> Result<Self, SharedError> {
        let root = std::path::absolute(root).at("resolve", root)?;
        match read_format(&root)? {
            Some(_) => Self::open(&root, &SharedOptions::default()),
            None => Err(SharedError::NotAStore { path: root }),
        }
    }

    /// The directory that holds everything.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What tells it from any other store.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Bytes that a node claims at a time.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Capacity of the file system in bytes, and how many are free.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn capacity(&self) -> Result<(u64, u64), SharedError> {
        let found = nix::sys::statvfs::statvfs(&self.root).at("look at", &self.root)?;
        let fragment = found.fragment_size();
        // As for a user: what is kept for root alone does not count.
        let used = (found.blocks() - found.blocks_free()) * fragment;
        let free = found.blocks_available() * fragment;
        Ok((used + free, free))
    }

    /// Writes, reads back and removes a small file: what shows that the tier can be used.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn probe(&self) -> Result<(), SharedError> {
        let path = self
            .root
            .join(format!("leases/probe.{}", uuid::Uuid::new_v4()));
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .at("make", &path)?;
        let written = file.write_all(b"probe").and_then(|()| file.sync_data());
        let read = written.and_then(|()| fs::read(&path));
        let removed = fs::remove_file(&path);
        read.at("write", &path)?;
        removed.at("remove", &path)
    }

    fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }
}

fn check_file_system(root: &Path, options: &SharedOptions) -> Result<(), SharedError> {
    let Some(expected) = &options.file_system else {
        return Ok(());
    };
    // A root that is new lies where its parent does.
    let at = match root.parent() {
        Some(parent) if !root.exists() => parent,
        _ => root,
    };
    let found = lustre::FileSystem::of(at).at("look at", at)?.to_string();
    if found == *expected {
        return Ok(());
    }
    Err(SharedError::WrongFileSystem {
        path: root.to_owned(),
        found,
        expected: expected.clone(),
    })
}

fn make_dir(path: &Path) -> Result<(), SharedError> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // A read-only file system says so even of what is there.
        Err(_) if path.is_dir() => Ok(()),
        made => made.at("make", path),
    }
}

/// The store's id and the bytes of its segments; `None` if there is no store yet.
fn read_format(root: &Path) -> Result<Option<(String, u64)>, SharedError> {
    let path = root.join("FORMAT");
    let mut text = String::new();
    let read = File::open(&path).and_then(|file| file.take(FORMAT_BYTES).read_to_string(&mut text));
    match read {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("read", &path),
    }
    let not_a_store = || SharedError::NotAStore {
        path: root.to_owned(),
    };
    let mut lines = text.lines();
    let version = lines
        .next()
        .and_then(|line| line.strip_prefix("weightd shared store "))
        .and_then(|version| version.parse::<u32>().ok())
        .ok_or_else(not_a_store)?;
    if version > FORMAT {
        return Err(SharedError::NewerFormat {
            path: root.to_owned(),
            found: version,
        });
    }
    // Lines that a later version of this format adds are none of ours.
    let value = |name: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(" = ")?.to_owned()))
    };
    let segment = value("segment").and_then(|bytes| bytes.parse::<u64>().ok());
    let segment = segment.filter(|bytes| is_segment(*bytes));
    let (id, segment) = value("id").zip(segment).ok_or_else(not_a_store)?;
    Ok(Some((id, segment)))
}

/// Whether a segment may have so many bytes: a multiple of 1 MiB, up to 64 GiB.
#[must_use]
pub fn is_segment(bytes: u64) -> bool {
    bytes > 0 && bytes.is_multiple_of(1 << 20) && bytes <= 64 << 30
}

fn write_format(root: &Path, segment_bytes: u64) -> Result<(), SharedError> {
    for entry in fs::read_dir(root).at("list", root)? {
        let name = entry.at("list", root)?.file_name();
        let name = name.to_string_lossy();
        // What a fresh file system holds, and what others who make the store now have made.
        let ours = ["FORMAT", "blobs", "snapshots", "refs", "leases"];
        let ours = ours.contains(&&*name) || name.starts_with("FORMAT.");
        if name != "lost+found" && !ours {
            return Err(SharedError::NotAStore {
                path: root.to_owned(),
            });
        }
    }
    let id = uuid::Uuid::new_v4();
    let text = format!("weightd shared store {FORMAT}\nid = {id}\nsegment = {segment_bytes}\n");
    let path = root.join("FORMAT");
    let temporary = root.join(format!("FORMAT.{id}"));
    let write = || {
        let mut file = new_file(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        // Not a rename: of several nodes that make the store at once one must win.
        match fs::hard_link(&temporary, &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        }
    };
    let written = write();
    let _ = fs::remove_file(&temporary);
    written.at("write", &path)?;
    fault::point("shared.format");
    Ok(())
}

fn new_file(path: &Path) -> io::Result<File> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)
}

/// Writes a small file so that it is there whole, or not at all; another one in its place goes.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", uuid::Uuid::new_v4()));
    let temporary = path.with_file_name(name);
    let written = new_file(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(&temporary, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}
