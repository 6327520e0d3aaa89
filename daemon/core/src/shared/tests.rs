//! The shared tier's directory, and the door to it.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use super::choice::Reach;
use super::*;
use crate::digest::Digest;
use crate::metrics::Metrics;

const MIB: u64 = 1 << 20;

fn store() -> (tempfile::TempDir, SharedStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    (dir, store)
}

fn open(dir: &Path) -> Result<SharedStore, SharedError> {
    let options = SharedOptions {
        segment_bytes: Some(MIB),
        file_system: None,
    };
    SharedStore::open(dir, &options)
}

fn key() -> StageKey {
    StageKey::of_digest(Digest::of(b"bytes"))
}

#[test]
fn a_store_keeps_what_it_was_made_with() {
    let (dir, store) = store();

    let again = SharedStore::open(dir.path(), &SharedOptions::default()).unwrap();

    assert_eq!(again.segment_bytes(), MIB);
    assert_eq!(again.id(), store.id());
}

#[test]
fn nodes_that_make_the_store_at_once_make_one() {
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<String> = std::thread::scope(|scope| {
        let open = || open(dir.path()).unwrap().id().to_owned();
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let left = fs::read_dir(dir.path())
        .unwrap()
        .map(|one| one.unwrap().file_name());
    let left: Vec<_> = left
        .filter(|name| name.to_string_lossy().starts_with("FORMAT."))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_folder_that_leads_elsewhere_is_refused_and_the_root_may_do_so() {
    let (dir, _) = store();
    let other = tempfile::tempdir().unwrap();
    let (folder, elsewhere) = (dir.path().join("leases"), other.path().join("leases"));
    fs::rename(&folder, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &folder).unwrap();

    let error = open(dir.path()).unwrap_err();

    assert!(matches!(error, SharedError::NoFolder { .. }), "{error}");
    assert!(error.hint().is_some());
    fs::remove_file(&folder).unwrap();
    let root = other.path().join("root");
    std::os::unix::fs::symlink(dir.path(), &root).unwrap();
    open(&root).expect("the operator's own symlink is fine");
}

#[test]
fn what_is_no_shared_store_is_refused() {
    let cases = [
        ("notes", "mine", "not a shared store"),
        ("FORMAT", "weightd store 1\n", "not a shared store"),
        (
            "FORMAT",
            "weightd shared store 1\nid = x\nsegment = 5\n",
            "not a shared store",
        ),
        ("FORMAT", "weightd shared store 2\n", "format 2"),
    ];
    for (name, text, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(name), text).unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn a_store_is_not_made_where_the_file_system_is_not_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("weightd");
    let options = SharedOptions {
        segment_bytes: None,
        file_system: Some("lustre".to_owned()),
    };

    let error = SharedStore::open(&root, &options).unwrap_err();

    assert!(
        matches!(error, SharedError::WrongFileSystem { .. }),
        "{error}"
    );
    assert!(!root.exists());
}

#[test]
fn of_many_who_claim_one_wins_and_so_with_each_turn() {
    let (_dir, store) = store();
    let fill = store.fill(&key(), 3 * MIB).unwrap();
    for turn in 0..3 {
        let won: usize = std::thread::scope(|scope| {
            let claim = || usize::from(fill.claim(1, turn, "a node").unwrap().is_some());
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(claim)).collect();
            threads.into_iter().map(|one| one.join().unwrap()).sum()
        });
        assert_eq!(won, 1);
        assert_eq!(fill.look().unwrap().segments[1].turn, Some(turn));
    }
    assert_eq!(fill.look().unwrap().segments[0], SegmentView::default());
}

#[test]
fn what_was_finished_and_let_go_is_not_claimed_again() {
    let (_dir, store) = store();
    let fill = store.fill(&key(), 3 * MIB).unwrap();
    let claim = fill.claim(0, 0, "one").unwrap().unwrap();
    let before = fill.look().unwrap();
    fill.finish(0, &Sums::new(1)).unwrap();
    fill.release(&claim).unwrap();

    assert!(!before.segments[0].here);
    assert!(fill.claim(0, 0, "another").unwrap().is_none());
    let after = fill.look().unwrap().segments[0];
    assert_eq!(
        after,
        SegmentView {
            here: true,
            turn: None
        }
    );
}

#[test]
fn an_owner_is_silent_when_nothing_changes_on_the_observers_own_clock() {
    let (_dir, store) = store();
    let fill = store.fill(&key(), MIB).unwrap();
    let claim = fill.claim(0, 0, "one").unwrap().unwrap();
    let mut silence = Silence::default();
    let mut observe = |seconds| {
        let content = fill.read_claim(0, 0).unwrap();
        silence.observe(0, 0, content, Duration::from_secs(seconds))
    };
    assert_eq!(observe(100), Duration::ZERO, "it was not known before");
    assert_eq!(observe(110), Duration::from_secs(10));
    fill.beat(&claim, 5).unwrap();
    assert_eq!(observe(120), Duration::ZERO);
    assert_eq!(observe(125), Duration::from_secs(5));
}

#[test]
fn bytes_are_there_block_by_block_and_get_their_name_last() {
    let (_dir, store) = store();
    let size = 2 * MIB + 5;
    let fill = store.fill(&key(), size).unwrap();
    assert_eq!(fill.segments(), 3);
    let part = fill.part().unwrap();
    for segment in 0..3 {
        let mut sums = Sums::new(fill.blocks(segment).count());
        for (index, block) in fill.blocks(segment).enumerate() {
            let bytes = vec![segment as u8 + 1; (block.end - block.start) as usize];
            part.write(block.start, &bytes).unwrap();
            sums.set(index, Sums::of(&bytes));
        }
        part.sync().unwrap();
        fill.finish(segment, &sums).unwrap();
    }
    assert!(fill.look().unwrap().is_whole());
    assert!(!fill.look().unwrap().sealed);

    fill.seal().unwrap();
    fill.seal().unwrap();

    assert!(fill.look().unwrap().sealed);
    assert_eq!(
        fill.bytes().unwrap().unwrap().metadata().unwrap().len(),
        size
    );
    let sums = fill.sums(2).unwrap().unwrap();
    assert_eq!(sums.check(0, 2 * MIB, &[3; 5]), Ok(()));
    assert_eq!(
        sums.check(0, 2 * MIB, &[3, 3, 3, 3, 4]),
        Err(BadBlock { at: 2 * MIB })
    );
}

#[test]
fn checksums_that_are_cut_off_are_none() {
    let (dir, store) = store();
    let fill = store.fill(&key(), MIB).unwrap();
    fill.finish(0, &Sums::new(1)).unwrap();
    let path = dir.path().join(format!("blobs/{}/0.sums", key()));
    for text in ["", "00000000\n", "00000000\n00000000\nend\n", "end\n"] {
        fs::write(&path, text).unwrap();
        assert_eq!(fill.sums(0).unwrap(), None, "{text:?}");
    }
}

#[test]
fn what_is_set_aside_takes_late_writers_with_it() {
    let (dir, store) = store();
    let old = store.fill(&key(), MIB).unwrap();
    let part = old.part().unwrap();
    let claim = old.claim(0, 0, "one").unwrap().unwrap();

    assert!(old.set_aside().unwrap());
    let new = store.fill(&key(), MIB).unwrap();
    part.write(0, b"late").unwrap();
    old.beat(&claim, 7).unwrap();
    old.finish(0, &Sums::new(1)).unwrap();
    old.seal().unwrap();

    assert_eq!(new.look().unwrap().segments, [SegmentView::default()]);
    assert!(new.bytes().unwrap().is_none());
    assert!(
        !old.set_aside().unwrap(),
        "the name is another one's by now"
    );
    assert_eq!(fs::read_dir(dir.path().join("blobs")).unwrap().count(), 2);
}

#[test]
fn what_a_neighbour_put_there_neither_hangs_nor_misleads() {
    use nix::sys::stat::Mode;
    let (dir, store) = store();
    let fill = store.fill(&key(), MIB).unwrap();
    let folder = dir.path().join(format!("blobs/{}", key()));
    let pipe = |name: &str| nix::unistd::mkfifo(&folder.join(name), Mode::S_IRWXU).unwrap();
    pipe("blob");
    pipe("0.sums");
    pipe("0.0.claim");
    assert!(fill.bytes().unwrap().is_none());
    assert_eq!(fill.sums(0).unwrap(), None);
    assert_eq!(fill.read_claim(0, 0).unwrap().as_deref(), Some(""));

    fs::write(folder.join(format!("0.{}.claim", u32::MAX)), "").unwrap();
    assert_eq!(fill.look().unwrap().segments[0].turn, Some(0));
    assert!(fill.claim(0, u32::MAX, "one").is_err());

    for name in 0..11_000 {
        fs::write(folder.join(format!("x{name}")), "").unwrap();
    }
    assert!(fill.look().is_err(), "endless names are read");
}

#[test]
fn what_no_origin_says_anything_about_is_not_shared() {
    use crate::digest::Claims;
    use crate::model::RelPath;
    use crate::source::Vouched;
    let file = |claims, identity: Option<&str>, size| RemoteFile {
        path: RelPath::new("a").unwrap(),
        size,
        claims,
        vouched: Vouched::BySource,
        identity: identity.map(str::to_owned),
        xet_hash: None,
        told: None,
    };
    let sha256 = Claims {
        sha256: Some(Digest::of(b"")),
        ..Claims::default()
    };
    let crc = Claims {
        crc64nvme: Some(1),
        ..Claims::default()
    };
    assert!(is_shareable(&file(sha256, None, 1)));
    assert!(is_shareable(&file(crc, Some("s3:x"), 1)));
    assert!(
        !is_shareable(&file(crc, None, 1)),
        "no name that is the same for all"
    );
    assert!(!is_shareable(&file(Claims::default(), Some("s3:x"), 1)));
    assert!(
        !is_shareable(&file(sha256, None, 0)),
        "there is nothing to share"
    );
}

fn tier(root: &Path) -> Arc<SharedTier> {
    let config = SharedConfig {
        stall_timeout: Duration::from_millis(300),
        options: SharedOptions {
            segment_bytes: Some(MIB),
            file_system: None,
        },
        ..SharedConfig::new(root.to_owned())
    };
    SharedTier::new(config, Arc::new(Metrics::default()))
}

async fn until(tier: &SharedTier, reach: Reach) {
    for _ in 0..1000 {
        if tier.reach() == reach {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it is still {:?}: {:?}", tier.reach(), tier.state());
}

#[tokio::test]
async fn a_call_that_hangs_leaves_the_tier_out_until_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let tier = tier(dir.path());
    assert!(tier.answers().await);
    let (release, wait) = std::sync::mpsc::channel::<()>();

    let hung = tier.run(move |_| Ok(wait.recv())).await;

    assert!(matches!(hung, Err(Trouble::Away(_))), "{hung:?}");
    assert!(tier.metrics().encode().contains("reason=\"away\"} 1"));
    until(&tier, Reach::Full).await;
    release.send(()).unwrap();
    assert!(tier.run(|_| Ok(())).await.is_ok());
    tier.settle(Duration::ZERO).await;
}

#[tokio::test]
async fn a_tier_that_cannot_be_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let tier = tier(dir.path());
    assert!(tier.answers().await);
    let full = || SharedError::Io {
        op: "write",
        path: "x".into(),
        source: io::ErrorKind::StorageFull.into(),
    };

    let failed: Result<(), _> = tier.run(move |_| Err(full())).await;

    assert!(matches!(failed, Err(Trouble::Failed(_))), "{failed:?}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(tier.reach(), Reach::ReadOnly, "a small file proves nothing");
    assert!(tier.run(|_| Ok(())).await.is_ok());
    assert!(tier.state().readable && !tier.state().writable);
    tier.settle(Duration::ZERO).await;
}

#[tokio::test]
async fn a_lease_changes_as_long_as_it_is_held_and_goes_with_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let config = SharedConfig {
        claim_timeout: Duration::from_millis(200),
        ..SharedConfig::new(dir.path().to_owned())
    };
    let tier = SharedTier::new(config, Arc::new(Metrics::default()));
    assert!(tier.answers().await);
    let kept = tier.lease(vec![key()]).await.expect("a lease");
    let look = || tier.run(|store| store.leases());

    let first = look().await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let second = look().await.unwrap();
    drop(kept);
    tier.settle(Duration::from_secs(5)).await;

    assert!(first[0].lists(&key().to_string()));
    assert_ne!(first[0].beat, second[0].beat);
    assert_eq!(fs::read_dir(dir.path().join("leases")).unwrap().count(), 0);
}
