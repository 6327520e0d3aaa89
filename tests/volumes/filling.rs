//! Volumes that are asked for again, by others, or by nobody any more, while they are filled.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Status};
use weightd_proto::weightd::v1 as wire;
use weightd_proto::weightd::v1::acquire_event::Event;
use weightd_proto::weightd::v1::control_client::ControlClient;
use weightd_standin::{Fault, FaultKind, Files, Gated, HubConfig, Origin, Repo};

use crate::node::{Ask, Node, contents, files, tree};

const MODEL: &str = "hf://org/model";
const TOKEN: &str = "hf_tenantAmayread";

/// What a plugin asks the daemon for.
fn request(model: &str, holder: &str) -> wire::AcquireRequest {
    wire::AcquireRequest {
        model: Some(wire::ModelSpec {
            model: model.to_owned(),
            ..wire::ModelSpec::default()
        }),
        holder: holder.to_owned(),
        ..wire::AcquireRequest::default()
    }
}

fn at_once(model: &str, token: &str) -> wire::AcquireRequest {
    wire::AcquireRequest {
        at_once: true,
        credentials: Some(wire::Credentials {
            hf_token: token.to_owned(),
            ..wire::Credentials::default()
        }),
        ..request(model, "csi/h")
    }
}

async fn ask(
    control: &mut ControlClient<Channel>,
    request: wire::AcquireRequest,
) -> Result<wire::Acquired, Status> {
    let mut events = control.acquire(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        if let Some(Event::Done(acquired)) = event.event {
            return Ok(acquired);
        }
    }
    panic!("it ended without an answer")
}

async fn acquire(node: &Node, request: wire::AcquireRequest) -> wire::Acquired {
    let mut control = node.control().await.expect("the daemon");
    ask(&mut control, request).await.expect("acquired")
}

/// A daemon, and a hub that holds the second shards back.
async fn stalled(config: HubConfig) -> Node {
    let mut node = Node::new(config);
    node.start_daemon().await;
    let stalled = Fault::new(FaultKind::Stall { after_bytes: 1000 });
    node.hub
        .fault(stalled.on(Origin::Cdn).path("model-00002").forever());
    node
}

/// What a volume shows, its marks left out.
fn shown(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut shown = tree(dir);
    shown.retain(|(path, _)| !path.starts_with(".weightd/"));
    shown
}

async fn first_shard(node: &Node, dir: &Path) {
    let shard = dir.join("model-00001-of-00002.safetensors");
    node.until("the first shard is there", async || shard.exists())
        .await;
}

async fn complete(node: &Node, dir: &Path) {
    let mark = dir.join(".weightd/complete");
    node.until("it is complete", async || mark.exists()).await;
}

#[tokio::test]
async fn a_volume_that_is_asked_for_again_with_another_model_shows_that_one_only() {
    let node = stalled(HubConfig::default()).await;
    node.hub
        .add_repo(Repo::new("org/other").commit("main", files(9)));
    let first = acquire(&node, at_once(MODEL, "")).await;
    let dir = PathBuf::from(first.path);
    first_shard(&node, &dir).await;

    let second = acquire(&node, at_once("hf://org/other", "")).await;

    assert_eq!(dir, Path::new(&second.path));
    node.hub.clear_faults();
    complete(&node, &dir).await;
    node.until("both are published", async || {
        node.weightctl(&["ls"]).as_array().map(Vec::len) == Some(2)
    })
    .await;
    assert!(shown(&dir) == contents(9), "another model's files");
    let pins = fs::read_dir(node.root().join("pins/csi/h")).expect("pins");
    let pins: Vec<_> = pins.map(|pin| pin.expect("a pin").file_name()).collect();
    assert_eq!(pins, [second.snapshot.as_str()]);
}

#[tokio::test]
async fn a_volume_that_is_asked_for_again_in_the_other_mode_is_no_longer_filled() {
    let mut node = stalled(HubConfig::default()).await;
    node.hub
        .add_repo(Repo::new("org/other").commit("main", Files::new().file("config.json", "{}")));
    let first = acquire(&node, at_once(MODEL, "")).await;
    first_shard(&node, Path::new(&first.path)).await;

    let second = acquire(&node, request("hf://org/other", "csi/h")).await;

    assert_eq!(node.pins(), ["pins/csi/h"]);
    let pins = fs::read_dir(node.root().join("pins/csi/h")).expect("pins");
    let pins: Vec<_> = pins.map(|pin| pin.expect("a pin").file_name()).collect();
    assert_eq!(pins, [second.snapshot.as_str()]);
    node.kill_daemon();
    node.start_daemon().await;
    assert!(
        !node.logs().contains("resuming a volume"),
        "{}",
        node.logs()
    );
}

