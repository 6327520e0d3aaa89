use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::{Arc, Mutex};

use futures::FutureExt;
use futures::future::BoxFuture;

use super::*;
use crate::digest::GitOid;
use crate::fetch::{FetchLimits, FetchRequest, Fetcher};
use crate::model::Revision;
use crate::shared::{Fill, SharedConfig, SharedOptions, SharedTier};
use crate::source::{ByteStream, Listing, RemoteFile, Source, SourceError, Sources, Vouched};
use crate::store::{Store, StoreLimits};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER: &str = "fedcba9876543210fedcba9876543210fedcba98";

/// A cache and a shared store, side by side.
struct Scene {
    dir: tempfile::TempDir,
    store: SharedStore,
}

fn weights(seed: u8) -> Vec<u8> {
    let bytes = (0..11_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed);
    bytes.collect()
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Blocks of 4 MiB do not fit into these segments evenly.
        let options = SharedOptions {
            segment_bytes: Some(5 << 20),
            file_system: None,
        };
        let store = SharedStore::open(&dir.path().join("shared"), &options).unwrap();
        Self { dir, store }
    }

    fn home(&self) -> PathBuf {
        self.dir.path().join("huggingface")
    }

    fn model(&self, name: &str) -> PathBuf {
        self.home().join("hub").join(format!("models--org--{name}"))
    }

    /// Adds a file to a snapshot in the cache, as `huggingface_hub` would. Returns the blob.
    fn add(&self, name: &str, commit: &str, path: &str, bytes: &[u8]) -> PathBuf {
        let hash = match path.ends_with(".safetensors") {
            true => Digest::of(bytes).to_string(),
            false => GitOid::of(bytes).to_string(),
        };
        let blob = self.model(name).join("blobs").join(&hash);
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(&blob, bytes).unwrap();
        let up = "../".repeat(2 + path.matches('/').count());
        self.link(name, commit, path, &format!("{up}blobs/{hash}"));
        blob
    }

    fn link(&self, name: &str, commit: &str, path: &str, target: &str) {
        let link = self.model(name).join("snapshots").join(commit).join(path);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(target, link).unwrap();
    }

    /// A model with a branch; 11 MiB of weights, and two small files.
    fn small(&self, name: &str, commit: &str) -> PathBuf {
        let blob = self.add(name, commit, "model.safetensors", &weights(0));
        self.add(name, commit, "config.json", b"{}");
        self.add(name, commit, "sub/vocab.json", name.as_bytes());
        fs::create_dir_all(self.model(name).join("refs")).unwrap();
        fs::write(self.model(name).join("refs/main"), commit).unwrap();
        blob
    }

    fn import(&self, dir: &Path) -> Imported {
        self.store.import(dir, false, &|_, _| {}).unwrap()
    }

    fn fill(&self, path: &str, bytes: &[u8]) -> Fill {
        let size = bytes.len() as u64;
        let key = match path.ends_with(".safetensors") {
            true => StageKey::of_digest(Digest::of(bytes)),
            false => StageKey::of_identity(&format!("git-sha1:{}:{size}", GitOid::of(bytes))),
        };
        self.store.find(&key, size).unwrap().expect(path)
    }

    /// Checks a blob as a node does that copies it.
    fn is_sound(&self, path: &str, bytes: &[u8]) {
        let fill = self.fill(path, bytes);
        let view = fill.look().unwrap();
        assert!(view.sealed && view.is_whole(), "{path}: {view:?}");
        let mut found = Vec::new();
        io::Read::read_to_end(&mut fill.bytes().unwrap().unwrap(), &mut found).unwrap();
        assert!(found == bytes, "{path}");
        for segment in 0..fill.segments() {
            let sums = fill.sums(segment).unwrap().unwrap();
            for (index, block) in fill.blocks(segment).enumerate() {
                let part = &bytes[block.start as usize..block.end as usize];
                sums.check(index, block.start, part).unwrap();
            }
        }
    }

    /// What lies in the shared store's blobs, without the checksums.
    fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        for key in fs::read_dir(self.store.blobs()).unwrap() {
            for file in fs::read_dir(key.unwrap().path()).unwrap() {
                let name = file.unwrap().file_name().into_string().unwrap();
                found.extend((!name.ends_with(".sums")).then_some(name));
            }
        }
        found.sort();
        found
    }
}

