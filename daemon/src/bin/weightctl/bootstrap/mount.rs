//! Waiting for a file system. A directory where one belongs is not enough: it lies on the root disk, which a
//! model would fill.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use tokio::time::Instant;

use crate::output::{self, seconds};

/// How often is looked.
const LOOK: Duration = Duration::from_millis(500);

/// Waits until a file system is mounted at `dir`.
pub(super) async fn wait_for(dir: &Path, timeout: Duration) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut told = false;
    while !is_mounted(dir) {
        if begun.elapsed() >= timeout {
            let what = if dir.exists() {
                "a directory, but no file system is mounted there"
            } else {
                "not there"
            };
            bail!(
                "{} is {what}, after {}: nothing is fetched, so as not to fill another disk\n\
                 hint: has this instance type local disks, and has its node class `instanceStorePolicy: RAID0`?",
                dir.display(),
                seconds(timeout.as_secs_f64())
            );
        }
        if !told {
            output::note(&format!(
                "waiting for a file system at {}, at most {}",
                dir.display(),
                seconds(timeout.as_secs_f64())
            ));
            told = true;
        }
        let left = timeout.saturating_sub(begun.elapsed());
        tokio::time::sleep(LOOK.min(left)).await;
    }
    if told {
        let waited = seconds(begun.elapsed().as_secs_f64());
        output::note(&format!("{} is mounted, after {waited}", dir.display()));
    }
    Ok(())
}

/// Whether another file system begins at `dir`. The list of mounts does not tell: in a unit with `ProtectSystem`
/// and `ReadWritePaths` a plain directory is mounted onto itself.
fn is_mounted(dir: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
    match (device(dir), device(&dir.join(".."))) {
        (Ok(inside), Ok(outside)) => inside != outside || dir == Path::new("/"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_told_from_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        for (path, mounted) in [
            (Path::new("/"), true),
            (Path::new("/proc"), true),
            (Path::new("/proc/self"), false),
            (Path::new("/nowhere"), false),
            (dir.path(), false),
        ] {
            assert_eq!(is_mounted(path), mounted, "{}", path.display());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_directory_that_stays_one_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let error = wait_for(dir.path(), Duration::from_secs(600)).await;
        let text = format!("{:#}", error.unwrap_err());
        assert!(text.contains("no file system is mounted"), "{text}");
        assert!(text.contains("10 min 00 s"), "{text}");
    }
}