#[tokio::test]
async fn a_volume_that_is_asked_for_again_stays_at_its_revision() {
    let node = stalled(HubConfig::default().token(TOKEN)).await;
    let first = acquire(&node, at_once(MODEL, "")).await;
    let dir = PathBuf::from(&first.path);
    first_shard(&node, &dir).await;
    let inode = fs::metadata(&dir).expect("a tree").ino();
    let moved = |repo: Repo| repo.commit("main", files(9));
    node.hub.update_repo("org/model", moved);

    // What the name stood for is not remembered for this token.
    let second = acquire(&node, at_once(MODEL, TOKEN)).await;

    assert_eq!(
        (&first.path, &first.snapshot),
        (&second.path, &second.snapshot)
    );
    node.hub.clear_faults();
    complete(&node, &dir).await;
    assert!(
        shown(&dir) == contents(1),
        "not the revision it was opened with"
    );
    assert_eq!(fs::metadata(&dir).expect("a tree").ino(), inode, "replaced");
}

#[tokio::test]
async fn a_pods_own_token_revives_its_volume_after_a_restart() {
    let mut node = stalled(HubConfig::default().token(TOKEN)).await;
    let private = Repo::new("org/private").private().grant(TOKEN);
    node.hub.add_repo(private.commit("main", files(7)));
    let first = acquire(&node, at_once("hf://org/private", TOKEN)).await;
    let dir = PathBuf::from(&first.path);
    first_shard(&node, &dir).await;
    node.kill_daemon();
    node.hub.clear_faults();

    node.start_daemon().await;

    let error = dir.join(".weightd/error");
    node.until("the pod is told", async || error.exists()).await;
    let text = fs::read_to_string(&error).expect("readable");
    assert!(
        text.starts_with("retrying: cannot fetch hf://org/private"),
        "{text}"
    );
    assert!(text.contains("delete the pod"), "{text}");
    let again = acquire(&node, at_once("hf://org/private", TOKEN)).await;
    assert_eq!(
        (&first.path, &first.snapshot),
        (&again.path, &again.snapshot)
    );
    complete(&node, &dir).await;
    assert!(shown(&dir) == contents(7));
    assert!(!error.exists(), "the error is left");
}

#[tokio::test]
async fn a_volume_is_filled_with_its_own_right_when_a_fetch_that_it_joined_is_refused() {
    let mut node = Node::new(HubConfig::default().token(TOKEN));
    let gated = Repo::new("org/gated").gated(Gated::Manual).grant(TOKEN);
    node.hub.add_repo(gated.commit("main", files(8)));
    node.start_daemon().await;
    let sha = node.hub.sha("org/gated", "main").expect("a commit");
    let model = format!("hf://org/gated@{sha}");
    // The daemon has no token, and learns late that it may not read it.
    let late = FaultKind::Slow {
        bytes_per_second: 400,
    };
    let late = Fault::new(late).on(Origin::Hub).path("/tree/");
    node.hub.fault(late.times(1_usize));
    let mut refused = node.weightctl_command(&["prefetch", &model]);
    let mut refused = refused.spawn().expect("weightctl runs");
    node.until("it is under way", async || node.hub.faults_fired() == 1)
        .await;

    let acquired = acquire(&node, at_once(&model, TOKEN)).await;

    complete(&node, Path::new(&acquired.path)).await;
    assert!(!refused.wait().expect("it ends").success());
    let logs = node.logs();
    assert!(!logs.contains("volume not complete"), "{logs}");
}

#[tokio::test]
async fn nothing_stays_pinned_for_a_client_that_left_or_was_released() {
    let mut node = Node::new(HubConfig::default());
    node.start_daemon().await;
    node.weightctl(&["prefetch", MODEL]);
    acquire(&node, request(MODEL, "csi/warm")).await;
    let layout = wire::acquire_request::Layout::HfCache.into();
    let left = [
        request(MODEL, "csi/left-1"),
        at_once(MODEL, ""),
        wire::AcquireRequest {
            layout,
            ..request(MODEL, "csi/left-2")
        },
    ];
    for (released, request) in left.iter().flat_map(|left| [(true, left), (false, left)]) {
        // As a long collection does.
        let lock = fs::File::open(node.root().join("lock")).expect("the store's lock");
        lock.lock().expect("locked");
        let answer = acquire(&node, request.clone());
        let answer = tokio::time::timeout(Duration::from_millis(500), answer).await;
        assert!(answer.is_err(), "it did not wait");
        let mut control = node.control().await.expect("the daemon");
        let release = async {
            let holder = request.holder.clone();
            if released {
                let released = control.release(wire::ReleaseRequest { holder }).await;
                released.expect("released");
            }
        };
        let unlock = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            lock.unlock().expect("unlocked");
        };
        tokio::join!(release, unlock);
        // What was waiting for the lock would pin it by now.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(node.pins(), ["pins/csi/warm"], "released: {released}");
    }
    // What the holder held before, it may have mounted: it stays.
    let again = tokio::time::timeout(
        Duration::from_millis(1),
        acquire(&node, request(MODEL, "csi/warm")),
    );
    drop(again.await);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(node.pins(), ["pins/csi/warm"]);
}

