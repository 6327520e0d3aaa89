//! Bringing one snapshot into the local tier: one straight line from a model's name to a directory.
//!
//! A fetch runs in a task of its own, so whoever waits for it may leave. Work on the same request is
//! joined; work on the same bytes, in this process or another, is kept apart by the store's claims.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::blocking;
use crate::buffers::Buffers;
use crate::digest::ClaimMismatch;
use crate::digest::SideBySide;
use crate::errors::Chain;
use crate::metrics::Metrics;
use crate::model::{ModelRef, RelPath};
use crate::shared::SharedTier;
use crate::source::{LeftOut, Source, SourceError, Sources};
use crate::store::{FetchRecord, Snapshot, Store, StoreError};

mod bring;
mod check;
mod file;
mod pace;
mod parts;
mod patience;
mod plan;
mod progress;
mod range;
mod room;
mod seal;
mod share;
#[cfg(test)]
mod tests;
mod turns;
mod wait;
mod width;

pub use check::CheckError;
pub use plan::{Plan, PlannedFile};
pub use progress::{Phase, Progress};
pub use wait::Wait;

use progress::Meter;
use turns::{FileTurns, SnapshotTurns};
use width::Width;

/// What is asked for.
pub type FetchRequest = FetchRecord;

/// How much a fetcher does at once, and how patient it is. The limits hold for all its fetches together, but
/// for that of the files.
#[derive(Debug, Clone, Copy)]
pub struct FetchLimits {
    /// Ranged reads at once, at the most: there are fewer while more would bring no more, or processor time is short.
    pub connections: usize,
    /// Bytes that may have arrived and wait to be written or hashed, of all fetches together. Blocks beyond that go through
    /// the page cache instead.
    pub memory_bytes: u64,
    /// Bytes of one ranged read, at most: 8 MiB. Where a file has many at once they are shorter, so that what they bring has
    /// room in memory.
    ///
    /// Source: Amazon S3 whitepaper, "Use byte-range fetches", which advises 8 or 16 MB.
    pub part_bytes: u64,
    /// Files larger than a part that one fetch works on at once: each has a hasher, which takes one core. All
    /// fetches together may work on four times as many, so that one whose origin is away, and whose files
    /// wait, keeps no other from starting.
    pub files_in_flight: usize,
    /// Tries of one range, or one question, that bring nothing.
    pub attempts: u32,
    /// A connection over which nothing arrives for this long is replaced.
    pub stall_timeout: Duration,
    /// A range is given up only after this time without progress, if the fetch has got bytes before: an
    /// origin's restart or a failover takes a minute.
    pub patience: Duration,
}

impl Default for FetchLimits {
    fn default() -> Self {
        Self {
            connections: 64,
            memory_bytes: 48 << 20,
            part_bytes: 8 << 20,
            files_in_flight: 8,
            attempts: 6,
            stall_timeout: Duration::from_secs(15),
            patience: Duration::from_secs(120),
        }
    }
}

/// What a fetch brought.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The published snapshot.
    pub snapshot: Snapshot,
    /// Bytes received from the origin.
    pub bytes_fetched: u64,
    /// Bytes copied from the shared tier.
    pub bytes_shared: u64,
    /// Bytes that were here already.
    pub bytes_reused: u64,
    /// Time from the request on.
    pub seconds: f64,
    /// What the patterns left out.
    pub left_out: LeftOut,
}

/// Why a fetch failed. The variant says what the caller does next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// The origin did not give it.
    #[error("cannot fetch {model}")]
    Source {
        /// What was asked for.
        model: ModelRef,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// The store did not take it.
    #[error("cannot store {model}")]
    Store {
        /// What was asked for.
        model: ModelRef,
        /// Why.
        #[source]
        source: Arc<StoreError>,
    },
    /// The origin sends other bytes than it claims.
    #[error("cannot fetch {model}: {path} arrived with wrong bytes, more than once")]
    Mismatch {
        /// What was asked for.
        model: ModelRef,
        /// The file.
        path: RelPath,
        /// Which claim does not hold.
        #[source]
        source: ClaimMismatch,
    },
    /// The bytes are what the origin claims, but no loader could read them.
    #[error("cannot publish {model}")]
    Broken {
        /// What was asked for.
        model: ModelRef,
        /// What is wrong.
        #[source]
        source: CheckError,
    },
    /// This process is ending.
    #[error("fetching {model} was stopped")]
    Stopped {
        /// What was asked for.
        model: ModelRef,
    },
    /// Whoever asked for it takes it back.
    #[error("fetching {model} was given up: it is no longer asked for")]
    Unwanted {
        /// What was asked for.
        model: ModelRef,
    },
    /// A defect of ours.
    #[error("fetching {model} ended in a defect of weightd")]
    Defect {
        /// What was asked for.
        model: ModelRef,
    },
}

