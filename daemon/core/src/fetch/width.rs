//! How many ranged reads go at once: more while more bring more, fewer when the origin pushes back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Reads at once to begin with: what a fast path needs to be full, and no origin minds.
const FIRST: usize = 8;

/// The rate is measured over this time.
const WINDOW: Duration = Duration::from_millis(200);

/// More reads are kept if they bring this share of what they would bring if each were as fast as those before, at the
/// least. What they bring without need lands farther from where a file's hasher is, and may not stay in memory so long.
const WORTH: f64 = 0.2;

/// When more reads brought nothing, others are tried only after this time.
const STEADY: Duration = Duration::from_secs(10);

/// The share of all cores that this process may use if more reads are to be tried. With less to spare they only wait for
/// each other, whatever a window's rate says: the time that a machine takes away for others moves it by far more.
const AMPLE: f64 = 0.5;

/// With this share in use, reads beyond the first ones are given up: they do no more than fill the memory.
const SHORT: f64 = 0.75;

/// When processor time was short, more reads are tried only after this time.
const BUSY: Duration = Duration::from_secs(1);

/// An origin that pushes back is heard once in this time: all reads under way hear of the same trouble.
const DEAF: Duration = Duration::from_secs(1);

/// The reads that may go at once, of all fetches together.
#[derive(Debug)]
pub(super) struct Width {
    most: usize,
    processor: Processor,
    permits: Arc<Semaphore>,
    /// Bytes that arrived in this window.
    bytes: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    now: usize,
    /// Permits that are to be taken away once their reads end.
    surplus: usize,
    window: Instant,
    /// Processor time when it began.
    spent: Duration,
    /// Little of it was left in the last window.
    is_short: bool,
    trial: Trial,
    deaf_until: Instant,
}

/// What this process may compute with.
#[derive(Debug)]
struct Processor {
    cores: usize,
    /// What it has taken, of all cores together.
    spent: fn() -> Duration,
}

impl Processor {
    fn of_this_process() -> Self {
        // As many as its control group lets it use.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let spent = || {
            let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else {
                return Duration::ZERO;
            };
            let micros = (usage.user_time() + usage.system_time()).num_microseconds();
            Duration::from_micros(u64::try_from(micros).unwrap_or(0))
        };
        Self { cores, spent }
    }
}

/// What the next window is for.
#[derive(Debug)]
enum Trial {
    /// Reads that were added are getting under way.
    Starting { before: f64, from: usize },
    /// Do they bring more?
    Judging { before: f64, from: usize },
    /// Nothing is tried until then.
    Steady { until: Instant },
}

/// The right to one read. Dropping it gives it back.
pub(super) struct Place {
    permit: Option<OwnedSemaphorePermit>,
    width: Arc<Width>,
}

