//! How fast each way is, as this process has seen it.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

/// A rate is renewed once so much time was measured.
pub const WINDOW: Duration = Duration::from_millis(500);

/// How much the newest window counts.
pub const WEIGHT: f64 = 0.4;

/// The rates of one process.
#[derive(Debug, Default)]
pub struct Rates {
    /// From origins.
    pub origin: Rate,
    /// From the shared tier.
    pub shared: Rate,
    /// To the shared tier.
    pub written: Rate,
}

/// Bytes per second of one way, over the time in which something was under way on it.
#[derive(Debug, Default)]
pub struct Rate(Mutex<Measure>);

#[derive(Debug, Default)]
struct Measure {
    /// Transfers under way, and since when there is at least one that was not counted yet.
    under_way: usize,
    since: Option<Instant>,
    busy: Duration,
    bytes: u64,
    rate: Option<f64>,
}

/// One transfer. Dropping it ends it.
#[derive(Debug)]
pub struct Transfer<'a>(&'a Rate);

impl Rate {
    /// Begins a transfer.
    pub fn begin(&self) -> Transfer<'_> {
        let mut measure = self.measure();
        measure.under_way += 1;
        measure.since.get_or_insert_with(Instant::now);
        Transfer(self)
    }

    /// Bytes per second; `None` until something was measured.
    #[must_use]
    pub fn get(&self) -> Option<f64> {
        let mut measure = self.measure();
        measure.fold();
        measure.rate
    }

    /// Counts bytes that moved within a transfer.
    pub fn count(&self, bytes: u64) {
        let mut measure = self.measure();
        measure.bytes += bytes;
        measure.fold();
    }

    fn measure(&self) -> MutexGuard<'_, Measure> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

impl Measure {
    fn fold(&mut self) {
        let now = Instant::now();
        if let Some(since) = self.since {
            self.busy += now - since;
            self.since = (self.under_way > 0).then_some(now);
        }
        if self.busy < WINDOW {
            return;
        }
        let rate = self.bytes as f64 / self.busy.as_secs_f64();
        self.rate = Some(match self.rate {
            Some(before) => before + (rate - before) * WEIGHT,
            None => rate,
        });
        (self.busy, self.bytes) = (Duration::ZERO, 0);
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        let mut measure = self.0.measure();
        measure.under_way -= 1;
        measure.fold();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn idle_time_does_not_count() {
        let rate = Rate::default();
        assert_eq!(rate.get(), None);
        for _ in 0..3 {
            let one = rate.begin();
            let other = rate.begin();
            tokio::time::advance(Duration::from_secs(1)).await;
            rate.count(10 << 20);
            drop((one, other));
            tokio::time::advance(Duration::from_secs(60)).await;
        }
        let measured = rate.get().unwrap();
        assert!(
            (measured / f64::from(10 << 20) - 1.0).abs() < 0.01,
            "{measured}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_way_that_stands_still_has_no_rate() {
        let rate = Rate::default();
        let _one = rate.begin();
        rate.count(100 << 20);
        tokio::time::advance(Duration::from_secs(1)).await;
        let before = rate.get().unwrap();
        for _ in 0..20 {
            tokio::time::advance(Duration::from_secs(1)).await;
            rate.count(0);
        }
        assert!(rate.get().unwrap() < before / 1000.0);
    }
}
