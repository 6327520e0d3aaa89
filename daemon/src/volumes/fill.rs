//! Filling a volume that is mounted before its files are here.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::fetch::{FetchError, FetchRequest, Progress};
use weightd_core::source::SourceError;
use weightd_core::store::{Holder, StoreError, VolumeRecord};

use super::{AcquireError, Volumes, fetch_request, is_refusal};
use crate::access::{AccessError, Grant};

/// The pauses between tries to complete a volume that is mounted already.
const PAUSES: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// What a pod is told whose right this process does not know.
const LOST: &str = "this daemon was started after the volume was mounted, and a pod's credentials are never on disk; \
                    if it stays so, delete the pod: its next volume brings them again";

/// Who works on a volume.
pub(super) struct Filler {
    /// What it brings.
    record: VolumeRecord,
    /// It has no right of its own to show, or was refused with it.
    refused: Arc<AtomicBool>,
    stop: CancellationToken,
}

/// How far a volume is.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// The fetch that fills it.
    pub progress: Option<Progress>,
    /// Why it is not filled now; empty if it is.
    pub error: String,
}

/// One volume that is to be filled, and with whose right.
struct Task {
    holder: Holder,
    record: VolumeRecord,
    grant: Option<Grant>,
    /// Read it into the page cache when it is complete.
    warm: bool,
    refused: Arc<AtomicBool>,
}

impl Volumes {
    /// Fills a mounted volume until it is complete, its holder lets go, or the process ends. Whoever fills
    /// it with something else stops, and whoever lacks the right to go on where there is one now.
    pub(super) fn keep_filling(
        self: &Arc<Self>,
        holder: Holder,
        record: VolumeRecord,
        grant: Option<Grant>,
        warm: bool,
    ) {
        let stop = self.stop.child_token();
        let refused = Arc::new(AtomicBool::new(grant.is_none()));
        {
            let mut filling = self.filling();
            if let Some(found) = filling.get(&holder) {
                let helps = grant.is_some() && found.refused.load(Ordering::Relaxed);
                if found.record == record && !helps {
                    return;
                }
                // What it still has under way finds another record in the volume, or does the same work.
                found.stop.cancel();
            }
            let filler = Filler {
                record: record.clone(),
                refused: Arc::clone(&refused),
                stop: stop.clone(),
            };
            filling.insert(holder.clone(), filler);
        }
        let volumes = Arc::clone(self);
        let task = Task {
            holder,
            record,
            grant,
            warm,
            refused,
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = volumes.fill(&task) => {}
            }
            // Stopped, the place in the map is another task's.
            let mut filling = volumes.filling();
            if !stop.is_cancelled() {
                filling.remove(&task.holder);
            }
        });
    }

    pub(super) fn stop_filling(&self, holder: &Holder) {
        let filler = self.filling().remove(holder);
        if let Some(filler) = filler {
            filler.stop.cancel();
        }
    }

    /// What brings the files of a volume that is being filled.
    pub(super) fn filled_with(&self, holder: &Holder) -> Option<FetchRequest> {
        let filling = self.filling();
        filling
            .get(holder)
            .map(|filler| fetch_request(&filler.record))
    }

    /// Whether a volume is filled with what `request` brings.
    pub(super) fn fills(&self, request: &FetchRequest) -> bool {
        let filling = self.filling();
        let mut requests = filling.values().map(|filler| fetch_request(&filler.record));
        requests.any(|filled| filled == *request)
    }

    async fn fill(&self, task: &Task) {
        let (holder, model) = (&task.holder, &task.record.model);
        let mut pause = PAUSES.0;
        loop {
            let error = match self.fill_once(task).await {
                Ok(()) => return,
                Err(error) => error,
            };
            tracing::warn!(%holder, %model, error = %Chain(&error), pause_s = pause.as_secs(), "volume not complete, trying again later");
            self.tell(holder, |told| told.error = task.why(&error));
            let (told, id, why) = (holder.clone(), task.record.snapshot(), task.why(&error));
            let explained =
                self.on_store(model, move |store| store.explain_volume(&told, &id, &why));
            if let Err(error) = explained.await {
                tracing::warn!(%holder, error = %Chain(&error), "cannot say in the volume why it is not complete");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn fill_once(&self, task: &Task) -> Result<(), AcquireError> {
        let (record, id) = (&task.record, task.record.snapshot());
        let mut shown = 0;
        let mut show = |now: &Progress, tree: Option<PathBuf>| {
            self.tell(&task.holder, |told| {
                told.progress = Some(now.clone());
                told.error.clear();
            });
            if let Some(tree) = tree
                && now.files_done > shown
            {
                shown = now.files_done;
                let (store, holder) = (Arc::clone(&self.store), task.holder.clone());
                let id = id.clone();
                self.tasks.spawn(blocking::run(move || {
                    // What is missed here is made up for when the snapshot is published.
                    if let Err(error) = store.fill_volume(&holder, &id, &tree) {
                        tracing::debug!(%holder, error = %Chain(&error), "volume not filled yet");
                    }
                }));
            }
        };
        let withdrawn = id.clone();
        self.on_store(&record.model, move |store| {
            store.withdraw_if_believed(&withdrawn)
        })
        .await?;
        self.bring(record, task.grant.as_ref(), &mut show).await?;
        let (holder, done) = (task.holder.clone(), record.clone());
        // Its pin was written when the volume was opened. A pin that is written now may come after the
        // release that was to take it.
        self.on_store(&record.model, move |store| {
            let id = done.snapshot();
            store.complete_volume(&holder, &id)?;
            store.touch(&done.model, &done.revision, &id)
        })
        .await?;
        if task.warm {
            let model = record.model.at(&record.revision);
            self.warmer.warm(&model, &record.snapshot());
        }
        Ok(())
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
                self.keep_filling(volume.holder, record, None, false);
            }
        }
        Ok(())
    }

    /// How far the volumes are that this process fills or has filled.
    #[must_use]
    pub fn told(&self) -> HashMap<Holder, Told> {
        let told = self.told.lock();
        told.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Only for a volume that is being filled: else what was released would be noted for ever.
    fn tell(&self, holder: &Holder, change: impl FnOnce(&mut Told)) {
        let filling = self.filling();
        if filling.contains_key(holder) {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            change(told.entry(holder.clone()).or_default());
        }
    }

    pub(super) fn forget(&self, holder: &Holder) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.remove(holder);
    }

    fn filling(&self) -> MutexGuard<'_, HashMap<Holder, Filler>> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Task {
    /// What the pod is told: whether it is worth waiting, why, and what helps. It notes a refusal.
    fn why(&self, error: &AcquireError) -> String {
        let refused = matches!(error, AcquireError::Fetch(error) if is_refusal(error));
        let lost = refused && self.grant.is_none();
        self.refused
            .store(refused || self.grant.is_none(), Ordering::Relaxed);
        let word = if lost || passes(error) {
            "retrying"
        } else {
            "failed"
        };
        let hint = if lost {
            Some(LOST.to_owned())
        } else {
            error.hint()
        };
        let hint = hint.map(|hint| format!(" ({hint})"));
        format!("{word}: {}{}", Chain(error), hint.unwrap_or_default())
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
        | AcquireError::Evicted { .. }
        | AcquireError::Others { .. }
        | AcquireError::Released { .. } => true,
        AcquireError::Access(_) | AcquireError::Fetch(_) | AcquireError::Layout { .. } => false,
    }
}
