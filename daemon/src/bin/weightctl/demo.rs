//! `weightctl demo`: the main job, offline. A generated model is served by a stand-in Hub and an S3 server
//! on loopback, and this very program fetches, mounts, reads and verifies it, as a user would.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use weightd::config::Bytes;
use weightd::process::Signals;
use weightd_core::digest::{Claims, Verifier};
use weightd_core::manifest::Manifest;
use weightd_standin::s3::{PutOptions, S3Config, S3Server};
use weightd_standin::{Files, Hub, HubConfig, Repo, generate};

use crate::output::{self, Output, bytes, seconds};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  weightctl demo
  weightctl demo --size 4GB --dir /mnt/nvme

It needs no network, no daemon and no root. The read-only mount is made in a mount namespace of its own,
where this process may have one; else that step says why it was left out.")]
pub(crate) struct DemoArgs {
    /// Bytes of weights to generate
    #[arg(long, value_name = "SIZE", default_value = "512MiB")]
    size: Bytes,
    /// Work below DIR, and leave nothing there
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Mount and read the tree in DIR; what the demo runs as its last step
    #[arg(long, hide = true, value_name = "DIR")]
    pub(crate) inside: Option<PathBuf>,
}

const SHARDS: u64 = 4;

/// A user's proxy is not asked for origins on loopback. Source: the variables that curl and reqwest read.
const PROXIES: [&str; 6] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// Runs this program on the demo's store, as a user would.
struct User {
    stop: CancellationToken,
    dir: PathBuf,
    root: PathBuf,
    hub: Hub,
    s3: S3Server,
    output: Output,
}

impl User {
    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("--root")
            .arg(&self.root)
            .args(["--output", "json"])
            .args(words);
        command
            .env_remove("HF_TOKEN")
            .env("HF_ENDPOINT", self.hub.endpoint());
        command
            .env("AWS_ENDPOINT_URL_S3", self.s3.endpoint())
            .env("AWS_REGION", "us-east-1");
        command
            .env("AWS_ACCESS_KEY_ID", self.s3.access_key())
            .env("AWS_SECRET_ACCESS_KEY", self.s3.secret_key());
        command
            .env_remove("AWS_SESSION_TOKEN")
            .env_remove("AWS_PROFILE");
        for proxy in PROXIES {
            command.env_remove(proxy);
        }
        // What a killed one leaves goes with the rest.
        command.env("TMPDIR", &self.dir);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(command)
    }

    /// Runs a command to its end and gives its stdout, unless the user interrupts.
    fn run(&self, words: &[&str]) -> Result<(ExitStatus, Vec<u8>)> {
        ensure!(!self.stop.is_cancelled(), "interrupted");
        let command = self.command(words)?;
        Handle::current().block_on(async {
            let mut child = tokio::process::Command::from(command).spawn()?;
            let mut stdout = child.stdout.take().context("its output")?;
            let mut bytes = Vec::new();
            let ended = async {
                stdout.read_to_end(&mut bytes).await?;
                child.wait().await
            };
            let status = tokio::select! {
                status = ended => status?,
                () = self.stop.cancelled() => {
                    // And wait: what still writes cannot be removed.
                    child.kill().await?;
                    bail!("interrupted");
                }
            };
            Ok((status, bytes))
        })
    }

    /// One step: the command, its result, and the time it took.
    fn step(&self, title: &str, words: &[&str]) -> Result<(Value, f64)> {
        self.say(&format!("\n{title}\n$ weightctl {}", words.join(" ")));
        let begun = Instant::now();
        let (status, stdout) = self.run(words)?;
        let took = begun.elapsed().as_secs_f64();
        ensure!(status.success(), "`weightctl {}` failed", words.join(" "));
        let result = serde_json::from_slice(&stdout).context("its result")?;
        Ok((result, took))
    }

    fn say(&self, text: &str) {
        if self.output.is_text() {
            output::note(text);
        }
    }

    fn fetched(&self, result: &Value, took: f64) {
        let number = |key: &str| result[key].as_u64().unwrap_or_default();
        let (fetched, reused) = (number("bytes_fetched"), number("bytes_reused"));
        let rate = bytes((fetched as f64 / took.max(0.001)) as u64);
        self.say(&format!(
            "  {} fetched, verified and synced in {} ({rate}/s); {} was already here",
            bytes(fetched),
            seconds(took),
            bytes(reused),
        ));
    }
}

