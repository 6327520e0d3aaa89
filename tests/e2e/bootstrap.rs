//! A node that boots: `weightctl bootstrap` finds its list, waits for its disk, fetches, and hands over.

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use weightd_standin::{Fault, FaultKind, Hub, Origin};

use super::crash::{MIB, Model, hub, sound};
use super::harness::{Ran, Running, Sandbox, run, tree, wait_until};

mod imds;

use imds::{Imds, Manner};

struct Node {
    sandbox: Sandbox,
    hub: Hub,
    model: Model,
}

impl Node {
    fn new() -> Self {
        let node = Self {
            sandbox: Sandbox::new(),
            hub: hub(),
            model: Model::new(0, 1..=3, MIB),
        };
        node.model.publish(&node.hub, "org/model");
        node
    }

    /// One whose origin takes some seconds.
    fn slow() -> Self {
        let node = Self {
            sandbox: Sandbox::new(),
            hub: hub(),
            model: Model::new(0, 1..=3, 8 * MIB),
        };
        node.model.publish(&node.hub, "org/model");
        let slow = FaultKind::Slow {
            bytes_per_second: 2 * MIB,
        };
        node.hub.fault(Fault::new(slow).on(Origin::Cdn).forever());
        node
    }

    fn bootstrap(&self, words: &[&str]) -> Command {
        let mut command = self.sandbox.weightctl();
        command.env("HF_ENDPOINT", self.hub.endpoint());
        command.arg("bootstrap").args(words);
        command
    }

    fn ask(&self, imds: &Imds, words: &[&str]) -> Ran {
        let mut command = self.bootstrap(words);
        command
            .env_remove("AWS_EC2_METADATA_DISABLED")
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.endpoint());
        run(&mut command)
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.sandbox.path(name);
        fs::write(&path, text).expect("written");
        path.display().to_string()
    }

    fn daemon(&self, settings: &str) -> Running {
        let config = self.file("weightd.toml", settings);
        let mut command = self.sandbox.bare(env!("CARGO_BIN_EXE_weightd"));
        command.env("HF_ENDPOINT", self.hub.endpoint());
        command.arg("--root").arg(self.sandbox.root());
        command.arg("--socket").arg(self.sandbox.path("socket"));
        Running::start(command.args(["--config", &config]))
    }

    fn is_here(&self, model: &str) -> bool {
        self.sandbox.run(&[], &["path", model]).code == Some(0)
    }

    #[track_caller]
    fn has_the_model(&self) {
        let path = self.sandbox.run(&[], &["path", "hf://org/model"]).json();
        let path = path["path"].as_str().expect("a path");
        assert!(tree(path.as_ref()) == self.model.tree(), "{path} differs");
        sound(&self.sandbox.root());
    }

    fn has_some_bytes(&self) -> bool {
        let root = self.sandbox.root();
        root.join("staging").exists() && self.model.missing_from(&root) < self.model.shard_bytes()
    }
}

/// What is printed of each model.
#[track_caller]
fn lines(ran: &Ran) -> Vec<Value> {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let lines = ran.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {ran:?}")))
        .collect()
}

#[track_caller]
fn ready(ran: &Ran) -> Vec<String> {
    let ready = |line: &Value| {
        assert_eq!(line["state"], "ready", "{ran:?}");
        line["asked"].as_str().expect("a model").to_owned()
    };
    lines(ran).iter().map(ready).collect()
}

#[track_caller]
fn said(ran: &Ran, words: &[&str]) {
    for word in words {
        assert!(ran.stderr.contains(word), "`{word}` is missing: {ran:?}");
    }
}

fn terminate(process: &mut Running) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(process.pid()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it lives");
}

const USER_DATA: &str = "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"//\"\n\n--//\n\
    Content-Type: text/x-weightd-prefetch\n\n# one model\nhf://org/model@main\n--//\n\
    Content-Type: application/node.eks.aws\n\nkind: NodeConfig\n--//--\n";

#[test]
fn a_list_in_a_file_is_fetched_and_a_second_time_there_is_nothing_to_do() {
    let node = Node::new();
    let list = node.file("list", "# for this node\nhf://org/model\n");

    let first = run(&mut node.bootstrap(&["--file", &list, "--strict"]));
    let second = run(&mut node.bootstrap(&["--file", &list, "--strict"]));

    assert_eq!(ready(&first), ["hf://org/model"]);
    assert_eq!(lines(&first)[0]["bytes_fetched"], lines(&first)[0]["bytes"]);
    assert_eq!(lines(&second)[0]["bytes_fetched"], 0);
    node.has_the_model();
}