impl Width {
    /// At most `most` reads at once.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Self::on(Processor::of_this_process(), most)
    }

    fn on(processor: Processor, most: usize) -> Arc<Self> {
        let now = FIRST.min(most);
        let spent = (processor.spent)();
        Arc::new(Self {
            most,
            processor,
            permits: Arc::new(Semaphore::new(now)),
            bytes: AtomicU64::new(0),
            state: Mutex::new(State {
                now,
                surplus: 0,
                window: Instant::now(),
                spent,
                is_short: false,
                trial: Trial::Starting {
                    before: 0.0,
                    from: now,
                },
                deaf_until: Instant::now(),
            }),
        })
    }

    /// Waits until one more read may go.
    pub(super) async fn place(self: &Arc<Self>) -> Place {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        Place {
            permit: Some(permit.expect("nobody closes it")),
            width: Arc::clone(self),
        }
    }

    /// How many reads may go at once now.
    pub(super) fn now(&self) -> usize {
        self.state().now
    }

    /// Whether processor time is short: then what costs more of it is to be avoided, also if it takes waiting.
    pub(super) fn is_short(&self) -> bool {
        self.state().is_short
    }

    /// Counts bytes that arrived.
    pub(super) fn count(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        // Whoever looks at it now does so for all.
        if let Ok(mut state) = self.state.try_lock() {
            self.look(&mut state);
        }
    }

    /// Hears that the origin does not take what is asked of it now.
    pub(super) fn pushed_back(&self) {
        let mut state = self.state();
        let now = Instant::now();
        if now < state.deaf_until {
            return;
        }
        state.deaf_until = now + DEAF;
        let half = (state.now / 2).max(1);
        self.set(&mut state, half);
        state.trial = Trial::Steady { until: now + DEAF };
        tracing::debug!(reads = half, "origin pushes back, fewer reads at once");
    }

    fn look(&self, state: &mut State) {
        let elapsed = state.window.elapsed();
        if elapsed < WINDOW {
            return;
        }
        state.window = Instant::now();
        let bytes = self.bytes.swap(0, Ordering::Relaxed);
        let spent = (self.processor.spent)();
        let busy = spent.saturating_sub(std::mem::replace(&mut state.spent, spent));
        let share = busy.as_secs_f64() / elapsed.as_secs_f64() / self.processor.cores as f64;
        state.is_short = share > AMPLE;
        if elapsed > 10 * WINDOW {
            // Nothing was to be read meanwhile.
            return;
        }
        let rate = bytes as f64 / elapsed.as_secs_f64();
        // Reads that could go and do not are no reason for more of them.
        let wanted = self.permits.available_permits() == 0;
        match state.trial {
            _ if share > SHORT && state.now > FIRST => {
                let fewer = (state.now / 2).max(FIRST);
                self.set(state, fewer);
                let until = Instant::now() + BUSY;
                state.trial = Trial::Steady { until };
                tracing::debug!(
                    reads = fewer,
                    share,
                    "no processor time for more reads at once"
                );
            }
            Trial::Starting { before, from } => state.trial = Trial::Judging { before, from },
            Trial::Judging { before, from } if rate < worth_it(before, from, state.now) => {
                self.set(state, from);
                let until = Instant::now() + STEADY;
                state.trial = Trial::Steady { until };
                tracing::debug!(reads = from, "more reads at once bring no more");
            }
            Trial::Judging { .. } if share > AMPLE => {
                let until = Instant::now() + BUSY;
                state.trial = Trial::Steady { until };
            }
            Trial::Judging { .. } if wanted => self.widen(state, rate, 2 * state.now),
            Trial::Steady { until } if wanted && share <= AMPLE && Instant::now() >= until => {
                self.widen(state, rate, state.now + state.now.div_ceil(2));
            }
            Trial::Judging { .. } | Trial::Steady { .. } => {}
        }
    }

    fn widen(&self, state: &mut State, rate: f64, to: usize) {
        let to = to.min(self.most);
        if to <= state.now {
            let until = Instant::now() + STEADY;
            state.trial = Trial::Steady { until };
            return;
        }
        state.trial = Trial::Starting {
            before: rate,
            from: state.now,
        };
        self.set(state, to);
    }

    fn set(&self, state: &mut State, to: usize) {
        match to.checked_sub(state.now) {
            Some(more) => {
                let kept = more.min(state.surplus);
                state.surplus -= kept;
                self.permits.add_permits(more - kept);
            }
            None => {
                let fewer = state.now - to;
                state.surplus += fewer - self.permits.forget_permits(fewer);
            }
        }
        state.now = to;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.width.state();
        if state.surplus > 0 {
            state.surplus -= 1;
            self.permit.take().expect("taken only here").forget();
        }
    }
}

