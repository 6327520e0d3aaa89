//! Blobs that went bad, and what may still be published.

use super::*;

/// Changes the bytes of a file in place, as a failing disk does.
fn damage(path: &Path, bytes: &[u8]) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
}

fn verify(store: &Store) -> Verified {
    store
        .verify(None, &mut |_| ControlFlow::Continue(()))
        .unwrap()
}

#[test]
fn a_damaged_blob_is_set_aside_and_comes_back_in_place() {
    let (_dir, store) = store();
    let files: [(&str, &[u8]); 2] = [("a", b"good bytes"), ("b", b"more bytes")];
    let id = publish(&store, "m", &files);
    let tree = store.snapshot(&id).unwrap().unwrap().path;
    let mapped = File::open(tree.join("a")).unwrap();
    let mounted = fs::metadata(&tree).unwrap().ino();
    damage(&tree.join("a"), b"gooD bytes");

    let verified = verify(&store);

    assert_eq!((verified.checked, verified.bytes), (2, 20));
    let damaged = &verified.damaged[0];
    assert_eq!(damaged.sha256, Digest::of(b"good bytes"));
    assert_eq!(damaged.got, Some(Digest::of(b"gooD bytes")));
    assert_eq!(damaged.snapshots, std::slice::from_ref(&id));
    assert_eq!(
        fs::read(damaged.set_aside.as_ref().unwrap()).unwrap(),
        b"gooD bytes"
    );
    assert!(store.snapshot(&id).unwrap().is_none(), "still served");
    assert!(!tree.join("a").exists(), "wrong bytes can still be opened");
    assert_eq!(
        mapped.metadata().unwrap().len(),
        10,
        "a reader lost its file"
    );

    assert_eq!(publish(&store, "m", &files), id);
    assert_eq!(fs::read(tree.join("a")).unwrap(), b"good bytes");
    assert_eq!(
        fs::metadata(&tree).unwrap().ino(),
        mounted,
        "the mounted directory was replaced"
    );
    assert!(
        store
            .verify(Some(&id), &mut |_| ControlFlow::Continue(()))
            .unwrap()
            .damaged
            .is_empty()
    );
}

#[test]
fn a_blob_that_is_set_aside_under_a_fetch_is_not_published() {
    let (_dir, store) = store();
    let lease = store.lease().unwrap();
    let entry = seal(&store, &lease, "a", b"good bytes");
    damage(&store.blob_path(entry.sha256), b"gooD bytes");
    assert_eq!(verify(&store).damaged.len(), 1);
    let manifest = manifest("m", Patterns::default(), vec![entry]);

    let error = lease.publish(&manifest).expect_err("published a bad blob");

    assert!(matches!(error, StoreError::SetAside(_)), "{error}");
    assert!(store.snapshot(&manifest.snapshot).unwrap().is_none());
}

#[test]
fn a_blob_of_another_length_is_not_here() {
    let (_dir, store) = store();
    let lease = store.lease().unwrap();
    let entry = seal(&store, &lease, "a", b"good bytes");
    damage(&store.blob_path(entry.sha256), b"good");
    let path = RelPath::new("b").unwrap();
    assert!(!lease.add(entry.sha256, 10, &path).unwrap());
    let manifest = manifest("m", Patterns::default(), vec![entry]);

    let error = lease
        .publish(&manifest)
        .expect_err("published a short blob");

    assert!(matches!(error, StoreError::SetAside(_)), "{error}");
    let id = publish(&store, "m", &[("a", b"good bytes")]);
    let tree = store.snapshot(&id).unwrap().unwrap().path;
    assert_eq!(fs::read(tree.join("a")).unwrap(), b"good bytes");
    assert_eq!(names(&store.root().join("damaged")).len(), 1);
}

#[test]
fn a_verification_that_stops_keeps_what_it_set_aside() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"1"), ("b", b"2")]);
    for bytes in [b"1", b"2"] {
        damage(&store.blob_path(Digest::of(bytes)), b"x");
    }
    let mut blobs = 0;

    let verified = store.verify(None, &mut |_| {
        blobs += 1;
        if blobs == 2 {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    });

    assert_eq!(verified.unwrap().damaged.len(), 1);
    assert_eq!(names(&store.root().join("damaged")).len(), 1);
    assert!(store.snapshot(&id).unwrap().is_none());
}

#[test]
fn a_file_that_was_replaced_as_it_was_hashed_is_not_set_aside() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"good")]);
    let blob = store.blob_path(Digest::of(b"good"));
    damage(&blob, b"bad!");

    let verified = store.verify(None, &mut |_| {
        let fresh = blob.with_extension("fresh");
        fs::write(&fresh, b"good").unwrap();
        fs::rename(&fresh, &blob).unwrap();
        ControlFlow::Continue(())
    });

    assert!(verified.unwrap().damaged.is_empty());
    assert_eq!(fs::read(&blob).unwrap(), b"good");
    assert!(store.snapshot(&id).unwrap().is_some());
}

