//! What a SIGKILL leaves behind: at every step that changes the disk, and at any moment at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use nix::libc::SIGKILL;
use weightd_core::digest::{Claims, Digest};
use weightd_core::fault;
use weightd_core::model::RelPath;
use weightd_core::source::{RemoteFile, Vouched};
use weightd_core::store::{StageKey, Store, StoreLimits};
use weightd_standin::{Fault, FaultKind, Files, Hub, HubConfig, Origin, Repo};

use super::harness::{Ran, Running, Sandbox, assert_sound, run, tree};
use super::shared;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const MODEL: &str = "hf://org/model";

/// A user who owns nothing.
const NOBODY: u32 = 65534;

/// A safetensors file of `bytes` bytes that a loader can read; another seed gives other bytes.
pub(super) fn shard(seed: u64, bytes: u64) -> Vec<u8> {
    const HEADER: usize = 120;
    let data = bytes as usize - 8 - HEADER;
    let header =
        format!(r#"{{"w{seed}":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
    let mut file = (HEADER as u64).to_le_bytes().to_vec();
    file.extend(format!("{header:HEADER$}").as_bytes());
    file.resize(bytes as usize, 0);
    fastrand::Rng::with_seed(seed).fill(&mut file[8 + HEADER..]);
    file
}

/// A model with shards, which the CDN serves, and small files, which the Hub itself does.
#[derive(Clone)]
pub(super) struct Model {
    pub(super) shards: BTreeMap<String, Vec<u8>>,
    small: BTreeMap<String, Vec<u8>>,
}

impl Model {
    /// One shard of `bytes` bytes for each seed; `small` makes its small files its own.
    pub(super) fn new(small: u64, seeds: impl IntoIterator<Item = u64>, bytes: u64) -> Self {
        let named = |seed| (format!("model-{seed}.safetensors"), shard(seed, bytes));
        let text = |name: &str| {
            (
                name.to_owned(),
                format!(r#"{{"{name}": {small}}}"#).into_bytes(),
            )
        };
        Self {
            shards: seeds.into_iter().map(named).collect(),
            small: ["config.json", "generation_config.json", "tokenizer.json"]
                .map(text)
                .into(),
        }
    }

    /// So many little files and nothing else.
    fn of_little_files(count: usize) -> Self {
        let file = |number| (format!("part/{number:03}.json"), vec![b' '; number]);
        Self {
            shards: BTreeMap::new(),
            small: (1..=count).map(file).collect(),
        }
    }

    pub(super) fn publish(&self, hub: &Hub, id: &str) {
        let mut files = Files::new();
        for (path, bytes) in &self.small {
            files = files.file(path, bytes.clone());
        }
        for (path, bytes) in &self.shards {
            files = files.lfs(path, bytes.clone());
        }
        hub.add_repo(Repo::new(id).commit("main", files));
    }

    /// What [`tree`] finds of it.
    pub(super) fn tree(&self) -> Vec<(String, Vec<u8>)> {
        let all = self.small.iter().chain(&self.shards);
        let all: BTreeMap<_, _> = all
            .map(|(path, bytes)| (path.clone(), bytes.clone()))
            .collect();
        all.into_iter().collect()
    }

    /// Bytes that the CDN serves.
    pub(super) fn shard_bytes(&self) -> u64 {
        self.shards.values().map(|bytes| bytes.len() as u64).sum()
    }

    /// Bytes of its shards that the store at `root` has neither sealed nor journaled.
    pub(super) fn missing_from(&self, root: &Path) -> u64 {
        if !root.join("staging").exists() {
            return self.shard_bytes();
        }
        let store = Store::open(root, StoreLimits::default()).expect("the store opens");
        let missing = self.shards.iter().map(|(path, bytes)| {
            let sha256 = Digest::of(bytes);
            let file = RemoteFile {
                path: RelPath::new(path).expect("a path"),
                size: bytes.len() as u64,
                claims: Claims {
                    sha256: Some(sha256),
                    ..Claims::default()
                },
                identity: None,
                vouched: Vouched::BySource,
                xet_hash: None,
                told: None,
            };
            match store.has(sha256) {
                true => 0,
                false => file.size - store.journaled_bytes(&StageKey::of(&file)),
            }
        });
        missing.sum()
    }
}

pub(super) fn hub() -> Hub {
    Hub::spawn_thread(HubConfig::default()).expect("a hub")
}

/// A hub with one model, and a store.
struct Scene {
    sandbox: Sandbox,
    hub: Hub,
    model: Model,
}

impl Scene {
    fn new(model: Model) -> Self {
        let hub = hub();
        model.publish(&hub, "org/model");
        Self {
            sandbox: Sandbox::new(),
            hub,
            model,
        }
    }

    fn small() -> Self {
        static MODEL: LazyLock<Model> = LazyLock::new(|| Model::new(0, 1..=3, 3 * MIB));
        Self::new(MODEL.clone())
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.sandbox.weightctl();
        command.env("HF_ENDPOINT", self.hub.endpoint()).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Ran {
        run(&mut self.command(words))
    }

    /// Runs a command that passes `point` for the `nth` time, and dies there. False if it ended by
    /// itself before.
    #[track_caller]
    fn dies_at(&self, words: &[&str], point: &str, nth: usize) -> bool {
        let mut command = self.command(words);
        let ended = command
            .env("WEIGHTD_FAULT", format!("{point}:{nth}"))
            .output();
        let ended = ended.expect("the command starts");
        let killed = ended.status.signal() == Some(SIGKILL);
        let text = String::from_utf8_lossy(&ended.stderr);
        assert!(
            killed || ended.status.success(),
            "{point}:{nth}: {:?}: {text}",
            ended.status
        );
        killed
    }

    /// Fetches the model, and checks that its tree is what the origin holds.
    #[track_caller]
    fn fetches_whole(&self, words: &[&str]) {
        let fetched = self.run(words).json();
        let path = PathBuf::from(fetched["path"].as_str().expect("a path"));
        assert!(
            tree(&path) == self.model.tree(),
            "{} differs from the origin",
            path.display()
        );
        sound(&self.sandbox.root());
    }

    /// Collects everything that can be, after which nothing may be left in flight.
    #[track_caller]
    fn leaves_nothing_in_flight(&self) {
        self.run(&["gc", "--partial"]).json();
        let names = |folder: &str| -> Vec<_> {
            let entries = fs::read_dir(self.sandbox.root().join(folder)).expect("a folder");
            entries
                .map(|entry| entry.expect("an entry").file_name())
                .collect()
        };
        assert_eq!(names("staging"), [""; 0], "left in staging");
        assert_eq!(names("fetches"), [""; 0], "left in fetches");
        assert_eq!(names("damaged"), [""; 0], "left in damaged");
        sound(&self.sandbox.root());
    }

    /// Changes one byte of the first shard's blob, as a failing disk does.
    fn flip_a_byte(&self) {
        let bytes = self.model.shards.values().next().expect("a shard");
        let name = Digest::of(bytes).to_string();
        let blob = self
            .sandbox
            .root()
            .join("blobs/sha256")
            .join(&name[..2])
            .join(&name);
        let mut bytes = bytes.clone();
        bytes[2 * MIB as usize] ^= 1;
        // In place: the tree is the same inode.
        let mut permissions = fs::metadata(&blob).expect("a blob").permissions();
        let sealed = permissions.clone();
        permissions.set_mode(0o644);
        fs::set_permissions(&blob, permissions).expect("it is ours");
        fs::write(&blob, bytes).expect("writable");
        fs::set_permissions(&blob, sealed).expect("it is ours");
    }
}

/// [`assert_sound`], also for a store that was killed before it had its folders.
#[track_caller]
pub(super) fn sound(root: &Path) {
    if root.join("snapshots").exists() {
        assert_sound(root);
    } else {
        assert!(!root.join("blobs/sha256").exists() || tree(&root.join("blobs/sha256")).is_empty());
    }
}

const PREFETCH: &[&str] = &["prefetch", MODEL, "--pin", "serving"];

/// What an undisturbed prefetch into an empty store passes.
const OF_A_FETCH: &[&str] = &[
    "store.open.format",
    "fetch.recorded",
    "lease.created",
    "room.reserved",
    "part.created",
    "part.allocated",
    "part.written",
    "part.journaled",
    "seal.synced",
    "seal.linked",
    "seal.renamed",
    "seal.unjournaled",
    "known.written",
    "lease.linked",
    "publish.manifest",
    "publish.synced",
    "publish.renamed",
    "ref.written",
    "pin.written",
    "fetch.forgotten",
];

/// What a fetch passes besides that has many little files.
const OF_MANY_FILES: &[&str] = &["seal.written"];

const OF_A_REMOVAL: &[&str] = &[
    "evict.renamed",
    "evict.deleted",
    "collect.renamed",
    "collect.deleted",
];
const OF_A_COLLECTION: &[&str] = &["collect.renamed", "collect.deleted"];
const OF_A_VERIFICATION: &[&str] = &["verify.set_aside", "verify.withdrawn"];
const OF_A_REPAIR: &[&str] = &["repair.linked"];
const OF_A_TORN_PART: &[&str] = &["journal.written", "journal.renamed"];
// The tests of volumes die there (tests/volumes/recovery.rs).
const OF_A_VOLUME: &[&str] = &[
    "volume.created",
    "volume.recorded",
    "volume.linked",
    "volume.completed",
    "volume.renamed",
];

#[test]
fn every_fault_point_has_a_test_that_dies_there() {
    let tested = [
        OF_A_FETCH,
        OF_MANY_FILES,
        OF_A_REMOVAL,
        OF_A_COLLECTION,
        OF_A_VERIFICATION,
        OF_A_REPAIR,
        OF_A_TORN_PART,
        OF_A_VOLUME,
        shared::OF_A_SHARED_FETCH,
        shared::OF_DAMAGE,
        super::shared_admin::OF_AN_IMPORT,
        super::shared_admin::OF_A_SHARED_COLLECTION,
    ];
    let tested: BTreeSet<&str> = tested.concat().into_iter().collect();
    let known: BTreeSet<&str> = fault::POINTS.iter().copied().collect();
    assert_eq!(tested, known);
}

/// A fetch that dies at `point` for the `nth` time. False if it never got there so often.
#[track_caller]
#[allow(clippy::print_stdout, reason = "a test that failed tells where")]
fn a_fetch_dies_and_goes_on(point: &str, nth: usize) -> bool {
    println!("{point}:{nth}");
    let scene = Scene::small();
    let root = scene.sandbox.root();
    if !scene.dies_at(PREFETCH, point, nth) {
        return false;
    }
    sound(&root);
    let missing = scene.model.missing_from(&root);
    scene.hub.clear_requests();
    scene.fetches_whole(PREFETCH);
    assert_eq!(
        scene.hub.cdn_bytes_sent(),
        missing,
        "{point}:{nth}: fetched again"
    );
    let listed = scene.run(&["ls"]).json();
    assert_eq!(listed[0]["pinned_by"][0], "operator/serving", "{listed}");
    scene.leaves_nothing_in_flight();
    true
}

#[test]
fn a_fetch_that_dies_at_any_step_goes_on_with_what_it_had() {
    for point in OF_A_FETCH {
        assert!(
            a_fetch_dies_and_goes_on(point, 1),
            "a fetch does not pass {point}"
        );
    }
}

#[test]
fn a_fetch_that_dies_at_a_step_that_comes_again_goes_on_with_what_it_had() {
    let mut died = BTreeSet::new();
    for point in OF_A_FETCH {
        for nth in [2, 5] {
            if a_fetch_dies_and_goes_on(point, nth) {
                died.insert(*point);
            }
        }
    }
    for point in [
        "part.journaled",
        "seal.linked",
        "seal.renamed",
        "known.written",
        "ref.written",
    ] {
        assert!(died.contains(point), "{point} comes only once");
    }
}

#[test]
fn a_fetch_of_many_little_files_that_dies_at_any_step_is_sound_and_completes() {
    const FILES: usize = 150;
    let model = Model::of_little_files(FILES);
    let points = OF_MANY_FILES.iter().chain(OF_A_FETCH);
    let mut died = BTreeSet::new();
    for point in points.filter(|point| point.starts_with("seal.") || **point == "known.written") {
        for nth in [1, FILES / 2, FILES] {
            let scene = Scene::new(model.clone());
            if scene.dies_at(PREFETCH, point, nth) {
                died.insert(*point);
            }
            sound(&scene.sandbox.root());
            scene.fetches_whole(PREFETCH);
            scene.leaves_nothing_in_flight();
        }
    }
    let passed = [
        "known.written",
        "seal.linked",
        "seal.renamed",
        "seal.synced",
        "seal.written",
    ];
    assert_eq!(died, passed.into());
}

#[test]
fn a_fetch_that_dies_over_a_torn_block_keeps_the_others() {
    for point in OF_A_TORN_PART {
        let scene = Scene::new(Model::new(0, 1..=1, 8 * MIB));
        let root = scene.sandbox.root();
        assert!(
            scene.dies_at(PREFETCH, "part.journaled", 6),
            "too few blocks"
        );
        let entries = fs::read_dir(root.join("staging")).expect("a folder");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        let of_shard = |path: &PathBuf| {
            let large = fs::metadata(path).is_ok_and(|found| found.len() == 8 * MIB);
            large && path.extension().is_some_and(|ending| ending == "part")
        };
        let part = paths.into_iter().find(of_shard).expect("the shard's part");
        // The first record of its journal: where its block begins, and how long it is.
        let journal = fs::read(part.with_extension("journal")).expect("a journal");
        let number = |at: usize| u64::from_le_bytes(journal[at..at + 8].try_into().expect("8"));
        let file = fs::File::options()
            .write(true)
            .open(&part)
            .expect("it is ours");
        let lost = vec![0; number(8) as usize];
        file.write_all_at(&lost, number(0)).expect("written");
        let missing = scene.model.missing_from(&root);

        assert!(scene.dies_at(PREFETCH, point, 1), "nothing passes {point}");

        let left = scene.model.missing_from(&root);
        assert!(
            left <= missing + number(8),
            "{point}: {left} bytes are missing"
        );
        scene.fetches_whole(PREFETCH);
        scene.leaves_nothing_in_flight();
    }
}

#[test]
fn a_removal_that_dies_at_any_step_leaves_only_what_the_collector_takes() {
    for point in OF_A_REMOVAL {
        let scene = Scene::small();
        scene.fetches_whole(&["prefetch", MODEL]);
        assert!(
            scene.dies_at(&["rm", MODEL], point, 1),
            "a removal does not pass {point}"
        );
        sound(&scene.sandbox.root());
        assert_eq!(scene.run(&["ls"]).json(), serde_json::json!([]), "{point}");
        scene
            .run(&["rm", MODEL])
            .failed(1, &["is not in the store"]);
        scene.leaves_nothing_in_flight();
        assert_eq!(tree(&scene.sandbox.root().join("blobs")), [], "{point}");
        scene.fetches_whole(&["prefetch", MODEL]);
    }
}

#[test]
fn a_fetch_after_a_removal_that_died_takes_what_is_still_here() {
    let scene = Scene::small();
    scene.fetches_whole(&["prefetch", MODEL]);
    assert!(scene.dies_at(&["rm", MODEL], "evict.renamed", 1));
    scene.hub.clear_requests();
    scene.fetches_whole(&["prefetch", MODEL]);
    assert_eq!(scene.hub.cdn_bytes_sent(), 0);
}

#[test]
fn a_collection_that_dies_at_any_step_is_finished_by_the_next() {
    for point in OF_A_COLLECTION {
        let scene = Scene::small();
        scene.fetches_whole(&["prefetch", MODEL]);
        assert!(scene.dies_at(&["rm", MODEL], "evict.renamed", 1));
        assert!(
            scene.dies_at(&["gc"], point, 2),
            "a collection does not pass {point}"
        );
        sound(&scene.sandbox.root());
        scene.run(&["gc"]).json();
        assert_eq!(tree(&scene.sandbox.root().join("blobs")), [], "{point}");
        scene.leaves_nothing_in_flight();
    }
}

#[test]
fn a_verification_that_dies_at_any_step_hides_no_damage_from_the_next_fetch() {
    for point in OF_A_VERIFICATION {
        let scene = Scene::small();
        scene.fetches_whole(&["prefetch", MODEL]);
        scene.flip_a_byte();
        assert!(
            scene.dies_at(&["verify"], point, 1),
            "a verification does not pass {point}"
        );
        // The next to open the store, whoever that is, finishes what was begun.
        assert_eq!(scene.run(&["ls"]).json(), serde_json::json!([]), "{point}");
        sound(&scene.sandbox.root());
        scene.hub.clear_requests();
        scene.fetches_whole(&["prefetch", MODEL]);
        assert_eq!(
            scene.hub.cdn_bytes_sent(),
            3 * MIB,
            "{point}: one shard is bad"
        );
        scene.run(&["verify"]).json();
        scene.leaves_nothing_in_flight();
    }
}

#[test]
fn a_repair_that_dies_at_any_file_is_finished_by_the_next_fetch() {
    for point in OF_A_REPAIR {
        let files = Scene::small().model.tree().len();
        for nth in 1..=files {
            let scene = Scene::small();
            scene.fetches_whole(&["prefetch", MODEL]);
            scene.flip_a_byte();
            scene.run(&["verify"]).failed_with_result(1);
            let died = scene.dies_at(&["prefetch", MODEL], point, nth);
            assert!(died, "a repair does not pass {point}:{nth}");
            sound(&scene.sandbox.root());
            assert_eq!(
                scene.run(&["ls"]).json(),
                serde_json::json!([]),
                "{point}:{nth}"
            );
            scene.hub.clear_requests();
            scene.fetches_whole(&["prefetch", MODEL]);
            assert_eq!(scene.hub.cdn_bytes_sent(), 0, "{point}:{nth}: it was here");
            scene.leaves_nothing_in_flight();
        }
    }
}

trait FailedWithResult {
    fn failed_with_result(&self, code: i32);
}

impl FailedWithResult for Ran {
    /// `verify` prints what it found although it fails.
    #[track_caller]
    fn failed_with_result(&self, code: i32) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(
            serde_json::from_str::<serde_json::Value>(&self.stdout).is_ok(),
            "{self:?}"
        );
    }
}

/// As any user but root, who may write to everything.
#[test]
fn a_user_without_privileges_goes_on_after_a_death_with_a_sealed_file_in_flight() {
    // Of which file it is the n-th is not said, so each is tried.
    let files = Scene::small().model.tree().len();
    let points = ["seal.synced", "seal.linked", "known.written"];
    let tries = points.map(|point| (1..=files).map(move |nth| format!("{point}:{nth}")));
    let mut died = 0;
    for point in tries.into_iter().flatten() {
        let scene = Scene::small();
        let home = scene.sandbox.path("home");
        fs::create_dir(&home).expect("a directory");
        fs::set_permissions(&home, fs::Permissions::from_mode(0o777)).expect("it is ours");
        let above = home.parent().expect("the sandbox");
        fs::set_permissions(above, fs::Permissions::from_mode(0o755)).expect("it is ours");
        // The binary's own directory may be closed to others.
        let binary = home.join("weightctl");
        fs::copy(env!("CARGO_BIN_EXE_weightctl"), &binary).expect("a copy");
        let command = |fault: &str| {
            let mut command = scene.sandbox.bare(binary.to_str().expect("UTF-8"));
            command
                .arg("--root")
                .arg(home.join("store"))
                .args(["--output", "json"]);
            command
                .args(["prefetch", MODEL])
                .env("WEIGHTD_FAULT", fault);
            command.env("HF_ENDPOINT", scene.hub.endpoint());
            if nix::unistd::geteuid().is_root() {
                command.uid(NOBODY).gid(NOBODY);
            }
            command
        };

        let ended = command(&point).output().expect("it starts");
        let killed = ended.status.signal() == Some(SIGKILL);
        assert!(killed || ended.status.success(), "{point}: {ended:?}");
        died += usize::from(killed);
        let fetched = run(&mut command("")).json();

        let path = PathBuf::from(fetched["path"].as_str().expect("a path"));
        assert!(
            tree(&path) == scene.model.tree(),
            "{point}: it differs from the origin"
        );
        sound(&home.join("store"));
    }
    // Two points that all files pass, and one that only those pass whose digest was not known.
    assert!(died > 2 * files, "only {died} died");
}

/// A store that `weightctl` was killed on, again and again.
struct Killed {
    scene: Scene,
    /// Kills since the store was empty.
    kills: u64,
}

impl Killed {
    /// Starts a prefetch and kills it after `delay`; if it is done by then, checks its tree and the
    /// bytes it took, and empties the store.
    #[track_caller]
    fn kill_a_fetch_after(&mut self, delay: Duration) {
        let root = self.scene.sandbox.root();
        let mut fetch = Running::start(&mut self.scene.command(&["prefetch", MODEL]));
        std::thread::sleep(delay);
        if !fetch.ended() {
            fetch.kill();
            self.kills += 1;
            sound(&root);
            return;
        }
        self.complete(&fetch.finish());
    }

    #[track_caller]
    fn complete(&mut self, fetched: &Ran) {
        // What a kill may lose: for each of the six connections the block in memory, which is 1 MiB,
        // and as much again on its way.
        const LOST: u64 = 6 * 2 * MIB;
        let root = self.scene.sandbox.root();
        let fetched = fetched.json();
        let path = PathBuf::from(fetched["path"].as_str().expect("a path"));
        assert!(
            tree(&path) == self.scene.model.tree(),
            "it differs from the origin"
        );
        sound(&root);
        let (sent, size) = (
            self.scene.hub.cdn_bytes_sent(),
            self.scene.model.shard_bytes(),
        );
        assert!(
            sent >= size && sent <= size + self.kills * LOST,
            "{sent} of {size}"
        );
        self.scene.leaves_nothing_in_flight();
        fs::remove_dir_all(&root).expect("it goes");
        self.scene.hub.clear_requests();
        self.kills = 0;
    }
}

/// Kills fetches of one model until there were `kills`, then lets the last one complete.
fn kill_at_random(seed: u64, kills: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let scene = Scene::new(Model::new(0, 1..=6, 4 * MIB));
    let slow = FaultKind::Slow {
        bytes_per_second: 16 * MIB,
    };
    scene.hub.fault(Fault::new(slow).on(Origin::Cdn).forever());
    let mut killed = Killed { scene, kills: 0 };
    let mut all = 0;
    while all < kills {
        let before = killed.kills;
        killed.kill_a_fetch_after(Duration::from_millis(random.u64(0..400)));
        all += killed.kills.saturating_sub(before);
    }
    let last = killed.scene.run(&["prefetch", MODEL]);
    killed.complete(&last);
}

#[test]
#[allow(clippy::print_stdout, reason = "a run that failed can be repeated")]
fn a_fetch_that_is_killed_at_a_hundred_random_moments_is_always_sound_and_completes() {
    let seed = std::env::var("WEIGHTD_SEED").ok();
    let seed = seed
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("WEIGHTD_SEED={seed}");
    std::thread::scope(|scope| {
        for store in 0..4 {
            scope.spawn(move || kill_at_random(seed.wrapping_add(store), 25));
        }
    });
}

/// Runs `words` over and over while a fetch runs in another process, kills it at random half of the
/// time, and fetches until the tree is whole.
#[track_caller]
fn a_fetch_next_to(words: &[&str], codes: &[i32], rounds: u64) {
    let scene = Scene::new(Model::new(0, 1..=4, 2 * MIB));
    let slow = FaultKind::Slow {
        bytes_per_second: 8 * MIB,
    };
    scene.hub.fault(Fault::new(slow).on(Origin::Cdn).forever());
    let root = scene.sandbox.root();
    let mut random = fastrand::Rng::with_seed(rounds);
    for round in 0..rounds {
        let mut fetch =
            Running::start(&mut scene.command(&["prefetch", MODEL, "--pin", "serving"]));
        while !fetch.ended() {
            let mut other = Running::start(&mut scene.command(words));
            if random.bool() {
                std::thread::sleep(Duration::from_millis(random.u64(0..80)));
                other.kill();
            } else {
                let ran = other.finish();
                assert!(
                    ran.code.is_some_and(|code| codes.contains(&code)),
                    "{ran:?}"
                );
            }
        }
        let fetched = fetch.finish().json();
        let path = PathBuf::from(fetched["path"].as_str().expect("a path"));
        assert!(
            tree(&path) == scene.model.tree(),
            "round {round}: it differs from the origin"
        );
        sound(&root);
        let verified = scene.run(&["verify"]).json();
        assert_eq!(verified["damaged"], serde_json::json!([]), "round {round}");
        scene.run(&["unpin", MODEL, "--as", "serving"]).json();
        scene.run(&["rm", MODEL]).json();
        sound(&root);
    }
    scene.leaves_nothing_in_flight();
    assert_eq!(tree(&root.join("blobs")), []);
}

#[test]
fn a_fetch_next_to_collections_that_die_ends_with_a_whole_tree() {
    a_fetch_next_to(&["gc"], &[0], 5);
}

#[test]
fn a_fetch_next_to_collections_of_partial_downloads_ends_with_a_whole_tree() {
    a_fetch_next_to(&["gc", "--partial"], &[0], 5);
}

#[test]
fn a_fetch_next_to_removals_that_die_ends_with_a_whole_tree() {
    a_fetch_next_to(&["rm", MODEL], &[1], 5);
}

#[test]
fn a_fetch_next_to_verifications_that_die_ends_with_a_whole_tree() {
    a_fetch_next_to(&["verify"], &[0], 5);
}
