//! Volumes that cannot be a snapshot's own tree: mounted before the snapshot is whole, or laid out in
//! another way. Each is a directory of hard links of its own, and goes with its holder.
//!
//! ```text
//! volumes/csi/<name>/volume.json        what it is to hold; never a secret
//! volumes/csi/<name>/tree/              what is mounted
//! volumes/csi/<name>/tree/.weightd/complete   written last: all files are there, verified
//! volumes/csi/<name>/tree/.weightd/error      why they are not; gone when they are
//! ```
//!
//! A name in the tree stands for verified bytes from the moment it can be seen: files are linked, or
//! written elsewhere and renamed. The directory is locked by who fills or removes it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::FlockArg;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::evict::{delete_gone, remove_if_there};
use super::pin::Holder;
use super::{At, Store, StoreError, claim, entries, make_dirs};
use crate::digest::GitOid;
use crate::errors::Chain;
use crate::fault;
use crate::manifest::{FileEntry, Manifest};
use crate::model::{ModelRef, Patterns, Revision, SnapshotId};

/// How the files of a volume are laid out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// The model's own paths.
    #[default]
    Flat,
    /// The Hub's cache: `models--org--name/snapshots/<commit>/…`, so that a loader finds the model by
    /// its name.
    HfCache,
}

/// What a volume holds, on record for as long as it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The model as it was asked for.
    pub model: ModelRef,
    /// What that resolved to.
    pub revision: Revision,
    /// Which files.
    pub patterns: Patterns,
    /// Their layout.
    pub layout: Layout,
}

impl VolumeRecord {
    /// The snapshot that it shows.
    #[must_use]
    pub fn snapshot(&self) -> SnapshotId {
        SnapshotId::new(&self.model, &self.revision, &self.patterns)
    }
}

/// What a volume's holder holds.
#[derive(Debug, Clone)]
pub struct Volume {
    /// Who: `csi/<name>`.
    pub holder: Holder,
    /// The snapshots that it pins.
    pub snapshots: Vec<SnapshotId>,
    /// What its own directory is to hold, if it has one.
    pub record: Option<VolumeRecord>,
    /// Nothing is missing in it.
    pub complete: bool,
}

/// The folder of the marks in a mounted tree. No origin's path may begin with it.
const MARKS: &str = ".weightd";

