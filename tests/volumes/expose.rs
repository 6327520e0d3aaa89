//! A claim's file system, shown to the node by `weightd-csi expose`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::node::{Namespace, Running};

/// A node with a directory that containers share with it, and two file systems to show.
struct Place {
    dir: tempfile::TempDir,
    namespace: Namespace,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["host", "one", "two"] {
            fs::create_dir(dir.path().join(name)).expect("made");
            fs::write(dir.path().join(name).join("name"), name).expect("written");
        }
        let namespace = Namespace::new();
        namespace.share(&dir.path().join("host"));
        Self { dir, namespace }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn expose(&self, from: &str) -> Running {
        let log = fs::File::create(self.path("log")).expect("a log");
        Running::start(self.command(from).stderr(log))
    }

    /// Waits until the process started last says that it exposes the claim.
    async fn until_told(&self) {
        let begun = Instant::now();
        let log = || fs::read_to_string(self.path("log")).unwrap_or_default();
        while !log().contains("exposed, and its file system answers") {
            assert!(begun.elapsed() < Duration::from_secs(20), "{}", log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn command(&self, from: &str) -> Command {
        let program = Path::new(env!("CARGO_BIN_EXE_weightd-csi"));
        let mut command = self.namespace.container(program);
        command.args(["expose", "--from"]).arg(self.path(from));
        command.arg("--to").arg(self.path("host/claim")).env_clear();
        command.stdin(Stdio::null());
        command
    }

    /// What the node sees there.
    fn seen(&self) -> Option<String> {
        fs::read_to_string(self.namespace.see(&self.path("host/claim/name"))).ok()
    }

    async fn until_seen(&self, expected: Option<&str>) {
        let begun = Instant::now();
        while self.seen().as_deref() != expected {
            let late = begun.elapsed() > Duration::from_secs(20);
            assert!(!late, "{:?} is not {expected:?}", self.seen());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The mounts of the node there, with the numbers that the kernel gave them.
    fn mounts(&self) -> Vec<String> {
        let mut command = self.namespace.command(Path::new("cat"));
        let output = command.arg("/proc/self/mountinfo").output().expect("cat");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let claim = self.path("host/claim");
        let place = format!(" {} ", claim.display());
        let lines = text.lines().filter(|line| line.contains(&place));
        lines.map(str::to_owned).collect()
    }
}

#[tokio::test]
async fn the_node_sees_the_claim_until_the_process_is_told_to_stop() {
    let place = Place::new();

    let mut exposing = place.expose("one");
    place.until_seen(Some("one")).await;
    let below = place.namespace.see(&place.path("host/claim"));
    fs::write(below.join("written"), "by the node").expect("it can be written to");
    let pid = i32::try_from(exposing.pid()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("told to stop");

    assert_eq!(exposing.exit_code().await, Some(0));
    assert_eq!(place.mounts(), Vec::<String>::new());
    assert!(place.path("one/written").exists());
    let mode = fs::metadata(&below).expect("it is left").permissions();
    assert_eq!(
        mode.mode() & 0o777,
        0o555,
        "the node's disk could be filled there"
    );
}

#[tokio::test]
async fn what_a_killed_process_left_is_kept_if_it_is_the_same_and_replaced_if_not() {
    let place = Place::new();
    let mut first = place.expose("one");
    place.until_seen(Some("one")).await;
    let before = place.mounts();

    first.kill();
    assert_eq!(
        place.seen().as_deref(),
        Some("one"),
        "it went with its process"
    );
    let mut second = place.expose("one");
    place.until_told().await;
    assert_eq!(place.mounts(), before, "it was mounted again");
    second.kill();
    let _third = place.expose("two");

    place.until_seen(Some("two")).await;
    assert_eq!(place.mounts().len(), 1, "{:?}", place.mounts());
}

#[tokio::test]
async fn it_comes_back_after_somebody_unmounted_it() {
    let place = Place::new();
    let _exposing = place.expose("one");
    place.until_seen(Some("one")).await;

    let mut umount = place.namespace.command(Path::new("umount"));
    let status = umount.arg(place.path("host/claim")).status();

    assert!(status.expect("umount runs").success());
    place.until_seen(None).await;
    place.until_seen(Some("one")).await;
}

#[tokio::test]
async fn a_directory_that_is_missing_is_named() {
    let place = Place::new();

    let output = place.command("absent").output().expect("it runs");

    let error = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("absent") && error.contains("No such file"),
        "{error}"
    );
}
