//! The CSI plugin: what kubelet calls on a node.
//!
//! [`endpoint`] takes the socket that kubelet knows the plugin by, [`identity`] says who answers on it, and
//! [`serve`] runs the services until it is told to stop. Models are reached only through the daemon's own socket.

pub mod endpoint;
pub mod identity;
pub mod pod;

use std::time::Duration;

use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use weightd_proto::csi::v1::identity_server::IdentityServer;

use crate::endpoint::Listening;
use crate::identity::Identity;

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
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let Listening {
        listener,
        socket: _socket,
    } = listening;
    let (stopping, mut stopped) = watch::channel(false);
    let server = Server::builder()
        .add_service(IdentityServer::new(Identity))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            // An error means that the sender is gone: nobody can say "stop" any more, so stop now.
            let _ = stopped.wait_for(|stop| *stop).await;
        });
    let overdue = async move {
        stop.await;
        tracing::info!("stopping");
        stopping.send_replace(true);
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