fn blob_of(fill: &Fill) -> PathBuf {
    fill.path().join("blob")
}

#[test]
fn a_cached_model_is_imported_with_its_checksums_and_its_branch() {
    let scene = Scene::new();
    let blob = scene.small("model", COMMIT);
    scene.add(
        "model",
        COMMIT,
        "pytorch_model.bin",
        b"not what a loader needs",
    );
    fs::write(scene.model("model").join("blobs/ab.incomplete"), "x").unwrap();
    fs::create_dir_all(scene.home().join("hub/.locks")).unwrap();
    let progress = Mutex::new(Vec::new());
    let note = |done, all| progress.lock().unwrap().push((done, all));

    let imported = scene.store.import(&scene.home(), false, &note).unwrap();

    let bytes = (11 << 20) + 2 + 5;
    let expected = ImportedModel {
        model: format!("hf://org/model@{COMMIT}").parse().unwrap(),
        files: 3,
        bytes,
        bytes_hashed: bytes,
        bytes_linked: bytes,
        bytes_copied: 0,
        bytes_present: 0,
    };
    assert_eq!(imported.models, [expected]);
    assert_eq!((&imported.damaged, &imported.refused), (&vec![], &vec![]));
    assert_eq!(imported.skipped, []);
    scene.is_sound("model.safetensors", &weights(0));
    scene.is_sound("config.json", b"{}");
    scene.is_sound("vocab.json", b"model");
    assert_eq!(scene.files(), ["blob", "blob", "blob"]);
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let linked = blob_of(&scene.fill("model.safetensors", &weights(0)));
    assert_eq!(inode(&linked), inode(&blob));
    let progress = progress.into_inner().unwrap();
    assert_eq!(progress[0], (0, bytes));
    assert_eq!(progress.iter().map(|(done, _)| *done).max(), Some(bytes));

    let [(_, note)] = &scene.store.snapshots().unwrap()[..] else {
        panic!("one note");
    };
    assert_eq!(note.files.len(), 3);
    assert_eq!(note.files[1].sha256, Digest::of(&weights(0)));
    let named = |asked: &str| {
        let path = format!("refs/hf/org%2Fmodel/{asked}");
        fs::read_to_string(scene.store.root().join(path)).unwrap()
    };
    assert_eq!(named("main"), format!("\"{}\"", note.snapshot));
    assert_eq!(named(COMMIT), named("main"));
    assert_eq!(
        fs::read_dir(scene.store.root().join("leases"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn a_second_import_reads_nothing() {
    let scene = Scene::new();
    scene.small("model", COMMIT);
    scene.import(&scene.home());
    let progress = Mutex::new(Vec::new());
    let note = |done, all| progress.lock().unwrap().push((done, all));

    let again = scene.store.import(&scene.home(), false, &note).unwrap();

    let model = &again.models[0];
    assert_eq!((model.bytes_hashed, model.bytes_linked), (0, 0));
    assert_eq!(
        (model.bytes_present, model.bytes),
        (model.bytes, (11 << 20) + 7)
    );
    assert_eq!(progress.into_inner().unwrap(), [(0, 0)]);
}

#[test]
fn home_cache_and_model_are_ways_in_and_another_directory_is_none() {
    let scene = Scene::new();
    scene.small("one", COMMIT);
    scene.small("two", OTHER);
    for (dir, models) in [
        (scene.home(), 2),
        (scene.home().join("hub"), 2),
        (scene.model("two"), 1),
    ] {
        assert_eq!(scene.import(&dir).models.len(), models, "{}", dir.display());
    }
    let empty = scene.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let import = |dir: &Path| scene.store.import(dir, false, &|_, _| {}).unwrap_err();
    assert!(matches!(import(&empty), ImportError::NotACache { .. }));
    assert!(import(&empty).hint().unwrap().contains("HF_HOME"));
    let missing = import(&empty.join("none"));
    assert!(
        matches!(missing, ImportError::Cache { op: "find", .. }),
        "{missing}"
    );
}

#[test]
fn what_revisions_and_models_share_is_brought_once() {
    let scene = Scene::new();
    scene.small("one", COMMIT);
    scene.add("one", OTHER, "model.safetensors", &weights(0));
    scene.add("one", OTHER, "config.json", b"{\"a\": 1}");

    let imported = scene.import(&scene.home());

    let brought: u64 = imported.models.iter().map(|model| model.bytes_hashed).sum();
    let present: u64 = imported
        .models
        .iter()
        .map(|model| model.bytes_present)
        .sum();
    assert_eq!(
        (imported.models.len(), brought),
        (2, (11 << 20) + 2 + 3 + 8)
    );
    assert_eq!(present, 11 << 20);
}

#[test]
fn damaged_blobs_are_left_out_with_all_that_hold_them() {
    let scene = Scene::new();
    let blob = scene.small("bad", COMMIT);
    scene.add("bad", OTHER, "model.safetensors", &weights(0));
    scene.small("good", COMMIT);
    let good = scene
        .model("good")
        .join("blobs")
        .join(blob.file_name().unwrap());
    fs::remove_file(&good).unwrap();
    fs::write(&good, weights(0)).unwrap();
    let mut bytes = weights(0);
    bytes[6 << 20] ^= 1;
    fs::write(&blob, &bytes).unwrap();
    let small = scene.add("git", COMMIT, "config.json", b"{}");
    fs::write(&small, b"[]").unwrap();

    let mut imported = scene.import(&scene.home());

    imported.damaged.sort_by(|a, b| a.path.cmp(&b.path));
    let [weights_of_bad, config] = &imported.damaged[..] else {
        panic!("{imported:?}");
    };
    let blob = fs::canonicalize(blob).unwrap();
    assert_eq!(
        (&weights_of_bad.path, weights_of_bad.models.len()),
        (&blob, 2)
    );
    assert!(
        weights_of_bad.why.contains("sha256"),
        "{}",
        weights_of_bad.why
    );
    assert!(config.why.contains("git sha1"), "{}", config.why);
    assert_eq!(imported.skipped.len(), 3);
    assert_eq!(imported.models.len(), 1);
    assert_eq!(imported.models[0].model.name(), "org/good");
    scene.is_sound("model.safetensors", &weights(0));
    assert!(
        scene.files().iter().all(|name| name == "blob"),
        "{:?}",
        scene.files()
    );
}

#[test]
fn links_that_lead_elsewhere_are_refused() {
    let scene = Scene::new();
    let secret = scene.dir.path().join("secret.json");
    fs::write(&secret, "{}").unwrap();
    let hash = GitOid::of(b"{}").to_string();
    fs::write(scene.dir.path().join(&hash), "{}").unwrap();
    for (name, target) in [
        ("absolute", secret.display().to_string()),
        ("up", format!("../../../../../../{hash}")),
        ("other", format!("../../../models--org--good/blobs/{hash}")),
        ("name", "../../blobs/notes.json".to_owned()),
        ("through", format!("../../blobs/x/../../../../{hash}")),
    ] {
        scene.small(name, COMMIT);
        scene.link(name, COMMIT, "evil.json", &target);
    }
    scene.small("good", COMMIT);
    // The blob itself is a link.
    scene.small("blob", COMMIT);
    let blob = scene.model("blob").join("blobs").join(&hash);
    fs::remove_file(&blob).unwrap();
    symlink(&secret, &blob).unwrap();
    // So is a folder, and a model.
    scene.small("folder", COMMIT);
    let blobs = scene.model("folder").join("blobs");
    fs::rename(&blobs, scene.dir.path().join("blobs")).unwrap();
    symlink(scene.dir.path().join("blobs"), &blobs).unwrap();
    symlink(scene.model("good"), scene.model("linked")).unwrap();

    let imported = scene.import(&scene.home());

    let models: Vec<_> = { imported.models.iter() }
        .map(|found| found.model.name())
        .collect();
    assert_eq!(models, ["org/good"]);
    let mut refused: Vec<_> = { imported.refused.iter() }
        .map(|left| left.path.display().to_string())
        .collect();
    refused.sort();
    assert_eq!(refused.len(), 7, "{:#?}", imported.refused);
    let [skipped] = &imported.skipped[..] else {
        panic!("{:#?}", imported.skipped);
    };
    assert!(
        skipped
            .path
            .starts_with(fs::canonicalize(scene.model("folder")).unwrap())
    );
    assert!(skipped.why.contains("missing"), "{}", skipped.why);
}

#[test]
fn an_absolute_link_to_a_blob_of_the_model_is_fine() {
    let scene = Scene::new();
    let blob = scene.add("model", COMMIT, "config.json", b"{}");
    let blob = fs::canonicalize(blob).unwrap();
    scene.link("model", COMMIT, "also.json", blob.to_str().unwrap());

    let imported = scene.import(&scene.home());

    assert_eq!((imported.models[0].files, &imported.refused), (2, &vec![]));
}

#[test]
fn a_snapshot_with_missing_bytes_is_left_out() {
    let scene = Scene::new();
    scene.small("gone", COMMIT);
    let blob = scene.add("gone", COMMIT, "tokenizer.json", b"[1]");
    let unfinished = blob.with_extension("incomplete");
    fs::rename(&blob, unfinished).unwrap();
    scene.add("weights", COMMIT, "model.gguf", b"GGUF");

    let imported = scene.import(&scene.home());

    assert_eq!(imported.models, []);
    let [gone, weights] = &imported.skipped[..] else {
        panic!("{:#?}", imported.skipped);
    };
    assert!(gone.why.contains("`tokenizer.json`"), "{}", gone.why);
    assert!(weights.why.contains("model.gguf"), "{}", weights.why);
}

#[test]
fn a_copy_shares_nothing_with_the_cache() {
    let scene = Scene::new();
    let blob = scene.small("model", COMMIT);

    let imported = scene.store.import(&scene.home(), true, &|_, _| {}).unwrap();

    let model = &imported.models[0];
    assert_eq!((model.bytes_copied, model.bytes_linked), (model.bytes, 0));
    fs::write(blob, "changed").unwrap();
    scene.is_sound("model.safetensors", &weights(0));
    let copied = fs::metadata(blob_of(&scene.fill("config.json", b"{}"))).unwrap();
    assert_eq!(copied.permissions().mode() & 0o444, 0o444);
}

#[test]
fn a_file_that_others_may_not_read_is_copied() {
    let scene = Scene::new();
    let blob = scene.small("model", COMMIT);
    fs::set_permissions(&blob, fs::Permissions::from_mode(0o600)).unwrap();

    let imported = scene.import(&scene.home());

    let model = &imported.models[0];
    assert_eq!((model.bytes_copied, model.bytes_linked), (11 << 20, 7));
    scene.is_sound("model.safetensors", &weights(0));
}

#[test]
fn a_blob_that_others_have_begun_is_finished() {
    let scene = Scene::new();
    scene.small("model", COMMIT);
    let bytes = weights(0);
    let key = StageKey::of_digest(Digest::of(&bytes));
    let fill = scene.store.fill(&key, bytes.len() as u64).unwrap();
    let claim = fill.claim(1, 0, "node").unwrap().unwrap();
    let part = fill.part().unwrap();
    part.write(5 << 20, b"half of it").unwrap();

    scene.import(&scene.home());

    scene.is_sound("model.safetensors", &bytes);
    // The node that had begun goes on, and changes nothing.
    part.write(6 << 20, b"more").unwrap();
    part.sync().unwrap();
    fill.release(&claim).unwrap();
    fill.seal().unwrap();
    scene.is_sound("model.safetensors", &bytes);
}

#[test]
fn an_import_that_died_before_the_checksums_is_made_good() {
    let scene = Scene::new();
    scene.small("model", COMMIT);
    scene.import(&scene.home());
    let fill = scene.fill("model.safetensors", &weights(0));
    fill.strike(0).unwrap();
    fill.strike(2).unwrap();

    scene.import(&scene.home());

    scene.is_sound("model.safetensors", &weights(0));
    assert_eq!(scene.files(), ["blob", "blob", "blob"]);
}

#[test]
fn plain_files_are_checked_by_the_tree_or_named_by_what_they_hold() {
    let scene = Scene::new();
    let put = |name: &str, path: &str, bytes: &[u8]| {
        let file = scene.model(name).join("snapshots").join(COMMIT).join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, bytes).unwrap();
    };
    for name in ["known", "unknown", "wrong"] {
        put(name, "model.safetensors", &weights(0));
        put(name, "config.json", b"{}");
    }
    put("unknown", "empty.json", b"");
    let tree = |name: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        let pointer = "ab".repeat(20);
        let text = serde_json::json!({ "format_version": 1, "files": {
            "model.safetensors": { "blob_id": pointer, "lfs_sha256": digest.to_string() },
            "config.json": { "blob_id": GitOid::of(b"{}").to_string(), "lfs_sha256": null },
        }});
        let path = scene.model(name).join(format!("trees/{COMMIT}.json"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text.to_string()).unwrap();
    };
    tree("known", &weights(0));
    tree("wrong", &weights(1));

    let imported = scene.import(&scene.home());

    let models: Vec<_> = { imported.models.iter() }
        .map(|found| found.model.name())
        .collect();
    assert_eq!(models, ["org/known", "org/unknown"]);
    assert_eq!(imported.damaged.len(), 1, "{imported:?}");
    scene.is_sound("model.safetensors", &weights(0));
    scene.is_sound("config.json", b"{}");
    let notes = scene.store.snapshots().unwrap();
    let mut files = notes.iter().flat_map(|(_, note)| &note.files);
    let empty = files
        .find(|file| file.path.as_str() == "empty.json")
        .unwrap();
    assert_eq!((empty.size, &empty.key), (0, &None));
}

/// Lists a model as the Hub does, and gives out no byte of it.
struct Mute;

impl Source for Mute {
    fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>> {
        async { Ok(Revision::new(COMMIT).unwrap()) }.boxed()
    }

    fn list<'a>(
        &'a self,
        _: &'a Revision,
        _: &'a Patterns,
    ) -> BoxFuture<'a, Result<Listing, SourceError>> {
        let file = |path: &str, bytes: &[u8], claims: Claims| RemoteFile {
            path: RelPath::new(path).unwrap(),
            size: bytes.len() as u64,
            identity: { claims.git_oid }.map(|oid| git_identity(oid, bytes.len() as u64)),
            claims,
            vouched: Vouched::BySource,
            xet_hash: None,
            told: None,
        };
        let lfs = Claims {
            sha256: Some(Digest::of(&safetensors())),
            ..Claims::default()
        };
        let git = Claims {
            git_oid: Some(GitOid::of(b"{}")),
            ..Claims::default()
        };
        let files = vec![
            file("config.json", b"{}", git),
            file("model.safetensors", &safetensors(), lfs),
        ];
        let left_out = crate::source::LeftOut::default();
        async { Ok(Listing { files, left_out }) }.boxed()
    }

    fn read<'a>(
        &'a self,
        file: &'a RemoteFile,
        _: std::ops::Range<u64>,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        panic!("{} is read from the origin", file.path)
    }
}

