//! What pods' volumes need: the right to a model, its files, and a directory to mount that stays as long
//! as it is held.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::fetch::{Fetch, FetchError, FetchRequest, Fetched, Fetcher, Progress};
use weightd_core::model::{ModelRef, Patterns, SnapshotId};
use weightd_core::source::SourceError;
use weightd_core::store::{Holder, Layout, Store, StoreError, Volume, VolumeRecord};

use crate::access::{Access, AccessError, Grant, Requester};

/// How often a snapshot that was fetched may be evicted before its volume could pin it.
const TURNS: u32 = 5;

/// The pauses between tries to complete a volume that is mounted already.
const PAUSES: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// A pod's volume, as it is asked for.
#[derive(Debug)]
pub struct VolumeRequest {
    /// Whose it is.
    pub holder: Holder,
    /// The model.
    pub model: ModelRef,
    /// Which files.
    pub patterns: Patterns,
    /// Their layout.
    pub layout: Layout,
    /// Answer before the files are there.
    pub at_once: bool,
    /// Who asks.
    pub requester: Requester,
}

/// A directory that its holder may mount.
#[derive(Debug)]
pub struct Acquired {
    /// The directory.
    pub path: PathBuf,
    /// The model at its revision.
    pub model: ModelRef,
    /// The snapshot that it shows.
    pub snapshot: SnapshotId,
    /// All files are there.
    pub complete: bool,
}

/// Why a volume cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// The requester may not have it.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// It cannot be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The store does not take it.
    #[error("cannot make a volume of {model}")]
    Store {
        /// What was asked for.
        model: ModelRef,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// It does not stay long enough to be held.
    #[error("{model} was evicted again and again before it could be held")]
    Evicted {
        /// What was asked for.
        model: ModelRef,
    },
    /// The layout is for repositories of the Hub only.
    #[error("layout hf-cache is for hf:// models, and {model} is none")]
    Layout {
        /// What was asked for.
        model: ModelRef,
    },
}

impl AcquireError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Access(error) => error.hint(),
            Self::Fetch(error) => error.hint(),
            Self::Store { source, .. } => source.hint(),
            Self::Evicted { .. } => {
                Some("give the store more room, or mount fewer models at once".to_owned())
            }
            Self::Layout { .. } => Some("leave `layout` out, or say `flat`".to_owned()),
        }
    }
}

