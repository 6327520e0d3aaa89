//! Copying a piece from the shared tier.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::blocking;
use crate::fetch::progress::Meter;
use crate::shared::{BadBlock, Buffers, Fill, SharedError, SharedStore, SharedTier, Sums, Trouble};
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
        // They are in the local tier's page cache now.
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
        let file = Arc::clone(bytes);
        let (sums, range) = (Arc::clone(&self.sums), block.clone());
        let buffers = Arc::clone(self.tier.buffers());
        let read = self
            .tier
            .run(move |store| read(store, &file, &buffers, &sums, index, range));
        let data = read.await?.map_err(CopyError::Bad)?;
        self.tier.rates().shared.count(data.len() as u64);
        // Before they are written: with the last of them the hasher is done, and nobody waits for us.
        let inside = block.start.max(self.range.start)..block.end.min(self.range.end);
        let copied = inside.end - inside.start;
        self.copied.fetch_add(copied, Ordering::Relaxed);
        self.meter.copied(copied);
        self.tier.metrics().shared_copied(copied);
        let part = Arc::clone(&self.part);
        // All of the block: what is here already stays as it is.
        let written = blocking::run(move || part.write(block.start, &[data])).await;
        written.map_err(CopyError::Local)
    }
}

/// Reads one block and checks it.
fn read(
    store: &SharedStore,
    file: &File,
    buffers: &Arc<Buffers>,
    sums: &Sums,
    index: usize,
    block: Range<u64>,
) -> Result<Result<Bytes, BadBlock>, SharedError> {
    let length = usize::try_from(block.end - block.start).expect("a block fits in memory");
    let mut data = buffers.take(length);
    let mut checked = read_once(store, file, sums, index, &block, &mut data)?;
    if checked.is_err() {
        // On NFS it may be what was there before another node wrote it: ask the server.
        forget(file, &block);
        checked = read_once(store, file, sums, index, &block, &mut data)?;
    }
    Ok(checked.map(|()| Bytes::from_owner(data)))
}

fn read_once(
    store: &SharedStore,
    file: &File,
    sums: &Sums,
    index: usize,
    block: &Range<u64>,
    data: &mut [u8],
) -> Result<Result<(), BadBlock>, SharedError> {
    let bad = BadBlock { at: block.start };
    match file.read_exact_at(data, block.start) {
        Ok(()) => {}
        Err(error) if is_damage(&error) || error.kind() == io::ErrorKind::UnexpectedEof => {
            return Ok(Err(bad));
        }
        Err(source) => {
            return Err(SharedError::Io {
                op: "read a blob of",
                path: store.root().to_owned(),
                source,
            });
        }
    }
    Ok(sums.check(index, block.start, data))
}

/// Drops a range of a file from the page cache.
fn forget(file: &File, range: &Range<u64>) {
    let length = range.end - range.start;
    if let (Ok(start), Ok(length)) = (range.start.try_into(), length.try_into()) {
        let _ = posix_fadvise(file, start, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}
