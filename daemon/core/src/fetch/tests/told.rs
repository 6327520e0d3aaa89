//! Files whose origin claims nothing before they are read.

use super::*;

async fn fetch(
    root: &std::path::Path,
    faults: &[Fault],
) -> (Result<Fetched, FetchError>, Vec<Range<u64>>) {
    let origin = Arc::new(Origin {
        files: BTreeMap::from([("a.bin".to_owned(), content(100_000))]),
        faults: Mutex::new(faults.to_vec()),
        tells: true,
        ..Origin::default()
    });
    let fetched = fetcher(root, &origin).fetch(request(&["*"])).wait().await;
    if let Ok(fetched) = &fetched {
        assert_tree(fetched, &origin);
    }
    let reads = origin.reads.lock().unwrap();
    let ranges = reads.iter().map(|(_, range)| range.clone()).collect();
    (fetched, ranges)
}

#[tokio::test]
async fn what_comes_with_the_bytes_is_checked() {
    let dir = tempfile::tempdir().unwrap();

    let (fetched, reads) = fetch(dir.path(), &[Fault::Flip, Fault::Flip]).await;

    let error = fetched.expect_err("published wrong bytes");
    assert!(matches!(error, FetchError::Mismatch { .. }), "{error}");
    assert_eq!(reads, [0..100_000, 0..100_000]);
    let (fetched, _) = fetch(dir.path(), &[Fault::None, Fault::Flip]).await;
    fetched.expect("the second read is good");
}

#[tokio::test]
async fn a_connection_that_is_cut_is_read_on_from() {
    let dir = tempfile::tempdir().unwrap();

    let (fetched, reads) = fetch(dir.path(), &[Fault::Cut(70_000)]).await;

    fetched.expect("fetched");
    assert_eq!(reads, [0..100_000, 70_000..100_000]);
}

#[tokio::test]
async fn bytes_of_an_earlier_run_are_not_believed_without_claims() {
    let dir = tempfile::tempdir().unwrap();
    let (broken, _) = fetch(dir.path(), &[Fault::Denied, Fault::Cut(70_000)]).await;
    broken.expect_err("it was denied");

    let (fetched, reads) = fetch(dir.path(), &[]).await;

    fetched.expect("fetched");
    assert_eq!(reads, vec![0..100_000; 1]);
}
