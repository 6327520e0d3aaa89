//! The only door to the shared tier: every call is bounded in time and number, and a tier that does not answer is
//! left out until it does.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use super::choice::Egress;
use super::choice::{BEATS, NODE_COPIES, Reach, WRITES};
use super::{BLOCK_BYTES, Rates, SharedError, SharedLease, SharedOptions, SharedStore, lustre};
use crate::blocking;
use crate::buffers::Buffers;
use crate::errors::Chain;
use crate::metrics::Metrics;
use crate::store::StageKey;

/// How the shared tier is used.
#[derive(Debug, Clone)]
pub struct SharedConfig {
    /// Its directory.
    pub root: PathBuf,
    /// How often a byte may leave its origin.
    pub egress: Egress,
    /// What it is made with, and must be.
    pub options: SharedOptions,
    /// A claim that does not change for this long has lost its owner.
    pub claim_timeout: Duration,
    /// A call that takes longer shows that the tier does not answer.
    pub stall_timeout: Duration,
}

impl SharedConfig {
    /// With the defaults: a claim lasts 15 s, a call 5 s.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            egress: Egress::Once,
            options: SharedOptions::default(),
            claim_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(5),
        }
    }
}

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The tier is left out for now.
    #[error("the shared tier is left out: {0}")]
    Away(String),
    /// The call failed.
    #[error(transparent)]
    Failed(#[from] SharedError),
}

/// How the tier is, as users see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierState {
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written, too.
    pub writable: bool,
    /// Why it cannot; empty if it can.
    pub detail: String,
}

/// Why a tier is left out at first.
const UNSEEN: &str = "it was not looked at yet";

/// Calls at once. Those that hang hold a thread each: the rest of the blocking pool stays free.
const CALLS: usize = 24;

/// Pauses between looks at a tier that is left out.
const PAUSE: Duration = Duration::from_secs(2);

/// How long claims and leases may take to be removed at the end.
const LET_GO: Duration = Duration::from_secs(2);

/// A tier that could not be written is not written to for so long, or it would be tried for every segment.
const SPARE: Duration = Duration::from_secs(30);

/// A tier that answered so short a time ago is not asked again whether it does.
const FRESH: Duration = Duration::from_secs(10);

/// The shared tier as one process uses it.
pub struct SharedTier {
    config: SharedConfig,
    /// Names this process in claims and leases.
    owner: String,
    state: Mutex<State>,
    calls: Arc<Semaphore>,
    writes: Semaphore,
    copies: Semaphore,
    rates: Rates,
    buffers: Arc<Buffers>,
    outstanding: AtomicU64,
    copying: AtomicU64,
    /// Bytes written by this process.
    wrote: AtomicU64,
    /// Something changed that a file may wait for.
    changed: Notify,
    /// The prober has something to look at.
    suspicion: Notify,
    /// It has looked.
    looked: Notify,
    metrics: Arc<Metrics>,
    tasks: TaskTracker,
    /// What is written behind.
    behind: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug)]
struct State {
    store: Option<Arc<SharedStore>>,
    /// Why it is left out.
    away: Option<String>,
    /// And since when.
    away_since: Instant,
    /// Why it is not written to.
    read_only: Option<String>,
    /// However well it looks before.
    read_only_until: Option<Instant>,
    answered: Option<Instant>,
    layout_set: bool,
}

/// Bytes that this process has set out to bring. Dropping it says that they came, or will not.
pub(crate) struct Owed {
    tier: Arc<SharedTier>,
    bytes: u64,
    way: fn(&SharedTier) -> &AtomicU64,
}

impl Drop for Owed {
    fn drop(&mut self) {
        (self.way)(&self.tier).fetch_sub(self.bytes, Ordering::Relaxed);
        // Another file may claim or copy now.
        self.tier.changed.notify_waiters();
    }
}

/// A lease that is kept up until it is dropped.
pub(crate) struct KeptLease {
    _end: tokio_util::sync::DropGuard,
}

