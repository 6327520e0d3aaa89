//! The rules of the store, each as a promise.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::buffers::Buffers;
use crate::digest::{Claims, Verifier};
use crate::manifest::{FileEntry, Manifest};
use crate::model::{ModelRef, Patterns, RelPath, Revision, SnapshotId};
use crate::source::{RemoteFile, Vouched};

mod damage;
mod sealing;
mod space;
mod volumes;

fn store() -> (tempfile::TempDir, Arc<Store>) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store"), StoreLimits::default()).unwrap();
    (dir, store)
}

fn remote(path: &str, bytes: &[u8]) -> RemoteFile {
    RemoteFile {
        path: RelPath::new(path).unwrap(),
        size: bytes.len() as u64,
        claims: Claims {
            sha256: Some(Digest::of(bytes)),
            ..Claims::default()
        },
        identity: None,
        vouched: Vouched::BySource,
        xet_hash: None,
        told: None,
    }
}

fn mine(store: &Store, file: &RemoteFile) -> Arc<Part> {
    match store.claim(&StageKey::of(file)).unwrap() {
        Claimed::Mine(claim) => claim.stage(store, file.size).unwrap(),
        Claimed::Theirs(_) => panic!("somebody else has it"),
    }
}

/// Gives the bytes of a part their name.
fn name(
    lease: &Lease,
    part: Arc<Part>,
    digest: Digest,
    file: &RemoteFile,
) -> Result<(), StoreError> {
    let file = Arc::new(file.clone());
    let bytes = Unsealed::Staged(part);
    let mut sealed = lease.seal(&[Checked {
        bytes,
        digest,
        file,
    }]);
    sealed.pop().expect("an outcome for each file")
}

fn seal(store: &Arc<Store>, lease: &Lease, path: &str, bytes: &[u8]) -> FileEntry {
    let file = remote(path, bytes);
    let digest = Digest::of(bytes);
    if !lease.add(digest, file.size, &file.path).unwrap() {
        let part = mine(store, &file);
        part.write(0, bytes).unwrap();
        let digest = part.hash(Verifier::new(file.size, file.claims)).unwrap();
        name(lease, part, digest, &file).unwrap();
    }
    FileEntry {
        path: file.path,
        size: file.size,
        sha256: Digest::of(bytes),
        git_oid: None,
        xet_hash: None,
        believed: false,
    }
}

fn revision(name: &str) -> Revision {
    Revision::new(&Digest::of(name.as_bytes()).to_string()[..40]).unwrap()
}

/// What a snapshot of the model `name` says that it holds.
fn manifest(name: &str, patterns: Patterns, files: Vec<FileEntry>) -> Manifest {
    let model: ModelRef = format!("hf://org/{name}").parse().unwrap();
    let revision = revision(name);
    Manifest {
        format: Manifest::FORMAT,
        snapshot: SnapshotId::new(&model, &revision, &patterns),
        model: model.at(&revision),
        patterns,
        published_at: 0,
        files,
    }
}

fn publish_as(
    store: &Arc<Store>,
    name: &str,
    patterns: Patterns,
    files: &[(&str, &[u8])],
) -> SnapshotId {
    let lease = store.lease().unwrap();
    let files = files
        .iter()
        .map(|(path, bytes)| seal(store, &lease, path, bytes))
        .collect();
    let manifest = manifest(name, patterns, files);
    drop(lease.publish(&manifest).unwrap());
    let asked = format!("hf://org/{name}").parse().unwrap();
    store
        .touch(&asked, &revision(name), &manifest.snapshot)
        .unwrap();
    manifest.snapshot
}

fn publish(store: &Arc<Store>, name: &str, files: &[(&str, &[u8])]) -> SnapshotId {
    publish_as(store, name, Patterns::default(), files)
}

