//! How long kubelet waits for a volume of a model that is on the node already.
//!
//! ```text
//! cargo build --release -p weightd && cargo bench -p weightd-csi --bench publish -- [--calls 1000]
//! ```
//!
//! Prints one JSON object: the latency of `NodePublishVolume` and `NodeUnpublishVolume`, one call after
//! the other, each with a pod of its own, in milliseconds. The models differ in size alone (`4 GB` and
//! `400 GB`, as sparse files of 2.5 GB) or in layout. `floor` is a bare bind mount, locked down, in the same
//! mount namespace: what the kernel takes of it.

#![allow(clippy::print_stdout, reason = "its result is what it prints")]
#![allow(
    dead_code,
    reason = "the node is that of the tests, which use more of it"
)]

#[path = "../../tests/volumes/node.rs"]
mod node;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use node::{Ask, Node};
use serde_json::{Value, json};
use weightd_standin::{Files, HubConfig, Repo, generate};

/// What each shard is made to be.
const SHARD_BYTES: u64 = 2_500_000_000;

/// Each model's name and how many shards it has.
const MODELS: [(&str, usize); 2] = [("org/model-4gb", 2), ("org/model-400gb", 160)];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, from, to, calls] = words.as_slice()
        && flag == "--floor"
    {
        let calls = calls.parse().expect("a number");
        println!("{}", mount_and_unmount(from.as_ref(), to.as_ref(), calls));
        return;
    }
    let at = words.iter().position(|word| word == "--calls");
    let calls = at.and_then(|at| words.get(at + 1));
    let calls = calls.map_or(1000, |text| text.parse().expect("--calls takes a number"));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let result = runtime.block_on(measure(calls));
    let result = serde_json::to_string_pretty(&result).expect("JSON");
    println!("{result}");
}

async fn measure(calls: usize) -> Value {
    let mut node = Node::new(HubConfig::default());
    for (name, shards) in MODELS {
        let files = Files::new().model(generate::model(shards as u64, shards, 1_000_000));
        node.hub.add_repo(Repo::new(name).commit("main", files));
    }
    node.start().await;
    for (name, _) in MODELS {
        node.weightctl(&["prefetch", &format!("hf://{name}")]);
    }
    grow(&node.root());
    let mut result = json!({ "calls": calls, "floor": floor(&node, calls) });
    for (name, _) in MODELS {
        let source = format!("hf://{name}");
        let listed = node.weightctl(&["ls"]);
        let listed = listed.as_array().expect("models").iter();
        let bytes = listed
            .filter(|model| {
                model["model"]
                    .as_str()
                    .is_some_and(|found| found.contains(name))
            })
            .find_map(|model| model["bytes"].as_u64());
        for layout in ["flat", "hf-cache"] {
            let ask = [("source", source.as_str()), ("layout", layout)];
            let mut times = calls_of(&node, calls, &ask).await;
            times["bytes"] = json!(bytes);
            result[format!("{name} {layout}")] = times;
        }
    }
    result
}

/// Makes all shards as large as those of a model that is worth it. Nothing reads them here.
fn grow(root: &Path) {
    for manifest in files_below(&root.join("snapshots"), "manifest.json") {
        let mut value: Value =
            serde_json::from_slice(&fs::read(&manifest).expect("readable")).expect("JSON");
        let tree = manifest.with_file_name("tree");
        for file in value["files"].as_array_mut().expect("files") {
            let path = file["path"].as_str().expect("a path").to_owned();
            if path.ends_with(".safetensors") {
                let path = tree.join(path);
                let mode = fs::metadata(&path).expect("a shard").permissions();
                fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("ours");
                let shard = File::options().write(true).open(&path).expect("a shard");
                shard.set_len(SHARD_BYTES).expect("a sparse file");
                fs::set_permissions(&path, mode).expect("ours");
                file["size"] = json!(SHARD_BYTES);
            }
        }
        fs::set_permissions(&manifest, Permissions::from_mode(0o644)).expect("ours");
        fs::write(&manifest, value.to_string()).expect("a manifest");
    }
}

fn files_below(dir: &Path, name: &str) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).expect("snapshots");
    let paths = entries.map(|entry| entry.expect("an entry").path().join(name));
    paths.filter(|path| path.exists()).collect()
}

async fn calls_of(node: &Node, calls: usize, attributes: &[(&str, &str)]) -> Value {
    let mut client = node.client().await;
    let (mut publish, mut unpublish) = (Vec::new(), Vec::new());
    for call in 0..calls {
        let pod = format!("pod-{call}");
        let request = node.request(&Ask::new(&pod, attributes));
        let target = request.target_path.clone();
        let volume_id = request.volume_id.clone();
        let begun = Instant::now();
        client
            .node_publish_volume(request)
            .await
            .expect("published");
        publish.push(begun.elapsed().as_secs_f64() * 1e3);
        let request = weightd_proto::csi::v1::NodeUnpublishVolumeRequest {
            volume_id,
            target_path: target,
        };
        let begun = Instant::now();
        client
            .node_unpublish_volume(request)
            .await
            .expect("unpublished");
        unpublish.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    json!({ "publish_ms": spread(publish), "unpublish_ms": spread(unpublish) })
}

/// Bind mounts by the kernel alone, in the node's mount namespace.
fn floor(node: &Node, calls: usize) -> Value {
    let (from, to) = (node.path("floor-from"), node.path("floor-to"));
    fs::create_dir_all(&from).expect("a directory");
    fs::create_dir_all(&to).expect("a directory");
    let program = std::env::current_exe().expect("this program");
    let mut command = node.inside(program.to_str().expect("UTF-8"));
    command.arg("--floor").arg(&from).arg(&to);
    let output = command.arg(calls.to_string()).output().expect("it runs");
    serde_json::from_slice(&output.stdout).expect("times")
}

fn mount_and_unmount(from: &Path, to: &Path, calls: usize) -> Value {
    let locked = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let none = None::<&Path>;
    let mut times = Vec::new();
    for _ in 0..calls {
        let begun = Instant::now();
        mount(Some(from), to, none, MsFlags::MS_BIND, none).expect("mounted");
        let again = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | locked;
        mount(none, to, none, again, none).expect("locked down");
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        umount2(to, MntFlags::empty()).expect("unmounted");
    }
    spread(times)
}

fn spread(mut times: Vec<f64>) -> Value {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let index = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len()) - 1;
        (times[index] * 1e3).round() / 1e3
    };
    json!({ "p50": at(0.5), "p99": at(0.99), "max": at(1.0) })
}
