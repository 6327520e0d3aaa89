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
