//! The control API's unix socket: one owner, and only peers that may use it.
//!
//! 1. A lock on `<socket>.lock` is held until the socket is removed, so that two daemons that start at once
//!    cannot both take it for abandoned, and one that ends does not remove its successor's. The lock file
//!    stays: removing it would let two processes hold "the" lock.
//! 2. A socket that is already there is replaced only if it refuses connections.
//! 3. The new socket gets its mode under another name and is then renamed, so the name never stands for
//!    nothing, nor is it ever open to others.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::Stream;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

use super::ServeError;

/// How long a start waits for a daemon that answers no more to end. It is longer than such a daemon takes
/// by default, `shutdown.deadline`, and no longer than a supervisor is patient.
const PREDECESSOR: Duration = Duration::from_secs(30);

/// How often it looks.
const LOOK: Duration = Duration::from_millis(100);

/// The socket's name in the file system, removed on drop, and the lock that makes it ours.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    _lock: File,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket left behind");
        }
    }
}

/// Serves `path`, for the own user and root, and for `uids` too. A socket that a dead process left is
/// replaced; a live one is not.
pub(super) async fn listen(
    path: &Path,
    uids: &[u32],
) -> Result<(UnixListener, Socket), ServeError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).at("create the folder of", path)?;
    }
    let lock = lock(path).await?;
    refuse_if_taken(path).await?;

    let fresh = beside(path, ".new");
    remove(&fresh).at("remove", &fresh)?;
    let listener = UnixListener::bind(&fresh).at("serve", &fresh)?;
    let mut socket = Socket {
        path: fresh,
        _lock: lock,
    };
    // Who may not write to a socket cannot connect to it: others are let in here, and their user is
    // looked at by `incoming`.
    let mode = if uids.is_empty() { 0o600 } else { 0o666 };
    fs::set_permissions(&socket.path, Permissions::from_mode(mode)).at("protect", path)?;
    fs::rename(&socket.path, path).at("serve", path)?;
    socket.path = path.to_owned();
    Ok((listener, socket))
}

/// Takes the lock that goes with the socket at `path`. A daemon that holds it and answers no more is ending:
/// that is waited for.
async fn lock(path: &Path) -> Result<File, ServeError> {
    let name = beside(path, ".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&name)
        .at("open", &name)?;
    let end = Instant::now() + PREDECESSOR;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => return Err(source).at("lock", &name),
            Err(TryLockError::WouldBlock) => {}
        }
        refuse_if_taken(path).await?;
        if Instant::now() >= end {
            return Err(taken(path));
        }
        if !told {
            tracing::info!(socket = %path.display(), "waiting for the earlier daemon to end");
            told = true;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Looks whether somebody answers at `path`. Only a socket that refuses connections may be replaced.
async fn refuse_if_taken(path: &Path) -> Result<(), ServeError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).at("look at", path),
        Ok(found) if !found.file_type().is_socket() => {
            let source = io::Error::new(ErrorKind::AlreadyExists, "it is no socket");
            return Err(source).at("serve", path);
        }
        Ok(_) => {}
    }
    // This connect does not block: a socket whose queue is full says so, and is busy, not dead.
    match UnixStream::connect(path).await {
        Ok(_) => Err(taken(path)),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock => Err(taken(path)),
            ErrorKind::ConnectionRefused | ErrorKind::NotFound => Ok(()),
            _ => Err(error).at("connect to", path),
        },
    }
}

/// The connections of peers that may use the API: root, our own user, and `uids`.
pub(super) fn incoming(
    listener: UnixListener,
    uids: Vec<u32>,
) -> impl Stream<Item = io::Result<UnixStream>> {
    futures::stream::unfold((listener, uids), async |(listener, uids)| {
        loop {
            match listener.accept().await {
                Ok((stream, _)) if allowed(&stream, &uids) => {
                    return Some((Ok(stream), (listener, uids)));
                }
                Ok(_) => {}
                Err(error) => after_error(&error).await,
            }
        }
    })
}

/// Tells why nobody was accepted, most likely for want of file descriptors, and waits a little: the error
/// stays as long as its cause, and the service would ask again at once.
pub(crate) async fn after_error(error: &io::Error) {
    tracing::error!(%error, "connection not accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn allowed(stream: &UnixStream, uids: &[u32]) -> bool {
    match stream.peer_cred() {
        Ok(peer) => {
            let own = nix::unistd::geteuid().as_raw();
            let allowed = peer.uid() == 0 || peer.uid() == own || uids.contains(&peer.uid());
            if !allowed {
                tracing::warn!(uid = peer.uid(), "a peer was refused");
            }
            allowed
        }
        Err(error) => {
            tracing::warn!(%error, "a peer without credentials was refused");
            false
        }
    }
}

fn taken(path: &Path) -> ServeError {
    ServeError::Taken {
        path: path.to_owned(),
    }
}

/// `path` with `suffix` behind its name, in the same directory.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Removes a file that need not be there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Says what was being done, and to which file.
trait At<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, ServeError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, ServeError> {
        self.map_err(|source| ServeError::Listen {
            op,
            on: path.display().to_string(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener as StdListener;

    use super::*;

    fn socket(dir: &tempfile::TempDir) -> PathBuf {
        dir.path().join("weightd.sock")
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn the_mode_lets_in_whom_the_settings_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket(&dir);

        let alone = listen(&path, &[]).await.unwrap();
        assert_eq!(mode(&path), 0o600);
        drop(alone);
        assert!(!path.exists(), "the socket outlived its owner");
        let _others = listen(&path, &[1000]).await.unwrap();

        assert_eq!(mode(&path), 0o666);
    }

    #[tokio::test]
    async fn what_dead_processes_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket(&dir);
        drop(StdListener::bind(&path).unwrap());
        drop(StdListener::bind(beside(&path, ".new")).unwrap());

        let _listening = listen(&path, &[]).await.unwrap();

        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_on_which_somebody_answers_is_taken_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket(&dir);
        let _first = listen(&path, &[]).await.unwrap();
        let begun = Instant::now();

        let error = listen(&path, &[]).await.unwrap_err();

        assert!(matches!(error, ServeError::Taken { .. }), "{error}");
        assert!(begun.elapsed() < LOOK, "it waited");
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_waits_for_a_daemon_that_ends_and_keeps_its_own_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket(&dir);
        let (listener, ending) = listen(&path, &[]).await.unwrap();
        drop(listener);
        let second = tokio::spawn({
            let path = path.clone();
            async move { listen(&path, &[]).await }
        });
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(!second.is_finished(), "it did not wait");

        drop(ending);
        let _second = second.await.unwrap().unwrap();

        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_does_not_end_keeps_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket(&dir);
        let (listener, _ending) = listen(&path, &[]).await.unwrap();
        drop(listener);

        let error = listen(&path, &[]).await.unwrap_err();

        assert!(matches!(error, ServeError::Taken { .. }), "{error}");
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket(&dir);
        fs::write(&path, "precious").unwrap();

        let error = listen(&path, &[]).await.unwrap_err();

        assert!(matches!(error, ServeError::Listen { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
