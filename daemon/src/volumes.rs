//! What pods' volumes need: the right to a model, its files, and a directory to mount that stays as long
//! as it is held.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weightd_core::blocking;
use weightd_core::fetch::{Fetch, FetchError, FetchRequest, Fetched, Fetcher, Progress, Wait};
use weightd_core::model::{ModelRef, Patterns, Revision, SnapshotId};
use weightd_core::source::SourceError;
use weightd_core::store::{Holder, Layout, Store, StoreError, Volume, VolumeRecord};
use weightd_core::warm::Warmer;

use crate::access::{Access, AccessError, Grant, Requester};

mod asked;
mod fill;
mod turn;

use asked::Asked;
use fill::Filler;
pub use fill::Told;
use turn::{Turn, Turns, Untold};

/// How often a snapshot that was fetched may be evicted before its volume could pin it, and how often a
/// fetch may be joined that others began without the right to it.
const TURNS: u32 = 5;

/// How often a call that waits for the right to a model says why.
const LOOK: Duration = Duration::from_secs(1);

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
    /// Read the model into the page cache once it is complete. The answer does not wait for that.
    pub warm: bool,
    /// Who asks.
    pub requester: Requester,
}

/// A directory that its holder may mount. Dropped before [`Acquired::told`], it is released again, unless
/// the holder had something before.
pub struct Acquired {
    /// The directory.
    pub path: PathBuf,
    /// The model at its revision.
    pub model: ModelRef,
    /// The snapshot that it shows.
    pub snapshot: SnapshotId,
    /// All files are there.
    pub complete: bool,
    /// The bytes of all files; `None` while they are not there.
    pub bytes: Option<u64>,
    /// Somebody waits, or has waited, for the files.
    pub waited: bool,
    untold: Untold,
}

impl Acquired {
    /// The client was told of it: it stays until it is released.
    pub fn told(self) {
        self.untold.told();
    }
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
    /// Others asked for it at the same time, and were refused: that is no answer to this requester.
    #[error("{model} was fetched only for others, again and again, and they may not read it")]
    Others {
        /// What was asked for.
        model: ModelRef,
        /// What the last of them was told.
        #[source]
        source: FetchError,
    },
    /// Its holder let go of it meanwhile.
    #[error("{model} was released while it was acquired")]
    Released {
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
            Self::Others { .. } => Some("nothing to do: it is tried again".to_owned()),
            Self::Released { .. } => None,
            Self::Layout { .. } => Some("leave `layout` out, or say `flat`".to_owned()),
        }
    }
}

/// The volumes of one node.
pub struct Volumes {
    store: Arc<Store>,
    fetcher: Arc<Fetcher>,
    warmer: Arc<Warmer>,
    access: Access,
    /// Who works on volumes that are mounted and not complete.
    filling: Mutex<HashMap<Holder, Filler>>,
    asked: Asked,
    /// How far the volumes are that this process fills or has filled.
    told: Mutex<HashMap<Holder, Told>>,
    /// The calls that are under way, by holder.
    turns: Mutex<HashMap<Holder, Weak<Turns>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// A call for a volume, until it is dropped.
pub struct Asking {
    volumes: Arc<Volumes>,
    holder: Holder,
}

impl Asking {
    /// The volume was given: nobody waits for it any more.
    pub fn given(self) {
        self.volumes.asked.remove(&self.holder);
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.volumes.asked.end(&self.holder);
    }
}

impl Volumes {
    /// Volumes of what `fetcher` brings, for those whom `access` lets in.
    #[must_use]
    pub fn new(fetcher: Arc<Fetcher>, warmer: Arc<Warmer>, access: Access) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(fetcher.store()),
            fetcher,
            warmer,
            access,
            filling: Mutex::default(),
            asked: Asked::default(),
            told: Mutex::default(),
            turns: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Gives the holder what it asks for. If the caller leaves, the fetch goes on. What the holder was given
    /// is released again if this is dropped, or its outcome is before the client was [told](Acquired::told).
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
        let turn = self.turn(&request.holder).await;
        let asked = match self.opened(request).await? {
            Some(revision) => model.at(&revision),
            None => model.clone(),
        };
        let grant = self.granted(&asked, request, progress).await?;
        let record = VolumeRecord {
            model: model.clone(),
            revision: grant.revision.clone(),
            patterns: patterns.clone(),
            layout: request.layout,
        };
        if request.at_once {
            return self.open(request, &turn, record, grant).await;
        }
        for _ in 0..TURNS {
            if let Some(acquired) = self.hold(request, &turn, &record).await? {
                let waited = self.asked.remove(&request.holder).is_some();
                return Ok(Acquired { waited, ..acquired });
            }
            self.asked.missed(&request.holder, fetch_request(&record));
            self.bring(&record, Some(&grant), &mut |now, _| progress(now))
                .await?;
        }
        let model = model.clone();
        Err(AcquireError::Evicted { model })
    }

