//! The HTTP clients and rate limits that all fetches of a process share.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use reqwest::redirect::{Attempt, Policy};
use secrecy::{ExposeSecret, SecretString};
use url::Url;
use weightd_core::digest::Digest;

use super::config::HfConfigError;
use super::hub::host;
use super::limit::{Limiter, Waits};
use super::refusal::cause;

/// Redirects within one origin: a renamed repository costs one, a small file one more.
const REDIRECTS: usize = 5;

/// Connections kept open between requests, for each host. A 25 Gbit/s node uses about 64 at once.
const IDLE_CONNECTIONS: usize = 128;

/// What all Hub fetches of a process share: connections, and what is known of rate limits.
pub struct HfClients {
    /// For the API. May speak HTTP/2.
    pub(super) api: reqwest::Client,
    /// For file content. HTTP/1.1 only: with HTTP/2 all ranges of a file would share one TCP
    /// connection, and its congestion window.
    pub(super) content: reqwest::Client,
    pub(super) timing: Timing,
    limiters: Mutex<HashMap<LimitKey, Arc<Limiter>>>,
}

/// The Hub counts by token; the digest stands for it, so that the key is no secret.
type LimitKey = (url::Origin, Option<Digest>);

/// How long to wait for the Hub, and how often to ask again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    /// For a TCP and TLS connection.
    pub(super) connect: Duration,
    /// From a request to the header of its answer.
    pub(super) header: Duration,
    /// For the whole body of an API call.
    pub(super) body: Duration,
    /// Before the first repetition; each further one waits twice as long.
    pub(super) backoff: Duration,
    /// How often an API call that failed for a passing reason is repeated.
    pub(super) repeats: u32,
    /// How often an API call that was refused for its rate is repeated.
    pub(super) refusals: u32,
    pub(super) limit: Waits,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            header: Duration::from_secs(30),
            body: Duration::from_secs(120),
            backoff: Duration::from_millis(500),
            repeats: 3,
            refusals: 5,
            limit: Waits::default(),
        }
    }
}

impl Timing {
    /// The wait before repetition number `repeat` (from 0), with jitter.
    pub(super) fn backoff(&self, repeat: u32) -> Duration {
        let wait = self.backoff * 2_u32.saturating_pow(repeat.min(10));
        wait.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

impl HfClients {
    /// # Errors
    ///
    /// [`HfConfigError::Client`] if no TLS can be set up.
    pub fn new() -> Result<Arc<Self>, HfConfigError> {
        Self::with_timing(Timing::default())
    }

    pub(super) fn with_timing(timing: Timing) -> Result<Arc<Self>, HfConfigError> {
        let builder = || {
            // Compressed bytes would have other lengths and ranges than the file.
            let identity = HeaderValue::from_static("identity");
            reqwest::Client::builder()
                .user_agent(concat!("weightd/", env!("CARGO_PKG_VERSION")))
                .default_headers(HeaderMap::from_iter([(ACCEPT_ENCODING, identity)]))
                .redirect(Policy::custom(stay_at_origin))
                .referer(false)
                .connect_timeout(timing.connect)
                .tcp_nodelay(true)
                .tcp_keepalive(Duration::from_secs(30))
                .pool_max_idle_per_host(IDLE_CONNECTIONS)
        };
        let api = builder().build().map_err(HfConfigError::Client)?;
        let content = builder().http1_only().build();
        Ok(Arc::new(Self {
            api,
            content: content.map_err(HfConfigError::Client)?,
            timing,
            limiters: Mutex::default(),
        }))
    }

    /// Asks for the header of `endpoint` itself, without a token: the status of the answer.
    ///
    /// # Errors
    ///
    /// Why there was none within `patience`.
    pub async fn reach(&self, endpoint: &Url, patience: Duration) -> Result<u16, String> {
        let request = self.api.head(endpoint.clone()).timeout(patience);
        let answer = request.send().await.map_err(cause)?;
        Ok(answer.status().as_u16())
    }

    /// The limits of one token, or of none, at one host.
    pub(super) fn limiter(&self, endpoint: &Url, token: Option<&SecretString>) -> Arc<Limiter> {
        let fingerprint = token.map(|token| Digest::of(token.expose_secret().as_bytes()));
        let key = (endpoint.origin(), fingerprint);
        let mut limiters = self.limiters.lock().unwrap_or_else(PoisonError::into_inner);
        // A daemon meets many tokens: those that are not in use and not limited need no memory.
        limiters.retain(|_, limiter| Arc::strong_count(limiter) > 1 || !limiter.idle());
        let new = || Arc::new(Limiter::new(host(endpoint), self.timing.limit));
        Arc::clone(limiters.entry(key).or_insert_with(new))
    }
}

impl fmt::Debug for HfClients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HfClients").finish_non_exhaustive()
    }
}

/// Follows a redirect within its origin; any other is handed to the caller, who must decide
/// what the new origin may see. (A token must not follow, and https must not become http.)
fn stay_at_origin(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let from = attempt.previous().last().map(Url::origin);
    if from != Some(attempt.url().origin()) {
        attempt.stop()
    } else if attempt.previous().len() > REDIRECTS {
        attempt.error("too many redirects")
    } else {
        attempt.follow()
    }
}
