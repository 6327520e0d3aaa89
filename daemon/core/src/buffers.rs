//! Memory for blocks on their way, used again: fresh memory costs more than the copy itself.
//!
//! It is aligned as the disk wants it, so that a block can be written without the page cache.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Of addresses, offsets and lengths in direct I/O: 64 KiB, the largest page that a kernel has. No page is then written
/// both through the page cache and past it, where one might undo the other.
///
/// Source: open(2), "O_DIRECT", asks for less: the logical block size of the disk.
pub(crate) const ALIGNMENT: usize = 64 << 10;

/// Blocks that are kept while none is in use: small files take and give back one each, thousands of times.
const KEPT: usize = 8;

/// Memory in blocks of one size. All but a few blocks go back to the system once none is in use.
#[derive(Debug)]
pub(crate) struct Buffers {
    /// So many bytes may be in use before [`Buffer::is_spare`] says that they are too many.
    most_bytes: usize,
    blocks: Mutex<Blocks>,
}

#[derive(Debug)]
struct Blocks {
    /// Of a block that is taken next.
    block_bytes: usize,
    /// All of that size.
    free: Vec<Memory>,
    in_use_bytes: usize,
}

/// A block of memory that begins at a multiple of [`ALIGNMENT`].
#[derive(Debug, Default)]
struct Memory {
    bytes: Box<[u8]>,
    start: usize,
}

impl Memory {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + ALIGNMENT].into_boxed_slice();
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start }
    }

    fn length(&self) -> usize {
        self.bytes.len() - ALIGNMENT
    }
}

/// The memory of one block. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Memory,
    room: usize,
    length: usize,
    buffers: Arc<Buffers>,
}

impl Buffers {
    /// Blocks of `block_bytes`, of which `most` are plenty.
    pub(crate) fn new(block_bytes: usize, most: usize) -> Arc<Self> {
        Arc::new(Self {
            most_bytes: block_bytes.saturating_mul(most),
            blocks: Mutex::new(Blocks {
                block_bytes,
                free: Vec::new(),
                in_use_bytes: 0,
            }),
        })
    }

    /// Makes the blocks that are taken from now on so long. Others go back to the system once they are not in use.
    pub(crate) fn resize(&self, block_bytes: usize) {
        let mut blocks = self.blocks();
        if blocks.block_bytes != block_bytes {
            blocks.block_bytes = block_bytes;
            blocks.free = Vec::new();
        }
    }

    /// Memory for `length` bytes, at most a block. What is in it is left of others.
    pub(crate) fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let (room, free) = {
            let mut blocks = self.blocks();
            assert!(length <= blocks.block_bytes, "no more than a block");
            blocks.in_use_bytes += blocks.block_bytes;
            (blocks.block_bytes, blocks.free.pop())
        };
        Buffer {
            memory: free.unwrap_or_else(|| Memory::new(room)),
            room,
            length,
            buffers: Arc::clone(self),
        }
    }

    /// Memory to gather the bytes of a file from byte `at` on. It is full where the file's next block begins.
    pub(crate) fn gather(self: &Arc<Self>, at: u64) -> Buffer {
        let mut buffer = self.take(0);
        let before = at % buffer.room as u64;
        buffer.room -= usize::try_from(before).expect("less than a block");
        buffer
    }

    /// Whether what is begun now may soon find no memory: three quarters are in use.
    pub(crate) fn is_short(&self) -> bool {
        self.blocks().in_use_bytes > self.most_bytes / 4 * 3
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// Appends as much of `bytes` as there is room for; returns how much that is.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> usize {
        let from = self.length;
        let taken = bytes.len().min(self.room - from);
        self.length += taken;
        self[from..].copy_from_slice(&bytes[..taken]);
        taken
    }

    pub(crate) fn is_full(&self) -> bool {
        self.length == self.room
    }

    /// Whether others have memory enough without this.
    pub(crate) fn is_spare(&self) -> bool {
        self.buffers.blocks().in_use_bytes <= self.buffers.most_bytes
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes[self.memory.start..][..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes[self.memory.start..][..self.length]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        let mut blocks = self.buffers.blocks();
        blocks.in_use_bytes -= memory.length();
        if memory.length() == blocks.block_bytes {
            blocks.free.push(memory);
        }
        if blocks.in_use_bytes == 0 {
            blocks.free.truncate(KEPT);
            blocks.free.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_takes_what_fits() {
        let mut buffer = Buffers::new(4, 1).take(0);

        assert_eq!(buffer.fill(b"abc"), 3);
        assert!(!buffer.is_full());
        assert_eq!(buffer.fill(b"def"), 1);
        assert!(buffer.is_full());
        assert_eq!(&*buffer, b"abcd");
    }

    #[test]
    fn gathered_bytes_end_where_the_next_block_begins() {
        let buffers = Buffers::new(4, 1);
        for (at, fit) in [(0, 4), (1, 3), (7, 1), (8, 4)] {
            assert_eq!(buffers.gather(at).fill(b"abcde"), fit, "from byte {at} on");
        }
    }

    #[test]
    fn memory_is_aligned() {
        let buffers = Buffers::new(10_000, 1);
        let blocks: Vec<_> = (0..9).map(|_| buffers.take(10_000)).collect();
        for block in blocks {
            assert!(block.as_ptr().addr().is_multiple_of(ALIGNMENT));
        }
    }

    #[test]
    fn memory_is_spare_until_most_of_it_is_in_use() {
        let buffers = Buffers::new(4, 2);
        let first = buffers.take(4);
        let second = buffers.take(4);
        assert!(second.is_spare());
        let third = buffers.take(4);
        assert!(!second.is_spare());
        drop(third);
        assert!(first.is_spare());
    }

    #[test]
    fn blocks_of_another_size_count_and_are_not_used_again() {
        let buffers = Buffers::new(8, 2);
        let (old, kept) = (buffers.take(8), buffers.take(8));
        drop(old);
        buffers.resize(4);
        assert!(buffers.blocks().free.is_empty());
        let new: Vec<_> = (0..2).map(|_| buffers.take(4)).collect();
        assert_eq!(buffers.gather(7).fill(b"abcde"), 1);
        assert!(kept.is_spare());
        let more = buffers.take(4);
        assert!(!more.is_spare());
        drop(kept);
        assert!(more.is_spare());
        drop((new, more));
        assert!(buffers.blocks().free.iter().all(|free| free.length() == 4));
    }

    #[test]
    fn memory_is_used_again_and_given_back_when_nobody_needs_it() {
        let buffers = Buffers::new(4, 2);
        let mut blocks: Vec<_> = (0..3 * KEPT).map(|_| buffers.take(4)).collect();
        let first = blocks.remove(0);
        let memory = first.as_ptr();
        drop(first);

        assert_eq!(buffers.take(4).as_ptr(), memory);
        drop(blocks);
        assert_eq!(buffers.blocks().free.len(), KEPT);
    }
}
