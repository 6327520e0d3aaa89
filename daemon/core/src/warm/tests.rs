//! Warming, on snapshots that were dropped from the page cache before.

use std::fs;
use std::time::Duration;

use super::*;
use crate::digest::Digest;
use crate::manifest::{FileEntry, Manifest};
use crate::model::{Patterns, RelPath, Revision};
use crate::store::StoreLimits;

const MIB: u64 = 1 << 20;

struct Fixture {
    dir: tempfile::TempDir,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&dir.path().join("store"), StoreLimits::default());
        Self {
            store: store.expect("a store"),
            dir,
            metrics: Arc::default(),
        }
    }

    /// A published snapshot whose files have so many bytes.
    fn publish(&self, name: &str, files: &[(&str, u64)]) -> (ModelRef, SnapshotId) {
        let asked: ModelRef = format!("hf://org/{name}").parse().expect("a model");
        let revision = Revision::new(&"0".repeat(40)).expect("a revision");
        let model = asked.at(&revision);
        let id = SnapshotId::new(&asked, &revision, &Patterns::default());
        let dir = self.store.root().join("snapshots").join(id.as_str());
        fs::create_dir_all(dir.join("tree")).expect("a directory");
        let entry = |(path, size): &(&str, u64)| {
            let bytes = vec![7; usize::try_from(*size).expect("small")];
            fs::write(dir.join("tree").join(path), &bytes).expect("written");
            FileEntry {
                path: RelPath::new(path).expect("a path"),
                size: *size,
                sha256: Digest::of(&bytes),
                git_oid: None,
                xet_hash: None,
                believed: false,
            }
        };
        let manifest = Manifest {
            format: Manifest::FORMAT,
            snapshot: id.clone(),
            model: model.clone(),
            patterns: Patterns::default(),
            published_at: 0,
            files: files.iter().map(entry).collect(),
        };
        let json = serde_json::to_vec(&manifest).expect("JSON");
        fs::write(dir.join("manifest.json"), json).expect("written");
        (model, id)
    }

    /// Drops the snapshot from the page cache. False if this file system keeps everything there.
    fn drop_cached(&self, id: &SnapshotId) -> bool {
        let snapshot = self.store.snapshot(id).expect("read").expect("here");
        for (path, _) in files(&snapshot) {
            let file = File::open(path).expect("opened");
            page_cache::drop_cached(&file).expect("asked");
        }
        self.resident(id) == 0
    }

    fn resident(&self, id: &SnapshotId) -> u64 {
        let snapshot = self.store.snapshot(id).expect("read").expect("here");
        measure(&files(&snapshot)).expect("they are ours")
    }

    /// A warmer on a machine that has so many bytes available.
    fn warmer(&self, limits: WarmLimits, available: u64) -> Arc<Warmer> {
        let proc = self.dir.path().join("proc");
        fs::create_dir_all(&proc).expect("a directory");
        let text = format!("MemAvailable: {} kB\n", available / 1024);
        fs::write(proc.join("meminfo"), text).expect("written");
        let memory = Memory::below(self.dir.path());
        Warmer::with_memory(
            Arc::clone(&self.store),
            limits,
            Arc::clone(&self.metrics),
            memory,
        )
    }
}

async fn ended(mut told: watch::Receiver<Warming>) -> Warming {
    let ended = told.wait_for(|warming| warming.state.is_end()).await;
    ended.expect("it ends").clone()
}

#[tokio::test]
async fn what_is_cold_is_read_and_what_is_warm_is_not_read_again() {
    let fixture = Fixture::new();
    let (model, id) = fixture.publish("a", &[("config.json", 500), ("model.safetensors", 3 * MIB)]);
    let is_cold = fixture.drop_cached(&id);
    let warmer = fixture.warmer(WarmLimits::default(), 1 << 40);

    let first = ended(warmer.warm(&model, &id)).await;
    let second = ended(warmer.warm(&model, &id)).await;

    let all = 3 * MIB + 500;
    assert_eq!(
        (first.state, first.bytes, first.bytes_warm),
        (WarmState::Warm, all, all)
    );
    assert_eq!(first.bytes_read, if is_cold { all } else { 0 });
    assert_eq!(
        (second.state, second.bytes_warm, second.bytes_read),
        (WarmState::Warm, all, 0)
    );
    assert_eq!(fixture.resident(&id), all);
    let metrics = fixture.metrics.encode();
    let counted = "weightd_page_cache_warmings_total{outcome=\"warm\"} 2";
    assert!(metrics.contains(counted), "{metrics}");
    assert!(
        metrics.contains(&format!("weightd_page_cache_bytes {all}\n")),
        "{metrics}"
    );
}