impl SharedTier {
    /// The tier at `config.root`; it is looked at in the background from now on.
    #[must_use]
    pub fn new(config: SharedConfig, metrics: Arc<Metrics>) -> Arc<Self> {
        let host = nix::unistd::gethostname().unwrap_or_default();
        metrics.shared_is_configured();
        let tier = Arc::new(Self {
            owner: format!("{} {}", host.to_string_lossy(), uuid::Uuid::new_v4()),
            state: Mutex::new(State {
                store: None,
                away: Some(UNSEEN.to_owned()),
                away_since: Instant::now(),
                read_only: None,
                read_only_until: None,
                answered: None,
                layout_set: false,
            }),
            calls: Arc::new(Semaphore::new(CALLS)),
            writes: Semaphore::new(WRITES),
            copies: Semaphore::new(NODE_COPIES),
            rates: Rates::default(),
            buffers: Buffers::new(BLOCK_BYTES as usize, NODE_COPIES + WRITES),
            outstanding: AtomicU64::new(0),
            copying: AtomicU64::new(0),
            wrote: AtomicU64::new(0),
            changed: Notify::new(),
            suspicion: Notify::new(),
            looked: Notify::new(),
            metrics,
            tasks: TaskTracker::new(),
            behind: TaskTracker::new(),
            stop: CancellationToken::new(),
            config,
        });
        tier.tasks.spawn(Arc::clone(&tier).keep_watch());
        tier
    }

    /// How it is used.
    #[must_use]
    pub fn config(&self) -> &SharedConfig {
        &self.config
    }

    /// How fast each way has been.
    #[must_use]
    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    /// How it is.
    #[must_use]
    pub fn state(&self) -> TierState {
        let state = self.lock();
        let why = state.away.clone().or_else(|| state.read_only.clone());
        TierState {
            readable: state.away.is_none(),
            writable: state.away.is_none() && state.read_only.is_none(),
            detail: why.unwrap_or_default(),
        }
    }

    pub(crate) fn reach(&self) -> Reach {
        let state = self.lock();
        match (&state.away, &state.read_only) {
            (Some(_), _) => Reach::Away,
            (None, Some(_)) => Reach::ReadOnly,
            (None, None) => Reach::Full,
        }
    }

    pub(crate) fn buffers(&self) -> &Arc<Buffers> {
        &self.buffers
    }

