//! Locks that die with their process: claims on blobs in the making, leases, the collector's lock.
//!
//! They are `flock`s, each on an open file of its own, so they also keep threads of one process apart.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// A lock that is held until it is dropped, or its process dies.
pub(crate) type Held = Flock<File>;

/// Takes the lock on `file`, or returns `None` at once if somebody else has it.
pub(crate) fn try_exclusive(file: File) -> io::Result<Option<Held>> {
    attempt(file, FlockArg::LockExclusiveNonblock)
}

/// Shares the lock on `file`, or returns `None` at once if somebody has it alone.
pub(crate) fn try_shared(file: File) -> io::Result<Option<Held>> {
    attempt(file, FlockArg::LockSharedNonblock)
}

fn attempt(file: File, how: FlockArg) -> io::Result<Option<Held>> {
    match Flock::lock(file, how) {
        Ok(held) => Ok(Some(held)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// Waits for the lock on `file`.
pub(crate) fn wait(file: File, how: FlockArg) -> io::Result<Held> {
    let mut file = file;
    loop {
        match Flock::lock(file, how) {
            Ok(held) => return Ok(held),
            Err((back, Errno::EINTR)) => file = back,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

/// Whether `path` still names the file that is open: it may have been renamed or replaced between
/// the open and the lock.
pub(crate) fn still_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(named) => Ok(named.ino() == open.ino() && named.dev() == open.dev()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
