//! Which volumes kubelet asks for. It gives up on a call, pauses and calls again, so a volume waits for longer than
//! any call of it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weightd_core::fetch::FetchRequest;
use weightd_core::store::Holder;

/// After a call that brought nothing its volume waits for the next one for so long: 150 s.
///
/// Source: the longest pause of kubelet, 2 min 2 s (`maxDurationBeforeRetry` in
/// kubernetes/pkg/util/goroutinemap/exponentialbackoff), and some for a kubelet that is busy.
const PAUSE: Duration = Duration::from_secs(150);

/// A volume that nobody asks for any more is forgotten after this: kubelet need not say that its pod is gone.
const FORGOTTEN: Duration = Duration::from_secs(900);

/// The volumes that were asked for, and not given yet.
#[derive(Debug, Default)]
pub(super) struct Asked(Mutex<HashMap<Holder, Asking>>);

#[derive(Debug)]
struct Asking {
    calls: u32,
    /// When the last call ended.
    last: Instant,
    /// What brings its files, which were not there.
    missed: Option<FetchRequest>,
}

impl Asking {
    fn waits(&self, now: Instant) -> bool {
        self.calls > 0 || now.duration_since(self.last) < PAUSE
    }
}

impl Asked {
    fn lock(&self) -> MutexGuard<'_, HashMap<Holder, Asking>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, holder: &Holder, change: impl FnOnce(&mut Asking)) {
        let mut all = self.lock();
        let asking = all.entry(holder.clone()).or_insert_with(|| Asking {
            calls: 0,
            last: Instant::now(),
            missed: None,
        });
        change(asking);
    }

    pub(super) fn begin(&self, holder: &Holder) {
        self.entry(holder, |asking| asking.calls += 1);
    }

    /// A call has ended. One that was given is no longer waited for.
    pub(super) fn end(&self, holder: &Holder) {
        if let Some(asking) = self.lock().get_mut(holder) {
            asking.calls = asking.calls.saturating_sub(1);
            asking.last = Instant::now();
        }
    }

    /// The files were not there, and `request` brings them.
    pub(super) fn missed(&self, holder: &Holder, request: FetchRequest) {
        self.entry(holder, |asking| asking.missed = Some(request));
    }

    /// Whether a volume that was asked for waits for what `request` brings.
    pub(super) fn wants(&self, request: &FetchRequest) -> bool {
        let all = self.lock();
        all.values()
            .any(|asking| asking.missed.as_ref() == Some(request))
    }

    /// Takes it off the list, and says what brings its files if they were not there at first: that they are by the
    /// time of another call is no luck.
    pub(super) fn remove(&self, holder: &Holder) -> Option<FetchRequest> {
        self.lock().remove(holder)?.missed
    }

    /// How many volumes kubelet waits for.
    pub(super) fn waiting(&self) -> usize {
        let now = Instant::now();
        let mut all = self.lock();
        all.retain(|_, asking| asking.calls > 0 || now.duration_since(asking.last) < FORGOTTEN);
        all.values().filter(|asking| asking.waits(now)).count()
    }
}

#[cfg(test)]
mod tests {
    use weightd_core::model::Patterns;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_volume_waits_also_between_the_calls_for_it() {
        let (asked, holder) = (Asked::default(), "csi/one".parse().unwrap());
        let request = FetchRequest {
            model: "hf://org/model".parse().unwrap(),
            patterns: Patterns::default(),
            pin: None,
        };
        asked.begin(&holder);
        asked.missed(&holder, request.clone());
        assert!(asked.wants(&request));
        tokio::time::advance(Duration::from_secs(110)).await;
        asked.end(&holder);
        tokio::time::advance(Duration::from_secs(122)).await;
        assert_eq!(asked.waiting(), 1, "kubelet pauses");

        asked.begin(&holder);
        assert_eq!(asked.remove(&holder), Some(request.clone()));
        asked.end(&holder);
        assert!(!asked.wants(&request));
        assert_eq!(asked.waiting(), 0, "it was given");
    }

    #[tokio::test(start_paused = true)]
    async fn a_volume_that_nobody_asks_for_any_more_is_forgotten() {
        let (asked, holder) = (Asked::default(), "csi/one".parse().unwrap());
        asked.begin(&holder);
        asked.end(&holder);
        tokio::time::advance(PAUSE).await;
        assert_eq!((asked.waiting(), asked.lock().len()), (0, 1));
        tokio::time::advance(FORGOTTEN).await;
        assert_eq!((asked.waiting(), asked.lock().len()), (0, 0));
    }
}
