//! The shared tier: many nodes, one directory, and all that can go wrong with it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::Value;
use weightd_core::digest::Digest;
use weightd_core::shared::{BLOCK_BYTES, SharedOptions, SharedStore};
use weightd_core::store::StageKey;
use weightd_standin::{Fault, FaultKind, Hub, Origin};

use super::crash::{MIB, MODEL, Model, hub, sound};
use super::harness::{Ran, Running, Sandbox, run, tree, wait_until};

/// What an undisturbed prefetch beside an empty shared tier passes there.
pub(super) const OF_A_SHARED_FETCH: &[&str] = &[
    "shared.format",
    "shared.leased",
    "shared.begun",
    "shared.claimed",
    "shared.part",
    "shared.written",
    "shared.synced",
    "shared.finished",
    "shared.sealed",
    "shared.published",
];
pub(super) const OF_DAMAGE: &[&str] = &["shared.set_aside"];

/// Nodes, each with a store of its own, and the tier that they share.
struct Cluster {
    sandbox: Sandbox,
    hub: Hub,
    model: Model,
}

impl Cluster {
    /// Two shards of three segments each, and small files.
    fn new() -> Self {
        Self::with(Model::new(0, 1..=2, 3 * MIB))
    }

    fn with(model: Model) -> Self {
        let hub = hub();
        model.publish(&hub, "org/model");
        Self {
            sandbox: Sandbox::new(),
            hub,
            model,
        }
    }

    fn tier(&self) -> PathBuf {
        self.sandbox.path("tier")
    }

    fn root(&self, node: usize) -> PathBuf {
        self.sandbox.path(&format!("node-{node}"))
    }

    fn command(&self, node: usize, words: &[&str]) -> Command {
        let mut command = self.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
        command
            .env("HF_ENDPOINT", self.hub.endpoint())
            .env("WEIGHTD_SHARED_SEGMENT", "1MiB")
            .env("WEIGHTD_SHARED_CLAIM_TIMEOUT", "2s")
            .arg("--root")
            .arg(self.root(node))
            .arg("--shared-root")
            .arg(self.tier())
            .args(["--output", "json"])
            .args(words);
        command
    }

    fn run(&self, node: usize, words: &[&str]) -> Ran {
        run(&mut self.command(node, words))
    }

    fn start(&self, node: usize) -> Running {
        Running::start(&mut self.command(node, &["prefetch", MODEL]))
    }

    fn prefetch(&self, node: usize) -> Value {
        self.right(&self.run(node, &["prefetch", MODEL]))
    }

    /// What a prefetch said, if its tree is what the origin holds.
    #[track_caller]
    fn right(&self, ran: &Ran) -> Value {
        let fetched = ran.json();
        let path = PathBuf::from(fetched["path"].as_str().expect("a path"));
        assert!(tree(&path) == self.model.tree(), "{ran:?}");
        sound(path.ancestors().nth(3).expect("a store"));
        fetched
    }

    /// Every body trickles.
    fn slow(&self, bytes_per_second: u64) {
        let slow = FaultKind::Slow { bytes_per_second };
        self.hub.fault(Fault::new(slow).on(Origin::Cdn).forever());
    }

    /// The directory of a shard's blob.
    fn blob(&self, shard: usize) -> PathBuf {
        let bytes = self.model.shards.values().nth(shard).expect("a shard");
        let digest = Digest::of(bytes);
        self.tier().join("blobs").join(digest.to_string())
    }

    /// Changes a byte of a shard in the tier, as a failing disk does.
    fn flip_a_byte(&self, shard: usize, at: u64) {
        let blob = fs::File::options()
            .read(true)
            .write(true)
            .open(self.blob(shard).join("blob"));
        let blob = blob.expect("a sealed blob");
        let mut byte = [0];
        blob.read_exact_at(&mut byte, at).expect("readable");
        blob.write_all_at(&[byte[0] ^ 1], at).expect("writable");
    }

