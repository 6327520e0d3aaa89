//! Small things that the store remembers: what names resolved to, which digest an origin's name for
//! some bytes stood for, and which fetches are under way.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::evict::{look, remove_if_there};
use super::pin::Holder;
use super::{
    At, Store, StoreError, Survives, entries, make_dirs, symlink_in_folder, with_temporary,
    write_whole,
};
use crate::digest::Digest;
use crate::fault;
use crate::model::{ModelRef, Patterns, Revision, Scheme, SnapshotId};
use crate::source::{RemoteFile, Vouched};

/// What a model's name stood for when it was last resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reference {
    pub(super) revision: Revision,
    pub(super) snapshot: SnapshotId,
}

/// A fetch under way: what was asked for, so that a new process can go on with it. Never a secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FetchRecord {
    /// The model as it was typed.
    pub model: ModelRef,
    /// Which files.
    pub patterns: Patterns,
    /// Who is to hold it when it is published.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "holder_text")]
    pub pin: Option<Holder>,
}

mod holder_text {
    use super::Holder;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        holder: &Option<Holder>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        holder
            .as_ref()
            .map(ToString::to_string)
            .serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Holder>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(serde::de::Error::custom))
            .transpose()
    }
}

/// What may stand in a file name as it is.
const KEEP: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// One file name for any text. Short texts stay readable.
pub(crate) fn file_name(text: &str) -> String {
    let encoded = utf8_percent_encode(text, KEEP).to_string();
    if encoded.len() > 200 || encoded.starts_with('.') {
        return Digest::of(text.as_bytes()).to_string();
    }
    encoded
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    match fs::read(path) {
        // A record is a convenience: one that cannot be read is as good as none.
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("read", path),
    }
}

/// What a symlink that stands for `digest` leads to, which is no file: the shortest text of it. One of up to 59 bytes lies
/// in the inode, so that it costs one change of the file system, where a file costs three.
fn known_target(digest: Digest) -> String {
    URL_SAFE_NO_PAD.encode(digest.as_bytes())
}

fn read_known(path: &Path) -> Result<Option<Digest>, StoreError> {
    let target = match fs::read_link(path) {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // Not a symlink: a file, as earlier versions wrote.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => return read_json(path),
        Err(error) => return Err(error).at("read", path),
    };
    let bytes = URL_SAFE_NO_PAD.decode(target.as_os_str().as_bytes()).ok();
    let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
    Ok(bytes.map(Digest::from_bytes))
}

/// Whether a name is one that a write uses until it is whole.
fn is_temporary(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| uuid::Uuid::parse_str(ending).is_ok())
}

impl Store {
    fn write_json<T: Serialize>(
        &self,
        path: &Path,
        value: &T,
        survives: Survives,
    ) -> Result<(), StoreError> {
        let parent = path.parent().unwrap_or(path);
        let bytes = serde_json::to_vec(value)
            .map_err(io::Error::other)
            .at("write", path)?;
        // Shared, so that what the collector finds half written is a dead process's.
        let _shared = self.lock_shared()?;
        make_dirs(parent)
            .and_then(|()| write_whole(path, &bytes, survives))
            .at("write", path)
    }

    /// Removes what killed processes left half written. The caller holds the store's lock alone.
    pub(super) fn drop_temporaries(&self) -> Result<(), StoreError> {
        let mut folders = ["fetches", "known", "rates", "refs"]
            .map(|folder| self.root.join(folder))
            .to_vec();
        while let Some(folder) = folders.pop() {
            for entry in entries(&folder)? {
                let path = entry.path();
                if entry.file_type().at("look at", &path)?.is_dir() {
                    folders.push(path);
                } else if is_temporary(&path) {
                    fs::remove_file(&path).at("remove", &path)?;
                }
            }
        }
        Ok(())
    }

    fn ref_folder(&self, model: &ModelRef) -> PathBuf {
        let schemes = self.root.join("refs");
        let names = schemes.join(model.scheme().as_str());
        names.join(file_name(model.name()))
    }

    fn ref_path(&self, model: &ModelRef) -> PathBuf {
        self.ref_folder(model)
            .join(file_name(model.revision_or_default()))
    }

