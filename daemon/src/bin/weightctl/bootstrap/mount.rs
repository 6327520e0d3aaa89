//! Waiting for a file system. A directory where one belongs is not enough: it lies on the root disk, which a
//! model would fill.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::Instant;

use crate::output::{self, seconds};

/// What the kernel says of this process's mounts.
///
/// Source: proc_pid_mountinfo(5).
const MOUNTS: &str = "/proc/self/mountinfo";

/// How often is looked.
const LOOK: Duration = Duration::from_millis(500);

/// Waits until a file system is mounted at `dir`.
pub(super) async fn wait_for(dir: &Path, timeout: Duration) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        let mounted = is_mounted(dir).with_context(|| format!("cannot read {MOUNTS}"))?;
        if mounted {
            if told {
                let waited = seconds(begun.elapsed().as_secs_f64());
                output::note(&format!("{} is mounted, after {waited}", dir.display()));
            }
            return Ok(());
        }
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
}

fn is_mounted(dir: &Path) -> io::Result<bool> {
    let Ok(dir) = fs::canonicalize(dir) else {
        return Ok(false);
    };
    Ok(names(&fs::read(MOUNTS)?, &dir))
}

/// Whether a line of `mountinfo` is of a mount at `dir`.
fn names(mountinfo: &[u8], dir: &Path) -> bool {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let mut points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    points.any(|point| unescaped(point) == dir)
}

/// The kernel writes a space, tab, line feed and backslash as three octal digits.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match (first, digits) {
            (b'\\', Some(byte)) => {
                path.push(byte);
                rest = &after[3..];
            }
            _ => {
                path.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &[u8] = b"22 1 8:1 / / rw shared:1 - xfs /dev/sda1 rw\n\
        90 22 9:127 / /mnt/k8s-disks/0 rw,noatime shared:2 - xfs /dev/md127 rw\n\
        91 22 9:127 /kubelet /var/lib/kubelet rw shared:2 - xfs /dev/md127 rw\n\
        92 22 0:9 / /mnt/with\\040space rw - tmpfs tmpfs rw\n";

    #[test]
    fn a_mount_point_is_told_from_a_directory() {
        for (dir, mounted) in [
            ("/", true),
            ("/mnt/k8s-disks/0", true),
            ("/mnt/with space", true),
            ("/mnt/k8s-disks", false),
            ("/mnt/k8s-disks/0/weightd", false),
            ("/mnt/k8s-disks/1", false),
        ] {
            assert_eq!(names(MOUNTINFO, Path::new(dir)), mounted, "{dir}");
        }
        assert!(is_mounted(Path::new("/proc")).unwrap());
        assert!(!is_mounted(tempfile::tempdir().unwrap().path()).unwrap());
        assert!(!is_mounted(Path::new("/nowhere")).unwrap());
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