/// The rate that makes `now` reads worth it, where `from` of them brought `before`.
fn worth_it(before: f64, from: usize, now: usize) -> f64 {
    before * (1.0 + WORTH * (now as f64 / from as f64 - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An origin that sends so many bytes per second over each of so many connections, and no more over others.
    struct Path {
        connections: usize,
        bytes: u64,
    }

    /// Reads for so many windows over as many connections as there may be; returns how many that were in each.
    async fn read(width: &Arc<Width>, path: &Path, windows: usize) -> Vec<usize> {
        let mut places = Vec::new();
        let mut widths = Vec::new();
        for _ in 0..windows {
            places.clear();
            while width.permits.available_permits() > 0 {
                places.push(width.place().await);
            }
            widths.push(places.len());
            tokio::time::advance(WINDOW).await;
            width.count(places.len().min(path.connections) as u64 * path.bytes);
        }
        widths
    }

    #[tokio::test(start_paused = true)]
    async fn it_grows_as_long_as_more_reads_bring_more() {
        let width = Width::new(64);
        let path = Path {
            connections: 1000,
            bytes: 1 << 20,
        };

        let widths = read(&width, &path, 20).await;

        assert_eq!(widths[0], FIRST);
        assert_eq!(widths.last(), Some(&64), "{widths:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn reads_that_bring_nothing_are_given_up_and_tried_again_later() {
        let width = Width::new(64);
        let path = Path {
            connections: FIRST,
            bytes: 1 << 20,
        };

        let widths = read(&width, &path, 100).await;

        let tried = widths.iter().filter(|reads| **reads > FIRST).count();
        assert_eq!(widths.last(), Some(&FIRST), "{widths:?}");
        assert!((2..10).contains(&tried), "{widths:?}");
        let later = &widths[10..];
        assert!(later.iter().any(|reads| *reads > FIRST), "{widths:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_origin_that_pushes_back_is_heard_once_a_second() {
        let width = Width::new(64);
        let path = Path {
            connections: 1000,
            bytes: 1 << 20,
        };
        read(&width, &path, 20).await;
        let mut places = Vec::new();
        while width.permits.available_permits() > 0 {
            places.push(width.place().await);
        }

        width.pushed_back();
        width.pushed_back();

        assert_eq!(width.state().now, 32);
        drop(places);
        assert_eq!(width.permits.available_permits(), 32);
        tokio::time::advance(DEAF).await;
        let widths = read(&width, &path, 20).await;
        assert_eq!(widths.last(), Some(&64), "it never recovers: {widths:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn reads_that_nobody_wants_are_not_added() {
        let width = Width::new(64);
        let _only = width.place().await;
        for _ in 0..20 {
            tokio::time::advance(WINDOW).await;
            width.count(1 << 20);
        }

        assert_eq!(width.state().now, FIRST);
    }

    #[tokio::test(start_paused = true)]
    async fn without_processor_time_to_spare_there_are_no_more() {
        use std::cell::Cell;
        thread_local! {
            static SPENT: Cell<Duration> = const { Cell::new(Duration::ZERO) };
        }
        let processor = Processor {
            cores: 4,
            spent: || SPENT.get(),
        };
        let width = Width::on(processor, 64);
        let path = Path {
            connections: 1000,
            bytes: 1 << 20,
        };
        let windows = async |cores: u32, windows| {
            let mut widths = Vec::new();
            for _ in 0..windows {
                SPENT.set(SPENT.get() + cores * WINDOW);
                widths.extend(read(&width, &path, 1).await);
            }
            widths
        };

        let busy = windows(3, 20).await;
        assert_eq!(busy, [FIRST; 20]);
        assert!(width.is_short());
        let idle = windows(1, 40).await;
        assert_eq!(idle.last(), Some(&64), "{idle:?}");
        assert!(!width.is_short());
        let busy = windows(4, 10).await;
        assert_eq!(busy.last(), Some(&FIRST), "{busy:?}");
    }

    #[test]
    fn processor_time_passes_while_this_process_computes() {
        let processor = Processor::of_this_process();
        let before = (processor.spent)();
        while (processor.spent)() == before {
            std::hint::spin_loop();
        }
    }

    #[tokio::test]
    async fn a_limit_below_the_first_holds() {
        assert_eq!(Width::new(4).permits.available_permits(), 4);
    }
}
