//! Disk space for the missing files of one fetch.

use std::collections::HashSet;
use std::sync::Mutex;

use crate::source::RemoteFile;
use crate::store::{Room, StageKey, Store};

/// The room for the missing files of a fetch.
pub(super) struct Reserved {
    room: Room,
    /// What has taken its room: files with the same bytes have one room between them.
    taken: Mutex<HashSet<StageKey>>,
}

impl Reserved {
    pub(super) fn new(room: Room) -> Self {
        let taken = Mutex::default();
        Self { room, taken }
    }

    /// Gives back the room of a file that is staged next: no more than was reserved, for the rest is room for
    /// other files.
    pub(super) fn take(&self, store: &Store, file: &RemoteFile) {
        let key = StageKey::of(file);
        let staged = store.staged_bytes(&key);
        let mut taken = self.taken.lock().expect("no holder of this lock panics");
        if taken.insert(key) {
            self.room.take(file.size.saturating_sub(staged));
        }
    }
}
