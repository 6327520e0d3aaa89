//! The SDK's clients: set up once a process, made for a region and an identity.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_config::meta::region::RegionProviderChain;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Builder, Region, ResponseChecksumValidation, StalledStreamProtectionConfig,
};
use aws_types::service_config::ServiceConfigKey;
use secrecy::ExposeSecret;
use tokio::sync::OnceCell;
use url::{Host, Url};
use weightd_core::source::SourceError;

use super::config::{S3Config, S3Identity, S3Keys};
use super::http::Http;

/// Where AWS answers for a bucket whose region is not known, with the region that it is in.
const FIRST_REGION: &str = "us-east-1";

/// For one attempt at a question; the bytes of an object come after.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a question is asked in all. Ranges are asked once: the fetcher retries those.
const ATTEMPTS: u32 = 3;

/// How long we remember that the chain has no credentials. Asking an instance that is not there takes
/// a second each time.
const NOTHING_FOUND: Duration = Duration::from_secs(60);

/// What all S3 fetches of a process share: connections, the SDK's settings and its credentials.
pub struct S3Clients {
    http: Http,
    /// The environment, the profile and the default chain; loaded when it is first needed.
    base: OnceCell<SdkConfig>,
    /// When the default chain had no credentials.
    nothing_found: Mutex<Option<Instant>>,
    /// Whether a request was answered that the chain's credentials signed.
    chain_worked: AtomicBool,
}

/// No HTTP client can be made, for example because no root certificates were found.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up an HTTP client")]
pub struct S3ClientError(#[source] reqwest::Error);

impl S3Clients {
    /// # Errors
    ///
    /// [`S3ClientError`] if no TLS can be set up.
    pub fn new() -> Result<Arc<Self>, S3ClientError> {
        Self::with_base(OnceCell::new())
    }

    pub(super) fn with_base(base: OnceCell<SdkConfig>) -> Result<Arc<Self>, S3ClientError> {
        Ok(Arc::new(Self {
            http: Http::new().map_err(S3ClientError)?,
            base,
            nothing_found: Mutex::default(),
            chain_worked: AtomicBool::new(false),
        }))
    }

    /// The chain has no credentials; all that follows is unsigned, for a while.
    pub(super) fn note_nothing_found(&self) {
        *self.nothing_found() = Some(Instant::now());
    }

    /// A request by that signer was answered.
    pub(super) fn note_success(&self, signer: Signer) {
        if signer == Signer::Chain {
            self.chain_worked.store(true, Ordering::Relaxed);
            *self.nothing_found() = None;
        }
    }

    /// The chain has had credentials: if it has none now, they come back.
    pub(super) fn chain_worked(&self) -> bool {
        self.chain_worked.load(Ordering::Relaxed)
    }

    fn nothing_found(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        let lock = self.nothing_found.lock();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    /// Who signs requests for `bucket`.
    pub(super) fn signer(&self, config: &S3Config, bucket: &str) -> Signer {
        if config.unsigned_buckets.iter().any(|name| name == bucket) {
            return Signer::Nobody;
        }
        match &config.identity {
            S3Identity::Nobody => Signer::Nobody,
            S3Identity::Keys(_) => Signer::Keys,
            S3Identity::Chain => {
                let since = self.nothing_found().map(|at| at.elapsed());
                match since.is_some_and(|since| since < NOTHING_FOUND) {
                    true => Signer::NothingFound,
                    false => Signer::Chain,
                }
            }
        }
    }

    /// Readies clients for `region`, or for the one that is set. Asks nothing of S3.
    pub(super) async fn connect(
        &self,
        config: &S3Config,
        signer: Signer,
        region: Option<String>,
    ) -> Result<Connection, SourceError> {
        let base = self.base.get_or_init(load).await;
        let endpoint = endpoint(config, base)?;
        let set = || base.region().map(|region| region.as_ref().to_owned());
        let region = region.or_else(|| config.region.clone()).or_else(set);
        let region = region.unwrap_or_else(|| FIRST_REGION.to_owned());
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT_TIMEOUT);
        let mut base = base.clone().into_builder();
        if matches!(signer, Signer::Nobody | Signer::NothingFound) {
            // Taken away here, for a client's own settings only add to what it starts from.
            base.set_credentials_provider(None);
        }
        let mut builder = Builder::from(&base.build())
            .http_client(self.http.clone())
            .region(Region::new(region.clone()))
            .timeout_config(timeouts.build())
            // The fetcher has a watchdog of its own, and hashes the whole file.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .force_path_style(endpoint.as_ref().is_some_and(bare));
        builder.set_endpoint_url(endpoint.as_ref().map(|url| url.as_str().to_owned()));
        match (&config.identity, signer) {
            (S3Identity::Keys(keys), Signer::Keys) => {
                builder = builder.credentials_provider(credentials(keys));
            }
            (_, Signer::Nobody | Signer::NothingFound) => {
                builder = builder
                    .allow_no_auth()
                    .disable_s3_express_session_auth(true);
            }
            _ => {}
        }
        let client = |retry: RetryConfig| {
            let config = builder.clone().retry_config(retry);
            Client::from_conf(config.build())
        };
        Ok(Connection {
            questions: client(RetryConfig::standard().with_max_attempts(ATTEMPTS)),
            ranges: client(RetryConfig::disabled()),
            endpoint,
            region,
            signer,
        })
    }
}

impl fmt::Debug for S3Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Clients").finish_non_exhaustive()
    }
}

