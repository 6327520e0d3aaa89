//! How fast each connection is, next to its neighbours: one that crawls is replaced.

use std::collections::{HashMap, VecDeque};
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

/// Neighbours that have ended count, too, this many of them: the last one has no others.
const ENDED: usize = 16;

/// A connection that brings less than this in [`STANDING`] stands still, whatever its neighbours do.
const FLOOR_BYTES: u64 = 64 << 10;

/// See [`FLOOR_BYTES`].
const STANDING: Duration = Duration::from_secs(60);

/// The rates of the connections of one fetch.
#[derive(Debug, Default)]
pub(super) struct Pace {
    next: AtomicU64,
    rates: Mutex<Rates>,
}

#[derive(Debug, Default)]
struct Rates {
    running: HashMap<u64, f64>,
    ended: VecDeque<f64>,
}

/// How a connection gets on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gait {
    Runs,
    /// So much slower than its neighbours, for so long, that another one would be better.
    Crawls,
    /// Next to nothing arrives.
    Stands,
}

/// Bytes that arrived since a moment.
#[derive(Debug)]
struct Count {
    since: Instant,
    bytes: u64,
}

impl Count {
    fn start() -> Self {
        Self {
            since: Instant::now(),
            bytes: 0,
        }
    }

    fn rate(&self) -> f64 {
        self.bytes as f64 / self.since.elapsed().as_secs_f64().max(0.001)
    }
}

/// One connection's place in the [`Pace`]. Dropping it leaves.
#[derive(Debug)]
pub(super) struct Runner {
    pace: Arc<Pace>,
    number: u64,
    all: Count,
    /// For [`STANDING`].
    floor: Count,
    /// For [`WINDOW`].
    window: Count,
    slow: u32,
}

impl Pace {
    pub(super) fn runner(self: &Arc<Self>) -> Runner {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Runner {
            pace: Arc::clone(self),
            number,
            all: Count::start(),
            floor: Count::start(),
            window: Count::start(),
            slow: 0,
        }
    }

    /// Whether `rate` is a crawl next to the others; notes it for them.
    fn crawls(&self, number: u64, rate: f64) -> bool {
        let mut rates = self.rates.lock().expect("no holder of this lock panics");
        rates.running.insert(number, rate);
        let running = rates.running.iter();
        let running = running.filter(|(other, _)| **other != number);
        let mut others: Vec<f64> = running.map(|(_, rate)| *rate).collect();
        others.extend(&rates.ended);
        if others.len() < NEIGHBOURS {
            return false;
        }
        others.sort_by(f64::total_cmp);
        rate * CRAWL < others[others.len() / 2]
    }

    fn ended(&self, number: u64, all: &Count) {
        let mut rates = self.rates.lock().expect("no holder of this lock panics");
        rates.running.remove(&number);
        // So few bytes say more of the way there than of its width.
        if all.bytes >= FLOOR_BYTES {
            rates.ended.push_back(all.rate());
        }
        if rates.ended.len() > ENDED {
            rates.ended.pop_front();
        }
    }
}

impl Runner {
    /// Counts bytes that arrived.
    pub(super) fn count(&mut self, bytes: u64) -> Gait {
        for count in [&mut self.all, &mut self.floor, &mut self.window] {
            count.bytes += bytes;
        }
        if self.floor.since.elapsed() >= STANDING {
            let floor = std::mem::replace(&mut self.floor, Count::start());
            if floor.bytes < FLOOR_BYTES {
                return Gait::Stands;
            }
        }
        if self.window.since.elapsed() >= WINDOW {
            let window = std::mem::replace(&mut self.window, Count::start());
            let crawls = self.pace.crawls(self.number, window.rate());
            self.slow = if crawls { self.slow + 1 } else { 0 };
            if self.slow >= WINDOWS {
                return Gait::Crawls;
            }
        }
        Gait::Runs
    }

    /// Leaves out the time since the last bytes: it was spent on our own disk.
    pub(super) fn waited(&mut self, time: Duration) {
        for count in [&mut self.all, &mut self.floor, &mut self.window] {
            count.since += time;
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.pace.ended(self.number, &self.all);
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
                let bytes = if number == 2 { 10 } else { 1000 };
                if runner.count(bytes) == Gait::Crawls {
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
            let gaits = runners.iter_mut().map(|runner| runner.count(3));
            assert!(gaits.into_iter().all(|gait| gait == Gait::Runs));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_one_is_measured_by_those_that_ended() {
        let pace = Arc::new(Pace::default());
        for _ in 0..3 {
            let mut runner = pace.runner();
            tokio::time::advance(Duration::from_secs(1)).await;
            runner.count(1 << 20);
        }
        let mut last = pace.runner();
        let mut gaits = Vec::new();
        for _ in 0..6 {
            tokio::time::advance(Duration::from_secs(1)).await;
            gaits.push(last.count(50 << 10));
        }
        assert_eq!(gaits.last(), Some(&Gait::Crawls), "{gaits:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_brings_next_to_nothing_stands() {
        let pace = Arc::new(Pace::default());
        let mut runner = pace.runner();
        for second in 1..=60 {
            tokio::time::advance(Duration::from_secs(1)).await;
            let gait = runner.count(1000);
            let expected = if second == 60 {
                Gait::Stands
            } else {
                Gait::Runs
            };
            assert_eq!(gait, expected, "after {second} s");
        }
    }
}
