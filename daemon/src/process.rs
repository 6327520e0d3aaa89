//! What a process sets up for itself.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Raises the limit of open files as far as it goes: a fetch holds one for each connection and file.
pub fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!(%error, "limit of open files not raised");
    }
}

/// Keeps up to 32 MiB of freed memory for the next who asks: the buffers of connections come and go all the time, and memory
/// that goes back to the system in between costs a page fault for each of its pages.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code, reason = "no crate wraps mallopt")]
pub fn keep_freed_memory() {
    use nix::libc::{M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, mallopt};

    const KEPT: i32 = 32 << 20;
    // SAFETY: it changes numbers of the allocator, under its own lock.
    let set =
        unsafe { mallopt(M_TRIM_THRESHOLD, KEPT) != 0 && mallopt(M_MMAP_THRESHOLD, KEPT) != 0 };
    if !set {
        tracing::debug!("freed memory goes back to the system as ever");
    }
}

/// Other allocators decide by themselves what they keep.
#[cfg(not(target_env = "gnu"))]
pub fn keep_freed_memory() {}

/// SIGTERM and SIGINT, which mean the same here. From now on they are caught.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches them.
    ///
    /// # Errors
    ///
    /// What the system says if it does not let us.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
