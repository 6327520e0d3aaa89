//! Removing what nothing needs: evicted snapshots and their blobs, and what dead processes left.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::evict::{delete_gone, lock_dir, look, remove_if_there};
use super::snapshot::read_manifest;
use super::{At, Store, StoreError, blob, claim, entries, sync_parent, verify};
use crate::fault;
use crate::model::SnapshotId;

/// Which leftovers of unfinished work to remove: partial downloads, blobs that no snapshot needs yet, and
/// withdrawn snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partial {
    /// Those that nobody went on with for a long time.
    Stale,
    /// All that nobody works on now.
    All,
}

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Blobs that nothing needed.
    pub blobs: u64,
    /// Bytes freed in all.
    pub bytes: u64,
    /// Partial downloads.
    pub partial: u64,
    /// Snapshots that were never finished, or withdrawn and not fetched again.
    pub trees: u64,
}

/// Blobs that were moved out of their place, to be deleted once no lock is held: it may take long.
#[derive(Debug, Default)]
pub(super) struct Garbage {
    paths: Vec<PathBuf>,
    pub(super) bytes: u64,
}

impl Garbage {
    /// Deletes them. How many bytes that freed in all stays known.
    pub(super) fn delete(&mut self) -> Result<(), StoreError> {
        for path in &self.paths {
            remove_if_there(path)?;
            fault::point("collect.deleted");
        }
        match self.paths.drain(..).next() {
            Some(path) => sync_parent(&path).at("sync the folder of", &path),
            None => Ok(()),
        }
    }
}

