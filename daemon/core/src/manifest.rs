//! What a published snapshot holds: the files that we hashed ourselves.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::model::{ModelRef, Patterns, RelPath, SnapshotId};

/// `manifest.json` of a snapshot: its files, each with the digest of the bytes we verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this file's form: 1.
    pub format: u32,
    /// The snapshot's id.
    pub snapshot: SnapshotId,
    /// The model at its resolved revision.
    pub model: ModelRef,
    /// Which files were asked for.
    #[serde(default)]
    pub patterns: Patterns,
    /// When it was published, in seconds since 1970.
    pub published_at: i64,
    /// The files, sorted by path.
    pub files: Vec<FileEntry>,
}

/// One file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path below the tree.
    pub path: RelPath,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 of the bytes: the blob's name.
    pub sha256: Digest,
    /// Git object id, for files that live in git itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git_oid: Option<crate::digest::GitOid>,
    /// The Hub's Xet hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xet_hash: Option<String>,
    /// The bytes were here already, and that they are this file's is only an uploader's word: whoever asks may
    /// have no right to them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub believed: bool,
}

impl Manifest {
    /// The form that this version writes and reads.
    pub const FORMAT: u32 = 1;

    /// Whether an uploader's word was taken for some of the files.
    #[must_use]
    pub fn is_believed(&self) -> bool {
        self.files.iter().any(|file| file.believed)
    }

    /// Bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}
