//! How long an origin that fails is asked again, and how soon.

use std::time::Duration;

use tokio::time::Instant;

use super::FetchLimits;

/// How long a range goes on without getting anywhere.
pub(super) struct Patience {
    /// Connections that ended since a block came whole.
    failures: u32,
    /// Those of them that brought bytes.
    dribbles: u32,
    /// Where it was when a block had come.
    mark: u64,
    /// Where it was when a connection last ended.
    at: u64,
    /// When a connection that had brought bytes last ended.
    since: Instant,
}

impl Patience {
    /// Connections that bring a few bytes each, for each of [`FetchLimits::attempts`]: with fewer bytes
    /// than a block on so many of them it would go on like that for days.
    const DRIBBLES: u32 = 10;

    pub(super) fn new(at: u64) -> Self {
        Self {
            failures: 0,
            dribbles: 0,
            mark: at,
            at,
            since: Instant::now(),
        }
    }

    /// Counts a connection that ended at byte `at`; returns how many did since a block came whole.
    pub(super) fn failed(&mut self, at: u64, limits: &FetchLimits) -> u32 {
        if at - self.mark >= limits.block_bytes(limits.connections) {
            *self = Self::new(at);
        } else if at > self.at {
            // On a slow link a block takes minutes: an outage begins with the last byte, not with it.
            self.at = at;
            self.since = Instant::now();
            self.dribbles += 1;
        }
        self.failures += 1;
        self.failures
    }

    pub(super) fn is_out(&self, limits: &FetchLimits, bytes_came: bool) -> bool {
        let waited = self.since.elapsed() >= limits.patience;
        let dribbles = self.dribbles >= limits.attempts.saturating_mul(Self::DRIBBLES);
        dribbles || self.failures >= limits.attempts && (waited || !bytes_came)
    }
}

/// The longest pause that an origin may ask for.
///
/// Source: the Hub's rate limits, whose windows last 300 s.
const LONGEST_PAUSE: Duration = Duration::from_secs(360);

/// The pause before the next try: what the origin asks for, and no less than our own. `None` if that is
/// more than should be sat out.
pub(super) fn pause(failures: u32, retry_after: Option<Duration>) -> Option<Duration> {
    let asked = retry_after.unwrap_or_default();
    (asked <= LONGEST_PAUSE).then(|| asked.max(backoff(failures)))
}

/// Up to 0.2 s, 0.4 s, … 10 s, at random so that a crowd spreads out.
fn backoff(failures: u32) -> Duration {
    let most = 0.2 * f64::from(1_u32 << failures.saturating_sub(1).min(6));
    Duration::from_secs_f64(most.min(10.0) * (0.5 + fastrand::f64() / 2.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_may_ask_for_a_longer_pause_but_not_for_any() {
        let seconds = Duration::from_secs;
        assert_eq!(pause(1, Some(seconds(30))), Some(seconds(30)));
        assert!(pause(40, Some(seconds(1))) >= Some(seconds(5)));
        assert_eq!(pause(1, Some(seconds(361))), None);
    }

    #[test]
    fn pauses_grow_and_end() {
        assert!(backoff(1) <= Duration::from_millis(200));
        assert!(backoff(40) <= Duration::from_secs(10));
        assert!(backoff(40) >= Duration::from_secs(5));
    }

    /// How long a range that is at byte `at` sits out an outage.
    async fn outage(patience: &mut Patience, at: u64, limits: &FetchLimits) -> Duration {
        let gone = Instant::now();
        loop {
            let failures = patience.failed(at, limits);
            if patience.is_out(limits, true) {
                return gone.elapsed();
            }
            tokio::time::advance(pause(failures, None).unwrap()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_sat_out_as_long_on_a_slow_link() {
        let limits = FetchLimits::default();
        for rate in [7_800, 10 << 20] {
            let mut patience = Patience::new(0);
            tokio::time::advance(Duration::from_secs(130)).await;
            let sat_out = outage(&mut patience, rate * 130, &limits).await;
            let expected = limits.patience..limits.patience + Duration::from_secs(11);
            assert!(expected.contains(&sat_out), "{sat_out:?} at {rate} B/s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_that_arrive_are_progress_but_a_dribble_ends() {
        let limits = FetchLimits::default();
        // What each connection brings before it stands, and how many there may be.
        for (bytes, most) in [(60_000, u64::MAX), (1_000, 60)] {
            let mut patience = Patience::new(0);
            let outs = (1..1000).find(|ended| {
                patience.failed(ended * bytes, &limits);
                patience.is_out(&limits, true)
            });
            assert_eq!(outs.unwrap_or(u64::MAX), most, "with {bytes} bytes each");
        }
        // The same with the minute that each of them takes.
        let mut patience = Patience::new(0);
        for ended in 1..50 {
            tokio::time::advance(Duration::from_secs(60)).await;
            patience.failed(ended * 1_000, &limits);
            assert!(!patience.is_out(&limits, true), "after {ended} min");
        }
    }
}
