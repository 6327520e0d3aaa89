//! Warming: reading a published snapshot into the page cache, so that the pod that loads it next reads from memory.
//!
//! A fetch goes past the page cache, so what was just fetched is not there either. Warming runs after the snapshot was
//! published, in tasks of its own, one at a time: nothing waits for it. Files are read in the order in which a loader
//! opens them, no faster than the rate says, and each page once, so that the kernel counts it among those that it drops
//! first. It ends where a share of the available memory is warm. What is there already is not read again.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::FutureExt;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::blocking;
use crate::errors::Chain;
use crate::metrics::Metrics;
use crate::model::{ModelRef, SnapshotId};
use crate::pace::Pace;
use crate::page_cache;
use crate::store::{Snapshot, Store};

mod memory;

use memory::Memory;

/// Bytes that are looked at and read between two looks at memory, rate and the end of this process: 16 MiB.
const WINDOW_BYTES: u64 = 16 << 20;

/// The same at rates at which so much would take long.
const SMALL_WINDOW_BYTES: u64 = 1 << 20;

/// Bytes of one read.
const BUFFER_BYTES: usize = 1 << 20;

/// Files that are not longer than this come first, as they are fetched and opened first.
const SMALL_FILE_BYTES: u64 = 16 << 20;

/// How gentle warming is.
#[derive(Debug, Clone, Copy)]
pub struct WarmLimits {
    /// Bytes that are read from the disk in a second, at most.
    pub bytes_per_second: u64,
    /// How much of the available memory may be warm, of all snapshots that were warmed together. Available is what
    /// the kernel says (`MemAvailable`), or what the memory limits of this process's control groups leave of it.
    pub max_memory_percent: u8,
}

impl Default for WarmLimits {
    fn default() -> Self {
        Self {
            bytes_per_second: 1 << 30,
            max_memory_percent: 50,
        }
    }
}

/// How far a snapshot is on its way into the page cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warming {
    /// The model at its revision.
    pub model: ModelRef,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Whether it is under way, or how it ended.
    pub state: WarmState,
    /// Of all its files; 0 until they are known.
    pub bytes: u64,
    /// In the page cache: so far, or when it ended.
    pub bytes_warm: u64,
    /// Read from the disk for that.
    pub bytes_read: u64,
}

/// Where warming is with one snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WarmState {
    /// Another snapshot is being read.
    Waiting,
    /// It is being read.
    Reading,
    /// All of it is in the page cache.
    Warm,
    /// A part of it is.
    Partly(Shortfall),
    /// It could not be read, for this reason.
    Failed(String),
    /// The process ended before.
    Stopped,
}

/// Why only a part of a snapshot is in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shortfall {
    /// No more than so many bytes of all snapshots may be.
    Ceiling(u64),
    /// The kernel dropped some of it again.
    Dropped,
    /// It was removed from the store.
    Removed,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ceiling(bytes) => write!(
                f,
                "{bytes} bytes of models may be warm: warm.max_memory_percent of the memory that the machine, or a \
                 limit of weightd's control group, leaves"
            ),
            Self::Dropped => f.write_str("the kernel has dropped the rest again: memory is short"),
            Self::Removed => f.write_str("it was removed from the store"),
        }
    }
}

impl WarmState {
    /// Whether nothing more happens to it.
    #[must_use]
    pub fn is_end(&self) -> bool {
        !matches!(self, Self::Waiting | Self::Reading)
    }

    /// What it is counted as.
    fn outcome(&self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Partly(_) => "partly",
            Self::Failed(_) => "failed",
            Self::Waiting | Self::Reading | Self::Stopped => "stopped",
        }
    }
}

/// A file of a snapshot, and its bytes.
type WarmFile = (PathBuf, u64);

