//! Spreading work in the background over time, so that it is gentle on the disk.

use std::time::{Duration, Instant};

/// Spreads reads over time, so that they take no more than `rate` bytes a second.
#[derive(Debug)]
pub struct Pace {
    rate: u64,
    /// When the next read may begin.
    due: Instant,
}

impl Pace {
    /// So much lost time is made up for. After a longer stall the disk is busy with something else, and
    /// must not be read at full speed for as long.
    const CREDIT: Duration = Duration::from_secs(1);

    /// A pace of `rate` bytes a second, which is more than 0.
    #[must_use]
    pub fn new(rate: u64, now: Instant) -> Self {
        Self { rate, due: now }
    }

    /// How long to wait after a read of `bytes` that ended `now`.
    pub fn after(&mut self, bytes: u64, now: Instant) -> Duration {
        if now > self.due + Self::CREDIT {
            self.due = now;
        }
        self.due += Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        self.due.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// How long `reads` of a MiB take, each of which takes `each` itself.
    fn elapsed(pace: &mut Pace, reads: u32, each: Duration) -> Duration {
        let begun = pace.due;
        let mut now = begun;
        for _ in 0..reads {
            now += each;
            now += pace.after(MIB, now);
        }
        now - begun
    }

    #[test]
    fn reads_take_the_time_that_the_rate_says() {
        let ms = Duration::from_millis;
        let took =
            |rate: u64, reads, each| elapsed(&mut Pace::new(rate, Instant::now()), reads, each);

        assert_eq!(took(50 * MIB, 500, ms(5)), ms(10_000));
        assert_eq!(took(MIB / 64, 3, ms(5)), ms(192_000), "a low rate");
        let slow_disk = took(50 * MIB, 100, ms(40));
        assert!((ms(4_000)..ms(4_100)).contains(&slow_disk), "{slow_disk:?}");
    }

    #[test]
    fn time_lost_in_a_stall_is_not_made_up_for() {
        let mut pace = Pace::new(50 * MIB, Instant::now());
        let stalled = pace.due + Duration::from_secs(3600);

        assert_eq!(pace.after(MIB, stalled), Duration::from_millis(20));
    }
}
