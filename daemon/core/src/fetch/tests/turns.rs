//! Fetches that wait, and what they keep from others.

use super::*;

fn one_file_at_a_time() -> FetchLimits {
    FetchLimits {
        connections: 8,
        files_in_flight: 1,
        stall_timeout: Duration::from_secs(3600),
        ..limits()
    }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
    waited.unwrap_or_else(|_| panic!("not so: {what}"));
}

#[tokio::test]
async fn a_fetch_that_pauses_keeps_no_other_from_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(50_000)), ("b.json", content(40_000))]);
    *origin.faults.lock().unwrap() = vec![Fault::Busy(300)];
    let fetcher = fetcher_with(dir.path(), &origin, one_file_at_a_time());
    let _paused = fetcher.fetch(request(&["a.bin"]));
    until("the origin is busy", || {
        origin.faults.lock().unwrap().is_empty()
    })
    .await;

    let other = fetcher.fetch(request(&["b.json"])).wait();
    let other = tokio::time::timeout(Duration::from_secs(10), other).await;

    other.expect("it waits for the other fetch").unwrap();
    fetcher.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn fetches_that_follow_the_bytes_of_others_keep_none_from_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let more: Vec<_> = (0..8).map(|n| format!("{n}.json")).collect();
    let mut files = vec![("a.bin", content(50_000)), ("b.json", content(40_000))];
    files.extend(more.iter().map(|path| (path.as_str(), content(10))));
    let origin = Origin::new(&files);
    *origin.faults.lock().unwrap() = vec![Fault::Stall(0); 8];
    let stalled = fetcher_with(dir.path(), &origin, one_file_at_a_time());
    let _stalled = stalled.fetch(request(&["a.bin"]));
    until("it is read", || !origin.reads.lock().unwrap().is_empty()).await;
    let fetcher = fetcher_with(dir.path(), &origin, one_file_at_a_time());
    for path in &more {
        let fetch = fetcher.fetch(request(&["a.bin", path]));
        let progress = fetch.progress();
        until("all but `a.bin` is here", || {
            progress.borrow().files_done == 1
        })
        .await;
    }

    let other = fetcher.fetch(request(&["b.json"])).wait();
    let other = tokio::time::timeout(Duration::from_secs(10), other).await;

    other.expect("it waits for those that follow").unwrap();
    fetcher.shutdown(Duration::from_secs(5)).await;
    stalled.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_fetch_says_what_it_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(50_000)), ("b.bin", content(40_000))]);
    *origin.faults.lock().unwrap() = vec![Fault::Stall(0); 16];
    let limits = FetchLimits {
        connections: 1,
        ..one_file_at_a_time()
    };
    let stalled = fetcher_with(dir.path(), &origin, limits);
    let silent = stalled.fetch(request(&["a.bin"])).progress();
    until("it is read", || !origin.reads.lock().unwrap().is_empty()).await;
    // The only connection is taken, and as in another process the same bytes are.
    let turn = stalled.fetch(request(&["b.bin"])).progress();
    let fetcher = fetcher_with(dir.path(), &origin, one_file_at_a_time());
    let others = fetcher.fetch(request(&["a.bin"])).progress();

    let waits = |progress: &watch::Receiver<Progress>| progress.borrow().wait.clone();
    until("one waits for bytes", || {
        waits(&silent) == Some(Wait::Silence)
    })
    .await;
    until("one for its turn", || waits(&turn) == Some(Wait::Turn)).await;
    until("one for others", || waits(&others) == Some(Wait::Others)).await;

    fetcher.shutdown(Duration::from_secs(5)).await;
    stalled.shutdown(Duration::from_secs(5)).await;
    assert_eq!(waits(&silent).unwrap().until(), None);
}

/// A fetch that has brought `a.json` and meets these faults at `b.bin`, and another request for the same
/// snapshot, once that sees the file.
async fn two_requests_for_one_snapshot(
    root: &std::path::Path,
    origin: &Arc<Origin>,
    faults: Vec<Fault>,
) -> (Arc<Fetcher>, Fetch, Fetch) {
    *origin.faults.lock().unwrap() = faults;
    let limits = FetchLimits {
        connections: 1,
        ..one_file_at_a_time()
    };
    let fetcher = fetcher_with(root, origin, limits);
    let first = fetcher.fetch(request(&["*"]));
    let progress = first.progress();
    until("a file is here", || progress.borrow().files_done == 1).await;
    let pinned = FetchRequest {
        pin: Some(crate::store::Holder::operator("me").unwrap()),
        ..request(&["*"])
    };
    let second = fetcher.fetch(pinned);
    let progress = second.progress();
    until("the second sees the file", || {
        progress.borrow().files_done == 1
    })
    .await;
    (fetcher, first, second)
}

fn two_files() -> Arc<Origin> {
    Origin::new(&[("a.json", content(10_000)), ("b.bin", content(100_000))])
}

#[tokio::test]
async fn another_request_for_the_same_snapshot_sees_its_progress_and_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let origin = two_files();
    let faults = vec![Fault::Busy(300)];
    let (fetcher, _first, second) =
        two_requests_for_one_snapshot(dir.path(), &origin, faults).await;

    let seen = second.progress().borrow().clone();
    let tree = second.tree().borrow().clone().expect("it sees no files");

    assert!(!second.joined());
    assert_eq!(
        (seen.phase, seen.files, seen.bytes),
        (Phase::Fetching, 2, 110_000)
    );
    assert_eq!((seen.bytes_done, seen.bytes_fetched), (10_000, 0));
    assert_eq!(fs::read(tree.join("a.json")).unwrap(), content(10_000));
    fetcher.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn what_fails_for_one_is_brought_by_the_next_with_progress_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let origin = two_files();
    let faults = vec![Fault::Denied, Fault::Busy(2)];
    let (_fetcher, first, second) =
        two_requests_for_one_snapshot(dir.path(), &origin, faults).await;
    let progress = second.progress();

    first.wait().await.expect_err("it brought what was denied");
    let fetched = second.wait().await.unwrap();

    assert_tree(&fetched, &origin);
    let seen = progress.borrow().clone();
    assert_eq!((seen.files, seen.files_done), (2, 2));
    assert_eq!((seen.bytes_done, seen.bytes_fetched), (110_000, 100_000));
}
