//! Writing to the shared tier what this node has, behind the fetch.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use super::STEP_BYTES;
use super::questions::claim;
use crate::blocking;
use crate::errors::Chain;
use crate::shared::choice::{BEATS, SYNC_BYTES, WRITER_LOOK};
use crate::shared::{self, Fill, SegmentView, SharedClaim, SharedTier, Sums, Trouble};
use crate::store::{Part, StoreError};

/// How much longer a sync may take than another call: it waits for all that was written.
const SYNC: u32 = 6;

/// Why a segment was not written.
#[derive(Debug, thiserror::Error)]
enum UploadError {
    #[error(transparent)]
    Trouble(#[from] Trouble),
    #[error(transparent)]
    Local(#[from] StoreError),
    #[error("its bytes did not come")]
    GivenUp,
    #[error("this process is ending")]
    Stopped,
}

/// One claimed segment, written as its bytes come.
pub(super) struct Upload {
    pub(super) tier: Arc<SharedTier>,
    pub(super) fill: Arc<Fill>,
    pub(super) part: Arc<Part>,
    pub(super) verified: Arc<AtomicBool>,
    pub(super) segment: usize,
    pub(super) claim: SharedClaim,
}

impl Upload {
    pub(super) async fn run(self) {
        let outcome = tokio::select! {
            outcome = self.write() => outcome,
            never = self.keep_claim() => match never {},
            () = self.given_up() => Err(UploadError::GivenUp),
            () = self.tier.stopped().cancelled() => Err(UploadError::Stopped),
        };
        let segment = self.segment;
        match outcome {
            Ok(()) => tracing::debug!(segment, "segment shared"),
            Err(error @ (UploadError::GivenUp | UploadError::Stopped)) => {
                tracing::debug!(segment, error = %Chain(&error), "segment not shared");
            }
            Err(error) => {
                tracing::warn!(segment, error = %Chain(&error), "segment not shared");
                self.tier.metrics().shared_failed("write");
            }
        }
        let (fill, claim) = (Arc::clone(&self.fill), self.claim);
        // Whoever tries again needs the local bytes, however long this takes.
        drop(self.part);
        let released = self.tier.run(move |_| fill.release(&claim)).await;
        if let Err(error) = released {
            tracing::debug!(segment, error = %Chain(&error), "claim not removed");
        }
        if self.verified.load(Ordering::Relaxed) {
            seal(&self.tier, &self.fill).await;
        }
        self.tier.changed().notify_waiters();
    }

    async fn given_up(&self) {
        while !self.part.is_given_up() {
            tokio::time::sleep(4 * WRITER_LOOK).await;
        }
    }

    async fn write(&self) -> Result<(), UploadError> {
        let fill = Arc::clone(&self.fill);
        let target = Arc::new(self.tier.run(move |_| fill.part()).await?);
        let mut blocks: Vec<(usize, Range<u64>)> =
            self.fill.blocks(self.segment).enumerate().collect();
        let mut sums = Sums::new(blocks.len());
        let mut unsynced = 0;
        while !blocks.is_empty() {
            let here = |(_, block): &(usize, Range<u64>)| {
                self.part.present_in(block) == block.end - block.start
            };
            let Some(next) = blocks.iter().position(here) else {
                if self.part.is_given_up() {
                    return Err(UploadError::GivenUp);
                }
                tokio::time::sleep(WRITER_LOOK).await;
                continue;
            };
            let (index, block) = blocks.remove(next);
            let bytes = block.end - block.start;
            let _place = self.tier.writes().acquire().await;
            let _under_way = self.tier.rates().written.begin();
            let data = self.read_local(block.clone()).await?;
            sums.set(index, Sums::of(&data));
            self.write_block(&target, block.start, data).await?;
            self.tier.rates().written.count(bytes);
            self.tier.metrics().shared_written(bytes);
            unsynced += bytes;
            if unsynced >= SYNC_BYTES || blocks.is_empty() {
                let (file, patience) = (Arc::clone(&target), self.tier.config().stall_timeout);
                let sync = self.tier.run_within(patience * SYNC, move |_| file.sync());
                sync.await?;
                unsynced = 0;
            }
        }
        if self.part.is_given_up() {
            return Err(UploadError::GivenUp);
        }
        let (fill, segment) = (Arc::clone(&self.fill), self.segment);
        let finish = self.tier.run(move |_| fill.finish(segment, &sums));
        Ok(finish.await?)
    }

    async fn read_local(&self, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (part, buffers) = (Arc::clone(&self.part), Arc::clone(self.tier.buffers()));
        let length = usize::try_from(range.end - range.start).expect("a block fits in memory");
        blocking::run(move || {
            let mut data = buffers.take(length);
            part.read(range.start, &mut data)?;
            Ok(Bytes::from_owner(data))
        })
        .await
    }

    /// In small steps: on a slow tier that many write to, each takes its time.
    async fn write_block(
        &self,
        target: &Arc<shared::Part>,
        offset: u64,
        data: Bytes,
    ) -> Result<(), UploadError> {
        let mut at = 0;
        while at < data.len() {
            let step = data.slice(at..(at + STEP_BYTES).min(data.len()));
            let (file, offset) = (Arc::clone(target), offset + at as u64);
            at += step.len();
            let bytes = step.len() as u64;
            let write = self.tier.run(move |_| file.write(offset, &step));
            write.await?;
            self.tier.count_written(bytes);
        }
        Ok(())
    }

    /// Shows the others that the work goes on, as long as it does.
    ///
    /// What counts is whether this process gets on with what the segment waits for: on a slow origin it takes
    /// long until a block is whole, and on a slow tier until it is a segment's turn to be written.
    async fn keep_claim(&self) -> std::convert::Infallible {
        let range = self.fill.range(self.segment);
        let mut beats = tokio::time::interval(self.tier.config().claim_timeout / BEATS);
        let (mut shown, mut beat) = ((0, 0), 0);
        loop {
            beats.tick().await;
            let present = self.part.present_in(&range);
            let progress = match present < range.end - range.start {
                true => (present, self.part.arrived()),
                false => (present, self.tier.wrote()),
            };
            if progress == shown {
                continue;
            }
            shown = progress;
            beat += 1;
            let fill = Arc::clone(&self.fill);
            let claim = self.claim.clone();
            let beaten = self.tier.run(move |_| fill.beat(&claim, beat)).await;
            if let Err(error) = beaten {
                tracing::debug!(error = %Chain(&error), "claim not kept up");
            }
        }
    }
}

/// Gives a blob of the shared tier its final name if all of it is there.
async fn seal(tier: &SharedTier, fill: &Arc<Fill>) {
    let fill = Arc::clone(fill);
    let sealed = tier.run(move |_| {
        let view = fill.look()?;
        match view.is_whole() && !view.sealed {
            true => fill.seal(),
            false => Ok(()),
        }
    });
    if let Err(error) = sealed.await {
        tracing::debug!(error = %Chain(&error), "shared blob not sealed");
    }
}

/// What the shared tier still lacks of a file whose local bytes are verified.
pub(super) struct Rest {
    pub(super) tier: Arc<SharedTier>,
    pub(super) fill: Arc<Fill>,
    pub(super) part: Arc<Part>,
    pub(super) verified: Arc<AtomicBool>,
}

impl Rest {
    /// Writes what nobody brings, and seals what is whole.
    pub(super) async fn write(self) {
        while let Some((segment, claim)) = self.claim_next().await {
            let upload = Upload {
                tier: Arc::clone(&self.tier),
                fill: Arc::clone(&self.fill),
                part: Arc::clone(&self.part),
                verified: Arc::clone(&self.verified),
                segment,
                claim,
            };
            upload.run().await;
            let fill = Arc::clone(&self.fill);
            let here = self
                .tier
                .run(move |_| Ok(fill.look()?.segments[segment].here));
            if !here.await.unwrap_or(false) {
                return;
            }
        }
        seal(&self.tier, &self.fill).await;
    }

    async fn claim_next(&self) -> Option<(usize, SharedClaim)> {
        let fill = Arc::clone(&self.fill);
        let view = self.tier.run(move |_| fill.look()).await.ok()?;
        // Whoever could not write all of it has said so.
        let open = |(_, segment): &(usize, SegmentView)| !segment.here && segment.turn.is_none();
        for (index, _) in view.segments.into_iter().enumerate().filter(open) {
            let claimed = claim(&self.tier, &self.fill, index, 0).await.ok()?;
            if let Some(claim) = claimed {
                return Some((index, claim));
            }
        }
        None
    }
}
