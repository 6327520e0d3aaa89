//! Copying a piece from the shared tier.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::STEP_BYTES;
use crate::blocking;
use crate::buffers::Buffer;
use crate::fetch::progress::Meter;
use crate::shared::{BadBlock, Fill, SharedError, SharedStore, SharedTier, Sums, Trouble};
use crate::store::{Part, StoreError, is_damage};

/// Why a piece was not copied.
#[derive(Debug)]
pub(super) enum CopyError {
    Trouble(Trouble),
    Bad(BadBlock),
    Local(StoreError),
}

impl From<Trouble> for CopyError {
    fn from(error: Trouble) -> Self {
        Self::Trouble(error)
    }
}

/// One piece to copy. All of it lies in one segment.
pub(super) struct Copied {
    pub(super) tier: Arc<SharedTier>,
    pub(super) fill: Arc<Fill>,
    pub(super) sums: Arc<Sums>,
    pub(super) segment: usize,
    pub(super) range: Range<u64>,
    pub(super) part: Arc<Part>,
    pub(super) meter: Arc<Meter>,
    /// Bytes of this file that came from the shared tier.
    pub(super) copied: Arc<AtomicU64>,
}

impl Copied {
    pub(super) async fn run(self) -> Result<(), CopyError> {
        let _place = self.tier.copies().acquire().await;
        let _under_way = self.tier.rates().shared.begin();
        let fill = Arc::clone(&self.fill);
        let bad = CopyError::Bad(BadBlock {
            at: self.range.start,
        });
        let bytes = self.tier.run(move |_| fill.bytes()).await?;
        let bytes = Arc::new(bytes.ok_or(bad)?);
        for (index, block) in self.fill.blocks(self.segment).enumerate() {
            if block.start < self.range.end && block.end > self.range.start {
                self.copy(&bytes, index, block).await?;
            }
        }
        // They are in the local tier now: nobody here reads them from the shared one again.
        let range = self.range.clone();
        let forget = self.tier.run(move |_| {
            forget(&bytes, &range);
            Ok(())
        });
        let _ = forget.await;
        Ok(())
    }

    async fn copy(
        &self,
        bytes: &Arc<File>,
        index: usize,
        block: Range<u64>,
    ) -> Result<(), CopyError> {
        let data = match self.read(bytes, index, &block).await? {
            Ok(data) => data,
            Err(_) => {
                // On NFS it may be what was there before another node wrote it: ask the server.
                let (file, range) = (Arc::clone(bytes), block.clone());
                let forget = self.tier.run(move |_| {
                    forget(&file, &range);
                    Ok(())
                });
                forget.await?;
                let again = self.read(bytes, index, &block).await?;
                again.map_err(CopyError::Bad)?
            }
        };
        self.tier.rates().shared.count(data.len() as u64);
        // Before they are written: with the last of them the hasher is done, and nobody waits for us.
        let inside = block.start.max(self.range.start)..block.end.min(self.range.end);
        let copied = inside.end - inside.start;
        self.copied.fetch_add(copied, Ordering::Relaxed);
        self.meter.copied(copied);
        self.tier.metrics().shared_copied(copied);
        let part = Arc::clone(&self.part);
        // All of the block: what is here already stays as it is.
        let written = blocking::run(move || part.write_block(block.start, data)).await;
        written.map_err(CopyError::Local)
    }

    /// Reads one block, in small steps, and checks it: where many read from a slow tier, each step takes its time.
    async fn read(
        &self,
        file: &Arc<File>,
        index: usize,
        block: &Range<u64>,
    ) -> Result<Result<Buffer, BadBlock>, Trouble> {
        let length = usize::try_from(block.end - block.start).expect("a block fits in memory");
        let mut data = self.tier.buffers().take(length);
        for from in (0..length).step_by(STEP_BYTES) {
            let (file, at) = (Arc::clone(file), block.start + from as u64);
            let to = (from + STEP_BYTES).min(length);
            let read = self.tier.run(move |store| {
                let read = read_step(store, &file, at, &mut data[from..to])?;
                Ok((read, data))
            });
            let (read, filled) = read.await?;
            if !read {
                return Ok(Err(BadBlock { at: block.start }));
            }
            data = filled;
        }
        let sums = Arc::clone(&self.sums);
        let at = block.start;
        Ok(blocking::run(move || {
            let checked = sums.check(index, at, &data);
            checked.map(|()| data)
        })
        .await)
    }
}

/// Fills `step`, which begins at byte `at`. False if there are no such bytes.
fn read_step(
    store: &SharedStore,
    file: &File,
    at: u64,
    step: &mut [u8],
) -> Result<bool, SharedError> {
    match file.read_exact_at(step, at) {
        Ok(()) => Ok(true),
        Err(error) if is_damage(&error) || error.kind() == io::ErrorKind::UnexpectedEof => {
            Ok(false)
        }
        Err(source) => Err(SharedError::Io {
            op: "read a blob of",
            path: store.root().to_owned(),
            source,
        }),
    }
}

/// Drops a range of a file from the page cache.
fn forget(file: &File, range: &Range<u64>) {
    let length = range.end - range.start;
    if let (Ok(start), Ok(length)) = (range.start.try_into(), length.try_into()) {
        let _ = posix_fadvise(file, start, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}