    /// Everything in the tier is whole and right, and nobody is at work there.
    #[track_caller]
    fn tier_is_whole(&self) {
        let store = SharedStore::open_existing(&self.tier()).expect("a tier");
        for bytes in self.model.shards.values() {
            let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
            let fill = store.find(&StageKey::of_digest(digest), size);
            let fill = fill.expect("readable").expect("a blob");
            let view = fill.look().expect("readable");
            assert!(view.is_whole() && view.sealed, "{view:?}");
            let found = fs::read(self.tier().join(format!("blobs/{digest}/blob")));
            assert!(
                found.expect("its bytes") == *bytes,
                "wrong bytes in the tier"
            );
            for segment in 0..fill.segments() {
                let sums = fill.sums(segment).expect("readable").expect("checksums");
                for (index, block) in fill.blocks(segment).enumerate() {
                    let bytes = &bytes[block.start as usize..block.end as usize];
                    assert_eq!(sums.check(index, block.start, bytes), Ok(()));
                }
            }
        }
    }

    fn left(&self, what: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.tier()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.to_string_lossy().contains(what) {
                    found.push(path.display().to_string());
                }
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        found
    }
}

fn number(value: &Value, name: &str) -> u64 {
    let number = value[name].as_u64();
    number.unwrap_or_else(|| panic!("no {name} in {value}"))
}

#[test]
fn eight_nodes_at_once_fetch_every_byte_once() {
    let cluster = Cluster::with(Model::new(0, 1..=4, 4 * MIB));
    cluster.slow(2 * MIB);

    let nodes = [0, 1, 2, 3, 4, 5, 6, 7].map(|node| cluster.start(node));
    let nodes = nodes.map(|node| cluster.right(&node.finish()));

    assert_eq!(cluster.hub.cdn_bytes_sent(), cluster.model.shard_bytes());
    let fetched: u64 = nodes.iter().map(|node| number(node, "bytes_fetched")).sum();
    assert_eq!(fetched, number(&nodes[0], "bytes"), "{nodes:?}");
    for node in &nodes {
        let sum = ["bytes_fetched", "bytes_shared", "bytes_reused"].map(|name| number(node, name));
        assert_eq!(sum.iter().sum::<u64>(), number(node, "bytes"), "{node}");
    }
    let helped = nodes
        .iter()
        .filter(|node| number(node, "bytes_fetched") > 0);
    assert!(helped.count() > 1, "one node fetched it all: {nodes:?}");
    cluster.tier_is_whole();
    assert_eq!(cluster.left(".claim"), [""; 0]);
    assert_eq!(cluster.left("leases/"), [""; 0]);
}

#[test]
fn a_later_node_takes_nothing_from_the_origin() {
    let cluster = Cluster::new();
    cluster.prefetch(0);
    cluster.hub.clear_requests();

    let plan = cluster.run(1, &["plan", MODEL]).json();
    assert_eq!(plan["bytes_shared"], plan["bytes"], "{plan}");
    let later = cluster.prefetch(1);

    assert_eq!(cluster.hub.cdn_bytes_sent(), 0);
    assert_eq!(number(&later, "bytes_fetched"), 0, "{later}");
    assert_eq!(later["bytes_shared"], later["bytes"]);
    let status = cluster.run(1, &["status"]).json();
    assert_eq!(status["tiers"][1]["tier"], "shared", "{status}");
    assert_eq!(status["tiers"][1]["state"], "in use", "{status}");
}

#[test]
fn what_a_dead_node_had_claimed_is_taken_over() {
    let cluster = Cluster::new();
    cluster.slow(MIB / 2);
    let mut first = cluster.start(0);
    wait_until("it has claimed something", || {
        cluster.tier().exists() && !cluster.left(".claim").is_empty()
    });
    first.kill();
    cluster.hub.clear_faults();
    let begun = Instant::now();

    let nodes = [1, 2].map(|node| cluster.start(node));
    for node in nodes {
        cluster.right(&node.finish());
    }

    let took = begun.elapsed();
    // Seven tenths of the claim timeout.
    assert!(took >= Duration::from_secs(1), "it did not wait: {took:?}");
    cluster.tier_is_whole();
}

