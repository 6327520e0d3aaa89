//! The node's own store.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, eaccess};
use weightd_core::errors::Chain;
use weightd_core::shared::lustre::FileSystem;
use weightd_core::store::{Store, StoreError, StoreLimits};

use super::{Finding, Level, node};
use crate::output::bytes;

const AS_ROOT: &str = "run this as the user whose store it is, or as root";

/// With less than this free, not even small files can be fetched.
const NO_ROOM: u64 = 64 << 20;

/// How full a file system may get before kubelet acts, less 5 for what others write meanwhile.
///
/// Source: the defaults of kubelet: `imageGCHighThresholdPercent` 85, `imagefs.available` 15 %, `nodefs.available` 10 %.
const KUBELET_LEAVES: u8 = 80;

/// Whose store it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// This user's: they have to be able to write it.
    User,
    /// The daemon's: another user may not even see it.
    Daemon,
}

/// Looks at the store in `root`, whether it is there already or can be made.
pub(super) fn check(root: &Path, limits: StoreLimits, owner: Owner) -> Vec<Finding> {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let (finding, base) = match directory(&root, owner) {
        Ok(found) => found,
        Err(finding) => return vec![finding],
    };
    let writable = finding.level == Level::Ok;
    let mut findings = vec![finding, format(&root, owner), file_system(&base)];
    let (system, instance_store) = (Path::new("/"), Path::new(node::INSTANCE_STORE));
    findings.push(disk(&root, &base, system, instance_store));
    findings.extend(beside_kubelet(&base, limits, Path::new(node::KUBELET)));
    if writable && base == root {
        findings.push(hard_links(&root));
    }
    findings.extend(space(&base, limits));
    findings
}

fn format(root: &Path, owner: Owner) -> Finding {
    match Store::recognise(root) {
        Ok(true) => Finding::ok("store-format", "a format that this version knows"),
        Ok(false) => Finding::ok("store-format", "no store yet: the first fetch makes one"),
        Err(StoreError::Io { source, .. }) if unseen(&source, owner) => {
            let found = format!("cannot be seen: {source}");
            Finding::warn("store-format", found, AS_ROOT)
        }
        Err(error) => {
            let hint = error.hint().unwrap_or_else(|| AS_ROOT.to_owned());
            Finding::error("store-format", Chain(&error).to_string(), hint)
        }
    }
}

/// Whether that only means that somebody else has to look.
fn unseen(error: &io::Error, owner: Owner) -> bool {
    owner == Owner::Daemon && error.kind() == io::ErrorKind::PermissionDenied
}

/// A finding of something that this user may not do.
fn denied(found: String, error: &io::Error, owner: Owner) -> Finding {
    if unseen(error, owner) {
        return Finding::warn("store-root", found, AS_ROOT);
    }
    let hint = "choose a directory that this user may write with --root, or run this as the store's owner or root";
    Finding::error("store-root", found, hint)
}

/// Whether `root` is a directory that can be written, or made; and the directory that is there of it.
fn directory(root: &Path, owner: Owner) -> Result<(Finding, PathBuf), Finding> {
    let at = root.display();
    let mut base = root;
    let metadata = loop {
        match fs::metadata(base) {
            Ok(metadata) => break metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                base = base.parent().unwrap_or(Path::new("/"));
            }
            Err(error) => {
                return Err(denied(
                    format!("cannot look at {at}: {error}"),
                    &error,
                    owner,
                ));
            }
        }
    };
    let there = base.display();
    if !metadata.is_dir() {
        let hint = "choose a directory with --root";
        return Err(Finding::error(
            "store-root",
            format!("{there} is no directory"),
            hint,
        ));
    }
    let may = eaccess(base, AccessFlags::W_OK | AccessFlags::X_OK).map_err(io::Error::from);
    let finding = match may {
        Ok(()) if base == root => Finding::ok("store-root", format!("{at} can be written")),
        Ok(()) => {
            let found = format!("{at} is not there yet, and can be made in {there}");
            Finding::ok("store-root", found)
        }
        Err(error) if base == root => {
            denied(format!("{at} cannot be written: {error}"), &error, owner)
        }
        Err(error) => {
            let found = format!("{at} is not there, and cannot be made in {there}: {error}");
            denied(found, &error, owner)
        }
    };
    Ok((finding, base.to_owned()))
}

