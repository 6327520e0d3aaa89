//! Directories of volumes: whose they are, and what is in them.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn record(name: &str) -> VolumeRecord {
    VolumeRecord {
        model: format!("hf://org/{name}").parse().unwrap(),
        revision: revision(name),
        patterns: Patterns::default(),
        layout: Layout::Flat,
    }
}

fn holder() -> Holder {
    "csi/volume-1".parse().unwrap()
}

fn pins(store: &Store) -> Vec<String> {
    names(&store.root().join("pins/csi/volume-1"))
}

#[test]
fn a_volume_shows_no_files_of_what_its_holder_asked_for_before() {
    let (_dir, store) = store();
    let (before, now, holder) = (record("before"), record("now"), holder());
    let old = publish(&store, "before", &[("a", b"before")]);
    let old_tree = store.snapshot_dir(&old).join("tree");
    store.open_volume(&holder, &before).unwrap();

    let tree = store.open_volume(&holder, &now).unwrap();
    store.fill_volume(&holder, &old, &old_tree).unwrap();
    store.complete_volume(&holder, &old).unwrap();
    store.explain_volume(&holder, &old, "failed: x").unwrap();

    assert_eq!(names(&tree), [".weightd"]);
    assert_eq!(names(&tree.join(".weightd")), [""; 0]);
    assert_eq!(pins(&store), [now.snapshot().as_str()]);
    let id = publish(&store, "now", &[("a", b"now")]);
    assert_eq!(id, now.snapshot());
    assert_eq!(fs::read(tree.join("a")).unwrap(), b"now");
    assert_eq!(names(&tree.join(".weightd")), ["complete"]);
}

#[test]
fn a_volume_that_is_opened_again_stays_as_it_is() {
    let (_dir, store) = store();
    let (record, holder) = (record("m"), holder());
    let tree = store.open_volume(&holder, &record).unwrap();
    let inode = fs::metadata(&tree).unwrap().ino();
    let lease = store.lease().unwrap();
    seal(&store, &lease, "a", b"abc");
    store
        .fill_volume(&holder, &record.snapshot(), &lease.tree())
        .unwrap();

    let again = store.open_volume(&holder, &record).unwrap();

    assert_eq!(again, tree);
    assert_eq!(fs::metadata(&tree).unwrap().ino(), inode, "it was replaced");
    assert_eq!(fs::read(tree.join("a")).unwrap(), b"abc");
}

#[test]
fn a_volume_whose_record_cannot_be_read_is_made_anew() {
    for text in ["", "{", "null"] {
        let (_dir, store) = store();
        let holder = holder();
        let tree = store.open_volume(&holder, &record("before")).unwrap();
        fs::write(tree.join("old.json"), "old").unwrap();
        fs::write(tree.join(".weightd/complete"), "{}").unwrap();
        let json = tree.with_file_name("volume.json");
        fs::remove_file(&json).unwrap();
        fs::write(&json, text).unwrap();

        let tree = store.open_volume(&holder, &record("now")).unwrap();

        assert_eq!(names(&tree), [".weightd"], "{text:?}");
        assert_eq!(names(&tree.join(".weightd")), [""; 0], "{text:?}");
    }
}

#[test]
fn volumes_are_released_while_collections_run() {
    let (_dir, store) = store();
    let (record, stop) = (record("m"), AtomicBool::new(false));
    let collect = || {
        while !stop.load(Ordering::Relaxed) {
            store.collect(Partial::Stale).expect("collected");
        }
    };
    std::thread::scope(|scope| {
        let collecting = scope.spawn(collect);
        let mut outcome = Ok(0);
        for number in 0..1000 {
            let holder = format!("csi/volume-{}", number % 4).parse().unwrap();
            let tree = store.open_volume(&holder, &record).unwrap();
            for file in ["a", "b", "c", "d"] {
                fs::write(tree.join(file), "x").unwrap();
            }
            outcome = store.release(&holder);
            if outcome.is_err() {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        collecting.join().expect("it ends");
        assert_eq!(outcome.expect("released"), 1);
    });
    assert!(store.volumes().unwrap().is_empty());
}

#[test]
fn a_release_lets_go_of_the_pins_also_if_the_directory_cannot_go() {
    let (_dir, store) = store();
    store.open_volume(&holder(), &record("m")).unwrap();
    fs::remove_dir_all(store.staging()).unwrap();

    let error = store.release(&holder()).expect_err("nowhere to move it");

    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert_eq!(pins(&store), [""; 0]);
    fs::create_dir(store.staging()).unwrap();
    assert_eq!(store.volumes().unwrap().len(), 1, "nobody finds the rest");
    store.release(&holder()).unwrap();
    assert!(store.volumes().unwrap().is_empty());
}

#[test]
fn a_volume_that_cannot_be_completed_does_not_keep_a_snapshot_from_others() {
    let (_dir, store) = store();
    let other: Holder = "csi/volume-2".parse().unwrap();
    let blocked = store.open_volume(&holder(), &record("m")).unwrap();
    fs::create_dir(blocked.join("a")).unwrap();
    let tree = store.open_volume(&other, &record("m")).unwrap();

    let id = publish(&store, "m", &[("a", b"abc")]);

    assert!(store.snapshot(&id).unwrap().is_some());
    assert!(!blocked.join(".weightd/complete").exists());
    assert_eq!(fs::read(tree.join("a")).unwrap(), b"abc");
    assert!(tree.join(".weightd/complete").exists());
}

#[test]
fn what_was_set_aside_does_not_come_back_into_a_volume() {
    let (_dir, store) = store();
    // Bytes that are here, in a fetch under way whose files a mounted volume shows.
    publish(&store, "old", &[("a", b"good bytes")]);
    let digest = Digest::of(b"good bytes");
    let lease = store.lease().unwrap();
    let path = RelPath::new("a").unwrap();
    assert!(lease.add(digest, 10, &path).unwrap());
    let (holder, record) = (holder(), record("new"));
    let id = record.snapshot();
    let tree = store.open_volume(&holder, &record).unwrap();
    store.fill_volume(&holder, &id, &lease.tree()).unwrap();
    assert!(tree.join("a").exists());
    let blob = store.blob_path(digest);
    fs::set_permissions(&blob, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&blob, b"evil bytes").unwrap();
    let verified = store.verify(None, &mut |_| ControlFlow::Continue(()));
    assert_eq!(verified.unwrap().damaged.len(), 1);
    assert!(!tree.join("a").exists());

    store.fill_volume(&holder, &id, &lease.tree()).unwrap();

    assert!(!tree.join("a").exists(), "it is back");
}
