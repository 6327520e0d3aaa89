//! What is left after daemon and plugin were killed, in any order, at any moment.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::Duration;

use weightd_proto::weightd::v1 as wire;
use weightd_standin::{Fault, FaultKind, HubConfig, Origin};

use crate::node::{Ask, Node, contents, tree};

const MODEL: &str = "hf://org/model";

/// Reads the whole mounted model through a memory map again and again, and says so.
const READER: &str = "
import mmap, os, sys, hashlib
files = [os.path.join(d, f) for d, _, fs in os.walk(sys.argv[1]) for f in fs]
maps = [mmap.mmap(os.open(f, os.O_RDONLY), 0, prot=mmap.PROT_READ) for f in sorted(files)]
for line in sys.stdin:
    digest = hashlib.sha256()
    for m in maps:
        digest.update(m[:])
    names = sorted(os.listdir(sys.argv[1]))
    print(digest.hexdigest(), len(names), flush=True)
";

#[tokio::test]
async fn a_reader_never_notices_that_daemon_and_plugin_are_killed() {
    let mut node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    let mut reader = node.inside("python3");
    reader.arg("-c").arg(READER).arg(node.target("pod-1"));
    reader.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut reader = reader.spawn().expect("python3 runs");
    let (mut ask, answers) = (reader.stdin.take().expect("piped"), reader.stdout.take());
    let mut answers = BufReader::new(answers.expect("piped")).lines();
    let mut read = || {
        writeln!(ask, "again").expect("the reader lives");
        answers
            .next()
            .expect("the reader lives")
            .expect("it answers")
    };
    let before = read();

    node.kill_daemon();
    assert_eq!(read(), before);
    node.kill_plugin();
    assert_eq!(read(), before);
    node.start_plugin().await;
    assert_eq!(read(), before);
    node.start_daemon().await;
    assert_eq!(read(), before);
    node.kill_plugin();
    node.kill_daemon();
    assert_eq!(read(), before);
    node.start().await;

    // Again if the plugin is just comparing mounts and pins, as kubelet does.
    node.mounts(&Ask::model("pod-1", MODEL)).await;
    assert_eq!(read(), before);
    assert_eq!(node.mounted().len(), 1);
    assert_eq!(node.pins(), ["pins/csi/pod-1.model"]);
    reader.kill().expect("it lives");
    reader.wait().expect("it ends");
    node.unpublish("pod-1").await.expect("unpublished");
    assert!(node.mounted().is_empty() && node.pins().is_empty());
}

#[tokio::test]
async fn a_pin_that_is_lost_comes_back_while_its_volume_is_mounted() {
    let mut node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    node.kill_plugin();
    fs::remove_dir_all(node.root().join("pins/csi/pod-1.model")).expect("the pin");

    node.start_plugin().await;

    node.until("the pin is back", async || {
        node.pins() == ["pins/csi/pod-1.model"]
    })
    .await;
    assert_eq!(tree(&node.tree("pod-1")), contents(1));
}

#[tokio::test]
async fn a_pin_without_a_mount_is_released_after_the_grace_period() {
    let mut node = Node::new(HubConfig::default());
    node.plugin_options = vec!["--grace=2".to_owned()];
    node.start().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    // As after a plugin that was killed between the two.
    let mut control = node.control().await.expect("the daemon");
    for layout in [
        wire::acquire_request::Layout::Flat,
        wire::acquire_request::Layout::HfCache,
    ] {
        let request = wire::AcquireRequest {
            model: Some(wire::ModelSpec {
                model: MODEL.to_owned(),
                ..wire::ModelSpec::default()
            }),
            holder: format!("csi/lost-{}", layout as i32),
            layout: layout.into(),
            ..wire::AcquireRequest::default()
        };
        let mut events = control.acquire(request).await.expect("asked").into_inner();
        while events.message().await.expect("acquired").is_some() {}
    }
    assert_eq!(node.pins().len(), 4, "{:?}", node.pins());

    node.until("they are released", async || {
        node.pins() == ["pins/csi/pod-1.model"]
    })
    .await;
    assert_eq!(node.mounted().len(), 1);
}

#[tokio::test]
async fn a_volume_that_is_gone_while_the_daemon_is_away_is_released_when_it_is_back() {
    let mut node = Node::new(HubConfig::default());
    node.plugin_options = vec!["--grace=1".to_owned()];
    node.start().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    node.kill_daemon();

    node.unpublish("pod-1")
        .await
        .expect("a pod does not wait for the daemon in order to go");

    assert!(node.mounted().is_empty());
    assert_eq!(node.pins(), ["pins/csi/pod-1.model"]);
    let status = node
        .publish(&Ask::model("pod-2", MODEL))
        .await
        .expect_err("nobody answers");
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    assert!(status.message().contains("weightd.sock"), "{status}");
    node.start_daemon().await;
    node.until("it is released", async || node.pins().is_empty())
        .await;
}

