//! How much memory the page cache may take without taking it from anybody.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the kernel tells of memory: below `/`, or elsewhere in tests.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    root: PathBuf,
}

impl Default for Memory {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl Memory {
    #[cfg(test)]
    pub(super) fn below(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Bytes that could be page cache: what the machine has available, and what the control groups of this process
    /// leave of that. The page cache that a process fills counts towards its own limits, and beyond them each page
    /// that is read pushes out another. 0 if the kernel does not tell.
    pub(super) fn available(&self) -> u64 {
        let told = fs::read_to_string(self.root.join("proc/meminfo")).unwrap_or_default();
        let machine = field(&told, "MemAvailable:").map(|kibibytes| kibibytes * 1024);
        let groups = self.groups();
        let groups = groups.iter().filter_map(|group| room(group));
        groups.min().unwrap_or(u64::MAX).min(machine.unwrap_or(0))
    }

    /// The directories of this process's control group (version 2) and those above it.
    fn groups(&self) -> Vec<PathBuf> {
        let top = self.root.join("sys/fs/cgroup");
        let told = fs::read_to_string(self.root.join("proc/self/cgroup")).unwrap_or_default();
        let own = told.lines().find_map(|line| line.strip_prefix("0::/"));
        let own = own.map(|own| top.join(own)).filter(|own| own.is_dir());
        // In a namespace of its own, or with a path that lies outside of ours, the top one is ours.
        let own = own.unwrap_or_else(|| top.clone());
        let above = own.ancestors().take_while(|dir| dir.starts_with(&top));
        above.map(Path::to_owned).collect()
    }
}

/// What the limits of one group leave for page cache: all but what cannot be dropped. `None` without a limit.
fn room(group: &Path) -> Option<u64> {
    let limit = ["memory.max", "memory.high"]
        .iter()
        .filter_map(|name| number(&group.join(name)));
    let limit = limit.min()?;
    let used = number(&group.join("memory.current")).unwrap_or(0);
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let files = ["active_file", "inactive_file"].iter();
    let files: u64 = files.filter_map(|name| field(&stat, name)).sum();
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

/// A file that holds a number. `None` for `max`, and if it is not there.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number after `name` at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, u64) {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("it has one")).expect("made");
            fs::write(path, text).expect("written");
        }
        let available = Memory::below(dir.path()).available();
        (dir, available)
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:       8000 kB\nMemFree:  100 kB\nMemAvailable:   5000 kB\n",
    );

    #[test]
    fn without_limits_it_is_what_the_machine_has_available() {
        assert_eq!(machine(&[MEMINFO]).1, 5000 * 1024);
        let unlimited = [
            MEMINFO,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
        ];
        assert_eq!(machine(&unlimited).1, 5000 * 1024);
    }

    #[test]
    fn a_limit_counts_less_what_cannot_be_dropped() {
        let limited = [
            MEMINFO,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "1000000\n"),
            ("sys/fs/cgroup/memory.current", "900000\n"),
            (
                "sys/fs/cgroup/memory.stat",
                "anon 300000\nfile 600000\ninactive_file 500000\nactive_file 100000\n",
            ),
        ];
        assert_eq!(machine(&limited).1, 700_000);
    }

    #[test]
    fn the_tightest_of_all_groups_above_counts() {
        let nested = [
            MEMINFO,
            ("proc/self/cgroup", "1:name=systemd:/x\n0::/pods/one\n"),
            ("sys/fs/cgroup/pods/memory.max", "2000000"),
            ("sys/fs/cgroup/pods/memory.high", "900000"),
            ("sys/fs/cgroup/pods/one/memory.max", "1500000"),
            ("sys/fs/cgroup/other/memory.max", "1"),
        ];
        assert_eq!(machine(&nested).1, 900_000);
    }

    #[test]
    fn a_kernel_that_does_not_tell_leaves_nothing() {
        assert_eq!(machine(&[]).1, 0);
    }
}
