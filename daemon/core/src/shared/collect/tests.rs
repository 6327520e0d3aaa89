use std::cell::{Cell, RefCell};
use std::fs::File;
use std::time::SystemTime;

use super::*;
use crate::model::{Patterns, RelPath, Revision};
use crate::shared::{SharedFile, SharedLease, SharedOptions, Sums};
use crate::store::StageKey;

const DAY: i64 = 86_400;

/// A store in a directory of its own, and what its file system takes for now.
struct Scene {
    _dir: tempfile::TempDir,
    store: SharedStore,
    now: i64,
}

/// All that somebody left in the store, without the times.
fn tree(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for (_, path) in entries(root).unwrap() {
        found.push(path.display().to_string());
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            found.extend(tree(&path));
        }
    }
    found.sort();
    found
}

fn key(text: &str) -> StageKey {
    StageKey::of_digest(Digest::of(text.as_bytes()))
}

fn set_used(path: &Path, used: i64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(used.try_into().unwrap());
    File::open(path).unwrap().set_modified(time).unwrap();
}

const POLICY: CollectPolicy = CollectPolicy {
    max_age: Some(Duration::from_secs(30 * 86_400)),
    max_bytes: None,
    grace: Duration::from_secs(3600),
    silence: Duration::from_secs(15),
    dry_run: false,
};

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = SharedStore::open(&dir.path().join("s"), &SharedOptions::default()).unwrap();
        let now = store.clock().unwrap();
        Self {
            _dir: dir,
            store,
            now,
        }
    }

    fn blob_path(&self, text: &str) -> PathBuf {
        self.store.blobs().join(key(text).to_string())
    }

    /// A blob of 64 KiB.
    fn blob(&self, text: &str) {
        let bytes = text.repeat(65_536 / text.len());
        let fill = self.store.fill(&key(text), bytes.len() as u64).unwrap();
        let part = fill.part().unwrap();
        part.write(0, bytes.as_bytes()).unwrap();
        part.sync().unwrap();
        let mut sums = Sums::new(1);
        sums.set(0, Sums::of(bytes.as_bytes()));
        fill.finish(0, &sums).unwrap();
        fill.seal().unwrap();
    }

    /// Bytes on disk of the blobs.
    fn bytes(&self, texts: &[&str]) -> u64 {
        let bytes = |text: &&str| {
            let fill = self.store.find(&key(text), 1).unwrap().unwrap();
            fill.usage().unwrap().0
        };
        texts.iter().map(bytes).sum()
    }

    /// A model of these blobs, used so many days ago.
    fn model(&self, name: &str, blobs: &[&str], days: i64) -> PathBuf {
        let asked: ModelRef = format!("hf://org/{name}").parse().unwrap();
        let commit = Revision::new(&"a".repeat(40)).unwrap();
        let files = blobs.iter().map(|text| SharedFile {
            path: RelPath::new(text).unwrap(),
            size: 65_536,
            sha256: Digest::of(text.as_bytes()),
            key: Some(key(text).to_string()),
        });
        let snapshot = SharedSnapshot {
            format: 1,
            snapshot: SnapshotId::new(&asked, &commit, &Patterns::default()),
            model: asked.at(&commit),
            patterns: Patterns::default(),
            published_at: 0,
            files: files.collect(),
        };
        for text in blobs {
            self.blob(text);
        }
        self.store.publish(&snapshot, &asked).unwrap();
        let id = &snapshot.snapshot;
        let path = self.store.root.join(format!("snapshots/{id}.json"));
        set_used(&path, self.now + DAY - days * DAY);
        path
    }

    fn lease(&self, blobs: &[&str]) -> SharedLease {
        let keys: Vec<StageKey> = blobs.iter().map(|text| key(text)).collect();
        self.store.lease(&keys, "node uuid").unwrap()
    }

    /// Collects a day after the scene was made.
    fn collect(&self, policy: CollectPolicy) -> SharedCollected {
        self.collect_while(policy, &|_| {}, &|_| {})
    }

    fn collect_while(
        &self,
        policy: CollectPolicy,
        wait: &dyn Fn(Duration),
        renamed: &dyn Fn(&str),
    ) -> SharedCollected {
        let now = self.now + DAY;
        let dry = CollectPolicy {
            dry_run: true,
            ..policy
        };
        let before = tree(&self.store.root);
        let planned = self.store.collect_at(&dry, now, wait, &|_| panic!("dry"));
        assert_eq!(tree(&self.store.root), before, "a dry run changed it");
        let done = self.store.collect_at(&policy, now, wait, renamed).unwrap();
        assert_eq!(done.failed, Vec::<String>::new());
        if done.blobs_in_use == planned.as_ref().unwrap().blobs_in_use {
            assert_eq!(planned.unwrap(), done, "the plan was another");
        }
        done
    }

    fn models(&self) -> Vec<String> {
        let found = self.store.snapshots().unwrap();
        let mut names: Vec<String> = { found.into_iter() }
            .map(|(_, found)| found.model.name().to_owned())
            .collect();
        names.sort();
        names
    }

    fn has(&self, text: &str) -> bool {
        self.blob_path(text).join("blob").exists()
    }

    fn asides(&self) -> usize {
        let found = entries(&self.store.blobs()).unwrap();
        { found.iter() }
            .filter(|(name, _)| form(name) == Form::Aside)
            .count()
    }
}

