//! `weightctl wait`: holds a container's program back until its volume is complete, then becomes it.
//!
//! It needs no daemon and no network: what a volume's state is stands in the volume.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::sys::statvfs::{FsFlags, statvfs};
use tokio::signal::unix::{SignalKind, signal};

use crate::output::{self, seconds};

/// How often the mark is looked for. It is one lookup in the page cache.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
pub(crate) struct WaitArgs {
    /// Where the volume is mounted
    #[arg(long, value_name = "DIR", default_value = "/models")]
    dir: PathBuf,
    /// Give up after this many seconds; without it, wait as long as it takes
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    timeout: Option<Duration>,
    /// What to run then, in place of this process; nothing if left out
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "it is a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// What a volume says of itself.
#[derive(Debug, PartialEq, Eq)]
enum State {
    Complete,
    Filling,
    /// What was tried failed; the daemon tries again.
    Retrying(String),
    /// It will not work until somebody changes something.
    Failed(String),
}

/// Waits, then runs the command. Returns only if it fails, or there is no command.
pub(crate) fn run(args: WaitArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(wait(&args.dir, args.timeout))?;
    drop(runtime);
    let Some((program, rest)) = args.command.split_first() else {
        return Ok(());
    };
    let error = Command::new(program).args(rest).exec();
    Err(error).with_context(|| format!("cannot run `{}`", program.display()))
}

async fn wait(dir: &Path, timeout: Option<Duration>) -> anyhow::Result<()> {
    // The first process of a container gets no signal that it does not ask for.
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let patience = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        outcome = until_complete(dir) => outcome,
        () = patience => {
            let waited = seconds(timeout.unwrap_or_default().as_secs_f64());
            let why = match look(dir)? {
                State::Retrying(why) => format!(": {why}"),
                _ => String::new(),
            };
            Err(anyhow!("`{}` is not complete after {waited}{why}", dir.display()))
        }
        _ = terminate.recv() => std::process::exit(128 + 15),
        _ = interrupt.recv() => std::process::exit(128 + 2),
    }
}

async fn until_complete(dir: &Path) -> anyhow::Result<()> {
    let mut told = String::new();
    loop {
        match look(dir)? {
            State::Complete => return Ok(()),
            State::Failed(why) => bail!("`{}` will not be complete: {why}", dir.display()),
            State::Retrying(why) if why != told => {
                output::note(&format!("still waiting for `{}`: {why}", dir.display()));
                told = why;
            }
            State::Filling | State::Retrying(_) => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn look(dir: &Path) -> anyhow::Result<State> {
    let marks = dir.join(".weightd");
    if marks.join("complete").exists() {
        return Ok(State::Complete);
    }
    match fs::read_to_string(marks.join("error")) {
        Ok(text) => {
            let text = text.trim();
            let (word, why) = text.split_once(": ").unwrap_or(("retrying", text));
            let why = why.to_owned();
            return Ok(match word {
                "failed" => State::Failed(why),
                _ => State::Retrying(why),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot look into `{}`", dir.display()));
        }
    }
    if marks.exists() {
        return Ok(State::Filling);
    }
    // A volume of mode `wait` has no marks: it is mounted when it is complete.
    let entries = fs::read_dir(dir).with_context(|| {
        format!(
            "cannot look into `{}` (say with --dir where the volume is mounted)",
            dir.display()
        )
    })?;
    let read_only = statvfs(dir).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY));
    if read_only && entries.count() > 0 {
        return Ok(State::Complete);
    }
    bail!(
        "`{}` is no volume of weightd: it is {}\nhint: say with --dir where the volume is mounted",
        dir.display(),
        if read_only { "empty" } else { "not read-only" }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".weightd")).unwrap();
        dir
    }

    #[test]
    fn a_volume_says_how_far_it_is() {
        let dir = volume();
        let put = |name: &str, text: &str| {
            fs::write(dir.path().join(".weightd").join(name), text).unwrap()
        };

        assert_eq!(look(dir.path()).unwrap(), State::Filling);
        put("error", "retrying: no network\n");
        assert_eq!(
            look(dir.path()).unwrap(),
            State::Retrying("no network".to_owned())
        );
        put("error", "failed: access denied\n");
        assert_eq!(
            look(dir.path()).unwrap(),
            State::Failed("access denied".to_owned())
        );
        put("complete", "{}");
        assert_eq!(look(dir.path()).unwrap(), State::Complete);
    }

    #[test]
    fn what_is_no_volume_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        for path in [dir.path().to_owned(), dir.path().join("absent")] {
            let error = format!("{:#}", look(&path).unwrap_err());
            assert!(error.contains("--dir"), "{error}");
        }
    }
}
