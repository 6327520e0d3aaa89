//! What a file asks the shared tier, one question at a time. It goes on meanwhile: an answer may take seconds.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::errors::Chain;
use crate::shared::{Fill, SharedClaim, SharedTier, Sums, Trouble, View};
use crate::store::StageKey;

/// What the shared tier said.
pub(super) enum Answer {
    Looked(Result<Looked, Trouble>),
    Claimed {
        segment: usize,
        turn: u32,
        claim: Result<Option<SharedClaim>, Trouble>,
    },
    Summed {
        segment: usize,
        sums: Result<Option<Sums>, Trouble>,
    },
    /// What has the blob's name now.
    Replaced {
        damaged: bool,
        opened: Result<Arc<Fill>, Trouble>,
    },
}

/// What is in a blob's directory.
pub(super) struct Looked {
    pub(super) view: View,
    /// What stands in the claims of other nodes.
    pub(super) heard: Vec<(usize, u32, Option<String>)>,
}

/// At most one question, and its answer.
pub(super) struct Questions {
    tier: Arc<SharedTier>,
    asked: JoinSet<Answer>,
    since: Instant,
}

impl Questions {
    pub(super) fn new(tier: &Arc<SharedTier>) -> Self {
        Self {
            tier: Arc::clone(tier),
            asked: JoinSet::new(),
            since: Instant::now(),
        }
    }

    pub(super) fn is_pending(&self) -> bool {
        !self.asked.is_empty()
    }

    /// For how long the answer is awaited.
    pub(super) fn pending_for(&self) -> Duration {
        match self.is_pending() {
            true => self.since.elapsed(),
            false => Duration::ZERO,
        }
    }

    /// The answer, once there is one.
    pub(super) async fn answer(&mut self) -> Answer {
        match self.asked.join_next().await {
            Some(answer) => {
                answer.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
            }
            None => std::future::pending().await,
        }
    }

    fn ask(&mut self, question: impl Future<Output = Answer> + Send + 'static) {
        self.since = Instant::now();
        self.asked.spawn(question);
    }

    /// What is here, and what stands in the claims of the segments `listen`.
    pub(super) fn look(&mut self, fill: &Arc<Fill>, listen: Vec<usize>) {
        let (tier, fill) = (Arc::clone(&self.tier), Arc::clone(fill));
        self.ask(async move {
            let looked = tier.run(move |_| {
                let view = fill.look()?;
                let mut heard = Vec::new();
                for segment in listen {
                    let found = view.segments[segment];
                    if let (false, Some(turn)) = (found.here, found.turn) {
                        heard.push((segment, turn, fill.read_claim(segment, turn)?));
                    }
                }
                Ok(Looked { view, heard })
            });
            Answer::Looked(looked.await)
        });
    }

    /// Whether this turn of a segment is ours.
    pub(super) fn claim(&mut self, fill: &Arc<Fill>, segment: usize, turn: u32) {
        let (tier, fill) = (Arc::clone(&self.tier), Arc::clone(fill));
        self.ask(async move {
            let claim = claim(&tier, &fill, segment, turn).await;
            Answer::Claimed {
                segment,
                turn,
                claim,
            }
        });
    }

    /// The checksums of a segment.
    pub(super) fn sums(&mut self, fill: &Arc<Fill>, segment: usize) {
        let (tier, fill) = (Arc::clone(&self.tier), Arc::clone(fill));
        self.ask(async move {
            let sums = tier.run(move |_| fill.sums(segment)).await;
            Answer::Summed { segment, sums }
        });
    }

    /// Sets the directory aside if it holds damage, and opens what has its name then.
    pub(super) fn replace(&mut self, fill: &Arc<Fill>, key: StageKey, size: u64, damaged: bool) {
        let (tier, fill) = (Arc::clone(&self.tier), Arc::clone(fill));
        self.ask(async move {
            if damaged {
                set_aside(&tier, &fill, &key).await;
            }
            let opened = tier.run(move |store| {
                // It may be there all the same: then what was claimed there still is.
                if !damaged && fill.is_named().unwrap_or(false) {
                    return Ok(fill);
                }
                store.fill(&key, size).map(Arc::new)
            });
            let opened = opened.await;
            Answer::Replaced { damaged, opened }
        });
    }
}

/// Claims a turn of a segment. If nobody waits for the answer any more the claim is let go: it was made late, or
/// the file is here by now.
pub(super) async fn claim(
    tier: &SharedTier,
    fill: &Arc<Fill>,
    segment: usize,
    turn: u32,
) -> Result<Option<SharedClaim>, Trouble> {
    let (fill, owner) = (Arc::clone(fill), tier.owner().to_owned());
    let (sender, receiver) = oneshot::channel();
    let claimed = tier.run(move |_| {
        let claim = fill.claim(segment, turn, &owner)?;
        match sender.send(claim) {
            Err(Some(unread)) => fill.release(&unread),
            Ok(()) | Err(None) => Ok(()),
        }
    });
    claimed.await?;
    Ok(receiver.await.ok().flatten())
}

/// Takes the name of a blob away from a directory that holds damage.
pub(super) async fn set_aside(tier: &SharedTier, fill: &Arc<Fill>, key: &StageKey) {
    let fill = Arc::clone(fill);
    match tier.run(move |_| fill.set_aside()).await {
        Ok(true) => {
            tracing::warn!(%key, "damaged blob in the shared tier set aside");
            tier.metrics().shared_failed("damaged");
        }
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(%key, error = %Chain(&error), "damaged blob in the shared tier not set aside");
        }
    }
}
