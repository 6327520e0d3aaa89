//! How far a fetch is: counters that its tasks share, and the picture of them that a user sees.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::wait::{Wait, Waits};
use crate::model::{ModelRef, SnapshotId};

/// How often a user's picture of a fetch is renewed.
const REFRESH: Duration = Duration::from_millis(200);

/// The rate shown is that of about this many seconds past.
const RATE_SECONDS: f64 = 3.0;

/// What a fetch is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Asking the origin what the name stands for, and for the list of files.
    Resolving,
    /// Evicting, and setting disk space aside.
    WaitingForRoom,
    /// Bringing files.
    Fetching,
    /// Checking shards and giving the snapshot its name.
    Publishing,
}

/// How far a fetch is.
#[derive(Debug, Clone)]
pub struct Progress {
    /// The model, at its revision once that is known.
    pub model: ModelRef,
    /// The snapshot, once it is known.
    pub snapshot: Option<SnapshotId>,
    /// What it is doing.
    pub phase: Phase,
    /// Files of the snapshot.
    pub files: u64,
    /// Files that are here.
    pub files_done: u64,
    /// Bytes of the snapshot.
    pub bytes: u64,
    /// Bytes that are here.
    pub bytes_done: u64,
    /// Bytes that this fetch received from the origin.
    pub bytes_fetched: u64,
    /// Bytes that this fetch copied from the shared tier.
    pub bytes_shared: u64,
    /// Rate at which bytes get here, of the last few seconds.
    pub bytes_per_second: f64,
    /// The part of that rate that comes from the shared tier.
    pub bytes_per_second_shared: f64,
    /// Time that the rest takes at that rate.
    pub eta: Option<Duration>,
    /// Time since the fetch began.
    pub elapsed: Duration,
    /// What it waits for, if no bytes get here.
    pub wait: Option<Wait>,
}

impl Progress {
    /// Of what has not begun yet.
    #[must_use]
    pub fn of(model: ModelRef) -> Self {
        Self {
            model,
            snapshot: None,
            phase: Phase::Resolving,
            files: 0,
            files_done: 0,
            bytes: 0,
            bytes_done: 0,
            bytes_fetched: 0,
            bytes_shared: 0,
            bytes_per_second: 0.0,
            bytes_per_second_shared: 0.0,
            eta: None,
            elapsed: Duration::ZERO,
            wait: None,
        }
    }

    /// All that [`Progress::waits_for`] says.
    pub const REASONS: [&str; 7] = [
        "room",
        "rate_limit",
        "origin",
        "silence",
        "neighbour",
        "others",
        "turn",
    ];

    /// What it waits for, in one word; `None` while bytes get here.
    #[must_use]
    pub fn waits_for(&self) -> Option<&'static str> {
        if self.phase == Phase::WaitingForRoom {
            return Some("room");
        }
        Some(match self.wait.as_ref()? {
            Wait::RateLimit { .. } => "rate_limit",
            Wait::Origin { .. } => "origin",
            Wait::Silence => "silence",
            Wait::Neighbour => "neighbour",
            Wait::Others => "others",
            Wait::Turn => "turn",
        })
    }
}

/// The counters of one fetch.
pub(super) struct Meter {
    begun: Instant,
    shown: watch::Sender<Progress>,
    files_done: AtomicU64,
    bytes_done: AtomicU64,
    /// Bytes that were here when the fetch began, or that others brought: they say nothing about its rate.
    bytes_found: AtomicU64,
    bytes_fetched: AtomicU64,
    bytes_shared: AtomicU64,
    rates: Mutex<Rates>,
    waits: Waits,
    /// Of another fetch of the same snapshot: while this one waits for it, its progress is shown.
    followed: Mutex<Option<Arc<Meter>>>,
}

/// How fast bytes get here, and since when none do.
struct Rates {
    at: Instant,
    moved: Moved,
    all: f64,
    shared: f64,
    /// When the last bytes came.
    last: Instant,
}

/// Bytes that a fetch has moved.
#[derive(Clone, Copy, PartialEq)]
struct Moved {
    /// On disk, of all that were missing.
    here: u64,
    fetched: u64,
    shared: u64,
}

impl Rates {
    /// Averages that forget: about the last [`RATE_SECONDS`].
    fn update(&mut self, moved: Moved) {
        let seconds = self.at.elapsed().as_secs_f64();
        if seconds < 0.05 {
            return;
        }
        let before = std::mem::replace(&mut self.moved, moved);
        self.at = Instant::now();
        if moved != before {
            self.last = self.at;
        }
        let average = |rate: f64, now: u64, before: u64| {
            let now = now.saturating_sub(before) as f64 / seconds;
            let weight = match rate == 0.0 {
                true => 1.0,
                false => (seconds / RATE_SECONDS).min(1.0),
            };
            rate + (now - rate) * weight
        };
        self.all = average(self.all, moved.here, before.here);
        self.shared = average(self.shared, moved.shared, before.shared);
    }
}

