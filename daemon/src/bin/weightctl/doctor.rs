//! `weightctl doctor`: looks at all that a node's set-up needs, and says how to mend what is wrong.
//!
//! Every check is bounded in time: what may hang, such as a dead file system, runs in a thread that is left
//! behind. Some of these cannot even be killed, and keep their process: so that is another one, which reports
//! to this one. No check changes anything but for a probe file that it removes.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use weightd::config::{Config, ConfigError};
use weightd::sources::hf::HfConfigError;
use weightd_core::errors::Chain;
use weightd_core::store::StoreLimits;

use crate::Told;
use crate::args::{Format, Global};
use crate::backend::{self, DEFAULT_SOCKET, Place};
use crate::output::{self, Output};

mod daemon;
mod kubernetes;
mod node;
mod origins;
mod shared;
mod store;

/// How long one check may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the chart's daemon, and one that a package installed, have their settings.
const INSTALLED: &str = "/etc/weightd/weightd.toml";

/// How long all of them may take: no more than four follow on each other.
const PATIENCE_FOR_ALL: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  weightctl doctor
  weightctl doctor --config /etc/weightd/weightd.toml
  weightctl --root /mnt/k8s-disks/0/weightd doctor
  weightctl --shared-root /fsx/weightd doctor
  weightctl --output json doctor | jq '.[] | select(.level != \"ok\")'

JSON: an array of {check, level, found, hint}; level is ok, warn or error, and hint may be null.")]
pub(crate) struct DoctorArgs {
    /// Check what the daemon's settings in FILE say [default: /etc/weightd/weightd.toml if it can be read, unless --root is given]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Make the checks in this process; what doctor runs
    #[arg(long, hide = true)]
    inside: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// It works, but not as well as it could, or it could not be seen.
    Warn,
    /// Something that weightd needs does not work.
    Error,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Finding {
    check: Cow<'static, str>,
    level: Level,
    found: String,
    hint: Option<String>,
}

impl Finding {
    fn new(check: &'static str, level: Level, found: impl Into<String>) -> Self {
        Self {
            check: check.into(),
            level,
            found: found.into(),
            hint: None,
        }
    }

    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Level::Ok, found)
    }

    fn warn(check: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(check, Level::Warn, found).hint(hint)
    }

    fn error(check: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(check, Level::Error, found).hint(hint)
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn text(&self) -> String {
        let level = match self.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Error => "error",
        };
        let mut text = format!("{level:<5}  {}: {}\n", self.check, self.found);
        if let Some(hint) = &self.hint {
            text.push_str(&format!("       hint: {hint}\n"));
        }
        text
    }
}

/// What is to be looked at.
struct Setup {
    config: Config,
    /// Whether the settings come from a file.
    configured: bool,
    /// The store that the user or the file names.
    root: Option<PathBuf>,
    socket: PathBuf,
    /// Whether the user or the file names a daemon.
    wants_daemon: bool,
    shared_root: Option<PathBuf>,
}

impl Setup {
    /// What cannot be used of the file becomes a finding.
    fn new(global: &Global, args: &DoctorArgs) -> anyhow::Result<(Self, Vec<Finding>)> {
        let place = backend::place(global)?;
        let named = args.config.clone();
        let (config, findings) = match named.or_else(|| installed(&place, Path::new(INSTALLED))) {
            None => (None, Vec::new()),
            Some(path) => read(&path),
        };
        let configured = config.is_some();
        let config = config.unwrap_or_default();
        let wants_daemon = match &place {
            Place::Root(_) => false,
            Place::Socket(_) => true,
            Place::Either => configured,
        };
        let (root, socket) = match place {
            Place::Root(root) => (Some(root), None),
            Place::Socket(socket) => (None, Some(socket)),
            Place::Either => (None, None),
        };
        let default = || match configured {
            true => config.socket.clone(),
            false => DEFAULT_SOCKET.into(),
        };
        let setup = Self {
            root: root.or_else(|| configured.then(|| config.root.clone())),
            socket: socket.unwrap_or_else(default),
            shared_root: shared_root(global, &config),
            config,
            configured,
            wants_daemon,
        };
        Ok((setup, findings))
    }

