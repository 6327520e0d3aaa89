//! Lustre: how to recognise it, and how files are striped there, through its own tool `lfs`.
//!
//! All calls block. [`FileSystem::of`] waits for a file system that hangs; what runs `lfs` does not.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::sys::statfs;
use nix::unistd::Pid;

#[cfg(test)]
mod tests;

/// What statfs(2) says of Lustre.
///
/// Source: `LL_SUPER_MAGIC` in Lustre's `lustre_user.h`.
const LUSTRE_MAGIC: u64 = 0x0BD0_0BD0;

/// How long `lfs` may take; it asks the metadata server one question.
const PATIENCE: Duration = Duration::from_secs(5);

/// The layout of files that weightd wants, as options of `lfs setstripe`: one stripe for what is small, all
/// servers for what is large.
pub const WANTED_OPTIONS: &str = "-E 100M -c 1 -E 10G -c 8 -E -1 -c -1";

/// What [`layout`] says of a directory after [`set_layout`].
pub const WANTED_LAYOUT: &str = "1 stripe to 100 MiB, 8 stripes to 10 GiB, then all stripes";

/// A type of file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem(u64);

impl FileSystem {
    /// The type of the file system that `path` lies on.
    ///
    /// # Errors
    ///
    /// What the system says, for example that `path` does not exist.
    pub fn of(path: &Path) -> io::Result<Self> {
        let magic = statfs::statfs(path)?.filesystem_type().0;
        // The types of the number differ between platforms; all magic numbers have 32 bits.
        Ok(Self(magic as u64 & 0xFFFF_FFFF))
    }

    /// Whether it is Lustre.
    #[must_use]
    pub fn is_lustre(self) -> bool {
        self.0 == LUSTRE_MAGIC
    }

    /// Its name, if it is one of those that a store is often on.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        let known = [
            (statfs::EXT4_SUPER_MAGIC, "ext4"),
            (statfs::XFS_SUPER_MAGIC, "xfs"),
            (statfs::NFS_SUPER_MAGIC, "nfs"),
            (statfs::TMPFS_MAGIC, "tmpfs"),
            (statfs::OVERLAYFS_SUPER_MAGIC, "overlay"),
            (statfs::FUSE_SUPER_MAGIC, "fuse"),
            (statfs::BTRFS_SUPER_MAGIC, "btrfs"),
        ];
        if self.is_lustre() {
            return Some("lustre");
        }
        let found = known.iter().find(|(magic, _)| magic.0 as u64 == self.0);
        found.map(|(_, name)| *name)
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{:#x}", self.0),
        }
    }
}

/// `lfs` did not do what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum LustreError {
    /// There is no `lfs`.
    #[error("cannot {tried}: there is no `{}`; install the Lustre client's tools (lustre-client)", program.display())]
    Missing {
        /// What was tried.
        tried: String,
        /// The tool.
        program: PathBuf,
    },
    /// It cannot be run.
    #[error("cannot {tried}: `{}` does not run; see that this user may execute it", program.display())]
    Run {
        /// What was tried.
        tried: String,
        /// The tool.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error(
        "cannot {tried}: lfs says `{said}` ({how}); see that it is a directory on Lustre, and this user's own"
    )]
    Failed {
        /// What was tried.
        tried: String,
        /// Its exit code, or the signal that ended it.
        how: String,
        /// The first line of what it wrote about it.
        said: String,
    },
    /// It took too long, and was killed.
    #[error(
        "cannot {tried}: lfs did not answer for {seconds} s; see that the Lustre servers can be reached (`lfs check servers`)"
    )]
    Silent {
        /// What was tried.
        tried: String,
        /// How long we waited.
        seconds: u64,
    },
}

/// Makes new files below `dir` striped the way large models are read best: one stripe to 100 MiB, 8 to
/// 10 GiB, then all. Files that are there stay as they are.
///
/// # Errors
///
/// [`LustreError`].
pub fn set_layout(dir: &Path) -> Result<(), LustreError> {
    Lfs::default().set_layout(dir)
}

/// How new files in `dir` are striped, in a few words.
///
/// # Errors
///
/// [`LustreError`].
pub fn layout(dir: &Path) -> Result<String, LustreError> {
    Lfs::default().layout(dir)
}

