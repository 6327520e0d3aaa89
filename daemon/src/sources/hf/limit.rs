//! The Hub's rate limits, shared by all who use one token at one host.
//!
//! The Hub counts requests per token (and per IP address) in fixed windows of five minutes, and says
//! in each answer how many are left and when the window ends. Whoever hears that none is left makes
//! all the others wait too: asking on would only be refused.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use tokio::time::Instant;

/// Which of the Hub's counters a request counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quota {
    /// Calls below `/api/`.
    Api,
    /// Calls that turn a file's name into an address, and small files.
    Resolvers,
    /// The web site; we ask for nothing there.
    Pages,
}

/// How long to wait when the Hub asks for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waits {
    /// Added to the reset that the Hub names: it rounds down to seconds.
    pub(super) margin: Duration,
    /// The longest wait that is sat out; beyond it the caller is told.
    pub(super) longest: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            margin: Duration::from_secs(1),
            // Windows last 300 s, so a reset is at most that far away.
            longest: Duration::from_secs(360),
        }
    }
}

/// One item of a `RateLimit` header: `"api";r=0;t=42`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    /// `None` for a counter that we do not know.
    quota: Option<Quota>,
    remaining: u64,
    reset: Duration,
}

/// Until when each quota is used up.
#[derive(Debug)]
pub(super) struct Limiter {
    /// For the log.
    host: String,
    waits: Waits,
    until: Mutex<[Option<Instant>; 3]>,
}

impl Limiter {
    pub(super) fn new(host: String, waits: Waits) -> Self {
        Self {
            host,
            waits,
            until: Mutex::new([None; 3]),
        }
    }

    /// Waits until `quota` may be used, with jitter so that not all start in the same instant.
    ///
    /// # Errors
    ///
    /// The time to wait, if it is more than `longest`.
    pub(super) async fn ready(&self, quota: Quota, longest: Duration) -> Result<(), Duration> {
        // Looked at again after each wait: meanwhile another task may have been refused.
        while let Some(until) = self.blocked_until(quota) {
            let wait = until.saturating_duration_since(Instant::now());
            if wait > longest {
                return Err(wait);
            }
            tokio::time::sleep(wait + self.jitter(wait)).await;
        }
        Ok(())
    }

    /// Is `quota` used up, as far as we know?
    fn blocked_until(&self, quota: Quota) -> Option<Instant> {
        let until = self.lock()[quota as usize];
        until.filter(|until| *until > Instant::now())
    }

    /// For how long a fetch may ask for nothing: questions or files, whichever is longer.
    pub(super) fn limited_for(&self) -> Option<Duration> {
        let quotas = [Quota::Api, Quota::Resolvers];
        let until = quotas
            .into_iter()
            .filter_map(|quota| self.blocked_until(quota));
        until
            .max()
            .map(|until| until.saturating_duration_since(Instant::now()))
    }

    /// Nobody is waiting and nothing is remembered.
    pub(super) fn idle(&self) -> bool {
        self.lock()
            .iter()
            .all(|until| until.is_none_or(|until| until <= Instant::now()))
    }

    /// Takes note of an answer to a request that counted against `quota`. Returns the time to wait,
    /// if the answer named one.
    pub(super) fn note(
        &self,
        quota: Quota,
        status: StatusCode,
        headers: &HeaderMap,
    ) -> Option<Duration> {
        let refused = status == StatusCode::TOO_MANY_REQUESTS;
        let mut told = refused.then(|| retry_after(headers)).flatten();
        for window in windows(headers) {
            if window.remaining == 0 {
                self.block(window.quota, window.reset);
                told = told.max(Some(window.reset));
            }
        }
        if let Some(wait) = told.filter(|_| refused) {
            self.block(Some(quota), wait);
        }
        told
    }

    /// Keeps everyone from `quota` (`None`: from all of them) for `wait` and a margin.
    pub(super) fn block(&self, quota: Option<Quota>, wait: Duration) {
        // A day at most: an absurd number must not overflow the clock.
        let wait = wait.min(Duration::from_secs(86_400)) + self.waits.margin;
        let now = Instant::now();
        let mut news = false;
        for (at, slot) in self.lock().iter_mut().enumerate() {
            if quota.is_none_or(|quota| quota as usize == at) {
                news |= slot.is_none_or(|until| until <= now);
                *slot = (*slot).max(Some(now + wait));
            }
        }
        // Said once, not by every request that is refused meanwhile.
        if news {
            let wait_s = wait.as_secs_f64();
            tracing::warn!(
                host = self.host,
                ?quota,
                wait_s,
                "rate limit reached, waiting"
            );
        }
    }

