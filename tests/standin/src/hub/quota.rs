//! Rate limits in fixed windows, as the Hub has them.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use http::Response;

use crate::content::Body;
use crate::log::lock;
use crate::watch::{rate_limited, set_rate_limit};

/// Requests that each token, and all clients without one, may make per window.
///
/// Source for the Hub's own: <https://huggingface.co/docs/hub/rate-limits>.
#[derive(Debug, Clone)]
pub struct Quota {
    /// Calls of `/api/…`.
    pub api: u64,
    /// Calls of `…/resolve/…`.
    pub resolvers: u64,
    /// The Hub's is 300 s. Counted in whole seconds.
    pub window: Duration,
    /// Whether a 429 also has a `Retry-After`.
    pub retry_after: bool,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    used: u64,
}

/// Requests made in the windows under way.
#[derive(Debug, Default)]
pub(super) struct Counters(Mutex<HashMap<(&'static str, String), Window>>);

/// Where a client stands after a request.
pub(super) struct Standing {
    bucket: &'static str,
    allowed: bool,
    left: u64,
    quota: u64,
    reset_s: u64,
    window_s: u64,
    retry_after: bool,
}

impl Counters {
    /// Counts one request of the client with this `Authorization` header.
    pub(super) fn count(&self, quota: &Quota, path: &str, client: &str) -> Standing {
        let (bucket, limit) = if path.starts_with("/api/") {
            ("api", quota.api)
        } else {
            ("resolvers", quota.resolvers)
        };
        let mut windows = lock(&self.0);
        let window = windows
            .entry((bucket, client.to_owned()))
            .or_insert_with(|| Window {
                began: Instant::now(),
                used: 0,
            });
        if window.began.elapsed() >= quota.window {
            window.began = Instant::now();
            window.used = 0;
        }
        let allowed = window.used < limit;
        window.used += 1;
        let reset = quota.window.saturating_sub(window.began.elapsed());
        Standing {
            bucket,
            allowed,
            left: limit.saturating_sub(window.used),
            quota: limit,
            reset_s: reset.as_secs_f64().ceil() as u64,
            window_s: quota.window.as_secs(),
            retry_after: quota.retry_after,
        }
    }
}

impl Standing {
    /// The 429, if the client has used its quota up.
    pub(super) fn refusal(&self) -> Option<Response<Body>> {
        let retry_after_s = self.retry_after.then_some(self.reset_s);
        (!self.allowed).then(|| {
            rate_limited(
                self.bucket,
                self.quota,
                self.window_s,
                self.reset_s,
                retry_after_s,
            )
        })
    }

    /// Tells the client where it stands.
    pub(super) fn stamp(&self, response: &mut Response<Body>) {
        set_rate_limit(
            response,
            self.bucket,
            (self.left, self.quota),
            (self.reset_s, self.window_s),
        );
    }
}