/// Makes a snapshot look as if it was last used `seconds` after 1970.
fn used_at(store: &Store, id: &SnapshotId, seconds: u64) {
    let manifest = File::open(store.snapshot_dir(id).join("manifest.json")).unwrap();
    manifest
        .set_modified(std::time::UNIX_EPOCH + Duration::from_secs(seconds))
        .unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = entries(dir)
        .unwrap()
        .iter()
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn wrong_bytes_never_get_a_name() {
    let (_dir, store) = store();
    let part = mine(&store, &remote("a", b"right"));
    part.write(0, b"wrong").unwrap();

    let claims = remote("a", b"right").claims;
    let error = part
        .hash(Verifier::new(5, claims))
        .expect_err("hashed wrong bytes");

    assert!(matches!(error, HashError::Mismatch(_)), "{error}");
    part.discard().unwrap();
    assert!(!store.has(Digest::of(b"wrong")) && !store.has(Digest::of(b"right")));
    assert!(names(&store.staging()).is_empty());
}

#[test]
fn a_published_tree_holds_plain_read_only_files() {
    let (_dir, store) = store();
    let id = publish(
        &store,
        "m",
        &[
            ("config.json", b"{}"),
            ("sub/a.bin", b"abc"),
            ("empty", b""),
        ],
    );

    let snapshot = store.snapshot(&id).unwrap().unwrap();
    for (path, bytes) in [
        ("config.json", &b"{}"[..]),
        ("sub/a.bin", b"abc"),
        ("empty", b""),
    ] {
        let metadata = fs::symlink_metadata(snapshot.path.join(path)).unwrap();
        assert!(metadata.is_file());
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o444);
        assert_eq!(fs::read(snapshot.path.join(path)).unwrap(), bytes);
    }
    assert!(
        names(&store.staging()).is_empty(),
        "{:?}",
        names(&store.staging())
    );
}

#[test]
fn a_file_of_two_models_is_one_inode() {
    let (_dir, store) = store();
    let one = publish(&store, "one", &[("a", b"same"), ("b", b"1")]);
    let two = publish(&store, "two", &[("x/y", b"same"), ("b", b"2")]);
    let inode = |id: &SnapshotId, path: &str| {
        fs::metadata(store.snapshot(id).unwrap().unwrap().path.join(path))
            .unwrap()
            .ino()
    };
    assert_eq!(inode(&one, "a"), inode(&two, "x/y"));
    assert_eq!(store.usage().unwrap().store, 4 + 1 + 1);
}

#[test]
fn a_new_process_goes_on_from_the_journal() {
    let (_dir, store) = store();
    let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let file = remote("a", &bytes);
    let part = mine(&store, &file);
    part.write(0, &bytes[..1000]).unwrap();
    part.write(5000, &bytes[5000..300_000]).unwrap();
    drop(part);

    let part = mine(&store, &file);

    assert_eq!(part.missing(), [1000..5000, 300_000..400_000]);
    part.write(1000, &bytes[1000..5000]).unwrap();
    part.write(300_000, &bytes[300_000..]).unwrap();
    assert_eq!(
        part.hash(Verifier::new(400_000, file.claims)).unwrap(),
        Digest::of(&bytes)
    );
}

#[test]
fn bytes_that_a_power_loss_took_are_fetched_again() {
    let (_dir, store) = store();
    let file = RemoteFile {
        claims: Claims::default(),
        identity: Some("s3:x".into()),
        ..remote("a", b"0123456789")
    };
    let part = mine(&store, &file);
    part.write(0, b"01234").unwrap();
    part.write(5, b"56789").unwrap();
    drop(part);
    // The journal reached the disk, the second block did not. No claim would notice.
    let path = store
        .staging()
        .join(format!("{}.part", StageKey::of(&file)));
    let mut disk = fs::read(&path).unwrap();
    disk[5..].fill(0);
    fs::write(&path, disk).unwrap();

    let part = mine(&store, &file);
    let error = part
        .hash(Verifier::new(10, file.claims))
        .expect_err("believed the journal");

    assert!(matches!(error, HashError::Torn { bytes: 5 }), "{error}");
    drop(part);
    assert_eq!(mine(&store, &file).missing(), vec![5..10; 1]);
}

#[test]
fn an_origins_name_for_some_bytes_is_known_also_as_earlier_versions_wrote_it() {
    let (_dir, store) = store();
    let [old, new] = [b"old", b"new"].map(|bytes| Digest::of(bytes));
    let name = Digest::of(b"s3:x").to_string();
    let folder = store.root().join("known").join(&name[..2]);
    assert_eq!(store.known("s3:x").unwrap(), None);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(&name), serde_json::to_vec(&old).unwrap()).unwrap();
    assert_eq!(store.known("s3:x").unwrap(), Some(old));

    for digest in [new, new, old] {
        store.remember("s3:x", digest).unwrap();
        assert_eq!(store.known("s3:x").unwrap(), Some(digest));
    }
    assert_eq!(names(&folder), [name.as_str()]);

    // What stands for no digest is as good as nothing.
    fs::remove_file(folder.join(&name)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", folder.join(&name)).unwrap();
    assert_eq!(store.known("s3:x").unwrap(), None);
}

