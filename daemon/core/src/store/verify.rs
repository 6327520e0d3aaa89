//! Hashing what is stored again, and setting aside what went bad.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

use super::evict::look;
use super::snapshot::{Snapshot, read_manifest};
use super::{At, Store, StoreError, entries, sync_parent};
use crate::digest::{Claims, Digest, Verifier};
use crate::fault;
use crate::model::SnapshotId;

/// What a verification found.
#[derive(Debug, Clone, Default)]
pub struct Verified {
    /// Blobs that were hashed.
    pub checked: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those whose bytes went bad.
    pub damaged: Vec<Damaged>,
}

/// A blob whose bytes are not those that its name says.
#[derive(Debug, Clone)]
pub struct Damaged {
    /// Its name.
    pub sha256: Digest,
    /// What its bytes hash to now; `None` if they are gone or cannot be read.
    pub got: Option<Digest>,
    /// The snapshots that hold it. They were withdrawn: fetching them again brings only what is bad.
    pub snapshots: Vec<SnapshotId>,
    /// Where the bytes are now; `None` if they are gone.
    pub set_aside: Option<PathBuf>,
}

/// A file to hash: one name of an inode, and what it should hash to.
struct Target {
    path: PathBuf,
    digest: Digest,
}

impl Store {
    /// Hashes the blobs of one snapshot, or of all, and sets damaged ones aside.
    ///
    /// `pace` hears of the bytes just hashed: it may sleep, to be gentle on the disk, or stop.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] if the store cannot be read or changed. A blob whose bytes the disk does not
    /// give is damaged; one that could not be read for another reason fails the pass at its end, unless
    /// that has damage to tell of.
    pub fn verify(
        &self,
        only: Option<&SnapshotId>,
        pace: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Verified, StoreError> {
        self.finish_set_aside()?;
        let (targets, missing) = self.targets(only)?;
        let mut verified = Verified::default();
        for digest in missing {
            let damaged = self.withdraw_missing(digest)?;
            verified.checked += u64::from(damaged.is_some());
            verified.damaged.extend(damaged);
        }
        let mut unread = None;
        for target in targets {
            match hash_file(&target.path, &mut verified.bytes, pace) {
                Ok(ControlFlow::Continue(hashed)) => {
                    verified.checked += 1;
                    // At once: the pass may take days, and pods open these bytes meanwhile.
                    if hashed.got != Some(target.digest) {
                        verified.damaged.extend(self.set_aside(&target, &hashed)?);
                    }
                }
                Ok(ControlFlow::Break(())) => break,
                // It was evicted since we looked.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(path = %target.path.display(), %error, "blob not verified");
                    unread.get_or_insert((target.path, error));
                }
            }
        }
        match unread {
            // What was not read is not sound. Damage says as much, and more.
            Some((path, error)) if verified.damaged.is_empty() => Err(error).at("read", &path),
            _ => Ok(verified),
        }
    }

