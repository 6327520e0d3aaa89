//! Space: what is used, what can be freed, and setting some aside.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use super::collect::{Garbage, Partial};
use super::snapshot::Snapshot;
use super::{At, Store, StoreError, blob, claim, entries};
use crate::fault;
use crate::model::SnapshotId;

/// What a store and its file system hold, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that this user may have on the file system.
    pub capacity: u64,
    /// Bytes that are free for this user.
    pub free: u64,
    /// Bytes of all blobs.
    pub store: u64,
    /// Bytes of blobs that a pinned snapshot needs.
    pub pinned: u64,
    /// Bytes of partial downloads.
    pub partial: u64,
    /// Eviction starts when more than this is used of the file system.
    pub high: u64,
    /// Eviction stops when no more than this is used of the file system.
    pub low: u64,
    /// How many snapshots are published.
    pub snapshots: u64,
    /// The most bytes that the store may hold.
    pub max: Option<u64>,
}

/// What has to go so that some bytes fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoomPlan {
    /// Snapshots to evict, least recently used first.
    pub evict: Vec<SnapshotId>,
    /// Bytes that frees, and the removal of garbage.
    pub freed: u64,
    /// Bytes that are missing even then; 0 if they fit.
    pub short: u64,
}

/// Disk space that is set aside for files that are not staged yet. Dropping it gives the rest back.
#[derive(Debug)]
pub struct Room {
    path: PathBuf,
    file: Option<claim::Held>,
    left: Mutex<Left>,
    /// What was evicted for it.
    pub evicted: Vec<SnapshotId>,
    /// Bytes that were freed for it.
    pub freed: u64,
}

/// Bytes that are set aside still, and the length of the file that holds them.
#[derive(Debug)]
struct Left {
    bytes: u64,
    held: u64,
}

/// The file is cut when it holds so much more than is left: to cut it for each of thousands of small files would
/// cost more than to write them.
const CUT_BYTES: u64 = 1 << 20;

pub(super) struct Space {
    pub(super) capacity: u64,
    pub(super) free: u64,
    /// How many files, folders included, it can have; 0 if that has no bound.
    pub(super) inodes: u64,
    pub(super) inodes_free: u64,
}

/// A blob on disk.
pub(super) struct Stored {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    pub(super) links: u64,
    /// When it last got or lost a name.
    pub(super) changed: SystemTime,
}

impl Store {
    pub(super) fn file_system(&self) -> Result<Space, StoreError> {
        let stat =
            nix::sys::statvfs::statvfs(&self.root).at("look at the file system of", &self.root)?;
        let unit = stat.fragment_size();
        let used = (stat.blocks() - stat.blocks_free()) * unit;
        let free = stat.blocks_available() * unit;
        Ok(Space {
            capacity: used + free,
            free,
            inodes: stat.files(),
            inodes_free: stat.files_available(),
        })
    }