#[test]
fn models_that_nobody_used_for_long_go_with_the_blobs_that_only_they_need() {
    let scene = Scene::new();
    scene.model("old", &["both", "only old"], 31);
    scene.model("new", &["both", "only new"], 29);
    let freed = scene.bytes(&["only old"]);

    let collected = scene.collect(POLICY);

    assert_eq!(scene.models(), ["org/new"]);
    assert!(scene.has("both") && scene.has("only new") && !scene.has("only old"));
    assert_eq!((collected.blobs, collected.bytes_freed), (1, freed));
    assert_eq!(collected.refs, 1);
    assert!(!scene.store.root.join("refs/hf/org%2Fold/main").exists());
    assert!(scene.store.root.join("refs/hf/org%2Fnew/main").exists());
    let [gone] = &collected.snapshots[..] else {
        panic!("{collected:?}");
    };
    assert_eq!(gone.model.name(), "org/old");
    assert_eq!((gone.why, gone.bytes), (Why::Age, 2 * 65_536));
    assert_eq!(gone.age_seconds, 31 * 86_400);
    assert_eq!(scene.asides(), 0);
}

#[test]
fn the_least_recently_used_models_go_until_the_rest_fits() {
    let scene = Scene::new();
    scene.model("second", &["2"], 2);
    scene.model("fourth", &["4", "all"], 4);
    scene.model("first", &["1", "all"], 1);
    scene.model("third", &["3"], 3);
    let policy = |max_bytes| CollectPolicy {
        max_bytes: Some(max_bytes),
        ..POLICY
    };
    let room = scene.bytes(&["1", "2", "3", "4", "all"]);
    assert_eq!(scene.collect(policy(room)), SharedCollected::default());

    let collected = scene.collect(policy(scene.bytes(&["1", "2", "all"])));

    let order = collected.snapshots.iter();
    let order: Vec<_> = { order.map(|gone| (gone.model.name(), gone.why)) }.collect();
    assert_eq!(order, [("org/fourth", Why::Room), ("org/third", Why::Room)]);
    assert_eq!(scene.models(), ["org/first", "org/second"]);
    assert!(scene.has("all"));
    assert_eq!(collected.blobs, 2);
}

#[test]
fn a_model_that_goes_for_room_makes_it_even_while_its_blobs_are_young() {
    let scene = Scene::new();
    scene.model("old", &["1"], 3);
    scene.model("middle", &["2"], 2);
    scene.model("new", &["3"], 1);
    let policy = CollectPolicy {
        max_bytes: Some(scene.bytes(&["2", "3"])),
        grace: Duration::from_secs(2 * 86_400),
        ..POLICY
    };

    let first = scene.collect(policy);
    let second = scene.collect(policy);

    assert_eq!((first.snapshots.len(), first.blobs_young), (1, 1));
    assert_eq!((second.snapshots.len(), second.blobs_young), (0, 1));
    assert_eq!(scene.models(), ["org/middle", "org/new"]);
    assert!(scene.has("1"));
}

#[test]
fn what_no_model_needs_has_a_grace() {
    let scene = Scene::new();
    scene.blob("whole");
    scene.store.fill(&key("begun"), 5).unwrap().part().unwrap();
    let policy = |seconds| CollectPolicy {
        grace: Duration::from_secs(seconds),
        ..POLICY
    };

    let young = scene.collect(policy(2 * 86_400));
    assert_eq!((young.blobs, young.fills, young.blobs_young), (0, 0, 2));
    let old = scene.collect(policy(80_000));
    assert_eq!((old.blobs, old.fills, old.blobs_young), (1, 1, 0));
    assert!(entries(&scene.store.blobs()).unwrap().is_empty());
}