/// Runs the demo.
pub(crate) async fn run(output: Output, args: &DemoArgs) -> Result<()> {
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let base = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = base.join(format!("weightd-demo-{}", std::process::id()));
    let (work, size, stop) = (dir.clone(), args.size.0, CancellationToken::new());
    let stopped = stop.clone();
    let playing = weightd_core::blocking::run(move || play(output, &work, size, stopped));
    tokio::pin!(playing);
    let outcome = tokio::select! {
        biased;
        () = signals.next() => {
            stop.cancel();
            tokio::select! {
                _ = &mut playing => {}
                () = signals.next() => std::process::exit(130),
            }
            None
        }
        outcome = &mut playing => Some(outcome),
    };
    let cleaned = fs::remove_dir_all(&dir);
    let Some(outcome) = outcome else {
        output::error("interrupted");
        std::process::exit(130);
    };
    let value = outcome?;
    cleaned.with_context(|| format!("cannot remove {}", dir.display()))?;
    output.result(&value, summary)
}

/// The origins, and a user of them.
fn set_up(output: Output, dir: &Path, size: u64, stop: CancellationToken) -> Result<User> {
    let bucket = dir.join("origin/bucket/models/demo");
    fs::create_dir_all(&bucket).with_context(|| format!("cannot create {}", bucket.display()))?;
    let shards = usize::try_from(SHARDS).expect("a handful");
    generate::write_model(&bucket, 1, shards, size / SHARDS)?;
    let user = User {
        stop,
        dir: dir.to_owned(),
        root: dir.join("store"),
        hub: Hub::spawn_thread(HubConfig::default())?,
        s3: S3Server::spawn_thread(S3Config::default())?,
        output,
    };
    user.hub
        .add_repo(Repo::new("org/model").commit("main", Files::new().directory(&bucket)?));
    for entry in fs::read_dir(&bucket)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .context("a name")?;
        user.s3.put_path(
            "bucket",
            &format!("models/demo/{name}"),
            &path,
            PutOptions::default(),
        )?;
    }
    user.say(&format!(
        "A model of {} in {SHARDS} shards, at a stand-in Hub and in an S3 bucket on loopback.",
        bytes(size)
    ));
    Ok(user)
}

fn play(output: Output, dir: &Path, size: u64, stop: CancellationToken) -> Result<Value> {
    let user = set_up(output, dir, size, stop)?;
    let hub = user.step(
        "1. From the Hub, into an empty store:",
        &["prefetch", "hf://org/model"],
    )?;
    user.fetched(&hub.0, hub.1);
    let again = user.step("2. Once more:", &["prefetch", "hf://org/model"])?;
    user.fetched(&again.0, again.1);
    ensure!(
        again.0["bytes_fetched"] == 0,
        "the second prefetch fetched bytes"
    );
    let s3 = user.step(
        "3. The same model from S3, which names no digests: hashed as it comes, stored once:",
        &["prefetch", "s3://bucket/models/demo"],
    )?;
    user.fetched(&s3.0, s3.1);
    let status = user.step("4. What the store holds:", &["status"])?;
    let stored = status.0["tiers"][0]["store_bytes"]
        .as_u64()
        .unwrap_or_default();
    let model = hub.0["bytes"].as_u64().unwrap_or_default();
    user.say(&format!(
        "  two models of {}, stored as {}",
        bytes(model),
        bytes(stored)
    ));
    ensure!(stored == model, "the same bytes are stored twice");
    let tree = PathBuf::from(hub.0["path"].as_str().context("a path")?);
    let mounted = mounted(&user, &tree)?;
    let verify = user.step("6. Every byte hashed again:", &["verify"])?;
    user.say(&format!(
        "  {} blobs checked in {}, none damaged",
        verify.0["checked"],
        seconds(verify.1)
    ));
    Ok(json!({
        "bytes": model,
        "stored_bytes": stored,
        "hf_seconds": hub.1,
        "again_seconds": again.1,
        "s3_seconds": s3.1,
        "mount": mounted,
        "verify_seconds": verify.1,
        "checked": verify.0["checked"],
        "damaged": verify.0["damaged"],
    }))
}