#[test]
fn an_origins_name_for_bytes_that_are_gone_is_forgotten() {
    let (_dir, store) = store();
    store.remember("s3:x", Digest::of(b"x")).unwrap();

    store.collect(Partial::Stale).unwrap();

    assert_eq!(store.known("s3:x").unwrap(), None);
}

#[test]
fn the_hasher_follows_the_writers() {
    let (_dir, store) = store();
    let bytes: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 251) as u8).collect();
    let file = remote("a", &bytes);
    let part = mine(&store, &file);
    let hashing = std::thread::spawn({
        let part = Arc::clone(&part);
        move || part.hash(Verifier::new(part.size(), file.claims)).unwrap()
    });
    for (at, block) in bytes.chunks(1 << 20).enumerate().rev() {
        part.write((at as u64) << 20, block).unwrap();
    }
    assert_eq!(hashing.join().unwrap(), Digest::of(&bytes));
}

/// Writes all of `bytes` in blocks of `buffers`, the last first.
fn write_blocks(part: &Part, bytes: &[u8], block_bytes: usize, buffers: &Arc<Buffers>) {
    write_blocks_from(part, bytes, 0, block_bytes, buffers);
}

/// The same from byte `from` on.
fn write_blocks_from(
    part: &Part,
    bytes: &[u8],
    from: usize,
    block_bytes: usize,
    buffers: &Arc<Buffers>,
) {
    for at in (from..bytes.len()).step_by(block_bytes).rev() {
        let mut block = buffers.gather(at as u64);
        block.fill(&bytes[at..]);
        part.write_block(at as u64, block).unwrap();
    }
}

#[test]
fn blocks_are_hashed_from_memory_and_from_the_page_cache() {
    const BLOCK: usize = 256 << 10;
    let (_dir, store) = store();
    let bytes: Vec<u8> = (0..(3 << 20) + 4099)
        .map(|n: u32| (n % 251) as u8)
        .collect();
    let file = remote("a", &bytes);
    for most in [0, 3, 99] {
        let buffers = Buffers::new(BLOCK, most);
        let part = mine(&store, &file);
        // Of some blocks a part is here already.
        part.write(700_000, &bytes[700_000..900_001]).unwrap();
        let hashing = std::thread::spawn({
            let (part, verifier) = (Arc::clone(&part), Verifier::new(part.size(), file.claims));
            move || part.hash(verifier).unwrap()
        });

        write_blocks(&part, &bytes, BLOCK, &buffers);

        assert_eq!(hashing.join().unwrap(), Digest::of(&bytes), "{most} blocks");
        let mut read = Buffers::new(BLOCK, 1).take(BLOCK);
        part.read(0, &mut read).unwrap();
        assert!(*read == bytes[..BLOCK], "{most} blocks");
        let staged = store
            .staging()
            .join(format!("{}.part", StageKey::of(&file)));
        assert!(fs::read(staged).unwrap() == bytes, "{most} blocks");
        part.discard().unwrap();
    }
}

#[test]
fn memory_of_a_part_that_is_given_up_is_free_again() {
    const BLOCK: usize = 256 << 10;
    let (_dir, store) = store();
    let bytes = vec![7; 2 << 20];
    let file = remote("a", &bytes);
    let buffers = Buffers::new(BLOCK, 4);
    let part = mine(&store, &file);
    write_blocks(&part, &bytes, BLOCK, &buffers);
    assert!(
        !buffers.take(0).is_spare(),
        "nothing is held for the hasher"
    );

    part.close();

    assert!(buffers.take(0).is_spare());
    write_blocks(&part, &bytes, BLOCK, &buffers);
    assert!(buffers.take(0).is_spare(), "held for nobody");
}

