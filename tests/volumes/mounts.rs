//! What a pod finds in its volume, and what it cannot do there.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tonic::Code;
use weightd_proto::csi::v1 as csi;
use weightd_standin::{Fault, FaultKind, HubConfig, Origin};

use crate::node::{Ask, Node, contents, files, tree};

const MODEL: &str = "hf://org/model";

#[tokio::test]
async fn a_volume_is_the_model_and_nothing_in_it_can_be_changed_or_run() {
    let node = Node::running().await;

    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");

    let dir = node.tree("pod-1");
    assert_eq!(tree(&dir), contents(1));
    let config = dir.join("config.json");
    let read_only = |outcome: std::io::Result<()>, what: &str| {
        let error = outcome.expect_err(what);
        // A user who is not root may be refused a file of mode 0444 before the mount is looked at.
        let by_mode = error.kind() == ErrorKind::PermissionDenied
            && what.starts_with("open")
            && !nix::unistd::geteuid().is_root();
        let by_mount = error.kind() == ErrorKind::ReadOnlyFilesystem;
        assert!(by_mount || by_mode, "{what}: {error}");
    };
    read_only(fs::write(dir.join("new"), "x"), "create");
    read_only(fs::write(&config, "x"), "open to overwrite");
    read_only(
        fs::set_permissions(&config, Permissions::from_mode(0o644)),
        "chmod",
    );
    read_only(fs::remove_file(&config), "unlink");
    read_only(fs::rename(&config, dir.join("other")), "rename");
    read_only(fs::hard_link(&config, dir.join("other")), "link");
    read_only(
        File::options()
            .write(true)
            .truncate(true)
            .open(&config)
            .map(drop),
        "open to truncate",
    );
    // A writable shared mapping needs a file that is open for writing.
    read_only(
        File::options()
            .read(true)
            .write(true)
            .open(&config)
            .map(drop),
        "open for mmap",
    );
    let flags = nix::sys::statvfs::statvfs(&config)
        .expect("statvfs")
        .flags();
    use nix::sys::statvfs::FsFlags;
    for flag in [
        FsFlags::ST_RDONLY,
        FsFlags::ST_NOSUID,
        FsFlags::ST_NODEV,
        FsFlags::ST_NOEXEC,
    ] {
        assert!(flags.contains(flag), "{flag:?} is missing: {flags:?}");
    }
    let line = &node.mounted()[0];
    assert!(line.contains("ro,nosuid,nodev,noexec"), "{line}");
}

#[tokio::test]
async fn set_uid_and_device_files_have_no_effect_in_a_volume() {
    let node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    // The store never holds such files. If one gets there, the mount must not honour it.
    let own = node.root().join("snapshots");
    let snapshot = fs::read_dir(own)
        .expect("snapshots")
        .next()
        .expect("one")
        .expect("an entry");
    let planted = snapshot.path().join("tree/id");
    fs::copy("/usr/bin/id", &planted).expect("copied");
    fs::set_permissions(&planted, Permissions::from_mode(0o4755)).expect("set-uid");

    let run = node
        .inside(node.target("pod-1").join("id").to_str().expect("UTF-8"))
        .output();

    let run = run.expect("nsenter runs");
    assert!(!run.status.success());
    let error = String::from_utf8_lossy(&run.stderr);
    assert!(error.contains("Permission denied"), "{error}");
    if nix::unistd::geteuid().is_root() {
        let device = snapshot.path().join("tree/null");
        let made = std::process::Command::new("mknod")
            .arg(&device)
            .args(["c", "1", "3"])
            .status();
        assert!(made.expect("mknod runs").success());
        let error = File::open(node.tree("pod-1").join("null")).expect_err("a device was opened");
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    }
}

#[tokio::test]
async fn publishing_and_unpublishing_twice_is_the_same_as_once() {
    let node = Node::running().await;
    let ask = Ask::model("pod-1", MODEL);

    for _ in 0..3 {
        node.publish(&ask).await.expect("published");
    }
    assert_eq!(node.mounted().len(), 1, "{:?}", node.mounted());
    assert_eq!(node.pins(), ["pins/csi/pod-1.model"]);

    for _ in 0..3 {
        node.unpublish("pod-1").await.expect("unpublished");
    }
    assert!(node.mounted().is_empty() && node.pins().is_empty());
    assert!(!node.target("pod-1").exists(), "the target is left");
    node.unpublish("never")
        .await
        .expect("what was never mounted is gone");
    let listed = node.weightctl(&["ls"]);
    assert_eq!(
        listed.as_array().map(Vec::len),
        Some(1),
        "the content went: {listed}"
    );
}

