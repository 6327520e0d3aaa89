//! Snapshots: leases on blobs while one is made, publishing, and finding them again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::evict::look;
use super::pin::Holder;
use super::{
    At, Store, StoreError, claim, entries, link_in_folder, make_dirs, sync_parent, write_atomically,
};
use crate::digest::Digest;
use crate::errors::Chain;
use crate::fault;
use crate::manifest::Manifest;
use crate::model::{ModelRef, Patterns, RelPath, Revision, SnapshotId};

/// A published snapshot.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// What it holds.
    pub manifest: Manifest,
    /// The directory of plain files.
    pub path: PathBuf,
    /// When it was last asked for, in seconds since 1970.
    pub last_used: i64,
    /// Who needs it.
    pub pinned_by: Vec<Holder>,
}

/// A snapshot in the making: a locked directory of hard links, which keeps its blobs from collection.
/// Dropping it lets them go.
#[derive(Debug)]
pub struct Lease {
    store: Arc<Store>,
    dir: PathBuf,
    lock: Option<claim::Held>,
}

/// Keeps a published snapshot from eviction until it is dropped.
#[derive(Debug)]
pub struct SnapshotLease {
    _lock: claim::Held,
}

impl Store {
    /// Starts a snapshot.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn lease(self: &Arc<Self>) -> Result<Lease, StoreError> {
        let dir = self.staging_name("tree");
        // Shared, so that the collector does not take the directory between its making and its lock.
        let _shared = self.lock_shared()?;
        make_dirs(&dir.join("tree")).at("create", &dir)?;
        let file = File::open(&dir).at("open", &dir)?;
        let lock = claim::wait(file, nix::fcntl::FlockArg::LockShared).at("lock", &dir)?;
        fault::point("lease.created");
        Ok(Lease {
            store: Arc::clone(self),
            dir,
            lock: Some(lock),
        })
    }

    /// Keeps a snapshot from eviction, if it is here.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn lease_snapshot(&self, id: &SnapshotId) -> Result<Option<SnapshotLease>, StoreError> {
        let dir = self.snapshot_dir(id);
        let _shared = self.lock_shared()?;
        if self.published(id)?.is_none() {
            return Ok(None);
        }
        let file = File::open(&dir).at("open", &dir)?;
        let lock = claim::wait(file, nix::fcntl::FlockArg::LockShared).at("lock", &dir)?;
        Ok(Some(SnapshotLease { _lock: lock }))
    }

    /// All published snapshots, sorted by model.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        let mut snapshots = Vec::new();
        for entry in entries(&self.root.join("snapshots"))? {
            let Some(id) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            snapshots.extend(self.snapshot(&id)?);
        }
        snapshots.sort_by_key(|snapshot| snapshot.manifest.model.to_string());
        Ok(snapshots)
    }

    /// The published snapshot `id`, if it is here whole.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn snapshot(&self, id: &SnapshotId) -> Result<Option<Snapshot>, StoreError> {
        let Some((manifest, last_used)) = self.published(id)? else {
            return Ok(None);
        };
        let pinned_by = self.holders(id)?;
        Ok(Some(Snapshot {
            manifest,
            path: self.snapshot_dir(id).join("tree"),
            last_used,
            pinned_by,
        }))
    }

    /// The snapshot that a user means by `model` and `patterns`, as it was last resolved. With the
    /// default patterns, one that was fetched with others will do.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn find(
        &self,
        model: &ModelRef,
        patterns: &Patterns,
    ) -> Result<Option<Snapshot>, StoreError> {
        let reference = self.read_ref(model)?;
        let revision = model
            .pinned()
            .or_else(|| reference.as_ref().map(|found| found.revision.clone()));
        let Some(revision) = revision else {
            return Ok(None);
        };
        if let Some(snapshot) = self.snapshot(&SnapshotId::new(model, &revision, patterns))? {
            return Ok(Some(snapshot));
        }
        if *patterns != Patterns::default() {
            return Ok(None);
        }
        if let Some(reference) = reference
            && let Some(snapshot) = self.snapshot(&reference.snapshot)?
        {
            return Ok(Some(snapshot));
        }
        let model = model.at(&revision);
        let of_it = self
            .snapshots()?
            .into_iter()
            .filter(|snapshot| snapshot.manifest.model == model);
        Ok(of_it.max_by_key(|snapshot| snapshot.last_used))
    }

    /// Remembers what a model's name resolved to, and marks the snapshot as used now.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn touch(
        &self,
        asked: &ModelRef,
        revision: &Revision,
        id: &SnapshotId,
    ) -> Result<(), StoreError> {
        let manifest = self.snapshot_dir(id).join("manifest.json");
        let now = SystemTime::now();
        let touched = File::open(&manifest).and_then(|file| file.set_modified(now));
        touched.at("touch", &manifest)?;
        self.write_ref(asked, revision, id)?;
        self.write_ref(&asked.at(revision), revision, id)
    }

    /// The manifest of a snapshot, and when it was last used. `None` unless the snapshot is here whole:
    /// one whose manifest is damaged is as good as withdrawn, so that the next fetch mends it.
    pub(super) fn published(&self, id: &SnapshotId) -> Result<Option<(Manifest, i64)>, StoreError> {
        let found = read_manifest(&self.snapshot_dir(id).join("manifest.json"))?;
        Ok(found.filter(|(manifest, _)| manifest.snapshot == *id))
    }

    pub(super) fn snapshot_dir(&self, id: &SnapshotId) -> PathBuf {
        self.root.join("snapshots").join(id.as_str())
    }

    /// Removes the directory of a snapshot from its place, at once; its files are deleted later.
    pub(super) fn move_away(&self, dir: &Path) -> Result<PathBuf, StoreError> {
        let gone = self.staging_name("gone");
        fs::rename(dir, &gone).at("rename", dir)?;
        sync_parent(dir).at("sync the folder of", dir)?;
        Ok(gone)
    }
}