impl Store {
    /// Pins a published snapshot for `holder`, and no other, and marks it as used; returns what it holds and
    /// where its tree is. `None` if it is not here, or an uploader's word was taken for some of it: that is
    /// withdrawn, and the next fetch asks the origin for the bytes.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn hold(
        &self,
        asked: &ModelRef,
        revision: &Revision,
        id: &SnapshotId,
        holder: &Holder,
    ) -> Result<Option<(Manifest, PathBuf)>, StoreError> {
        self.withdraw_if_believed(id)?;
        // With the lock held nobody evicts between the look and the pin.
        let _shared = self.lock_shared()?;
        let Some((manifest, _)) = self.proven(id)? else {
            return Ok(None);
        };
        self.pin_only(id, holder)?;
        self.touch(asked, revision, id)?;
        Ok(Some((manifest, self.snapshot_dir(id).join("tree"))))
    }

    /// Makes the directory of a volume, or finds it again as it is, and pins its snapshot, whether that is
    /// here yet or not, and no other. Returns the tree to mount. A directory that was made for something
    /// else is replaced: the caller knows that it is not mounted.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn open_volume(
        &self,
        holder: &Holder,
        record: &VolumeRecord,
    ) -> Result<PathBuf, StoreError> {
        let (dir, id) = (self.volume_dir(holder), record.snapshot());
        // One whose record cannot be read may hold another model, and be marked as complete.
        if self.volume_record(&dir)?.as_ref() != Some(record) {
            self.remove_volume(holder)?;
        }
        let _shared = self.lock_shared()?;
        self.pin_only(&id, holder)?;
        let marks = dir.join("tree").join(MARKS);
        make_dirs(&marks).at("create", &marks)?;
        fault::point("volume.created");
        let json = serde_json::to_vec(record).map_err(io::Error::other);
        let path = dir.join("volume.json");
        let json = json.at("write", &path)?;
        put(&dir, &path, &json)?;
        fault::point("volume.recorded");
        Ok(dir.join("tree"))
    }

    /// What the directory of a volume is to hold, if it has one whose record can be read.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn opened_volume(&self, holder: &Holder) -> Result<Option<VolumeRecord>, StoreError> {
        self.volume_record(&self.volume_dir(holder))
    }

    /// Shows the files of the snapshot `id` that are below `tree` in a volume, as far as they are not shown
    /// yet. They must be verified. Nothing happens if the volume is gone, or another snapshot's by now.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn fill_volume(
        &self,
        holder: &Holder,
        id: &SnapshotId,
        tree: &Path,
    ) -> Result<(), StoreError> {
        let Some((dir, record, _lock)) = self.locked_volume_of(holder, id)? else {
            return Ok(());
        };
        self.link_all(&dir, tree, &record.model_dir(&dir.join("tree")))
    }

    /// Shows all of the published snapshot `id` in a volume, and says so in it. Nothing happens if the
    /// volume is gone, or another snapshot's by now.
    ///
    /// # Errors
    ///
    /// [`StoreError::Missing`] if the snapshot is not here, else [`StoreError::Io`].
    pub fn complete_volume(&self, holder: &Holder, id: &SnapshotId) -> Result<(), StoreError> {
        let Some((dir, record, _lock)) = self.locked_volume_of(holder, id)? else {
            return Ok(());
        };
        let snapshot = self.snapshot_dir(id);
        let Some((manifest, _)) = self.proven(id)? else {
            return Err(StoreError::Missing(id.to_string()));
        };
        let tree = dir.join("tree");
        self.link_all(&dir, &snapshot.join("tree"), &record.model_dir(&tree))?;
        if record.layout == Layout::HfCache {
            record.write_hf_cache(&dir, &tree, &manifest)?;
        }
        fault::point("volume.linked");
        let marks = tree.join(MARKS);
        remove_if_there(&marks.join("error"))?;
        let complete = json!({
            "model": manifest.model,
            "snapshot": id,
            "files": manifest.files.len(),
            "bytes": manifest.bytes(),
        });
        put(
            &dir,
            &marks.join("complete"),
            format!("{complete}\n").as_bytes(),
        )?;
        fault::point("volume.completed");
        Ok(())
    }

    /// A published snapshot whose bytes all came from its own origin, or from one that vouched for them.
    fn proven(&self, id: &SnapshotId) -> Result<Option<(Manifest, i64)>, StoreError> {
        let published = self.published(id)?;
        Ok(published.filter(|(manifest, _)| !manifest.is_believed()))
    }

    /// Completes the volumes that wait for this snapshot, and mends those that lost a damaged file. What is
    /// wrong with a volume concerns its holder only: the snapshot is published for all.
    pub(super) fn complete_volumes(&self, id: &SnapshotId) {
        let holders = self.volume_holders().unwrap_or_else(|error| {
            tracing::warn!(snapshot = %id, error = %Chain(&error), "no volume completed");
            Vec::new()
        });
        for holder in holders {
            let completed = match self.opened_volume(&holder) {
                Ok(Some(record)) if record.snapshot() == *id => self.complete_volume(&holder, id),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = completed {
                tracing::warn!(snapshot = %id, %holder, error = %Chain(&error), "volume not completed");
            }
        }
    }

    /// Says in a volume of the snapshot `id` why it is not complete.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn explain_volume(
        &self,
        holder: &Holder,
        id: &SnapshotId,
        why: &str,
    ) -> Result<(), StoreError> {
        let Some((dir, ..)) = self.locked_volume_of(holder, id)? else {
            return Ok(());
        };
        let path = dir.join("tree").join(MARKS).join("error");
        put(&dir, &path, format!("{why}\n").as_bytes())
    }

    /// Whether `holder` pins anything, or has a directory.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn holds_anything(&self, holder: &Holder) -> Result<bool, StoreError> {
        let dir = self.volume_dir(holder);
        let has_directory = dir.try_exists().at("look at", &dir)?;
        Ok(has_directory || !self.pinned_by(holder)?.is_empty())
    }

    /// What the holders of volumes hold.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn volumes(&self) -> Result<Vec<Volume>, StoreError> {
        let mut holders: BTreeSet<Holder> = self.volume_holders()?.into_iter().collect();
        holders.extend(csi_holders(&self.root.join("pins/csi"))?);
        let volume = |holder: Holder| {
            let dir = self.volume_dir(&holder);
            let record = self.volume_record(&dir)?;
            let mark = dir.join("tree").join(MARKS).join("complete");
            Ok(Volume {
                snapshots: self.pinned_by(&holder)?,
                complete: record.is_none() || mark.exists(),
                record,
                holder,
            })
        };
        holders.into_iter().map(volume).collect()
    }

    /// Takes the file `bad` out of every volume: nobody opens wrong bytes.
    pub(super) fn drop_from_volumes(&self, bad: u64) -> Result<(), StoreError> {
        for holder in self.volume_holders()? {
            let Some((dir, ..)) = self.locked_volume(&holder)? else {
                continue;
            };
            let tree = dir.join("tree");
            for (path, inode) in files(&tree)? {
                if inode == bad {
                    remove_if_there(&tree.join(MARKS).join("complete"))?;
                    remove_if_there(&tree.join(path))?;
                }
            }
        }
        Ok(())
    }

    /// Writes the pin, and takes away those of what the holder asked for before. The caller holds the
    /// store's lock.
    fn pin_only(&self, id: &SnapshotId, holder: &Holder) -> Result<(), StoreError> {
        self.write_pin(id, holder)?;
        for other in self.pinned_by(holder)? {
            if other != *id {
                self.unpin(&other, holder)?;
            }
        }
        Ok(())
    }

    /// Deletes the directory of a volume, if it has one. It must not be mounted.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn remove_volume(&self, holder: &Holder) -> Result<(), StoreError> {
        let dir = self.volume_dir(holder);
        let Some(lock) = lock_dir(&dir)? else {
            return Ok(());
        };
        let gone = self.move_away(&dir)?;
        fault::point("volume.renamed");
        drop(lock);
        delete_gone(&gone)
    }

    /// Links what is below `from` to the same paths below `to`, each by one step. `dir` is the volume's own.
    fn link_all(&self, dir: &Path, from: &Path, to: &Path) -> Result<(), StoreError> {
        let damaged = self.inodes_set_aside()?;
        for (path, inode) in files(from)? {
            // A lease may have linked it before it was found damaged. Who finds that out after this look waits for
            // the volume's lock, and takes it out again.
            if damaged.contains(&inode) {
                continue;
            }
            let (from, to) = (from.join(&path), to.join(&path));
            match fs::symlink_metadata(&to) {
                Ok(found) if found.ino() == inode => continue,
                Ok(_) => {}
                Err(_) => {
                    let parent = to.parent().unwrap_or(&to);
                    make_dirs(parent).at("create", parent)?;
                }
            }
            let fresh = dir.join(format!("{}.link", uuid::Uuid::new_v4()));
            match fs::hard_link(&from, &fresh) {
                Ok(()) => {}
                // A lease that ended: whatever it published is linked from there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).at("link", &fresh),
            }
            let renamed = fs::rename(&fresh, &to).at("rename into", &to);
            let _ = fs::remove_file(&fresh);
            renamed?;
        }
        Ok(())
    }

    fn inodes_set_aside(&self) -> Result<HashSet<u64>, StoreError> {
        let damaged = self.root.join("damaged");
        let inodes = entries(&damaged)?.into_iter().filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some(metadata.ino())
        });
        Ok(inodes.collect())
    }

    fn volume_dir(&self, holder: &Holder) -> PathBuf {
        self.root.join("volumes").join(holder.as_str())
    }

    fn volume_holders(&self) -> Result<Vec<Holder>, StoreError> {
        csi_holders(&self.root.join("volumes/csi"))
    }

    fn volume_record(&self, dir: &Path) -> Result<Option<VolumeRecord>, StoreError> {
        let path = dir.join("volume.json");
        match fs::read(&path) {
            // One that a power loss left empty stands for no volume.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).at("read", &path),
        }
    }

    /// A volume's directory and record, locked against its removal.
    fn locked_volume(
        &self,
        holder: &Holder,
    ) -> Result<Option<(PathBuf, VolumeRecord, claim::Held)>, StoreError> {
        let dir = self.volume_dir(holder);
        let Some(lock) = lock_dir(&dir)? else {
            return Ok(None);
        };
        let record = self.volume_record(&dir)?;
        Ok(record.map(|record| (dir, record, lock)))
    }

    /// The same, unless it is to show another snapshot than `id`: whoever works for an earlier call of the
    /// same holder must not bring that one's files in.
    fn locked_volume_of(
        &self,
        holder: &Holder,
        id: &SnapshotId,
    ) -> Result<Option<(PathBuf, VolumeRecord, claim::Held)>, StoreError> {
        let found = self.locked_volume(holder)?;
        Ok(found.filter(|(_, record, _)| record.snapshot() == *id))
    }
}