#[tokio::test]
async fn a_release_ends_calls_that_began_before_it() {
    let node = stalled(HubConfig::default()).await;
    let waiting = async {
        let mut control = node.control().await.expect("the daemon");
        ask(&mut control, request(MODEL, "csi/h")).await
    };
    let release = async {
        node.until("it is under way", async || {
            let status = node.weightctl(&["status"]);
            status["fetches"].as_array().map(Vec::len) == Some(1)
        })
        .await;
        let mut control = node.control().await.expect("the daemon");
        let holder = "csi/h".to_owned();
        let released = control.release(wire::ReleaseRequest { holder }).await;
        released.expect("released");
        node.hub.clear_faults();
    };

    let (answer, ()) = tokio::join!(waiting, release);

    let status = answer.expect_err("it was released");
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(node.pins().is_empty(), "{:?}", node.pins());
    acquire(&node, request(MODEL, "csi/h")).await;
}

#[tokio::test]
async fn a_long_name_is_its_askers_own_error() {
    let node = stalled(HubConfig::default()).await;
    let mut control = node.control().await.expect("the daemon");
    // The plugin has one connection for all pods.
    let slow = control.acquire(request(MODEL, "csi/slow")).await;
    let mut slow = slow.expect("asked").into_inner();
    for name in ["\u{e4}".repeat(200_000), "a b".repeat(10_000)] {
        let model = format!("hf://org/{name}");

        let answer = ask(&mut control, request(&model, "csi/long")).await;

        let status = answer.expect_err("that is no name");
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("letters, digits"), "{status}");
    }
    node.hub.clear_faults();
    let mut done = false;
    while let Some(event) = slow.message().await.expect("the connection lives") {
        done = matches!(event.event, Some(Event::Done(_)));
    }
    assert!(done, "it ended without an answer");
}

/// A node whose daemon says at the address what it counts.
fn counting() -> (Node, SocketAddr) {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("an address");
    let mut node = Node::new(HubConfig::default());
    node.config = format!("[metrics]\nlisten = '{address}'\n");
    (node, address)
}

#[track_caller]
fn assert_counted(address: SocketAddr, lines: &[String]) {
    let mut asking = TcpStream::connect(address).expect("it listens");
    write!(asking, "GET /metrics HTTP/1.1\r\nHost: weightd\r\n\r\n").expect("asked");
    let mut answer = String::new();
    asking.read_to_string(&mut answer).expect("an answer");
    for line in lines {
        assert!(answer.contains(line), "`{line}` is missing: {answer}");
    }
}

#[tokio::test]
async fn what_pods_were_given_and_whether_they_waited_is_counted() {
    let (mut node, address) = counting();
    node.start().await;
    for pod in ["pod-1", "pod-2", "pod-2"] {
        let asked = Ask::model(pod, MODEL);
        node.publish(&asked).await.expect("published");
    }

    let bytes: usize = contents(1).iter().map(|(_, bytes)| bytes.len()).sum();
    let lines = [
        "weightd_acquires_active 0\n".to_owned(),
        "weightd_volumes_total{found=\"waited\"} 1".to_owned(),
        "weightd_volumes_total{found=\"here\"} 1".to_owned(),
        format!("weightd_volume_bytes_total{{found=\"waited\"}} {bytes}"),
        format!("weightd_volume_bytes_total{{found=\"here\"}} {bytes}"),
    ];
    assert_counted(address, &lines);
}

/// Kubelet pauses between its calls: a pod waits on. When all have gone, neither this daemon nor the next brings the
/// model for nobody.
#[tokio::test]
async fn pods_wait_between_calls_and_what_failed_goes_with_the_last_of_them() {
    let (mut node, address) = counting();
    node.config += "[store]\nmax_bytes = '1MiB'\n";
    node.start().await;
    for pod in ["pod-1", "pod-2"] {
        let status = node.publish(&Ask::model(pod, MODEL)).await;
        let status = status.expect_err("there is no room");
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    }
    let records = || fs::read_dir(node.root().join("fetches")).map_or(0, Iterator::count);
    let waiting = |pods| assert_counted(address, &[format!("weightd_acquires_active {pods}\n")]);
    waiting(2);

    node.unpublish("pod-1").await.expect("it was never mounted");
    waiting(1);
    assert_eq!(records(), 1, "another pod waits for it");
    node.unpublish("pod-2").await.expect("it was never mounted");

    waiting(0);
    assert_eq!(records(), 0, "nobody waits for it");
}