fn file_system(base: &Path) -> Finding {
    let kind = match FileSystem::of(base) {
        Ok(kind) => kind,
        Err(error) => {
            let found = format!("cannot be seen: {error}");
            return Finding::warn(
                "store-file-system",
                found,
                "see `stat -f` of the store's directory",
            );
        }
    };
    let found = |why: &str| format!("{kind}: {why}");
    let hint = "put the store on ext4 or XFS on local NVMe, with --root";
    match kind.name() {
        Some("tmpfs") => Finding::warn(
            "store-file-system",
            found("it takes the machine's memory"),
            hint,
        ),
        Some("overlay") => Finding::warn(
            "store-file-system",
            found("it goes with its container, and copies what it changes"),
            "mount a directory of the host (hostPath) for the store",
        ),
        Some("nfs" | "lustre" | "fuse") => Finding::warn(
            "store-file-system",
            found("it is not this node's own disk, and models load as slowly as it reads"),
            "put the store on local NVMe with --root; a file system that nodes share is for --shared-root",
        ),
        _ => Finding::ok("store-file-system", kind.to_string()),
    }
}

/// Whether the store is on a disk of its own, and on the NVMe if there is one.
fn disk(root: &Path, base: &Path, system: &Path, instance_store: &Path) -> Finding {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    let here = device(base);
    // Else nothing is mounted there, as in a container, which sees the store alone.
    let mounted = device(instance_store).filter(|nvme| Some(*nvme) != device(system));
    if let Some(nvme) = mounted {
        let at = instance_store.display();
        if here == Some(nvme) {
            return Finding::ok("store-disk", format!("on the instance store at {at}"));
        }
        let found = format!(
            "{} is not on the instance store, which is mounted at {at}",
            root.display()
        );
        let hint = format!("set `root` to {at}/weightd: local NVMe is several times as fast");
        return Finding::warn("store-disk", found, hint);
    }
    if here.is_some() && here == device(system) {
        let found = "on the root file system, which is usually not the NVMe";
        let hint = "put the store on local NVMe with --root, if this machine has some (`lsblk`)";
        return Finding::warn("store-disk", found, hint);
    }
    Finding::ok("store-disk", "not on the root file system")
}

/// Whether kubelet, if it is on the same file system, leaves the store what it may fill.
fn beside_kubelet(base: &Path, limits: StoreLimits, kubelet: &Path) -> Option<Finding> {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    let high = limits.high_percent;
    device(kubelet).filter(|theirs| Some(*theirs) == device(base))?;
    if high <= KUBELET_LEAVES {
        let found =
            format!("kubelet's is the same file system, and the store fills {high} % of it");
        return Some(Finding::ok("store-kubelet", found));
    }
    let found = format!(
        "kubelet's is the same file system, and the store fills {high} % of it: at 85 % kubelet deletes images"
    );
    let hint = "set `store.high_watermark_percent` to 80 or less (5 below kubelet's `imageGCHighThresholdPercent`, and \
                below what its eviction thresholds leave), or put the store on a disk of its own";
    Some(Finding::warn("store-kubelet", found, hint))
}

/// Makes a hard link as the store does, and removes it.
fn hard_links(root: &Path) -> Finding {
    // A name that a store which is being made right now tolerates.
    let probe = Probe(root.join(format!("FORMAT.doctor-{:016x}", fastrand::u64(..))));
    let link = Probe(probe.0.with_added_extension("link"));
    let made = File::create_new(&probe.0);
    let linked = made.and_then(|_| fs::hard_link(&probe.0, &link.0));
    match linked {
        Ok(()) => Finding::ok("store-hard-links", "they work"),
        Err(error) if !probe.0.exists() => Finding::error(
            "store-hard-links",
            format!("cannot write to {}: {error}", root.display()),
            "see that the file system is mounted read-write and not full, and that this user may write there",
        ),
        Err(error) => Finding::error(
            "store-hard-links",
            format!("the file system makes none: {error}"),
            "choose a directory on ext4, XFS or another file system with hard links",
        ),
    }
}

/// A file that goes when this does.
pub(super) struct Probe(pub(super) PathBuf);

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// How full a file system is.
pub(super) struct Space {
    pub(super) capacity: u64,
    pub(super) free: u64,
    /// How many files it can have; 0 if that has no bound.
    inodes: u64,
    inodes_free: u64,
}

impl Space {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let stat = statvfs(path)?;
        let unit = stat.fragment_size();
        let free = stat.blocks_available() * unit;
        Ok(Self {
            capacity: (stat.blocks() - stat.blocks_free()) * unit + free,
            free,
            inodes: stat.files(),
            inodes_free: stat.files_available(),
        })
    }
}

fn space(base: &Path, limits: StoreLimits) -> Vec<Finding> {
    match Space::of(base) {
        Ok(space) => vec![room(&space, limits), inodes(&space, limits)],
        Err(error) => {
            let found = format!("cannot be seen: {error}");
            vec![Finding::warn(
                "store-space",
                found,
                "see `df` of the store's directory",
            )]
        }
    }
}

fn percent(of: u64, percent: u8) -> u64 {
    (u128::from(of) * u128::from(percent) / 100) as u64
}