#[tokio::test]
async fn a_volume_that_was_mounted_at_once_is_completed_by_the_next_daemon() {
    let mut node = Node::running().await;
    let stalled = Fault::new(FaultKind::Stall {
        after_bytes: 300_000,
    });
    node.hub.fault(stalled.on(Origin::Cdn).forever());
    let ask = Ask::new(
        "pod-1",
        &[("source", MODEL), ("mode", "async"), ("layout", "hf-cache")],
    );
    node.publish(&ask).await.expect("published");
    tokio::time::sleep(Duration::from_millis(200)).await;
    node.kill_daemon();
    node.hub.clear_faults();

    node.start_daemon().await;

    let mark = node.tree("pod-1").join(".weightd/complete");
    node.until("it is complete", async || mark.exists()).await;
    let sha = node.hub.sha("org/model", "main").expect("a commit");
    let dir = node
        .tree("pod-1")
        .join("models--org--model/snapshots")
        .join(sha);
    assert_eq!(tree(&dir), contents(1));
}

#[tokio::test]
async fn a_daemon_that_dies_at_any_step_of_a_volume_leaves_nothing_that_the_next_cannot_use() {
    for point in [
        "volume.created",
        "volume.recorded",
        "volume.linked",
        "volume.completed",
        "pin.written",
        "publish.renamed",
    ] {
        let mut node = Node::new(HubConfig::default());
        node.start_daemon_with(&[("WEIGHTD_FAULT", point)]).await;
        node.start_plugin().await;
        let ask = Ask::new("pod-1", &[("source", MODEL), ("layout", "hf-cache")]);
        node.publish(&ask).await.expect_err("it died");
        assert!(
            node.daemon.as_mut().expect("started").dies().await,
            "{point}: it lives"
        );

        node.start_daemon().await;
        node.mounts(&ask).await;

        let sha = node.hub.sha("org/model", "main").expect("a commit");
        let dir = node
            .tree("pod-1")
            .join("models--org--model/snapshots")
            .join(sha);
        assert_eq!(tree(&dir), contents(1), "{point}");
        node.unpublish("pod-1").await.expect("unpublished");
        assert!(
            node.mounted().is_empty() && node.pins().is_empty(),
            "{point}"
        );
    }
}

#[tokio::test]
async fn a_release_that_dies_in_the_middle_is_finished_later() {
    let mut node = Node::new(HubConfig::default());
    node.plugin_options = vec!["--grace=1".to_owned()];
    node.start_daemon_with(&[("WEIGHTD_FAULT", "volume.renamed")])
        .await;
    node.start_plugin().await;
    let ask = Ask::new("pod-1", &[("source", MODEL), ("layout", "hf-cache")]);
    node.publish(&ask).await.expect("published");

    node.unpublish("pod-1").await.expect("unpublished");

    assert!(node.daemon.as_mut().expect("started").dies().await);
    node.start_daemon().await;
    node.until("the pin is gone", async || node.pins().is_empty())
        .await;
}

#[tokio::test]
async fn a_file_that_went_bad_leaves_a_mounted_volume_and_comes_back_whole() {
    let node = Node::running().await;
    let ask = Ask::new("pod-1", &[("source", MODEL), ("layout", "hf-cache")]);
    node.publish(&ask).await.expect("published");
    let sha = node.hub.sha("org/model", "main").expect("a commit");
    let dir = node
        .tree("pod-1")
        .join("models--org--model/snapshots")
        .join(&sha);
    let shard = dir.join("model-00001-of-00002.safetensors");
    let blob = node.root().join("snapshots");
    let snapshot = fs::read_dir(blob)
        .expect("snapshots")
        .next()
        .expect("one")
        .expect("an entry");
    let stored = snapshot
        .path()
        .join("tree/model-00001-of-00002.safetensors");
    let mut bytes = fs::read(&stored).expect("readable");
    bytes[500_000] ^= 1;
    let writable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(&stored, writable).expect("it is ours");
    fs::write(&stored, bytes).expect("damaged");

    let verified = node.weightctl_command(&["verify"]).output();

    assert_eq!(verified.expect("weightctl runs").status.code(), Some(1));
    assert!(!shard.exists(), "wrong bytes can still be opened");
    node.weightctl(&["prefetch", &format!("{MODEL}@{sha}")]);
    assert_eq!(tree(&dir), contents(1));
}
