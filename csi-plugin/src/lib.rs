//! The CSI plugin: what kubelet calls on a node.
//!
//! ```text
//! kubelet ── NodePublishVolume
//!  └ volume     the request, checked; nothing in it says where anything is
//!     └ pod      the model that the pod's annotations name, if the volume names none
//!        └ daemon  Acquire: may this pod have it? fetch what is missing, pin it, say which directory
//!           └ mount  bind it at the target, read-only
//! ```
//!
//! [`endpoint`] takes the socket that kubelet knows the plugin by, [`identity`] says who answers on it,
//! [`controller`] that there is none, [`events`] tells pods how far their volumes are, [`node`] does the work
//! and [`reconcile`] sets right what crashes left. [`expose`] is a program of its own: it shows a claim's file
//! system to the node. The plugin keeps nothing on disk: the kernel knows the mounts, the daemon the pins.

pub mod controller;
pub mod daemon;
pub mod endpoint;
pub mod events;
pub mod expose;
pub mod identity;
pub mod mount;
pub mod node;
pub mod pod;
pub mod reconcile;
pub mod volume;

use std::sync::Arc;
use std::time::Duration;

use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use weightd_proto::csi::v1::controller_server::ControllerServer;
use weightd_proto::csi::v1::identity_server::IdentityServer;
use weightd_proto::csi::v1::node_server::NodeServer;

use crate::controller::NoController;
use crate::endpoint::Listening;
use crate::identity::Identity;
use crate::node::{Node, NodeService};

/// How long calls under way may go on after the plugin was told to stop: 20 s.
///
/// Source: the pod's default grace period is 30 s, after which kubelet kills the process.
pub const DRAIN: Duration = Duration::from_secs(20);

/// Serves kubelet on `listening` until `stop` is ready, then lets calls under way end, for at most [`DRAIN`].
/// The socket is removed on return.
///
/// # Errors
///
/// What the transport reports when it cannot go on.
pub async fn serve(
    listening: Listening,
    node: Arc<Node>,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let Listening {
        listener,
        socket: _socket,
    } = listening;
    let stopping = node.stop.clone();
    let server = Server::builder()
        .add_service(IdentityServer::new(Identity))
        .add_service(ControllerServer::new(NoController))
        .add_service(NodeServer::new(NodeService(node)))
        .serve_with_incoming_shutdown(
            UnixListenerStream::new(listener),
            stopping.clone().cancelled_owned(),
        );
    let overdue = async move {
        stop.await;
        tracing::info!("stopping");
        // Calls that wait for a fetch end now: kubelet asks the next plugin again.
        stopping.cancel();
        tokio::time::sleep(DRAIN).await;
    };

    tokio::select! {
        outcome = server => outcome,
        () = overdue => {
            tracing::warn!(drain_s = DRAIN.as_secs(), "calls still under way were dropped");
            Ok(())
        }
    }
}

/// Runs what the kernel may make wait, such as an unmount, where no other call has to wait for it.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    #[allow(
        clippy::disallowed_methods,
        reason = "the only door to blocking work of this crate"
    )]
    let ended = tokio::task::spawn_blocking(work).await;
    match ended {
        Ok(outcome) => outcome,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
