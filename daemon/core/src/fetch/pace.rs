//! How fast each connection is, next to its neighbours: one that crawls is replaced.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

/// A connection's rate is measured over this time.
const WINDOW: Duration = Duration::from_secs(2);

/// A connection crawls if it is this many times slower than the median of its neighbours…
const CRAWL: f64 = 8.0;

/// …for this many windows in a row…
const WINDOWS: u32 = 3;

/// …and there are at least this many neighbours to compare with.
const NEIGHBOURS: usize = 3;

/// The rates of the connections of one fetch.
#[derive(Debug, Default)]
pub(super) struct Pace {
    next: AtomicU64,
    rates: Mutex<HashMap<u64, f64>>,
}

/// One connection's place in the [`Pace`]. Dropping it leaves.
#[derive(Debug)]
pub(super) struct Runner {
    pace: Arc<Pace>,
    number: u64,
    since: Instant,
    bytes: u64,
    slow: u32,
}

impl Pace {
    pub(super) fn runner(self: &Arc<Self>) -> Runner {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Runner {
            pace: Arc::clone(self),
            number,
            since: Instant::now(),
            bytes: 0,
            slow: 0,
        }
    }

    /// Whether `rate` is a crawl next to the others; notes it for them.
    fn crawls(&self, number: u64, rate: f64) -> bool {
        let mut rates = self.rates.lock().expect("no holder of this lock panics");
        rates.insert(number, rate);
        let mut others: Vec<f64> = rates
            .iter()
            .filter(|(other, _)| **other != number)
            .map(|(_, rate)| *rate)
            .collect();
        if others.len() < NEIGHBOURS {
            return false;
        }
        others.sort_by(f64::total_cmp);
        rate * CRAWL < others[others.len() / 2]
    }
}

impl Runner {
    /// Counts bytes that arrived. True if the connection has crawled for so long that another one
    /// would be better.
    pub(super) fn crawls(&mut self, bytes: u64) -> bool {
        self.bytes += bytes;
        let elapsed = self.since.elapsed();
        if elapsed < WINDOW {
            return false;
        }
        let crawls = self
            .pace
            .crawls(self.number, self.bytes as f64 / elapsed.as_secs_f64());
        self.slow = if crawls { self.slow + 1 } else { 0 };
        self.since = Instant::now();
        self.bytes = 0;
        self.slow >= WINDOWS
    }

    /// Leaves out the time since the last bytes: it was spent on our own disk.
    pub(super) fn waited(&mut self, time: Duration) {
        self.since += time;
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.pace
            .rates
            .lock()
            .expect("no holder of this lock panics")
            .remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_the_one_that_crawls_is_replaced() {
        let pace = Arc::new(Pace::default());
        let mut runners: Vec<Runner> = (0..5).map(|_| pace.runner()).collect();
        let mut replaced = Vec::new();
        for second in 0..10 {
            tokio::time::advance(Duration::from_secs(1)).await;
            for (number, runner) in runners.iter_mut().enumerate() {
                if runner.crawls(if number == 2 { 10 } else { 1000 }) {
                    replaced.push((second, number));
                }
            }
        }
        assert!(
            replaced.iter().all(|(_, number)| *number == 2),
            "{replaced:?}"
        );
        // In the first window it had too few neighbours to compare with.
        assert_eq!(replaced.first(), Some(&(7, 2)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_origin_is_no_crawl() {
        let pace = Arc::new(Pace::default());
        let mut runners: Vec<Runner> = (0..5).map(|_| pace.runner()).collect();
        for _ in 0..20 {
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(!runners.iter_mut().any(|runner| runner.crawls(3)));
        }
    }
}