fn mounted(user: &User, tree: &Path) -> Result<Value> {
    user.say("\n5. Mounted read-only, as a pod would see it:");
    let inside = tree.to_str().context("a path in UTF-8")?;
    let (status, stdout) = user.run(&["demo", "--inside", inside])?;
    ensure!(status.success(), "reading through the mount failed");
    let result: Value = serde_json::from_slice(&stdout).context("its result")?;
    if result["mounted"] == true {
        let read = result["bytes"].as_u64().unwrap_or_default();
        let took = result["seconds"].as_f64().unwrap_or_default();
        user.say(&format!(
            "  {} read through the mount and hashed in {}, each file as its manifest says; writing is refused ({})",
            bytes(read), seconds(took), result["write"].as_str().unwrap_or_default(),
        ));
    } else {
        user.say(&format!(
            "  left out: this process may not mount ({})",
            result["reason"].as_str().unwrap_or_default()
        ));
    }
    Ok(result)
}

fn summary(value: &Value) -> String {
    let figure = |key: &str| seconds(value[key].as_f64().unwrap_or_default());
    format!(
        "\nfetched {} from the Hub in {}, from S3 in {}; a cached model takes {}; all verified",
        bytes(value["bytes"].as_u64().unwrap_or_default()),
        figure("hf_seconds"),
        figure("s3_seconds"),
        figure("again_seconds"),
    )
}

/// Mounts the tree read-only in a namespace of this process's own and reads it. Runs before any thread
/// is started: a process with threads gets no user namespace.
pub(crate) fn inside(tree: &Path) -> Result<()> {
    if let Err(error) = own_namespace() {
        let value = json!({ "mounted": false, "reason": format!("{error:#}") });
        return Output(crate::args::Format::Json).result(&value, |_| String::new());
    }
    let target = std::env::temp_dir().join(format!("weightd-demo-mount-{}", std::process::id()));
    fs::create_dir(&target).with_context(|| format!("cannot create {}", target.display()))?;
    let outcome = through_mount(tree, &target);
    let removed = fs::remove_dir(&target);
    let value = outcome?;
    removed.with_context(|| format!("cannot remove {}", target.display()))?;
    Output(crate::args::Format::Json).result(&value, |_| String::new())
}

fn through_mount(tree: &Path, target: &Path) -> Result<Value> {
    let none = None::<&Path>;
    mount(Some(tree), target, none, MsFlags::MS_BIND, none).context("cannot bind the tree")?;
    // Linux ignores the other flags on the first bind, so a second call sets them.
    let flags = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    let read_only = mount(none, target, none, flags, none);
    let outcome = read_only
        .context("cannot make the mount read-only")
        .and_then(|()| read_back(tree, target));
    nix::mount::umount(target)?;
    outcome
}

fn own_namespace() -> Result<()> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if uid.is_root() {
        unshare(CloneFlags::CLONE_NEWNS).context("no mount namespace")?;
    } else {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
            .context("no user namespace")?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    }
    let none = None::<&Path>;
    // Nothing that is mounted here may show up outside.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("the mounts cannot be made private")
}

fn read_back(tree: &Path, target: &Path) -> Result<Value> {
    let manifest = fs::read(tree.with_file_name("manifest.json"))?;
    let manifest: Manifest = serde_json::from_slice(&manifest)?;
    let begun = Instant::now();
    let mut buffer = vec![0; 1 << 20];
    for file in &manifest.files {
        let mut opened = File::open(target.join(&file.path))?;
        let mut verifier = Verifier::new(
            file.size,
            Claims {
                sha256: Some(file.sha256),
                ..Claims::default()
            },
        );
        loop {
            match opened.read(&mut buffer)? {
                0 => break,
                read => verifier.update(&buffer[..read]),
            }
        }
        verifier
            .finish()
            .with_context(|| format!("{} is wrong", file.path))?;
    }
    let took = begun.elapsed().as_secs_f64();
    let Err(refused) = File::create(target.join("new")) else {
        bail!("the mount can be written to")
    };
    Ok(json!({
        "mounted": true,
        "files": manifest.files.len(),
        "bytes": manifest.bytes(),
        "seconds": took,
        "write": refused.to_string(),
    }))
}