impl FetchError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Source { source, .. } => source.hint().map(str::to_owned),
            Self::Store { source, .. } => source.hint(),
            Self::Mismatch { .. } => Some(
                "the origin or a proxy on the way damages it; nothing of it was kept".to_owned(),
            ),
            Self::Broken { source, .. } => Some(format!(
                "the origin holds it broken: have it mended there, or leave it out with --exclude '{}'",
                source.path
            )),
            Self::Stopped { .. } => Some("run it again: it goes on where it stopped".to_owned()),
            Self::Unwanted { .. } => None,
            Self::Defect { .. } => Some("please report it with the log".to_owned()),
        }
    }

    /// What it is counted as; `None` for what is no failure.
    fn reason(&self) -> Option<&'static str> {
        Some(match self {
            Self::Source { source, .. } => match source {
                SourceError::NotFound { .. } => "not_found",
                SourceError::Denied { .. } => "denied",
                SourceError::Changed { .. } => "changed",
                SourceError::Unavailable { .. } => "unavailable",
                SourceError::NoRanges { .. } | SourceError::Invalid { .. } => "invalid",
            },
            Self::Store { source, .. } if source.is_no_space() => "no_space",
            Self::Store { .. } => "store",
            Self::Mismatch { .. } => "wrong_bytes",
            Self::Broken { .. } => "invalid",
            Self::Defect { .. } => "defect",
            Self::Stopped { .. } | Self::Unwanted { .. } => return None,
        })
    }

    /// Whether the same request may succeed later, with nothing done about it.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Source { model, source } => match source {
                SourceError::Unavailable { .. } => true,
                // A fixed revision is listed as it was before: the change stays.
                SourceError::Changed { .. } => model.pinned().is_none(),
                SourceError::NotFound { .. }
                | SourceError::Denied { .. }
                | SourceError::NoRanges { .. }
                | SourceError::Invalid { .. } => false,
            },
            Self::Store { source, .. } => {
                source.is_no_space() || matches!(**source, StoreError::SetAside(_))
            }
            Self::Stopped { .. } => true,
            Self::Mismatch { .. }
            | Self::Broken { .. }
            | Self::Unwanted { .. }
            | Self::Defect { .. } => false,
        }
    }
}

/// Fetches models into one store, from any source.
pub struct Fetcher {
    shared: Arc<Shared>,
    active: Mutex<HashMap<FetchRequest, Arc<Job>>>,
    /// What was given up since it was last asked for: nobody is to try it again.
    unwanted: Mutex<HashSet<FetchRequest>>,
    /// One fetch at a time for each snapshot, whatever it was called.
    turns: SnapshotTurns,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// What all fetches share.
struct Shared {
    store: Arc<Store>,
    sources: Arc<dyn Sources>,
    limits: FetchLimits,
    metrics: Arc<Metrics>,
    width: Arc<Width>,
    /// Bytes that arrived and are not written yet.
    buffers: Arc<Buffers>,
    /// Where the hashers of large files meet.
    hashing: Arc<SideBySide>,
    turns: FileTurns,
    tier: Option<Arc<SharedTier>>,
}

type Outcome = Option<Result<Fetched, FetchError>>;

/// One fetch under way.
struct Job {
    request: FetchRequest,
    /// Read with the credentials of whoever asked first; `None` for this process's own.
    source: Option<Arc<dyn Source>>,
    meter: Arc<Meter>,
    /// Where the verified files are until the snapshot is published, by this fetch or one it waits for.
    tree: watch::Sender<Option<PathBuf>>,
    outcome: watch::Sender<Outcome>,
    given_up: CancellationToken,
}

/// Takes a fetch off the list and tells all who wait, however its task ends.
struct Ending<'a> {
    fetcher: &'a Fetcher,
    job: &'a Job,
    outcome: Result<Fetched, FetchError>,
}