#[test]
fn a_node_that_dies_at_any_step_holds_up_nobody_for_long() {
    for point in OF_A_SHARED_FETCH {
        let cluster = Cluster::new();
        let mut dying = cluster.command(0, &["prefetch", MODEL]);
        let died = run(dying.env("WEIGHTD_FAULT", point));
        assert_eq!(died.code, None, "a fetch does not pass {point}: {died:?}");

        cluster.prefetch(1);
        cluster.prefetch(0);

        cluster.tier_is_whole();
        let sent = cluster.hub.cdn_bytes_sent();
        let twice = 2 * cluster.model.shard_bytes();
        assert!(sent <= twice, "{point}: {sent} bytes left the origin");
    }
}

#[test]
fn damaged_bytes_of_the_tier_are_found_set_aside_and_brought_again() {
    let cluster = Cluster::new();
    cluster.prefetch(0);
    cluster.flip_a_byte(0, MIB + 5);
    cluster.hub.clear_requests();

    let finder = cluster.prefetch(1);

    let fetched = number(&finder, "bytes_fetched");
    assert!((1..=3 * MIB).contains(&fetched), "{finder}");
    assert_ne!(cluster.left(".aside."), [""; 0]);
    cluster.hub.clear_requests();
    let next = cluster.prefetch(2);
    assert_eq!(number(&next, "bytes_fetched"), 0, "{next}");
    cluster.tier_is_whole();
}

#[test]
fn bytes_that_only_their_digest_betrays_are_never_served() {
    let cluster = Cluster::new();
    cluster.prefetch(0);
    // The checksums fit, the bytes are another file's.
    cluster.flip_a_byte(0, 5);
    let wrong = fs::read(cluster.blob(0).join("blob")).unwrap();
    let sum = weightd_core::shared::Sums::of(&wrong[..MIB as usize]);
    fs::write(cluster.blob(0).join("0.sums"), format!("{sum:08x}\nend\n")).unwrap();
    cluster.hub.clear_requests();

    let finder = cluster.prefetch(1);

    assert!(number(&finder, "bytes_fetched") >= 3 * MIB, "{finder}");
    assert_eq!(cluster.hub.cdn_bytes_sent(), 3 * MIB);
    cluster.prefetch(2);
    cluster.tier_is_whole();
}

#[test]
fn a_node_that_got_wrong_bytes_does_not_spoil_the_others() {
    let cluster = Cluster::new();
    let wrong = FaultKind::Corrupt { at_byte: 5, xor: 1 };
    cluster.hub.fault(Fault::new(wrong).on(Origin::Cdn));
    cluster.slow(2 * MIB);

    let nodes = [0, 1, 2].map(|node| cluster.start(node));
    for node in nodes {
        cluster.right(&node.finish());
    }

    cluster.tier_is_whole();
}

#[test]
fn a_node_dies_as_it_sets_damage_aside() {
    for point in OF_DAMAGE {
        let cluster = Cluster::new();
        cluster.prefetch(0);
        cluster.flip_a_byte(1, 2);
        let mut dying = cluster.command(1, &["prefetch", MODEL]);
        let died = run(dying.env("WEIGHTD_FAULT", point));
        assert_eq!(died.code, None, "{point} is not passed: {died:?}");

        cluster.prefetch(1);
        cluster.prefetch(2);
        cluster.tier_is_whole();
    }
}

