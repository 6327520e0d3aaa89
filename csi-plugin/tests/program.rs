//! The program itself: its options, its exit codes and how it stops.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weightd-csi"));
    command
        .env_clear()
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// Starts the plugin and waits until it says that it listens. Gives that line of its log.
fn start(socket: &Path) -> (Child, String) {
    let mut child = program()
        .arg(format!("--endpoint=unix://{}", socket.display()))
        .args(["--node-id", "node-1"])
        .arg("--kubelet-dir")
        .arg(socket.parent().expect("a directory"))
        .spawn()
        .expect("spawn");
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().expect("piped"))
        .read_line(&mut line)
        .expect("read");
    (child, line)
}

#[test]
fn help_names_every_option() {
    let output = program().arg("--help").output().expect("run");

    let help = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(output.status.success(), "{}", output.status);
    for option in [
        "--endpoint",
        "--node-id",
        "--daemon-socket",
        "--kubelet-dir",
        "--kubeconfig",
    ] {
        assert!(help.contains(option), "{option} is missing in:\n{help}");
    }
}

#[test]
fn a_wrong_endpoint_is_wrong_usage() {
    let output = program()
        .args(["--endpoint", "tcp://127.0.0.1:1", "--node-id", "node-1"])
        .output()
        .expect("run");

    let error = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("unix:///absolute/path"), "{error}");
}

#[test]
fn sigterm_ends_it_cleanly_and_takes_the_socket_away() {
    let directory = tempfile::tempdir().expect("tempdir");
    let socket = directory.path().join("csi.sock");
    let (mut child, line) = start(&socket);
    assert!(
        line.starts_with('{') && line.contains(r#""message":"listening""#),
        "{line}"
    );

    let process = Pid::from_raw(child.id().try_into().expect("a pid fits"));
    kill(process, Signal::SIGTERM).expect("signal");
    let status = child.wait().expect("wait");

    assert!(status.success(), "{status}");
    assert!(!socket.exists(), "the socket is still there");
}

#[test]
fn a_killed_plugin_leaves_its_place_to_the_next_and_a_live_one_does_not() {
    let directory = tempfile::tempdir().expect("tempdir");
    let socket = directory.path().join("csi.sock");
    let (mut killed, _) = start(&socket);
    killed.kill().expect("kill");
    killed.wait().expect("wait");
    assert!(socket.exists(), "a killed plugin cannot clean up");

    let (mut live, line) = start(&socket);
    let (mut refused, error) = start(&socket);

    assert!(line.contains(r#""message":"listening""#), "{line}");
    assert!(error.contains("belongs to another live process"), "{error}");
    assert_eq!(refused.wait().expect("wait").code(), Some(1));
    live.kill().expect("kill");
    live.wait().expect("wait");
}

#[test]
fn a_log_that_nobody_reads_does_not_change_how_it_ends() {
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);

    let status = program()
        .arg("--endpoint=unix:///nowhere/csi.sock")
        .args(["--node-id", "node-1"])
        .stderr(writer)
        .status()
        .expect("run");

    assert_eq!(status.code(), Some(1), "{status}");
}
