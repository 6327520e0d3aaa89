//! What a node takes its rates for: `weightd_core::shared::Rate` by the virtual clock.

use weightd_core::shared::{RATE_WEIGHT, RATE_WINDOW};

/// Bytes per second of one way, over the time in which something was under way on it.
#[derive(Debug, Default)]
pub(super) struct Rate {
    under_way: usize,
    since: Option<f64>,
    busy: f64,
    /// All bytes that had moved by the last look.
    seen: f64,
    rate: Option<f64>,
}

impl Rate {
    /// Begins a transfer; `moved` are all bytes that have moved on this way so far.
    pub(super) fn begin(&mut self, now: f64, moved: f64) {
        self.fold(now, moved);
        self.under_way += 1;
        self.since.get_or_insert(now);
    }

    pub(super) fn end(&mut self, now: f64, moved: f64) {
        self.under_way -= 1;
        self.fold(now, moved);
    }

    pub(super) fn get(&mut self, now: f64, moved: f64) -> Option<f64> {
        self.fold(now, moved);
        self.rate
    }

    fn fold(&mut self, now: f64, moved: f64) {
        if let Some(since) = self.since {
            self.busy += now - since;
            self.since = (self.under_way > 0).then_some(now);
        }
        let window = RATE_WINDOW.as_secs_f64();
        if self.busy < window {
            return;
        }
        let rate = (moved - self.seen) / self.busy;
        // The real one looks at every read, so each window counts by itself.
        let windows = (self.busy / window).floor().min(100.0);
        let weight = 1.0 - (1.0 - RATE_WEIGHT).powf(windows);
        self.rate = Some(match self.rate {
            Some(before) => before + (rate - before) * weight,
            None => rate,
        });
        (self.busy, self.seen) = (0.0, moved);
    }
}