#[tokio::test]
async fn the_hubs_cache_layout_is_what_the_hubs_clients_read() {
    let node = Node::running().await;
    let sha = node.hub.sha("org/model", "main").expect("a commit");
    let ask = Ask::new(
        "pod-1",
        &[
            ("source", MODEL),
            ("revision", &sha),
            ("layout", "hf-cache"),
        ],
    );

    node.publish(&ask).await.expect("published");

    let dir = node.tree("pod-1");
    let repo = dir.join("models--org--model");
    assert_eq!(tree(&repo.join("snapshots").join(&sha)), contents(1));
    assert_eq!(
        fs::read_to_string(repo.join("refs/main")).expect("a ref"),
        sha
    );
    let listing = fs::read_to_string(repo.join(format!("trees/{sha}.json"))).expect("a listing");
    let listing: Value = serde_json::from_str(&listing).expect("JSON");
    assert_eq!(listing["format_version"], 1);
    for (path, bytes) in contents(1) {
        let file = &listing["files"][&path];
        assert_eq!(file["size"], json!(bytes.len()), "{path}: {file}");
        assert_eq!(
            file["blob_id"].as_str().map(str::len),
            Some(40),
            "{path}: {file}"
        );
        let shard = path.ends_with(".safetensors");
        assert_eq!(file["lfs_sha256"].is_string(), shard, "{path}: {file}");
        let mounted = repo.join("snapshots").join(&sha).join(&path);
        let inode = |path| fs::metadata(path).expect("metadata").ino();
        let blob = fs::metadata(&mounted).expect("metadata");
        assert!(blob.nlink() >= 3, "{path} is a copy");
        assert_eq!(inode(mounted), blob.ino());
    }
    assert!(dir.join(".weightd/complete").exists());
    node.unpublish("pod-1").await.expect("unpublished");
    assert!(node.pins().is_empty(), "{:?}", node.pins());
}

#[tokio::test]
async fn a_volume_that_is_mounted_at_once_fills_and_is_marked_last() {
    let node = Node::running().await;
    let stalled = Fault::new(FaultKind::Stall { after_bytes: 1000 });
    node.hub
        .fault(stalled.on(Origin::Cdn).path("model-00002").forever());
    let ask = Ask::new("pod-1", &[("source", MODEL), ("mode", "async")]);

    node.publish(&ask).await.expect("published");

    let dir = node.tree("pod-1");
    let mark = dir.join(".weightd/complete");
    node.until("the first shard is there", async || {
        dir.join("model-00001-of-00002.safetensors").exists()
    })
    .await;
    assert!(!mark.exists(), "marked before the second shard was there");
    assert!(!dir.join("model-00002-of-00002.safetensors").exists());
    for (path, bytes) in tree(&dir) {
        let whole = contents(1).into_iter().find(|(name, _)| *name == path);
        assert_eq!(Some((path, bytes)), whole, "a file that is not whole");
    }
    node.hub.clear_faults();
    node.until("it is complete", async || mark.exists()).await;
    let mut shown = tree(&dir);
    shown.retain(|(path, _)| !path.starts_with(".weightd/"));
    assert_eq!(shown, contents(1));
    assert!(fs::write(dir.join(".weightd/complete"), "").is_err());
    // A second call of kubelet's, and one for a model that is here already.
    node.publish(&ask).await.expect("published again");
    let second = Ask::new("pod-2", &[("source", MODEL), ("mode", "async")]);
    node.publish(&second).await.expect("published");
    assert!(node.tree("pod-2").join(".weightd/complete").exists());
    for pod in ["pod-1", "pod-2"] {
        node.unpublish(pod).await.expect("unpublished");
    }
    assert!(node.pins().is_empty() && node.mounted().is_empty());
}

/// The shards never arrive as they are listed.
fn corrupt() -> Fault {
    let what = FaultKind::Corrupt {
        at_byte: 5000,
        xor: 1,
    };
    Fault::new(what).on(Origin::Cdn).forever()
}

#[tokio::test]
async fn a_pod_is_told_why_its_volume_does_not_fill() {
    let node = Node::running().await;
    node.hub.fault(corrupt());
    let ask = Ask::new("pod-1", &[("source", MODEL), ("mode", "async")]);

    node.publish(&ask).await.expect("published");

    let dir = node.tree("pod-1");
    let error = dir.join(".weightd/error");
    node.until("the error is there", async || error.exists())
        .await;
    let text = fs::read_to_string(&error).expect("readable");
    assert!(text.contains("cannot fetch hf://org/model"), "{text}");
    node.hub.clear_faults();
    node.until("it is complete", async || {
        dir.join(".weightd/complete").exists()
    })
    .await;
    assert!(!error.exists(), "the error is left");
}

