//! Sealing the files of one fetch: small ones together, as many as wait for it.

use std::sync::{Arc, Mutex};

use tokio::sync::{Semaphore, oneshot};

use crate::blocking;
use crate::store::{Checked, Lease, StoreError};

/// Files that wait to be sealed, and those being sealed: each holds one open file.
const WAITING: usize = 512;

/// Gives checked files their names. Whoever comes first seals for all who wait by then: their bytes reach the
/// disk in one go, while the next ones arrive.
pub(super) struct Sealer {
    lease: Arc<Lease>,
    places: Semaphore,
    waiting: Mutex<Vec<Waiting>>,
    turn: tokio::sync::Mutex<()>,
}

struct Waiting {
    checked: Checked,
    sealed: oneshot::Sender<Result<(), StoreError>>,
}

impl Sealer {
    pub(super) fn new(lease: &Arc<Lease>) -> Self {
        Self {
            lease: Arc::clone(lease),
            places: Semaphore::new(WAITING),
            waiting: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Seals one file by itself: its bytes are many.
    pub(super) async fn alone(&self, checked: Checked) -> Result<(), StoreError> {
        let lease = Arc::clone(&self.lease);
        let seal = move || lease.seal(&[checked]).pop();
        let sealed = blocking::run(seal).await;
        sealed.expect("an outcome for each file")
    }

    /// Seals one file with whichever others wait for it.
    pub(super) async fn together(&self, checked: Checked) -> Result<(), StoreError> {
        let _place = self.places.acquire().await.expect("nobody closes it");
        let (sealed, mut outcome) = oneshot::channel();
        self.waiting().push(Waiting { checked, sealed });
        // Whoever is sealed leaves the line: with a turn it has no more need of, it would seal the few that have just
        // come, and all others would wait for that.
        let turn = tokio::select! {
            biased;
            outcome = &mut outcome => return outcome.expect("an outcome for each file"),
            turn = self.turn.lock() => turn,
        };
        // Those whose places the last batch has freed come now.
        tokio::task::yield_now().await;
        let batch = std::mem::take(&mut *self.waiting());
        if !batch.is_empty() {
            let lease = Arc::clone(&self.lease);
            blocking::run(move || seal(&lease, batch)).await;
        }
        drop(turn);
        // Whoever had the turn and left has begun what it took: it is finished all the same.
        outcome.await.expect("an outcome for each file")
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().expect("no holder of this lock panics")
    }
}

fn seal(lease: &Lease, batch: Vec<Waiting>) {
    let (checked, senders): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .map(|waiting| (waiting.checked, waiting.sealed))
        .unzip();
    let outcomes = lease.seal(&checked);
    // Before it is told: a part that is let go of later than its fetch would seem to be under way.
    drop(checked);
    for (sender, outcome) in senders.into_iter().zip(outcomes) {
        // Nobody listens if the fetch was given up.
        let _ = sender.send(outcome);
    }
}
