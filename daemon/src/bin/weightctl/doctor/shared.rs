//! The shared tier. Its file system may hang at any step: each is bounded, and the first that hangs is the last.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use weightd_core::shared::FORMAT;
use weightd_core::shared::lustre::{self, FileSystem};

use super::store::{Probe, Space};
use super::{Finding, Level, PATIENCE, answer};
use crate::output::bytes;

/// What is written to try it: one page.
const PROBE_BYTES: usize = 4096;

/// A probe that takes longer is worth a warning; Lustre and NFS that are well take milliseconds.
const SLOW: Duration = Duration::from_secs(1);

/// `lfs` is bounded by itself, and says better what it waited for.
const LFS_PATIENCE: Duration = Duration::from_secs(7);

const MOUNT: &str = "mount it before weightd starts, with the mount options in the PersistentVolume's `mountOptions` (those of a \
     StorageClass do nothing for a static PV), or leave --shared-root away: a node works without";

const SQUASH: &str = "see that it is mounted read-write and that this user may write there; root squash turns a node's root into \
     nobody: give the directory to the user that weightd writes as (directories 0755, files 0444), or except the \
     nodes from the squash";

const OUTSIDE: &str = "keep it outside of S3 data-repository paths, which cannot be seen from here: a changed import would take \
     bytes away under their readers";

/// Looks at the shared tier in `root`.
pub(super) async fn check(root: &Path) -> Vec<Finding> {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let mut findings = Vec::new();
    let path = root.clone();
    let (more, is_lustre) = match answer(PATIENCE, move || look(&path)).await {
        Some(found) => found,
        None => return vec![hung("shared-root", &root)],
    };
    let usable = more.iter().all(|found| found.level != Level::Error);
    findings.extend(more);
    if is_lustre {
        let path = root.clone();
        match answer(LFS_PATIENCE, move || layout(&path)).await {
            Some(found) => findings.push(found),
            None => findings.push(hung("shared-layout", &root)),
        }
    }
    if usable {
        let path = root.clone();
        let probed = answer(PATIENCE, move || probe(&path)).await;
        findings.push(probed.unwrap_or_else(|| hung("shared-probe", &root)));
    }
    findings
}

fn hung(check: &'static str, root: &Path) -> Finding {
    Finding::error(
        check,
        format!(
            "{} did not answer for {} s",
            root.display(),
            PATIENCE.as_secs()
        ),
        "its file system hangs: see that the servers can be reached (security groups, `lfs check servers`, `dmesg`); \
         nodes go on from the origins meanwhile",
    )
}

/// What can be seen without writing, and whether it is Lustre.
fn look(root: &Path) -> (Vec<Finding>, bool) {
    let at = root.display();
    let metadata = match fs::metadata(root) {
        Ok(metadata) => metadata,
        Err(error) => {
            let found = match error.kind() {
                io::ErrorKind::NotFound => format!("{at} is not there"),
                _ => format!("cannot look at {at}: {error}"),
            };
            return (vec![Finding::error("shared-root", found, MOUNT)], false);
        }
    };
    if !metadata.is_dir() {
        let found = format!("{at} is no directory");
        return (vec![Finding::error("shared-root", found, MOUNT)], false);
    }
    let (kind, is_lustre) = match FileSystem::of(root) {
        Ok(kind) => (file_system(root, kind), kind.is_lustre()),
        Err(error) => {
            let found = format!("the file system of {at} cannot be seen: {error}");
            (Finding::error("shared-root", found, MOUNT), false)
        }
    };
    (vec![kind, format(root), space(root)], is_lustre)
}

fn file_system(root: &Path, kind: FileSystem) -> Finding {
    let found = format!("{} is on {kind}", root.display());
    match kind.name() {
        Some("lustre") => Finding::ok("shared-root", found).hint(OUTSIDE),
        Some("nfs") => Finding::ok("shared-root", found),
        Some("ext4" | "xfs" | "btrfs" | "tmpfs" | "overlay") => Finding::warn(
            "shared-root",
            format!("{found}, which no other node sees"),
            format!("if nodes are to share it, {MOUNT}"),
        ),
        _ => Finding::ok(
            "shared-root",
            format!("{found}, which is not known here to be shared"),
        ),
    }
}

