//! Bind mounts: making, finding and removing them. What the kernel says in `/proc/self/mountinfo` is what
//! counts; the plugin keeps no list of its own.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Flags of every volume: nothing in it can be changed, run, or act as a device.
const FLAGS: MsFlags = MsFlags::MS_RDONLY
    .union(MsFlags::MS_NOSUID)
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// A mount as the kernel lists it.
///
/// Source: proc_pid_mountinfo(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The file system's device, as `major:minor`.
    pub device: String,
    /// The directory within its file system which is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Whether it has all the flags of a volume.
    pub locked_down: bool,
}

/// What cannot be done with a mount.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} `{}`", path.display())]
pub struct MountError {
    op: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl MountError {
    pub(crate) fn new(op: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self {
            op,
            path: path.to_owned(),
            source: source.into(),
        }
    }

    /// What the operator can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match (self.op, self.source.kind()) {
            ("mount the model's directory", io::ErrorKind::NotFound) => Some(
                "weightd-csi must see the daemon's store at the same path as the daemon: mount it into its container",
            ),
            (_, io::ErrorKind::PermissionDenied) => {
                Some("weightd-csi must be allowed to mount: its container is privileged")
            }
            _ => None,
        }
    }
}

/// All mounts that this process sees, in the order in which they lie over each other.
///
/// # Errors
///
/// [`MountError`] if the kernel does not list them.
pub fn mounts() -> Result<Vec<Mount>, MountError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(|error| MountError::new("read", path, error))?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ').skip(2);
    let device = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let options: Vec<&[u8]> = fields.next()?.split(|byte| *byte == b',').collect();
    let wanted: [&[u8]; 4] = [b"ro", b"nosuid", b"nodev", b"noexec"];
    Some(Mount {
        device,
        root,
        target,
        locked_down: wanted.iter().all(|flag| options.contains(flag)),
    })
}

/// The kernel writes white space and backslashes as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\').then(|| after.get(..3)).flatten();
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

/// What a volume shows of a daemon's store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// A snapshot's own tree, by the snapshot's name.
    Snapshot(String),
    /// A directory of the volume's own.
    Own,
    /// A directory that was deleted under the mount.
    Deleted,
}

impl Mount {
    /// What this mount shows as the volume of `holder`; `None` if it is no volume of this driver. The daemon
    /// need not run for that, nor its store lie where it lay.
    #[must_use]
    pub fn shown_to(&self, holder: &str) -> Option<Shown> {
        let root = self.root.to_str()?;
        // The kernel's mark.
        let (root, deleted) = match root.strip_suffix("//deleted") {
            Some(root) => (root, true),
            None => (root, false),
        };
        let below = root.strip_suffix("/tree")?;
        // The daemon moves a directory there before it deletes it.
        let (dir, name) = below.rsplit_once('/')?;
        if dir.ends_with("/staging") && name.ends_with(".gone") {
            return Some(Shown::Deleted);
        }
        let shown = if below.ends_with(&format!("/volumes/{holder}")) {
            Shown::Own
        } else {
            (dir.ends_with("/snapshots") && is_snapshot(name))
                .then(|| Shown::Snapshot(name.to_owned()))?
        };
        Some(if deleted { Shown::Deleted } else { shown })
    }
}

/// Whether a name is one that the daemon gives to snapshots: `hf-org-model-<24 hex digits>`.
fn is_snapshot(name: &str) -> bool {
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let scheme = ["hf-", "s3-", "file-"];
    let digest = name.rsplit_once('-').map(|(_, digest)| digest);
    scheme.iter().any(|scheme| name.starts_with(scheme))
        && digest.is_some_and(|digest| digest.len() == 24 && hex(digest))
}

/// What is mounted at `target`, topmost.
#[must_use]
pub fn at<'a>(target: &Path, mounts: &'a [Mount]) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.target == target)
}

/// A directory of the plugin's own, seen by nobody else, where mounts are locked down before they appear at
/// their targets.
///
/// Linux makes a bind mount read-only in two steps. What appears in kubelet's directory appears on the node as
/// well, at once and with the flags that it has then; of the second step the node never learns.
#[derive(Debug)]
pub struct Workshop {
    dir: PathBuf,
    /// Whether it is mounted.
    open: Mutex<bool>,
    next: AtomicU64,
}

impl Workshop {
    /// One at `dir`, which is made when the first volume is.
    #[must_use]
    pub fn at(dir: PathBuf) -> Self {
        Self {
            dir,
            open: Mutex::new(false),
            next: AtomicU64::new(0),
        }
    }

    /// Mounts the directory `from` at `target`, which is created, so that nothing can be changed through it, by
    /// whatever name. The parent of `target` must be there.
    ///
    /// # Errors
    ///
    /// [`MountError`]; then nothing is left mounted.
    pub fn bind(&self, from: &Path, target: &Path) -> Result<(), MountError> {
        self.at_bench(|bench| {
            lock_at(bench, from)?;
            create(target)?;
            mount(Some(bench), target, none(), MsFlags::MS_BIND, none()).map_err(|errno| {
                let _ = fs::remove_dir(target);
                MountError::new("mount a model at", target, errno)
            })
        })
    }

    /// Puts a mount that is locked down in the place of the topmost one at `target`, which shows the same.
    ///
    /// # Errors
    ///
    /// [`MountError`].
    pub fn bind_again(&self, target: &Path) -> Result<(), MountError> {
        self.at_bench(|bench| {
            lock_at(bench, target)?;
            umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                .map_err(|errno| MountError::new("unmount", target, errno))?;
            mount(Some(bench), target, none(), MsFlags::MS_BIND, none())
                .map_err(|errno| MountError::new("mount a model at", target, errno))
        })
    }