/// Lustre's own tool.
struct Lfs {
    program: PathBuf,
    patience: Duration,
}

impl Default for Lfs {
    fn default() -> Self {
        Self {
            program: "lfs".into(),
            patience: PATIENCE,
        }
    }
}

impl Lfs {
    fn set_layout(&self, dir: &Path) -> Result<(), LustreError> {
        let tried = format!("set the stripe layout of `{}`", dir.display());
        let words = ["setstripe"].into_iter().chain(WANTED_OPTIONS.split(' '));
        self.run(words.map(OsString::from), dir, tried).map(|_| ())
    }

    fn layout(&self, dir: &Path) -> Result<String, LustreError> {
        let tried = format!("read the stripe layout of `{}`", dir.display());
        let words = ["getstripe", "-d"].map(OsString::from);
        Ok(describe(&self.run(words.into_iter(), dir, tried)?))
    }

    /// Runs it on `dir`; what it printed.
    fn run(
        &self,
        words: impl Iterator<Item = OsString>,
        dir: &Path,
        tried: String,
    ) -> Result<String, LustreError> {
        // Absolute, so that no path is taken for an option.
        let dir = std::path::absolute(dir).unwrap_or_else(|_| Path::new("/").join(dir));
        let mut command = Command::new(&self.program);
        command.args(words).arg(OsStr::new("--")).arg(dir);
        let program = self.program.clone();
        match self.finish(&mut command) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                Err(LustreError::Missing { tried, program })
            }
            Err(source) => Err(LustreError::Run {
                tried,
                program,
                source,
            }),
            Ok(None) => Err(LustreError::Silent {
                tried,
                seconds: self.patience.as_secs(),
            }),
            Ok(Some(output)) if output.status.success() => {
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            }
            Ok(Some(output)) => Err(LustreError::Failed {
                tried,
                how: output.status.to_string(),
                said: first_lines(&String::from_utf8_lossy(&output.stderr), 1),
            }),
        }
    }

    /// Runs a command to its end; `None` if it took too long.
    fn finish(&self, command: &mut Command) -> io::Result<Option<Output>> {
        // A group of its own: what it starts goes with it.
        let command = command.stdin(Stdio::null()).process_group(0);
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let group = Pid::from_raw(child.id() as i32);
        let (ended, end) = mpsc::sync_channel(1);
        // A process that waits for a dead Lustre cannot even be killed: this thread waits for it, not we.
        std::thread::spawn(move || ended.send(child.wait_with_output()));
        match end.recv_timeout(self.patience) {
            Ok(output) => output.map(Some),
            Err(_) => {
                let _ = killpg(group, Signal::SIGKILL);
                Ok(None)
            }
        }
    }
}

/// The components that `lfs getstripe` prints; if it prints none that we know, its first lines.
fn describe(printed: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut end = None;
    let mut words = printed.split_whitespace();
    while let Some(word) = words.next() {
        match word {
            "lcme_extent.e_end:" => end = words.next(),
            // `lmm_` stands before it for a file, nothing for a directory.
            "stripe_count:" | "lmm_stripe_count:" => {
                let stripes = match words.next() {
                    Some("-1") => "all stripes".to_owned(),
                    Some("1") => "1 stripe".to_owned(),
                    Some(number) if number.parse::<u32>().is_ok() => format!("{number} stripes"),
                    _ => return first_lines(printed, 4),
                };
                parts.push(match end.take().map(str::parse::<u64>) {
                    Some(Ok(end)) => format!("{stripes} to {}", size(end)),
                    Some(Err(_)) if !parts.is_empty() => format!("then {stripes}"),
                    _ => stripes,
                });
            }
            _ => {}
        }
    }
    if parts.is_empty() {
        first_lines(printed, 4)
    } else {
        parts.join(", ")
    }
}

fn first_lines(text: &str, count: usize) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.take(count).collect::<Vec<_>>().join("; ")
}

/// A size in the largest unit that shows it exactly.
fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let fits = |shift: u32| bytes != 0 && bytes.trailing_zeros() >= shift;
    match units.iter().find(|(shift, _)| fits(*shift)) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} B"),
    }
}