#[test]
fn a_snapshot_that_is_evicted_under_a_verification_is_no_damage() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"1")]);
    damage(&store.blob_path(Digest::of(b"1")), b"x");

    let verified = store
        .verify(None, &mut |_| {
            store.remove(&id).unwrap();
            ControlFlow::Continue(())
        })
        .unwrap();

    assert!(verified.damaged.is_empty(), "{:?}", verified.damaged);
}

#[test]
fn what_cannot_be_read_is_neither_sound_nor_damaged() {
    let (_dir, store) = store();
    let blob = store.blob_path(Digest::of(b"a"));
    fs::create_dir_all(&blob).unwrap();

    let error = store
        .verify(None, &mut |_| ControlFlow::Continue(()))
        .expect_err("all is well");

    assert!(
        matches!(error, StoreError::Io { op: "read", .. }),
        "{error}"
    );
    assert!(blob.exists());
}

#[test]
fn a_damaged_manifest_is_mended_by_the_next_fetch() {
    let (_dir, store) = store();
    let other = publish(&store, "other", &[("a", b"abc")]);
    let id = publish(&store, "m", &[("a", b"abc")]);
    let manifest = |id| store.snapshot_dir(id).join("manifest.json");
    for bytes in [b"{}".to_vec(), fs::read(manifest(&other)).unwrap()] {
        fs::write(manifest(&id), bytes).unwrap();
        assert!(store.lease_snapshot(&id).unwrap().is_none());
        let holder = Holder::operator("x").unwrap();
        let error = store.pin(&id, &holder).expect_err("pinned it");
        assert!(matches!(error, StoreError::Missing(_)), "{error}");

        publish(&store, "m", &[("a", b"abc")]);

        let snapshot = store.snapshot(&id).unwrap().unwrap();
        assert_eq!(snapshot.manifest.snapshot, id);
    }
}

#[test]
fn a_snapshot_with_a_damaged_manifest_is_collected_unless_it_is_held() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"abc")]);
    let holder = Holder::operator("x").unwrap();
    store.pin(&id, &holder).unwrap();
    fs::write(store.snapshot_dir(&id).join("manifest.json"), "{}").unwrap();

    assert_eq!(store.collect(Partial::All).unwrap().trees, 0);
    store.unpin(&id, &holder).unwrap();
    assert_eq!(store.collect(Partial::All).unwrap().trees, 1);
}

#[test]
fn what_was_set_aside_is_kept_as_long_as_a_partial_download() {
    let (_dir, store) = store();
    let lease = store.lease().unwrap();
    let blob = store.blob_path(seal(&store, &lease, "a", b"good").sha256);
    damage(&blob, b"bad!");
    let long_ago = std::time::UNIX_EPOCH + Duration::from_secs(1000);
    File::open(&blob).unwrap().set_modified(long_ago).unwrap();
    let aside = verify(&store).damaged.remove(0).set_aside.unwrap();

    store.collect(Partial::All).unwrap();
    assert!(aside.exists(), "a lease has it still");
    drop(lease);
    store.collect(Partial::Stale).unwrap();
    assert!(aside.exists(), "it was set aside just now");
    let old = aside.with_file_name(format!("{}-1000", Digest::of(b"good")));
    fs::rename(&aside, &old).unwrap();
    assert_eq!(store.collect(Partial::Stale).unwrap().bytes, 4);
    assert_eq!(names(&store.root().join("damaged")), [""; 0]);
}

#[test]
fn a_pin_that_cannot_be_looked_at_is_not_taken_for_none() {
    let (_dir, store) = store();
    let id = publish(&store, "m", &[("a", b"abc")]);
    fs::create_dir_all(store.root().join("pins/operator")).unwrap();
    // Whatever lies behind it cannot be looked at.
    std::os::unix::fs::symlink("x", store.root().join("pins/operator/x")).unwrap();

    assert!(store.remove(&id).is_err());
    assert!(store.root().join("snapshots").join(id.as_str()).exists());
}

#[test]
fn the_good_blobs_of_a_withdrawn_snapshot_stay_for_its_mending() {
    let (_dir, store) = store();
    let good = [7; 9000];
    let id = publish(&store, "m", &[("bad", b"bad soon"), ("good", &good)]);
    damage(&store.blob_path(Digest::of(b"bad soon")), b"bad now!");
    assert_eq!(verify(&store).damaged[0].snapshots, [id]);

    let young = store.collect(Partial::Stale).unwrap();
    assert!(store.has(Digest::of(&good)), "{young:?}");
    let all = store.collect(Partial::All).unwrap();
    assert_eq!((all.trees, all.blobs, all.bytes), (1, 1, 9008), "{all:?}");
    assert!(!store.has(Digest::of(&good)));
}
