//! One repository at one Hub, asked with one token: addresses, requests, and their repetition.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretString};
use tokio::time::timeout;
use url::Url;
use weightd_core::model::{ModelRef, Revision};
use weightd_core::source::SourceError;

use super::client::{HfClients, Timing};
use super::config::HfConfig;
use super::limit::{Limiter, Quota};
use super::refusal::{Answer, cause, no_answer, passing, refusal, unreachable};

/// What RFC 3986 calls unreserved, as the Hub's own clients leave it.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The longest body of an API call. A page of the tree API is below 1 MiB.
const BODY_BYTES: usize = 64 << 20;

/// The longest wait within a read, which holds a connection that all fetches share: a longer one is the
/// caller's, who gives the connection back first.
const READ_WAIT: Duration = Duration::from_secs(2);

/// What stands before the token in its header.
const SCHEME: &str = "Bearer ";

/// How a request is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask {
    pub(super) quota: Quota,
    /// How often it is repeated when it failed for a passing reason.
    pub(super) repeats: u32,
    /// The longest wait that is sat out.
    pub(super) longest: Duration,
}

impl Ask {
    /// For a question that holds nobody up.
    pub(super) fn question(hub: &Hub, quota: Quota) -> Self {
        Self {
            quota,
            repeats: hub.timing().repeats,
            longest: hub.timing().limit.longest,
        }
    }

    /// For what a read needs.
    pub(super) fn read(repeats: u32) -> Self {
        Self {
            quota: Quota::Resolvers,
            repeats,
            longest: READ_WAIT,
        }
    }
}

pub(super) struct Hub {
    pub(super) clients: Arc<HfClients>,
    pub(super) model: ModelRef,
    config: HfConfig,
    limiter: Arc<Limiter>,
    authorization: Option<HeaderValue>,
    /// A request was answered, whatever the answer, unless that was to ask later.
    pub(super) answered: AtomicBool,
    /// What the Hub calls the repository, as far as it was asked.
    pub(super) canonical: OnceLock<String>,
}

impl Hub {
    pub(super) fn new(clients: Arc<HfClients>, config: HfConfig, model: ModelRef) -> Self {
        let limiter = clients.limiter(config.endpoint(), config.token());
        let authorization = config.token().map(|token| {
            let token = token.expose_secret();
            let mut text = Zeroizing::new(String::with_capacity(SCHEME.len() + token.len()));
            text.push_str(SCHEME);
            text.push_str(token);
            let mut value =
                HeaderValue::from_str(&text).expect("HfConfig refused what no header can carry");
            value.set_sensitive(true);
            value
        });
        Self {
            clients,
            model,
            config,
            limiter,
            authorization,
            answered: AtomicBool::new(false),
            canonical: OnceLock::new(),
        }
    }

    pub(super) fn timing(&self) -> &Timing {
        &self.clients.timing
    }

    pub(super) fn token(&self) -> Option<&SecretString> {
        self.config.token()
    }

    pub(super) fn has_token(&self) -> bool {
        self.token().is_some()
    }

    /// The endpoint without a slash at its end.
    pub(super) fn endpoint(&self) -> &str {
        self.config.endpoint().as_str().trim_end_matches('/')
    }

    /// Host and port, for texts.
    pub(super) fn host(&self) -> String {
        host(self.config.endpoint())
    }

    /// Where a person finds the repository.
    pub(super) fn page(&self) -> String {
        format!("{}/{}", self.endpoint(), self.model.name())
    }

    /// Does `url` belong to the endpoint, so that the token may be sent there?
    pub(super) fn owns(&self, url: &Url) -> bool {
        url.origin() == self.config.endpoint().origin()
    }

    pub(super) fn revision_url(&self, revision: &str) -> Url {
        let revision = utf8_percent_encode(revision, SEGMENT);
        self.url(&format!(
            "/api/models/{}/revision/{revision}?expand=sha",
            self.model.name()
        ))
    }

    pub(super) fn tree_url(&self, revision: &Revision) -> Url {
        let name = self.model.name();
        self.url(&format!(
            "/api/models/{name}/tree/{revision}?recursive=true&expand=false"
        ))
    }

    pub(super) fn file_url(&self, revision: &Revision, path: &str) -> Url {
        let path: Vec<String> = path
            .split('/')
            .map(|part| utf8_percent_encode(part, SEGMENT).to_string())
            .collect();
        let (name, path) = (self.model.name(), path.join("/"));
        self.url(&format!("/{name}/resolve/{revision}/{path}"))
    }

    fn url(&self, rest: &str) -> Url {
        let text = format!("{}{rest}", self.endpoint());
        Url::parse(&text).expect("an endpoint, checked names and encoded segments make a URL")
    }

