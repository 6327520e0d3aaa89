//! One call at a time for each holder, and what was given to a client that left before it heard of it.

use std::sync::{Arc, PoisonError, Weak};

use tokio::runtime::Handle;
use tokio::sync::{Mutex, OwnedMutexGuard};
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::fetch::FetchRequest;
use weightd_core::model::{ModelRef, SnapshotId};
use weightd_core::store::{Holder, Store, StoreError};

use super::{AcquireError, Volumes};

/// A holder's lock, and how often it was released: a call that began before a release gets nothing after
/// it. It is held until the work is done for which it was taken, also if nobody waits for that any more.
pub(super) type Turns = Mutex<u64>;

/// One call's place among those of the same holder.
pub(super) struct Turn {
    turns: Arc<Turns>,
    begun: u64,
}

/// What a call has given to a holder. Dropped before the client was told, it is taken back.
pub(super) struct Untold {
    volumes: Arc<Volumes>,
    holder: Holder,
    /// The holder had nothing before. What it had it may have mounted.
    fresh: bool,
    turn: Option<OwnedMutexGuard<u64>>,
}

impl Untold {
    /// From now on the holder has it until it is released.
    pub(super) fn told(mut self) {
        self.turn = None;
    }
}

impl Drop for Untold {
    fn drop(&mut self) {
        let Some(turn) = self.turn.take().filter(|_| self.fresh) else {
            return;
        };
        // Without a runtime this process is ending; then the plugin finds a pin without a mount.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let (volumes, holder) = (Arc::clone(&self.volumes), self.holder.clone());
        let taken_back = async move {
            tracing::debug!(%holder, "the client left before it was told, releasing");
            if let Err(error) = volumes.let_go(&holder, turn).await {
                tracing::warn!(%holder, error = %Chain(&error), "what a client that left was given is not released yet");
            }
        };
        self.volumes.tasks.spawn_on(taken_back, &runtime);
    }
}

impl Volumes {
    /// Waits for the calls of the same holder that work on its directory now.
    pub(super) async fn turn(&self, holder: &Holder) -> Turn {
        let turns = self.turns(holder);
        let begun = *turns.lock().await;
        Turn { turns, begun }
    }

    fn turns(&self, holder: &Holder) -> Arc<Turns> {
        let mut all = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, turns| turns.strong_count() > 0);
        if let Some(turns) = all.get(holder).and_then(Weak::upgrade) {
            return turns;
        }
        let turns = Arc::default();
        all.insert(holder.clone(), Arc::downgrade(&turns));
        turns
    }

    /// Gives the holder what `work` finds for it, while no other call of the holder is at work. It is taken
    /// back if `work` fails, and if this is dropped meanwhile: work that has begun goes on.
    pub(super) async fn give<T: Send + 'static>(
        self: &Arc<Self>,
        turn: &Turn,
        holder: &Holder,
        model: &ModelRef,
        work: impl FnOnce(&Store) -> Result<Option<T>, StoreError> + Send + 'static,
    ) -> Result<Option<(T, Untold)>, AcquireError> {
        let guard = Arc::clone(&turn.turns).lock_owned().await;
        if *guard != turn.begun {
            let model = model.clone();
            return Err(AcquireError::Released { model });
        }
        let (volumes, holder) = (Arc::clone(self), holder.clone());
        self.on_store(model, move |store| {
            let untold = Untold {
                fresh: !store.holds_anything(&holder)?,
                volumes,
                holder,
                turn: Some(guard),
            };
            let Some(given) = work(store)? else {
                untold.told();
                return Ok(None);
            };
            Ok(Some((given, untold)))
        })
        .await
    }

    /// Pins a published snapshot for a holder that has it mounted already. False if it is not here.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub async fn pin_again(&self, holder: Holder, id: SnapshotId) -> Result<bool, StoreError> {
        let turn = self.turns(&holder).lock_owned().await;
        let store = Arc::clone(&self.store);
        blocking::run(move || {
            // A release waits for this, and takes the pin with it.
            let _turn = turn;
            match store.pin(&id, &holder) {
                Ok(()) => Ok(true),
                Err(StoreError::Missing(_)) => Ok(false),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Lets go of all that the holder holds; returns how many snapshots that were. Calls that began before
    /// it give the holder nothing after it. A fetch that failed, and that nobody else waits for, is not tried again.
    /// It is done also if nobody waits for it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`].
    pub async fn release(self: &Arc<Self>, holder: Holder) -> Result<u32, StoreError> {
        let volumes = Arc::clone(self);
        let released = self.tasks.spawn(async move {
            let mut turn = volumes.turns(&holder).lock_owned().await;
            *turn += 1;
            let wanted = [volumes.asked.remove(&holder), volumes.filled_with(&holder)];
            let released = volumes.let_go(&holder, turn).await;
            for request in wanted.into_iter().flatten() {
                volumes.give_up(&request).await;
            }
            released
        });
        match released.await {
            Ok(released) => released,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    async fn let_go(&self, holder: &Holder, turn: OwnedMutexGuard<u64>) -> Result<u32, StoreError> {
        self.stop_filling(holder);
        self.forget(holder);
        let (store, holder) = (Arc::clone(&self.store), holder.clone());
        blocking::run(move || {
            let _turn = turn;
            store.release(&holder)
        })
        .await
    }

    /// Forgets a fetch that failed, unless somebody else waits for it. One that is under way goes on: who deletes a pod
    /// often makes another one.
    async fn give_up(&self, request: &FetchRequest) {
        if self.asked.wants(request) || self.fills(request) {
            return;
        }
        match self.fetcher.give_up_if_failed(request).await {
            Ok(_) => {}
            Err(error) => tracing::warn!(
                model = %request.model, error = %Chain(&error), "the record of a fetch that nobody waits for stays"
            ),
        }
    }
}