#[tokio::test]
async fn a_call_waits_no_longer_than_kubelet_and_says_how_far_it_is() {
    let mut node = Node::new(HubConfig::default());
    node.plugin_options = vec!["--publish-wait=1".to_owned()];
    node.start().await;
    let stalled = Fault::new(FaultKind::Stall {
        after_bytes: 200_000,
    });
    node.hub.fault(stalled.on(Origin::Cdn).forever());
    let ask = Ask::model("pod-1", MODEL);

    let first = node
        .publish(&ask)
        .await
        .expect_err("it cannot be there yet");

    assert_eq!(first.code(), Code::Aborted, "{first}");
    assert!(
        first.message().contains("is still being fetched"),
        "{first}"
    );
    assert!(first.message().contains(" of 1.9 MiB"), "{first}");
    assert!(node.mounted().is_empty() && node.pins().is_empty());
    let both = tokio::join!(node.publish(&ask), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        node.publish(&ask).await
    });
    let second = both.1.expect_err("two calls for one volume at once");
    assert_eq!(second.code(), Code::Aborted, "{second}");
    assert!(second.message().contains("another call"), "{second}");
    node.hub.clear_faults();
    node.mounts(&ask).await;
    assert_eq!(tree(&node.tree("pod-1")), contents(1));
}

#[tokio::test]
async fn many_volumes_of_one_model_are_one_download_and_one_inode_a_file() {
    let node = Node::running().await;
    let pods: Vec<String> = (0..100).map(|number| format!("pod-{number}")).collect();

    let asks: Vec<Ask> = pods.iter().map(|pod| Ask::model(pod, MODEL)).collect();
    let published = futures::future::join_all(asks.iter().map(|ask| node.publish(ask))).await;

    for outcome in published {
        outcome.expect("published");
    }
    let shards: u64 = contents(1)
        .iter()
        .filter(|(path, _)| path.ends_with(".safetensors"))
        .map(|(_, bytes)| bytes.len() as u64)
        .sum();
    assert_eq!(node.hub.cdn_bytes_sent(), shards);
    for (path, _) in contents(1) {
        let inodes = pods.iter().map(|pod| {
            let found = fs::metadata(node.tree(pod).join(&path)).expect("metadata");
            (found.dev(), found.ino())
        });
        assert_eq!(inodes.collect::<BTreeSet<_>>().len(), 1, "{path}");
    }
    for pod in &pods {
        node.unpublish(pod).await.expect("unpublished");
    }
    assert!(node.mounted().is_empty() && node.pins().is_empty());
}

#[tokio::test]
async fn other_patterns_fetch_only_what_is_missing() {
    let node = Node::running().await;
    let small = [("source", MODEL), ("include", "*.json, *.txt")];
    node.publish(&Ask::new("pod-1", &small))
        .await
        .expect("published");
    assert_eq!(node.hub.cdn_bytes_sent(), 0, "a shard was fetched");
    node.hub.clear_requests();

    node.publish(&Ask::model("pod-2", MODEL))
        .await
        .expect("published");

    assert_eq!(node.hub.bytes_sent("config.json"), 0, "fetched again");
    assert_eq!(tree(&node.tree("pod-2")), contents(1));
    assert!(tree(&node.tree("pod-1")).len() < contents(1).len());
}