    /// Establishes that the requester may have `model`, and reports a rate limit that this waits for.
    async fn granted(
        &self,
        model: &ModelRef,
        request: &VolumeRequest,
        report: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<Grant, AccessError> {
        let (access, requester) = (&self.access, &request.requester);
        let mut grant = std::pin::pin!(access.grant(model, &request.patterns, requester));
        loop {
            tokio::select! {
                grant = &mut grant => return grant,
                () = tokio::time::sleep(LOOK) => {}
            }
            let limited = access.limited_for(model, requester);
            let wait = limited.map(|left| Wait::RateLimit {
                until: SystemTime::now() + left,
            });
            report(&Progress {
                wait,
                ..Progress::of(model.clone())
            });
        }
    }

    /// Counts the holder's volume as one that kubelet waits for, until it is given or released, or kubelet has long
    /// ceased to ask.
    #[must_use]
    pub fn asked(self: &Arc<Self>, holder: &Holder) -> Asking {
        self.asked.begin(holder);
        let (volumes, holder) = (Arc::clone(self), holder.clone());
        Asking { volumes, holder }
    }

    /// How many volumes kubelet waits for, in a call or until the next.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.asked.waiting()
    }

    /// What the holder's own directory was opened for, if it has one.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub async fn opened_for(&self, holder: &Holder) -> Result<Option<VolumeRecord>, StoreError> {
        let (store, holder) = (Arc::clone(&self.store), holder.clone());
        blocking::run(move || store.opened_volume(&holder)).await
    }

    /// The revision that a volume was opened with, if it is asked for at once and again. It may be mounted
    /// by now: a name that has moved meanwhile must not take the tree away below the mount.
    async fn opened(&self, request: &VolumeRequest) -> Result<Option<Revision>, AcquireError> {
        if !request.at_once {
            return Ok(None);
        }
        let holder = request.holder.clone();
        let opened = self.on_store(&request.model, move |store| store.opened_volume(&holder));
        let same = opened.await?.filter(|record| {
            record.model == request.model
                && record.patterns == request.patterns
                && record.layout == request.layout
        });
        Ok(same.map(|record| record.revision))
    }

    /// Pins the snapshot, if it is here, and says what to mount.
    async fn hold(
        self: &Arc<Self>,
        request: &VolumeRequest,
        turn: &Turn,
        record: &VolumeRecord,
    ) -> Result<Option<Acquired>, AcquireError> {
        let (holder, own) = (request.holder.clone(), request.layout != Layout::Flat);
        let (id, record) = (record.snapshot(), record.clone());
        let held = self.give(turn, &request.holder, &request.model, move |store| {
            let id = record.snapshot();
            let held = store.hold(&record.model, &record.revision, &id, &holder)?;
            let Some((manifest, mut path)) = held else {
                return Ok(None);
            };
            if own {
                path = store.open_volume(&holder, &record)?;
                store.complete_volume(&holder, &id)?;
            } else {
                // Of an earlier call, which was never mounted: nobody is to fill it.
                store.remove_volume(&holder)?;
            }
            let bytes = manifest.bytes();
            Ok(Some((path, manifest.model, bytes)))
        });
        let Some(((path, model, bytes), untold)) = held.await? else {
            return Ok(None);
        };
        self.stop_filling(&request.holder);
        if request.warm {
            self.warmer.warm(&model, &id);
        }
        Ok(Some(Acquired {
            path,
            model,
            snapshot: id,
            complete: true,
            bytes: Some(bytes),
            waited: false,
            untold,
        }))
    }

    /// Makes a tree that can be mounted now, and sees to it that it is filled.
    async fn open(
        self: &Arc<Self>,
        request: &VolumeRequest,
        turn: &Turn,
        record: VolumeRecord,
        grant: Grant,
    ) -> Result<Acquired, AcquireError> {
        let (holder, opened) = (request.holder.clone(), record.clone());
        let given = self.give(turn, &request.holder, &request.model, move |store| {
            let path = store.open_volume(&holder, &opened)?;
            let id = opened.snapshot();
            let held = store.hold(&opened.model, &opened.revision, &id, &holder)?;
            if held.is_some() {
                store.complete_volume(&holder, &id)?;
            }
            let bytes = held.map(|(manifest, _)| manifest.bytes());
            Ok(Some((path, bytes)))
        });
        let given = given.await?;
        let ((path, bytes), untold) = given.expect("a volume can always be opened");
        let complete = bytes.is_some();
        let (model, snapshot) = (record.model.at(&record.revision), record.snapshot());
        match complete {
            true => {
                self.stop_filling(&request.holder);
                if request.warm {
                    self.warmer.warm(&model, &snapshot);
                }
            }
            false => {
                let holder = request.holder.clone();
                self.keep_filling(holder, record, Some(grant), request.warm);
            }
        }
        Ok(Acquired {
            path,
            model,
            snapshot,
            complete,
            bytes,
            waited: !complete,
            untold,
        })
    }

    /// Fetches it, with the grant's right if there is one. A fetch that others began, and may not read, is
    /// no answer: then it is the turn of this right.
    async fn bring(
        &self,
        record: &VolumeRecord,
        grant: Option<&Grant>,
        report: &mut (dyn FnMut(&Progress, Option<PathBuf>) + Send),
    ) -> Result<(), AcquireError> {
        let mut turns = 1;
        loop {
            let fetch = self.fetch(record, grant);
            let fetch = fetch.map_err(|source| cannot_fetch(record, source))?;
            let joined = fetch.joined();
            match follow(fetch, report).await {
                Err(source) if joined && is_refusal(&source) => {
                    if turns == TURNS {
                        let model = record.model.clone();
                        return Err(AcquireError::Others { model, source });
                    }
                    turns += 1;
                }
                outcome => return outcome.map(drop).map_err(AcquireError::from),
            }
        }
    }

    fn fetch(&self, record: &VolumeRecord, grant: Option<&Grant>) -> Result<Fetch, SourceError> {
        let model = record.model.at(&record.revision);
        let source = grant.map(|grant| grant.open(&model)).transpose()?;
        let request = fetch_request(record);
        Ok(match source {
            Some(source) => self.fetcher.fetch_from(source, request),
            None => self.fetcher.fetch(request),
        })
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

    /// Stops filling volumes.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
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

/// What brings the files of a volume.
fn fetch_request(record: &VolumeRecord) -> FetchRequest {
    FetchRequest {
        model: record.model.at(&record.revision),
        patterns: record.patterns.clone(),
        pin: None,
    }
}

fn cannot_fetch(record: &VolumeRecord, source: SourceError) -> FetchError {
    let model = record.model.clone();
    FetchError::Source { model, source }
}

/// Waits for a fetch, and reports how far it is and where its verified files are.
async fn follow(
    fetch: Fetch,
    report: &mut (dyn FnMut(&Progress, Option<PathBuf>) + Send),
) -> Result<Fetched, FetchError> {
    let mut changes = fetch.progress();
    let tree = fetch.tree();
    let outcome = fetch.wait();
    tokio::pin!(outcome);
    loop {
        tokio::select! {
            biased;
            outcome = &mut outcome => {
                // Else whoever listens would never hear of the last bytes.
                if outcome.is_ok() && changes.has_changed().unwrap_or_default() {
                    let now = changes.borrow_and_update().clone();
                    report(&now, tree.borrow().clone());
                }
                return outcome;
            }
            Ok(()) = changes.changed() => {
                let now = changes.borrow_and_update().clone();
                report(&now, tree.borrow().clone());
            }
        }
    }
}

/// Whether the origin says that whoever asked may not have it.
fn is_refusal(error: &FetchError) -> bool {
    matches!(
        error,
        FetchError::Source {
            source: SourceError::Denied { .. } | SourceError::NotFound { .. },
            ..
        }
    )
}
