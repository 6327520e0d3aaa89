//! As whom this node asks S3: what `weightctl doctor` says of it.

use std::path::Path;

use aws_credential_types::provider::ProvideCredentials;

use super::client::load;
use super::failure::{Kind, without_credentials};

/// What the AWS SDK's default chain found.
#[derive(Debug, PartialEq, Eq)]
pub enum NodeCredentials {
    /// Credentials, for this region.
    Found(String),
    /// None: requests are unsigned.
    Nothing,
    /// They could not be had, and why.
    Failed(String),
}

/// Whether the environment or a profile says anything of S3. An instance's role may be there all the same.
#[must_use]
pub fn is_configured() -> bool {
    // Source: the AWS SDKs and Tools Reference Guide, "Environment variables" and "Shared files".
    const VARIABLES: [&str; 10] = [
        "AWS_ACCESS_KEY_ID",
        "AWS_CONFIG_FILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_PROFILE",
        "AWS_REGION",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
    ];
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let home = set("HOME");
    let file = |name| {
        home.as_ref()
            .is_some_and(|home| Path::new(home).join(name).exists())
    };
    VARIABLES.iter().any(|name| set(name).is_some())
        || file(".aws/config")
        || file(".aws/credentials")
}

/// Looks for credentials as a fetch does. It may ask the instance: bound the wait.
pub async fn node_credentials() -> NodeCredentials {
    let base = load().await;
    let Some(provider) = base.credentials_provider() else {
        return NodeCredentials::Nothing;
    };
    match provider.provide_credentials().await {
        Ok(_) => {
            let region = base.region().map(ToString::to_string);
            NodeCredentials::Found(region.unwrap_or_default())
        }
        Err(error) => match without_credentials(&error) {
            Kind::NoCredentials { reason, .. } => NodeCredentials::Failed(reason),
            _ => NodeCredentials::Nothing,
        },
    }
}