/// The volumes of one node.
pub struct Volumes {
    store: Arc<Store>,
    fetcher: Arc<Fetcher>,
    access: Access,
    /// Who works on volumes that are mounted and not complete.
    filling: Mutex<HashMap<Holder, CancellationToken>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Volumes {
    /// Volumes of what `fetcher` brings, for those whom `access` lets in.
    #[must_use]
    pub fn new(fetcher: Arc<Fetcher>, access: Access) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(fetcher.store()),
            fetcher,
            access,
            filling: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Gives the holder what it asks for. If the caller leaves, the fetch goes on, and nothing is pinned.
    ///
    /// # Errors
    ///
    /// [`AcquireError`].
    pub async fn acquire(
        self: &Arc<Self>,
        request: &VolumeRequest,
        progress: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<Acquired, AcquireError> {
        let (model, patterns) = (&request.model, &request.patterns);
        if request.layout == Layout::HfCache && !matches!(model.scheme().as_str(), "hf") {
            let model = model.clone();
            return Err(AcquireError::Layout { model });
        }
        let access = &self.access;
        let grant = access.grant(model, patterns, &request.requester).await?;
        let record = VolumeRecord {
            model: model.clone(),
            revision: grant.revision.clone(),
            patterns: patterns.clone(),
            layout: request.layout,
        };
        if request.at_once {
            return self.open(request, record, grant).await;
        }
        for _ in 0..TURNS {
            if let Some(acquired) = self.hold(request, &record).await? {
                return Ok(acquired);
            }
            let fetch = self.fetch(&record, Some(&grant));
            let fetch = fetch.map_err(|source| cannot_fetch(&record, source))?;
            let joined = fetch.joined();
            match follow(fetch, |now, _| progress(now)).await {
                // Whoever began it may no longer read it: then it is the turn of this requester's own right.
                Err(FetchError::Source {
                    source: SourceError::Denied { .. } | SourceError::NotFound { .. },
                    ..
                }) if joined => {}
                outcome => drop(outcome?),
            }
        }
        let model = model.clone();
        Err(AcquireError::Evicted { model })
    }

    /// Pins the snapshot, if it is here, and says what to mount.
    async fn hold(
        &self,
        request: &VolumeRequest,
        record: &VolumeRecord,
    ) -> Result<Option<Acquired>, AcquireError> {
        let (holder, own) = (request.holder.clone(), request.layout != Layout::Flat);
        let record = record.clone();
        self.on_store(&request.model, move |store| {
            let id = record.snapshot();
            let held = store.hold(&record.model, &record.revision, &id, &holder)?;
            let Some((manifest, mut path)) = held else {
                return Ok(None);
            };
            if own {
                path = store.open_volume(&holder, &record)?;
                store.complete_volume(&holder)?;
            }
            Ok(Some(Acquired {
                path,
                model: manifest.model,
                snapshot: id,
                complete: true,
            }))
        })
        .await
    }

    /// Makes a tree that can be mounted now, and sees to it that it is filled.
    async fn open(
        self: &Arc<Self>,
        request: &VolumeRequest,
        record: VolumeRecord,
        grant: Grant,
    ) -> Result<Acquired, AcquireError> {
        let (holder, opened) = (request.holder.clone(), record.clone());
        let (path, complete) = self
            .on_store(&request.model, move |store| {
                let path = store.open_volume(&holder, &opened)?;
                let id = opened.snapshot();
                let held = store.hold(&opened.model, &opened.revision, &id, &holder)?;
                if held.is_some() {
                    store.complete_volume(&holder)?;
                }
                Ok((path, held.is_some()))
            })
            .await?;
        let (model, snapshot) = (record.model.at(&record.revision), record.snapshot());
        if !complete {
            self.keep_filling(request.holder.clone(), record, Some(grant));
        }
        Ok(Acquired {
            path,
            model,
            snapshot,
            complete,
        })
    }

    fn fetch(&self, record: &VolumeRecord, grant: Option<&Grant>) -> Result<Fetch, SourceError> {
        let model = record.model.at(&record.revision);
        let source = grant.map(|grant| grant.open(&model)).transpose()?;
        let request = FetchRequest {
            model,
            patterns: record.patterns.clone(),
            pin: None,
        };
        Ok(match source {
            Some(source) => self.fetcher.fetch_from(source, request),
            None => self.fetcher.fetch(request),
        })
    }

    /// Fills a mounted volume until it is complete, its holder lets go, or the process ends.
    fn keep_filling(self: &Arc<Self>, holder: Holder, record: VolumeRecord, grant: Option<Grant>) {
        let stop = self.stop.child_token();
        {
            let mut filling = self.filling();
            if filling.contains_key(&holder) {
                return;
            }
            filling.insert(holder.clone(), stop.clone());
        }
        let volumes = Arc::clone(self);
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = volumes.fill(&holder, &record, grant.as_ref()) => {}
            }
            // Released and asked for again, the place in the map is another task's.
            let mut filling = volumes.filling();
            if !stop.is_cancelled() {
                filling.remove(&holder);
            }
        });
    }

    async fn fill(&self, holder: &Holder, record: &VolumeRecord, grant: Option<&Grant>) {
        let mut pause = PAUSES.0;
        loop {
            let error = match self.fill_once(holder, record, grant).await {
                Ok(()) => return,
                Err(error) => error,
            };
            let word = if passes(&error) { "retrying" } else { "failed" };
            let hint = error.hint().map(|hint| format!(" ({hint})"));
            let why = format!("{word}: {}{}", Chain(&error), hint.unwrap_or_default());
            tracing::warn!(%holder, model = %record.model, error = %Chain(&error), pause_s = pause.as_secs(), "volume not complete, trying again later");
            let told = holder.clone();
            let explained = self.on_store(&record.model, move |store| {
                store.explain_volume(&told, &why)
            });
            if let Err(error) = explained.await {
                tracing::warn!(%holder, error = %Chain(&error), "cannot say in the volume why it is not complete");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn fill_once(
        &self,
        holder: &Holder,
        record: &VolumeRecord,
        grant: Option<&Grant>,
    ) -> Result<(), AcquireError> {
        let fetch = self.fetch(record, grant);
        let fetch = fetch.map_err(|source| cannot_fetch(record, source))?;
        let shown = Mutex::new(0);
        let (store, named) = (Arc::clone(&self.store), holder.clone());
        follow(fetch, |now, tree| {
            let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(tree) = tree
                && now.files_done > *shown
            {
                *shown = now.files_done;
                let (store, holder) = (Arc::clone(&store), named.clone());
                tokio::spawn(blocking::run(move || {
                    // What is missed here is made up for when the snapshot is published.
                    if let Err(error) = store.fill_volume(&holder, &tree) {
                        tracing::debug!(%holder, error = %Chain(&error), "volume not filled yet");
                    }
                }));
            }
        })
        .await?;
        let (holder, done) = (holder.clone(), record.clone());
        self.on_store(&record.model, move |store| {
            store.hold(&done.model, &done.revision, &done.snapshot(), &holder)?;
            store.complete_volume(&holder)
        })
        .await
    }

    /// Lets go of all that the holder holds; returns how many snapshots that were.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub async fn release(&self, holder: Holder) -> Result<u32, StoreError> {
        if let Some(stop) = self.filling().remove(&holder) {
            stop.cancel();
        }
        let store = Arc::clone(&self.store);
        blocking::run(move || store.release(&holder)).await
    }

    /// What the holders of volumes hold.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub async fn list(&self) -> Result<Vec<Volume>, StoreError> {
        let store = Arc::clone(&self.store);
        blocking::run(move || store.volumes()).await
    }

    /// Goes on filling the volumes that an earlier process left incomplete, with this process's own
    /// credentials: those of the pods were never on disk.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub async fn resume(self: &Arc<Self>) -> Result<(), StoreError> {
        for volume in self.list().await? {
            if let Some(record) = volume.record.filter(|_| !volume.complete) {
                tracing::info!(holder = %volume.holder, model = %record.model, "resuming a volume");
                self.keep_filling(volume.holder, record, None);
            }
        }
        Ok(())
    }

    /// Stops filling volumes.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn filling(&self) -> std::sync::MutexGuard<'_, HashMap<Holder, CancellationToken>> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn on_store<T: Send + 'static>(
        &self,
        model: &ModelRef,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, AcquireError> {
        let store = Arc::clone(&self.store);
        blocking::run(move || work(&store)).await.map_err(|source| {
            let model = model.clone();
            AcquireError::Store { model, source }
        })
    }
}