impl<'a> Ending<'a> {
    fn new(fetcher: &'a Fetcher, job: &'a Job) -> Self {
        fetcher.shared.metrics.fetches_active.inc();
        Self {
            fetcher,
            job,
            outcome: Err(FetchError::Defect {
                model: job.request.model.clone(),
            }),
        }
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.fetcher.shared.metrics.fetches_active.dec();
        let outcome = std::mem::replace(&mut self.outcome, Err(self.job.stopped()));
        // First off the list, then the news: who asks again after it gets a new fetch.
        let active = self.fetcher.active.lock();
        let mut active = active.unwrap_or_else(PoisonError::into_inner);
        active.remove(&self.job.request);
        drop(active);
        self.job.outcome.send_replace(Some(outcome));
    }
}

/// A caller's view of a fetch, which goes on without it.
pub struct Fetch {
    progress: watch::Receiver<Progress>,
    tree: watch::Receiver<Option<PathBuf>>,
    outcome: watch::Receiver<Outcome>,
    model: ModelRef,
    joined: bool,
}

impl Fetch {
    /// Whether somebody else had asked for it before, with credentials of their own.
    #[must_use]
    pub fn joined(&self) -> bool {
        self.joined
    }

    /// The directory in which its files appear, each as it is verified, once there is one. It goes when
    /// the fetch ends.
    #[must_use]
    pub fn tree(&self) -> watch::Receiver<Option<PathBuf>> {
        self.tree.clone()
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    ///
    /// [`FetchError`], the same for all who wait.
    pub async fn wait(mut self) -> Result<Fetched, FetchError> {
        let ended = self.outcome.wait_for(Option::is_some).await;
        let outcome = ended.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or(Err(FetchError::Stopped { model: self.model }))
    }
}

impl Job {
    fn source_error(&self, source: SourceError) -> FetchError {
        FetchError::Source {
            model: self.request.model.clone(),
            source,
        }
    }

    fn store_error(&self, source: StoreError) -> FetchError {
        FetchError::Store {
            model: self.request.model.clone(),
            source: Arc::new(source),
        }
    }

    fn stopped(&self) -> FetchError {
        FetchError::Stopped {
            model: self.request.model.clone(),
        }
    }

    /// Runs `work` on the blocking pool.
    async fn on_store<T: Send + 'static>(
        &self,
        store: &Arc<Store>,
        work: impl FnOnce(&Arc<Store>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, FetchError> {
        let store = Arc::clone(store);
        blocking::run(move || work(&store))
            .await
            .map_err(|error| self.store_error(error))
    }
}

impl Fetcher {
    /// A fetcher into `store`.
    #[must_use]
    pub fn new(
        store: Arc<Store>,
        sources: Arc<dyn Sources>,
        limits: FetchLimits,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Self::with_tier(store, sources, limits, metrics, None)
    }