#[tokio::test]
async fn at_the_ceiling_it_ends_with_what_a_loader_opens_first() {
    let fixture = Fixture::new();
    let (model, id) = fixture.publish(
        "a",
        &[
            ("model-00001-of-00002.safetensors", 17 * MIB),
            ("model-00002-of-00002.safetensors", 17 * MIB),
            ("tokenizer.json", MIB),
        ],
    );
    let is_cold = fixture.drop_cached(&id);
    let limits = WarmLimits {
        max_memory_percent: 50,
        ..WarmLimits::default()
    };
    let warmer = fixture.warmer(limits, 40 * MIB);

    let warming = ended(warmer.warm(&model, &id)).await;

    if !is_cold {
        assert_eq!(warming.state, WarmState::Warm, "nothing was to be read");
        return;
    }
    let ceiling = 40 * MIB / 100 * 50;
    assert_eq!(
        warming.state,
        WarmState::Partly(Shortfall::Ceiling(ceiling))
    );
    assert_eq!(
        warming.bytes_read,
        18 * MIB,
        "the small file and the first shard"
    );
    assert!(
        (18 * MIB..=ceiling).contains(&warming.bytes_warm),
        "{warming:?}"
    );
}

#[tokio::test]
async fn the_ceiling_holds_for_all_that_was_warmed_together() {
    let fixture = Fixture::new();
    let (first, a) = fixture.publish("a", &[("a.bin", 6 * MIB)]);
    let (second, b) = fixture.publish("b", &[("b.bin", 6 * MIB)]);
    let limits = WarmLimits {
        max_memory_percent: 100,
        ..WarmLimits::default()
    };
    let warmer = fixture.warmer(limits, 8 * MIB);
    assert_eq!(ended(warmer.warm(&first, &a)).await.state, WarmState::Warm);

    if !fixture.drop_cached(&b) {
        return;
    }
    let short = ended(warmer.warm(&second, &b)).await;
    assert!(
        matches!(short.state, WarmState::Partly(Shortfall::Ceiling(_))),
        "{short:?}"
    );

    // The kernel has dropped the first one since.
    assert!(fixture.drop_cached(&a));
    assert_eq!(ended(warmer.warm(&second, &b)).await.state, WarmState::Warm);
}

#[tokio::test(start_paused = true)]
async fn it_takes_the_time_that_the_rate_says() {
    let fixture = Fixture::new();
    let (model, id) = fixture.publish("a", &[("a.bin", 8 * MIB)]);
    if !fixture.drop_cached(&id) {
        return;
    }
    let limits = WarmLimits {
        bytes_per_second: 2 * MIB,
        ..WarmLimits::default()
    };
    let warmer = fixture.warmer(limits, 1 << 40);
    let begun = tokio::time::Instant::now();

    let warming = ended(warmer.warm(&model, &id)).await;

    let took = begun.elapsed();
    assert_eq!(warming.state, WarmState::Warm);
    assert!(
        (Duration::from_secs(3)..Duration::from_secs(5)).contains(&took),
        "{took:?}"
    );
}

#[tokio::test]
async fn one_waits_for_the_other_and_the_end_ends_both() {
    let fixture = Fixture::new();
    let (first, a) = fixture.publish("a", &[("a.bin", 64 * MIB)]);
    let (second, b) = fixture.publish("b", &[("b.bin", MIB)]);
    if !fixture.drop_cached(&a) {
        return;
    }
    let limits = WarmLimits {
        bytes_per_second: MIB,
        ..WarmLimits::default()
    };
    let warmer = fixture.warmer(limits, 1 << 40);
    let mut reading = warmer.warm(&first, &a);
    reading
        .wait_for(|now| now.bytes_read > 0)
        .await
        .expect("it reads");
    let waiting = warmer.warm(&second, &b);
    assert!(
        warmer.warm(&first, &a).same_channel(&reading),
        "it was not joined"
    );
    assert_eq!(waiting.borrow().state, WarmState::Waiting);

    tokio::time::timeout(Duration::from_secs(10), warmer.shutdown())
        .await
        .expect("it ends soon");

    assert_eq!(ended(reading).await.state, WarmState::Stopped);
    assert_eq!(ended(waiting).await.state, WarmState::Stopped);
}

#[tokio::test]
async fn what_is_gone_is_neither_warm_nor_told_of() {
    let fixture = Fixture::new();
    let (model, id) = fixture.publish("a", &[("a.bin", MIB)]);
    let warmer = fixture.warmer(WarmLimits::default(), 1 << 40);
    ended(warmer.warm(&model, &id)).await;
    assert_eq!(warmer.told().await.len(), 1);

    fs::remove_dir_all(fixture.store.root().join("snapshots").join(id.as_str())).expect("removed");

    assert_eq!(warmer.told().await, []);
    let warming = ended(warmer.warm(&model, &id)).await;
    assert_eq!(warming.state, WarmState::Partly(Shortfall::Removed));
}
