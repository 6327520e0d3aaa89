//! Giving checked bytes their names.
//!
//! Bytes first, then the name: after a power loss the name must not stand for other bytes. A large file is
//! synced by itself. Small ones are synced together: to sync each would cost a write of the file system's
//! journal for each, three milliseconds on a virtual disk, thousands of times over.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::libc::{SYNC_FILE_RANGE_WAIT_AFTER, SYNC_FILE_RANGE_WAIT_BEFORE};

use super::super::evict::remove_if_there;
use super::super::snapshot::Lease;
use super::super::{At, Store, StoreError, claim, in_folder, link_in_folder, sync_parent};
use super::{Part, sync_file_range};
use crate::digest::Digest;
use crate::fault;
use crate::model::RelPath;
use crate::source::RemoteFile;

/// As many files or more are synced together with whatever else the file system has not written yet. It may hold
/// gigabytes of others, such as an image that is being unpacked: a handful of files does not wait for those. No more
/// than that, for while each is synced by itself, no more than these may come, and so for thousands of files.
const TOGETHER: usize = 8;

/// Threads that name the files of a batch: what the file system does for one keeps none of the others waiting.
const THREADS: usize = 4;

/// Bytes that have no name yet.
pub enum Unsealed {
    /// On disk, so that another process can go on with them.
    Staged(Arc<Part>),
    /// In memory: no more than are soon brought again.
    InMemory(Vec<u8>),
}

/// Bytes that were hashed, and are what their source claims.
pub struct Checked {
    /// The bytes.
    pub bytes: Unsealed,
    /// What they hash to.
    pub digest: Digest,
    /// What they are of.
    pub file: Arc<RemoteFile>,
}

impl Lease {
    /// Gives the bytes of each file their name, and links them in. The outcomes are in the order of the files.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] for each file that could not be sealed.
    pub fn seal(&self, checked: &[Checked]) -> Vec<Result<(), StoreError>> {
        let written = each(checked, |one| match &one.bytes {
            Unsealed::Staged(part) => Ok(Written::Staged(part)),
            Unsealed::InMemory(bytes) => self.create(&one.file.path, bytes),
        });
        let together = checked.len() >= TOGETHER && self.store().sync_file_system().is_ok();
        let written: Vec<_> = checked.iter().zip(written).collect();
        let named = each(&written, |(one, written)| {
            let written = written.as_ref().ok()?;
            Some(self.sync_and_name(written, together, one))
        });
        let kept = together && self.store().sync_file_system().is_ok();
        let end = |one: &Checked, blob: &Path| {
            if !kept {
                sync_parent(blob).at("sync the folder of", blob)?;
            }
            fault::point("seal.renamed");
            if let Unsealed::Staged(part) = &one.bytes {
                part.remove_files()?;
                fault::point("seal.unjournaled");
            }
            Ok(())
        };
        let named: Vec<_> = checked.iter().zip(named).collect();
        let ended = each(&named, |(one, named)| match named {
            Some(Ok(blob)) => end(one, blob),
            _ => Ok(()),
        });
        let outcomes = written.into_iter().zip(named).zip(ended);
        let outcomes = outcomes.map(|(((_, written), (_, named)), ended)| {
            written?;
            named.expect("it was written")?;
            ended
        });
        outcomes.collect()
    }

