//! S3 clients: credentials from the SDK's own chain, one client for each region.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::imds;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    ProvideCredentials, RequestChecksumCalculation, ResponseChecksumValidation,
    SharedCredentialsProvider,
};
use tokio::sync::OnceCell;
use weightd_core::errors::Chain;
use weightd_core::source::SourceError;

/// Where S3 is, beyond what the SDK's own variables and files say.
#[derive(Debug, Clone, Default)]
pub struct S3Config {
    /// The endpoint, for S3 that is not AWS's. Else `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`.
    pub endpoint: Option<String>,
    /// The region. Else `AWS_REGION` or the profile's, then what the bucket says.
    pub region: Option<String>,
    /// Never sign: only public buckets can be read.
    pub anonymous: bool,
}

/// What all S3 fetches of a process share.
pub struct S3Clients {
    config: S3Config,
    endpoint: Option<String>,
    base: OnceCell<SdkConfig>,
    /// The region of each bucket that is not in the configured one.
    regions: Mutex<HashMap<String, String>>,
    clients: Mutex<HashMap<String, Client>>,
}

impl S3Clients {
    /// Clients as `config` and the environment say. Nothing is looked up yet.
    #[must_use]
    pub fn new(config: S3Config) -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let from_env = || variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL"));
        let endpoint = config.endpoint.clone().or_else(from_env);
        Self {
            config,
            endpoint,
            base: OnceCell::new(),
            regions: Mutex::default(),
            clients: Mutex::default(),
        }
    }

    pub(super) fn endpoint(&self) -> Option<&str> {
        self.endpoint.as_deref()
    }

    pub(super) fn remember_region(&self, bucket: &str, region: &str) {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        regions.insert(bucket.to_owned(), region.to_owned());
    }

    /// The client for a bucket.
    pub(super) async fn client(&self, bucket: &str) -> Result<Client, SourceError> {
        let base = self.base.get_or_try_init(|| self.load()).await?;
        let known = self
            .regions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(bucket)
            .cloned();
        let region = known
            .or_else(|| base.region().map(ToString::to_string))
            .unwrap_or_default();
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let client = clients
            .entry(region.clone())
            .or_insert_with(|| self.build(base, &region));
        Ok(client.clone())
    }

    fn build(&self, base: &SdkConfig, region: &str) -> Client {
        let mut config = aws_sdk_s3::config::Builder::from(base)
            .region(Region::new(region.to_owned()))
            .force_path_style(self.endpoint.as_deref().is_some_and(wants_path_style))
            // The fetcher repeats, counts and watches by itself, range by range.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            // A range has no checksum of its own; the fetcher checks the object's.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        // Without it, what the SDK found itself stays: its variables, or the profile's `services`.
        if let Some(endpoint) = &self.config.endpoint {
            config.set_endpoint_url(Some(endpoint.clone()));
        }
        Client::from_conf(config.build())
    }

    /// Finds the region and the credentials.
    async fn load(&self) -> Result<SdkConfig, SourceError> {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_secs(10))
            // To the header of an answer; the body is the fetcher's to watch.
            .read_timeout(Duration::from_secs(30));
        let mut loader =
            aws_config::defaults(BehaviorVersion::latest()).timeout_config(timeouts.build());
        if let Some(region) = &self.config.region {
            loader = loader.region(Region::new(region.clone()));
        }
        loader = match self.credentials().await? {
            Some(credentials) => loader.credentials_provider(credentials),
            None => loader.no_credentials(),
        };
        let config = loader.load().await;
        if config.region().is_some() {
            return Ok(config);
        }
        // Source: the AWS SDKs' own fall-back for S3; a bucket elsewhere answers with its region.
        Ok(config
            .into_builder()
            .region(Region::new("us-east-1"))
            .build())
    }

    /// The chain's credentials; `None` if it has none, and requests go out unsigned.
    async fn credentials(&self) -> Result<Option<SharedCredentialsProvider>, SourceError> {
        if self.config.anonymous {
            return Ok(None);
        }
        // A machine outside EC2 has no metadata service, and must not wait for it for long.
        let imds = imds::Client::builder()
            .connect_timeout(Duration::from_millis(700))
            .max_attempts(2)
            .build();
        let mut chain = DefaultCredentialsChain::builder().imds_client(imds);
        if let Some(region) = &self.config.region {
            chain = chain.region(Region::new(region.clone()));
        }
        let chain = SharedCredentialsProvider::new(chain.build().await);
        match chain.provide_credentials().await {
            Ok(_) => Ok(Some(chain)),
            Err(CredentialsError::CredentialsNotLoaded(_)) => Ok(None),
            Err(error) => Err(SourceError::Denied {
                what: "S3".to_owned(),
                detail: format!("no AWS credentials can be had: {}", Chain(&error)),
                hint: Some(
                    "check the profile, role or web identity that this process was given"
                        .to_owned(),
                ),
            }),
        }
    }
}

impl fmt::Debug for S3Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Clients")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// A host without a name has no names below it for its buckets.
fn wants_path_style(endpoint: &str) -> bool {
    let Ok(url) = url::Url::parse(endpoint) else {
        return false;
    };
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(_) | url::Host::Ipv6(_)) => true,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_without_names_take_buckets_in_the_path() {
        for endpoint in [
            "http://127.0.0.1:9000",
            "http://localhost:1",
            "http://[::1]:1",
        ] {
            assert!(wants_path_style(endpoint), "{endpoint}");
        }
        assert!(!wants_path_style("https://s3.example.com"));
    }
}
