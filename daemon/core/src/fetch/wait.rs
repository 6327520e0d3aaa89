//! What a fetch waits for while no bytes get here.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::progress::Phase;
use crate::source::{Source, SourceError};

/// Without a byte for this long a fetch waits for something.
const IDLE: Duration = Duration::from_secs(2);

/// Without a byte for this long a connection is silent.
const SILENT: Duration = Duration::from_secs(5);

/// What a fetch waits for. As text it goes on after "waiting for".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// The origin lets us ask for nothing until then.
    RateLimit {
        /// When it does.
        until: SystemTime,
    },
    /// The origin is away.
    Origin {
        /// What came instead of bytes.
        detail: String,
        /// When it is asked again.
        until: SystemTime,
    },
    /// It is connected, and nothing arrives.
    Silence,
    /// Another node has the claim on what is missing, and brings it into the shared tier.
    Neighbour,
    /// Another fetch of this node, maybe in another process, brings the same bytes.
    Others,
    /// Other fetches have all connections.
    Turn,
}

impl Wait {
    /// When that ends, if it is known.
    #[must_use]
    pub fn until(&self) -> Option<SystemTime> {
        match self {
            Self::RateLimit { until } | Self::Origin { until, .. } => Some(*until),
            Self::Silence | Self::Neighbour | Self::Others | Self::Turn => None,
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RateLimit { .. } => f.write_str("the origin's rate limit"),
            Self::Origin { detail, .. } => write!(f, "the origin ({detail})"),
            Self::Silence => f.write_str("bytes: the origin is connected and sends none"),
            Self::Neighbour => {
                f.write_str("another node, which brings the same files into the shared tier")
            }
            Self::Others => f.write_str("another fetch on this node, which brings the same files"),
            Self::Turn => f.write_str("its turn: other fetches have all connections of this node"),
        }
    }
}

/// Who of a fetch waits for what.
#[derive(Default)]
pub(super) struct Waits {
    reading: AtomicUsize,
    neighbours: AtomicUsize,
    others: AtomicUsize,
    /// Why the origin is left alone, and until when.
    paused: Mutex<Option<(String, Instant)>>,
    source: OnceLock<Arc<dyn Source>>,
}

/// Something is under way until it is dropped.
pub(super) struct UnderWay<'a>(&'a AtomicUsize);

impl<'a> UnderWay<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Waits {
    /// From here the bytes come, and it knows its rate limit.
    pub(super) fn source(&self, source: &Arc<dyn Source>) {
        self.source.get_or_init(|| Arc::clone(source));
    }

    /// A connection to the origin is open.
    pub(super) fn reading(&self) -> UnderWay<'_> {
        UnderWay::begin(&self.reading)
    }

    /// A file is left to another node.
    pub(super) fn neighbour(&self) -> UnderWay<'_> {
        UnderWay::begin(&self.neighbours)
    }

    /// A file is left to another fetch.
    pub(super) fn others(&self) -> UnderWay<'_> {
        UnderWay::begin(&self.others)
    }

    /// The origin is not asked again before `pause` is over.
    pub(super) fn paused(&self, error: &SourceError, pause: Duration) {
        let until = Instant::now() + pause;
        let mut paused = self.paused.lock().expect("no holder of this lock panics");
        *paused = Some((error.to_string(), until));
    }

    /// What it waits for, in `phase`, if no byte has come for `idle` and some are missing.
    pub(super) fn now(&self, phase: Phase, idle: Duration) -> Option<Wait> {
        let busy = match phase {
            Phase::Resolving => false,
            Phase::Fetching => idle < IDLE,
            Phase::WaitingForRoom | Phase::Publishing => true,
        };
        if busy {
            return None;
        }
        let limited = self.source.get().and_then(|source| source.limited_for());
        if let Some(left) = limited {
            let until = SystemTime::now() + left;
            return Some(Wait::RateLimit { until });
        }
        if let Some(wait) = self.pause_now() {
            return Some(wait);
        }
        let any = |count: &AtomicUsize| count.load(Ordering::Relaxed) > 0;
        match phase {
            Phase::Fetching if any(&self.reading) => (idle >= SILENT).then_some(Wait::Silence),
            Phase::Fetching if any(&self.neighbours) => Some(Wait::Neighbour),
            Phase::Fetching if any(&self.others) => Some(Wait::Others),
            Phase::Fetching => Some(Wait::Turn),
            _ => None,
        }
    }

    fn pause_now(&self) -> Option<Wait> {
        let paused = self.paused.lock().expect("no holder of this lock panics");
        let (detail, until) = paused.as_ref()?;
        let left = until.checked_duration_since(Instant::now())?;
        Some(Wait::Origin {
            detail: detail.clone(),
            until: SystemTime::now() + left,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn away() -> SourceError {
        SourceError::Unavailable {
            what: "model.safetensors".to_owned(),
            detail: "503 Service Unavailable".to_owned(),
            retry_after: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_moves_waits_for_nothing() {
        let waits = Waits::default();
        waits.paused(&away(), Duration::from_secs(60));

        assert_eq!(waits.now(Phase::Fetching, Duration::from_secs(1)), None);
        assert_eq!(waits.now(Phase::Publishing, Duration::from_secs(9)), None);
        let wait = waits.now(Phase::Fetching, IDLE).expect("it waits");
        let text = "the origin (model.safetensors is unavailable: 503 Service Unavailable)";
        assert_eq!(wait.to_string(), text);
        assert!(wait.until().expect("a time") > SystemTime::now());
        tokio::time::advance(Duration::from_secs(61)).await;
        assert_eq!(waits.now(Phase::Fetching, IDLE), Some(Wait::Turn));
    }

    #[test]
    fn who_is_waited_for_is_told_apart() {
        let waits = Waits::default();
        let now = |idle| waits.now(Phase::Fetching, Duration::from_secs(idle));
        let neighbour = waits.neighbour();
        let others = waits.others();
        assert_eq!(now(2), Some(Wait::Neighbour));
        drop(neighbour);
        assert_eq!(now(2), Some(Wait::Others));
        let reading = waits.reading();
        assert_eq!((now(2), now(5)), (None, Some(Wait::Silence)));
        drop((others, reading));
        assert_eq!(now(2), Some(Wait::Turn));
        let resolving = waits.now(Phase::Resolving, Duration::from_secs(9));
        assert_eq!(resolving, None);
    }
}