    /// The same, beside a shared tier.
    #[must_use]
    pub fn with_tier(
        store: Arc<Store>,
        sources: Arc<dyn Sources>,
        limits: FetchLimits,
        metrics: Arc<Metrics>,
        tier: Option<Arc<SharedTier>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::new(Shared {
                store,
                sources,
                turns: FileTurns::of_all(&limits),
                limits,
                metrics,
                width: Width::new(limits.connections),
                buffers: limits.buffers(),
                hashing: Arc::default(),
                tier,
            }),
            active: Mutex::default(),
            unwanted: Mutex::default(),
            turns: SnapshotTurns::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Starts to fetch, or joins the same request under way. It goes on if the caller leaves.
    pub fn fetch(self: &Arc<Self>, request: FetchRequest) -> Fetch {
        self.no_longer_wanted().remove(&request);
        self.start(request, None)
    }

    /// The same, from a source that has the requester's credentials. A fetch that is joined goes on with
    /// those of whoever began it, as does one that another process resumes with its own.
    pub fn fetch_from(self: &Arc<Self>, source: Arc<dyn Source>, request: FetchRequest) -> Fetch {
        self.start(request, Some(source))
    }

    fn start(self: &Arc<Self>, request: FetchRequest, source: Option<Arc<dyn Source>>) -> Fetch {
        let mut active = self.active.lock().expect("no holder of this lock panics");
        let joined = active.contains_key(&request);
        let job = active.entry(request.clone()).or_insert_with(|| {
            let job = Arc::new(Job {
                meter: Arc::new(Meter::new(request.model.clone())),
                tree: watch::channel(None).0,
                outcome: watch::channel(None).0,
                given_up: CancellationToken::new(),
                source,
                request,
            });
            self.tasks.spawn(Arc::clone(self).run(Arc::clone(&job)));
            job
        });
        Fetch {
            progress: job.meter.subscribe(),
            tree: job.tree.subscribe(),
            outcome: job.outcome.subscribe(),
            model: job.request.model.clone(),
            joined,
        }
    }

    async fn run(self: Arc<Self>, job: Arc<Job>) {
        let mut ending = Ending::new(&self, &job);
        let work = AssertUnwindSafe(self.recorded(&job)).catch_unwind();
        let outcome = tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(job.stopped()),
            () = job.given_up.cancelled() => Err(FetchError::Unwanted { model: job.request.model.clone() }),
            () = job.meter.keep_fresh() => unreachable!("it never ends"),
            outcome = work => outcome.unwrap_or(Err(FetchError::Defect { model: job.request.model.clone() })),
        };
        let ended = match &outcome {
            Ok(_) => "ok",
            Err(FetchError::Stopped { .. } | FetchError::Unwanted { .. }) => "stopped",
            Err(error) => {
                tracing::warn!(model = %job.request.model, error = %Chain(error), "fetch failed");
                "failed"
            }
        };
        let (metrics, scheme) = (&self.shared.metrics, job.request.model.scheme());
        metrics.fetch_ended(scheme, ended, job.meter.elapsed());
        if let Some(reason) = outcome.as_ref().err().and_then(FetchError::reason) {
            metrics.fetch_failed(scheme, reason);
        }
        ending.outcome = outcome;
    }

    /// Brings the snapshot, on record: if this process dies, the next one goes on. It does so as well
    /// after what may pass, such as an origin that is away or a full disk.
    async fn recorded(&self, job: &Arc<Job>) -> Result<Fetched, FetchError> {
        let record = job.request.clone();
        job.on_store(&self.shared.store, move |store| store.record_fetch(&record))
            .await?;
        let outcome = self.bring(job).await;
        if let Ok(fetched) = &outcome {
            self.note_rate(job, fetched).await;
        }
        if !outcome.as_ref().is_err_and(FetchError::may_pass) {
            let record = job.request.clone();
            let forget = move |store: &Arc<Store>| store.forget_fetch(&record);
            if let Err(error) = job.on_store(&self.shared.store, forget).await {
                tracing::warn!(error = %Chain(&error), "the record of a fetch stays, it will run again");
            }
        }
        outcome
    }

    /// Remembers how fast this kind of source was, for [`Fetcher::plan`].
    async fn note_rate(&self, job: &Job, fetched: &Fetched) {
        const TELLING: u64 = 16 << 20;
        if fetched.bytes_fetched < TELLING {
            return;
        }
        let rate = fetched.bytes_fetched as f64 / fetched.seconds.max(0.001);
        let scheme = job.request.model.scheme();
        let noted = job
            .on_store(&self.shared.store, move |store| {
                store.note_rate(scheme, rate)
            })
            .await;
        if let Err(error) = noted {
            tracing::debug!(error = %Chain(&error), "rate not noted");
        }
    }

