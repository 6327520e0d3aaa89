//! Which blobs a model needs, so that the collector knows, and users see what is here.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::{At, SharedError, SharedStore, make_dir, write_whole};
use crate::digest::Digest;
use crate::fault;
use crate::manifest::Manifest;
use crate::model::{ModelRef, Patterns, RelPath, SnapshotId};
use crate::store::{StageKey, file_name};

/// A model in the shared tier: what its blobs are called there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedSnapshot {
    /// Version of this file's form: 1.
    pub format: u32,
    /// The snapshot's id.
    pub snapshot: SnapshotId,
    /// The model at its resolved revision.
    pub model: ModelRef,
    /// Which files were asked for.
    #[serde(default)]
    pub patterns: Patterns,
    /// When it was written, in seconds since 1970 by its writer's clock.
    pub published_at: i64,
    /// The files, sorted by path.
    pub files: Vec<SharedFile>,
}

/// One file of a [`SharedSnapshot`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedFile {
    /// Path below the tree.
    pub path: RelPath,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 of the bytes, as the node hashed them that wrote this.
    pub sha256: Digest,
    /// The blob's directory; `None` for a file that is not shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl SharedSnapshot {
    /// What a node that has published `manifest` says of it; `key` names the blob of a file.
    #[must_use]
    pub fn of(manifest: &Manifest, key: impl Fn(&RelPath) -> Option<StageKey>) -> Self {
        let files = manifest.files.iter().map(|file| SharedFile {
            path: file.path.clone(),
            size: file.size,
            sha256: file.sha256,
            key: key(&file.path).map(|key| key.to_string()),
        });
        Self {
            format: 1,
            snapshot: manifest.snapshot.clone(),
            model: manifest.model.clone(),
            patterns: manifest.patterns.clone(),
            published_at: manifest.published_at,
            files: files.collect(),
        }
    }

    /// Bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

impl SharedStore {
    fn snapshot_path(&self, id: &SnapshotId) -> PathBuf {
        self.root.join(format!("snapshots/{id}.json"))
    }

    /// Notes what a model needs and that it is used now, and what `asked` stood for.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn publish(&self, snapshot: &SharedSnapshot, asked: &ModelRef) -> Result<(), SharedError> {
        let path = self.snapshot_path(&snapshot.snapshot);
        let here = read_json::<SharedSnapshot>(&path)?;
        match here {
            // The file system's own clock, or the client's: ages are compared with a file made in the same way.
            Some(here) if here.files == snapshot.files => touch(&path)?,
            _ => write_json(&path, snapshot)?,
        }
        fault::point("shared.published");
        let folder = self.root.join("refs").join(asked.scheme().as_str());
        make_dir(&folder)?;
        let folder = folder.join(file_name(asked.name()));
        make_dir(&folder)?;
        let path = folder.join(file_name(asked.revision_or_default()));
        let reference = snapshot.snapshot.to_string();
        if read_json::<String>(&path)?.is_none_or(|found| found != reference) {
            write_json(&path, &reference)?;
        }
        Ok(())
    }

    /// The models that are noted here, each with the file that says so, in no order. What cannot be read is left
    /// out.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn snapshots(&self) -> Result<Vec<(PathBuf, SharedSnapshot)>, SharedError> {
        let folder = self.root.join("snapshots");
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).at("list", &folder)? {
            let path = entry.at("list", &folder)?.path();
            let json = path.extension().is_some_and(|ending| ending == "json");
            if let Some(snapshot) = json.then(|| read_json(&path)).transpose()?.flatten() {
                found.push((path, snapshot));
            }
        }
        Ok(found)
    }
}

/// The most that is read of a note: 100,000 files.
const NOTE_BYTES: u64 = 64 << 20;

/// Says that it is used now.
fn touch(path: &Path) -> Result<(), SharedError> {
    let file = File::options().write(true).open(path).at("open", path)?;
    futimens(&file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW).at("touch", path)
}

pub(super) fn read_json<T: serde::de::DeserializeOwned>(
    path: &Path,
) -> Result<Option<T>, SharedError> {
    let read = || {
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let mut file = File::options();
        let file = file.read(true).custom_flags(flags.bits()).open(path)?;
        let mut bytes = Vec::new();
        file.take(NOTE_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    match read() {
        // A note is a convenience: one that cannot be read is as good as none.
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("read", path),
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), SharedError> {
    let bytes = serde_json::to_vec(value).map_err(io::Error::other);
    bytes
        .and_then(|bytes| write_whole(path, &bytes))
        .at("write", path)
}