#[tokio::test(start_paused = true)]
async fn no_more_is_asked_for_than_the_hasher_keeps_up_with() {
    const BLOCK: usize = 1 << 20;
    let (_dir, store) = store();
    let bytes = vec![7; 9 * BLOCK];
    let file = remote("a", &bytes);
    let buffers = Buffers::new(BLOCK, 99);
    let part = mine(&store, &file);
    let waits = async |part: &Part| {
        let wait = tokio::time::timeout(Duration::from_millis(1), part.caught_up());
        wait.await.is_err()
    };
    // Far ahead of the hasher is not what it could take.
    write_blocks_from(&part, &bytes, 2 * BLOCK, BLOCK, &buffers);
    assert!(!waits(&part).await);
    part.write(0, &bytes[..BLOCK]).unwrap();
    write_blocks_from(&part, &bytes[..2 * BLOCK], BLOCK, BLOCK, &buffers);
    assert!(!waits(&part).await, "what is on disk does not count");
    part.discard().unwrap();

    let part = mine(&store, &file);
    write_blocks_from(&part, &bytes, 0, BLOCK, &buffers);
    assert!(waits(&part).await);
    let hashing = std::thread::spawn({
        let (part, verifier) = (Arc::clone(&part), Verifier::new(part.size(), file.claims));
        move || part.hash(verifier).unwrap()
    });
    part.caught_up().await;
    assert_eq!(hashing.join().unwrap(), Digest::of(&bytes));
}

#[test]
fn work_on_the_same_bytes_is_claimed_once() {
    let (_dir, store) = store();
    let file = remote("a", b"0123456789");
    let other = Store::open(store.root(), StoreLimits::default()).unwrap();
    let part = mine(&store, &file);
    part.write(0, b"0123").unwrap();

    let Claimed::Theirs(watch) = other.claim(&StageKey::of(&file)).unwrap() else {
        panic!("two claims on the same bytes");
    };
    assert_eq!((watch.bytes(), watch.over().unwrap()), (4, false));
    drop(part);
    assert!(watch.over().unwrap());
    assert_eq!(mine(&other, &file).present(), 4);
}

#[test]
fn a_lease_keeps_its_blobs_from_another_process() {
    let (_dir, store) = store();
    let other = Store::open(store.root(), StoreLimits::default()).unwrap();
    let lease = store.lease().unwrap();
    seal(&store, &lease, "a", b"leased");

    assert_eq!(other.collect(Partial::All).unwrap().blobs, 0);
    assert!(store.has(Digest::of(b"leased")));
    drop(lease);
    assert_eq!(other.collect(Partial::All).unwrap().blobs, 1);
    assert!(!store.has(Digest::of(b"leased")));
}

#[test]
fn a_dead_process_leaves_nothing_that_collect_does_not_find() {
    let (_dir, store) = store();
    let lease = store.lease().unwrap();
    seal(&store, &lease, "a", b"sealed");
    drop(mine(&store, &remote("b", b"partial")));
    let room = store.reserve(|| 1 << 20).unwrap();
    // As after kill -9: the locks are gone, no destructor ran.
    let left = [lease.tree().parent().unwrap().to_owned()];
    let kept = tempfile::tempdir_in(store.root()).unwrap();
    fs::rename(&left[0], kept.path().join("tree")).unwrap();
    drop((lease, room));
    fs::rename(kept.path().join("tree"), &left[0]).unwrap();
    fs::write(store.staging().join("x.room"), [0; 10]).unwrap();
    let probe = store.root().join("blobs/x.probe");
    fs::write(&probe, b"").unwrap();

    let collected = store.collect(Partial::All).unwrap();

    assert_eq!(
        (collected.trees, collected.partial, collected.blobs),
        (1, 1, 1)
    );
    assert!(
        names(&store.staging()).is_empty(),
        "{:?}",
        names(&store.staging())
    );
    assert!(!probe.exists());
}

#[test]
fn a_record_that_a_dead_process_left_half_written_is_no_fetch_and_is_collected() {
    let (_dir, store) = store();
    let record = FetchRecord {
        model: "hf://org/model".parse().unwrap(),
        patterns: Patterns::default(),
        pin: None,
    };
    store.record_fetch(&record).unwrap();
    let fetches = store.root().join("fetches");
    let name = names(&fetches).remove(0);
    let half = fetches.join(format!("{name}.{}", uuid::Uuid::new_v4()));
    fs::copy(fetches.join(&name), &half).unwrap();

    assert_eq!(store.recorded_fetches().unwrap(), [record]);
    store.collect(Partial::Stale).unwrap();
    assert!(fetches.join(name).exists());
    assert!(!half.exists());
}

#[test]
fn a_leased_snapshot_is_not_evicted() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"abc")]);
    let lease = store.lease_snapshot(&id).unwrap().unwrap();
    assert!(matches!(store.remove(&id), Err(StoreError::Held { .. })));
    drop(lease);
    assert_eq!(store.remove(&id).unwrap(), 3);
    assert!(store.snapshot(&id).unwrap().is_none());
    assert!(matches!(store.remove(&id), Err(StoreError::Missing(_))));
}

