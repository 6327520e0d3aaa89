//! Hashing what is stored again, and setting aside what went bad.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

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
    /// [`StoreError::Io`] if the store itself cannot be read or changed; a blob that cannot be read is
    /// a damaged one.
    pub fn verify(
        &self,
        only: Option<&SnapshotId>,
        pace: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Verified, StoreError> {
        self.finish_set_aside()?;
        let (targets, missing) = self.targets(only)?;
        let mut verified = Verified::default();
        let mut bad: BTreeMap<Digest, (Option<Digest>, Option<PathBuf>)> = BTreeMap::new();
        for digest in missing {
            verified.checked += 1;
            bad.insert(digest, (None, None));
        }
        for target in targets {
            let got = match hash_file(&target.path, &mut verified.bytes, pace) {
                Ok(ControlFlow::Continue(digest)) => Some(digest),
                Ok(ControlFlow::Break(())) => break,
                // It was evicted since we looked.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    tracing::warn!(path = %target.path.display(), %error, "blob unreadable");
                    None
                }
            };
            verified.checked += 1;
            if got != Some(target.digest) {
                bad.insert(target.digest, (got, Some(target.path)));
            }
        }
        for (digest, (got, path)) in bad {
            let (snapshots, set_aside) = self.set_aside(digest, path)?;
            verified.damaged.push(Damaged {
                sha256: digest,
                got,
                snapshots,
                set_aside,
            });
        }
        Ok(verified)
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
                match fs::symlink_metadata(&path) {
                    Ok(metadata) if metadata.is_file() => {
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

    /// Takes a damaged blob, and the files of snapshots that share its bytes, out of use.
    fn set_aside(
        &self,
        digest: Digest,
        bad: Option<PathBuf>,
    ) -> Result<(Vec<SnapshotId>, Option<PathBuf>), StoreError> {
        let _alone = self.lock_alone()?;
        let bad_inode = bad
            .as_ref()
            .and_then(|path| fs::symlink_metadata(path).ok())
            .map(|m| m.ino());
        let mut kept = None;
        if let (Some(path), Some(inode)) = (&bad, bad_inode) {
            let stamp = jiff::Timestamp::now().as_nanosecond();
            let aside = self.root.join(format!("damaged/{digest}-{stamp}"));
            // The inode must outlive its names: a pod may have it mapped, and someone may look into it.
            fs::hard_link(path, &aside).at("link", &aside)?;
            let blob = self.blob_path(digest);
            if fs::symlink_metadata(&blob).is_ok_and(|metadata| metadata.ino() == inode) {
                fs::remove_file(&blob).at("remove", &blob)?;
                sync_parent(&blob).at("sync the folder of", &blob)?;
            }
            fault::point("verify.set_aside");
            kept = Some(aside);
        }
        Ok((self.withdraw_all(digest, bad_inode)?, kept))
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
            let inode = fs::symlink_metadata(&path)
                .ok()
                .map(|metadata| metadata.ino());
            if inode.is_some() && inode != bad {
                continue;
            }
            if !found {
                let dir = self.snapshot_dir(&snapshot.manifest.snapshot);
                let manifest = dir.join("manifest.json");
                // The manifest first: a snapshot without it is not here, whatever happens next.
                fs::rename(&manifest, dir.join("withdrawn.json")).at("withdraw", &manifest)?;
                sync_parent(&manifest).at("sync the folder of", &manifest)?;
                fault::point("verify.withdrawn");
                found = true;
            }
            if inode.is_some() {
                fs::remove_file(&path).at("remove", &path)?;
            }
        }
        Ok(found)
    }
}

fn hash_file(
    path: &std::path::Path,
    bytes: &mut u64,
    pace: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> io::Result<ControlFlow<(), Digest>> {
    let mut file = File::open(path)?;
    let mut verifier = Verifier::new(0, Claims::default());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        verifier.update(&buffer[..read]);
        *bytes += read as u64;
        if pace(read as u64).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    let digest = verifier.finish().map_err(io::Error::other)?;
    Ok(ControlFlow::Continue(digest))
}