/// Warms the snapshots of one store.
pub struct Warmer {
    store: Arc<Store>,
    limits: WarmLimits,
    metrics: Arc<Metrics>,
    memory: Memory,
    /// Whose turn it is to read.
    turn: Semaphore,
    warmings: Mutex<BTreeMap<SnapshotId, Arc<watch::Sender<Warming>>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Warmer {
    /// A warmer of what `store` holds.
    #[must_use]
    pub fn new(store: Arc<Store>, limits: WarmLimits, metrics: Arc<Metrics>) -> Arc<Self> {
        Self::with_memory(store, limits, metrics, Memory::default())
    }

    fn with_memory(
        store: Arc<Store>,
        limits: WarmLimits,
        metrics: Arc<Metrics>,
        memory: Memory,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            limits,
            metrics,
            memory,
            turn: Semaphore::new(1),
            warmings: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Warms a snapshot in a task of its own, or joins the one that does so.
    pub fn warm(
        self: &Arc<Self>,
        model: &ModelRef,
        snapshot: &SnapshotId,
    ) -> watch::Receiver<Warming> {
        let mut warmings = self.warmings();
        let under_way = warmings.get(snapshot);
        if let Some(found) = under_way.filter(|found| !found.borrow().state.is_end()) {
            return found.subscribe();
        }
        let (warming, told) = watch::channel(Warming {
            model: model.clone(),
            snapshot: snapshot.clone(),
            state: WarmState::Waiting,
            bytes: 0,
            bytes_warm: 0,
            bytes_read: 0,
        });
        let warming = Arc::new(warming);
        warmings.insert(snapshot.clone(), Arc::clone(&warming));
        self.tasks.spawn(Arc::clone(self).run(warming));
        told
    }

    /// How far the snapshots are that this process warms or has warmed, and that are still here; sorted by model.
    pub async fn told(&self) -> Vec<Warming> {
        self.forget_removed().await;
        let warmings = self.warmings();
        let told = warmings.values().map(|warming| warming.borrow().clone());
        let mut told: Vec<Warming> = told.collect();
        told.sort_by_cached_key(|warming| warming.model.to_string());
        told
    }

    /// Ends all warming.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn warmings(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, Arc<watch::Sender<Warming>>>> {
        self.warmings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>, warming: Arc<watch::Sender<Warming>>) {
        let work = AssertUnwindSafe(self.work(&warming)).catch_unwind();
        let state = tokio::select! {
            biased;
            () = self.stop.cancelled() => WarmState::Stopped,
            state = work => state.unwrap_or_else(|_| WarmState::Failed("a defect of weightd".to_owned())),
        };
        warming.send_modify(|now| now.state = state);
        let now = warming.borrow().clone();
        self.metrics.warmed(now.state.outcome());
        let warm: u64 = self
            .warmings()
            .values()
            .map(|warming| warming.borrow().bytes_warm)
            .sum();
        self.metrics.page_cache_holds(warm);
        let (bytes, bytes_warm, bytes_read) = (now.bytes, now.bytes_warm, now.bytes_read);
        match &now.state {
            WarmState::Failed(error) => {
                tracing::warn!(snapshot = %now.snapshot, error, bytes, bytes_warm, "page cache not warmed");
            }
            WarmState::Partly(why) => {
                tracing::warn!(snapshot = %now.snapshot, %why, bytes, bytes_warm, bytes_read, "page cache warmed in part");
            }
            state => {
                let outcome = state.outcome();
                tracing::info!(snapshot = %now.snapshot, outcome, bytes, bytes_warm, bytes_read, "page cache warmed");
            }
        }
    }

    async fn work(&self, warming: &watch::Sender<Warming>) -> WarmState {
        let _turn = self.turn.acquire().await.expect("it is never closed");
        self.forget_removed().await;
        let (store, id) = (Arc::clone(&self.store), warming.borrow().snapshot.clone());
        let snapshot = match blocking::run(move || store.snapshot(&id)).await {
            Ok(Some(snapshot)) => snapshot,
            Ok(None) => return WarmState::Partly(Shortfall::Removed),
            Err(error) => return WarmState::Failed(Chain(&error).to_string()),
        };
        warming.send_modify(|now| {
            now.state = WarmState::Reading;
            now.bytes = snapshot.manifest.bytes();
        });
        let files = files(&snapshot);
        let short = match self.read(warming, &files).await {
            Ok(short) => short,
            Err((_, error)) if error.kind() == io::ErrorKind::NotFound => {
                return WarmState::Partly(Shortfall::Removed);
            }
            Err((path, error)) => {
                return WarmState::Failed(format!("cannot read `{}`: {error}", path.display()));
            }
        };
        // What was read first may have been dropped by now.
        if let Some(measured) = blocking::run(move || measure(&files)).await {
            warming.send_modify(|now| now.bytes_warm = measured);
        }
        let now = warming.borrow();
        match short {
            _ if now.bytes_warm >= now.bytes => WarmState::Warm,
            Some(short) => WarmState::Partly(short),
            None => WarmState::Partly(Shortfall::Dropped),
        }
    }

    /// Reads what is not in the page cache; `None` if it came to the end.
    async fn read(
        &self,
        warming: &watch::Sender<Warming>,
        files: &[WarmFile],
    ) -> Result<Option<Shortfall>, (PathBuf, io::Error)> {
        let window = match self.limits.bytes_per_second {
            rate if rate < WINDOW_BYTES => SMALL_WINDOW_BYTES,
            _ => WINDOW_BYTES,
        };
        let id = warming.borrow().snapshot.clone();
        let mut ceiling = Ceiling::new(self, &id);
        let mut pace = Pace::new(self.limits.bytes_per_second, now());
        for (path, bytes) in files {
            let failed = |error| (path.clone(), error);
            let opened = path.clone();
            let file = blocking::run(move || WarmedFile::open(opened, window)).await;
            let file = Arc::new(file.map_err(failed)?);
            let mut at = 0;
            while at < *bytes {
                let length = window.min(bytes - at);
                let then = warming.borrow().bytes_warm + length;
                if let Some(short) = ceiling.reached(then).await {
                    return Ok(Some(short));
                }
                let part = Arc::clone(&file);
                let read = blocking::run(move || part.warm(at, length, window)).await;
                let read = read.map_err(failed)?;
                self.metrics.page_cache_read(read);
                warming.send_modify(|now| {
                    now.bytes_warm += length;
                    now.bytes_read += read;
                });
                if read > 0 {
                    tokio::time::sleep(pace.after(read, now())).await;
                }
                at += length;
            }
        }
        Ok(None)
    }

    /// What else was warmed, by what is known of it.
    fn warm_beside(&self, id: &SnapshotId) -> u64 {
        let warmings = self.warmings();
        let others = warmings.iter().filter(|(other, _)| *other != id);
        others.map(|(_, warming)| warming.borrow().bytes_warm).sum()
    }

    /// Looks how much of the other snapshots is still warm.
    async fn measure_beside(&self, id: &SnapshotId) {
        let others: Vec<_> = {
            let warmings = self.warmings();
            let others = warmings.iter().filter(|(other, _)| *other != id);
            others
                .map(|(other, warming)| (other.clone(), Arc::clone(warming)))
                .collect()
        };
        for (other, warming) in others {
            let store = Arc::clone(&self.store);
            let measured = blocking::run(move || {
                let snapshot = store.snapshot(&other).ok()??;
                measure(&files(&snapshot))
            });
            if let Some(measured) = measured.await {
                warming.send_modify(|now| now.bytes_warm = measured);
            }
        }
    }

    /// Forgets what is no longer in the store.
    async fn forget_removed(&self) {
        let ended = |warming: &watch::Sender<Warming>| warming.borrow().state.is_end();
        let known: Vec<SnapshotId> = {
            let warmings = self.warmings();
            let known = warmings.iter().filter(|(_, warming)| ended(warming));
            known.map(|(id, _)| id.clone()).collect()
        };
        let store = Arc::clone(&self.store);
        let removed = blocking::run(move || {
            let is_removed = |id: &SnapshotId| matches!(store.snapshot(id), Ok(None));
            known.into_iter().filter(is_removed).collect::<Vec<_>>()
        });
        for id in removed.await {
            let mut warmings = self.warmings();
            if warmings.get(&id).is_some_and(|warming| ended(warming)) {
                warmings.remove(&id);
            }
        }
    }
}

/// How much may be warm, of one snapshot and all that were warmed before.
struct Ceiling<'a> {
    warmer: &'a Warmer,
    id: &'a SnapshotId,
    /// Of the other snapshots.
    warm: u64,
    measured: bool,
}