    /// Writes a file of the snapshot.
    fn create(&self, path: &RelPath, bytes: &[u8]) -> Result<Written<'static>, StoreError> {
        let path = self.tree().join(path);
        let open = || {
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o444).open(&path)
        };
        let opened = match in_folder(&path, open) {
            // What an attempt left that failed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&path).and_then(|()| open())
            }
            opened => opened,
        };
        let mut file = opened.at("create", &path)?;
        file.write_all(bytes).at("write", &path)?;
        // Whatever this process's umask takes away: pods read it as other users.
        file.set_permissions(fs::Permissions::from_mode(0o444))
            .at("protect", &path)?;
        fault::point("seal.written");
        Ok(Written::InTree(file, path))
    }

    /// Brings bytes to the disk and gives them their name; returns where the blob is.
    fn sync_and_name(
        &self,
        written: &Written<'_>,
        together: bool,
        one: &Checked,
    ) -> Result<PathBuf, StoreError> {
        let size = one.file.size;
        match written {
            Written::Staged(part) => part.sync(together)?,
            Written::InTree(file, path) => sync(file, size, together).at("sync", path)?,
        }
        fault::point("seal.synced");
        let store = self.store();
        store.set_aside_other_length(one.digest, size)?;
        let _shared = store.lock_shared()?;
        let linked = match written {
            Written::Staged(part) => part.link_into(self, &one.file.path)?,
            Written::InTree(_, path) => path.clone(),
        };
        fault::point("seal.linked");
        // Before the name: with it others may take the blob, and must find all of it.
        if let Some(identity) = &one.file.identity {
            store.remember(identity, one.digest)?;
        }
        let blob = store.blob_path(one.digest);
        match link_in_folder(&linked, &blob) {
            // Somebody had the same bytes under another key.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.link(&blob, &one.file.path)?;
            }
            named => named.at("link", &blob)?,
        }
        Ok(blob)
    }
}

/// Where bytes are that a sync brings to the disk.
enum Written<'a> {
    Staged(&'a Part),
    /// In the tree of the snapshot, where nobody else finds them.
    InTree(File, PathBuf),
}

/// Brings the bytes of `file` to the disk. With `together`, a sync of the whole file system has done so, and is asked whether
/// that went well for these.
fn sync(file: &File, size: u64, together: bool) -> io::Result<()> {
    let waited = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
    match together {
        true => sync_file_range(file, 0..size, waited),
        false => file.sync_data(),
    }
}

/// Does `work` for each of `all`, in their order, on a few threads if there are many.
fn each<'a, T: Sync, R: Send>(all: &'a [T], work: impl Fn(&'a T) -> R + Sync) -> Vec<R> {
    if all.len() < TOGETHER {
        return all.iter().map(work).collect();
    }
    let share = all.len().div_ceil(THREADS);
    std::thread::scope(|scope| {
        let work = &work;
        let shares = all.chunks(share);
        let threads: Vec<_> = shares
            .map(|share| scope.spawn(move || share.iter().map(work).collect::<Vec<R>>()))
            .collect();
        let done = threads.into_iter().flat_map(|thread| {
            let done = thread.join();
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        done.collect()
    })
}

impl Part {
    /// Brings the bytes to the disk, and keeps anybody from changing them.
    fn sync(&self, together: bool) -> Result<(), StoreError> {
        if let Err(error) = sync(&self.file, self.size, together) {
            // What the disk lost the page cache still shows: whoever goes on would believe it.
            let _ = self.discard();
            return Err(error).at("sync", &self.path);
        }
        self.file
            .set_permissions(fs::Permissions::from_mode(0o444))
            .at("protect", &self.path)
    }

    /// Links the bytes into `lease` at `path`; returns where that is.
    fn link_into(&self, lease: &Lease, path: &RelPath) -> Result<PathBuf, StoreError> {
        let linked = lease.link(&self.path, path)?;
        // Only what was hashed may get the name, whatever lies at the part's path by now.
        if !claim::still_at(&self.file, &linked).at("look at", &linked)? {
            remove_if_there(&linked)?;
            let replaced = io::Error::other("another file took its place");
            return Err(replaced).at("seal", &self.path);
        }
        Ok(linked)
    }
}

impl Store {
    /// Brings to the disk whatever its file system has not written yet, of whomever.
    fn sync_file_system(&self) -> Result<(), StoreError> {
        let root = self.root();
        let synced = File::open(root).and_then(|root| Ok(nix::unistd::syncfs(root)?));
        synced.at("sync the file system of", root)
    }
}
