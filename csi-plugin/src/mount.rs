//! Bind mounts: making, finding and removing them. What the kernel says in `/proc/self/mountinfo` is what
//! counts; the plugin keeps no list of its own.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

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
    /// `major:minor` of the file system.
    pub device: String,
    /// The directory within that file system which is mounted.
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
    fn new(op: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self {
            op,
            path: path.to_owned(),
            source: source.into(),
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

/// Where a directory lies: its file system, and its path within that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    device: String,
    path: PathBuf,
}

impl Place {
    /// The place of `dir`, which must be absolute.
    #[must_use]
    pub fn of(dir: &Path, mounts: &[Mount]) -> Option<Self> {
        // A later mount hides an earlier one at the same target.
        let holder = mounts
            .iter()
            .enumerate()
            .filter(|(_, mount)| dir.starts_with(&mount.target))
            .max_by_key(|(at, mount)| (mount.target.components().count(), *at))?;
        let (_, mount) = holder;
        let below = dir.strip_prefix(&mount.target).ok()?;
        Some(Self {
            device: mount.device.clone(),
            path: mount.root.join(below),
        })
    }

    /// The path below this place that `mount` shows, if it shows one.
    #[must_use]
    pub fn shown_by<'a>(&self, mount: &'a Mount) -> Option<&'a Path> {
        let same = mount.device == self.device;
        same.then(|| mount.root.strip_prefix(&self.path).ok())?
    }
}

/// What is mounted at `target`, topmost.
#[must_use]
pub fn at<'a>(target: &Path, mounts: &'a [Mount]) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.target == target)
}

/// Mounts the directory `from` at `target`, which is created, so that nothing can be changed through it.
///
/// # Errors
///
/// [`MountError`]; then nothing is left mounted.
pub fn bind(from: &Path, target: &Path) -> Result<(), MountError> {
    // Kubelet makes the parent, not the target.
    let made = DirBuilder::new().recursive(true).mode(0o750).create(target);
    made.map_err(|error| MountError::new("create", target, error))?;
    mount(Some(from), target, none(), MsFlags::MS_BIND, none())
        .map_err(|errno| MountError::new("mount a model at", target, errno))?;
    lock_down(target).inspect_err(|_| {
        let _ = umount2(target, MntFlags::MNT_DETACH);
    })
}

/// Takes every right to change or run something away from the mount at `target`.
///
/// # Errors
///
/// [`MountError`].
pub fn lock_down(target: &Path) -> Result<(), MountError> {
    // Linux ignores these flags on the first bind, so a second call sets them.
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | FLAGS;
    mount(none(), target, none(), flags, none())
        .map_err(|errno| MountError::new("make read-only", target, errno))
}

fn none() -> Option<&'static str> {
    None
}

/// Removes whatever is mounted at `target`, and the empty directory. That there is nothing is no error.
///
/// # Errors
///
/// [`MountError`] if something is left.
pub fn remove(target: &Path) -> Result<(), MountError> {
    loop {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount, any more.
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            // A process still has a file of it open: it keeps that file, and nobody opens another.
            Err(Errno::EBUSY) => {
                let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
                umount2(target, flags)
                    .map_err(|errno| MountError::new("unmount", target, errno))?;
            }
            Err(errno) => return Err(MountError::new("unmount", target, errno)),
        }
    }
    // Not with what is in it: that would be another's.
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

    fn mounted(device: &str, root: &str, target: &str) -> Mount {
        Mount {
            device: device.to_owned(),
            root: root.into(),
            target: target.into(),
            locked_down: true,
        }
    }

    #[test]
    fn a_directory_is_found_behind_its_own_mount() {
        let mounts = [
            mounted("8:1", "/", "/"),
            mounted("9:0", "/", "/mnt"),
            // The store is itself a bind mount in the plugin's container.
            mounted("9:0", "/disk/weightd", "/mnt/store"),
            mounted("9:0", "/disk/weightd/snapshots/s/tree", "/pods/v"),
            mounted("8:1", "/disk/weightd/snapshots/s/tree", "/pods/w"),
        ];
        let place = Place::of(Path::new("/mnt/store"), &mounts).expect("a place");

        let shown = place.shown_by(&mounts[3]);

        assert_eq!(shown, Some(Path::new("snapshots/s/tree")));
        assert_eq!(place.shown_by(&mounts[4]), None, "another file system");
        assert_eq!(at(Path::new("/pods/v"), &mounts), Some(&mounts[3]));
        assert_eq!(at(Path::new("/pods"), &mounts), None);
    }

    #[test]
    fn the_mounts_of_this_process_are_listed() {
        let mounts = mounts().expect("mounts");
        assert!(Place::of(Path::new("/proc"), &mounts).is_some());
    }
}