fn room(space: &Space, limits: StoreLimits) -> Finding {
    let used = space.capacity - space.free;
    let room = percent(space.capacity, limits.high_percent).saturating_sub(used);
    let (free, capacity) = (bytes(space.free), bytes(space.capacity));
    let high = limits.high_percent;
    let hint = "free space on that disk, choose a larger one with --root, or raise the watermarks";
    if space.free < NO_ROOM {
        let found = format!("the disk is full: {free} of {capacity} are free");
        return Finding::error("store-space", found, hint);
    }
    if room == 0 {
        let found = format!(
            "{free} of {capacity} are free, but the disk is fuller than {high} %: a fetch has to evict first"
        );
        return Finding::warn("store-space", found, hint);
    }
    let mut found = format!(
        "{free} of {capacity} are free, {} up to {high} % full",
        bytes(room)
    );
    if let Some(max) = limits.max_bytes {
        found.push_str(&format!("; the store may hold {}", bytes(max)));
    }
    Finding::ok("store-space", found)
}

fn inodes(space: &Space, limits: StoreLimits) -> Finding {
    if space.inodes == 0 {
        return Finding::ok("store-inodes", "without bound");
    }
    let (free, all) = (space.inodes_free, space.inodes);
    let found = format!("{free} of {all} are free");
    let hint = "remove files from that disk, or make its file system with more inodes; XFS has no fixed number";
    if free == 0 {
        return Finding::error("store-inodes", found, hint);
    }
    if all.saturating_sub(free) > percent(all, limits.high_percent) {
        return Finding::warn(
            "store-inodes",
            format!("{found}: a fetch has to evict first"),
            hint,
        );
    }
    Finding::ok("store-inodes", found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space_of(free: u64, inodes: u64, inodes_free: u64) -> Space {
        Space {
            capacity: 100 << 30,
            free,
            inodes,
            inodes_free,
        }
    }

    #[test]
    fn room_is_judged_by_the_watermarks() {
        let limits = StoreLimits {
            high_percent: 80,
            ..StoreLimits::default()
        };
        let level = |free| room(&space_of(free, 0, 0), limits).level;
        assert_eq!(level(50 << 30), Level::Ok);
        assert_eq!(level(10 << 30), Level::Warn);
        assert_eq!(level(1 << 20), Level::Error);
        let level = |all, free| inodes(&space_of(0, all, free), limits).level;
        assert_eq!(level(0, 0), Level::Ok);
        assert_eq!(level(1000, 500), Level::Ok);
        assert_eq!(level(1000, 100), Level::Warn);
        assert_eq!(level(1000, 0), Level::Error);
    }

    #[test]
    fn a_store_beside_the_nvme_is_worth_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        let (here, nowhere) = (dir.path(), Path::new("/nowhere"));
        let level = |system: &Path, nvme: &Path| disk(here, here, system, nvme).level;
        assert_eq!(level(nowhere, here), Level::Ok);
        assert_eq!(level(nowhere, Path::new("/proc")), Level::Warn);
        assert_eq!(level(here, nowhere), Level::Warn);
        // A container's own directory above the mount of its store.
        assert_eq!(level(Path::new("/proc"), Path::new("/proc")), Level::Ok);
        assert_eq!(level(Path::new("/proc"), nowhere), Level::Ok);
    }

    #[test]
    fn a_store_beside_kubelet_may_not_fill_what_kubelet_needs() {
        let dir = tempfile::tempdir().unwrap();
        let level = |high_percent, kubelet: &str| {
            let limits = StoreLimits {
                high_percent,
                ..StoreLimits::default()
            };
            let kubelet = dir.path().join(kubelet);
            beside_kubelet(dir.path(), limits, &kubelet).map(|found| found.level)
        };
        assert_eq!(level(90, "kubelet"), None, "there is no kubelet");
        fs::create_dir(dir.path().join("kubelet")).unwrap();
        assert_eq!(level(80, "kubelet"), Some(Level::Ok));
        assert_eq!(level(90, "kubelet"), Some(Level::Warn));
        assert_eq!(level(90, "/proc"), None, "another file system");
    }

    #[test]
    fn a_probe_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(hard_links(dir.path()).level, Level::Ok);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_store_that_is_not_there_yet_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let (finding, base) = directory(&dir.path().join("a/b"), Owner::User).unwrap();
        assert_eq!((finding.level, base.as_path()), (Level::Ok, dir.path()));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(
            directory(&file, Owner::User).unwrap_err().level,
            Level::Error
        );
        assert_eq!(
            directory(&file.join("store"), Owner::Daemon)
                .unwrap_err()
                .level,
            Level::Error
        );
    }

    #[test]
    fn another_user_need_not_see_the_daemons_store() {
        let error = io::Error::from(io::ErrorKind::PermissionDenied);
        let level = |owner| denied(String::new(), &error, owner).level;
        assert_eq!(level(Owner::Daemon), Level::Warn);
        assert_eq!(level(Owner::User), Level::Error);
    }
}