impl<'a> Ceiling<'a> {
    fn new(warmer: &'a Warmer, id: &'a SnapshotId) -> Self {
        Self {
            warmer,
            id,
            warm: warmer.warm_beside(id),
            measured: false,
        }
    }

    /// Whether `bytes` of the snapshot would be too many.
    async fn reached(&mut self, bytes: u64) -> Option<Shortfall> {
        let warmer = self.warmer;
        let memory = warmer.memory.clone();
        let available = blocking::run(move || memory.available()).await;
        let ceiling = available / 100 * u64::from(warmer.limits.max_memory_percent);
        warmer.metrics.page_cache_ceiling(ceiling);
        // The kernel may have dropped others meanwhile. To look is not free, so it is done once, when it matters.
        if self.warm + bytes > ceiling && self.warm > 0 && !self.measured {
            self.measured = true;
            warmer.measure_beside(self.id).await;
            self.warm = warmer.warm_beside(self.id);
        }
        (self.warm + bytes > ceiling).then_some(Shortfall::Ceiling(ceiling))
    }
}

/// A file that is being warmed.
struct WarmedFile {
    file: File,
    /// How many bytes of each window were in the page cache before it was read. Later what the kernel reads ahead of us
    /// would look as if it had been there.
    found: Vec<u64>,
}