/// Reads a manifest and when it was last used. One that cannot be read stands for no snapshot.
pub(super) fn read_manifest(path: &Path) -> Result<Option<(Manifest, i64)>, StoreError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("read", path),
    };
    let used = match fs::metadata(path) {
        Ok(metadata) => metadata.mtime(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("look at", path),
    };
    match serde_json::from_slice::<Manifest>(&bytes) {
        Ok(manifest) if manifest.format == Manifest::FORMAT => Ok(Some((manifest, used))),
        Ok(_) => Ok(None),
        Err(error) => {
            tracing::warn!(path = %path.display(), error = %Chain(&error), "unreadable manifest, snapshot ignored");
            Ok(None)
        }
    }
}

impl Lease {
    /// Links the blob `digest` in at `path`. False if the blob is not here, or not `size` bytes long.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn add(&self, digest: Digest, size: u64, path: &RelPath) -> Result<bool, StoreError> {
        let _shared = self.store.lock_shared()?;
        let blob = self.store.blob_path(digest);
        if look(&blob)?.is_none_or(|found| found.len() != size) {
            return Ok(false);
        }
        self.link(&blob, path)?;
        Ok(true)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Where its files are, until it is published.
    #[must_use]
    pub fn tree(&self) -> PathBuf {
        self.dir.join("tree")
    }