    /// Stops a fetch that is no longer asked for, and forgets it: neither this process nor the next goes on with
    /// it, until it is asked for again. Who waits for this very request is told [`FetchError::Unwanted`]; so it is
    /// for requests that nobody else makes, such as those with a pin of one's own. What it brought stays as a partial
    /// download.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] if the record of it stays.
    pub async fn give_up(&self, request: &FetchRequest) -> Result<(), StoreError> {
        self.no_longer_wanted().insert(request.clone());
        let job = {
            let active = self.active.lock().expect("no holder of this lock panics");
            active.get(request).map(Arc::clone)
        };
        if let Some(job) = job {
            job.given_up.cancel();
            let mut outcome = job.outcome.subscribe();
            // Its last writes must be done: else its record could come after it is forgotten.
            let _ = outcome.wait_for(Option::is_some).await;
        }
        let (store, record) = (Arc::clone(&self.shared.store), request.clone());
        blocking::run(move || store.forget_fetch(&record)).await
    }

    /// Forgets a fetch that failed for what may pass: neither this process nor the next tries it again until it is
    /// asked for. False if it is under way, and so goes on.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] if the record of it stays.
    pub async fn give_up_if_failed(&self, request: &FetchRequest) -> Result<bool, StoreError> {
        {
            let active = self.active.lock().expect("no holder of this lock panics");
            if active.contains_key(request) {
                return Ok(false);
            }
            self.no_longer_wanted().insert(request.clone());
        }
        let (store, record) = (Arc::clone(&self.shared.store), request.clone());
        blocking::run(move || store.forget_fetch(&record)).await?;
        Ok(true)
    }

    fn no_longer_wanted(&self) -> MutexGuard<'_, HashSet<FetchRequest>> {
        self.unwanted.lock().expect("no holder of this lock panics")
    }

    /// The fetches under way.
    #[must_use]
    pub fn active(&self) -> Vec<Progress> {
        let active = self.active.lock().expect("no holder of this lock panics");
        active.values().map(|job| job.meter.current()).collect()
    }

    /// The shared tier, if there is one.
    #[must_use]
    pub fn tier(&self) -> Option<&Arc<SharedTier>> {
        self.shared.tier.as_ref()
    }

    /// The store that it fetches into.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// Goes on with the fetches that an earlier process left under way, for as long as it takes, but for
    /// those that were asked for too long ago; returns how many.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub fn resume(self: &Arc<Self>) -> Result<usize, StoreError> {
        let store = &self.shared.store;
        let forgotten = store.forget_stale_fetches()?;
        if forgotten > 0 {
            tracing::info!(forgotten, "fetches asked for too long ago are not resumed");
        }
        let records = store.recorded_fetches()?;
        let count = records.len();
        for record in records {
            tracing::info!(model = %record.model, "resuming a fetch");
            let fetcher = Arc::clone(self);
            self.tasks
                .spawn(async move { drop(fetcher.keep_trying(record).await) });
        }
        Ok(count)
    }

    /// Fetches, and again after pauses that grow from 5 s to 5 min, as long as it fails for what may
    /// pass: the origin is away or changed meanwhile, the disk is full, a blob was set aside.
    ///
    /// # Errors
    ///
    /// [`FetchError`]; one that may pass only if this process is ending.
    pub async fn keep_trying(
        self: &Arc<Self>,
        request: FetchRequest,
    ) -> Result<Fetched, FetchError> {
        const LONGEST: Duration = Duration::from_secs(300);
        let mut pause = Duration::from_secs(5);
        loop {
            let outcome = self.fetch(request.clone()).wait().await;
            let again = outcome.as_ref().is_err_and(FetchError::may_pass);
            if !again || self.stop.is_cancelled() {
                return outcome;
            }
            tracing::info!(model = %request.model, pause_s = pause.as_secs(), "trying again later");
            tokio::select! {
                () = self.stop.cancelled() => return outcome,
                () = tokio::time::sleep(pause) => {}
            }
            if self.no_longer_wanted().contains(&request) {
                return outcome;
            }
            pause = (pause * 2).min(LONGEST);
        }
    }

    /// Stops all fetches and waits, at most `deadline`, until they have let go. What they brought is on
    /// disk and on record.
    pub async fn shutdown(&self, deadline: Duration) {
        let begun = Instant::now();
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("fetches did not stop in time");
        }
        if let Some(tier) = &self.shared.tier {
            tier.settle(deadline.saturating_sub(begun.elapsed())).await;
        }
    }
}
