//! Pins: files that say who needs a snapshot. They outlive every process.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use super::{At, Store, StoreError, entries, make_dirs, sync_parent};
use crate::fault;
use crate::model::SnapshotId;

/// Who needs a snapshot: `csi/<volume id>` or `operator/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder(String);

/// A text does not name a holder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` names no holder: csi/<volume id> or operator/<name>, of letters, digits, `.`, `_` and `-`"
)]
pub struct HolderError(String);

impl Holder {
    /// A holder that an operator named.
    ///
    /// # Errors
    ///
    /// [`HolderError`] for anything but 1 to 128 letters, digits, `.`, `_` and `-`.
    pub fn operator(name: &str) -> Result<Self, HolderError> {
        format!("operator/{name}").parse()
    }

    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is a pod's volume.
    #[must_use]
    pub fn is_volume(&self) -> bool {
        self.0.starts_with("csi/")
    }
}

impl FromStr for Holder {
    type Err = HolderError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        match text.split_once('/') {
            Some(("csi" | "operator", name))
                if (1..=128).contains(&name.len())
                    && !name.starts_with('.')
                    && name.bytes().all(allowed) =>
            {
                Ok(Self(text.to_owned()))
            }
            _ => Err(HolderError(text.to_owned())),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Store {
    /// Says that `holder` needs the snapshot. Saying it twice is the same as once.
    ///
    /// # Errors
    ///
    /// [`StoreError::Missing`] if the snapshot is not here, else [`StoreError::Io`].
    pub fn pin(&self, id: &SnapshotId, holder: &Holder) -> Result<(), StoreError> {
        // With the lock held nobody evicts between the look and the pin.
        let _shared = self.lock_shared()?;
        if self.published(id)?.is_none() {
            return Err(StoreError::Missing(id.to_string()));
        }
        self.write_pin(id, holder)
    }

    /// Writes the pin. The caller holds the store's lock.
    pub(super) fn write_pin(&self, id: &SnapshotId, holder: &Holder) -> Result<(), StoreError> {
        let path = self.pin_path(id, holder);
        let parent = path.parent().unwrap_or(self.root());
        loop {
            make_dirs(parent).at("create", parent)?;
            match File::options().create(true).append(true).open(&path) {
                Ok(_) => break,
                // The holder's folder went with another pin just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).at("write", &path),
            }
        }
        // No mount outlives a power loss, so a mount's pin need not.
        if !holder.is_volume() {
            sync_parent(&path).at("write", &path)?;
        }
        fault::point("pin.written");
        Ok(())
    }

    /// Says that `holder` no longer needs the snapshot. False if it did not hold it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn unpin(&self, id: &SnapshotId, holder: &Holder) -> Result<bool, StoreError> {
        let path = self.pin_path(id, holder);
        let removed = match fs::remove_file(&path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).at("remove", &path),
        };
        // The holder's folder goes with its last pin.
        let _ = fs::remove_dir(path.parent().unwrap_or(&path));
        Ok(removed)
    }

    /// Lets go of everything that `holder` holds, its volume's directory too; returns how many
    /// snapshots it held. What it held must not be mounted any more. The pins go also if the directory
    /// cannot be deleted.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn release(&self, holder: &Holder) -> Result<u32, StoreError> {
        let mut released = 0;
        for id in self.pinned_by(holder)? {
            released += u32::from(self.unpin(&id, holder)?);
        }
        self.remove_volume(holder)?;
        Ok(released)
    }

    /// The snapshots that `holder` pins.
    pub(super) fn pinned_by(&self, holder: &Holder) -> Result<Vec<SnapshotId>, StoreError> {
        let pins = entries(&self.root.join("pins").join(&holder.0))?;
        let ids = pins.iter().filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.parse::<SnapshotId>().ok()
        });
        Ok(ids.collect())
    }

    /// What the operators' holders pin whose names begin with `prefix`.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn pins_of_operators(&self, prefix: &str) -> Result<Vec<(Holder, SnapshotId)>, StoreError> {
        let mut pins = Vec::new();
        for entry in entries(&self.root.join("pins/operator"))? {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(holder) = Holder::operator(&name)
                .ok()
                .filter(|_| name.starts_with(prefix))
            else {
                continue;
            };
            let ids = self.pinned_by(&holder)?.into_iter();
            pins.extend(ids.map(|id| (holder.clone(), id)));
        }
        pins.sort();
        Ok(pins)
    }

    /// Who needs the snapshot.
    pub(super) fn holders(&self, id: &SnapshotId) -> Result<Vec<Holder>, StoreError> {
        let mut holders = Vec::new();
        for kind in ["csi", "operator"] {
            for entry in entries(&self.root.join("pins").join(kind))? {
                let name = format!("{kind}/{}", entry.file_name().to_string_lossy());
                let pin = entry.path().join(id.as_str());
                // An error must not read as unpinned.
                if pin.try_exists().at("look at", &pin)? {
                    holders.extend(name.parse::<Holder>());
                }
            }
        }
        holders.sort();
        Ok(holders)
    }

    fn pin_path(&self, id: &SnapshotId, holder: &Holder) -> PathBuf {
        self.root.join("pins").join(&holder.0).join(id.as_str())
    }
}
