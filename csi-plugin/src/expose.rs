//! Showing a directory at another place of the node: the shared tier's volume claim, which this process has, so that
//! the daemon need not have it. Kubelet starts no pod whose claim cannot be mounted; the daemon serves nodes
//! nevertheless, and sees the file system come and go.
//!
//! What shows it is a mount of the node, so it outlives a process that is killed. The next one finds it in mountinfo: if
//! it is of the same file system it is left alone, else replaced.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::statfs;

use crate::blocking;
use crate::mount::{Mount, MountError, at, mounts};

/// How often it is looked whether the directory is still shown and its file system answers: every 5 s.
const LOOK: Duration = Duration::from_secs(5);

/// How long a look may take until the file system counts as away: 3 s. It is waited for in the background.
const PATIENCE: Duration = Duration::from_secs(3);

/// Shows `from` at `to`, which is created, until `stop` is ready; then it is taken away.
///
/// # Errors
///
/// [`MountError`] if it cannot be shown as it starts. Later all is tried again.
pub async fn run(
    from: PathBuf,
    to: PathBuf,
    stop: impl Future<Output = ()>,
) -> Result<(), MountError> {
    let exposure = Arc::new(Exposure { from, to });
    let mut stop = pin!(stop);
    let outcome = tokio::select! {
        error = keep(&exposure) => Err(error),
        () = &mut stop => Ok(()),
    };
    tracing::info!(to = %exposure.to.display(), "stopping");
    let hidden = blocking(move || exposure.hide());
    if tokio::time::timeout(PATIENCE, hidden).await.is_err() {
        tracing::warn!("the mount could not be taken away in time");
    }
    outcome
}

/// Looks from time to time. Returns only what goes wrong at the first look.
async fn keep(exposure: &Arc<Exposure>) -> MountError {
    let mut health = Health::default();
    let mut first = true;
    loop {
        let looked = Arc::clone(exposure);
        let mut look = pin!(blocking(move || looked.look()));
        let found = match tokio::time::timeout(PATIENCE, &mut look).await {
            Ok(found) => found,
            Err(_) => {
                health.is(Some("its file system does not answer".to_owned()), exposure);
                // One question at a time: a file system that is away gets no second thread.
                look.await
            }
        };
        match found {
            Err(error) if first => return error,
            found => health.is(found.err().map(|error| chain(&error)), exposure),
        }
        first = false;
        tokio::time::sleep(LOOK).await;
    }
}

fn chain(error: &MountError) -> String {
    let source = std::error::Error::source(error);
    let source = source.map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

/// What was told last.
#[derive(Default)]
struct Health {
    wrong: Option<Option<String>>,
}

impl Health {
    /// Tells what is wrong, if that is news.
    fn is(&mut self, wrong: Option<String>, exposure: &Exposure) {
        if self.wrong.as_ref() == Some(&wrong) {
            return;
        }
        let (from, to) = (exposure.from.display(), exposure.to.display());
        match &wrong {
            Some(error) => {
                tracing::warn!(%from, %to, error, "nodes go on without it until it is back");
            }
            None => tracing::info!(%from, %to, "exposed, and its file system answers"),
        }
        self.wrong = Some(wrong);
    }
}

struct Exposure {
    from: PathBuf,
    to: PathBuf,
}

impl Exposure {
    /// Shows the directory, if it is not shown already, and asks its file system.
    fn look(&self) -> Result<(), MountError> {
        let mounts = mounts()?;
        let shown = at(&self.to, &mounts).map(|mount| (mount.device.clone(), mount.root.clone()));
        if shown.is_none() || shown != origin(&self.from, &mounts) {
            self.show()?;
        }
        statfs(&self.to)
            .map(drop)
            .map_err(|errno| MountError::new("ask the file system at", &self.to, errno))
    }

    fn show(&self) -> Result<(), MountError> {
        let made = DirBuilder::new().mode(0o555).create(&self.to);
        match made {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(MountError::new("create", &self.to, error));
            }
            // Nobody without special rights fills the node's own disk here while nothing is mounted.
            _ => {}
        }
        // What an earlier process showed, and whoever has it open keeps.
        self.hide();
        let none = None::<&str>;
        mount(Some(&self.from), &self.to, none, MsFlags::MS_BIND, none)
            .map_err(|errno| MountError::new("mount", &self.from, errno))
    }

    fn hide(&self) {
        while umount2(&self.to, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    }
}

/// The device and the directory on it that `path` stands for. Asks no file system: it may be away.
fn origin(path: &Path, mounts: &[Mount]) -> Option<(String, PathBuf)> {
    let around = mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.target));
    // Of those at the same place the last lies on top.
    let mount = around.max_by_key(|mount| mount.target.components().count())?;
    let below = path.strip_prefix(&mount.target).ok()?;
    let root = match below.as_os_str().is_empty() {
        true => mount.root.clone(),
        false => mount.root.join(below),
    };
    Some((mount.device.clone(), root))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(device: &str, root: &str, target: &str) -> Mount {
        Mount {
            device: device.to_owned(),
            root: root.into(),
            target: target.into(),
            locked_down: false,
        }
    }

    #[test]
    fn a_path_stands_for_a_directory_of_the_innermost_topmost_mount() {
        let mounts = [
            mount("8:1", "/", "/"),
            mount("0:50", "/claims/a", "/shared"),
            mount("0:51", "/claims/b", "/shared"),
            mount("8:2", "/", "/shared-not"),
        ];
        let stands = |path: &str| origin(Path::new(path), &mounts);
        let expected = |device: &str, root: &str| Some((device.to_owned(), PathBuf::from(root)));

        assert_eq!(stands("/shared"), expected("0:51", "/claims/b"));
        assert_eq!(stands("/shared/x"), expected("0:51", "/claims/b/x"));
        assert_eq!(stands("/var/x"), expected("8:1", "/var/x"));
    }
}
