//! How S3 is reached, and as whom.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};
use url::Url;

/// Where S3 is and who asks. The default is what the AWS SDK finds in the environment, the profile
/// and the instance.
#[derive(Debug, Clone, Default)]
pub struct S3Config {
    /// The server, if it is not the one that `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` or the profile
    /// names, or AWS itself.
    pub endpoint: Option<Url>,
    /// The region to ask first. A bucket in another region of AWS is found all the same.
    pub region: Option<String>,
    /// Who asks.
    pub identity: S3Identity,
    /// Buckets that are read without credentials, whatever `identity` is.
    pub unsigned_buckets: Vec<String>,
    /// Whether an uploader's word (`x-amz-meta-sha256`) is enough to reuse bytes that are here. It is for a user
    /// who owns the whole store; the owner of one bucket could have written the digest of another's model.
    pub believe_metadata: bool,
    /// Whether each object is looked at before it is read, however many there are. What nobody has claimed anything about
    /// is not shared with other nodes.
    pub look_at_all: bool,
}

/// Who asks S3.
#[derive(Debug, Clone, Default)]
pub enum S3Identity {
    /// The AWS SDK's default chain: environment, profile and SSO, web identity, Pod Identity and ECS,
    /// the instance. Requests are unsigned if all of these have nothing.
    #[default]
    Chain,
    /// The owner of these keys.
    Keys(S3Keys),
    /// Nobody: requests are unsigned.
    Nobody,
}

/// One identity's keys.
#[derive(Clone)]
pub struct S3Keys {
    /// `AWS_ACCESS_KEY_ID`.
    pub access_key_id: String,
    /// `AWS_SECRET_ACCESS_KEY`.
    pub secret_access_key: SecretString,
    /// `AWS_SESSION_TOKEN`, for keys that expire.
    pub session_token: Option<SecretString>,
}

impl fmt::Debug for S3Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Keys").finish_non_exhaustive()
    }
}

impl S3Config {
    /// The same place, asked as the owner of `keys`.
    #[must_use]
    pub fn with_keys(&self, keys: S3Keys) -> Self {
        Self {
            identity: S3Identity::Keys(keys),
            ..self.clone()
        }
    }

    /// What must not be shown, whoever sends it back.
    pub(super) fn secrets(&self) -> impl Iterator<Item = &str> {
        let keys = match &self.identity {
            S3Identity::Keys(keys) => Some(keys),
            S3Identity::Chain | S3Identity::Nobody => None,
        };
        keys.into_iter().flat_map(|keys| {
            let token = keys.session_token.as_ref();
            let secrets = [Some(&keys.secret_access_key), token].into_iter().flatten();
            secrets
                .map(SecretString::expose_secret)
                .chain([keys.access_key_id.as_str()])
        })
    }
}