    /// Bytes that a verification will hash.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn bytes_to_verify(&self, only: Option<&SnapshotId>) -> Result<u64, StoreError> {
        let (targets, _) = self.targets(only)?;
        let size =
            |target: &Target| fs::metadata(&target.path).map_or(0, |metadata| metadata.len());
        Ok(targets.iter().map(size).sum())
    }

    /// Every inode to hash, once, and digests whose file is missing from a tree. What pods see is the
    /// tree, so its files count even if they are no longer the blob of that name.
    fn targets(&self, only: Option<&SnapshotId>) -> Result<(Vec<Target>, Vec<Digest>), StoreError> {
        let mut targets: HashMap<u64, Target> = HashMap::new();
        let mut missing = Vec::new();
        if only.is_none() {
            for folder in entries(&self.root.join("blobs/sha256"))? {
                for entry in entries(&folder.path())? {
                    let digest = entry
                        .file_name()
                        .to_str()
                        .and_then(|name| name.parse().ok());
                    let (Some(digest), Ok(metadata)) = (digest, entry.metadata()) else {
                        continue;
                    };
                    targets.insert(
                        metadata.ino(),
                        Target {
                            path: entry.path(),
                            digest,
                        },
                    );
                }
            }
        }
        let snapshots = match only {
            Some(id) => self.snapshot(id)?.into_iter().collect(),
            None => self.snapshots()?,
        };
        for Snapshot { manifest, path, .. } in snapshots {
            for file in manifest.files {
                let path = path.join(&file.path);
                match look(&path)? {
                    Some(metadata) if metadata.is_file() => {
                        let target = Target {
                            path,
                            digest: file.sha256,
                        };
                        targets.entry(metadata.ino()).or_insert(target);
                    }
                    _ => missing.push(file.sha256),
                }
            }
        }
        let mut targets: Vec<Target> = targets.into_values().collect();
        targets.sort_by(|a, b| a.path.cmp(&b.path));
        Ok((targets, missing))
    }

    /// Takes a damaged file, and all that share its bytes, out of use. `None` if its name stands for
    /// another file by now.
    fn set_aside(&self, bad: &Target, hashed: &Hashed) -> Result<Option<Damaged>, StoreError> {
        let _alone = self.lock_alone()?;
        let Some(found) = look(&bad.path)?.filter(|found| id_of(found) == hashed.id) else {
            return Ok(None);
        };
        let stamp = jiff::Timestamp::now().as_nanosecond();
        let aside = self.root.join(format!("damaged/{}-{stamp}", bad.digest));
        // The inode must outlive its names: a pod may have it mapped, and someone may look into it.
        fs::hard_link(&bad.path, &aside).at("link", &aside)?;
        let blob = self.blob_path(bad.digest);
        if look(&blob)?.is_some_and(|blob| blob.ino() == found.ino()) {
            fs::remove_file(&blob).at("remove", &blob)?;
            sync_parent(&blob).at("sync the folder of", &blob)?;
        }
        fault::point("verify.set_aside");
        Ok(Some(Damaged {
            sha256: bad.digest,
            got: hashed.got,
            snapshots: self.withdraw_all(bad.digest, Some(found.ino()))?,
            set_aside: Some(aside),
        }))
    }

    /// Withdraws the snapshots that lack the file with this digest; `None` if there are none by now.
    fn withdraw_missing(&self, digest: Digest) -> Result<Option<Damaged>, StoreError> {
        let _alone = self.lock_alone()?;
        let snapshots = self.withdraw_all(digest, None)?;
        Ok((!snapshots.is_empty()).then_some(Damaged {
            sha256: digest,
            got: None,
            snapshots,
            set_aside: None,
        }))
    }

    /// Sets the blob `digest` aside if its length alone tells that it is damaged.
    pub(super) fn set_aside_other_length(
        &self,
        digest: Digest,
        size: u64,
    ) -> Result<(), StoreError> {
        let path = self.blob_path(digest);
        let Some(found) = look(&path)?.filter(|found| found.len() != size) else {
            return Ok(());
        };
        let (id, got) = (id_of(&found), None);
        if self
            .set_aside(&Target { path, digest }, &Hashed { id, got })?
            .is_some()
        {
            tracing::error!(sha256 = %digest, "blob of a wrong length set aside");
        }
        Ok(())
    }

    /// Withdraws what a killed process set the blob of aside, but did not come to: such a blob still has
    /// a name in a tree.
    pub(super) fn finish_set_aside(&self) -> Result<(), StoreError> {
        let damaged = entries(&self.root.join("damaged"))?;
        if damaged.is_empty() {
            return Ok(());
        }
        let _alone = self.lock_alone()?;
        for entry in damaged {
            let name = entry.file_name();
            let digest = name
                .to_str()
                .and_then(|name| name.split('-').next()?.parse::<Digest>().ok());
            let metadata = fs::symlink_metadata(entry.path())
                .ok()
                .filter(|metadata| metadata.nlink() > 1);
            let (Some(digest), Some(metadata)) = (digest, metadata) else {
                continue;
            };
            let blob = self.blob_path(digest);
            if fs::symlink_metadata(&blob).is_ok_and(|found| found.ino() == metadata.ino()) {
                fs::remove_file(&blob).at("remove", &blob)?;
            }
            for id in self.withdraw_all(digest, Some(metadata.ino()))? {
                tracing::warn!(snapshot = %id, sha256 = %digest, "snapshot with a damaged blob withdrawn");
            }
            self.drop_from_withdrawn(digest, metadata.ino())?;
        }
        Ok(())
    }

    /// Takes a damaged file out of the trees that were withdrawn before it could be.
    fn drop_from_withdrawn(&self, digest: Digest, bad: u64) -> Result<(), StoreError> {
        for entry in entries(&self.root.join("snapshots"))? {
            let dir = entry.path();
            let Some((manifest, _)) = read_manifest(&dir.join("withdrawn.json"))? else {
                continue;
            };
            for file in manifest.files.iter().filter(|file| file.sha256 == digest) {
                let path = dir.join("tree").join(&file.path);
                if fs::symlink_metadata(&path).is_ok_and(|found| found.ino() == bad) {
                    fs::remove_file(&path).at("remove", &path)?;
                }
            }
        }
        Ok(())
    }

    /// Withdraws every snapshot that holds the damaged inode, or lacks the file. The caller holds the
    /// store's lock alone.
    fn withdraw_all(
        &self,
        digest: Digest,
        bad: Option<u64>,
    ) -> Result<Vec<SnapshotId>, StoreError> {
        let mut withdrawn = Vec::new();
        for snapshot in self.snapshots()? {
            if self.withdraw_if_bad(&snapshot, digest, bad)? {
                withdrawn.push(snapshot.manifest.snapshot);
            }
        }
        if let Some(bad) = bad {
            self.drop_from_volumes(bad)?;
        }
        Ok(withdrawn)
    }

    /// Takes back that a snapshot is here. Its tree stays, for it may be in use.
    fn withdraw(&self, id: &SnapshotId) -> Result<(), StoreError> {
        let dir = self.snapshot_dir(id);
        let manifest = dir.join("manifest.json");
        fs::rename(&manifest, dir.join("withdrawn.json")).at("withdraw", &manifest)?;
        sync_parent(&manifest).at("sync the folder of", &manifest)?;
        fault::point("verify.withdrawn");
        Ok(())
    }

    /// Withdraws a snapshot for which an uploader's word was taken: it is no pod's.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn withdraw_if_believed(&self, id: &SnapshotId) -> Result<(), StoreError> {
        let believed = || {
            let published = self.published(id)?;
            Ok::<_, StoreError>(published.is_some_and(|(manifest, _)| manifest.is_believed()))
        };
        if believed()? {
            let _alone = self.lock_alone()?;
            if believed()? {
                self.withdraw(id)?;
            }
        }
        Ok(())
    }

    /// Withdraws a snapshot if its file with this digest is the damaged inode, or missing. The file
    /// leaves the tree, so that nobody opens wrong bytes; the tree stays, for it may be mounted.
    fn withdraw_if_bad(
        &self,
        snapshot: &Snapshot,
        digest: Digest,
        bad: Option<u64>,
    ) -> Result<bool, StoreError> {
        let mut found = false;
        for file in snapshot
            .manifest
            .files
            .iter()
            .filter(|file| file.sha256 == digest)
        {
            let path = snapshot.path.join(&file.path);
            let inode = look(&path)?.map(|metadata| metadata.ino());
            if inode.is_some() && inode != bad {
                continue;
            }
            if !found {
                // The manifest first: a snapshot without it is not here, whatever happens next.
                self.withdraw(&snapshot.manifest.snapshot)?;
                found = true;
            }
            if inode.is_some() {
                fs::remove_file(&path).at("remove", &path)?;
            }
        }
        Ok(found)
    }
}