    /// How full the store may get, as far as that can be known from here.
    fn limits(&self, of_daemon: bool) -> StoreLimits {
        if self.configured || of_daemon {
            self.config.store_limits()
        } else {
            StoreLimits::default()
        }
    }
}

/// The daemon's settings, where nobody names any: a store of one's own has nothing to do with them.
fn installed(place: &Place, file: &Path) -> Option<PathBuf> {
    let of_daemon = !matches!(place, Place::Root(_));
    (of_daemon && std::fs::File::open(file).is_ok()).then(|| file.to_owned())
}

/// The shared tier, if one is named.
fn shared_root(global: &Global, config: &Config) -> Option<PathBuf> {
    let given = global.shared_root.clone();
    given.or_else(|| config.shared.root.clone())
}

fn read(path: &Path) -> (Option<Config>, Vec<Finding>) {
    let error = |error| {
        let hint = "mend it, and check it with `weightd --config FILE --check-config`";
        vec![Finding::error("config", Chain(&error).to_string(), hint)]
    };
    match Config::read(path) {
        Err(failed) => (None, error(failed)),
        Ok(config) => match config.check() {
            // Only the check of the token knows whether that matters.
            Err(ConfigError::Hf(HfConfigError::TokenFile { .. })) => {
                let found = format!("{} is sound, but for the token's file", path.display());
                (Some(config), vec![Finding::ok("config", found)])
            }
            Err(failed) => (Some(config), error(failed)),
            Ok(()) => {
                let found = format!("{} is sound", path.display());
                (Some(config), vec![Finding::ok("config", found)])
            }
        },
    }
}

/// Makes all checks and prints what they found.
pub(crate) async fn run(output: Output, global: &Global, args: &DoctorArgs) -> anyhow::Result<()> {
    if args.inside {
        let findings = check(global, args).await?;
        return Output(Format::Json).result(&findings, |_| String::new());
    }
    // Wrong usage is told from here.
    backend::place(global)?;
    let findings = from_child().await?;
    output.result(&findings, |findings| {
        findings.iter().map(Finding::text).collect()
    })?;
    let failed = findings.iter().any(|found| found.level == Level::Error);
    if failed { Err(Told.into()) } else { Ok(()) }
}

/// What this command finds when another process makes the checks. Nobody waits for the end of that one.
async fn from_child() -> anyhow::Result<Vec<Finding>> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1)).arg("--inside");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    // Not ours: whoever waits for the end of our stderr would wait for the child's.
    let mut child = command
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run the checks")?;
    let mut said = BufReader::new(child.stderr.take().expect("it is piped")).lines();
    let said = tokio::spawn(async move {
        while let Ok(Some(line)) = said.next_line().await {
            output::note(&line);
        }
    });
    let mut report = String::new();
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped"));
    match tokio::time::timeout(PATIENCE_FOR_ALL, lines.read_line(&mut report)).await {
        Ok(read) => read.context("cannot read what the checks found")?,
        Err(_) => {
            // It may not even die of that.
            let _ = child.start_kill();
            let seconds = PATIENCE_FOR_ALL.as_secs();
            anyhow::bail!(
                "the checks did not answer for {seconds} s\nhint: see what hangs, with `ps` and `dmesg`"
            );
        }
    };
    if report.is_empty() {
        // It said why, if it could.
        let _ = tokio::time::timeout(PATIENCE, said).await;
        anyhow::bail!("the checks ended without a report");
    }
    serde_json::from_str(&report).context("cannot read what the checks found")
}

async fn check(global: &Global, args: &DoctorArgs) -> anyhow::Result<Vec<Finding>> {
    let (setup, mut findings) = Setup::new(global, args)?;
    let daemon = daemon::check(&setup.socket, setup.wants_daemon).await;
    let (store, shared, node, kubernetes, hub, s3) = tokio::join!(
        check_store(&setup, daemon.root),
        check_shared(setup.shared_root.as_deref()),
        bounded("csi", PATIENCE, || {
            let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
            node::csi(Path::new(node::KUBELET), in_pod)
        }),
        kubernetes::check(&setup.config.kubernetes),
        origins::hub(&setup.config),
        origins::s3(&setup.config.s3),
    );
    let daemon = vec![daemon.finding];
    for found in [store, daemon, node, kubernetes, hub, s3, shared] {
        findings.extend(found);
    }
    findings.extend([node::cpu(), node::open_files(), node::clock()]);
    Ok(findings)
}

