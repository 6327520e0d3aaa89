//! Why the API server could not be asked, in words that hold no secret.

use std::error::Error;
use std::path::PathBuf;

use http::StatusCode;
use kube::client::AuthError;
use kube::config::{InClusterError, KubeconfigError};
use kube::core::Status;
use kube::runtime::watcher;

/// Why there is no way to the API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The file was asked for: mend it.
    #[error("cannot use the kubeconfig `{}`", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Cause,
    },
    /// This is a pod, but one that cannot speak to its cluster.
    #[error("cannot use the pod's service account")]
    ServiceAccount {
        /// What is missing.
        #[source]
        source: Cause,
    },
}

/// What the client reports, each cause once.
///
/// The client's own errors quote what was read where a token may stand: they end here.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Cause(String);

impl ConnectError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Kubeconfig { .. } => {
                "name a file that `kubectl --kubeconfig` works with on this node, or none in a pod"
                    .to_owned()
            }
            Self::ServiceAccount { .. } => {
                "set automountServiceAccountToken: true in the pod, or give a kubeconfig".to_owned()
            }
        })
    }
}

impl Cause {
    fn chain(error: &(dyn Error + 'static)) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let next = error.to_string();
            // Most of the client's errors repeat their source in their own text.
            if !text.ends_with(&next) {
                text.push_str(": ");
                text.push_str(&next);
            }
            cause = error.source();
        }
        Self(text)
    }
}

impl From<kube::Error> for Cause {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::from(status),
            kube::Error::Service(error) => Self::chain(&*error),
            kube::Error::HyperError(error) => Self::chain(&error),
            kube::Error::InferKubeconfig(error) => Self::from(error),
            kube::Error::Auth(AuthError::AuthExecRun { out, .. }) => Self(format!(
                "the command that should print the credentials failed: {}",
                out.status
            )),
            kube::Error::Auth(AuthError::AuthExecParse(_)) => {
                Self("the command that should print the credentials printed none".to_owned())
            }
            // Its address may hold a password.
            kube::Error::ProxyProtocolUnsupported { .. }
            | kube::Error::ProxyProtocolDisabled { .. } => {
                Self("its proxy is neither http:// nor https://".to_owned())
            }
            error => Self::chain(&error),
        }
    }
}

impl From<Box<Status>> for Cause {
    fn from(status: Box<Status>) -> Self {
        let Status {
            code,
            message,
            reason,
            ..
        } = *status;
        // The client makes a status of any answer, and its whole page the message: a proxy's may quote our
        // headers. The reasons it makes up are sentences, the API server's single words.
        if reason.is_empty() || reason.contains(' ') {
            return Self(match StatusCode::from_u16(code) {
                Ok(code) => format!("the answer was {code}"),
                Err(_) => "the answer was no success".to_owned(),
            });
        }
        Self(format!("{message} ({code} {reason})"))
    }
}

impl From<KubeconfigError> for Cause {
    fn from(error: KubeconfigError) -> Self {
        match error {
            KubeconfigError::Parse(error) => Self(match error.location() {
                Some(at) => format!("not a kubeconfig from line {} on", at.line()),
                None => "not a kubeconfig".to_owned(),
            }),
            // Its text names the file once more.
            KubeconfigError::ReadConfig(error, _) => Self::chain(&error),
            error => Self::chain(&error),
        }
    }
}

impl From<InClusterError> for Cause {
    fn from(error: InClusterError) -> Self {
        Self::chain(&error)
    }
}

impl From<watcher::Error> for Cause {
    fn from(error: watcher::Error) -> Self {
        match error {
            watcher::Error::InitialListFailed(error)
            | watcher::Error::WatchStartFailed(error)
            | watcher::Error::WatchFailed(error) => Self::from(error),
            watcher::Error::WatchError(status) => Self::from(status),
            error @ watcher::Error::NoResourceVersion => Self::chain(&error),
        }
    }
}