    /// What the model's name stood for when it was last resolved, if that is on record.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn last_resolved(&self, model: &ModelRef) -> Result<Option<Revision>, StoreError> {
        Ok(self.read_ref(model)?.map(|found| found.revision))
    }

    pub(super) fn read_ref(&self, model: &ModelRef) -> Result<Option<Reference>, StoreError> {
        read_json(&self.ref_path(model))
    }

    pub(super) fn write_ref(
        &self,
        model: &ModelRef,
        revision: &Revision,
        id: &SnapshotId,
    ) -> Result<(), StoreError> {
        let reference = Reference {
            revision: revision.clone(),
            snapshot: id.clone(),
        };
        let path = self.ref_path(model);
        if read_json(&path)?.is_some_and(|found: Reference| found == reference) {
            return Ok(());
        }
        self.write_json(&path, &reference, Survives::PowerLoss)?;
        fault::point("ref.written");
        Ok(())
    }

    /// Forgets what names resolved to, where no snapshot of that revision is left, whatever its patterns.
    pub(super) fn drop_stale_refs(&self) -> Result<(), StoreError> {
        let live = self.resolved()?;
        for scheme in entries(&self.root.join("refs"))? {
            for name in entries(&scheme.path())? {
                for revision in entries(&name.path())? {
                    let path = revision.path();
                    let reference: Option<Reference> = read_json(&path)?;
                    let live = reference.is_some_and(|found| {
                        // A withdrawn snapshot is no longer listed, but may come back.
                        live.contains(&(name.path(), found.revision))
                            || self.snapshot_dir(&found.snapshot).exists()
                    });
                    if !live {
                        fs::remove_file(&path).at("remove", &path)?;
                    }
                }
                let _ = fs::remove_dir(name.path());
            }
        }
        Ok(())
    }

    /// What the snapshots are of: the folder of a model's references, and a revision.
    fn resolved(&self) -> Result<HashSet<(PathBuf, Revision)>, StoreError> {
        let snapshots = self.snapshots()?;
        let resolved = snapshots.iter().filter_map(|snapshot| {
            let model = &snapshot.manifest.model;
            Some((self.ref_folder(model), model.pinned()?))
        });
        Ok(resolved.collect())
    }

    fn known_path(&self, identity: &str) -> PathBuf {
        let name = Digest::of(identity.as_bytes()).to_string();
        self.root.join("known").join(&name[..2]).join(&name)
    }

    /// The digest of the bytes that an origin calls `identity`, if they were hashed before.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn known(&self, identity: &str) -> Result<Option<Digest>, StoreError> {
        read_known(&self.known_path(identity))
    }

    /// The digest of a file's bytes, as far as it is known before they are fetched, and whether that is only an
    /// uploader's word.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn digest_of(&self, file: &RemoteFile) -> Result<Option<(Digest, bool)>, StoreError> {
        let claimed = |who| file.claims.sha256.filter(|_| file.vouched == who);
        if let Some(digest) = claimed(Vouched::BySource) {
            return Ok(Some((digest, false)));
        }
        let known = match &file.identity {
            Some(identity) => self.known(identity)?,
            None => None,
        };
        let known = known.map(|digest| (digest, false));
        Ok(known.or_else(|| claimed(Vouched::ByUploader).map(|digest| (digest, true))))
    }

    /// Remembers that what an origin calls `identity` has this digest. The caller holds the store's lock.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub(super) fn remember(&self, identity: &str, digest: Digest) -> Result<(), StoreError> {
        // Not synced, which would double what a small file costs: one that a power loss takes only means that the
        // bytes are fetched and hashed again.
        let path = self.known_path(identity);
        let target = known_target(digest);
        match symlink_in_folder(&target, &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if read_known(&path)? != Some(digest) {
                    let replaced = with_temporary(&path, |temporary| symlink(&target, temporary));
                    replaced.at("write", &path)?;
                }
            }
            written => written.at("write", &path)?,
        }
        fault::point("known.written");
        Ok(())
    }

    /// Forgets the origins' names of blobs that are gone.
    pub(super) fn drop_stale_known(&self) -> Result<(), StoreError> {
        for folder in entries(&self.root.join("known"))? {
            for entry in entries(&folder.path())? {
                let path = entry.path();
                let digest = read_known(&path)?;
                if digest.is_none_or(|digest| !self.has(digest)) {
                    fs::remove_file(&path).at("remove", &path)?;
                }
            }
        }
        Ok(())
    }

    /// Remembers at which rate, in bytes per second, a kind of source served.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn note_rate(&self, scheme: Scheme, bytes_per_second: f64) -> Result<(), StoreError> {
        let path = self.rate_path(scheme);
        self.write_json(&path, &bytes_per_second, Survives::ThisProcess)
    }

    /// The rate that [`Store::note_rate`] remembered last.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn rate(&self, scheme: Scheme) -> Result<Option<f64>, StoreError> {
        read_json(&self.rate_path(scheme))
    }

    fn rate_path(&self, scheme: Scheme) -> PathBuf {
        self.root.join("rates").join(scheme.as_str())
    }

    fn fetch_path(&self, record: &FetchRecord) -> PathBuf {
        let key = serde_json::json!([
            record.model,
            record.patterns,
            record.pin.as_ref().map(ToString::to_string)
        ]);
        self.root.join(format!(
            "fetches/{}.json",
            Digest::of(key.to_string().as_bytes())
        ))
    }

    /// Remembers a fetch until [`Store::forget_fetch`]. One that is on record stays as it is: the time of its
    /// file is when it was asked for, however often it was tried since.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn record_fetch(&self, record: &FetchRecord) -> Result<(), StoreError> {
        let path = self.fetch_path(record);
        if read_json(&path)?.is_some_and(|found: FetchRecord| found == *record) {
            return Ok(());
        }
        self.write_json(&path, record, Survives::PowerLoss)?;
        fault::point("fetch.recorded");
        Ok(())
    }

    /// Forgets a fetch that has ended.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn forget_fetch(&self, record: &FetchRecord) -> Result<(), StoreError> {
        let path = self.fetch_path(record);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).at("remove", &path);
            }
            _ => {}
        }
        fault::point("fetch.forgotten");
        Ok(())
    }

    /// Forgets the fetches that were asked for longer ago than a partial download is kept: whoever waited
    /// for one has gone, or asks again. Returns how many.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn forget_stale_fetches(&self) -> Result<usize, StoreError> {
        let mut forgotten = 0;
        for entry in entries(&self.root.join("fetches"))? {
            let path = entry.path();
            if let Some(metadata) = look(&path)? {
                let asked = metadata.modified().at("look at", &path)?;
                let age = SystemTime::now().duration_since(asked);
                if age.unwrap_or_default() > self.limits.keep_partial {
                    remove_if_there(&path)?;
                    fault::point("fetch.forgotten");
                    forgotten += 1;
                }
            }
        }
        Ok(forgotten)
    }

    /// The fetches that were under way when their process ended.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn recorded_fetches(&self) -> Result<Vec<FetchRecord>, StoreError> {
        let mut records = Vec::new();
        for entry in entries(&self.root.join("fetches"))? {
            let path = entry.path();
            if !is_temporary(&path) {
                records.extend(read_json::<FetchRecord>(&path)?);
            }
        }
        Ok(records)
    }
}