impl VolumeRecord {
    /// Where the model's own paths begin.
    fn model_dir(&self, tree: &Path) -> PathBuf {
        match self.layout {
            Layout::Flat => tree.to_owned(),
            Layout::HfCache => {
                let folder = self.repo_dir(tree).join("snapshots");
                folder.join(self.revision.as_str())
            }
        }
    }

    fn repo_dir(&self, tree: &Path) -> PathBuf {
        tree.join(format!("models--{}", self.model.name().replace('/', "--")))
    }

    /// What the Hub's clients read beside the files: which commit a name stands for, and which files that
    /// commit has, so that a missing one is noticed offline.
    ///
    /// `main` always names this commit: whoever pins a commit in the volume still says `org/name` to the
    /// loader.
    fn write_hf_cache(
        &self,
        dir: &Path,
        tree: &Path,
        manifest: &Manifest,
    ) -> Result<(), StoreError> {
        let repo = self.repo_dir(tree);
        let files: BTreeMap<&str, serde_json::Value> = manifest
            .files
            .iter()
            .map(|file| (file.path.as_str(), hub_file(file)))
            .collect();
        let listing = json!({"format_version": 1, "files": files});
        let path = repo.join(format!("trees/{}.json", self.revision));
        put_below(dir, &path, listing.to_string().as_bytes())?;
        for name in ["main", self.model.revision_or_default()] {
            let path = repo.join("refs").join(name);
            put_below(dir, &path, self.revision.as_str().as_bytes())?;
        }
        Ok(())
    }
}