impl Store {
    /// Removes what nothing needs: dead work of killed processes, and what is left of unfinished work.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn collect(&self, partial: Partial) -> Result<Collected, StoreError> {
        let alone = self.lock_alone()?;
        let mut garbage = Garbage::default();
        let mut collected = self.sweep_staging(partial, &mut garbage)?;
        collected.trees += self.sweep_withdrawn(partial, &mut garbage)?;
        self.move_garbage(partial, &mut garbage)?;
        collected.blobs = garbage.paths.len() as u64;
        collected.bytes += garbage.bytes;
        self.drop_temporaries()?;
        self.drop_stale_refs()?;
        self.drop_stale_known()?;
        drop(alone);
        garbage.delete()?;
        collected.bytes += self.sweep_damaged(partial)?;
        Ok(collected)
    }

    /// Deletes what was set aside long ago. Returns bytes freed.
    fn sweep_damaged(&self, partial: Partial) -> Result<u64, StoreError> {
        let mut bytes = 0;
        for entry in entries(&self.root.join("damaged"))? {
            let path = entry.path();
            // With another name it is still in a tree: this one tells `finish_set_aside` so.
            let Some(metadata) = look(&path)?.filter(|found| found.nlink() == 1) else {
                continue;
            };
            // Not by the file's own time, which is when it was downloaded.
            let stale = match verify::set_aside_at(&path) {
                Some(time) => self.is_long_ago(time),
                None => self.is_stale(&path)?,
            };
            if partial == Partial::All || stale {
                remove_if_there(&path)?;
                bytes += metadata.len();
            }
        }
        Ok(bytes)
    }

    /// Deletes what killed processes left in `staging`, and partial downloads. The caller holds the store's lock alone.
    pub(super) fn sweep_staging(
        &self,
        partial: Partial,
        garbage: &mut Garbage,
    ) -> Result<Collected, StoreError> {
        let mut swept = Collected::default();
        for entry in entries(&self.staging())? {
            let path = entry.path();
            let bytes = look(&path)?.map_or(0, |metadata| metadata.blocks() * 512);
            match path.extension().and_then(|ending| ending.to_str()) {
                Some("tree") if lock_dir(&path)?.is_some() => {
                    fs::remove_dir_all(&path).at("delete", &path)?;
                    swept.trees += 1;
                }
                Some("gone") if path.is_dir() => {
                    // It may be a snapshot whose eviction died.
                    self.move_blobs_of(&path, garbage)?;
                    delete_gone(&path)?;
                }
                Some("gone" | "probe") => remove_if_there(&path)?,
                Some("room") => swept.bytes += remove_unlocked(&path, bytes)?.unwrap_or(0),
                Some("part") => self.sweep_part(&path, partial, &mut swept)?,
                Some("journal" | "rewrite") if !path.with_extension("part").exists() => {
                    remove_if_there(&path)?
                }
                _ => {}
            }
        }
        // The other name of a probe, of a process that died between the two.
        for entry in entries(&self.root.join("blobs"))? {
            let path = entry.path();
            if path.extension().is_some_and(|ending| ending == "probe") {
                remove_if_there(&path)?;
            }
        }
        Ok(swept)
    }

    fn sweep_part(
        &self,
        path: &Path,
        partial: Partial,
        swept: &mut Collected,
    ) -> Result<(), StoreError> {
        let Some(metadata) = look(path)? else {
            return Ok(());
        };
        // A blob that kept this name as its process died: without it, eviction frees the bytes.
        let sealed = self.is_sealed(&metadata)?;
        let garbage = sealed || partial == Partial::All || !blob::can_resume(path);
        if !garbage && !self.is_stale(path)? {
            return Ok(());
        }
        let bytes = remove_unlocked(path, metadata.blocks() * 512)?;
        if let Some(bytes) = bytes.filter(|_| !sealed) {
            swept.partial += 1;
            swept.bytes += bytes;
        }
        Ok(())
    }

    /// Deletes snapshots that were withdrawn, or lost their manifest, unless somebody holds them: their
    /// good blobs need not be fetched again when they are mended.
    pub(super) fn sweep_withdrawn(
        &self,
        partial: Partial,
        garbage: &mut Garbage,
    ) -> Result<u64, StoreError> {
        let mut swept = 0;
        for entry in entries(&self.root.join("snapshots"))? {
            let dir = entry.path();
            let Some(id) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<SnapshotId>().ok())
            else {
                continue;
            };
            // The manifest's going was the last change of the directory.
            if self.published(&id)?.is_none()
                && (partial == Partial::All || self.is_stale(&dir)?)
                && self.holders(&id)?.is_empty()
                && lock_dir(&dir)?.is_some()
            {
                self.evict(&id, garbage)?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    fn is_stale(&self, path: &Path) -> Result<bool, StoreError> {
        let Some(metadata) = look(path)? else {
            return Ok(false);
        };
        Ok(self.is_long_ago(metadata.modified().at("look at", path)?))
    }

    fn is_long_ago(&self, time: SystemTime) -> bool {
        let age = SystemTime::now().duration_since(time).unwrap_or_default();
        age > self.limits.keep_partial
    }

    /// Deletes a snapshot's tree, and moves the blobs that only it needed out of their place. The caller
    /// holds the store's lock alone.
    pub(super) fn evict(&self, id: &SnapshotId, garbage: &mut Garbage) -> Result<(), StoreError> {
        let gone = self.move_away(&self.snapshot_dir(id))?;
        fault::point("evict.renamed");
        // Before the tree goes: it tells its blobs from those of fetches that are not done yet.
        self.move_blobs_of(&gone, garbage)?;
        fs::remove_dir_all(&gone).at("delete", &gone)?;
        fault::point("evict.deleted");
        Ok(())
    }

    /// Moves the blobs that only the snapshot in the directory `gone` needs out of their place. Another
    /// directory has no manifest, and no blobs of its own. The caller holds the store's lock alone.
    fn move_blobs_of(&self, gone: &Path, garbage: &mut Garbage) -> Result<(), StoreError> {
        let manifest = match read_manifest(&gone.join("manifest.json"))? {
            None => read_manifest(&gone.join("withdrawn.json"))?,
            found => found,
        };
        let Some((manifest, _)) = manifest else {
            return Ok(());
        };
        let mut names_left: HashMap<PathBuf, (u64, u64)> = HashMap::new();
        let mut seen = HashSet::new();
        for file in manifest.files {
            let linked = fs::symlink_metadata(gone.join("tree").join(&file.path));
            let path = self.blob_path(file.sha256);
            if let (Ok(linked), Some(blob)) = (linked, look(&path)?)
                && (linked.dev(), linked.ino()) == (blob.dev(), blob.ino())
                && seen.insert(file.path)
            {
                let left = names_left.entry(path).or_insert((blob.nlink(), blob.len()));
                left.0 = left.0.saturating_sub(1);
            }
        }
        for (path, (names, bytes)) in names_left {
            if names == 1 {
                self.move_blob(&path, bytes, garbage)?;
            }
        }
        Ok(())
    }

    /// Moves the blobs that nothing needs out of their place, or only those that nothing has needed for
    /// a long time: younger ones are of a fetch that may go on. The caller holds the store's lock alone.
    pub(super) fn move_garbage(
        &self,
        partial: Partial,
        garbage: &mut Garbage,
    ) -> Result<(), StoreError> {
        for blob in self.blobs()?.into_values().filter(|blob| blob.links == 1) {
            // Not since it was written: a fetch that goes on again and again links it each time.
            if partial == Partial::All || self.is_long_ago(blob.changed) {
                self.move_blob(&blob.path, blob.bytes, garbage)?;
            }
        }
        Ok(())
    }

    fn move_blob(&self, path: &Path, bytes: u64, garbage: &mut Garbage) -> Result<(), StoreError> {
        let gone = self.staging_name("gone");
        fs::rename(path, &gone).at("rename", path)?;
        fault::point("collect.renamed");
        garbage.bytes += bytes;
        garbage.paths.push(gone);
        Ok(())
    }
}

/// Removes a file, and its journal, unless a process holds its lock. Returns `bytes` if it is gone.
fn remove_unlocked(path: &Path, bytes: u64) -> Result<Option<u64>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).at("open", path),
    };
    remove_if_still_there(file, path, bytes)
}

fn remove_if_still_there(file: File, path: &Path, bytes: u64) -> Result<Option<u64>, StoreError> {
    let Some(lock) = claim::try_exclusive(file).at("lock", path)? else {
        return Ok(None);
    };
    // It may have been sealed, and the next owner's file lie there now.
    if !claim::still_at(&lock, path).at("look at", path)? {
        return Ok(None);
    }
    // The journal first: with the part the claim is free, and its next owner writes another.
    remove_journal(path)?;
    remove_if_there(path)?;
    Ok(Some(bytes))
}

/// Removes the journal of a part, and a newer one that somebody died over.
pub(super) fn remove_journal(part: &Path) -> Result<(), StoreError> {
    remove_if_there(&part.with_extension("rewrite"))?;
    remove_if_there(&part.with_extension("journal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_took_the_place_of_a_sealed_one_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.part");
        fs::write(&path, "sealed").unwrap();
        let opened = File::open(&path).unwrap();
        fs::rename(&path, dir.path().join("blob")).unwrap();
        fs::write(&path, "another owner's").unwrap();

        let removed = remove_if_still_there(opened, &path, 6).unwrap();

        assert_eq!(removed, None);
        assert_eq!(fs::read(&path).unwrap(), b"another owner's");
    }
}