/// Whether the store there is one that this version knows.
fn format(root: &Path) -> Finding {
    let path = root.join("FORMAT");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return unformatted(root);
        }
        Err(error) => {
            let found = format!("cannot read {}: {error}", path.display());
            return Finding::error("shared-format", found, SQUASH);
        }
    };
    let first = text.lines().next().unwrap_or_default();
    let version = first.strip_prefix("weightd shared store ");
    match version.and_then(|version| version.trim().parse::<u32>().ok()) {
        Some(FORMAT) => {
            let segment = text.lines().find_map(|line| {
                let (key, value) = line.split_once('=')?;
                let value = value.trim().parse().ok()?;
                (key.trim() == "segment").then(|| format!(", segments of {}", bytes(value)))
            });
            let segment = segment.unwrap_or_default();
            Finding::ok(
                "shared-format",
                format!("a format that this version knows{segment}"),
            )
        }
        Some(found) if found > FORMAT => Finding::error(
            "shared-format",
            format!("the shared tier has format {found}, this version reads format {FORMAT}"),
            "use the version of weightd that made it on all nodes, or another directory",
        ),
        _ => Finding::error(
            "shared-format",
            format!("{} is no shared tier of weightd", root.display()),
            "choose an empty or a new directory with --shared-root; a node's own store cannot be shared",
        ),
    }
}

fn unformatted(root: &Path) -> Finding {
    let ours = |name: &str| name == "lost+found" || name.starts_with("FORMAT.");
    let foreign = fs::read_dir(root).map(|entries| {
        let mut names = entries.flatten().map(|entry| entry.file_name());
        names.find(|name| !ours(&name.to_string_lossy()))
    });
    match foreign {
        Ok(None) => Finding::ok("shared-format", "no store yet: the first node makes it"),
        Ok(Some(name)) => Finding::error(
            "shared-format",
            format!(
                "{} holds something else, such as `{}`",
                root.display(),
                name.to_string_lossy()
            ),
            "choose an empty or a new directory with --shared-root",
        ),
        Err(error) => {
            let found = format!("cannot list {}: {error}", root.display());
            Finding::error("shared-format", found, SQUASH)
        }
    }
}

fn space(root: &Path) -> Finding {
    let space = match Space::of(root) {
        Ok(space) => space,
        Err(error) => {
            let found = format!("cannot be seen: {error}");
            return Finding::warn("shared-space", found, "see `df` of that directory");
        }
    };
    let found = format!(
        "{} of {} are free",
        bytes(space.free),
        bytes(space.capacity)
    );
    let hint = "remove what is not needed there, or make the file system larger; its throughput grows with it";
    match space.free {
        0 => Finding::error("shared-space", found, hint),
        free if free < space.capacity / 10 => Finding::warn("shared-space", found, hint),
        _ => Finding::ok("shared-space", found),
    }
}

/// How blobs are striped, on Lustre.
fn layout(root: &Path) -> Finding {
    let blobs = root.join("blobs");
    let dir: PathBuf = if blobs.is_dir() {
        blobs
    } else {
        root.to_owned()
    };
    match lustre::layout(&dir) {
        Ok(layout) if layout == lustre::WANTED_LAYOUT => Finding::ok("shared-layout", layout),
        Ok(layout) => Finding::warn(
            "shared-layout",
            format!("{layout}; large models want {}", lustre::WANTED_LAYOUT),
            format!(
                "`lfs setstripe {} {}` (files that are there stay as they are)",
                lustre::WANTED_OPTIONS,
                dir.display()
            ),
        ),
        Err(error) => Finding::warn(
            "shared-layout",
            format!("cannot be seen: {error}"),
            format!(
                "`lfs getstripe -d {}` on a machine that has the tools",
                dir.display()
            ),
        ),
    }
}

/// Does what nodes do there, on a file of its own, and says how long it took.
fn probe(root: &Path) -> Finding {
    match try_it(root) {
        Ok(tried) if tried.squashed => {
            let found = "files that this user writes there belong to another one";
            Finding::warn(
                "shared-probe",
                format!("{found} ({})", tried.text()),
                SQUASH,
            )
        }
        Ok(tried) if tried.total() > SLOW => Finding::warn(
            "shared-probe",
            format!("slow: {}", tried.text()),
            "see whether its throughput is used up: it is bought by size on FSx for Lustre (CloudWatch shows it)",
        ),
        Ok(tried) => Finding::ok("shared-probe", tried.text()),
        Err((step, error)) => {
            let found = format!("cannot {step} in {}: {error}", root.display());
            Finding::error("shared-probe", found, SQUASH)
        }
    }
}