/// A file as the Hub's clients note it. One without a git object id of its own lies in LFS, where git
/// holds a pointer to it.
fn hub_file(file: &FileEntry) -> serde_json::Value {
    let lfs = file.git_oid.is_none();
    let oid = file.git_oid.unwrap_or_else(|| lfs_pointer(file));
    json!({
        "size": file.size,
        "blob_id": oid,
        "lfs_sha256": lfs.then_some(file.sha256),
        "lfs_size": lfs.then_some(file.size),
        "xet_hash": file.xet_hash,
    })
}

fn lfs_pointer(file: &FileEntry) -> GitOid {
    // Source: the Git LFS specification, "The Pointer".
    let (sha256, size) = (file.sha256, file.size);
    let text =
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
    GitOid::of(text.as_bytes())
}

fn csi_holders(dir: &Path) -> Result<Vec<Holder>, StoreError> {
    let names = entries(dir)?.into_iter().filter_map(|entry| {
        let name = format!("csi/{}", entry.file_name().to_str()?);
        name.parse::<Holder>().ok()
    });
    Ok(names.collect())
}

/// Every file below `tree`: its path there, and its inode. The marks are not among them.
fn files(tree: &Path) -> Result<Vec<(PathBuf, u64)>, StoreError> {
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(folder) = folders.pop() {
        for entry in entries(&tree.join(&folder))? {
            let path = folder.join(entry.file_name());
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).at("look at", &entry.path()),
            };
            if metadata.is_dir() && path != Path::new(MARKS) {
                folders.push(path);
            } else if metadata.is_file() {
                found.push((path, metadata.ino()));
            }
        }
    }
    Ok(found)
}

fn put_below(dir: &Path, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let parent = path.parent().unwrap_or(path);
    make_dirs(parent).at("create", parent)?;
    put(dir, path, bytes)
}

/// Writes a small file so that it is there whole, or not at all. Not synced: no mount outlives a power
/// loss, and the next publish writes it again.
fn put(dir: &Path, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    if fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    let fresh = dir.join(format!("{}.new", uuid::Uuid::new_v4()));
    fs::write(&fresh, bytes).at("write", &fresh)?;
    let renamed = fs::set_permissions(&fresh, Permissions::from_mode(0o444))
        .and_then(|()| fs::rename(&fresh, path));
    if renamed.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    renamed.at("write", path)
}

/// Waits for a volume's directory; `None` if there is none.
fn lock_dir(dir: &Path) -> Result<Option<claim::Held>, StoreError> {
    loop {
        let file = match File::open(dir) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("open", dir),
        };
        let lock = claim::wait(file, FlockArg::LockExclusive).at("lock", dir)?;
        if claim::still_at(&lock, dir).at("look at", dir)? {
            return Ok(Some(lock));
        }
    }
}
