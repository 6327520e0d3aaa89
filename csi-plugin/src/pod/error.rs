//! Why the API server gave no pod.

use weightd_kube::Cause;

use super::PodName;

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