struct Tried {
    steps: Vec<(&'static str, Duration)>,
    /// Whether the file belongs to somebody else than who wrote it.
    squashed: bool,
}

impl Tried {
    fn total(&self) -> Duration {
        self.steps.iter().map(|(_, took)| took).sum()
    }

    fn text(&self) -> String {
        let step =
            |(name, took): &(&str, Duration)| format!("{name} {:.1} ms", took.as_secs_f64() * 1e3);
        self.steps.iter().map(step).collect::<Vec<_>>().join(", ")
    }
}

fn try_it(root: &Path) -> Result<Tried, (&'static str, io::Error)> {
    let mut steps = Vec::new();
    let mut begun = Instant::now();
    let mut done = |step: &'static str| {
        steps.push((step, begun.elapsed()));
        begun = Instant::now();
    };
    // Names that a store which is being made right now tolerates.
    let name = format!("FORMAT.doctor-{:016x}", fastrand::u64(..));
    let (new, renamed) = (Probe(root.join(&name)), Probe(root.join(name + ".renamed")));
    let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
        .take(PROBE_BYTES)
        .collect();

    let mut file = File::create_new(&new.0).map_err(|error| ("write", error))?;
    file.write_all(&bytes).map_err(|error| ("write", error))?;
    done("write");
    file.sync_all().map_err(|error| ("sync", error))?;
    done("sync");
    // Claims count on it that only one of two gets a name.
    if File::create_new(&new.0).is_ok() {
        let twice = "the same file could be created twice; claims would not hold";
        return Err(("create a file exclusively", io::Error::other(twice)));
    }
    fs::rename(&new.0, &renamed.0).map_err(|error| ("rename", error))?;
    done("rename");
    let mut back = Vec::new();
    let read = File::open(&renamed.0).and_then(|mut file| file.read_to_end(&mut back));
    read.map_err(|error| ("read", error))?;
    if back != bytes {
        return Err((
            "read back",
            io::Error::other("other bytes than were written"),
        ));
    }
    done("read");
    let owner = fs::metadata(&renamed.0).map_err(|error| ("look at a file", error))?;
    fs::remove_file(&renamed.0).map_err(|error| ("remove", error))?;
    done("remove");
    Ok(Tried {
        steps,
        squashed: owner.uid() != nix::unistd::geteuid().as_raw(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_tried_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let found = probe(dir.path());
        assert_eq!(found.level, Level::Ok, "{found:?}");
        for step in ["write", "sync", "rename", "read", "remove"] {
            assert!(found.found.contains(step), "{found:?}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let found = probe(&dir.path().join("nothing"));
        assert_eq!(found.level, Level::Error, "{found:?}");
    }

    #[test]
    fn only_a_shared_tier_of_a_known_format_will_do() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(format(dir.path()).level, Level::Ok);
        let with = |text: &str| {
            fs::write(dir.path().join("FORMAT"), text).unwrap();
            format(dir.path())
        };
        let good = with("weightd shared store 1\nid = x\nsegment = 268435456\n");
        assert_eq!(good.level, Level::Ok);
        assert!(good.found.contains("256.0 MiB"), "{good:?}");
        let newer = with("weightd shared store 2\n");
        assert!(
            newer.level == Level::Error && newer.found.contains("format 2"),
            "{newer:?}"
        );
        assert_eq!(with("weightd store 1\n").level, Level::Error);
        fs::remove_file(dir.path().join("FORMAT")).unwrap();
        fs::write(dir.path().join("thesis.doc"), "").unwrap();
        let foreign = format(dir.path());
        assert!(
            foreign.level == Level::Error && foreign.found.contains("thesis.doc"),
            "{foreign:?}"
        );
    }

    #[test]
    fn lustre_and_what_no_other_node_sees_are_told_apart() {
        let tmp = FileSystem::of(Path::new("/proc")).unwrap();
        assert_eq!(file_system(Path::new("/x"), tmp).level, Level::Ok);
        let dir = tempfile::tempdir().unwrap();
        let (findings, is_lustre) = look(dir.path());
        assert!(!is_lustre);
        assert_eq!(findings.len(), 3, "{findings:?}");
        let (findings, _) = look(&dir.path().join("nothing"));
        assert_eq!((findings.len(), findings[0].level), (1, Level::Error));
    }
}