async fn check_store(setup: &Setup, of_daemon: Option<PathBuf>) -> Vec<Finding> {
    let root = match (&setup.root, &of_daemon) {
        (Some(root), _) | (None, Some(root)) => root.clone(),
        (None, None) if setup.wants_daemon => {
            let hint = "name it with --root DIR, or the daemon's settings with --config FILE";
            let found = "not checked: only the daemon knows where its store is";
            return vec![Finding::warn("store-root", found, hint)];
        }
        (None, None) => match backend::user_store() {
            Ok(root) => root,
            Err(error) => {
                let found = format!("{error:#}");
                return vec![Finding::error(
                    "store-root",
                    found,
                    "name one with --root DIR",
                )];
            }
        },
    };
    let from_daemon = setup.root.is_none() && of_daemon.is_some();
    let owner = match setup.wants_daemon || from_daemon {
        true => store::Owner::Daemon,
        false => store::Owner::User,
    };
    let limits = setup.limits(from_daemon);
    let work = move || store::check(&root, limits, owner);
    bounded("store-root", PATIENCE, work).await
}

async fn check_shared(root: Option<&Path>) -> Vec<Finding> {
    match root {
        Some(root) => shared::check(root).await,
        None => {
            let found = "none is named: every node fetches from the origins for itself";
            vec![Finding::ok("shared-root", found)]
        }
    }
}

/// Makes a check that may hang, in a thread of its own.
async fn bounded(
    check: &'static str,
    limit: Duration,
    work: impl FnOnce() -> Vec<Finding> + Send + 'static,
) -> Vec<Finding> {
    match answer(limit, work).await {
        Some(findings) => findings,
        None => {
            let found = format!("did not answer for {} s", limit.as_secs());
            let hint = "something that it looks at hangs, most likely a file system whose servers are gone: look \
                        for processes in state D (`ps`) and at the kernel's log (`dmesg`)";
            vec![Finding::error(check, found, hint)]
        }
    }
}

/// What `work` returns, unless it takes longer. Then its thread is left behind: nothing can end it.
async fn answer<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, answered) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = done.send(work());
    });
    tokio::time::timeout(limit, answered).await.ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_hangs_is_left_behind_and_told() {
        let (let_go, held) = std::sync::mpsc::channel::<()>();
        let hang = move || {
            let _ = held.recv();
            vec![Finding::ok("shared-probe", "never said")]
        };

        let findings = bounded("shared-probe", Duration::from_millis(50), hang).await;

        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].check, "shared-probe");
        assert_eq!(findings[0].level, Level::Error);
        assert!(findings[0].found.contains("did not answer"), "{findings:?}");
        drop(let_go);
    }

    #[tokio::test]
    async fn what_answers_in_time_is_told_as_it_is() {
        let found = vec![Finding::ok("csi", "fine")];
        let same = found.clone();
        assert_eq!(bounded("csi", PATIENCE, move || same).await, found);
    }

    #[test]
    fn the_daemons_settings_are_found_but_for_a_store_of_ones_own() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("weightd.toml");
        assert_eq!(installed(&Place::Either, &file), None, "there is none");
        std::fs::write(&file, "").unwrap();
        assert_eq!(installed(&Place::Either, &file), Some(file.clone()));
        let socket = Place::Socket("/run/x.sock".into());
        assert_eq!(installed(&socket, &file), Some(file.clone()));
        let own = Place::Root(dir.path().to_owned());
        assert_eq!(installed(&own, &file), None);
    }

    #[test]
    fn a_finding_is_a_line_and_its_hint_another() {
        assert_eq!(Finding::ok("cpu", "fast").text(), "ok     cpu: fast\n");
        let text = Finding::error("csi", "not there", "install it").text();
        assert_eq!(text, "error  csi: not there\n       hint: install it\n");
    }
}
