//! The socket that kubelet knows the plugin by: one process owns it, and only its user may connect.
//!
//! 1. A lock on `<socket>.lock` is held as long as the process lives, so two plugins that start at once cannot both
//!    take the socket for abandoned. The lock file stays: removing it would let two processes hold "the" lock.
//! 2. A socket that is already there is replaced only if it refuses connections: something else than this
//!    program may listen there and take no such lock.
//! 3. The new socket gets mode 0600 under another name and is then renamed, so it is never open to others and
//!    the name never stands for nothing.

use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tokio::net::{UnixListener, UnixStream};

/// Where to listen, written `unix:///path/to/socket`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(PathBuf);

/// Why an endpoint was not understood.
#[derive(Debug, thiserror::Error)]
#[error("`{given}` is not an endpoint: write unix:///absolute/path/to/socket")]
pub struct ParseEndpointError {
    given: String,
}

/// Why the endpoint could not be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process serves it: stop that one first.
    #[error("`{}` belongs to another live process", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The name stands for something that is not a socket: choose another, or remove it by hand.
    #[error("`{}` exists and is not a socket", path.display())]
    NotASocket {
        /// What stands in the way.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {op} `{}`", path.display())]
    Io {
        /// What was being done.
        op: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A socket that listens, and the right to it.
#[derive(Debug)]
pub struct Listening {
    pub(crate) listener: UnixListener,
    pub(crate) socket: Socket,
}

/// A socket's name in the file system, removed on drop, and the lock that makes it ours.
#[derive(Debug)]
pub(crate) struct Socket {
    path: PathBuf,
    _lock: File,
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let path = given.strip_prefix("unix://").map(Path::new);
        match path {
            Some(path)
                if path.is_absolute() && path.file_name().is_some() && !given.ends_with('/') =>
            {
                Ok(Self(path.to_owned()))
            }
            _ => Err(ParseEndpointError {
                given: given.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix://{}", self.0.display())
    }
}

impl Endpoint {
    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Takes the socket and listens on it. Its directory must exist.
    ///
    /// # Errors
    ///
    /// [`BindError`] if another live process has the socket, or it cannot be made.
    pub async fn listen(&self) -> Result<Listening, BindError> {
        let path = self.path();
        let lock = lock(path)?;
        refuse_if_taken(path).await?;

        let fresh = beside(path, ".new");
        remove(&fresh).at("remove", &fresh)?;
        let listener = UnixListener::bind(&fresh).at("listen on", &fresh)?;
        let mut socket = Socket {
            path: fresh,
            _lock: lock,
        };
        fs::set_permissions(&socket.path, Permissions::from_mode(0o600))
            .at("restrict", &socket.path)?;
        fs::rename(&socket.path, path).at("rename into", path)?;
        socket.path = path.to_owned();
        Ok(Listening { listener, socket })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket left behind");
        }
    }
}

/// Takes the lock that goes with the socket at `path`.
fn lock(path: &Path) -> Result<File, BindError> {
    let name = beside(path, ".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&name)
        .at("open", &name)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BindError::InUse {
            path: path.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(source).at("lock", &name),
    }
}

/// Looks whether somebody answers at `path`. Only a socket that refuses connections may be replaced.
async fn refuse_if_taken(path: &Path) -> Result<(), BindError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).at("look at", path),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        // `WouldBlock`: its queue is full, so somebody has it open.
        Ok(_) => Err(BindError::InUse {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(BindError::InUse {
            path: path.to_owned(),
        }),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::ConnectionRefused | ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error).at("connect to", path),
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
    fn at(self, op: &'static str, path: &Path) -> Result<T, BindError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, BindError> {
        self.map_err(|source| BindError::Io {
            op,
            path: path.to_owned(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener as StdListener;

    use super::*;

    fn endpoint(directory: &tempfile::TempDir) -> Endpoint {
        Endpoint(directory.path().join("csi.sock"))
    }

    #[test]
    fn only_an_absolute_unix_path_is_an_endpoint() {
        let endpoint: Endpoint = "unix:///plugins/csi.sock".parse().expect("parse");

        assert_eq!(endpoint.path(), Path::new("/plugins/csi.sock"));
        assert_eq!(endpoint.to_string(), "unix:///plugins/csi.sock");
        for wrong in [
            "",
            "/plugins/csi.sock",
            "unix://",
            "unix:///",
            "unix:///plugins/",
            "unix:///plugins/..",
            "unix://plugins/csi.sock",
            "tcp://127.0.0.1:9000",
        ] {
            let error = wrong.parse::<Endpoint>().expect_err(wrong);
            assert!(error.to_string().contains("unix:///absolute"), "{error}");
        }
    }

    #[tokio::test]
    async fn the_socket_is_for_its_user_only_and_goes_with_its_owner() {
        let directory = tempfile::tempdir().expect("tempdir");
        let endpoint = endpoint(&directory);

        let listening = endpoint.listen().await.expect("listen");
        let mode = fs::metadata(endpoint.path())
            .expect("metadata")
            .permissions()
            .mode();
        drop(listening);

        assert_eq!(mode & 0o777, 0o600, "mode {mode:o}");
        assert!(!endpoint.path().exists(), "the socket outlived its owner");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced() {
        let directory = tempfile::tempdir().expect("tempdir");
        let endpoint = endpoint(&directory);
        // As a killed plugin leaves them: a listener that is gone, one of them before its rename.
        drop(StdListener::bind(endpoint.path()).expect("bind"));
        drop(StdListener::bind(beside(endpoint.path(), ".new")).expect("bind"));

        let _listening = endpoint.listen().await.expect("listen");

        UnixStream::connect(endpoint.path()).await.expect("connect");
    }

    #[tokio::test]
    async fn a_socket_on_which_somebody_answers_is_refused() {
        let directory = tempfile::tempdir().expect("tempdir");
        let endpoint = endpoint(&directory);
        let _other = StdListener::bind(endpoint.path()).expect("bind");

        let error = endpoint.listen().await.expect_err("took a live socket");

        assert!(matches!(error, BindError::InUse { .. }), "{error}");
        UnixStream::connect(endpoint.path())
            .await
            .expect("the other one was harmed");
    }

    #[tokio::test]
    async fn two_plugins_never_share_an_endpoint() {
        let directory = tempfile::tempdir().expect("tempdir");
        let endpoint = endpoint(&directory);
        let first = endpoint.listen().await.expect("listen");
        // Even when the socket itself is gone, as in the moment before a rename.
        fs::remove_file(endpoint.path()).expect("remove");

        let error = endpoint.listen().await.expect_err("two owners");
        drop(first);

        assert!(matches!(error, BindError::InUse { .. }), "{error}");
        endpoint
            .listen()
            .await
            .expect("the lock outlived its owner");
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let directory = tempfile::tempdir().expect("tempdir");
        let endpoint = endpoint(&directory);
        fs::write(endpoint.path(), "precious").expect("write");

        let error = endpoint.listen().await.expect_err("replaced a file");

        assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
        assert_eq!(
            fs::read_to_string(endpoint.path()).expect("read"),
            "precious"
        );
    }

    #[tokio::test]
    async fn a_missing_directory_is_named() {
        let directory = tempfile::tempdir().expect("tempdir");
        let endpoint = Endpoint(directory.path().join("absent/csi.sock"));

        let error = endpoint.listen().await.expect_err("listened nowhere");

        assert!(error.to_string().contains("absent/csi.sock"), "{error}");
    }
}
