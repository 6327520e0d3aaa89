//! What the daemon does in a Kubernetes cluster.

pub mod placement;
pub mod prefetch;

use std::path::Path;
use std::time::Duration;

use kube::Client;
use weightd_kube::{ConnectError, Timeouts};

/// How long a watch lasts before the server ends it: 290 s.
///
/// Source: the default of kube's watcher, which stays below the 300 s of most load balancers.
pub const WATCH: Duration = Duration::from_secs(290);

const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    call: Duration::from_secs(15),
    idle: Duration::from_secs(WATCH.as_secs() + 15),
};

/// Prepares for the API server that `kubeconfig` names, else for the cluster's own if this is a pod in one.
/// `None` if it is not. The server is not contacted yet.
///
/// # Errors
///
/// [`ConnectError`] if the kubeconfig or the service account cannot be used.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Option<Client>, ConnectError> {
    weightd_kube::connect(kubeconfig, TIMEOUTS).await
}