#[test]
fn a_lease_that_beats_protects_models_and_blobs() {
    let scene = Scene::new();
    scene.model("used", &["1", "2"], 40);
    scene.blob("loose");
    let (of_model, of_blob) = (scene.lease(&["2"]), scene.lease(&["loose", "other"]));
    let beats = Cell::new(0);
    let waited = RefCell::new(Vec::new());
    let wait = |time| {
        waited.borrow_mut().push(time);
        beats.set(beats.get() + 1);
        of_model.beat(beats.get()).unwrap();
        of_blob.beat(beats.get()).unwrap();
    };

    let collected = scene.collect_while(POLICY, &wait, &|_| {});

    assert_eq!(waited.into_inner(), [POLICY.silence; 2], "dry and real");
    assert_eq!((collected.snapshots_in_use, collected.blobs_in_use), (1, 1));
    assert_eq!((collected.blobs, collected.leases), (0, 0));
    assert!(scene.has("1") && scene.has("2") && scene.has("loose"));
}

#[test]
fn a_silent_lease_protects_nothing_and_goes() {
    let scene = Scene::new();
    scene.model("used", &["1"], 40);
    let _left = scene.lease(&["1"]);

    let collected = scene.collect(POLICY);

    assert_eq!((collected.snapshots.len(), collected.blobs), (1, 1));
    assert_eq!(collected.leases, 1);
    assert!(
        entries(&scene.store.root.join("leases"))
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_lease_made_after_the_look_gets_the_blob_back() {
    let scene = Scene::new();
    scene.blob("loose");
    let size = 65_536 / 5 * 5;

    let collected = scene.collect_while(POLICY, &|_| {}, &|_| {
        assert!(!scene.has("loose"));
        scene.lease(&["loose"]);
    });

    assert_eq!((collected.blobs, collected.blobs_in_use), (0, 1));
    let fill = scene.store.find(&key("loose"), size).unwrap().unwrap();
    let view = fill.look().unwrap();
    assert!(view.sealed && view.is_whole());
    assert_eq!(scene.asides(), 0);
}

#[test]
fn a_lease_that_comes_back_after_the_look_gets_the_blob_back() {
    let scene = Scene::new();
    scene.blob("loose");
    let lease = scene.lease(&["loose"]);

    let collected = scene.collect_while(POLICY, &|_| {}, &|_| lease.beat(7).unwrap());

    assert_eq!((collected.blobs_in_use, collected.leases), (1, 0));
    assert!(scene.has("loose"));
}

#[test]
fn who_found_no_blob_and_began_anew_is_not_disturbed() {
    let scene = Scene::new();
    scene.blob("loose");

    let collected = scene.collect_while(POLICY, &|_| {}, &|_| {
        scene.lease(&["loose"]);
        let fill = scene.store.fill(&key("loose"), 5).unwrap();
        fill.claim(0, 0, "node").unwrap().unwrap();
    });

    assert_eq!(collected.blobs_in_use, 1);
    assert!(scene.blob_path("loose").join("0.0.claim").exists());
    assert_eq!(scene.asides(), 1);
}

#[test]
fn a_claim_that_changes_protects_a_blob_and_a_silent_one_does_not() {
    let scene = Scene::new();
    let begin = |text: &str| {
        let fill = scene.store.fill(&key(text), 5).unwrap();
        let claim = fill.claim(0, 0, "node").unwrap().unwrap();
        (fill, claim)
    };
    let ((live, claim), _dead) = (begin("live"), begin("dead"));
    let progress = Cell::new(0);
    let wait = |_| {
        progress.set(progress.get() + 1);
        live.beat(&claim, progress.get()).unwrap();
    };

    let collected = scene.collect_while(POLICY, &wait, &|_| {});

    assert_eq!((collected.fills, collected.blobs_in_use), (1, 1));
    assert!(scene.blob_path("live").exists() && !scene.blob_path("dead").exists());

    let collected = scene.collect_while(POLICY, &|_| {}, &|_| {
        live.claim(0, 1, "next").unwrap().unwrap();
    });
    assert_eq!((collected.fills, collected.blobs_in_use), (0, 1));
    assert!(scene.blob_path("live").exists());
}

#[test]
fn who_dies_before_the_delete_leaves_it_to_the_next() {
    let scene = Scene::new();
    scene.blob("loose");
    let now = scene.now + DAY;
    let die = || {
        scene
            .store
            .collect_at(&POLICY, now, &|_| {}, &|_| panic!("killed"))
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(die)).unwrap_err();
    assert!(!scene.has("loose"));
    assert_eq!(scene.asides(), 1);

    let collected = scene.collect(POLICY);

    assert_eq!((collected.asides, scene.asides()), (1, 0));
}

#[test]
fn what_was_set_aside_goes_after_the_grace() {
    let scene = Scene::new();
    scene.model("kept", &["good"], 1);
    scene.model("damaged", &["bad"], 1);
    let fill = scene.store.find(&key("bad"), 1).unwrap().unwrap();
    assert!(fill.set_aside().unwrap());
    let policy = |seconds| CollectPolicy {
        grace: Duration::from_secs(seconds),
        ..POLICY
    };

    assert_eq!(scene.collect(policy(2 * 86_400)).asides, 0);
    assert_eq!(scene.asides(), 1);
    let collected = scene.collect(policy(3600));

    assert_eq!((collected.asides, collected.blobs), (1, 0));
    assert!(collected.bytes_freed > 0);
    assert_eq!(scene.asides(), 0);
    assert_eq!(scene.models(), ["org/damaged", "org/kept"]);
}

#[test]
fn unfinished_files_go_after_the_grace() {
    let scene = Scene::new();
    scene.model("kept", &["good"], 1);
    let id = uuid::Uuid::new_v4();
    let root = &scene.store.root;
    let left = [
        root.join(format!("FORMAT.{id}")),
        root.join(format!("leases/probe.{id}")),
        root.join(format!("snapshots/hf-x.json.{id}")),
        root.join(format!("refs/hf/org%2Fkept/main.{id}")),
        scene.blob_path("good").join(format!("0.sums.{id}")),
    ];
    for path in &left {
        fs::write(path, "x").unwrap();
    }

    let policy = CollectPolicy {
        grace: Duration::from_secs(2 * 86_400),
        ..POLICY
    };
    assert_eq!(scene.collect(policy).temporaries, 0);
    assert_eq!(scene.collect(POLICY).temporaries, 5);
    assert!(left.iter().all(|path| !path.exists()));
    assert!(scene.has("good"));
}

#[test]
fn names_that_are_not_ours_are_left_alone() {
    let scene = Scene::new();
    let outside = scene.store.root.with_file_name("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "x").unwrap();
    let blobs = scene.store.blobs();
    let hex = "ab".repeat(32);
    let id = uuid::Uuid::new_v4();
    for name in [
        "notes",
        &hex[1..],
        &format!("{hex}.aside.me"),
        &hex.to_uppercase(),
    ] {
        fs::create_dir(blobs.join(name)).unwrap();
    }
    fs::write(blobs.join("cd".repeat(32)), "a file").unwrap();
    let precious = outside.join("precious");
    let root = &scene.store.root;
    for (target, link) in [
        (&outside, blobs.join(&hex)),
        (&outside, blobs.join(format!("{hex}.aside.{id}"))),
        (&outside, root.join("refs/hf")),
        (&precious, root.join(format!("leases/{id}"))),
        (&precious, root.join("snapshots/hf-x.json")),
    ] {
        std::os::unix::fs::symlink(target, link).unwrap();
    }
    fs::write(scene.store.root.join("leases/README"), "x").unwrap();
    fs::write(scene.store.root.join(format!("mine.{id}")), "x").unwrap();
    let before = tree(scene.store.root.parent().unwrap());

    let collected = scene.collect(CollectPolicy {
        grace: Duration::ZERO,
        max_bytes: Some(0),
        ..POLICY
    });

    assert_eq!(collected, SharedCollected::default());
    assert_eq!(tree(scene.store.root.parent().unwrap()), before);
}

#[test]
fn a_blob_is_kept_that_a_note_of_a_later_version_needs() {
    let scene = Scene::new();
    scene.blob("kept");
    scene.blob("gone");
    let note = format!("{{\"format\": 2, \"parts\": [\"{}\"]}}", key("kept"));
    fs::write(scene.store.root.join("snapshots/hf-later.json"), note).unwrap();

    let collected = scene.collect(POLICY);

    assert_eq!(collected.blobs, 1);
    assert!(scene.has("kept") && !scene.has("gone"));
}

#[test]
fn a_model_used_after_the_look_is_kept() {
    let scene = Scene::new();
    let note = scene.model("used", &["1"], 40);
    let _silent = scene.lease(&["other"]);
    // Between the looks at the leases; the notes are read after them.
    let wait = |_| set_used(&note, scene.now);

    let collected = scene.collect_while(POLICY, &wait, &|_| {});

    assert_eq!(collected.snapshots, []);
    assert!(scene.has("1"));
}

#[test]
fn many_collectors_at_once_remove_it_once() {
    let scene = Scene::new();
    for number in 0..40 {
        scene.blob(&format!("blob {number}"));
    }
    let (store, now) = (&scene.store, scene.now + DAY);
    let removed: u64 = std::thread::scope(|scope| {
        let collect = || store.collect_at(&POLICY, now, &|_| {}, &|_| {}).unwrap();
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(collect)).collect();
        let runs = runs.into_iter().map(|run| run.join().unwrap());
        runs.inspect(|run| assert_eq!(run.failed, Vec::<String>::new()))
            .map(|run| run.blobs + run.asides)
            .sum()
    });

    assert_eq!(removed, 40);
    assert!(entries(&store.blobs()).unwrap().is_empty());
}