    pub(crate) fn owner(&self) -> &str {
        &self.owner
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Owns what is written behind, until [`SharedTier::settle`].
    pub(crate) fn behind(&self) -> &TaskTracker {
        &self.behind
    }

    pub(crate) fn stopped(&self) -> &CancellationToken {
        &self.stop
    }

    pub(crate) fn writes(&self) -> &Semaphore {
        &self.writes
    }

    pub(crate) fn copies(&self) -> &Semaphore {
        &self.copies
    }

    pub(crate) fn changed(&self) -> &Notify {
        &self.changed
    }

    pub(crate) fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::Relaxed)
    }

    /// Bytes that are being copied.
    pub(crate) fn copying(&self) -> u64 {
        self.copying.load(Ordering::Relaxed)
    }

    /// Bytes that this process has written.
    pub(crate) fn wrote(&self) -> u64 {
        self.wrote.load(Ordering::Relaxed)
    }

    pub(crate) fn count_written(&self, bytes: u64) {
        self.wrote.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that are to be fetched from an origin.
    pub(crate) fn owe(self: &Arc<Self>, bytes: u64) -> Owed {
        self.count(bytes, |tier| &tier.outstanding)
    }

    /// Counts bytes that are to be copied.
    pub(crate) fn owe_copy(self: &Arc<Self>, bytes: u64) -> Owed {
        self.count(bytes, |tier| &tier.copying)
    }

    fn count(self: &Arc<Self>, bytes: u64, way: fn(&Self) -> &AtomicU64) -> Owed {
        way(self).fetch_add(bytes, Ordering::Relaxed);
        let tier = Arc::clone(self);
        Owed { tier, bytes, way }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// Waits until it was looked at once: at most one stall timeout.
    pub async fn seen(&self) {
        let looked = self.looked.notified();
        if self.lock().away.as_deref() == Some(UNSEEN) {
            let _ = timeout(self.config.stall_timeout, looked).await;
        }
    }

    /// Whether it answers, after a look if the last one is old: at most one stall timeout.
    pub async fn answers(&self) -> bool {
        let fresh = |state: &State| state.answered.is_some_and(|at| at.elapsed() < FRESH);
        {
            let state = self.lock();
            if state.away.is_none() && fresh(&state) {
                return true;
            }
            // The prober has had its time, and tells when it is back: not every file waits for that anew.
            if state.away.is_some() && state.away_since.elapsed() >= self.config.stall_timeout {
                return false;
            }
        }
        // Before the wake-up: the answer may come at once.
        let looked = self.looked.notified();
        self.suspicion.notify_one();
        let _ = timeout(self.config.stall_timeout, looked).await;
        self.lock().away.is_none()
    }

    /// Runs `work` on the blocking pool, and waits no longer than the stall timeout.
    ///
    /// # Errors
    ///
    /// [`Trouble`]. After a call that hangs, and after errors that mean as much, the tier is left out.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&SharedStore) -> Result<T, SharedError> + Send + 'static,
    ) -> Result<T, Trouble> {
        self.run_within(self.config.stall_timeout, work).await
    }

    /// The same for work that takes longer than one call.
    pub(crate) async fn run_within<T: Send + 'static>(
        &self,
        patience: Duration,
        work: impl FnOnce(&SharedStore) -> Result<T, SharedError> + Send + 'static,
    ) -> Result<T, Trouble> {
        let store = {
            let state = self.lock();
            match (&state.store, &state.away) {
                (Some(store), None) => Arc::clone(store),
                (_, away) => return Err(Trouble::Away(away.clone().unwrap_or_default())),
            }
        };
        match self.bounded(patience, move || work(&store)).await {
            Some(Ok(value)) => {
                self.lock().answered = Some(Instant::now());
                Ok(value)
            }
            Some(Err(error)) => {
                self.failed(&error);
                Err(error.into())
            }
            None => {
                let seconds = patience.as_secs_f64();
                let why = format!("it did not answer for {seconds} s");
                self.leave_out(why.clone());
                Err(Trouble::Away(why))
            }
        }
    }

    /// `None` if it takes longer: then it goes on without us, and holds its place.
    async fn bounded<T: Send + 'static>(
        &self,
        patience: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let until = Instant::now() + patience;
        let calls = Arc::clone(&self.calls);
        let place = tokio::time::timeout_at(until, calls.acquire_owned());
        let place: OwnedSemaphorePermit = place.await.ok()?.expect("nobody closes it");
        let call = blocking::run(move || {
            let done = work();
            drop(place);
            done
        });
        tokio::time::timeout_at(until, call).await.ok()
    }

    fn failed(&self, error: &SharedError) {
        if error.is_only_writing() {
            let mut state = self.lock();
            if state.read_only.is_none() {
                tracing::warn!(error = %Chain(error), "shared tier not written to for now");
                self.metrics.shared_failed("unwritable");
                state.read_only = Some(Chain(error).to_string());
                state.read_only_until = Some(Instant::now() + SPARE);
            }
            drop(state);
            self.show();
        }
        // A name that is gone may be a neighbour's doing, or the file system is: the prober knows.
        self.suspicion.notify_one();
    }

    fn leave_out(&self, why: String) {
        let mut state = self.lock();
        if state.away.is_none() {
            tracing::warn!(why, "shared tier left out");
            self.metrics.shared_failed("away");
            state.away_since = Instant::now();
        }
        state.away = Some(why);
        drop(state);
        self.show();
        self.suspicion.notify_one();
    }

    fn show(&self) {
        self.metrics.shared_reach(self.reach());
        self.changed.notify_waiters();
    }

    /// Looks whether the tier can be used, when somebody doubts it and as long as it cannot.
    async fn keep_watch(self: Arc<Self>) {
        loop {
            self.look().await;
            self.looked.notify_waiters();
            // However many doubt it.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let again = match self.reach() {
                Reach::Full => Duration::MAX,
                Reach::ReadOnly | Reach::Away => PAUSE,
            };
            let again = Instant::now().checked_add(again);
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.suspicion.notified() => {}
                () = async {
                    match again {
                        Some(at) => tokio::time::sleep_until(at).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }

    async fn look(&self) {
        let (root, options) = (self.config.root.clone(), self.config.options.clone());
        let (before, layout_set) = {
            let state = self.lock();
            (state.store.clone(), state.layout_set)
        };
        let seen = before.is_some();
        let looked = self.bounded(self.config.stall_timeout, move || {
            let store = match seen {
                // What was there is not mounted any more: nothing is made in its place.
                true => SharedStore::open_existing(&root)?,
                false => SharedStore::open(&root, &options)?,
            };
            // It can be read; whether it can be written is another question.
            let (_, free) = store.capacity()?;
            let written = match free < 2 * store.segment_bytes() {
                true => Err(format!("only {free} bytes are free")),
                false => store.probe().map_err(|error| Chain(&error).to_string()),
            };
            Ok::<_, SharedError>((written, store))
        });
        let looked = tokio::select! {
            looked = looked => looked,
            () = self.stop.cancelled() => return,
        };
        let (probe, store) = match looked {
            None => {
                let seconds = self.config.stall_timeout.as_secs_f64();
                return self.leave_out_quietly(format!("it did not answer for {seconds} s"));
            }
            Some(Err(error)) => return self.leave_out_quietly(Chain(&error).to_string()),
            Some(Ok(found)) => found,
        };
        let same = before.filter(|before| before.id() == store.id());
        let store = same.unwrap_or_else(|| Arc::new(store));
        if !layout_set && probe.is_ok() {
            self.set_layout(Arc::clone(&store)).await;
        }
        let mut state = self.lock();
        let spared = state
            .read_only_until
            .is_some_and(|until| until > Instant::now());
        let read_only = match probe {
            Err(why) => Some(why),
            Ok(()) if spared => state.read_only.take(),
            Ok(()) => None,
        };
        if state.away.is_some() || state.read_only.is_some() && read_only.is_none() {
            let (root, why) = (store.root().display(), read_only.as_deref());
            tracing::info!(%root, only_read = why, "shared tier in use");
        }
        state.store = Some(store);
        state.away = None;
        state.read_only = read_only;
        state.answered = Some(Instant::now());
        state.layout_set = true;
        drop(state);
        self.show();
    }

    /// Without waking the prober, which is who calls it.
    fn leave_out_quietly(&self, why: String) {
        let mut state = self.lock();
        let first = state.store.is_none() && state.answered.is_none();
        if state.away.is_none() || first && state.away.as_deref() != Some(&why) {
            tracing::warn!(why, "shared tier left out");
            self.metrics.shared_failed("away");
        }
        if state.away.is_none() {
            state.away_since = Instant::now();
        }
        state.away = Some(why);
        drop(state);
        self.show();
    }

    /// Lustre needs to be told how to spread large files. Without it they are slower, no more.
    async fn set_layout(&self, store: Arc<SharedStore>) {
        let set = self.bounded(self.config.stall_timeout * 2, move || store.set_layout());
        match set.await {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                tracing::warn!(error = %Chain(&error), "stripe layout of the shared tier not set");
            }
            None => tracing::warn!("stripe layout of the shared tier not set in time"),
        }
    }

    /// Leases blobs until the guard is dropped. Without the tier there is nothing to lease.
    pub(crate) async fn lease(self: &Arc<Self>, keys: Vec<StageKey>) -> Option<KeptLease> {
        let owner = self.owner.clone();
        let lease = self.run(move |store| store.lease(&keys, &owner)).await;
        let lease = lease
            .inspect_err(|error| tracing::debug!(error = %Chain(error), "blobs not leased"))
            .ok()?;
        let end = self.stop.child_token();
        let guard = end.clone().drop_guard();
        self.tasks.spawn(Arc::clone(self).keep_up(lease, end));
        Some(KeptLease { _end: guard })
    }

    async fn keep_up(self: Arc<Self>, lease: SharedLease, end: CancellationToken) {
        let lease = Arc::new(lease);
        let mut beats = tokio::time::interval(self.config.claim_timeout / BEATS);
        let mut beat = 0;
        loop {
            tokio::select! {
                () = end.cancelled() => break,
                _ = beats.tick() => {}
            }
            beat += 1;
            let beaten = Arc::clone(&lease);
            if let Err(error) = self.run(move |_| beaten.beat(beat)).await {
                tracing::debug!(error = %Chain(&error), "lease not kept up");
            }
        }
        if let Some(lease) = Arc::into_inner(lease) {
            let _ = self.run(move |_| lease.end()).await;
        }
    }

    /// Waits, at most `deadline`, until what this process owes the other nodes is written; then lets go.
    pub async fn settle(&self, deadline: Duration) {
        self.behind.close();
        let _ = timeout(deadline, self.behind.wait()).await;
        self.stop.cancel();
        self.tasks.close();
        let let_go = async {
            self.behind.wait().await;
            self.tasks.wait().await;
        };
        if timeout(LET_GO, let_go).await.is_err() {
            tracing::warn!("shared tier did not let go in time");
        }
    }

    /// How many files are being written behind.
    #[must_use]
    pub fn writes_under_way(&self) -> usize {
        self.behind.len()
    }
}

impl SharedStore {
    /// Tells Lustre how blobs are to be spread, once: a directory hands it on to what is made in it.
    fn set_layout(&self) -> Result<(), lustre::LustreError> {
        let blobs = self.blobs();
        let on_lustre = lustre::FileSystem::of(&blobs).is_ok_and(lustre::FileSystem::is_lustre);
        // Who made the store set it. Another node's later setting would change nothing but new files.
        let fresh = std::fs::read_dir(&blobs).is_ok_and(|mut entries| entries.next().is_none());
        if on_lustre && fresh {
            lustre::set_layout(&blobs)?;
        }
        Ok(())
    }
}
