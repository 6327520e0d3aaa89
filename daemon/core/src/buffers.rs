//! Memory for blocks on their way, used again: fresh memory costs more than the copy itself.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory in blocks of one size. It goes back to the system once none of it is in use.
#[derive(Debug)]
pub(crate) struct Buffers {
    block_bytes: usize,
    blocks: Mutex<Blocks>,
}

#[derive(Debug, Default)]
struct Blocks {
    free: Vec<Box<[u8]>>,
    in_use: usize,
}

/// The memory of one block. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Buffer {
    block: Box<[u8]>,
    length: usize,
    buffers: Arc<Buffers>,
}

impl Buffers {
    pub(crate) fn new(block_bytes: usize) -> Arc<Self> {
        let blocks = Mutex::default();
        Arc::new(Self {
            block_bytes,
            blocks,
        })
    }

    /// Memory for `length` bytes, at most a block. What is in it is left of others.
    pub(crate) fn take(self: &Arc<Self>, length: usize) -> Buffer {
        assert!(length <= self.block_bytes, "no more than a block");
        let free = {
            let mut blocks = self.blocks();
            blocks.in_use += 1;
            blocks.free.pop()
        };
        let block = free.unwrap_or_else(|| vec![0; self.block_bytes].into_boxed_slice());
        Buffer {
            block,
            length,
            buffers: Arc::clone(self),
        }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// Appends as much of `bytes` as there is room for; returns how much that is.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.block.len() - self.length);
        self.block[self.length..self.length + taken].copy_from_slice(&bytes[..taken]);
        self.length += taken;
        taken
    }

    pub(crate) fn is_full(&self) -> bool {
        self.length == self.block.len()
    }

    /// Takes out all bytes.
    pub(crate) fn clear(&mut self) {
        self.length = 0;
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.block[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.block[..self.length]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let block = std::mem::take(&mut self.block);
        let mut blocks = self.buffers.blocks();
        blocks.free.push(block);
        blocks.in_use -= 1;
        if blocks.in_use == 0 {
            blocks.free = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_takes_what_fits() {
        let mut buffer = Buffers::new(4).take(0);

        assert_eq!(buffer.fill(b"abc"), 3);
        assert!(!buffer.is_full());
        assert_eq!(buffer.fill(b"def"), 1);
        assert!(buffer.is_full());
        assert_eq!(&*buffer, b"abcd");
        buffer.clear();
        assert_eq!(buffer.fill(b"x"), 1);
        assert_eq!(&*buffer, b"x");
    }

    #[test]
    fn memory_is_used_again_and_given_back_when_nobody_needs_it() {
        let buffers = Buffers::new(4);
        let first = buffers.take(4);
        let memory = first.as_ptr();
        let second = buffers.take(4);
        drop(first);

        assert_eq!(buffers.take(4).as_ptr(), memory);
        drop(second);
        assert!(buffers.blocks().free.is_empty());
    }
}
