//! One node: a hub, a daemon, a plugin in a mount namespace of its own, and a client that calls as kubelet does.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use weightd_proto::csi::v1 as csi;
use weightd_proto::csi::v1::node_client::NodeClient;
use weightd_proto::weightd::v1::control_client::ControlClient;
use weightd_standin::{Files, Hub, HubConfig, Repo, generate};

/// A process that is killed when the test ends.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.spawn().expect("it starts"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// SIGKILL, and wait.
    pub(crate) fn kill(&mut self) {
        self.0.kill().expect("it can be killed");
        self.0.wait().expect("it ends");
    }

    /// Its exit code, once it has ended by itself.
    pub(crate) async fn exit_code(&mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().expect("it can be waited for") {
                return status.code();
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "it does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether it dies by SIGKILL on its own, as at a fault point. Its sockets close a moment before that.
    pub(crate) async fn dies(&mut self) -> bool {
        let begun = Instant::now();
        loop {
            let status = self.0.try_wait().expect("it can be waited for");
            if status.is_some() || begun.elapsed() > Duration::from_secs(20) {
                return status.is_some_and(|status| status.signal() == Some(9));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A mount namespace, and a user namespace where the test is not root. It lives as long as this does.
pub(crate) struct Namespace {
    keeper: Running,
    root: bool,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let root = nix::unistd::geteuid().is_root();
        let mut command = Command::new("unshare");
        if !root {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--mount", "--propagation", "private", "--"]);
        command.args(["sh", "-c", "echo ready; exec sleep infinity"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut keeper = Running::start(&mut command);
        let mut line = String::new();
        let out = keeper.0.stdout.take().expect("piped");
        let read = BufReader::new(out).read_line(&mut line);
        let told = read.is_ok() && line == "ready\n";
        assert!(
            told,
            "no namespace can be made: root, or user namespaces, are needed (util-linux: unshare)"
        );
        Self { keeper, root }
    }

    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.keeper.pid()));
        if !self.root {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.arg("--mount").arg("--").arg(program);
        command
    }

    /// As the node has kubelet's directory: a mount in a container that has it too, with `Bidirectional`
    /// propagation, appears on the node.
    pub(crate) fn share(&self, dir: &Path) {
        let mut command = self.command(Path::new("sh"));
        let script = "mount --bind \"$1\" \"$1\" && mount --make-shared \"$1\"";
        let status = command.args(["-c", script, "share"]).arg(dir).status();
        assert!(status.expect("mount runs").success());
    }

    /// The same in a mount namespace of its own, as a container has one.
    pub(crate) fn container(&self, program: &Path) -> Command {
        let mut command = self.command(Path::new("unshare"));
        command.args(["--mount", "--propagation", "unchanged", "--"]);
        command.arg(program);
        command
    }

    /// `path` as the namespace sees it.
    pub(crate) fn see(&self, path: &Path) -> PathBuf {
        let below = path.strip_prefix("/").expect("an absolute path");
        Path::new(&format!("/proc/{}/root", self.keeper.pid())).join(below)
    }
}

/// What a pod asks for.
#[derive(Clone)]
pub(crate) struct Ask {
    /// The pod's uid.
    pub(crate) pod: String,
    pub(crate) name: String,
    pub(crate) attributes: HashMap<String, String>,
    pub(crate) secrets: HashMap<String, String>,
    pub(crate) namespace: String,
}

impl Ask {
    pub(crate) fn new(pod: &str, attributes: &[(&str, &str)]) -> Self {
        Self {
            pod: pod.to_owned(),
            name: "pod".to_owned(),
            attributes: map(attributes),
            secrets: HashMap::new(),
            namespace: "team-a".to_owned(),
        }
    }

    pub(crate) fn model(pod: &str, source: &str) -> Self {
        Self::new(pod, &[("source", source)])
    }

    pub(crate) fn secret(mut self, key: &str, value: &str) -> Self {
        self.secrets.insert(key.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    pub(crate) fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }
}

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

pub(crate) struct Node {
    pub(crate) hub: Hub,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) daemon: Option<Running>,
    pub(crate) plugin: Option<Running>,
    pub(crate) plugin_options: Vec<String>,
    pub(crate) plugin_environment: Vec<(String, String)>,
    pub(crate) config: String,
    pub(crate) environment: Vec<(String, String)>,
    namespace: Namespace,
}

fn binary(name: &str) -> PathBuf {
    // `cargo test --workspace` puts all binaries beside each other.
    let plugin = Path::new(env!("CARGO_BIN_EXE_weightd-csi"));
    let path = plugin.with_file_name(name);
    assert!(
        path.exists(),
        "{} is missing: `cargo build -p weightd` makes it",
        path.display()
    );
    path
}

impl Node {
    /// A hub that has `org/model`, and nothing started yet.
    pub(crate) fn new(config: HubConfig) -> Self {
        let hub = Hub::spawn_thread(config).expect("a hub");
        hub.add_repo(Repo::new("org/model").commit("main", files(1)));
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(dir.path().join("kubelet/pods")).expect("kubelet's directory");
        let namespace = Namespace::new();
        namespace.share(&dir.path().join("kubelet"));
        Self {
            hub,
            dir,
            daemon: None,
            plugin: None,
            plugin_options: Vec::new(),
            plugin_environment: Vec::new(),
            config: String::new(),
            environment: Vec::new(),
            namespace,
        }
    }

    /// The same, with daemon and plugin running.
    pub(crate) async fn running() -> Self {
        let mut node = Self::new(HubConfig::default());
        node.start().await;
        node
    }

    pub(crate) async fn start(&mut self) {
        self.start_daemon().await;
        self.start_plugin().await;
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.path("store")
    }

    fn log(&self, name: &str) -> Stdio {
        let path = self.path(&format!("{name}.log"));
        let file = fs::File::options().create(true).append(true).open(path);
        file.expect("a log").into()
    }

    /// What both processes logged.
    pub(crate) fn logs(&self) -> String {
        let read = |name| fs::read_to_string(self.path(name)).unwrap_or_default();
        read("weightd.log") + &read("weightd-csi.log")
    }

    pub(crate) async fn start_daemon(&mut self) {
        self.start_daemon_with(&[]).await;
    }

    pub(crate) fn spawn_daemon(&mut self, environment: &[(&str, &str)]) {
        let config = self.path("weightd.toml");
        let text = format!(
            "root = {:?}\nsocket = {:?}\n{}",
            self.root(),
            self.path("weightd.sock"),
            self.config
        );
        fs::write(&config, text).expect("a configuration");
        let mut command = Command::new(binary("weightd"));
        command.arg("--config").arg(config).env_clear();
        command.env("HF_ENDPOINT", self.hub.endpoint());
        command
            .env("HOME", self.dir.path())
            .env("AWS_EC2_METADATA_DISABLED", "true");
        let own = self.environment.iter();
        command.envs(own.map(|(key, value)| (key.as_str(), value.as_str())));
        command.envs(environment.iter().copied());
        command.stderr(self.log("weightd")).stdin(Stdio::null());
        self.daemon = Some(Running::start(&mut command));
    }

    pub(crate) async fn start_daemon_with(&mut self, environment: &[(&str, &str)]) {
        self.spawn_daemon(environment);
        let begun = Instant::now();
        while self.control().await.is_none() {
            assert!(begun.elapsed() < Duration::from_secs(30), "{}", self.logs());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The daemon's own interface, if it answers.
    pub(crate) async fn control(&self) -> Option<ControlClient<Channel>> {
        let mut client = ControlClient::new(connect(&self.path("weightd.sock")).await?);
        let version = weightd_proto::weightd::v1::VersionRequest {};
        client.version(version).await.ok()?;
        Some(client)
    }

    pub(crate) async fn start_plugin(&mut self) {
        let mut command = self
            .namespace
            .container(Path::new(env!("CARGO_BIN_EXE_weightd-csi")));
        let socket = self.path("csi.sock");
        command.arg(format!("--endpoint=unix://{}", socket.display()));
        command.args(["--node-id", "node-1", "--daemon-socket"]);
        command.arg(self.path("weightd.sock"));
        let option = |name: &str| self.plugin_options.iter().any(|own| own.starts_with(name));
        if !option("--kubelet-dir") {
            command.arg("--kubelet-dir").arg(self.path("kubelet"));
        }
        command.args(&self.plugin_options).env_clear();
        let own = self.plugin_environment.iter();
        command.envs(own.map(|(key, value)| (key.as_str(), value.as_str())));
        command.stderr(self.log("weightd-csi")).stdin(Stdio::null());
        self.plugin = Some(Running::start(&mut command));
        let begun = Instant::now();
        while connect(&socket).await.is_none() {
            assert!(begun.elapsed() < Duration::from_secs(30), "{}", self.logs());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn kill_daemon(&mut self) {
        self.daemon.take().expect("it runs").kill();
    }

    pub(crate) fn kill_plugin(&mut self) {
        self.plugin.take().expect("it runs").kill();
    }

    pub(crate) async fn client(&self) -> NodeClient<Channel> {
        NodeClient::new(
            connect(&self.path("csi.sock"))
                .await
                .expect("the plugin answers"),
        )
    }

    /// Where kubelet has the volume of a pod.
    pub(crate) fn target(&self, pod: &str) -> PathBuf {
        let pods = self.path("kubelet/pods");
        let pods = pods.canonicalize().expect("kubelet's directory");
        pods.join(pod).join("volumes/kubernetes.io~csi/model/mount")
    }

    /// The mounted tree of a pod, as the node sees it.
    pub(crate) fn tree(&self, pod: &str) -> PathBuf {
        self.namespace.see(&self.target(pod))
    }

    pub(crate) fn request(&self, ask: &Ask) -> csi::NodePublishVolumeRequest {
        use csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode};
        let target = self.target(&ask.pod);
        // As kubelet does: the parent is there, the target is not.
        fs::create_dir_all(target.parent().expect("a parent")).expect("kubelet's directory");
        let mut context = ask.attributes.clone();
        let (uid, namespace) = (ask.pod.as_str(), ask.namespace.as_str());
        for (key, value) in [
            ("pod.uid", uid),
            ("pod.name", ask.name.as_str()),
            ("pod.namespace", namespace),
            ("serviceAccount.name", "default"),
            ("ephemeral", "true"),
        ] {
            context.insert(format!("csi.storage.k8s.io/{key}"), value.to_owned());
        }
        csi::NodePublishVolumeRequest {
            volume_id: format!("csi-{}", ask.pod),
            target_path: target.display().to_string(),
            readonly: true,
            volume_capability: Some(csi::VolumeCapability {
                access_mode: Some(AccessMode {
                    mode: access_mode::Mode::SingleNodeWriter.into(),
                }),
                access_type: Some(AccessType::Mount(MountVolume::default())),
            }),
            volume_context: context,
            secrets: ask.secrets.clone(),
            ..csi::NodePublishVolumeRequest::default()
        }
    }

    pub(crate) async fn publish(&self, ask: &Ask) -> Result<(), Status> {
        let mut client = self.client().await;
        let request = self.request(ask);
        client.node_publish_volume(request).await.map(drop)
    }

    /// Publishes, and repeats it as kubelet does while the answer says that it is worth it.
    pub(crate) async fn mounts(&self, ask: &Ask) {
        for _ in 0..60 {
            match self.publish(ask).await {
                Ok(()) => return,
                Err(status) if matches!(status.code(), Code::Aborted | Code::Unavailable) => {}
                Err(status) => panic!("{status}\n{}", self.logs()),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("not mounted\n{}", self.logs());
    }

    pub(crate) async fn unpublish(&self, pod: &str) -> Result<(), Status> {
        let mut client = self.client().await;
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: self.target(pod).display().to_string(),
        };
        client.node_unpublish_volume(request).await.map(drop)
    }

    /// What is mounted below kubelet's directory, as the kernel lists it.
    pub(crate) fn mounted(&self) -> Vec<String> {
        let path = format!("/proc/{}/mountinfo", self.namespace.keeper.pid());
        let text = fs::read_to_string(path).expect("mountinfo");
        let pods = self.path("kubelet/pods").canonicalize().expect("pods");
        let pods = pods.display().to_string();
        let below = text.lines().filter(|line| line.contains(&pods));
        below.map(str::to_owned).collect()
    }

    /// Who holds what, as the store has it on disk.
    pub(crate) fn pins(&self) -> Vec<String> {
        let mut pins = Vec::new();
        for kind in ["pins/csi", "volumes/csi"] {
            let Ok(entries) = fs::read_dir(self.root().join(kind)) else {
                continue;
            };
            pins.extend(entries.map(|entry| {
                let name = entry.expect("an entry").file_name();
                format!("{kind}/{}", name.to_string_lossy())
            }));
        }
        pins.sort();
        pins
    }

    /// Runs a program where the pods' volumes are mounted.
    pub(crate) fn inside(&self, program: &str) -> Command {
        self.namespace.command(Path::new(program))
    }

    /// `weightctl wait` for a pod's volume, as the pod's container runs it.
    pub(crate) fn wait_for(&self, pod: &str, words: &[&str]) -> Command {
        let mut command = self.namespace.command(&binary("weightctl"));
        command
            .arg("wait")
            .arg("--dir")
            .arg(self.target(pod))
            .args(words);
        command
    }

    /// `weightctl` on the daemon's socket.
    pub(crate) fn weightctl_command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(binary("weightctl"));
        command.arg("--socket").arg(self.path("weightd.sock"));
        command.args(["--output", "json"]).args(words);
        command
    }

    /// `weightctl` on the daemon's store, but without the daemon.
    pub(crate) fn embedded(&self, words: &[&str]) -> Command {
        let mut command = Command::new(binary("weightctl"));
        let own = self.environment.iter();
        command.envs(own.map(|(key, value)| (key.as_str(), value.as_str())));
        command.arg("--root").arg(self.root());
        command.args(["--output", "json"]).args(words);
        command
    }

    /// What `weightctl` prints when it succeeds.
    pub(crate) fn weightctl(&self, words: &[&str]) -> Value {
        let output = self.weightctl_command(words).output();
        let output = output.expect("weightctl runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {error}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Waits until `done`, or fails with the logs.
    pub(crate) async fn until(&self, what: &str, mut done: impl AsyncFnMut() -> bool) {
        let begun = Instant::now();
        while !done().await {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "waited in vain until {what}\n{:?}\n{:?}\n{}",
                self.mounted(),
                self.pins(),
                self.logs()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

pub(crate) async fn connect(socket: &Path) -> Option<Channel> {
    let socket = socket.to_owned();
    // The address is not used: the connector goes to the socket.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .ok()
}

/// A model of two shards and small files.
pub(crate) fn files(seed: u64) -> Files {
    Files::new().model(generate::model(seed, 2, 1_000_000))
}

/// What [`files`] holds.
pub(crate) fn contents(seed: u64) -> Vec<(String, Vec<u8>)> {
    let files = generate::model(seed, 2, 1_000_000).into_iter();
    let mut files: Vec<_> = files.map(|(path, bytes)| (path, bytes.to_vec())).collect();
    files.sort();
    files
}

/// All regular files below `dir`: relative path and bytes, sorted.
pub(crate) fn tree(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let (mut files, mut folders) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a directory") {
            let path = entry.expect("an entry").path();
            if fs::symlink_metadata(&path).expect("metadata").is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(dir).expect("below");
            let mut bytes = Vec::new();
            let mut file = fs::File::open(&path).expect("readable");
            file.read_to_end(&mut bytes).expect("readable");
            files.push((name.to_str().expect("UTF-8").to_owned(), bytes));
        }
    }
    files.sort();
    files
}