    fn jitter(&self, wait: Duration) -> Duration {
        let spread = (wait / 10).clamp(self.waits.margin / 4, self.waits.margin * 5);
        spread.mul_f64(fastrand::f64())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, [Option<Instant>; 3]> {
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `Retry-After`, in seconds or as a date.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(text).ok()?;
    let wait = date.timestamp().duration_since(jiff::Timestamp::now());
    Some(wait.try_into().unwrap_or_default())
}

/// The windows that `RateLimit` headers name. Unknown forms are skipped.
///
/// Source: draft-ietf-httpapi-ratelimit-headers-09, section 4.
fn windows(headers: &HeaderMap) -> Vec<Window> {
    let texts = headers.get_all("ratelimit").iter();
    let items = texts
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(','));
    items.filter_map(window).collect()
}

fn window(item: &str) -> Option<Window> {
    let mut fields = item.split(';').map(str::trim);
    let quota = match fields.next()?.trim_matches('"') {
        "api" => Some(Quota::Api),
        "resolvers" => Some(Quota::Resolvers),
        "pages" => Some(Quota::Pages),
        _ => None,
    };
    let (mut remaining, mut reset) = (None, None);
    for (key, value) in fields.filter_map(|field| field.split_once('=')) {
        match key {
            "r" => remaining = value.parse().ok(),
            "t" => reset = value.parse().ok().map(Duration::from_secs),
            _ => {}
        }
    }
    Some(Window {
        quota,
        remaining: remaining?,
        reset: reset?,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())])
    }

    const LONGEST: Duration = Duration::from_secs(360);

    fn limiter() -> Limiter {
        Limiter::new("hub.example".to_owned(), Waits::default())
    }

    #[test]
    fn the_header_is_read_and_unknown_forms_are_skipped() {
        let read = |text| windows(&headers("ratelimit", text));
        let api = Window {
            quota: Some(Quota::Api),
            remaining: 0,
            reset: Duration::from_secs(42),
        };
        assert_eq!(read(r#""api";r=0;t=42"#), [api]);
        assert_eq!(read(r#""api"; r=0; t=42; pk=:x:"#), [api]);
        let both = read(r#""resolvers";r=7;t=1, "api";r=0;t=42"#);
        assert_eq!(both[1], api);
        assert_eq!(both[0].quota, Some(Quota::Resolvers));
        for text in [
            "limit=10, remaining=0, reset=5",
            "",
            "\"api\"",
            "\"api\";r=x;t=1",
        ] {
            assert_eq!(read(text), [], "{text}");
        }
    }

    #[test]
    fn retry_after_is_a_number_or_a_date() {
        assert_eq!(
            retry_after(&headers("retry-after", "7")),
            Some(Duration::from_secs(7))
        );
        let past = headers("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT");
        assert_eq!(retry_after(&past), Some(Duration::ZERO));
        assert_eq!(retry_after(&headers("retry-after", "soon")), None);
    }

    #[tokio::test(start_paused = true)]
    async fn one_refusal_makes_everyone_wait_until_the_reset() {
        let limiter = Arc::new(limiter());
        let start = Instant::now();
        let told = limiter.note(
            Quota::Api,
            StatusCode::TOO_MANY_REQUESTS,
            &headers("ratelimit", r#""api";r=0;t=42"#),
        );
        assert_eq!(told, Some(Duration::from_secs(42)));

        limiter.ready(Quota::Resolvers, LONGEST).await.unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO, "the other quota is free");
        let tasks = (0..20).map(|_| {
            let limiter = Arc::clone(&limiter);
            tokio::spawn(async move {
                limiter
                    .ready(Quota::Api, LONGEST)
                    .await
                    .map(|()| Instant::now())
            })
        });
        let mut starts = Vec::new();
        for task in tasks.collect::<Vec<_>>() {
            let waited = task.await.unwrap().unwrap() - start;
            assert!(waited >= Duration::from_secs(43), "{waited:?}");
            assert!(waited <= Duration::from_secs(49), "{waited:?}");
            starts.push(waited);
        }
        starts.dedup();
        assert!(starts.len() > 1, "all start at once: {starts:?}");
        assert!(limiter.idle());
    }

    #[tokio::test(start_paused = true)]
    async fn a_used_up_quota_is_respected_before_it_is_refused() {
        let limiter = limiter();
        let start = Instant::now();
        limiter.note(
            Quota::Api,
            StatusCode::OK,
            &headers("ratelimit", r#""api";r=0;t=5"#),
        );
        limiter.ready(Quota::Api, LONGEST).await.unwrap();
        assert!(start.elapsed() >= Duration::from_secs(6));
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_is_too_long_is_told() {
        let limiter = limiter();
        let hours = headers("retry-after", "99999999999999999");
        limiter.note(Quota::Api, StatusCode::TOO_MANY_REQUESTS, &hours);
        let wait = limiter.ready(Quota::Api, LONGEST).await.unwrap_err();
        assert!(wait > Duration::from_secs(3600), "{wait:?}");
        let start = Instant::now();
        limiter.ready(Quota::Resolvers, LONGEST).await.unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_shorter_reset_does_not_free_anyone() {
        let limiter = limiter();
        let start = Instant::now();
        limiter.block(None, Duration::from_secs(60));
        limiter.block(Some(Quota::Resolvers), Duration::from_secs(1));
        limiter.ready(Quota::Resolvers, LONGEST).await.unwrap();
        assert!(start.elapsed() >= Duration::from_secs(61));
    }
}
