//! Sealing the files of one fetch: small ones together, as many as wait for it.

use std::sync::{Arc, Mutex};

use tokio::sync::{Semaphore, SemaphorePermit, oneshot};

use super::room::Reserved;
use crate::blocking;
use crate::store::{Checked, Lease, StoreError, Unsealed};

/// Files that wait to be sealed, and those being sealed: each holds one open file.
const WAITING: usize = 512;

/// Bytes in memory that wait to be sealed: 16 MiB.
const WAITING_BYTES: usize = 16 << 20;

/// Gives checked files their names. Whoever comes first seals for all who wait by then: their bytes reach the
/// disk in one go, while the next ones arrive.
pub(super) struct Sealer {
    lease: Arc<Lease>,
    room: Arc<Reserved>,
    places: Semaphore,
    memory: Semaphore,
    waiting: Mutex<Vec<Waiting>>,
    turn: tokio::sync::Mutex<()>,
}

/// A place in the line, and the memory of who waits there.
pub(super) type Place<'a> = (SemaphorePermit<'a>, SemaphorePermit<'a>);

struct Waiting {
    checked: Checked,
    sealed: oneshot::Sender<Result<(), StoreError>>,
}

impl Sealer {
    pub(super) fn new(lease: &Arc<Lease>, room: &Arc<Reserved>) -> Self {
        Self {
            lease: Arc::clone(lease),
            room: Arc::clone(room),
            places: Semaphore::new(WAITING),
            memory: Semaphore::new(WAITING_BYTES),
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

    /// Waits until there is a place for one file in the line.
    pub(super) async fn place(&self, checked: &Checked) -> Place<'_> {
        let bytes = match &checked.bytes {
            Unsealed::InMemory(bytes) => bytes.len().min(WAITING_BYTES),
            Unsealed::Staged(_) => 0,
        };
        let bytes = u32::try_from(bytes).expect("no more than all");
        let memory = self.memory.acquire_many(bytes).await;
        let place = self.places.acquire().await;
        let closed = "nobody closes it";
        (memory.expect(closed), place.expect(closed))
    }

    /// Seals one file with whichever others wait for it.
    pub(super) async fn together(&self, checked: Checked, _: Place<'_>) -> Result<(), StoreError> {
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
            let (lease, room) = (Arc::clone(&self.lease), Arc::clone(&self.room));
            blocking::run(move || seal(&lease, &room, batch)).await;
        }
        drop(turn);
        // Whoever had the turn and left has begun what it took: it is finished all the same.
        outcome.await.expect("an outcome for each file")
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().expect("no holder of this lock panics")
    }
}

fn seal(lease: &Lease, room: &Reserved, batch: Vec<Waiting>) {
    let (checked, senders): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .map(|waiting| (waiting.checked, waiting.sealed))
        .unzip();
    for one in &checked {
        // The others took theirs as they were staged.
        if let Unsealed::InMemory(_) = one.bytes {
            room.take(lease.store(), &one.file);
        }
    }
    let outcomes = lease.seal(&checked);
    // Before it is told: a part that is let go of later than its fetch would seem to be under way.
    drop(checked);
    for (sender, outcome) in senders.into_iter().zip(outcomes) {
        // Nobody listens if the fetch was given up.
        let _ = sender.send(outcome);
    }
}
