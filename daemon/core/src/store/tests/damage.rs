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
}
