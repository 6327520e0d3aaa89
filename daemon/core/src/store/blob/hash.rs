//! Hashing a part front to back, close behind those who write it.

use std::os::unix::fs::FileExt;

use super::super::{At, StoreError, is_damage};
use super::Part;
use super::journal::{Journal, Record, checksum};
use crate::buffers::Buffer;
use crate::digest::{ClaimMismatch, Digest, Verifier};

/// Bytes that are hashed at a time: they stay in a core's second-level cache.
const HASH_BYTES: usize = 256 << 10;

/// Bytes that are hashed at most between two looks at whether the download was given up: 8 MiB, some
/// milliseconds.
pub(super) const RUN_BYTES: u64 = 8 << 20;

/// Why a part's bytes have no digest.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// They are not what the source claims. The part must be discarded.
    #[error(transparent)]
    Mismatch(#[from] ClaimMismatch),
    /// Bytes that the journal promised are not on disk. They were struck off: stage the part again.
    #[error("{bytes} bytes of an earlier run are damaged")]
    Torn {
        /// How many.
        bytes: u64,
    },
    /// [`Part::close`] was called first.
    #[error("the download was given up")]
    Closed,
    /// They cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the hasher takes next.
pub(super) enum Next {
    /// A block from memory.
    Held(Buffer),
    /// Bytes from the page cache, or of an earlier process from the disk, that end there.
    OnDisk(u64),
}

impl Part {
    /// Hashes the file front to back, following the writers, until its last byte is there.
    ///
    /// Most bytes are still in memory. Others are read back from the page cache moments after they were written; only
    /// those of an earlier process come from the disk, and are checked against the journal.
    ///
    /// # Errors
    ///
    /// [`HashError`]; after [`HashError::Mismatch`] call [`Part::discard`].
    pub fn hash(&self, mut verifier: Verifier) -> Result<Digest, HashError> {
        let mut buffer = Vec::new();
        let mut at = 0;
        while at < self.size {
            let end = match self.next(at)? {
                Next::Held(block) => {
                    at += block.len() as u64;
                    verifier.update_block(block);
                    continue;
                }
                Next::OnDisk(end) => end,
            };
            while at < end {
                at = match self.resumed_at(at) {
                    Some(record) => self.hash_resumed(record, &mut verifier, &mut buffer)?,
                    None => {
                        let next = self.next_resumed(at).min(end).min(at + HASH_BYTES as u64);
                        let length = usize::try_from(next - at).expect("at most HASH_BYTES");
                        buffer.resize(buffer.len().max(length), 0);
                        let piece = &mut buffer[..length];
                        self.read_fresh(piece, at)?;
                        verifier.update(piece);
                        next
                    }
                };
            }
        }
        Ok(verifier.finish()?)
    }

    /// Reads bytes that this process wrote: no journal tells others which of them the disk lost.
    fn read_fresh(&self, piece: &mut [u8], at: u64) -> Result<(), HashError> {
        match self.file.read_exact_at(piece, at) {
            Err(error) if is_damage(&error) => {
                tracing::warn!(path = %self.path.display(), %error, "part unreadable, discarded");
                let bytes = self.present();
                self.discard()?;
                Err(HashError::Torn { bytes })
            }
            read => Ok(read.at("read", &self.path)?),
        }
    }

    /// Waits for the bytes at `at`, up to which all are hashed.
    pub(super) fn next(&self, at: u64) -> Result<Next, HashError> {
        let mut state = self.state();
        state.hashed = at;
        self.got_on.notify_waiters();
        loop {
            // First: whoever gave up waits for the claim, or somebody else does.
            if state.closed {
                return Err(HashError::Closed);
            }
            if let Some(block) = state.held.remove(&at) {
                return Ok(Next::Held(block));
            }
            let end = state.present.end_of_run(at).min(at + RUN_BYTES);
            if end > at {
                let held = state.held.range(at..end).next();
                return Ok(Next::OnDisk(held.map_or(end, |(start, _)| *start)));
            }
            state = self.wait(state);
        }
    }

    fn resumed_at(&self, at: u64) -> Option<&Record> {
        let found = self
            .resumed
            .binary_search_by_key(&at, |record| record.range.start);
        found.ok().map(|index| &self.resumed[index])
    }

    fn next_resumed(&self, at: u64) -> u64 {
        let index = self
            .resumed
            .partition_point(|record| record.range.start <= at);
        self.resumed
            .get(index)
            .map_or(u64::MAX, |record| record.range.start)
    }

    fn hash_resumed(
        &self,
        record: &Record,
        verifier: &mut Verifier,
        buffer: &mut Vec<u8>,
    ) -> Result<u64, HashError> {
        let length =
            usize::try_from(record.range.end - record.range.start).expect("a block fits in memory");
        buffer.resize(length.max(HASH_BYTES), 0);
        let block = &mut buffer[..length];
        if !self.holds(record, block)? {
            self.state().discarded = true;
            return Err(HashError::Torn {
                bytes: self.strike_torn_off()?,
            });
        }
        verifier.update(block);
        Ok(record.range.end)
    }

    /// Reads the bytes of `record` into `block`. False if they are not those that were written.
    pub(super) fn holds(&self, record: &Record, block: &mut [u8]) -> Result<bool, StoreError> {
        match self.file.read_exact_at(block, record.range.start) {
            Err(error) if is_damage(&error) => {
                let (path, at) = (self.path.display(), record.range.start);
                tracing::warn!(%path, at, %error, "block of an earlier run unreadable");
                Ok(false)
            }
            read => {
                read.at("read", &self.path)?;
                Ok(checksum(block) == record.checksum)
            }
        }
    }

    /// Rewrites the journal without the blocks of an earlier process that are not on disk as promised.
    pub(super) fn strike_torn_off(&self) -> Result<u64, HashError> {
        let mut journal = self.journal.lock().expect("no holder of this lock panics");
        let journal_path = Journal::path_of(&self.path);
        let (_, all) =
            Journal::open(journal_path, self.size).at("read the journal of", &self.path)?;
        let mut sound = Vec::with_capacity(all.len());
        let mut torn = 0;
        for record in all {
            if self.state().closed {
                return Err(HashError::Closed);
            }
            let bytes = record.range.end - record.range.start;
            let mut block = vec![0; usize::try_from(bytes).expect("a block fits in memory")];
            if self.holds(&record, &mut block)? {
                sound.push(record);
            } else {
                torn += bytes;
            }
        }
        journal
            .rewrite(&sound)
            .at("write the journal of", &self.path)?;
        Ok(torn)
    }
}
