//! `weightctl doctor`: what it says of set-ups that are well and of such that are not.

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use weightd_standin::{Hub, HubConfig};

use super::harness::{Ran, Running, Sandbox, everything, run, wait_until};

const SECRET: &str = "hf_doNotShowThisToken";

pub(super) struct Node {
    hub: Hub,
    pub(super) sandbox: Sandbox,
}

/// What `doctor` printed, and how it ended.
pub(super) struct Report {
    pub(super) ran: Ran,
    findings: Vec<Value>,
}

impl Node {
    pub(super) fn new() -> Self {
        Self {
            hub: Hub::spawn_thread(HubConfig::default()).expect("a hub"),
            sandbox: Sandbox::new(),
        }
    }

    /// A command that knows this node's Hub, and no store.
    fn bare(&self, program: &str) -> Command {
        let mut command = self.sandbox.bare(program);
        command.env("HF_ENDPOINT", self.hub.endpoint());
        command
    }

    /// `weightctl --output json doctor` with these words.
    pub(super) fn doctor(&self, words: &[&str]) -> Report {
        let mut command = self.bare(env!("CARGO_BIN_EXE_weightctl"));
        Report::of(command.args(["--output", "json", "doctor"]).args(words))
    }

    /// The same, of the sandbox's store.
    fn of_store(&self) -> Report {
        self.doctor(&["--root", text(&self.sandbox.root())])
    }
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

impl Report {
    #[track_caller]
    fn of(command: &mut Command) -> Self {
        let ran = run(command);
        let findings: Vec<Value> =
            serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
        for finding in &findings {
            let level = finding["level"].as_str().expect("a level");
            assert!(["ok", "warn", "error"].contains(&level), "{finding}");
            assert!(finding["check"].is_string() && finding["found"].is_string());
            let hint = &finding["hint"];
            assert!(
                hint.is_string() || (level == "ok" && hint.is_null()),
                "{finding}"
            );
            assert_eq!(
                finding.as_object().expect("an object").len(),
                4,
                "{finding}"
            );
        }
        let errors = findings.iter().any(|finding| finding["level"] == "error");
        assert_eq!(ran.code, Some(i32::from(errors)), "{ran:?}");
        Self { ran, findings }
    }

    /// The level of the first finding of `check`.
    #[track_caller]
    pub(super) fn level(&self, check: &str) -> &str {
        self.finding(check)["level"].as_str().expect("a level")
    }

    #[track_caller]
    pub(super) fn finding(&self, check: &str) -> &Value {
        let found = self
            .findings
            .iter()
            .find(|finding| finding["check"] == check);
        found.unwrap_or_else(|| panic!("no finding of {check}: {:?}", self.ran))
    }