#[test]
fn what_is_wrong_is_said_and_the_boot_goes_on() {
    let node = Node::new();
    let list = node.file("list", "org/typo\nhf://org/absent\nhf://org/model\n");

    let ran = run(&mut node.bootstrap(&["--file", &list]));

    said(&ran, &["line 1", "org/typo", "the node boots on"]);
    let lines = lines(&ran);
    assert_eq!(
        (&lines[0]["state"], &lines[0]["model"]),
        (&"failed".into(), &"hf://org/absent".into())
    );
    assert_eq!(lines[1]["state"], "ready", "{lines:?}");
    node.has_the_model();

    let strict = run(&mut node.bootstrap(&["--file", &list, "--strict"]));
    assert_eq!(strict.code, Some(1), "{strict:?}");
    let config = node.file("wrong.toml", "[fetch]\nconnections = 0\n");
    for words in [["--file", "/nowhere"], ["--config", &config]] {
        assert_eq!(run(&mut node.bootstrap(&words)).code, Some(0), "{words:?}");
        let strict = run(node.bootstrap(&words).arg("--strict"));
        assert_eq!(strict.code, Some(1), "{strict:?}");
    }
}

#[test]
fn user_data_names_the_models() {
    let node = Node::new();
    let imds = Imds::start(Manner::default(), &[("user-data", USER_DATA.as_bytes())]);

    let ran = node.ask(&imds, &["--strict"]);

    assert_eq!(ready(&ran), ["hf://org/model@main"]);
    assert_eq!(
        imds.asked(),
        ["PUT /latest/api/token", "GET /latest/user-data"]
    );
}

#[test]
fn tags_name_the_models_when_user_data_does_not() {
    let node = Node::new();
    let tags = "Name\nweightd.prefetch.2\nweightd.prefetch\n";
    let paths: [(&str, &[u8]); 3] = [
        ("meta-data/tags/instance", tags.as_bytes()),
        (
            "meta-data/tags/instance/weightd.prefetch",
            b"hf://org/model",
        ),
        (
            "meta-data/tags/instance/weightd.prefetch.2",
            b"hf://org/model@main, hf://org/model",
        ),
    ];
    let imds = Imds::start(Manner::default(), &paths);

    let ran = node.ask(&imds, &["--strict"]);

    assert_eq!(ready(&ran), ["hf://org/model", "hf://org/model@main"]);
    assert!(imds.asked().contains(&"GET /latest/user-data".to_owned()));

    let only = Imds::start(Manner::default(), &paths);
    node.ask(&only, &["--strict", "--from", "tags"]);
    assert!(!only.asked().contains(&"GET /latest/user-data".to_owned()));
}

#[test]
fn a_file_comes_before_the_metadata_service() {
    let node = Node::new();
    let imds = Imds::start(Manner::default(), &[("user-data", USER_DATA.as_bytes())]);
    let (list, empty) = (
        node.file("list", "hf://org/model"),
        node.file("empty", "# none\n"),
    );

    assert_eq!(
        ready(&node.ask(&imds, &["--file", &list])),
        ["hf://org/model"]
    );
    assert!(imds.asked().is_empty(), "{:?}", imds.asked());
    assert_eq!(
        ready(&node.ask(&imds, &["--file", &empty])),
        ["hf://org/model@main"]
    );
    let told = node.ask(&imds, &["--file", &list, "--from", "user-data,file"]);
    assert_eq!(ready(&told), ["hf://org/model@main"]);
}

#[test]
fn an_instance_that_names_no_model_has_nothing_to_do() {
    let node = Node::new();
    let imds = Imds::start(Manner::default(), &[]);

    let ran = node.ask(&imds, &["--strict"]);

    assert!(lines(&ran).is_empty());
    said(&ran, &["nothing to do"]);
    // The daemon's pod may wait for the directory.
    assert!(node.sandbox.root().join("FORMAT").exists());
}

#[test]
fn a_slow_metadata_service_is_waited_for() {
    let node = Node::new();
    let manner = Manner {
        delay: Duration::from_millis(1500),
        ..Manner::default()
    };
    let imds = Imds::start(manner, &[("user-data", USER_DATA.as_bytes())]);

    assert_eq!(
        ready(&node.ask(&imds, &["--strict"])),
        ["hf://org/model@main"]
    );
}

