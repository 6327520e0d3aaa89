//! Models that are read into the page cache once they are published.

use std::fs::File;
use std::path::Path;

use serde_json::Value;
use weightd_core::page_cache;
use weightd_standin::{Files, Hub, HubConfig, Repo, generate};

use super::harness::{Ran, Running, Sandbox, run, tree, wait_until};

fn hub() -> Hub {
    let hub = Hub::spawn_thread(HubConfig::default()).expect("a hub");
    let files = Files::new().model(generate::model(1, 2, 3_000_000));
    hub.add_repo(Repo::new("org/model").commit("main", files));
    hub
}

/// Drops the model from the page cache. False if this file system keeps it there.
fn drop_cached(dir: &Path) -> bool {
    let files = tree(dir).into_iter().map(|(path, _)| dir.join(path));
    let files: Vec<File> = files.map(|path| File::open(path).expect("there")).collect();
    let resident = |file: &File| {
        page_cache::drop_cached(file).expect("asked");
        page_cache::resident(file, 0, u64::MAX).expect("asked")
    };
    files.iter().map(resident).sum::<u64>() == 0
}

#[test]
fn prefetch_reads_what_is_cold_and_says_how_much_is_warm() {
    let (hub, sandbox) = (hub(), Sandbox::new());
    let endpoint = hub.endpoint();
    let environment = [("HF_ENDPOINT", endpoint.as_str())];
    let plain = sandbox
        .run(&environment, &["prefetch", "hf://org/model"])
        .json();
    assert_eq!(plain["warming"], Value::Null, "nobody asked for it");
    let path = plain["path"].as_str().expect("a path");
    let is_cold = drop_cached(Path::new(path));

    let warm = sandbox
        .run(&environment, &["prefetch", "hf://org/model", "--warm"])
        .json();
    let again = sandbox
        .run(&environment, &["prefetch", "hf://org/model", "--warm"])
        .json();

    let expected = if is_cold {
        warm["bytes"].clone()
    } else {
        0.into()
    };
    assert_eq!(warm["warming"]["bytes_read"], expected, "{warm}");
    for done in [&warm, &again] {
        assert_eq!(done["warming"]["state"], "warm", "{done}");
        assert_eq!(done["warming"]["bytes_warm"], done["bytes"], "{done}");
    }
    assert_eq!(again["warming"]["bytes_read"], 0, "{again}");
}

#[test]
fn people_are_told_too() {
    let (hub, sandbox) = (hub(), Sandbox::new());
    let mut command = sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
    command
        .env("HF_ENDPOINT", hub.endpoint())
        .arg("--root")
        .arg(sandbox.root());

    let ran = run(command.args(["prefetch", "hf://org/model", "--warm"]));

    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("are in the page cache\n"), "{ran:?}");
}

struct Daemon {
    hub: Hub,
    sandbox: Sandbox,
}

impl Daemon {
    fn new() -> Self {
        Self {
            hub: hub(),
            sandbox: Sandbox::new(),
        }
    }

    fn start(&self, settings: &str) -> Running {
        let (root, socket) = (self.sandbox.root(), self.sandbox.path("weightd.sock"));
        let file = self.sandbox.path("weightd.toml");
        let text = format!("root = {root:?}\nsocket = {socket:?}\n{settings}");
        std::fs::write(&file, text).expect("written");
        let mut command = self.sandbox.bare(env!("CARGO_BIN_EXE_weightd"));
        command
            .arg("--config")
            .arg(file)
            .env("HF_ENDPOINT", self.hub.endpoint());
        let running = Running::start(&mut command);
        wait_until("the daemon answers", || {
            self.ask(&["status"]).code == Some(0)
        });
        running
    }

    fn ask(&self, words: &[&str]) -> Ran {
        let mut command = self.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
        command
            .arg("--socket")
            .arg(self.sandbox.path("weightd.sock"));
        run(command.args(["--output", "json"]).args(words))
    }

    fn warmings(&self) -> Vec<Value> {
        let status = self.ask(&["status"]).json();
        status["warmings"].as_array().expect("an array").clone()
    }
}

#[test]
fn a_daemon_warms_what_its_configuration_says_and_tells_of_it() {
    let daemon = Daemon::new();
    let running = daemon.start("[[prefetch]]\nmodel = 'hf://org/model'\nwarm = true\n");

    wait_until("it is warm", || {
        daemon
            .warmings()
            .iter()
            .any(|warming| warming["state"] == "warm")
    });

    let warmings = daemon.warmings();
    assert_eq!(warmings.len(), 1, "{warmings:?}");
    assert_eq!(
        warmings[0]["bytes_warm"], warmings[0]["bytes"],
        "{warmings:?}"
    );
    assert_eq!(daemon.ask(&["rm", "hf://org/model"]).code, Some(0));
    assert!(daemon.warmings().is_empty(), "it is gone");
    drop(running);
}

#[test]
fn a_daemon_that_is_told_to_end_does_not_wait_for_what_it_warms() {
    let daemon = Daemon::new();
    let mut running =
        daemon.start("[warm]\nbytes_per_second = '1MiB'\n[shutdown]\ndeadline = '15s'\n");
    let plain = daemon.ask(&["prefetch", "hf://org/model"]).json();
    if !drop_cached(Path::new(plain["path"].as_str().expect("a path"))) {
        return;
    }
    let mut client = daemon.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
    client
        .arg("--socket")
        .arg(daemon.sandbox.path("weightd.sock"));
    let client =
        Running::start(client.args(["--output", "json", "prefetch", "hf://org/model", "--warm"]));
    wait_until("it reads", || {
        daemon
            .warmings()
            .iter()
            .any(|warming| warming["state"] == "reading")
    });
    // Whoever looks for the model has it all the while.
    assert_eq!(
        daemon.ask(&["path", "hf://org/model"]).json()["path"],
        plain["path"]
    );

    let begun = std::time::Instant::now();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(running.pid()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it lives");

    assert_eq!(running.finish().code, Some(0));
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    let told = client.finish().json();
    assert_eq!(told["warming"]["state"], "stopped", "{told}");
}