impl Sources for Mute {
    fn open(&self, _: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        Ok(Arc::new(Self))
    }
}

/// Weights of 11 MiB with a header that is right.
fn safetensors() -> Vec<u8> {
    let data = weights(0);
    let size = data.len();
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}"#);
    let header = format!("{header:120}");
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), &data].concat()
}

#[tokio::test]
async fn a_fetch_of_an_imported_model_takes_no_byte_from_its_origin() {
    let scene = Scene::new();
    scene.add("model", COMMIT, "model.safetensors", &safetensors());
    scene.add("model", COMMIT, "config.json", b"{}");
    scene.import(&scene.home());
    let local = Store::open(&scene.dir.path().join("local"), StoreLimits::default()).unwrap();
    let config = SharedConfig::new(scene.store.root().to_owned());
    let tier = SharedTier::new(config, Arc::default());
    let limits = FetchLimits::default();
    let sources = Arc::new(Mute);
    let fetcher = Fetcher::with_tier(local, sources, limits, Arc::default(), Some(tier));
    let before = scene.store.snapshots().unwrap();

    let fetched = fetcher.fetch(FetchRequest {
        model: "hf://org/model".parse().unwrap(),
        patterns: Patterns::default(),
        pin: None,
    });
    let fetched = fetched.wait().await.unwrap();
    fetcher.tier().unwrap().settle(Duration::from_secs(5)).await;

    let copied = fs::read(fetched.snapshot.path.join("model.safetensors")).unwrap();
    assert!(copied == safetensors());
    // The node's own note says the same.
    let after = scene.store.snapshots().unwrap();
    assert_eq!(after.len(), 1);
    assert_eq!(
        (&after[0].0, &after[0].1.files),
        (&before[0].0, &before[0].1.files)
    );
}
