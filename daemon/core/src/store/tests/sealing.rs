//! What gets a blob's name, and what must not.

use super::*;

/// A file that its origin names, but not by a digest.
fn named(path: &str, identity: &str, bytes: &[u8]) -> RemoteFile {
    RemoteFile {
        claims: Claims::default(),
        identity: Some(identity.to_owned()),
        vouched: Vouched::ByNobody,
        ..remote(path, bytes)
    }
}

/// All of a file's bytes, hashed.
fn hashed(store: &Store, file: &RemoteFile, bytes: &[u8]) -> (Arc<Part>, Digest) {
    let part = mine(store, file);
    part.write(0, bytes).unwrap();
    let digest = part.hash(Verifier::new(file.size, file.claims)).unwrap();
    (part, digest)
}

fn part_path(store: &Store, file: &RemoteFile) -> PathBuf {
    let key = StageKey::of(file);
    store.staging().join(format!("{key}.part"))
}

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

#[test]
fn a_file_that_took_the_place_of_the_hashed_one_gets_no_name() {
    let (_dir, store) = store();
    let file = remote("a", b"right");
    let (part, digest) = hashed(&store, &file, b"right");
    let path = part_path(&store, &file);
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"other").unwrap();
    let lease = store.lease().unwrap();

    let error = name(&lease, part, digest, &file).expect_err("sealed another file");

    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(!store.has(digest));
    assert!(!lease.tree().join("a").exists());
    assert_eq!(fs::read(&path).unwrap(), b"other", "it is not ours");
}

#[test]
fn the_same_bytes_under_two_keys_become_one_inode() {
    let (_dir, store) = store();
    let (one, two) = (named("a", "s3:one", b"same"), named("b", "s3:two", b"same"));
    let (first, digest) = hashed(&store, &one, b"same");
    let (second, _) = hashed(&store, &two, b"same");
    let lease = store.lease().unwrap();
    name(&lease, first, digest, &one).unwrap();

    name(&lease, second, digest, &two).unwrap();

    let blob = inode(&store.blob_path(digest));
    assert_eq!(inode(&lease.tree().join("a")), blob);
    assert_eq!(inode(&lease.tree().join("b")), blob);
    assert_eq!(store.known("s3:two").unwrap(), Some(digest));
    let parts = names(&store.staging());
    assert!(
        !parts.iter().any(|name| name.ends_with(".part")),
        "{parts:?}"
    );
}

#[test]
fn files_that_are_sealed_together_get_their_names_each_for_itself() {
    for count in [3, 100] {
        let (_dir, store) = store();
        let lease = store.lease().unwrap();
        // The last has the bytes of the first.
        let text = |number: usize| format!("text {}", number % (count - 1));
        let checked = (0..count).map(|number| {
            let bytes = text(number).into_bytes();
            let file = named(&format!("d/{number}"), &format!("s3:{number}"), &bytes);
            let (part, digest) = hashed(&store, &file, &bytes);
            let file = Arc::new(file);
            let bytes = Unsealed::Staged(part);
            Checked {
                bytes,
                digest,
                file,
            }
        });
        let checked: Vec<_> = checked.collect();
        fs::remove_file(part_path(&store, &checked[1].file)).unwrap();

        let sealed = lease.seal(&checked);

        let failed: Vec<usize> = (0..count)
            .filter(|number| sealed[*number].is_err())
            .collect();
        assert_eq!(failed, [1], "{sealed:?}");
        for number in (0..count).filter(|number| *number != 1) {
            let path = lease.tree().join(format!("d/{number}"));
            assert_eq!(fs::read_to_string(&path).unwrap(), text(number));
            let blob = store.blob_path(Digest::of(text(number).as_bytes()));
            assert_eq!(inode(&path), inode(&blob));
            assert_eq!(fs::metadata(&blob).unwrap().mode() & 0o777, 0o444);
        }
        assert!(!store.has(Digest::of(text(1).as_bytes())));
        let left = names(&store.staging());
        assert!(!left.iter().any(|name| name.ends_with(".part")), "{left:?}");
    }
}

/// Bytes in memory, hashed.
fn in_memory(file: &RemoteFile, bytes: &[u8]) -> Checked {
    Checked {
        bytes: Unsealed::InMemory(bytes.to_vec()),
        digest: Digest::of(bytes),
        file: Arc::new(file.clone()),
    }
}

#[test]
fn bytes_in_memory_get_their_names_as_those_on_disk_do() {
    for count in [1, 100] {
        let (_dir, store) = store();
        let lease = store.lease().unwrap();
        let files = (0..count).map(|number| {
            let text = format!("text {number}");
            let path = format!("d/{number}");
            (named(&path, &format!("s3:{number}"), text.as_bytes()), text)
        });
        let files: Vec<_> = files.collect();
        let checked: Vec<_> = files
            .iter()
            .map(|(file, text)| in_memory(file, text.as_bytes()))
            .collect();

        let sealed = lease.seal(&checked);

        assert!(sealed.iter().all(Result::is_ok), "{sealed:?}");
        for (file, text) in &files {
            let digest = Digest::of(text.as_bytes());
            let path = lease.tree().join(&file.path);
            assert_eq!(&fs::read_to_string(&path).unwrap(), text);
            let blob = store.blob_path(digest);
            assert_eq!(inode(&path), inode(&blob));
            assert_eq!(fs::metadata(&blob).unwrap().mode() & 0o777, 0o444);
            let identity = file.identity.as_deref().unwrap();
            assert_eq!(store.known(identity).unwrap(), Some(digest));
        }
    }
}

