//! What real nodes do to a plugin: other mounts in kubelet's directory, calls that are given up, a store whose
//! files went bad.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Code;
use weightd_proto::csi::v1::volume_capability::{AccessMode, access_mode};
use weightd_standin::{Fault, FaultKind, HubConfig, Origin};

use crate::node::{Ask, Node, contents, tree};

const MODEL: &str = "hf://org/model";

/// The only published snapshot.
fn snapshot(node: &Node) -> PathBuf {
    let mut entries = fs::read_dir(node.root().join("snapshots")).expect("snapshots");
    entries
        .next()
        .expect("a snapshot")
        .expect("readable")
        .path()
}

#[tokio::test]
async fn the_node_sees_no_volume_that_could_be_written_to() {
    let node = Node::running().await;
    let mut request = node.request(&Ask::model("pod-1", MODEL));
    // A persistent volume that many may read: kubelet does not say `readonly`, and adds no lock of its own.
    request.readonly = false;
    if let Some(capability) = &mut request.volume_capability {
        capability.access_mode = Some(AccessMode {
            mode: access_mode::Mode::MultiNodeReaderOnly.into(),
        });
    }

    let published = node.client().await.node_publish_volume(request).await;

    published.expect("published");
    let mounted = node.mounted();
    assert_eq!(mounted.len(), 1, "{mounted:?}");
    assert!(
        mounted[0].contains(" ro,nosuid,nodev,noexec"),
        "{mounted:?}"
    );
    let write = node
        .inside("touch")
        .arg(node.target("pod-1").join("config.json"))
        .output();
    let output = write.expect("touch runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("Read-only file system"), "{error}");
}

#[tokio::test]
async fn a_third_call_is_refused_like_the_second() {
    let node = Node::running().await;
    let stalled = Fault::new(FaultKind::Stall { after_bytes: 1000 });
    node.hub.fault(stalled.on(Origin::Cdn).forever());
    let ask = Ask::model("pod-1", MODEL);
    let later = async |call: u64| {
        tokio::time::sleep(Duration::from_millis(200 * call)).await;
        let status = node.publish(&ask).await.expect_err("two calls at once");
        assert_eq!(status.code(), Code::Aborted, "{status}");
        assert!(status.message().contains("another call"), "{status}");
        let status = node
            .unpublish("pod-1")
            .await
            .expect_err("two calls at once");
        assert_eq!(status.code(), Code::Aborted, "{status}");
        if call == 3 {
            node.hub.clear_faults();
        }
    };

    let (first, ()) = tokio::join!(node.publish(&ask), async {
        for call in 1..4 {
            later(call).await;
        }
    });

    first.expect("published");
    assert_eq!(node.mounted().len(), 1, "{:?}", node.mounted());
}

#[tokio::test]
async fn a_call_that_kubelet_gives_up_leaves_nothing_behind() {
    let node = Node::running().await;
    node.weightctl(&["prefetch", MODEL]);
    for round in 0..60_u64 {
        let ask = Ask::model("pod-1", MODEL);
        let patience = Duration::from_micros(200 * (round % 20));

        let _ = tokio::time::timeout(patience, node.publish(&ask)).await;
        let _ = tokio::time::timeout(patience, node.unpublish("pod-1")).await;
        node.mounts(&ask).await;

        assert_eq!(node.mounted().len(), 1, "{round}: {:?}", node.mounted());
        let gone = async || node.unpublish("pod-1").await.is_ok();
        node.until("it is unpublished", gone).await;
        assert!(
            node.mounted().is_empty() && node.pins().is_empty(),
            "{round}: {:?} {:?}",
            node.mounted(),
            node.pins()
        );
    }
}

#[tokio::test]
async fn waiting_ends_when_kubelet_gives_up() {
    let node = Node::running().await;
    let stalled = Fault::new(FaultKind::Stall { after_bytes: 1000 });
    node.hub.fault(stalled.on(Origin::Cdn).forever());
    let ask = Ask::model("pod-1", MODEL);

    let cut = tokio::time::timeout(Duration::from_millis(500), node.publish(&ask)).await;

    assert!(cut.is_err(), "it cannot be there yet");
    let gone = async || node.unpublish("pod-1").await.is_ok();
    node.until("its turn has ended", gone).await;
    node.hub.clear_faults();
    node.mounts(&ask).await;
    assert_eq!(tree(&node.tree("pod-1")), contents(1));
}

#[tokio::test]
async fn what_others_have_mounted_is_left_alone() {
    let mut node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    let ask = Ask::model("pod-2", MODEL);
    drop(node.request(&ask));
    let target = node.target("pod-2");
    // Another pod's subpath of a volume that happens to be the store's disk.
    let subpath = target
        .ancestors()
        .nth(4)
        .expect("the pod's directory")
        .join("volume-subpaths/disk/tool/0");
    fs::create_dir_all(&subpath).expect("a directory");
    fs::create_dir(&target).expect("a directory");
    let mount = |words: &[&Path]| {
        let status = node.inside("mount").args(words).status();
        assert!(status.expect("mount runs").success());
    };
    mount(&["--bind".as_ref(), &node.root(), &subpath]);
    mount(&["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), &target]);

    let published = node.publish(&ask).await.expect_err("mounted over it");
    let unpublished = node.unpublish("pod-2").await.expect_err("unmounted it");

    assert_eq!(published.code(), Code::FailedPrecondition, "{published}");
    assert_eq!(
        unpublished.code(),
        Code::FailedPrecondition,
        "{unpublished}"
    );
    assert!(unpublished.message().contains("findmnt"), "{unpublished}");
    // And the reconciler, which looks as the plugin starts.
    let before = node.mounted();
    assert_eq!(before.len(), 3, "{before:?}");
    node.kill_plugin();
    fs::remove_dir_all(node.root().join("pins/csi/pod-1.model")).expect("unpinned");
    node.start_plugin().await;
    node.until("it has looked", async || !node.pins().is_empty())
        .await;
    assert_eq!(node.mounted(), before);
}

#[tokio::test]
async fn a_model_that_was_withdrawn_stays_mounted_while_its_origin_is_away() {
    let mut node = Node::running().await;
    let ask = Ask::model("pod-1", MODEL);
    node.publish(&ask).await.expect("published");
    let stored = snapshot(&node).join("tree/model-00001-of-00002.safetensors");
    damage(&stored);
    let away = Fault::new(FaultKind::NoAnswer);
    node.hub.fault(away.clone().on(Origin::Hub).forever());
    node.hub.fault(away.on(Origin::Cdn).forever());
    let verified = node.weightctl_command(&["verify"]).output();
    assert!(!verified.expect("it runs").status.success());

    node.kill_plugin();
    node.start_plugin().await;
    node.mounts(&ask).await;

    assert_eq!(node.mounted().len(), 1);
    let tree = tree(&node.tree("pod-1"));
    let small = contents(1)
        .into_iter()
        .filter(|(_, bytes)| bytes.len() < 500_000);
    for file in small {
        assert!(tree.contains(&file), "{} is gone", file.0);
    }
}

#[tokio::test]
async fn symlinks_above_the_store_and_the_pods_change_nothing() {
    let mut node = Node::new(HubConfig::default());
    let (store, pods) = (node.path("disk/store"), node.path("kubelet/real-pods"));
    fs::create_dir_all(&store).expect("a directory");
    symlink(&store, node.root()).expect("a symlink");
    fs::create_dir(&pods).expect("a directory");
    let given = node.path("kubelet/pods");
    fs::remove_dir(&given).expect("empty");
    symlink(&pods, &given).expect("a symlink");
    node.plugin_options = vec!["--grace=1".to_owned()];
    node.start().await;
    let ask = Ask::model("pod-1", MODEL);
    let mut request = node.request(&ask);
    let target = given.join("pod-1/volumes/kubernetes.io~csi/model/mount");
    request.target_path = target.display().to_string();

    for _ in 0..2 {
        let mut client = node.client().await;
        let published = client.node_publish_volume(request.clone()).await;
        published.expect("published");
    }

    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(node.mounted().len(), 1, "{:?}", node.mounted());
    assert_eq!(node.pins(), ["pins/csi/pod-1.model"], "{}", node.logs());
    node.unpublish("pod-1").await.expect("unpublished");
    assert!(node.mounted().is_empty() && node.pins().is_empty());
}

#[tokio::test]
async fn what_lies_below_a_volume_does_not_keep_its_pin() {
    let node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    // Below the mount, as this process does not see that.
    let left = node.target("pod-1").join("left");
    fs::create_dir(&left).expect("a directory");

    let status = node.unpublish("pod-1").await.expect_err("it is not empty");

    assert!(
        status.message().contains("cannot remove the directory"),
        "{status}"
    );
    assert!(node.mounted().is_empty() && node.pins().is_empty());
    fs::remove_dir(&left).expect("empty");
    node.unpublish("pod-1").await.expect("unpublished");
    assert!(!node.target("pod-1").exists());
}

#[tokio::test]
async fn a_pod_whose_directory_is_gone_gets_none_back() {
    let node = Node::running().await;
    let request = node.request(&Ask::model("pod-1", MODEL));
    let pod = node.path("kubelet/pods/pod-1");
    fs::remove_dir_all(&pod).expect("removed");

    let status = node.client().await.node_publish_volume(request).await;

    let status = status.expect_err("published");
    assert!(status.message().contains("cannot create"), "{status}");
    assert!(!pod.exists() && node.pins().is_empty(), "{:?}", node.pins());
}

#[tokio::test]
async fn one_volume_in_trouble_keeps_no_other_from_being_set_right() {
    let mut node = Node::new(HubConfig::default());
    node.plugin_options = vec!["--grace=1".to_owned()];
    node.start().await;
    for pod in ["pod-1", "pod-2"] {
        node.publish(&Ask::model(pod, MODEL))
            .await
            .expect("published");
    }
    node.kill_plugin();
    // Its manifest cannot be read any more, and it needs a new pin.
    let manifest = snapshot(&node).join("manifest.json");
    fs::rename(&manifest, manifest.with_extension("bad")).expect("renamed");
    fs::create_dir(&manifest).expect("a directory");
    fs::remove_dir_all(node.root().join("pins/csi/pod-1.model")).expect("unpinned");
    let unmounted = node.inside("umount").arg(node.target("pod-2")).status();
    assert!(unmounted.expect("umount runs").success());

    node.start_plugin().await;

    let released = async || !node.pins().contains(&"pins/csi/pod-2.model".to_owned());
    node.until("the pin of pod-2 is released", released).await;
    assert_eq!(node.mounted().len(), 1, "{:?}", node.mounted());
}

#[tokio::test]
async fn a_store_that_the_plugin_does_not_see_is_named_with_the_remedy() {
    let mut node = Node::new(HubConfig::default());
    node.start_daemon().await;
    let hidden = node
        .inside("mount")
        .args(["-t", "tmpfs", "none"])
        .arg(node.root())
        .status();
    assert!(hidden.expect("mount runs").success());
    node.start_plugin().await;

    let status = node.publish(&Ask::model("pod-1", MODEL)).await;

    let status = status.expect_err("published");
    assert!(
        status.message().contains("at the same path as the daemon"),
        "{status}"
    );
    assert!(node.pins().is_empty(), "{:?}", node.pins());
}

#[tokio::test]
async fn a_volume_that_is_mounted_is_left_to_its_pod_whatever_the_next_call_says() {
    let mut node = Node::running().await;
    let ask = Ask::model("pod-1", MODEL);
    node.publish(&ask).await.expect("published");
    let before = node.mounted();

    // Kubelet asks again after its restart; the Secret has been edited, the plugin knows fewer attributes.
    let edited = ask.clone().secret("HF_TOKEN", "x");
    node.publish(&edited).await.expect("still published");
    let unknown = Ask::new("pod-1", &[("source", MODEL), ("colour", "red")]);
    node.publish(&unknown).await.expect("still published");
    node.kill_daemon();
    node.publish(&ask).await.expect("still published");

    assert_eq!(node.mounted(), before);
}

#[tokio::test]
async fn a_volume_whose_model_was_removed_all_the_same_can_be_taken_away_and_mounted_anew() {
    let mut node = Node::running().await;
    for (pod, layout) in [("pod-1", "flat"), ("pod-2", "hf-cache")] {
        let ask = Ask::new(pod, &[("source", MODEL), ("layout", layout)]);
        node.publish(&ask).await.expect("published");
        // As somebody with the disk in hand could do.
        node.kill_plugin();
        let mut control = node.control().await.expect("the daemon answers");
        let release = weightd_proto::weightd::v1::ReleaseRequest {
            holder: format!("csi/{pod}.model"),
        };
        control.release(release).await.expect("released");
        node.weightctl(&["rm", MODEL]);
        node.start_plugin().await;

        node.mounts(&ask).await;

        assert_eq!(node.mounted().len(), 1, "{:?}", node.mounted());
        let shown = tree(&node.tree(pod));
        let shard = contents(1)
            .into_iter()
            .find(|(path, _)| path.ends_with(".safetensors"));
        let (_, bytes) = shard.expect("a shard");
        assert!(shown.iter().any(|(_, found)| *found == bytes), "{layout}");
        node.unpublish(pod).await.expect("unpublished");
        assert!(node.mounted().is_empty() && node.pins().is_empty());
    }
}

#[tokio::test]
async fn a_mounted_volume_goes_on_with_what_it_was_opened_for() {
    let mut node = Node::running().await;
    let ask = Ask::new("pod-1", &[("source", MODEL), ("layout", "hf-cache")]);
    node.publish(&ask).await.expect("published");
    let sha = node.hub.sha("org/model", "main").expect("a commit");
    let dir = node
        .tree("pod-1")
        .join("models--org--model/snapshots")
        .join(&sha);
    let stored = snapshot(&node).join("tree/model-00001-of-00002.safetensors");
    damage(&stored);
    let verified = node.weightctl_command(&["verify"]).output();
    assert!(!verified.expect("it runs").status.success());
    assert!(!node.tree("pod-1").join(".weightd/complete").exists());
    let next = weightd_standin::Repo::new("org/model").commit("main", crate::node::files(2));
    node.hub.add_repo(next);

    node.kill_plugin();
    node.start_plugin().await;
    node.mounts(&ask).await;

    let whole = async || dir.is_dir() && tree(&dir).len() >= contents(1).len() - 1;
    node.until("the pod has its files", whole).await;
    assert_eq!(node.mounted().len(), 1, "{:?}", node.mounted());
    assert!(dir.join("config.json").exists(), "its tree was taken away");
}

/// One bit, on disk.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).expect("readable");
    bytes[500_000] ^= 1;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("ours");
    fs::write(path, bytes).expect("damaged");
}

#[tokio::test]
async fn a_volume_that_lost_its_locks_gets_them_back() {
    let mut node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    node.kill_plugin();
    let unlocked = node
        .inside("mount")
        .args(["-o", "remount,bind,rw,suid,dev,exec"])
        .arg(node.target("pod-1"))
        .status();
    assert!(unlocked.expect("mount runs").success());
    assert!(node.mounted()[0].contains(" rw,"), "{:?}", node.mounted());

    node.start_plugin().await;

    let locked = async || {
        let mounted = node.mounted();
        mounted.len() == 1 && mounted[0].contains(" ro,nosuid,nodev,noexec")
    };
    node.until("the node sees it locked down", locked).await;
    assert_eq!(tree(&node.tree("pod-1")), contents(1));
    assert_eq!(node.pins(), ["pins/csi/pod-1.model"]);
}

#[tokio::test]
async fn a_directory_of_the_plugins_own_that_somebody_removed_is_made_again() {
    let node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    // It looks empty on the node: what is mounted there only the plugin sees.
    fs::remove_dir(node.path("csi.sock.mounts")).expect("removed");

    node.publish(&Ask::model("pod-2", MODEL))
        .await
        .expect("published");

    assert_eq!(tree(&node.tree("pod-2")), contents(1));
    assert_eq!(node.mounted().len(), 2, "{:?}", node.mounted());
}

#[tokio::test]
async fn a_plugin_that_looks_at_the_wrong_directory_releases_nothing() {
    let mut node = Node::running().await;
    for (pod, layout) in [("pod-1", "flat"), ("pod-2", "hf-cache")] {
        let ask = Ask::new(pod, &[("source", MODEL), ("layout", layout)]);
        node.publish(&ask).await.expect("published");
    }
    let before = node.pins();
    node.kill_plugin();
    let wrong = node.path("another");
    fs::create_dir_all(wrong.join("pods")).expect("a directory");

    node.plugin_options = vec![
        "--grace=1".to_owned(),
        format!("--kubelet-dir={}", wrong.display()),
    ];
    node.start_plugin().await;

    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(node.pins(), before, "{}", node.logs());
}
