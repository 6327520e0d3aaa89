//! The control API's unix socket: one owner, mode 0600, and only peers that may use it.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use futures::{Stream, StreamExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;

use super::ServeError;

/// Serves `path`. A socket that a dead process left is replaced; a live one is not.
pub(super) fn listen(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |op| {
        move |source| ServeError::Listen {
            op,
            on: path.display().to_string(),
            source,
        }
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed("create the folder of"))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let source = io::Error::new(io::ErrorKind::AlreadyExists, "it is no socket");
            return Err(failed("serve")(source));
        }
        // Only a socket that refuses is dead; one whose queue is full is busy.
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            _ => {
                return Err(ServeError::Taken {
                    path: path.to_owned(),
                });
            }
        },
        Err(_) => {}
    }
    // Bound under another name, so that nobody can connect before the mode is set.
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary).map_err(failed("serve"))?;
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&temporary, mode).map_err(failed("protect"))?;
    std::fs::rename(&temporary, path).map_err(failed("serve"))?;
    Ok(listener)
}

/// The connections of peers that may use the API: root, our own user, and `uids`.
pub(super) fn incoming(
    listener: UnixListener,
    uids: Vec<u32>,
) -> impl Stream<Item = io::Result<UnixStream>> {
    let own = nix::unistd::geteuid().as_raw();
    UnixListenerStream::new(listener).filter(move |stream| {
        let allowed = match stream.as_ref().map(UnixStream::peer_cred) {
            Ok(Ok(peer)) => {
                let allowed = peer.uid() == 0 || peer.uid() == own || uids.contains(&peer.uid());
                if !allowed {
                    tracing::warn!(uid = peer.uid(), "a peer was refused");
                }
                allowed
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "a peer without credentials was refused");
                false
            }
            // An error of the listener ends the service, and is told there.
            Err(_) => true,
        };
        std::future::ready(allowed)
    })
}

/// Removes the socket when the daemon ends.
pub(super) fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(%error, "socket not removed");
    }
}