    /// Checks that `check` is an error that says all of `words`.
    #[track_caller]
    pub(super) fn error(&self, check: &str, words: &[&str]) {
        let finding = self.finding(check);
        assert_eq!(finding["level"], "error", "{finding}");
        let text = format!("{} {}", finding["found"], finding["hint"]);
        for word in words {
            assert!(text.contains(word), "`{word}` is missing: {finding}");
        }
    }
}

#[test]
fn a_store_of_ones_own_is_well() {
    let node = Node::new();
    let model = node.sandbox.path("model");
    fs::create_dir(&model).expect("a directory");
    fs::write(model.join("config.json"), "{}").expect("a file");
    let source = format!("file://{}", model.display());
    node.sandbox.run(&[], &["prefetch", &source]).json();
    let before = everything(&node.sandbox.root());

    let report = node.of_store();

    assert_eq!(report.ran.code, Some(0), "{:?}", report.ran);
    for check in [
        "store-root",
        "store-format",
        "store-hard-links",
        "hub",
        "hub-token",
        "s3",
        "clock",
    ] {
        assert_eq!(report.level(check), "ok", "{}", report.finding(check));
    }
    assert_eq!(
        everything(&node.sandbox.root()),
        before,
        "a probe was left behind"
    );
}

#[test]
fn a_store_that_is_not_there_yet_is_not_made() {
    let node = Node::new();
    let report = node.of_store();
    assert_eq!(report.ran.code, Some(0), "{:?}", report.ran);
    assert_eq!(report.level("store-format"), "ok");
    assert!(!node.sandbox.root().exists());
}

#[test]
fn text_has_a_line_for_each_finding_and_one_for_its_hint() {
    let node = Node::new();
    fs::write(node.sandbox.root(), "a file").expect("a file");
    let mut command = node.bare(env!("CARGO_BIN_EXE_weightctl"));

    let ran = run(command.arg("--root").arg(node.sandbox.root()).arg("doctor"));

    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(ran.stderr, "", "what was found is told on stdout alone");
    let mut lines = ran.stdout.lines();
    let first = lines.next().expect("a line");
    assert!(first.starts_with("error  store-root: "), "{ran:?}");
    assert!(
        lines.next().expect("a hint").starts_with("       hint: "),
        "{ran:?}"
    );
    assert!(ran.stdout.contains("\nok     clock: "), "{ran:?}");
}

#[test]
fn a_store_of_a_newer_format_or_of_somebody_else_is_an_error() {
    let node = Node::new();
    fs::create_dir(node.sandbox.root()).expect("a directory");
    fs::write(node.sandbox.root().join("FORMAT"), "weightd store 7\n").expect("a file");
    node.of_store().error(
        "store-format",
        &["format 7", "format 1", "version of weightd"],
    );
    fs::remove_file(node.sandbox.root().join("FORMAT")).expect("removed");
    fs::write(node.sandbox.root().join("thesis"), "").expect("a file");
    node.of_store()
        .error("store-format", &["not a weightd store", "empty"]);
}

#[test]
fn a_store_that_cannot_be_written_is_an_error() {
    let node = Node::new();
    fs::write(node.sandbox.path("file"), "").expect("a file");
    let below_a_file = node.sandbox.path("file/store");
    let report = node.doctor(&["--root", text(&below_a_file)]);
    report.error("store-root", &["file/store", "--root"]);
    if nix::unistd::geteuid().is_root() {
        return; // For root, modes do not count.
    }
    fs::create_dir(node.sandbox.root()).expect("a directory");
    fs::set_permissions(node.sandbox.root(), Permissions::from_mode(0o555)).expect("a mode");
    node.of_store()
        .error("store-root", &["cannot be written", "--root"]);
}

#[test]
fn a_daemon_that_is_named_has_to_answer() {
    let node = Node::new();
    let socket = node.sandbox.path("weightd.sock");
    let words = ["--socket", text(&socket)];

    let report = node.doctor(&words);
    report.error("daemon", &["no socket", "start weightd"]);
    assert_eq!(report.level("store-root"), "warn");

    drop(UnixListener::bind(&socket).expect("a socket"));
    node.doctor(&words)
        .error("daemon", &["nobody serves", "start weightd"]);
    fs::remove_file(&socket).expect("removed");

    let mut command = node.bare(env!("CARGO_BIN_EXE_weightd"));
    command.arg("--root").arg(node.sandbox.root());
    let _running = Running::start(command.arg("--socket").arg(&socket));
    wait_until("the daemon answers", || {
        node.doctor(&words).level("daemon") == "ok"
    });
    let report = node.doctor(&words);
    let found = report.finding("daemon")["found"].as_str().expect("text");
    assert!(found.contains(env!("CARGO_PKG_VERSION")), "{found}");
    let root = report.finding("store-root")["found"]
        .as_str()
        .expect("text");
    assert!(
        root.contains(text(&node.sandbox.root())),
        "the daemon's store is meant: {root}"
    );
}

#[test]
fn the_daemons_settings_say_what_is_checked() {
    let node = Node::new();
    let (file, root) = (node.sandbox.path("weightd.toml"), node.sandbox.root());
    let socket = node.sandbox.path("none.sock");
    let settings = format!(
        "root = '{}'\nsocket = '{}'\n",
        root.display(),
        socket.display()
    );
    fs::write(&file, &settings).expect("a file");

    let report = node.doctor(&["--config", text(&file)]);
    assert_eq!(report.level("config"), "ok");
    assert!(
        report.finding("store-root")["found"]
            .to_string()
            .contains(text(&root))
    );
    report.error("daemon", &["none.sock"]);

    fs::write(&file, format!("{settings}rooot = 1\n")).expect("a file");
    let report = node.doctor(&["--config", text(&file), "--root", text(&root)]);
    report.error("config", &["unknown field `rooot`", "--check-config"]);
}

#[test]
fn a_token_that_all_can_read_is_worth_a_warning_and_never_shown() {
    let node = Node::new();
    let token = node.sandbox.path("token");
    fs::write(&token, SECRET).expect("a file");
    let look = |mode: u32, output: &str| {
        fs::set_permissions(&token, Permissions::from_mode(mode)).expect("a mode");
        let mut command = node.bare(env!("CARGO_BIN_EXE_weightctl"));
        command
            .env("HF_TOKEN_PATH", &token)
            .arg("--root")
            .arg(node.sandbox.root());
        command.args(["--output", output, "-vv", "doctor"]);
        let ran = run(&mut command);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(!format!("{ran:?}").contains(SECRET), "the token is shown");
        ran.stdout
    };
    assert!(look(0o644, "text").contains("warn   hub-token: "));
    assert!(look(0o644, "json").contains("chmod 600"));
    assert!(look(0o600, "text").contains("ok     hub-token: "));
    let sent = node.hub.requests();
    assert!(
        !sent.is_empty()
            && sent
                .iter()
                .all(|request| !format!("{request:?}").contains(SECRET))
    );
    fs::write(&token, format!("{SECRET} and more")).expect("a file");
    let mut command = node.bare(env!("CARGO_BIN_EXE_weightctl"));
    command
        .env("HF_TOKEN_PATH", &token)
        .args(["--output", "json", "doctor"]);
    let report = Report::of(command.arg("--root").arg(node.sandbox.root()));
    report.error("hub-token", &["something else than a token"]);
    assert!(
        !format!("{:?}", report.ran).contains(SECRET),
        "the token is shown"
    );
}

#[test]
fn a_hub_that_somebody_named_has_to_answer() {
    let node = Node::new();
    let mut command = node.sandbox.weightctl();
    command
        .env("HF_ENDPOINT", "http://127.0.0.1:1")
        .arg("doctor");
    Report::of(&mut command).error("hub", &["127.0.0.1:1", "connection refused", "HTTPS_PROXY"]);
}

#[test]
fn s3_is_looked_at_if_something_is_said_of_it() {
    let node = Node::new();
    let look = |variables: &[(&str, &str)]| {
        let mut command = node.sandbox.weightctl();
        command
            .env("HF_ENDPOINT", node.hub.endpoint())
            .envs(variables.iter().copied());
        Report::of(command.arg("doctor"))
    };
    let keys = [
        ("AWS_ACCESS_KEY_ID", "AKIAX"),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_REGION", "eu-west-1"),
    ];
    let report = look(&keys);
    let found = report.finding("s3");
    assert!(
        found["level"] == "ok" && found["found"].to_string().contains("eu-west-1"),
        "{found}"
    );
    assert!(
        !format!("{:?}", report.ran).contains(SECRET),
        "a key is shown"
    );
    assert_eq!(look(&[("AWS_REGION", "eu-west-1")]).level("s3"), "warn");
    assert_eq!(look(&[]).level("s3"), "ok");
}

#[test]
fn the_shared_tier_is_tried_if_one_is_named() {
    let node = Node::new();
    let shared = node.sandbox.path("shared");
    let root = node.sandbox.root();
    let words = ["--root", text(&root), "--shared-root", text(&shared)];

    node.doctor(&words)
        .error("shared-root", &["is not there", "mountOptions"]);

    fs::create_dir(&shared).expect("a directory");
    let report = node.doctor(&words);
    assert_eq!(report.ran.code, Some(0), "{:?}", report.ran);
    assert_eq!(report.level("shared-format"), "ok");
    let probe = report.finding("shared-probe");
    assert!(probe["found"].to_string().contains("rename"), "{probe}");
    assert_eq!(fs::read_dir(&shared).expect("a directory").count(), 0);

    fs::write(shared.join("FORMAT"), "weightd shared store 9\n").expect("a file");
    let mut command = node.bare(env!("CARGO_BIN_EXE_weightctl"));
    command
        .env("WEIGHTD_SHARED_ROOT", &shared)
        .arg("--root")
        .arg(&root);
    let report = Report::of(command.args(["--output", "json", "doctor"]));
    report.error("shared-format", &["format 9", "format 1"]);

    let report = node.doctor(&["--root", text(&root)]);
    assert_eq!(report.level("shared-root"), "ok", "none is named");
}

/// A file system of FUSE whose server says that it is there, and nothing more. What asks it cannot be killed
/// until it is gone; it goes when this does.
struct Dead {
    at: PathBuf,
    _server: File,
}

impl Drop for Dead {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

impl Dead {
    fn mount(at: &Path) -> std::io::Result<Self> {
        let server = File::options().read(true).write(true).open("/dev/fuse")?;
        let fd = server.as_raw_fd();
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other");
        let kind = Some("fuse");
        mount(
            Some("dead"),
            at,
            kind,
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        // Source: `struct fuse_in_header` and `fuse_init_out` in Linux's uapi/linux/fuse.h, version 7.31.
        let mut question = [0; 1 << 17];
        let read = (&server).read(&mut question)?;
        assert!(read >= 16, "a header of {read} bytes");
        let words: [u32; 20] = [
            80,
            0,
            0,
            0,
            7,
            31,
            0,
            0,
            12 << 16 | 16,
            1 << 17,
            1,
            256,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        let mut answer: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        answer[8..16].copy_from_slice(&question[8..16]);
        (&server).write_all(&answer)?;
        let at = at.to_owned();
        Ok(Self {
            at,
            _server: server,
        })
    }
}

/// The whole of it is done by this very test in a user and a mount namespace.
#[test]
#[allow(clippy::print_stdout, reason = "a check that is left out is told")]
fn a_file_system_that_hangs_is_told_and_does_not_hang_the_doctor() {
    const INSIDE: &str = "WEIGHTD_E2E_DOCTOR";
    const NAME: &str = "e2e::doctor::a_file_system_that_hangs_is_told_and_does_not_hang_the_doctor";
    if std::env::var_os(INSIDE).is_none() {
        let mut again = Command::new("unshare");
        again.args(["--user", "--map-root-user", "--mount", "--"]);
        again.arg(std::env::current_exe().expect("this binary"));
        again
            .args(["--exact", NAME, "--nocapture"])
            .env(INSIDE, "1");
        let ran = again.output();
        let text = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
        match ran {
            Ok(output) if text(&output).contains("the doctor came back") => {}
            Ok(output) if output.status.success() || output.stdout.is_empty() => {
                println!(
                    "left out, for no file system could be mounted: {}",
                    text(&output)
                );
            }
            other => panic!("{other:?}"),
        }
        return;
    }
    let node = Node::new();
    let dead = node.sandbox.path("dead");
    fs::create_dir(&dead).expect("a directory");
    let Ok(_server) = Dead::mount(&dead) else {
        return;
    };
    let below = dead.join("weightd");
    let begun = Instant::now();

    let report = node.doctor(&["--root", text(&below), "--shared-root", text(&below)]);

    report.error("store-root", &["did not answer for 5 s"]);
    report.error(
        "shared-root",
        &["did not answer for 5 s", "lfs check servers"],
    );
    assert_eq!(report.level("hub"), "ok", "the other checks are made");
    assert!(
        begun.elapsed() < Duration::from_secs(60),
        "{:?}",
        begun.elapsed()
    );
    println!("the doctor came back");
}