#[test]
fn without_a_usable_tier_the_origin_serves_and_somebody_is_told() {
    type Spoil<'a> = &'a dyn Fn(&Path);
    let spoilt: [(&str, Spoil<'_>, &str); 4] = [
        (
            "the directory holds something else",
            &|tier| {
                fs::create_dir(tier).unwrap();
                fs::write(tier.join("notes.txt"), "mine").unwrap();
            },
            "not a shared store",
        ),
        (
            "a newer version made it",
            &|tier| {
                fs::create_dir(tier).unwrap();
                fs::write(tier.join("FORMAT"), "weightd shared store 99\n").unwrap();
            },
            "format 99",
        ),
        (
            "it is a file",
            &|tier| fs::write(tier, "").unwrap(),
            "Not a directory",
        ),
        (
            "it hangs",
            &|tier| {
                fs::create_dir(tier).unwrap();
                // A read of it never returns, as from a server that is gone.
                mkfifo(&tier.join("FORMAT"), Mode::S_IRWXU).unwrap();
            },
            "did not answer for 5 s",
        ),
    ];
    for (what, spoil, told) in spoilt {
        let cluster = Cluster::new();
        spoil(&cluster.tier());

        let ran = cluster.run(0, &["prefetch", MODEL]);

        let fetched = cluster.right(&ran);
        assert_eq!(fetched["bytes_fetched"], fetched["bytes"], "{what}");
        assert!(ran.stderr.contains(told), "{what}: {}", ran.stderr);
        let status = cluster.run(0, &["status"]).json();
        assert_eq!(status["tiers"][1]["state"], "left out", "{status}");
    }
}

#[test]
fn what_no_origin_vouches_for_is_not_shared() {
    let cluster = Cluster::new();
    let model = cluster.sandbox.path("model");
    fs::create_dir(&model).unwrap();
    let bytes = cluster.model.shards.values().next().expect("a shard");
    fs::write(model.join("model.safetensors"), bytes).unwrap();

    let name = format!("file://{}", model.display());
    cluster.run(0, &["prefetch", &name]).json();

    let blobs = fs::read_dir(cluster.tier().join("blobs")).unwrap();
    assert_eq!(blobs.count(), 0, "shared on nobody's word");
}

#[test]
fn a_daemon_takes_the_tier_into_use_when_it_comes() {
    let cluster = Cluster::new();
    cluster.prefetch(0);
    let away = cluster.sandbox.path("away");
    fs::rename(cluster.tier(), &away).unwrap();
    // In its place a mount point that nothing is mounted on: its type is not the one it should have.
    let socket = cluster.sandbox.path("d.sock");
    let config = cluster.sandbox.path("weightd.toml");
    let text = format!(
        "root = {:?}\nsocket = {socket:?}\n[shared]\nroot = {:?}\nstall_timeout = \"1s\"\n[store]\nhigh_watermark_percent = 99\n",
        cluster.root(1),
        cluster.tier(),
    );
    fs::write(&config, text).unwrap();
    fs::write(cluster.tier(), "").unwrap();
    let mut daemon = cluster.sandbox.bare(env!("CARGO_BIN_EXE_weightd"));
    daemon.env("HF_ENDPOINT", cluster.hub.endpoint());
    let _daemon = Running::start(daemon.arg("--config").arg(&config));
    wait_until("the daemon serves", || socket.exists());
    let ask = |words: &[&str]| {
        let mut command = cluster.sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
        let command = command.arg("--socket").arg(&socket);
        run(command.args(["--output", "json"]).args(words)).json()
    };
    wait_until("the tier is left out", || {
        ask(&["status"])["tiers"][1]["state"] == "left out"
    });

    fs::remove_file(cluster.tier()).unwrap();
    fs::rename(&away, cluster.tier()).unwrap();
    wait_until("the tier is in use", || {
        ask(&["status"])["tiers"][1]["state"] == "in use"
    });

    let fetched = ask(&["prefetch", MODEL]);
    assert_eq!(number(&fetched, "bytes_fetched"), 0, "{fetched}");
}

#[test]
fn blocks_are_small_enough_to_be_moved_within_a_stall_timeout() {
    // At 1 MB/s for one node, which is a crowd on a small Lustre.
    const { assert!(BLOCK_BYTES <= 5_000_000) };
}

#[test]
fn a_blobs_directory_that_is_removed_holds_up_nobody() {
    let cluster = Cluster::with(Model::new(0, 1..=1, 3 * MIB));
    let options = SharedOptions {
        segment_bytes: Some(MIB),
        file_system: None,
    };
    let store = SharedStore::open(&cluster.tier(), &options).unwrap();
    let bytes = cluster.model.shards.values().next().expect("a shard");
    let key = StageKey::of_digest(Digest::of(bytes));
    let fill = store.fill(&key, bytes.len() as u64).unwrap();
    // A node that is alive and works on all of it.
    let claims = [0, 1, 2].map(|segment| fill.claim(segment, 0, "one").unwrap().unwrap());
    let mut waiting = cluster.start(1);
    for beat in 1..10 {
        claims
            .iter()
            .for_each(|claim| fill.beat(claim, beat).unwrap());
        std::thread::sleep(Duration::from_millis(300));
    }
    assert!(!waiting.ended(), "it did not wait");

    fs::remove_dir_all(cluster.blob(0)).unwrap();

    let begun = Instant::now();
    wait_until("it goes on", || waiting.ended());
    assert!(begun.elapsed() < Duration::from_secs(8));
    cluster.right(&waiting.finish());
    cluster.tier_is_whole();
}

#[test]
fn a_tier_that_hangs_is_waited_for_once_and_not_for_each_file() {
    let cluster = Cluster::with(Model::new(0, 1..=120, 64 << 10));
    fs::create_dir(cluster.tier()).unwrap();
    mkfifo(&cluster.tier().join("FORMAT"), Mode::S_IRWXU).unwrap();

    let begun = Instant::now();
    cluster.prefetch(0);

    let took = begun.elapsed();
    assert!(took < Duration::from_secs(14), "{took:?}");
}

#[test]
fn a_tier_that_can_only_be_read_is_looked_at_before_the_origin_is_asked() {
    let cluster = Cluster::new();
    let mut first = cluster.command(0, &["prefetch", MODEL]);
    cluster.right(&run(first.env("WEIGHTD_SHARED_SEGMENT", "4MiB")));
    // No segment of such a size fits: nothing more is written.
    let path = cluster.tier().join("FORMAT");
    let format = fs::read_to_string(&path).unwrap();
    let segment = format!("segment = {}", 64_u64 << 30);
    fs::write(&path, format.replace("segment = 4194304", &segment)).unwrap();
    cluster.hub.clear_requests();

    let second = cluster.prefetch(1);

    assert_eq!(number(&second, "bytes_fetched"), 0, "{second}");
}

#[test]
fn an_owner_whose_origin_is_slow_is_not_silent() {
    let cluster = Cluster::with(Model::new(0, 1..=1, MIB));
    // Less than a block within a claim timeout.
    cluster.slow(MIB / 6);
    let first = cluster.start(0);
    wait_until("it has claimed it", || {
        cluster.tier().exists() && !cluster.left("0.0.claim").is_empty()
    });

    cluster.prefetch(1);

    cluster.right(&first.finish());
    assert_eq!(cluster.hub.cdn_bytes_sent(), MIB);
}

#[test]
fn damage_all_over_a_file_is_brought_again_by_all_together() {
    let cluster = Cluster::with(Model::new(0, 1..=1, 12 * MIB));
    cluster.prefetch(0);
    (0..12).for_each(|segment| cluster.flip_a_byte(0, segment * MIB + 7));
    cluster.hub.clear_requests();
    cluster.slow(4 * MIB);

    let nodes = [1, 2, 3, 4].map(|node| cluster.start(node));
    for node in nodes {
        cluster.right(&node.finish());
    }

    let sent = cluster.hub.cdn_bytes_sent();
    assert!(sent <= 13 * MIB, "{sent} bytes left the origin");
    assert_eq!(
        cluster
            .left(".aside.")
            .iter()
            .filter(|path| path.ends_with("blob"))
            .count(),
        1
    );
    cluster.tier_is_whole();
}