/// Who signs requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signer {
    /// What the SDK's default chain finds.
    Chain,
    /// Keys that came with the request.
    Keys,
    /// Nobody, as was asked for.
    Nobody,
    /// Nobody, because the chain found nothing.
    NothingFound,
}

/// Clients for one region and identity.
pub(super) struct Connection {
    /// For listings and headers: the SDK retries.
    pub(super) questions: Client,
    /// For bytes: the fetcher retries.
    pub(super) ranges: Client,
    /// `None` is AWS.
    pub(super) endpoint: Option<Url>,
    pub(super) region: String,
    pub(super) signer: Signer,
}

impl Connection {
    /// The server, for a message.
    pub(super) fn host(&self) -> String {
        let Some(url) = &self.endpoint else {
            return format!("S3 in {}", self.region);
        };
        let host = url.host_str().unwrap_or_default();
        match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }
}

fn credentials(keys: &S3Keys) -> Credentials {
    let token = keys.session_token.as_ref();
    let token = token.map(|token| token.expose_secret().to_owned());
    let secret = keys.secret_access_key.expose_secret();
    Credentials::new(&keys.access_key_id, secret, token, None, "weightd")
}

/// What the environment, the profile and the instance say.
pub(super) async fn load() -> SdkConfig {
    // Without a region the SDK asks an instance that is not there three times over, a second each.
    let region = RegionProviderChain::default_provider().or_else(FIRST_REGION);
    let loader = aws_config::defaults(BehaviorVersion::latest());
    loader.region(region).load().await
}

/// The server that is set, by us or for the SDK.
fn endpoint(config: &S3Config, base: &SdkConfig) -> Result<Option<Url>, SourceError> {
    if let Some(endpoint) = &config.endpoint {
        return check(endpoint.clone()).map(Some);
    }
    // As the SDK does it: what is set for S3 goes before what is set for all services.
    let key = ServiceConfigKey::builder()
        .service_id("S3")
        .env("AWS_ENDPOINT_URL")
        .profile("endpoint_url")
        .build()
        .expect("all parts are there");
    let for_s3 = base.service_config().and_then(|all| all.load_config(key));
    let set = |text: &String| !text.trim().is_empty();
    let for_all = || base.endpoint_url().map(str::to_owned).filter(set);
    let Some(text) = for_s3.filter(set).or_else(for_all) else {
        return Ok(None);
    };
    match Url::parse(text.trim()) {
        Ok(url) => check(url).map(Some),
        Err(error) => Err(refuse(&error.to_string())),
    }
}

fn check(url: Url) -> Result<Url, SourceError> {
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(refuse(
            "it does not begin with https:// or http:// and a host",
        ));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refuse("it holds a user name or password"));
    }
    Ok(url)
}

fn refuse(reason: &str) -> SourceError {
    SourceError::Invalid {
        what: "the S3 endpoint".to_owned(),
        detail: reason.to_owned(),
        hint: Some("write AWS_ENDPOINT_URL_S3 as https://host or http://host:port".to_owned()),
    }
}

/// Is the host one that cannot have a bucket's name before it?
fn bare(endpoint: &Url) -> bool {
    match endpoint.host() {
        Some(Host::Domain(name)) => {
            name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok()
        }
        Some(Host::Ipv4(_) | Host::Ipv6(_)) => true,
        None => false,
    }
}