#[tokio::test]
async fn a_volumes_size_is_that_of_its_model() {
    let node = Node::running().await;
    node.publish(&Ask::model("pod-1", MODEL))
        .await
        .expect("published");
    let stats = async |path: String| {
        let request = csi::NodeGetVolumeStatsRequest {
            volume_id: "csi-pod-1".to_owned(),
            volume_path: path,
            ..csi::NodeGetVolumeStatsRequest::default()
        };
        node.client().await.node_get_volume_stats(request).await
    };

    let found = stats(node.target("pod-1").display().to_string())
        .await
        .expect("measured");

    let bytes: usize = contents(1).iter().map(|(_, bytes)| bytes.len()).sum();
    let usage = found.into_inner().usage;
    assert_eq!(usage[0].used, i64::try_from(bytes).expect("it fits"));
    assert_eq!(
        usage[1].used,
        1 + i64::try_from(contents(1).len()).expect("it fits")
    );
    let missing = stats(node.target("pod-2").display().to_string()).await;
    assert_eq!(
        missing.expect_err("nothing is there").code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn a_thousand_mounts_are_all_complete_while_models_are_evicted() {
    let node = Node::running().await;
    for seed in 2..6 {
        let repo = weightd_standin::Repo::new(format!("org/model-{seed}").as_str());
        node.hub.add_repo(repo.commit("main", files(seed)));
    }
    let gc = async {
        for _ in 0..40 {
            node.weightctl(&["gc"]);
            // What nothing holds goes, as under pressure.
            for seed in 2..6 {
                let name = format!("hf://org/model-{seed}");
                // One that is held stays.
                drop(node.weightctl_command(&["rm", &name]).output());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let worker = async |worker: u32| {
        for round in 0..63 {
            let seed = 2 + (worker + round) % 4;
            let pod = format!("pod-{worker}-{round}");
            let ask = Ask::model(&pod, &format!("hf://org/model-{seed}"));
            node.mounts(&ask).await;
            let found = tree(&node.tree(&pod));
            assert!(
                found == contents(u64::from(seed)),
                "{pod}: a mount that is not whole"
            );
            node.unpublish(&pod).await.expect("unpublished");
        }
    };

    tokio::join!(gc, futures::future::join_all((0..16).map(worker)));

    assert!(node.mounted().is_empty() && node.pins().is_empty());
}

#[tokio::test]
async fn a_container_is_held_back_until_its_volume_is_complete() {
    let node = Node::running().await;
    let slow = Fault::new(FaultKind::Stall { after_bytes: 1000 });
    node.hub.fault(slow.on(Origin::Cdn).forever());
    let asked = [("source", MODEL), ("mode", "async")];
    node.publish(&Ask::new("pod-1", &asked))
        .await
        .expect("published");
    let given_up = node
        .wait_for("pod-1", &["--timeout", "0.5", "--", "true"])
        .output();
    let given_up = given_up.expect("it runs");
    assert_eq!(given_up.status.code(), Some(1));
    let error = String::from_utf8_lossy(&given_up.stderr);
    assert!(error.contains("not complete after"), "{error}");
    let mut gated = node.wait_for("pod-1", &["--", "sh", "-c", "echo started"]);
    let gated = gated.stdout(Stdio::piped()).spawn().expect("it runs");
    tokio::time::sleep(Duration::from_millis(300)).await;

    node.hub.clear_faults();

    let output = gated.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.starts_with(b"started"), "{output:?}");
    assert!(node.tree("pod-1").join(".weightd/complete").exists());
    // A volume of the other mode is complete when it is there.
    node.publish(&Ask::model("pod-2", MODEL))
        .await
        .expect("published");
    let status = node
        .wait_for("pod-2", &["--", "sh", "-c", "exit 7"])
        .status();
    assert_eq!(
        status.expect("it runs").code(),
        Some(7),
        "not the command's own exit code"
    );
}

#[tokio::test]
async fn a_container_whose_volume_cannot_be_completed_ends_and_says_why() {
    let node = Node::running().await;
    let corrupt = FaultKind::Corrupt {
        at_byte: 5000,
        xor: 1,
    };
    node.hub
        .fault(Fault::new(corrupt).on(Origin::Cdn).forever());
    let asked = [("source", MODEL), ("mode", "async")];
    node.publish(&Ask::new("pod-1", &asked))
        .await
        .expect("published");

    let output = node
        .wait_for("pod-1", &["--timeout", "60", "--", "true"])
        .output()
        .expect("it runs");

    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("will not be complete: cannot fetch"),
        "{error}"
    );
}

#[tokio::test]
async fn a_container_that_waits_can_be_stopped() {
    let node = Node::running().await;
    node.hub
        .fault(Fault::new(FaultKind::NoAnswer).on(Origin::Cdn).forever());
    let asked = [("source", MODEL), ("mode", "async")];
    node.publish(&Ask::new("pod-1", &asked))
        .await
        .expect("published");
    let mut waiting = node
        .wait_for("pod-1", &["--", "true"])
        .spawn()
        .expect("it runs");
    tokio::time::sleep(Duration::from_millis(500)).await;

    let pid = i32::try_from(waiting.id()).expect("a pid");
    let signal = nix::sys::signal::Signal::SIGTERM;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("it lives");

    assert_eq!(waiting.wait().expect("it ends").code(), Some(128 + 15));
}
