//! The bytes of a part without the page cache.
//!
//! To write through the page cache costs a copy and the kernel's work on each page, ten times what the disk's own transfer
//! costs: with 2 cores and a disk of 1.7 GB/s 0.67 to 0.9 s of processor time for each GB, against 0.05 to 0.1. It also pushes out
//! what the pods of this node have there. The wall time is the same: it is the disk's.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::OFlag;

use crate::buffers::ALIGNMENT;

/// Fewer bytes go through the page cache: each direct write waits for the disk.
const LEAST_BYTES: usize = 64 << 10;

/// A second open file of a part, past the page cache.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// The file system took the flag, and then no write with it.
    refused: AtomicBool,
}

impl Direct {
    /// Opens `file` again. `None` where the file system has no direct I/O.
    pub(super) fn open(file: &File) -> Option<Self> {
        let mut options = File::options();
        options.read(true).write(true);
        options.custom_flags(OFlag::O_DIRECT.bits());
        // Not by its path, where another file may be by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = options.open(path).ok()?;
        let refused = AtomicBool::new(false);
        Some(Self { file, refused })
    }

    /// Writes `bytes` from byte `at` on: all that is aligned, and what is left at the end with `cached`, the same file
    /// through the page cache. False if they are not for direct I/O, and some may be written or none.
    pub(super) fn write(&self, cached: &File, bytes: &[u8], at: u64) -> io::Result<bool> {
        let whole = self.whole(bytes, at);
        if whole == 0 {
            return Ok(false);
        }
        match self.file.write_all_at(&bytes[..whole], at) {
            Err(error) if self.is_refusal(&error) => return Ok(false),
            written => written?,
        }
        cached.write_all_at(&bytes[whole..], at + whole as u64)?;
        Ok(true)
    }

    /// Fills `bytes` with those from byte `at` on, as far as they are aligned without the page cache.
    pub(super) fn read(&self, cached: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let whole = self.whole(bytes, at);
        let (aligned, rest) = bytes.split_at_mut(whole);
        match self.file.read_exact_at(aligned, at) {
            Err(error) if self.is_refusal(&error) => cached.read_exact_at(aligned, at)?,
            read => read?,
        }
        cached.read_exact_at(rest, at + whole as u64)
    }

    /// How many of `bytes` direct I/O can move.
    fn whole(&self, bytes: &[u8], at: u64) -> usize {
        let aligned =
            bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) && at.is_multiple_of(ALIGNMENT as u64);
        match aligned && bytes.len() >= LEAST_BYTES && !self.refused.load(Ordering::Relaxed) {
            true => bytes.len() - bytes.len() % ALIGNMENT,
            false => 0,
        }
    }

    /// Whether the file system, or a disk with larger blocks, does not do this. It is not asked again.
    fn is_refusal(&self, error: &io::Error) -> bool {
        let refused = error.kind() == io::ErrorKind::InvalidInput;
        if refused {
            self.refused.store(true, Ordering::Relaxed);
        }
        refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;

    #[test]
    fn a_file_system_that_takes_the_flag_and_no_write_is_not_asked_again() {
        // The one file that can be had anywhere and says EINVAL to a write.
        let refusing = || File::options().write(true).open("/proc/self/oom_score_adj");
        let direct = Direct {
            file: refusing().unwrap(),
            refused: AtomicBool::new(false),
        };
        let cached = tempfile::tempfile().unwrap();
        let block = Buffers::new(LEAST_BYTES, 1).take(LEAST_BYTES);

        assert!(!direct.write(&cached, &block, 0).unwrap());
        assert_eq!(direct.whole(&block, 0), 0, "it is asked again");
    }

    #[test]
    fn only_what_is_aligned_and_long_goes_past_the_page_cache() {
        let file = tempfile::tempfile().unwrap();
        let refused = AtomicBool::new(false);
        let direct = Direct { file, refused };
        let bytes = LEAST_BYTES + ALIGNMENT + 1;
        let block = Buffers::new(bytes, 1).take(bytes);

        assert_eq!(direct.whole(&block, 0), LEAST_BYTES + ALIGNMENT);
        assert_eq!(direct.whole(&block, 1), 0);
        assert_eq!(direct.whole(&block[1..], 0), 0);
        assert_eq!(direct.whole(&block[..LEAST_BYTES - 1], 0), 0);
    }
}
