//! Room for a fetch: who gets it, and what goes for it.

use super::*;

/// A store that may hold 10 000 bytes.
fn small_store() -> (tempfile::TempDir, Arc<Store>) {
    let (dir, store) = store();
    let limits = StoreLimits {
        max_bytes: Some(10_000),
        ..StoreLimits::default()
    };
    let store = Store::open(store.root(), limits).unwrap();
    (dir, store)
}

#[test]
fn the_least_recently_used_goes_first_and_pins_stay() {
    let (_dir, store) = small_store();
    let ids: Vec<SnapshotId> = (0..3_u8)
        .map(|n| {
            let bytes = vec![n; 3000];
            let id = publish(&store, &format!("m{n}"), &[("a", &bytes)]);
            used_at(&store, &id, 1000 + u64::from(n));
            id
        })
        .collect();
    store
        .pin(&ids[0], &Holder::operator("keep").unwrap())
        .unwrap();

    let room = store.reserve(|| 3000).unwrap();

    assert_eq!(room.evicted, [ids[1].clone()]);
    assert!(store.snapshot(&ids[0]).unwrap().is_some());
    assert!(!store.has(Digest::of(&[1; 3000])));
    let error = store
        .reserve(|| 9000)
        .expect_err("evicted a pinned snapshot");
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    assert!(
        store.snapshot(&ids[2]).unwrap().is_some(),
        "evicted although it was no use"
    );
}

#[test]
fn what_does_not_fit_is_refused_before_its_first_byte() {
    let (_dir, store) = store();
    let error = store.reserve(|| 1 << 60).expect_err("reserved an exbibyte");
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    assert!(error.hint().is_some());
    assert!(
        names(&store.staging()).is_empty(),
        "{:?}",
        names(&store.staging())
    );
}

#[test]
fn a_partial_download_that_is_swept_is_not_counted_on() {
    let (_dir, store) = store();
    let limits = StoreLimits {
        keep_partial: Duration::ZERO,
        ..StoreLimits::default()
    };
    let store = Store::open(store.root(), limits).unwrap();
    let file = remote("a", &[7; 100_000]);
    drop(mine(&store, &file));
    let key = StageKey::of(&file);
    let mut staged = None;

    store
        .reserve(|| {
            staged = Some(store.staged_bytes(&key));
            0
        })
        .unwrap();

    assert_eq!(staged, Some(0));
}

#[test]
fn withdrawn_snapshots_go_before_a_fetch_is_refused() {
    let (_dir, store) = small_store();
    let id = publish(&store, "m", &[("a", &[1; 8000])]);
    fs::remove_file(store.snapshot_dir(&id).join("manifest.json")).unwrap();

    store.reserve(|| 5000).unwrap();

    assert!(!store.has(Digest::of(&[1; 8000])));
}

#[test]
fn two_reservations_do_not_take_the_same_space() {
    let (_dir, store) = small_store();
    for _ in 0..50 {
        let start = std::sync::Barrier::new(2);
        let reserve = || {
            start.wait();
            store.reserve(|| 6000)
        };
        let (one, two) = std::thread::scope(|scope| {
            let other = scope.spawn(reserve);
            (reserve(), other.join().unwrap())
        });
        assert_ne!(one.is_ok(), two.is_ok(), "{one:?}, {two:?}");
    }
}

#[test]
fn snapshots_that_hold_no_bytes_of_their_own_go_when_inodes_are_short() {
    use super::super::evict::Space;
    let (_dir, store) = store();
    let ids: Vec<SnapshotId> = (0..4_u64)
        .map(|n| {
            let patterns = Patterns::new(vec![format!("a{n}"), "a".into()], Vec::new()).unwrap();
            let id = publish_as(&store, "m", patterns, &[("a", b"abc")]);
            used_at(&store, &id, 1000 + n);
            id
        })
        .collect();
    let operator = Holder::operator("keep").unwrap();
    store.pin(&ids[0], &operator).unwrap();
    let plan = |inodes, inodes_free| {
        let space = Space {
            capacity: 1 << 40,
            free: 1 << 39,
            inodes,
            inodes_free,
        };
        store.plan_within(&space, 1).unwrap()
    };

    // 97 % is the high mark, 95 % the low one: 5 are to be freed, and each snapshot frees 3.
    let short = plan(200, 5);

    assert_eq!(short.evict, ids[1..3], "{short:?}");
    assert_eq!((short.freed, short.short), (0, 0));
    for (inodes, free) in [(200, 6), (0, 0), (200_000, 0)] {
        let none = plan(inodes, free);
        assert_eq!(none, RoomPlan::default(), "{inodes} inodes, {free} free");
    }
}

/// As a fetch leaves a file that was stopped or killed after it sealed it.
fn unfinished(store: &Arc<Store>, bytes: &[u8]) -> Digest {
    let lease = store.lease().unwrap();
    seal(store, &lease, "a", bytes).sha256
}

/// `store`, where what nobody goes on with is garbage at once.
fn impatient(store: &Store) -> Arc<Store> {
    let limits = StoreLimits {
        keep_partial: Duration::ZERO,
        ..*store.limits()
    };
    Store::open(store.root(), limits).unwrap()
}

#[test]
fn what_an_unfinished_fetch_sealed_is_kept_as_long_as_its_parts() {
    let (_dir, store) = store();
    let sealed = unfinished(&store, b"sealed");
    // The bytes may be older than the last try.
    let long_ago = std::time::UNIX_EPOCH + Duration::from_secs(1000);
    let blob = File::open(store.blob_path(sealed)).unwrap();
    blob.set_modified(long_ago).unwrap();

    let young = store.collect(Partial::Stale).unwrap();
    assert_eq!((young.blobs, young.bytes), (0, 0));
    assert!(store.has(sealed));
    let stale = impatient(&store).collect(Partial::Stale).unwrap();
    assert_eq!((stale.blobs, stale.bytes), (1, 6));
}

#[test]
fn what_an_unfinished_fetch_sealed_goes_before_another_is_refused() {
    let (_dir, store) = small_store();
    let sealed = unfinished(&store, &[1; 8000]);

    let room = store.reserve(|| 5000).unwrap();

    assert_eq!(room.freed, 8000);
    assert!(!store.has(sealed));
}

#[test]
fn a_removal_frees_what_only_its_snapshot_needs_and_nothing_else() {
    let (_dir, store) = store();
    let sealed = unfinished(&store, b"sealed");
    let files: [(&str, &[u8]); 4] = [
        ("own", b"1"),
        ("twice", b"22"),
        ("sub/twice", b"22"),
        ("shared", b"333"),
    ];
    let id = publish(&store, "m", &files);
    publish(&store, "other", &[("shared", b"333")]);

    assert_eq!(store.remove(&id).unwrap(), 3);

    let left = [&b"1"[..], b"22", b"333"].map(|bytes| store.has(Digest::of(bytes)));
    assert_eq!(left, [false, false, true]);
    assert!(store.has(sealed));
}

#[test]
fn a_removal_that_died_is_finished_by_the_next_collection() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"abc")]);
    fs::rename(store.snapshot_dir(&id), store.staging_name("gone")).unwrap();

    let collected = store.collect(Partial::Stale).unwrap();

    assert_eq!((collected.blobs, collected.bytes), (1, 3));
    assert!(!store.has(Digest::of(b"abc")));
    assert_eq!(names(&store.staging()), [""; 0]);
}