    /// Waits until the rate limit lets one more request through.
    pub(super) async fn ready(&self, ask: Ask) -> Result<(), SourceError> {
        let wait = self.limiter.ready(ask.quota, ask.longest).await;
        wait.map_err(|wait| SourceError::Unavailable {
            what: self.model.to_string(),
            detail: format!("{} allows no more requests for now", self.host()),
            retry_after: Some(wait),
        })
    }

    /// For how long the rate limit lets nothing through.
    pub(super) fn limited_for(&self) -> Option<Duration> {
        self.limiter.limited_for()
    }

    /// Keeps all who share this token from `quota` for a while.
    pub(super) fn block(&self, quota: Quota, wait: Duration) {
        self.limiter.block(Some(quota), wait);
    }

    /// Sends a request to the Hub, with the token, when the rate limit allows it. Waits and asks
    /// again when it is refused for its rate or failed for a passing reason, as `ask` says. Redirects within the Hub are followed; any other answer is returned as it is.
    ///
    /// # Errors
    ///
    /// [`SourceError::Unavailable`] if that was not enough.
    pub(super) async fn send(
        &self,
        client: &reqwest::Client,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
        ask: Ask,
    ) -> Result<Response, SourceError> {
        let (mut failures, mut refusals) = (0, 0);
        loop {
            self.ready(ask).await?;
            let mut request = client
                .request(method.clone(), url.clone())
                .headers(headers.clone());
            if let Some(authorization) = self.authorization.as_ref().filter(|_| self.owns(url)) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let error = match timeout(self.timing().header, request.send()).await {
                Ok(Ok(response)) => {
                    let told = self
                        .limiter
                        .note(ask.quota, response.status(), response.headers());
                    if response.status() == StatusCode::TOO_MANY_REQUESTS
                        && refusals < self.timing().refusals
                    {
                        if told.is_none() {
                            self.block(ask.quota, self.timing().backoff(refusals + 2));
                        }
                        refusals += 1;
                        continue;
                    }
                    let answer = Answer::of(&response);
                    let limited = answer.status == StatusCode::TOO_MANY_REQUESTS;
                    if !passing(answer.status) || limited {
                        self.answered.fetch_or(!limited, Ordering::Relaxed);
                        return Ok(response);
                    }
                    refusal(self, &self.model.to_string(), &answer)
                }
                Ok(Err(error)) => unreachable(&self.host(), error),
                Err(_) => no_answer(&self.host(), self.timing().header),
            };
            self.wait_to_repeat(error, failures, ask).await?;
            failures += 1;
        }
    }

    /// Waits before the next attempt, if `error` is worth one and there were not too many yet.
    pub(super) async fn wait_to_repeat(
        &self,
        error: SourceError,
        failures: u32,
        ask: Ask,
    ) -> Result<(), SourceError> {
        let SourceError::Unavailable { retry_after, .. } = &error else {
            return Err(error);
        };
        let wait = self.timing().backoff(failures);
        let wait = retry_after.map_or(wait, |told| told.max(wait));
        if failures >= ask.repeats || wait > ask.longest {
            return Err(error);
        }
        tracing::debug!(%error, failures, "asking the hub again");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// An API call's body, with its headers. A body that is cut short is asked for again.
    pub(super) async fn call(&self, url: &Url) -> Result<(Vec<u8>, HeaderMap), SourceError> {
        let mut failures = 0;
        loop {
            let client = &self.clients.api;
            let ask = Ask::question(self, Quota::Api);
            let response = self
                .send(client, Method::GET, url, &HeaderMap::new(), ask)
                .await?;
            if !response.status().is_success() {
                let what = self.model.to_string();
                return Err(refusal(self, &what, &Answer::of(&response)));
            }
            let headers = response.headers().clone();
            let body = timeout(self.timing().body, self.body(response)).await;
            let error = match body {
                Ok(Ok(body)) => return Ok((body, headers)),
                Ok(Err(error)) => error,
                Err(_) => no_answer(&self.host(), self.timing().body),
            };
            self.wait_to_repeat(error, failures, ask).await?;
            failures += 1;
        }
    }

    async fn body(&self, mut response: Response) -> Result<Vec<u8>, SourceError> {
        let mut body = Vec::new();
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() <= BODY_BYTES => {
                    body.extend_from_slice(&chunk);
                }
                Ok(Some(_)) => {
                    return Err(self.nonsense(format!(
                        "{} sends more than {} MiB in one answer",
                        self.host(),
                        BODY_BYTES >> 20
                    )));
                }
                Ok(None) => return Ok(body),
                Err(error) => {
                    return Err(SourceError::Unavailable {
                        what: self.host(),
                        detail: cause(error),
                        retry_after: None,
                    });
                }
            }
        }
    }

    /// The Hub's answer cannot be right.
    pub(super) fn nonsense(&self, detail: String) -> SourceError {
        SourceError::Invalid {
            what: self.model.to_string(),
            detail,
            hint: None,
        }
    }
}

/// Host and port of `url`, for texts: the rest of it may be a secret.
pub(super) fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}