    /// What the store holds.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let space = self.file_system()?;
        let snapshots = self.snapshots()?;
        let mut blobs = self.blobs()?;
        let store = blobs.values().map(|blob| blob.bytes).sum();
        let mut pinned = 0;
        for snapshot in snapshots
            .iter()
            .filter(|snapshot| !snapshot.pinned_by.is_empty())
        {
            for inode in inodes(snapshot) {
                // Taken out, so that a blob of two pinned snapshots counts once.
                pinned += blobs.remove(&inode).map_or(0, |blob| blob.bytes);
            }
        }
        Ok(Usage {
            high: percent(space.capacity, self.limits.high_percent),
            low: percent(space.capacity, self.limits.low_percent),
            capacity: space.capacity,
            free: space.free,
            store,
            pinned,
            partial: self.partial_bytes()?,
            snapshots: snapshots.len() as u64,
            max: self.limits.max_bytes,
        })
    }

    /// All blobs, by inode.
    pub(super) fn blobs(&self) -> Result<HashMap<u64, Stored>, StoreError> {
        let mut blobs = HashMap::new();
        for folder in entries(&self.root.join("blobs/sha256"))? {
            for entry in entries(&folder.path())? {
                let path = entry.path();
                if let Some(metadata) = look(&path)? {
                    let stored = Stored {
                        path,
                        bytes: metadata.len(),
                        links: metadata.nlink(),
                        changed: changed_at(&metadata),
                    };
                    blobs.insert(metadata.ino(), stored);
                }
            }
        }
        Ok(blobs)
    }

    fn partial_bytes(&self) -> Result<u64, StoreError> {
        let mut bytes = 0;
        for entry in entries(&self.staging())? {
            let path = entry.path();
            let Some(metadata) = look(&path)? else {
                continue;
            };
            bytes += match path.extension().and_then(|ending| ending.to_str()) {
                Some("part") => metadata.blocks() * 512,
                // Not every file system gives it blocks.
                Some("room") => metadata.len(),
                _ => 0,
            };
        }
        Ok(bytes)
    }

    /// What would have to go so that `needed` more bytes fit below the watermarks.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn plan_room(&self, needed: u64) -> Result<RoomPlan, StoreError> {
        // To see whether a snapshot is held is to lock it for a moment. Another plan, or a removal, must
        // not take that for a lease.
        let _reserve = self.lock_reserve()?;
        let _shared = self.lock_shared()?;
        self.plan(needed)
    }

    /// The caller holds the lock for reservations and the store's.
    fn plan(&self, needed: u64) -> Result<RoomPlan, StoreError> {
        self.plan_within(&self.file_system()?, needed)
    }

    pub(super) fn plan_within(&self, space: &Space, needed: u64) -> Result<RoomPlan, StoreError> {
        let used = space.capacity - space.free;
        let mut blobs = self.blobs()?;
        let held: u64 =
            blobs.values().map(|blob| blob.bytes).sum::<u64>() + self.partial_bytes()?;
        let room_below = |percent_of_capacity: u8| {
            let below_mark = percent(space.capacity, percent_of_capacity).saturating_sub(used);
            let below_cap = self
                .limits
                .max_bytes
                .map_or(u64::MAX, |max| max.saturating_sub(held));
            below_mark.min(below_cap).min(space.free)
        };
        let must_free = needed.saturating_sub(room_below(self.limits.high_percent));
        let want_inodes = self.inodes_to_free(space);
        if must_free == 0 && want_inodes == 0 {
            return Ok(RoomPlan::default());
        }
        let want_free = match must_free {
            0 => 0,
            _ => needed.saturating_sub(room_below(self.limits.low_percent)),
        };
        let garbage = || blobs.values().filter(|blob| blob.links == 1);
        let mut inodes = garbage().count() as u64;
        let mut plan = RoomPlan {
            freed: garbage().map(|blob| blob.bytes).sum(),
            ..RoomPlan::default()
        };
        let mut evictable = self.evictable()?.into_iter();
        while plan.freed < want_free
            && let Some(snapshot) = evictable.next()
        {
            inodes += plan.add(&snapshot, &mut blobs);
        }
        // Snapshots of other patterns of one model hold no bytes of their own, but folders.
        let mut more = plan.clone();
        while inodes < want_inodes
            && let Some(snapshot) = evictable.next()
        {
            inodes += more.add(&snapshot, &mut blobs);
        }
        // If others hold so many, all of these together would be no use.
        if inodes >= want_inodes {
            plan = more;
        }
        plan.short = must_free.saturating_sub(plan.freed);
        Ok(plan)
    }

    /// How many inodes have to go so that no more than the low mark of them are used; 0 while that is no
    /// more than the high one.
    fn inodes_to_free(&self, space: &Space) -> u64 {
        let used = space.inodes.saturating_sub(space.inodes_free);
        if used <= percent(space.inodes, self.limits.high_percent) {
            return 0;
        }
        used - percent(space.inodes, self.limits.low_percent)
    }

    /// The snapshots that nothing holds, least recently used first.
    fn evictable(&self) -> Result<Vec<Snapshot>, StoreError> {
        let mut snapshots = self.snapshots()?;
        snapshots.retain(|snapshot| snapshot.pinned_by.is_empty());
        let mut free = Vec::new();
        for snapshot in snapshots {
            if lock_dir(&self.snapshot_dir(&snapshot.manifest.snapshot))?.is_some() {
                free.push(snapshot);
            }
        }
        free.sort_by_key(|snapshot| snapshot.last_used);
        Ok(free)
    }

    /// Sets disk space aside, and evicts what has to go for that. If it cannot be had, nothing is
    /// evicted. How many bytes are `needed` is asked once stale partial downloads are gone.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`], else [`StoreError::Io`].
    pub fn reserve(&self, needed: impl FnOnce() -> u64) -> Result<Room, StoreError> {
        // Until the room has its blocks: else the next to ask would count on the same bytes.
        let _reserve = self.lock_reserve()?;
        let alone = self.lock_alone()?;
        let mut garbage = Garbage::default();
        self.sweep_staging(Partial::Stale, &mut garbage)?;
        garbage.delete()?;
        let needed = needed();
        let mut plan = self.plan(needed)?;
        if plan.short > 0 && self.sweep_withdrawn(Partial::All, &mut garbage)? > 0 {
            garbage.delete()?;
            plan = self.plan(needed)?;
        }
        if plan.short > 0 {
            let available = needed - plan.short;
            return Err(StoreError::NoSpace {
                root: self.root.clone(),
                needed,
                available,
            });
        }
        for id in &plan.evict {
            self.evict(id, &mut garbage)?;
        }
        if plan.freed > 0 || !plan.evict.is_empty() {
            self.move_garbage(Partial::All, &mut garbage)?;
        }
        drop(alone);
        garbage.delete()?;
        let mut room = self.room(needed)?;
        room.evicted = plan.evict;
        room.freed = plan.freed;
        Ok(room)
    }

    fn room(&self, needed: u64) -> Result<Room, StoreError> {
        let path = self.staging_name("room");
        // Shared, so that the collector does not take the file between its making and its lock.
        let shared = self.lock_shared()?;
        let file = File::create_new(&path).at("create", &path)?;
        let lock = claim::try_exclusive(file).at("lock", &path)?;
        drop(shared);
        let room = Room {
            path,
            file: lock,
            left: Mutex::new(Left {
                bytes: needed,
                held: needed,
            }),
            evicted: Vec::new(),
            freed: 0,
        };
        if let Some(file) = &room.file {
            blob::preallocate(file, needed).map_err(|error| {
                if super::is_full(&error) {
                    let available = self.file_system().map_or(0, |space| space.free);
                    return StoreError::NoSpace {
                        root: self.root.clone(),
                        needed,
                        available,
                    };
                }
                StoreError::Io {
                    op: "allocate",
                    path: room.path.clone(),
                    source: error,
                }
            })?;
        }
        fault::point("room.reserved");
        Ok(room)
    }

    /// Removes a snapshot that nothing holds, and the blobs that only it needed. Returns bytes freed.
    ///
    /// # Errors
    ///
    /// [`StoreError::Missing`], [`StoreError::Held`] or [`StoreError::Io`].
    pub fn remove(&self, id: &SnapshotId) -> Result<u64, StoreError> {
        let alone = self.lock_alone()?;
        let dir = self.snapshot_dir(id);
        if !dir.exists() {
            return Err(StoreError::Missing(id.to_string()));
        }
        let holders: Vec<String> = self.holders(id)?.iter().map(ToString::to_string).collect();
        if !holders.is_empty() || lock_dir(&dir)?.is_none() {
            return Err(StoreError::Held {
                snapshot: id.to_string(),
                holders,
            });
        }
        let mut garbage = Garbage::default();
        self.evict(id, &mut garbage)?;
        self.drop_stale_refs()?;
        drop(alone);
        garbage.delete()?;
        Ok(garbage.bytes)
    }
}