#[test]
fn pins_name_their_holder_and_go_with_it() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"abc")]);
    let holder: Holder = "csi/volume-1".parse().unwrap();
    store.pin(&id, &holder).unwrap();
    store.pin(&id, &holder).unwrap();
    assert_eq!(
        store.snapshot(&id).unwrap().unwrap().pinned_by,
        std::slice::from_ref(&holder)
    );
    let error = store
        .remove(&id)
        .expect_err("removed a pinned snapshot")
        .to_string();
    assert!(error.contains("csi/volume-1"), "{error}");
    assert_eq!(store.release(&holder).unwrap(), 1);
    assert_eq!(store.release(&holder).unwrap(), 0);
    store.remove(&id).unwrap();
    assert!(matches!(
        store.pin(&id, &holder),
        Err(StoreError::Missing(_))
    ));
    for bad in ["csi/..", "csi/", "other/x", "csi/a/b", "csi", "operator/.x"] {
        assert!(bad.parse::<Holder>().is_err(), "{bad}");
    }
}

#[test]
fn a_name_finds_the_snapshot_it_stood_for() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"abc")]);
    let find = |text: &str| {
        let found = store
            .find(&text.parse().unwrap(), &Patterns::default())
            .unwrap();
        found.map(|snapshot| snapshot.manifest.snapshot)
    };
    let revision = &Digest::of(b"m").to_string()[..40];
    assert_eq!(find("hf://org/m"), Some(id.clone()));
    assert_eq!(find("hf://org/m@main"), Some(id.clone()));
    assert_eq!(find(&format!("hf://org/m@{revision}")), Some(id.clone()));
    assert_eq!(find("hf://org/m@dev"), None);
    assert_eq!(find("hf://org/other"), None);
    store.remove(&id).unwrap();
    assert_eq!(find("hf://org/m"), None);
}

#[test]
fn a_name_is_remembered_while_any_snapshot_of_its_revision_is_here() {
    let (_dir, store) = store();
    let gguf = Patterns::new(vec!["*.gguf".into()], Vec::new()).unwrap();
    let find = || {
        let found = store.find(&"hf://org/m".parse().unwrap(), &Patterns::default());
        found.unwrap().map(|snapshot| snapshot.manifest.snapshot)
    };
    for first_goes in [false, true] {
        let whole = publish(&store, "m", &[("a", b"abc")]);
        let part = publish_as(&store, "m", gguf.clone(), &[("b.gguf", b"def")]);
        let (gone, left) = if first_goes {
            (whole, part)
        } else {
            (part, whole)
        };

        store.remove(&gone).unwrap();
        store.collect(Partial::Stale).unwrap();

        assert_eq!(find(), Some(left.clone()));
        store.remove(&left).unwrap();
        assert_eq!(find(), None);
        assert_eq!(names(&store.root().join("refs/hf")), [""; 0]);
    }
}

#[test]
fn a_directory_that_is_no_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.tex"), "x").unwrap();
    let open = |path: &Path| Store::open(path, StoreLimits::default());
    assert!(matches!(
        open(dir.path()),
        Err(StoreError::NotAStore { .. })
    ));
    assert_eq!(
        names(dir.path()),
        ["thesis.tex"],
        "the directory was changed"
    );

    let newer = dir.path().join("newer");
    fs::create_dir(&newer).unwrap();
    fs::write(newer.join("FORMAT"), "weightd store 2\n").unwrap();
    let error = open(&newer).expect_err("opened a newer format");
    assert!(
        error
            .to_string()
            .contains("has format 2, this version reads format 1"),
        "{error}"
    );
    fs::write(newer.join("FORMAT"), "something else\n").unwrap();
    assert!(matches!(open(&newer), Err(StoreError::NotAStore { .. })));
}

#[test]
fn every_error_with_a_remedy_says_it() {
    let path = PathBuf::from("x");
    let source = || io::Error::from(io::ErrorKind::ReadOnlyFilesystem);
    for error in [
        StoreError::ReadOnly {
            op: "write",
            path: path.clone(),
            source: source(),
        },
        StoreError::NoHardLinks {
            path: path.clone(),
            source: source(),
        },
        StoreError::Io {
            op: "link",
            path: path.clone(),
            source: io::Error::from_raw_os_error(nix::libc::EMLINK),
        },
        StoreError::NotAStore { path },
    ] {
        assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{error}");
    }
}
