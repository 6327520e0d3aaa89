//! The daemon on its socket.

use std::io;
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;
use weightd_proto::weightd::v1::{VersionRequest, VersionResponse};

use super::{Finding, Level, PATIENCE, node};
use crate::backend::{Backend, NO_ANSWER, Unreachable};

const OURS: &str = env!("CARGO_PKG_VERSION");

/// What was found of a daemon.
pub(super) struct Daemon {
    pub(super) finding: Finding,
    /// Where its store is, if it said so.
    pub(super) root: Option<PathBuf>,
}

/// Asks the daemon at `socket` for its version. That it cannot be used is an error if it is `wanted`.
pub(super) async fn check(socket: &Path, wanted: bool) -> Daemon {
    // Only the operating system's own error tells why a socket cannot be used.
    let connected = tokio::time::timeout(PATIENCE, UnixStream::connect(socket)).await;
    let finding = match connected {
        Ok(Err(error)) => no_daemon(socket, &error, wanted),
        Ok(Ok(_)) => match ask(socket).await {
            Ok(version) => {
                let root = Some(version.root).filter(|root| !root.is_empty());
                return Daemon {
                    finding: compare(socket, &version.version),
                    root: root.map(PathBuf::from),
                };
            }
            Err(refused) if refused => shut_out(socket, wanted),
            Err(_) => silent(socket, wanted),
        },
        Err(_) => silent(socket, wanted),
    };
    Daemon {
        finding,
        root: None,
    }
}

/// Its version; else whether it refused, and did not just keep silent.
async fn ask(socket: &Path) -> Result<VersionResponse, bool> {
    let mut daemon = Backend::daemon(socket).await.map_err(|error| {
        let unreachable = error.downcast_ref::<Unreachable>();
        unreachable.is_none_or(|unreachable| unreachable.1 != NO_ANSWER)
    })?;
    let asked = tokio::time::timeout(PATIENCE, daemon.client.version(VersionRequest {})).await;
    let answered = asked.map_err(|_| false)?;
    Ok(answered.map_err(|_| true)?.into_inner())
}

/// How bad it is that the daemon cannot be used.
fn level(wanted: bool) -> Level {
    if wanted { Level::Error } else { Level::Warn }
}

fn shut_out(socket: &Path, wanted: bool) -> Finding {
    let at = socket.display();
    let found = format!("whoever serves {at} does not let this user in, or is no weightd");
    Finding::new("daemon", level(wanted), found).hint(
        "only root, the daemon's own user and those in `socket_uids` may use it: run this as root, or add the user \
         there",
    )
}

fn compare(socket: &Path, version: &str) -> Finding {
    let at = socket.display();
    if version == OURS {
        return Finding::ok("daemon", format!("weightd {version} answers at {at}"));
    }
    Finding::warn(
        "daemon",
        format!("weightd {version} answers at {at}, but this is weightctl {OURS}"),
        "use the weightctl of the daemon's own image or package",
    )
}

fn silent(socket: &Path, wanted: bool) -> Finding {
    let (at, seconds) = (socket.display(), PATIENCE.as_secs());
    let found = format!("whoever serves {at} did not answer for {seconds} s");
    let hint = "see what it does: its log, `ps`, and whether its disk hangs; then restart it";
    Finding::new("daemon", level(wanted), found).hint(hint)
}

fn no_daemon(socket: &Path, error: &io::Error, wanted: bool) -> Finding {
    let at = socket.display();
    let (level, found, hint) = match error.kind() {
        io::ErrorKind::PermissionDenied => (
            level(wanted),
            format!("this user may not use the socket {at}"),
            "run this as root, or add the user to `socket_uids` in the daemon's settings: the socket is then open \
             to it; the directories above it have to let the user through too",
        ),
        io::ErrorKind::ConnectionRefused => (
            level(wanted),
            format!("nobody serves the socket {at}: the daemon has ended"),
            "start weightd again; its log says why it ended",
        ),
        io::ErrorKind::NotFound if wanted => (
            Level::Error,
            format!("there is no socket {at}"),
            "start weightd, or name its socket with --socket PATH",
        ),
        io::ErrorKind::NotFound if Path::new(node::KUBELET).exists() => (
            Level::Warn,
            format!("there is no socket {at}, though this is a Kubernetes node"),
            "see that the DaemonSet of weightd runs here, or name its socket with --socket PATH",
        ),
        io::ErrorKind::NotFound => {
            let found = format!("none at {at}; weightctl works without");
            return Finding::ok("daemon", found);
        }
        _ => (
            level(wanted),
            format!("cannot use the socket {at}: {error}"),
            "name the daemon's socket with --socket PATH",
        ),
    };
    Finding::new("daemon", level, found).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_of_another_version_is_worth_a_warning() {
        let socket = Path::new("/run/x.sock");
        assert_eq!(compare(socket, OURS).level, Level::Ok);
        let other = compare(socket, "9.9.9");
        assert_eq!(other.level, Level::Warn);
        assert!(
            other.found.contains("9.9.9") && other.found.contains(OURS),
            "{other:?}"
        );
    }

    #[test]
    fn a_refusal_is_explained() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let found = no_daemon(Path::new("/run/x.sock"), &denied, true);
        assert_eq!(found.level, Level::Error);
        assert!(found.hint.unwrap().contains("socket_uids"));
        // Who has a store of their own does without.
        assert_eq!(
            no_daemon(Path::new("/run/x.sock"), &denied, false).level,
            Level::Warn
        );
    }
}