impl RoomPlan {
    /// Has a snapshot evicted too; returns how many inodes that frees, at the least.
    fn add(&mut self, snapshot: &Snapshot, blobs: &mut HashMap<u64, Stored>) -> u64 {
        // Its directory, its tree and its manifest.
        let mut freed = 3;
        for inode in inodes(snapshot) {
            let Some(blob) = blobs.get_mut(&inode) else {
                continue;
            };
            // A manifest may name a file of the tree that is no link of its own.
            blob.links = blob.links.saturating_sub(1);
            if blob.links == 1 {
                self.freed += blob.bytes;
                freed += 1;
            }
        }
        self.evict.push(snapshot.manifest.snapshot.clone());
        freed
    }
}

impl Room {
    /// Gives `bytes` of the space back, for a file that is staged next.
    pub fn take(&self, bytes: u64) {
        let mut left = self.left.lock().expect("no holder of this lock panics");
        left.bytes = left.bytes.saturating_sub(bytes);
        if left.bytes > 0 && left.held - left.bytes < CUT_BYTES {
            return;
        }
        if let Some(file) = &self.file {
            // If it cannot shrink, the file that is staged next says that the disk is full.
            let _ = file.set_len(left.bytes);
        }
        left.held = left.bytes;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn percent(whole: u64, percent: u8) -> u64 {
    whole / 100 * u64::from(percent)
}

fn inodes(snapshot: &Snapshot) -> impl Iterator<Item = u64> {
    let files = snapshot.manifest.files.iter();
    files.filter_map(|file| {
        fs::symlink_metadata(snapshot.path.join(&file.path))
            .ok()
            .map(|m| m.ino())
    })
}

/// When a file, its names included, was last changed.
fn changed_at(file: &fs::Metadata) -> SystemTime {
    // Before 1970 is as good as 1970: both are long ago.
    let seconds = Duration::from_secs(u64::try_from(file.ctime()).unwrap_or(0));
    let nanoseconds = Duration::from_nanos(u64::try_from(file.ctime_nsec()).unwrap_or(0));
    SystemTime::UNIX_EPOCH + seconds + nanoseconds
}

/// Locks a directory alone; `None` if a lease holds it, or it is gone.
pub(super) fn lock_dir(path: &Path) -> Result<Option<claim::Held>, StoreError> {
    match File::open(path) {
        Ok(file) => claim::try_exclusive(file).at("lock", path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("open", path),
    }
}

pub(super) fn look(path: &Path) -> Result<Option<fs::Metadata>, StoreError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("look at", path),
    }
}

/// Deletes a directory that was moved away. Whoever moved it and a collection may both be at it: what one
/// finds gone, the other has deleted.
pub(super) fn delete_gone(path: &Path) -> Result<(), StoreError> {
    loop {
        match fs::remove_dir_all(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if look(path)?.is_none() {
                    return Ok(());
                }
            }
            Err(error) => return Err(error).at("delete", path),
        }
    }
}

pub(super) fn remove_if_there(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).at("remove", path),
        _ => Ok(()),
    }
}