    fn at_bench(
        &self,
        work: impl FnOnce(&Path) -> Result<(), MountError>,
    ) -> Result<(), MountError> {
        let bench = self.bench()?;
        let made = work(&bench);
        let _ = umount2(&bench, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&bench);
        made
    }

    /// A directory of its own for one mount.
    fn bench(&self) -> Result<PathBuf, MountError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let bench = self.dir.join(number.to_string());
        if *open && create(&bench).is_ok() {
            return Ok(bench);
        }
        // Not open yet, or somebody on the node has removed the directory that looks empty there.
        *open = false;
        self.open()?;
        *open = true;
        create(&bench)?;
        Ok(bench)
    }

    fn open(&self) -> Result<(), MountError> {
        let dir = &self.dir;
        create(dir)?;
        // What a killed plugin left, where it lived in the node's own namespace.
        while umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let options = Some("size=64k,mode=0700");
        mount(Some("weightd-csi"), dir, Some("tmpfs"), flags, options)
            .map_err(|errno| MountError::new("mount a directory of its own at", dir, errno))?;
        mount(none(), dir, none(), MsFlags::MS_PRIVATE, none())
            .map_err(|errno| MountError::new("hide", dir, errno))
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        // The directory stays: the next plugin may have mounted there already, and removing the name that another
        // mount namespace has something on takes that away.
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

/// Mounts `from` at `bench`, locked down.
fn lock_at(bench: &Path, from: &Path) -> Result<(), MountError> {
    mount(Some(from), bench, none(), MsFlags::MS_BIND, none())
        .map_err(|errno| MountError::new("mount the model's directory", from, errno))?;
    // Linux ignores these flags on the first bind.
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | FLAGS;
    mount(none(), bench, none(), flags, none())
        .map_err(|errno| MountError::new("make read-only", from, errno))
}

/// One directory. Not its parents: where a pod's are gone, so is the pod.
fn create(dir: &Path) -> Result<(), MountError> {
    match DirBuilder::new().mode(0o750).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(|error| MountError::new("create", dir, error)),
    }
}

fn none() -> Option<&'static str> {
    None
}

/// Removes whatever is mounted at `target`. That there is nothing is no error.
///
/// # Errors
///
/// [`MountError`] if something is left.
pub fn unmount(target: &Path) -> Result<(), MountError> {
    loop {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount, any more.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            // A process still has a file of it open: it keeps that file, and nobody opens another.
            Err(Errno::EBUSY) => {
                let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
                umount2(target, flags)
                    .map_err(|errno| MountError::new("unmount", target, errno))?;
            }
            Err(errno) => return Err(MountError::new("unmount", target, errno)),
        }
    }
}

/// Removes the empty directory at `target`. What is in it would be another's, and stays.
///
/// # Errors
///
/// [`MountError`] if it is still there.
pub fn remove_dir(target: &Path) -> Result<(), MountError> {
    match fs::remove_dir(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(MountError::new("remove the directory", target, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] =
        b"36 35 98:0 /mnt\\0401/snapshots/hf-x/tree /pods/a\\134b ro,nosuid,nodev,noexec,relatime \
        master:1 - ext3 /dev/root rw";

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let mount = parse(LINE).expect("a mount");

        assert_eq!(mount.device, "98:0");
        assert_eq!(mount.root, Path::new("/mnt 1/snapshots/hf-x/tree"));
        assert_eq!(mount.target, Path::new("/pods/a\\b"));
        assert!(mount.locked_down);
        assert!(parse(b"").is_none() && parse(b"36 35 98:0").is_none());
    }

    #[test]
    fn a_mount_that_may_run_programs_is_not_locked_down() {
        let line = String::from_utf8(LINE.to_vec()).unwrap();
        for flag in ["ro,", "nosuid,", "nodev,", "noexec,"] {
            let mount = parse(line.replace(flag, "").as_bytes()).expect("a mount");
            assert!(!mount.locked_down, "without {flag}");
        }
    }

    #[test]
    fn a_volume_is_told_from_other_mounts() {
        let holder = "csi/0c1f-4a.model";
        let id = "hf-org-model-0123456789abcdef01234567";
        let shown = |root: &str| {
            let mount = Mount {
                device: "98:0".to_owned(),
                root: root.into(),
                target: "/pods/v".into(),
                locked_down: true,
            };
            mount.shown_to(holder)
        };

        let snapshot = shown(&format!("/disk/weightd/snapshots/{id}/tree"));

        assert_eq!(snapshot, Some(Shown::Snapshot(id.to_owned())));
        let own = "/volumes/csi/0c1f-4a.model/tree";
        assert_eq!(shown(own), Some(Shown::Own));
        let deleted = Some(Shown::Deleted);
        assert_eq!(shown(&format!("/disk{own}//deleted")), deleted);
        for gone in [
            "/disk/weightd/staging/1f-2.gone/tree",
            "/staging/x.gone/tree//deleted",
        ] {
            assert_eq!(shown(gone), deleted, "{gone}");
        }
        for other in [
            "/",
            "/disk/weightd",
            "/disk/weightd/snapshots/other/tree",
            &format!("/disk/weightd/snapshots/{id}"),
            &format!("/disk/weightd/{id}/tree"),
            "/volumes/csi/another.model/tree",
        ] {
            assert_eq!(shown(other), None, "{other}");
        }
    }

    #[test]
    fn the_mounts_of_this_process_are_listed() {
        let mounts = mounts().expect("mounts");
        assert!(at(Path::new("/proc"), &mounts).is_some());
    }
}
