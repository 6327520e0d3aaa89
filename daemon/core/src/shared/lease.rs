//! What nodes use now: the collector removes none of it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::{At, SharedError, SharedStore, new_file};
use crate::fault;
use crate::store::StageKey;

/// The blobs that a fetch uses. It holds as long as its content changes: call [`SharedLease::beat`] within the
/// time that others take for silence. Remove it with [`SharedLease::end`].
#[derive(Debug)]
pub struct SharedLease {
    path: PathBuf,
}

/// A lease as the collector finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FoundLease {
    pub(super) path: PathBuf,
    /// Changes while its owner lives.
    pub(super) beat: String,
    keys: HashSet<String>,
    /// It has more keys than were read.
    cut_off: bool,
}

impl FoundLease {
    pub(super) fn lists(&self, key: &str) -> bool {
        self.cut_off || self.keys.contains(key)
    }
}

/// The most that is read of a lease: 100,000 keys.
const LEASE_BYTES: u64 = 8 << 20;

impl SharedStore {
    /// Leases blobs, before they are looked for.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn lease(&self, keys: &[StageKey], owner: &str) -> Result<SharedLease, SharedError> {
        let path = self.root.join(format!("leases/{}", uuid::Uuid::new_v4()));
        let mut text = beat_line(0, owner);
        for key in keys {
            text.push_str(&key.to_string());
            text.push('\n');
        }
        // A name of its own from the first: half a lease protects half, and its owner does not look yet.
        let written = new_file(&path).and_then(|mut file| file.write_all(text.as_bytes()));
        written.at("write", &path)?;
        fault::point("shared.leased");
        Ok(SharedLease { path })
    }

    /// The leases that there are, of living owners and dead ones.
    pub(super) fn leases(&self) -> Result<Vec<FoundLease>, SharedError> {
        let folder = self.root.join("leases");
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).at("list", &folder)? {
            let path = entry.at("list", &folder)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if uuid::Uuid::parse_str(&name).is_err() {
                continue;
            }
            if let Some(lease) = read_lease(&path).at("read", &path)? {
                found.push(lease);
            }
        }
        Ok(found)
    }
}

fn beat_line(beat: u64, owner: &str) -> String {
    format!("{beat:020} {owner}\n")
}

fn read_lease(path: &Path) -> io::Result<Option<FoundLease>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let opened = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // A link is none of ours.
        Err(error) if error.raw_os_error() == Some(nix::libc::ELOOP) => return Ok(None),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(LEASE_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines().map(str::to_owned);
    Ok(Some(FoundLease {
        path: path.to_owned(),
        beat: lines.next().unwrap_or_default(),
        keys: lines.collect(),
        cut_off: bytes.len() as u64 == LEASE_BYTES,
    }))
}

impl SharedLease {
    /// Says that it is still needed; `beat` is another number each time.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`], also if it was removed: then nothing is protected any more.
    pub fn beat(&self, beat: u64) -> Result<(), SharedError> {
        let file = File::options().write(true).open(&self.path);
        let file = file.at("open", &self.path)?;
        let text = format!("{beat:020}");
        file.write_all_at(text.as_bytes(), 0)
            .at("write", &self.path)
    }

    /// Lets go.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn end(self) -> Result<(), SharedError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.at("remove", &self.path),
        }
    }
}