impl Meter {
    pub(super) fn new(model: ModelRef) -> Self {
        let begun = Instant::now();
        let (shown, _) = watch::channel(Progress::of(model));
        Self {
            begun,
            shown,
            files_done: AtomicU64::new(0),
            bytes_done: AtomicU64::new(0),
            bytes_found: AtomicU64::new(0),
            bytes_fetched: AtomicU64::new(0),
            bytes_shared: AtomicU64::new(0),
            rates: Mutex::new(Rates {
                at: begun,
                moved: Moved {
                    here: 0,
                    fetched: 0,
                    shared: 0,
                },
                all: 0.0,
                shared: 0.0,
                last: begun,
            }),
            waits: Waits::default(),
            followed: Mutex::default(),
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Progress> {
        self.shown.subscribe()
    }

    pub(super) fn current(&self) -> Progress {
        self.shown.borrow().clone()
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    pub(super) fn waits(&self) -> &Waits {
        &self.waits
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut Progress)) {
        self.shown.send_modify(change);
        self.refresh();
    }

    /// Shows the progress of another fetch from now on, or its own again, from its beginning.
    pub(super) fn follow(&self, other: Option<Arc<Self>>) {
        let before = {
            let mut followed = self.followed();
            std::mem::replace(&mut *followed, other.clone())
        };
        if other.is_none() && before.is_some() {
            self.set(|progress| {
                progress.phase = Phase::Resolving;
                (progress.files, progress.bytes) = (0, 0);
            });
        }
    }

    fn followed(&self) -> MutexGuard<'_, Option<Arc<Self>>> {
        self.followed.lock().expect("no holder of this lock panics")
    }

    pub(super) fn fetched(&self, bytes: u64) {
        self.bytes_fetched.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn copied(&self, bytes: u64) {
        self.bytes_shared.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn bytes_shared(&self) -> u64 {
        self.bytes_shared.load(Ordering::Relaxed)
    }

    pub(super) fn bytes_found(&self) -> u64 {
        self.bytes_found.load(Ordering::Relaxed)
    }

    pub(super) fn bytes_fetched(&self) -> u64 {
        self.bytes_fetched.load(Ordering::Relaxed)
    }

    /// A file is here whole.
    pub(super) fn file_done(&self) {
        self.files_done.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn file(&self) -> FileMeter<'_> {
        FileMeter {
            meter: self,
            counted: AtomicU64::new(0),
            found: AtomicU64::new(0),
        }
    }

    /// Renews what users see until it is dropped.
    pub(super) async fn keep_fresh(&self) {
        let mut ticks = tokio::time::interval(REFRESH);
        loop {
            ticks.tick().await;
            self.refresh();
        }
    }

    fn refresh(&self) {
        let followed = self.followed().clone();
        if let Some(other) = followed {
            self.show(&other.current());
            return;
        }
        let done = self.bytes_done.load(Ordering::Relaxed);
        let moved = Moved {
            here: done.saturating_sub(self.bytes_found()),
            fetched: self.bytes_fetched(),
            shared: self.bytes_shared(),
        };
        let (rate, shared, idle) = {
            let mut rates = self.rates.lock().expect("no holder of this lock panics");
            rates.update(moved);
            (rates.all, rates.shared, rates.last.elapsed())
        };
        self.shown.send_modify(|progress| {
            progress.files_done = self.files_done.load(Ordering::Relaxed);
            progress.bytes_done = done;
            progress.bytes_fetched = self.bytes_fetched();
            progress.bytes_shared = self.bytes_shared();
            progress.bytes_per_second = rate;
            progress.bytes_per_second_shared = shared.min(rate);
            progress.elapsed = self.begun.elapsed();
            let left = progress.bytes.saturating_sub(done);
            let complete = progress.bytes > 0 && left == 0;
            progress.wait = match complete {
                true => None,
                false => self.waits.now(progress.phase, idle),
            };
            let left = left as f64;
            let known = progress.phase == Phase::Fetching && rate > 1.0;
            progress.eta =
                known.then(|| Duration::try_from_secs_f64(left / rate).unwrap_or(Duration::MAX));
        });
    }

    /// Shows how far another fetch of the same snapshot is. What was fetched, and since when, stays its own.
    fn show(&self, other: &Progress) {
        self.shown.send_modify(|progress| {
            *progress = Progress {
                model: progress.model.clone(),
                bytes_fetched: self.bytes_fetched(),
                bytes_shared: self.bytes_shared(),
                elapsed: self.begun.elapsed(),
                ..other.clone()
            };
        });
    }
}

/// What one file adds to the bytes that are here; it may go down again when bytes prove wrong.
pub(super) struct FileMeter<'a> {
    meter: &'a Meter,
    counted: AtomicU64,
    found: AtomicU64,
}

impl FileMeter<'_> {
    pub(super) fn set(&self, bytes: u64) {
        let before = self.counted.swap(bytes, Ordering::Relaxed);
        // Wrapping: the difference may be negative, the sum never is.
        self.meter
            .bytes_done
            .fetch_add(bytes.wrapping_sub(before), Ordering::Relaxed);
    }

    /// Like [`FileMeter::set`], for bytes that were here before this fetch, or that others brought.
    pub(super) fn found(&self, bytes: u64) {
        self.count_found(bytes);
        self.set(bytes);
    }

    /// Bytes that were found proved damaged.
    pub(super) fn lost(&self, bytes: u64) {
        let found = self.found.load(Ordering::Relaxed);
        self.count_found(found.saturating_sub(bytes));
    }

    fn count_found(&self, bytes: u64) {
        let before = self.found.swap(bytes, Ordering::Relaxed);
        let more = bytes.wrapping_sub(before);
        self.meter.bytes_found.fetch_add(more, Ordering::Relaxed);
    }
}
