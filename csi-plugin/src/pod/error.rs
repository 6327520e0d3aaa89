//! Why the API server could not be asked, in words that hold no secret.

use std::error::Error;
use std::path::PathBuf;

use http::StatusCode;
use kube::client::AuthError;
use kube::config::{InClusterError, KubeconfigError};
use kube::core::Status;
use kube::runtime::watcher;

use super::PodName;

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

/// Why the API server gave no pod.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// It is slow or away, or cannot answer now: a retry may mend it.
    #[error("cannot {verb} {object}")]
    Unavailable {
        /// The verb that RBAC has for the call.
        verb: &'static str,
        /// What was asked for.
        object: String,
        /// What came instead of an answer.
        #[source]
        source: Cause,
    },
    /// It does not let us: only who runs the cluster can mend that.
    #[error("the API server does not let the plugin {verb} {object}")]
    Denied {
        /// The verb that RBAC has for the call.
        verb: &'static str,
        /// What was asked for.
        object: String,
        /// HTTP's: 401 if it does not know us, 403 if we lack the right.
        code: u16,
        /// What it said.
        #[source]
        source: Cause,
    },
    /// There is no such pod any more, though another may have its name.
    #[error("pod `{pod}` with uid {} is gone", pod.uid)]
    Gone {
        /// The one that was asked for.
        pod: PodName,
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
                "give --kubeconfig a file that `kubectl --kubeconfig` works with on this node, or \
                 leave it out in a pod"
                    .to_owned()
            }
            Self::ServiceAccount { .. } => {
                "set automountServiceAccountToken: true in the plugin's pod, or give --kubeconfig"
                    .to_owned()
            }
        })
    }
}

impl PodError {
    pub(super) fn new(verb: &'static str, object: String, error: kube::Error) -> Self {
        let code = match &error {
            kube::Error::Api(status) => status.code,
            _ => 0,
        };
        let source = Cause::from(error);
        match code {
            401 | 403 => Self::Denied {
                verb,
                object,
                code,
                source,
            },
            _ => Self::Unavailable {
                verb,
                object,
                source,
            },
        }
    }

    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unavailable { .. } => Some(
                "it is tried again; if that does not help, see whether this node reaches the API \
                 server"
                    .to_owned(),
            ),
            Self::Denied { code: 401, .. } => Some(
                "the API server does not know the plugin: renew its service account token, or the \
                 user in its kubeconfig"
                    .to_owned(),
            ),
            Self::Denied { verb, .. } => Some(format!(
                "RBAC lacks `{verb}` on pods: bind the plugin's service account to a ClusterRole \
                 that allows get, list and watch on them"
            )),
            Self::Gone { .. } => None,
        }
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