fn cannot_fetch(record: &VolumeRecord, source: SourceError) -> FetchError {
    let model = record.model.clone();
    FetchError::Source { model, source }
}

/// Waits for a fetch, and reports how far it is and where its verified files are.
async fn follow(
    fetch: Fetch,
    mut report: impl FnMut(&Progress, Option<PathBuf>) + Send,
) -> Result<Fetched, FetchError> {
    let mut changes = fetch.progress();
    let tree = fetch.tree();
    let outcome = fetch.wait();
    tokio::pin!(outcome);
    loop {
        tokio::select! {
            biased;
            outcome = &mut outcome => return outcome,
            Ok(()) = changes.changed() => {
                let now = changes.borrow_and_update().clone();
                report(&now, tree.borrow().clone());
            }
        }
    }
}

/// Whether it may work later with nothing changed by hand.
fn passes(error: &AcquireError) -> bool {
    match error {
        AcquireError::Access(AccessError::Source { source, .. })
        | AcquireError::Fetch(FetchError::Source { source, .. }) => matches!(
            source,
            SourceError::Unavailable { .. } | SourceError::Changed { .. }
        ),
        AcquireError::Fetch(FetchError::Store { .. } | FetchError::Stopped { .. })
        | AcquireError::Store { .. }
        | AcquireError::Evicted { .. } => true,
        AcquireError::Access(_) | AcquireError::Fetch(_) | AcquireError::Layout { .. } => false,
    }
}
