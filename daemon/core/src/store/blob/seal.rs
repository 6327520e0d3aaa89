//! Giving checked bytes their names.
//!
//! Bytes first, then the name: after a power loss the name must not stand for other bytes. A large file is
//! synced by itself. Small ones are synced together: to sync each would cost a write of the file system's
//! journal for each, three milliseconds on a virtual disk, thousands of times over.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::libc::{SYNC_FILE_RANGE_WAIT_AFTER, SYNC_FILE_RANGE_WAIT_BEFORE};

use super::super::evict::remove_if_there;
use super::super::snapshot::Lease;
use super::super::{At, Store, StoreError, claim, link_in_folder, sync_parent};
use super::Part;
use crate::digest::Digest;
use crate::fault;
use crate::source::RemoteFile;

/// As many files or more are synced together with whatever else the file system has not written yet. It may hold
/// gigabytes of others, such as an image that is being unpacked: a handful of files does not wait for those. No more
/// than that, for while each is synced by itself, no more than these may come, and so for thousands of files.
const TOGETHER: usize = 8;

/// Threads that name the files of a batch: what the file system does for one keeps none of the others waiting.
const THREADS: usize = 4;

/// Bytes that were hashed, and are what their source claims.
pub struct Checked {
    /// The bytes.
    pub part: Arc<Part>,
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
        let together = checked.len() >= TOGETHER && self.store().sync_file_system().is_ok();
        let named = each(checked, |Checked { part, digest, file }| {
            part.sync(together)?;
            part.name(self, *digest, file)
        });
        let kept = together && self.store().sync_file_system().is_ok();
        let named: Vec<_> = checked.iter().zip(named).collect();
        let end = |part: &Part, blob: &Path| {
            if !kept {
                sync_parent(blob).at("sync the folder of", blob)?;
            }
            fault::point("seal.renamed");
            part.remove_files()?;
            fault::point("seal.unjournaled");
            Ok(())
        };
        let ended = each(&named, |(one, named)| match named {
            Ok(blob) => end(&one.part, blob),
            Err(_) => Ok(()),
        });
        let outcomes = named.into_iter().zip(ended);
        outcomes
            .map(|((_, named), ended)| named.and(ended))
            .collect()
    }
}

/// Does `work` for each of `all`, in their order, on a few threads if there are many.
fn each<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
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
    /// Brings the bytes to the disk. With `written`, a sync of the whole file system has done so, and is asked
    /// whether that went well for these.
    fn sync(&self, written: bool) -> Result<(), StoreError> {
        let waited = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
        let synced = match written {
            true => self.sync_file_range(0..self.size, waited),
            false => self.file.sync_data(),
        };
        if let Err(error) = synced {
            // What the disk lost the page cache still shows: whoever goes on would believe it.
            let _ = self.discard();
            return Err(error).at("sync", &self.path);
        }
        Ok(())
    }

    /// Gives the bytes, which are on disk, their name, and links them into `lease`; returns where the blob is.
    fn name(
        &self,
        lease: &Lease,
        digest: Digest,
        file: &RemoteFile,
    ) -> Result<PathBuf, StoreError> {
        let store = lease.store();
        self.file
            .set_permissions(fs::Permissions::from_mode(0o444))
            .at("protect", &self.path)?;
        fault::point("seal.synced");
        let blob = store.blob_path(digest);
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
        if let Some(identity) = &file.identity {
            store.remember(identity, digest)?;
        }
        match link_in_folder(&linked, &blob) {
            // Somebody had the same bytes under another key.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                lease.link(&blob, &file.path)?;
            }
            named => named.at("link", &blob)?,
        }
        Ok(blob)
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