#[test]
fn bytes_in_memory_that_are_here_already_become_the_same_inode() {
    let (_dir, store) = store();
    let (one, two) = (named("a", "s3:one", b"same"), named("b", "s3:two", b"same"));
    let (part, digest) = hashed(&store, &one, b"same");
    let lease = store.lease().unwrap();
    name(&lease, part, digest, &one).unwrap();
    // What an attempt left that failed.
    fs::write(lease.tree().join("b"), "half").unwrap();

    let sealed = lease.seal(&[in_memory(&two, b"same")]);

    assert!(sealed[0].is_ok(), "{sealed:?}");
    let blob = inode(&store.blob_path(digest));
    assert_eq!(inode(&lease.tree().join("a")), blob);
    assert_eq!(inode(&lease.tree().join("b")), blob);
}

#[test]
fn a_damaged_blob_of_another_length_does_not_stay_for_bytes_in_memory() {
    let (_dir, store) = store();
    let file = named("a", "s3:x", b"bytes");
    let lease = store.lease().unwrap();
    let checked = [in_memory(&file, b"bytes")];
    let blob = store.blob_path(checked[0].digest);
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(&blob, "byt").unwrap();

    let sealed = lease.seal(&checked);

    assert!(sealed[0].is_ok(), "{sealed:?}");
    assert_eq!(fs::read(&blob).unwrap(), b"bytes");
}

#[test]
fn an_owner_that_loses_its_part_leaves_the_next_ones_journal() {
    let (_dir, store) = store();
    let file = remote("a", b"0123456789");
    let part = mine(&store, &file);
    fs::remove_file(part_path(&store, &file)).unwrap();
    let next = mine(&store, &file);
    next.write(0, b"01234").unwrap();

    part.discard().unwrap();

    assert_eq!(store.journaled_bytes(&StageKey::of(&file)), 5);
}

/// As a process leaves it that dies after it gave a blob its name.
fn sealed_with_a_part_left(store: &Arc<Store>, file: &RemoteFile, bytes: &[u8]) -> PathBuf {
    let (part, digest) = hashed(store, file, bytes);
    let lease = store.lease().unwrap();
    let path = part_path(store, file);
    let kept = path.with_extension("kept");
    fs::hard_link(&path, &kept).unwrap();
    name(&lease, part, digest, file).unwrap();
    fs::rename(kept, path).unwrap();
    store.blob_path(digest)
}

#[test]
fn a_blob_that_kept_its_name_as_a_part_is_not_written_to() {
    let (_dir, store) = store();
    let file = named("a", "s3:x", b"bytes");
    let blob = sealed_with_a_part_left(&store, &file, b"bytes");

    let part = mine(&store, &file);

    assert_ne!(inode(&part_path(&store, &file)), inode(&blob));
    assert_eq!(part.present(), 0);
    let metadata = fs::metadata(&blob).unwrap();
    assert_eq!((metadata.nlink(), metadata.mode() & 0o777), (1, 0o444));
}

#[test]
fn a_bad_blob_that_kept_its_name_as_a_part_is_not_written_to() {
    let (_dir, store) = store();
    let file = named("a", "s3:x", b"bytes");
    let blob = sealed_with_a_part_left(&store, &file, b"bytes");
    let aside = store.root().join("damaged/x");
    fs::rename(&blob, &aside).unwrap();

    drop(mine(&store, &file));

    assert_eq!(fs::metadata(&aside).unwrap().nlink(), 1);
}

#[test]
fn a_blob_that_kept_its_name_as_a_part_is_collected_as_one() {
    let (_dir, store) = store();
    sealed_with_a_part_left(&store, &named("a", "s3:x", b"bytes"), b"bytes");

    let collected = store.collect(Partial::All).unwrap();

    assert_eq!(
        (collected.partial, collected.blobs, collected.bytes),
        (0, 1, 5)
    );
    assert_eq!(names(&store.staging()), [""; 0]);
}

#[test]
fn bytes_that_nobody_can_go_on_with_go_with_their_owner() {
    let (_dir, store) = store();
    let nameless = RemoteFile {
        claims: Claims::default(),
        ..remote("a", b"0123456789")
    };
    let part = mine(&store, &nameless);
    part.write(0, b"01234").unwrap();
    let Claimed::Mine(claim) = store.claim(&StageKey::of(&nameless)).unwrap() else {
        panic!("a random key is claimed twice");
    };

    drop((part, claim));

    assert_eq!(names(&store.staging()), [""; 0]);
    let left = store
        .staging()
        .join("5f0c7e1d2a3b4c5d6e7f8091a2b3c4d5.part");
    fs::write(&left, "of a dead process").unwrap();
    assert_eq!(store.collect(Partial::Stale).unwrap().partial, 1);
}

#[test]
fn a_part_that_is_a_symlink_is_not_followed() {
    let (dir, store) = store();
    let elsewhere = dir.path().join("thesis.tex");
    fs::write(&elsewhere, "years of work").unwrap();
    let file = remote("a", b"0123456789");
    std::os::unix::fs::symlink(&elsewhere, part_path(&store, &file)).unwrap();

    let claimed = store.claim(&StageKey::of(&file));

    assert!(matches!(claimed, Err(StoreError::Io { .. })));
    assert_eq!(fs::read(&elsewhere).unwrap(), b"years of work");
}

#[test]
fn a_download_that_was_given_up_is_not_hashed_on() {
    let (_dir, store) = store();
    let bytes = vec![7; 3 << 20];
    let file = remote("a", &bytes);
    let part = mine(&store, &file);
    part.write(0, &bytes).unwrap();
    drop(part);
    let part = mine(&store, &file);
    part.close();

    let hashed = part.hash(Verifier::new(file.size, file.claims));

    assert!(matches!(hashed, Err(HashError::Closed)), "{hashed:?}");
}