#[test]
fn a_metadata_service_that_gives_no_token_is_named_with_a_remedy() {
    let node = Node::new();
    for (status, words) in [
        (403, &["forbidden", "httpEndpoint"][..]),
        (405, &["PUT /latest/api/token", "version 2"]),
        (0, &["hops", "httpPutResponseHopLimit", "--file"]),
    ] {
        let manner = Manner {
            no_token: Some(status),
            ..Manner::default()
        };
        let imds = Imds::start(manner, &[("user-data", USER_DATA.as_bytes())]);
        let ran = node.ask(&imds, &[]);
        assert!(lines(&ran).is_empty());
        said(&ran, words);
        said(&ran, &["metadata service", "boots on"]);
        // The tags would need a token, too.
        assert!(
            imds.asked()
                .iter()
                .all(|asked| asked == "PUT /latest/api/token")
        );
    }
    let list = node.file("list", "hf://org/model");
    let mut file_last = node.bootstrap(&["--from", "user-data,tags,file", "--file", &list]);
    assert_eq!(ready(&run(&mut file_last)), ["hf://org/model"]);
    let mut away = node.bootstrap(&["--strict"]);
    away.env_remove("AWS_EC2_METADATA_DISABLED");
    // Port 9 discards; nobody listens.
    let ran = run(away.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9"));
    assert_eq!(ran.code, Some(1), "{ran:?}");
    said(&ran, &["metadata service", "no EC2 instance"]);
    said(
        &run(&mut node.bootstrap(&[])),
        &["AWS_EC2_METADATA_DISABLED"],
    );
}

#[test]
fn user_data_that_is_no_text_is_told() {
    let node = Node::new();
    let imds = Imds::start(
        Manner::default(),
        &[("user-data", &[0x1f, 0x8b, 8, 0, 0xff])],
    );

    let ran = node.ask(&imds, &[]);

    said(&ran, &["user-data", "compressed", "--file"]);
}

#[test]
fn a_directory_is_no_disk() {
    let node = Node::new();
    let list = node.file("list", "hf://org/model");
    let dir = node.sandbox.path("");
    let dir = dir.to_str().expect("UTF-8").trim_end_matches('/');

    let ran = run(&mut node.bootstrap(&["--file", &list, "--wait-for", dir, "--timeout", "1s"]));

    assert!(lines(&ran).is_empty());
    said(&ran, &["no file system is mounted", "instanceStorePolicy"]);
    assert!(!node.sandbox.root().exists(), "it wrote to the root disk");

    let elsewhere = run(&mut node.bootstrap(&["--file", &list, "--wait-for", "/proc"]));
    elsewhere.failed(2, &["does not lie below"]);
}

#[test]
#[allow(clippy::print_stdout, reason = "a check that is left out is told")]
fn a_disk_that_is_mounted_late_is_waited_for() {
    let node = Node::new();
    let list = node.file("list", "hf://org/model");
    let disk = node.sandbox.path("disk");
    fs::create_dir(&disk).expect("made");
    let script = r#"(sleep 1; mount -t tmpfs tmpfs "$1") & shift; "$@"; ls "$DISK/store/FORMAT""#;
    let mut command = node.sandbox.bare("unshare");
    command
        .env("HF_ENDPOINT", node.hub.endpoint())
        .env("DISK", &disk);
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "--",
        "sh",
        "-c",
        script,
        "sh",
    ]);
    command.arg(&disk).arg(env!("CARGO_BIN_EXE_weightctl"));
    command.args([
        "--output",
        "json",
        "bootstrap",
        "--strict",
        "--file",
        &list,
        "--wait-for",
    ]);
    command.arg(&disk).arg("--root").arg(disk.join("store"));

    let ran = run(&mut command);

    if ran.stderr.contains("unshare") {
        return println!("mounts of one's own are not allowed here: {ran:?}");
    }
    assert_eq!(ran.code, Some(0), "{ran:?}");
    said(&ran, &["waiting for a file system", "is mounted, after"]);
    assert!(ran.stdout.contains(r#""state":"ready""#), "{ran:?}");
    assert!(
        !disk.join("store").exists(),
        "it wrote below the mount point"
    );
}

#[test]
fn a_daemon_that_starts_meanwhile_joins_and_each_byte_comes_once() {
    let node = Node::slow();
    let list = node.file("list", "hf://org/model");
    let words = ["--file", &list, "--strict", "--report-every", "200ms"];
    let mut bootstrap = Running::start(&mut node.bootstrap(&words));
    wait_until("some bytes are here", || node.has_some_bytes());

    let mut daemon = node.daemon("[[prefetch]]\nmodel = 'hf://org/model'\npin = 'node'\n");
    let socket = node.sandbox.path("socket");
    wait_until("the daemon is there", || socket.exists());
    assert!(!bootstrap.ended(), "the daemon came too late for this test");
    let ran = bootstrap.finish();

    assert_eq!(ready(&ran), ["hf://org/model"]);
    said(&ran, &[" %), ", "MiB/s", " left"]);
    wait_until("the daemon has it, too", || {
        let ls = node.sandbox.run(&[], &["ls"]).json();
        ls[0]["pinned_by"][0] == "operator/node"
    });
    node.has_the_model();
    assert_eq!(node.hub.cdn_bytes_sent(), node.model.shard_bytes());
    assert!(!daemon.ended());
}

#[test]
fn a_bootstrap_that_is_killed_leaves_its_work_to_the_daemon() {
    let node = Node::slow();
    let list = node.file("list", "hf://org/model");
    let mut bootstrap = Running::start(&mut node.bootstrap(&["--file", &list]));
    wait_until("some bytes are here", || node.has_some_bytes());
    let _daemon = node.daemon("[[prefetch]]\nmodel = 'hf://org/model'\n");
    let socket = node.sandbox.path("socket");
    wait_until("the daemon is there", || socket.exists());
    assert!(!bootstrap.ended(), "it ended too soon for this test");

    bootstrap.kill();

    wait_until("the daemon has it", || node.is_here("hf://org/model"));
    node.has_the_model();
    // Lost with the first: for each of its three connections a block in memory, as much on its way.
    let (sent, all) = (node.hub.cdn_bytes_sent(), node.model.shard_bytes());
    assert!(sent <= all + 3 * 2 * MIB, "{sent} bytes sent for {all}");
}

#[test]
fn a_bootstrap_that_is_stopped_keeps_what_it_has() {
    let node = Node::slow();
    let list = node.file("list", "hf://org/model");
    let mut bootstrap = Running::start(&mut node.bootstrap(&["--file", &list]));
    wait_until("some bytes are here", || node.has_some_bytes());

    terminate(&mut bootstrap);
    let ran = bootstrap.finish();

    assert!(lines(&ran).is_empty());
    said(&ran, &["stopped; what arrived is kept"]);
    // Nobody tells the daemon of the model: it stands in the store.
    let _daemon = node.daemon("");
    wait_until("the daemon has it", || node.is_here("hf://org/model"));
    node.has_the_model();
    let (sent, all) = (node.hub.cdn_bytes_sent(), node.model.shard_bytes());
    assert!(sent <= all + 3 * 2 * MIB, "{sent} bytes sent for {all}");
}

#[test]
fn a_list_that_is_staged_is_fetched_by_the_daemon() {
    let node = Node::new();
    let list = node.file(
        "list",
        "[[prefetch]]\nmodel = 'hf://org/model'\npin = 'boot'\n",
    );

    let mut command = node.bootstrap(&["--file", &list, "--stage", "--strict"]);
    let ran = run(command.env("HF_ENDPOINT", "http://127.0.0.1:9"));

    assert_eq!(lines(&ran)[0]["state"], "staged", "{ran:?}");
    assert!(!node.is_here("hf://org/model"));
    let _daemon = node.daemon("");
    wait_until("the daemon has it", || node.is_here("hf://org/model"));
    let ls = node.sandbox.run(&[], &["ls"]).json();
    assert_eq!(ls[0]["pinned_by"][0], "operator/boot");
}

#[test]
fn an_origin_that_is_away_is_tried_again_and_then_left_to_the_daemon() {
    let node = Node::new();
    let list = node.file("list", "hf://org/model");
    let once = node.file("once.toml", "[fetch]\nattempts = 1\n");
    let words = ["--file", &list, "--config", &once];
    node.hub.fault(Fault::status(503).forever());

    let ran = run(node.bootstrap(&words).args(["--retry-for", "1s"]));

    assert_eq!(lines(&ran)[0]["daemon_goes_on"], true, "{ran:?}");
    let failures = node.hub.faults_fired();
    node.hub.clear_faults();
    let daemon = node.daemon("");
    wait_until("the daemon has it", || node.is_here("hf://org/model"));
    drop(daemon);

    let node = Node::new();
    node.hub.fault(Fault::status(503).times(failures));
    let ran = run(&mut node.bootstrap(&words));
    assert_eq!(ready(&ran), ["hf://org/model"]);
    said(&ran, &["trying again in 5.0 s"]);
}

#[test]
fn it_does_not_guess_where_the_store_is() {
    let node = Node::new();
    let program = env!("CARGO_BIN_EXE_weightctl");
    for (words, said) in [
        (&["bootstrap"][..], "--root DIR"),
        (&["--socket", "/x", "bootstrap"], "not through a daemon"),
        (
            &["--root", "/x", "bootstrap", "--from", "file"],
            "--file FILE",
        ),
    ] {
        run(node.sandbox.bare(program).args(words)).failed(2, &[said]);
    }
}
