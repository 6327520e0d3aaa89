//! Memory for blocks on their way, used again: fresh memory costs more than the copy itself.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use super::BLOCK_BYTES;

/// Blocks that nobody uses now. There are as many as were ever in use at once.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<Box<[u8]>>>);

/// The memory of one block. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Buffer {
    block: Box<[u8]>,
    length: usize,
    buffers: Arc<Buffers>,
}

impl Buffers {
    /// Memory for `length` bytes, at most [`BLOCK_BYTES`]. What is in it is left of others.
    pub(crate) fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let block = free.unwrap_or_else(|| vec![0; BLOCK_BYTES as usize].into_boxed_slice());
        assert!(length <= block.len(), "no more than a block");
        Buffer {
            block,
            length,
            buffers: Arc::clone(self),
        }
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
        let free = self.buffers.0.lock();
        let mut free = free.unwrap_or_else(PoisonError::into_inner);
        free.push(std::mem::take(&mut self.block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again() {
        let buffers = Arc::<Buffers>::default();
        let (one, other) = (buffers.take(5), buffers.take(BLOCK_BYTES as usize));
        assert_eq!((one.len(), other.len()), (5, BLOCK_BYTES as usize));
        drop((one, other));
        drop(bytes::Bytes::from_owner(buffers.take(7)));
        assert_eq!(buffers.0.lock().unwrap().len(), 2);
    }
}