/// What came of hashing a file.
struct Hashed {
    /// Which one it was: device and inode. Its name may stand for another by now.
    id: (u64, u64),
    /// `None` if the disk does not give its bytes.
    got: Option<Digest>,
}

/// When a file in `damaged/` was set aside, by the stamp in its name.
pub(super) fn set_aside_at(path: &Path) -> Option<SystemTime> {
    let (_, stamp) = path.file_name()?.to_str()?.split_once('-')?;
    let nanoseconds = Duration::from_nanos(stamp.parse().ok()?);
    SystemTime::UNIX_EPOCH.checked_add(nanoseconds)
}

fn id_of(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Whether a read failed because of the bytes on disk, and not for want of something else.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    // EUCLEAN and EBADMSG: what ext4 and XFS say to a checksum that does not hold.
    matches!(
        errno,
        Some(Errno::EIO | Errno::EUCLEAN | Errno::EBADMSG | Errno::ENODATA)
    )
}

fn hash_file(
    path: &Path,
    bytes: &mut u64,
    pace: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> io::Result<ControlFlow<(), Hashed>> {
    let mut file = File::open(path)?;
    let id = id_of(&file.metadata()?);
    let mut verifier = Verifier::new(0, Claims::default());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if is_damage(&error) => {
                tracing::warn!(path = %path.display(), %error, "blob unreadable");
                return Ok(ControlFlow::Continue(Hashed { id, got: None }));
            }
            Err(error) => return Err(error),
        };
        verifier.update(&buffer[..read]);
        *bytes += read as u64;
        if pace(read as u64).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    let got = Some(verifier.finish().map_err(io::Error::other)?);
    Ok(ControlFlow::Continue(Hashed { id, got }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_disk_says_of_its_bytes_is_damage() {
        let says = |errno: Errno| is_damage(&errno.into());
        let bad = [Errno::EIO, Errno::EUCLEAN, Errno::EBADMSG, Errno::ENODATA];
        let other = [Errno::EMFILE, Errno::EACCES, Errno::ENOMEM, Errno::EISDIR];
        assert!(bad.into_iter().all(says));
        assert!(!other.into_iter().any(says));
    }
}
