//! The demo leaves nothing behind, however it ends.

use std::fs;
use std::process::Command;

use super::harness::{Running, Sandbox, run, wait_until};

/// `weightctl demo` in directories of its own.
fn demo(sandbox: &Sandbox, size: &str) -> Command {
    for folder in ["work", "temporary"] {
        fs::create_dir(sandbox.path(folder)).expect("made");
    }
    let mut command = sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
    command.env("TMPDIR", sandbox.path("temporary"));
    command.args(["--output", "json", "demo", "--size", size]);
    command.arg("--dir").arg(sandbox.path("work"));
    command
}

#[track_caller]
fn nothing_is_left(sandbox: &Sandbox) {
    for folder in ["work", "temporary"] {
        let left = fs::read_dir(sandbox.path(folder)).expect("a folder");
        let left: Vec<_> = left.map(|entry| entry.expect("an entry").path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn the_demo_needs_no_proxy() {
    let sandbox = Sandbox::new();
    let mut demo = demo(&sandbox, "8MiB");
    demo.env("HTTP_PROXY", "http://127.0.0.1:1")
        .env("ALL_PROXY", "http://127.0.0.1:1");

    let played = run(&mut demo).json();

    assert_eq!(played["damaged"], serde_json::json!([]));
    nothing_is_left(&sandbox);
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    let sandbox = Sandbox::new();
    let mut running = Running::start(&mut demo(&sandbox, "256MiB"));
    let work = sandbox.path("work");
    wait_until("it fetches", || {
        let demos = fs::read_dir(&work).expect("a folder");
        demos
            .flatten()
            .any(|demo| demo.path().join("store").exists())
    });

    let pid = nix::unistd::Pid::from_raw(i32::try_from(running.pid()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("it lives");
    let ran = running.finish();

    assert_eq!(ran.code, Some(130), "{ran:?}");
    nothing_is_left(&sandbox);
}

#[test]
fn a_mount_that_fails_leaves_no_directory() {
    let sandbox = Sandbox::new();
    let mut command = demo(&sandbox, "8MiB");
    command
        .arg("--inside")
        .arg(sandbox.path("no such directory"));

    // Where this process may not mount at all, that is its result.
    let ran = run(&mut command);

    assert!(
        ran.code == Some(1) || ran.json()["mounted"] == false,
        "{ran:?}"
    );
    nothing_is_left(&sandbox);
}
