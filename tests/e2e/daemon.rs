//! The daemon as an operator sees it: its socket, its signals, its restarts.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use weightd_standin::{Fault, FaultKind, Files, Hub, HubConfig, Origin, Pattern, Repo, generate};

use super::harness::{Ran, Running, Sandbox, assert_sound, run, wait_until};

struct Daemon {
    hub: Hub,
    sandbox: Sandbox,
}

impl Daemon {
    fn new() -> Self {
        let hub = Hub::spawn_thread(HubConfig::default()).expect("a hub");
        hub.add_repo(
            Repo::new("org/model")
                .commit("main", Files::new().model(generate::model(1, 2, 300_000))),
        );
        Self {
            hub,
            sandbox: Sandbox::new(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.sandbox.path("weightd.sock")
    }

    fn command(&self) -> Command {
        let mut command = self.sandbox.bare(env!("CARGO_BIN_EXE_weightd"));
        command
            .arg("--root")
            .arg(self.sandbox.root())
            .arg("--socket")
            .arg(self.socket());
        command.env("HF_ENDPOINT", self.hub.endpoint());
        command
    }

    fn start(&self) -> Running {
        let running = Running::start(&mut self.command());
        wait_until("the daemon answers", || {
            self.ask(&["status"]).code == Some(0)
        });
        running
    }

    /// `weightctl` on the daemon's socket.
    fn client(&self) -> Command {
        let mut command = self.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
        command
            .arg("--socket")
            .arg(self.socket())
            .args(["--output", "json"]);
        command
    }

    fn ask(&self, words: &[&str]) -> Ran {
        run(self.client().args(words))
    }
}

fn terminate(running: &mut Running) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(running.pid()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it lives");
}

#[test]
fn a_command_does_the_same_with_a_daemon() {
    let daemon = Daemon::new();
    let mut running = daemon.start();
    let mode = std::fs::metadata(daemon.socket())
        .expect("the socket")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let fetched = daemon
        .ask(&["prefetch", "hf://org/model", "--pin", "serving"])
        .json();

    assert_eq!(fetched["bytes_fetched"], fetched["bytes"]);
    assert_eq!(
        daemon.ask(&["path", "hf://org/model"]).json()["path"],
        fetched["path"]
    );
    assert_eq!(
        daemon.ask(&["ls"]).json()[0]["pinned_by"][0],
        "operator/serving"
    );
    daemon
        .ask(&["rm", "hf://org/model"])
        .failed(1, &["operator/serving", "unpin"]);
    daemon
        .ask(&["prefetch", "file:///etc"])
        .failed(1, &["denied", "file.allow"]);
    daemon
        .ask(&["prefetch", "hf://org/typo"])
        .failed(1, &["org/typo", "not found"]);
    terminate(&mut running);
    assert_eq!(running.finish().code, Some(0));
    assert!(!daemon.socket().exists());
    daemon
        .ask(&["ls"])
        .failed(3, &["cannot reach the daemon", "hint:"]);
}

#[test]
fn one_socket_has_one_daemon_and_a_dead_ones_is_replaced() {
    let daemon = Daemon::new();
    let mut first = daemon.start();
    let second = run(&mut daemon.command());
    assert_eq!(second.code, Some(1));
    assert!(
        second.stderr.contains("another process serves"),
        "{second:?}"
    );
    first.kill();
    assert!(daemon.socket().exists());
    let _third = daemon.start();
}

#[test]
fn a_daemon_that_ends_leaves_its_successor_the_socket() {
    let daemon = Daemon::new();
    let file = daemon.sandbox.path("weightd.toml");
    let free = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port");
    let settings = format!("[shutdown]\ndeadline = '2s'\n[metrics]\nlisten = '{free}'\n");
    std::fs::write(&file, settings).expect("written");
    let start = || Running::start(daemon.command().arg("--config").arg(&file));
    let mut first = start();
    wait_until("the daemon answers", || {
        daemon.ask(&["status"]).code == Some(0)
    });
    // A client that says nothing keeps it until its deadline.
    let _silent = UnixStream::connect(daemon.socket()).expect("it listens");
    terminate(&mut first);
    wait_until("it listens no more", || {
        UnixStream::connect(daemon.socket()).is_err()
    });

    let _second = start();

    wait_until("the second one answers", || {
        daemon.ask(&["status"]).code == Some(0)
    });
    wait_until("the first one has ended", || first.ended());
    assert!(daemon.socket().exists());
    assert!(get(free, "/healthz").is_some_and(|answer| answer.contains("200")));
}

#[test]
fn a_signal_ends_a_start_cleanly() {
    let daemon = Daemon::new();
    let lock = File::create(daemon.sandbox.path("weightd.sock.lock")).expect("made");
    lock.lock().expect("nobody else has it");
    let mut running = Running::start(&mut daemon.command());
    // It opens the store first, and then waits for the lock.
    wait_until("it has begun", || {
        daemon.sandbox.root().join("FORMAT").exists()
    });

    terminate(&mut running);

    let ran = running.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(!daemon.socket().exists());
}

#[test]
fn users_that_the_settings_name_may_use_the_socket() {
    let daemon = Daemon::new();
    let file = daemon.sandbox.path("weightd.toml");
    let own = nix::unistd::geteuid();
    std::fs::write(&file, "socket_uids = [65533]\n").expect("written");
    let _running = Running::start(daemon.command().arg("--config").arg(&file));
    wait_until("the daemon answers", || {
        daemon.ask(&["status"]).code == Some(0)
    });
    if !own.is_root() {
        return;
    }
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(daemon.sandbox.path(""), open).expect("it is ours");
    // A copy: the other user need not be able to reach this one's build.
    let program = daemon.sandbox.path("weightctl");
    std::fs::copy(env!("CARGO_BIN_EXE_weightctl"), &program).expect("a copy");
    let ask = |uid: u32| {
        let mut client = daemon
            .sandbox
            .bare(program.to_str().expect("a path in UTF-8"));
        client.arg("--socket").arg(daemon.socket()).arg("status");
        run(client.uid(uid))
    };

    assert_eq!(ask(65533).code, Some(0), "{:?}", ask(65533));
    ask(65532).failed(3, &["cannot reach the daemon"]);
}

#[test]
fn a_store_that_cannot_be_swept_is_served_all_the_same() {
    let daemon = Daemon::new();
    let wrong = daemon.sandbox.root().join("known/aa/unreadable");
    drop(daemon.start());
    std::fs::create_dir_all(wrong).expect("made");

    let mut running = daemon.start();
    daemon.ask(&["prefetch", "hf://org/model"]).json();
    terminate(&mut running);

    let ran = running.finish();
    assert_eq!(ran.code, Some(0));
    assert!(ran.stderr.contains("store not swept"), "{ran:?}");
}

#[test]
fn a_daemon_whose_log_nobody_reads_goes_on() {
    let daemon = Daemon::new();
    let mut running = daemon.start();
    running.close_stderr();

    daemon.ask(&["prefetch", "hf://org/model"]).json();
    terminate(&mut running);

    assert_eq!(running.finish().code, Some(0));
}

#[test]
fn a_daemon_without_descriptors_says_so_and_recovers() {
    let daemon = Daemon::new();
    let plain = daemon.command();
    let mut limited = daemon.sandbox.bare("/bin/sh");
    limited.env("HF_ENDPOINT", daemon.hub.endpoint());
    limited.args(["-c", "ulimit -n 64 && exec \"$0\" \"$@\""]);
    limited.arg(plain.get_program()).args(plain.get_args());
    let mut running = Running::start(&mut limited);
    wait_until("the daemon answers", || {
        daemon.ask(&["status"]).code == Some(0)
    });

    let connect = |_| UnixStream::connect(daemon.socket()).expect("it listens");
    let clients: Vec<UnixStream> = (0..100).map(connect).collect();
    std::thread::sleep(Duration::from_millis(500));
    drop(clients);

    wait_until("the daemon answers", || {
        daemon.ask(&["status"]).code == Some(0)
    });
    terminate(&mut running);
    let told = running
        .finish()
        .stderr
        .matches("connection not accepted")
        .count();
    assert!((1..100).contains(&told), "told {told} times");
}

#[test]
fn a_daemon_that_does_not_answer_is_out_of_reach() {
    let daemon = Daemon::new();
    let _silent = UnixListener::bind(daemon.socket()).expect("bound");

    let asked = daemon.ask(&["status"]);

    asked.failed(3, &["cannot reach the daemon", "does not answer"]);
}

#[test]
fn a_result_that_nobody_reads_does_not_change_how_a_command_ends() {
    let daemon = Daemon::new();
    for (models, code) in [
        (&["hf://org/model"][..], 0),
        (&["hf://org/model", "hf://org/typo"], 1),
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = daemon.sandbox.weightctl();
        command.env("HF_ENDPOINT", daemon.hub.endpoint());
        command.arg("prefetch").args(models);

        let status = command.stdout(writer).status().expect("it starts");

        assert_eq!(status.code(), Some(code), "{models:?}");
    }
}

#[test]
fn a_client_that_leaves_cancels_nothing() {
    let daemon = Daemon::new();
    let _running = daemon.start();
    let slow = FaultKind::Slow {
        bytes_per_second: 300_000,
    };
    daemon.hub.fault(Fault::new(slow).on(Origin::Cdn).times(2));
    let mut client = Running::start(daemon.client().args(["prefetch", "hf://org/model"]));
    wait_until("bytes flow", || {
        daemon
            .hub
            .requests()
            .iter()
            .any(|request| request.origin == Origin::Cdn)
    });
    client.kill();
    wait_until("the model is here", || {
        daemon.ask(&["path", "hf://org/model"]).code == Some(0)
    });
}

#[test]
fn a_killed_daemon_goes_on_by_itself_where_it_was() {
    let daemon = Daemon::new();
    let size = 64 << 20;
    let pattern = Pattern::Noise(3);
    let files = Files::new().lfs_pattern("weights.bin", pattern, size, Some(&pattern.sha256(size)));
    daemon
        .hub
        .add_repo(Repo::new("org/large").commit("main", files));
    let slow = Fault::new(FaultKind::Slow {
        bytes_per_second: 8 << 20,
    })
    .on(Origin::Cdn);
    daemon.hub.fault(slow.forever());
    let mut running = daemon.start();
    let _client =
        Running::start(
            daemon
                .client()
                .args(["prefetch", "hf://org/large", "--include", "*"]),
        );
    wait_until("a good part is here", || {
        let status = daemon.ask(&["status"]);
        status.code == Some(0)
            && status.json()["fetches"][0]["bytes_done"].as_u64() > Some(16 << 20)
    });
    running.kill();
    daemon.hub.clear_faults();
    let before = daemon.hub.cdn_bytes_sent();
    let _running = daemon.start();
    wait_until("the model is here", || {
        daemon
            .ask(&["path", "hf://org/large", "--include", "*"])
            .code
            == Some(0)
    });
    assert_sound(&daemon.sandbox.root());
    let sent = daemon.hub.cdn_bytes_sent() - before;
    assert!(sent <= size - (8 << 20), "{sent} bytes were sent again");
}

#[test]
fn a_killed_daemon_does_not_fetch_finished_files_of_an_unfinished_model_again() {
    let daemon = Daemon::new();
    let size = 4 << 20;
    let mut files = Files::new();
    for (seed, name) in [(1, "a.bin"), (2, "b.bin"), (3, "c.bin")] {
        files = files.lfs_pattern(name, Pattern::Noise(seed), size, None);
    }
    daemon
        .hub
        .add_repo(Repo::new("org/parts").commit("main", files));
    let last = "/c.bin";
    let stuck = Fault::new(FaultKind::Slow {
        bytes_per_second: 1000,
    });
    daemon.hub.fault(stuck.on(Origin::Cdn).path(last).forever());
    let mut running = daemon.start();
    let words = ["prefetch", "hf://org/parts", "--include", "*"];
    let _client = Running::start(daemon.client().args(words));
    wait_until("two files are here", || {
        let status = daemon.ask(&["status"]);
        status.code == Some(0) && status.json()["fetches"][0]["files_done"].as_u64() == Some(2)
    });
    running.kill();
    daemon.hub.clear_faults();
    daemon.hub.clear_requests();

    let _running = daemon.start();

    wait_until("the model is here", || {
        daemon
            .ask(&["path", "hf://org/parts", "--include", "*"])
            .code
            == Some(0)
    });
    assert_sound(&daemon.sandbox.root());
    let requests = daemon.hub.requests();
    let of_cdn = requests
        .iter()
        .filter(|request| request.origin == Origin::Cdn);
    let again: Vec<_> = of_cdn
        .filter(|request| !request.path.contains(last))
        .collect();
    assert!(again.is_empty(), "{again:?}");
}

#[test]
fn sigterm_stops_a_fetch_at_once_and_the_next_start_ends_it() {
    let daemon = Daemon::new();
    let slow = Fault::new(FaultKind::Slow {
        bytes_per_second: 100_000,
    })
    .on(Origin::Cdn);
    daemon.hub.fault(slow.forever());
    let mut running = daemon.start();
    let client = Running::start(daemon.client().args(["prefetch", "hf://org/model"]));
    wait_until("bytes flow", || {
        daemon
            .hub
            .requests()
            .iter()
            .any(|request| request.origin == Origin::Cdn)
    });
    terminate(&mut running);
    assert_eq!(running.finish().code, Some(0));
    assert_eq!(client.finish().code, Some(1));
    daemon.hub.clear_faults();
    let _running = daemon.start();
    wait_until("the model is here", || {
        daemon.ask(&["path", "hf://org/model"]).code == Some(0)
    });
}

#[test]
fn an_overdue_scrub_runs_at_start_and_mends_what_went_bad() {
    let daemon = Daemon::new();
    let mark = daemon.sandbox.root().join("scrubbed");
    let mut running = daemon.start();
    let fetched = daemon.ask(&["prefetch", "hf://org/model"]).json();
    wait_until("the store has an age", || mark.exists());
    running.kill();
    let old = SystemTime::now() - Duration::from_secs(8 * 24 * 3600);
    let opened = File::options().write(true).open(&mark).expect("the mark");
    opened.set_modified(old).expect("it is ours");
    let tree = PathBuf::from(fetched["path"].as_str().expect("a path"));
    let shard = tree.join("model-00001-of-00002.safetensors");
    let open = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(&shard, open).expect("it is ours");
    let file = File::options().write(true).open(&shard).expect("a shard");
    file.write_at(b"bad", 200_000).expect("written");
    // The origin is away at first: the damage must be mended when it is back.
    daemon.hub.fault(Fault::status(503).forever());
    let asked = daemon.hub.requests().len();

    let config = daemon.sandbox.path("weightd.toml");
    std::fs::write(&config, "[fetch]\nattempts = 1\n").expect("written");
    let _running = Running::start(daemon.command().arg("--config").arg(&config));
    wait_until("the origin is asked", || {
        daemon.hub.requests().len() > asked
    });
    wait_until("that fetch has failed", || {
        let status = daemon.ask(&["status"]);
        status.code == Some(0) && status.json()["fetches"] == serde_json::json!([])
    });
    assert_eq!(daemon.ask(&["path", "hf://org/model"]).code, Some(1));
    daemon.hub.clear_faults();

    wait_until("the model is mended", || {
        daemon.ask(&["path", "hf://org/model"]).code == Some(0)
    });
    assert_sound(&daemon.sandbox.root());
}

fn get(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: weightd\r\nConnection: close\r\n\r\n"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn metrics_and_health_are_served() {
    let daemon = Daemon::new();
    let free = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port");
    let _running = Running::start(daemon.command().arg("--metrics").arg(free.to_string()));
    wait_until("it is ready", || {
        get(free, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
    });
    assert!(
        get(free, "/healthz")
            .expect("an answer")
            .starts_with("HTTP/1.1 200")
    );
    let fetched = daemon.ask(&["prefetch", "hf://org/model"]).json();
    let absent = daemon.ask(&["prefetch", "hf://org/absent"]);
    assert_eq!(absent.code, Some(1));
    let metrics = get(free, "/metrics").expect("an answer");
    for line in [
        "weightd_fetch_failures_total{source=\"hf\",reason=\"not_found\"} 1".to_owned(),
        format!(
            "weightd_fetch_bytes_total{{source=\"hf\"}} {}",
            fetched["bytes"]
        ),
        format!(
            "weightd_store_bytes{{tier=\"local\",held=\"unpinned\"}} {}",
            fetched["bytes"]
        ),
        "weightd_store_snapshots{tier=\"local\"} 1".to_owned(),
    ] {
        assert!(metrics.contains(&line), "`{line}` is missing: {metrics}");
    }
}

#[test]
fn what_is_configured_is_brought_at_start() {
    let daemon = Daemon::new();
    let file = daemon.sandbox.path("weightd.toml");
    std::fs::write(
        &file,
        "[[prefetch]]\nmodel = 'hf://org/model'\npin = 'warm'\n",
    )
    .expect("written");
    let _running = Running::start(daemon.command().arg("--config").arg(&file));
    wait_until("the model is here", || {
        daemon.ask(&["path", "hf://org/model"]).code == Some(0)
    });
    wait_until("it is pinned", || {
        daemon.ask(&["ls"]).json()[0]["pinned_by"][0] == "operator/warm"
    });
}

#[test]
fn a_wrong_configuration_is_refused_before_anything_is_opened() {
    let daemon = Daemon::new();
    let file = daemon.sandbox.path("weightd.toml");
    for (text, words) in [
        ("rooot = '/x'", "unknown field `rooot`"),
        ("[fetch]\nconnections = 0", "fetch.connections"),
    ] {
        std::fs::write(&file, text).expect("written");
        run(daemon.command().arg("--config").arg(&file)).failed(2, &[words]);
    }
    std::fs::write(
        &file,
        "[hf]\nendpoint = 'http://localhost'\ntoken_file = '/dev/null'\n",
    )
    .expect("written");
    let mut overridden = daemon.command();
    overridden
        .env("HF_ENDPOINT", "nonsense")
        .env("HF_TOKEN", "a b");
    overridden.arg("--config").arg(&file).arg("--check-config");
    assert_eq!(run(&mut overridden).code, Some(0));
    let inside = daemon.sandbox.root().join("shared");
    run(daemon.command().arg("--shared-root").arg(inside)).failed(2, &["shared.root"]);
    assert!(!daemon.sandbox.root().exists() && !daemon.socket().exists());
}