impl WarmedFile {
    fn open(path: PathBuf, window: u64) -> io::Result<Self> {
        let file = File::open(path)?;
        page_cache::expect_sequential(&file);
        let windows = 0..file.metadata()?.len().div_ceil(window);
        let found = match page_cache::is_told(&file)? {
            true => {
                let look = |number| page_cache::resident(&file, number * window, window);
                windows.map(look).collect::<io::Result<_>>()?
            }
            false => windows.map(|_| 0).collect(),
        };
        Ok(Self { file, found })
    }

    /// Brings `length` bytes, which are a window, into the page cache; returns how many were not there.
    fn warm(&self, offset: u64, length: u64, window: u64) -> io::Result<u64> {
        let number = usize::try_from(offset / window).ok();
        let found = number.and_then(|number| self.found.get(number));
        let missing = length.saturating_sub(found.copied().unwrap_or(0));
        if missing > 0 {
            page_cache::read(&self.file, offset, length, &mut vec![0; BUFFER_BYTES])?;
        }
        Ok(missing)
    }
}

/// The files of a snapshot as a loader opens them: the small ones, then the shards in the order of their index.
fn files(snapshot: &Snapshot) -> Vec<WarmFile> {
    let mut files: Vec<_> = snapshot.manifest.files.iter().collect();
    // Shards are numbered by the index, and the numbers have leading zeros.
    files.sort_by_key(|file| (file.size > SMALL_FILE_BYTES, &file.path));
    let files = files.into_iter();
    files
        .map(|file| (snapshot.path.join(&file.path), file.size))
        .collect()
}

/// How much of the files is in the page cache; `None` if the kernel does not tell.
fn measure(files: &[WarmFile]) -> Option<u64> {
    let mut bytes = 0;
    for (path, _) in files {
        let file = File::open(path).ok()?;
        if !page_cache::is_told(&file).ok()? {
            return None;
        }
        bytes += page_cache::resident(&file, 0, u64::MAX).ok()?;
    }
    Some(bytes)
}

/// By a clock that tests may hold.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests;