    /// Links `from` in at `path`; returns where that is.
    pub(super) fn link(&self, from: &Path, path: &RelPath) -> Result<PathBuf, StoreError> {
        let to = self.dir.join("tree").join(path);
        match link_in_folder(from, &to) {
            // A part of bytes that somebody else sealed first: two names, one inode.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&to).at("remove", &to)?;
                fs::hard_link(from, &to).at("link", &to)?;
            }
            result => result.at("link", &to)?,
        }
        fault::point("lease.linked");
        Ok(to)
    }

    /// Publishes the snapshot that `manifest` describes, whose files were all added.
    ///
    /// If it is here already, that one stays. If it was withdrawn because a blob went bad, its files
    /// are put back in place: its directory may be mounted.
    ///
    /// # Errors
    ///
    /// [`StoreError::SetAside`] if one of its blobs went bad meanwhile, else [`StoreError::Io`].
    pub fn publish(mut self, manifest: &Manifest) -> Result<SnapshotLease, StoreError> {
        let path = self.dir.join("manifest.json");
        let json = serde_json::to_vec_pretty(manifest)
            .map_err(io::Error::other)
            .at("write", &path)?;
        write_atomically(&path, &json).at("write", &path)?;
        fault::point("publish.manifest");
        sync_tree(&self.dir.join("tree"))?;
        fault::point("publish.synced");
        let to = self.store.snapshot_dir(&manifest.snapshot);
        let _shared = self.store.lock_shared()?;
        self.check_blobs(manifest)?;
        match fs::rename(&self.dir, &to) {
            Ok(()) => {
                fault::point("publish.renamed");
                sync_parent(&to).at("sync the folder of", &to)?;
                self.store.complete_volumes(&manifest.snapshot);
                let lock = self.lock.take().expect("it is taken only here");
                return Ok(SnapshotLease { _lock: lock });
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                ) => {}
            Err(error) => return Err(error).at("rename into", &to),
        }
        if self.store.published(&manifest.snapshot)?.is_none() {
            self.repair(&to, manifest, &json)?;
            self.store.complete_volumes(&manifest.snapshot);
        }
        // With the lock still held: nobody evicts it before it is leased.
        let lease = self.store.lease_snapshot(&manifest.snapshot)?;
        lease.ok_or_else(|| StoreError::Missing(manifest.model.to_string()))
    }

    /// Whether each file is still the blob that its digest names: one that was set aside since it was
    /// linked is bad. The caller holds the store's lock.
    fn check_blobs(&self, manifest: &Manifest) -> Result<(), StoreError> {
        for file in &manifest.files {
            let ours = look(&self.dir.join("tree").join(&file.path))?;
            let blob = look(&self.store.blob_path(file.sha256))?;
            let same = ours.zip(blob).is_some_and(|(ours, blob)| {
                (ours.dev(), ours.ino()) == (blob.dev(), blob.ino()) && ours.len() == file.size
            });
            if !same {
                return Err(StoreError::SetAside(file.path.clone()));
            }
        }
        Ok(())
    }

    /// Puts the files of a withdrawn snapshot back, its manifest last.
    fn repair(&self, to: &Path, manifest: &Manifest, json: &[u8]) -> Result<(), StoreError> {
        for file in &manifest.files {
            let ours = self.dir.join("tree").join(&file.path);
            let theirs = to.join("tree").join(&file.path);
            if let Some(parent) = theirs.parent() {
                make_dirs(parent).at("create", parent)?;
            }
            // Each file by one rename: a pod that has the tree mounted sees the old or the new one.
            fs::rename(&ours, &theirs).at("rename into", &theirs)?;
            fault::point("repair.linked");
        }
        sync_tree(&to.join("tree"))?;
        let path = to.join("manifest.json");
        write_atomically(&path, json).at("write", &path)?;
        let _ = fs::remove_file(to.join("withdrawn.json"));
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.lock.is_some()
            && let Err(error) = fs::remove_dir_all(&self.dir)
        {
            tracing::debug!(path = %self.dir.display(), %error, "a lease is left for the collector");
        }
    }
}

/// Syncs the directories of a tree, inner ones first. The files were synced when they were sealed.
fn sync_tree(dir: &Path) -> Result<(), StoreError> {
    for entry in entries(dir)? {
        if entry.file_type().at("look at", dir)?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    File::open(dir)
        .and_then(|file| file.sync_all())
        .at("sync", dir)
}
