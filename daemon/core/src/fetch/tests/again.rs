//! Fetches that are tried again, and for how long they stay on record.

use super::*;
use crate::store::Holder;

/// Fails with these errors, taken from the end, before it opens the origin.
struct Failing(Arc<Origin>, Mutex<Vec<SourceError>>);

impl Sources for Failing {
    fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        match self.1.lock().unwrap().pop() {
            Some(error) => Err(error),
            None => Only(Arc::clone(&self.0)).open(model),
        }
    }
}

fn changed() -> SourceError {
    SourceError::Changed {
        what: "a.bin".to_owned(),
        detail: String::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn an_origin_that_changed_is_listed_again_unless_the_revision_is_fixed() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(5000))]);
    let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
    let sources = Arc::new(Failing(Arc::clone(&origin), Mutex::default()));
    let fetcher = Fetcher::new(store, Arc::clone(&sources) as _, limits(), Arc::default());
    let fixed = FetchRequest {
        model: format!("hf://org/model@{}", "a".repeat(40))
            .parse()
            .unwrap(),
        ..request(&["*"])
    };

    for (asked, brought) in [(fixed, false), (request(&["*"]), true)] {
        sources.1.lock().unwrap().push(changed());
        let fetched = fetcher.keep_trying(asked).await;
        assert_eq!(fetched.is_ok(), brought, "{fetched:?}");
        assert_eq!(fetcher.store().recorded_fetches().unwrap(), []);
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_store_fails_a_fetch_at_once_and_is_tried_again_by_who_keeps_trying() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(6000)), ("b.json", content(7000))]);
    let fetcher = room::within(dir.path(), &origin, 10_000);
    let holder = Holder::operator("me").unwrap();
    let first = FetchRequest {
        pin: Some(holder.clone()),
        ..request(&["b.json"])
    };
    let first = fetcher.fetch(first).wait().await.unwrap();

    let error = fetcher.fetch(request(&["a.bin"])).wait().await;
    let error = error.expect_err("there is no room");
    let trying = tokio::spawn({
        let fetcher = Arc::clone(&fetcher);
        async move { fetcher.keep_trying(request(&["a.bin"])).await }
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    let id = &first.snapshot.manifest.snapshot;
    fetcher.store().unpin(id, &holder).unwrap();
    let fetched = trying.await.unwrap();

    assert!(
        matches!(&error, FetchError::Store { source, .. } if source.is_no_space()),
        "{error}"
    );
    assert_eq!(fetched.unwrap().bytes_fetched, 6000);
}

#[test]
fn what_was_set_aside_meanwhile_is_fetched_again() {
    let of = |source: StoreError| FetchError::Store {
        model: "hf://org/model".parse().unwrap(),
        source: Arc::new(source),
    };
    let aside = of(StoreError::SetAside(RelPath::new("a.bin").unwrap()));
    let missing = of(StoreError::Missing("it".to_owned()));
    assert!(aside.may_pass() && !missing.may_pass());
}

#[tokio::test]
async fn a_fetch_that_was_asked_for_too_long_ago_is_not_resumed_however_often_it_was_tried() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(5000))]);
    let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
    let away = |n: usize| SourceError::Unavailable {
        what: format!("host {n}"),
        detail: String::new(),
        retry_after: None,
    };
    let sources = Arc::new(Failing(origin, Mutex::new((0..100).map(away).collect())));
    let fetcher = Fetcher::new(store, sources, limits(), Arc::default());
    let model = "hf://org/later".parse().unwrap();
    let later = FetchRequest {
        model,
        ..request(&["*"])
    };
    fetcher.fetch(request(&["*"])).wait().await.unwrap_err();
    let record = fs::read_dir(dir.path().join("fetches")).unwrap().next();
    let record = fs::File::open(record.unwrap().unwrap().path()).unwrap();
    let long_ago = std::time::SystemTime::now() - 2 * StoreLimits::default().keep_partial;
    record.set_modified(long_ago).unwrap();

    fetcher.fetch(request(&["*"])).wait().await.unwrap_err();
    fetcher.fetch(later.clone()).wait().await.unwrap_err();

    assert_eq!(fetcher.resume().unwrap(), 1);
    assert_eq!(fetcher.store().recorded_fetches().unwrap(), [later]);
    fetcher.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn what_is_given_up_stops_and_is_forgotten_until_it_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::failing(&[Fault::Stall(9000); 12]);
    let fetcher = fetcher(dir.path(), &origin);
    let trying = tokio::spawn({
        let fetcher = Arc::clone(&fetcher);
        async move { fetcher.keep_trying(request(&["*"])).await }
    });
    while origin.sent.load(Ordering::Relaxed) < 30_000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    fetcher.give_up(&request(&["*"])).await.unwrap();

    let error = trying.await.unwrap().expect_err("it went on");
    assert!(matches!(error, FetchError::Unwanted { .. }), "{error}");
    assert_eq!(fetcher.store().recorded_fetches().unwrap(), []);
    origin.faults.lock().unwrap().clear();
    let fetched = fetcher.fetch(request(&["*"])).wait().await.unwrap();
    assert_tree(&fetched, &origin);
}

#[tokio::test(start_paused = true)]
async fn what_is_given_up_between_two_tries_is_not_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(5000))]);
    let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
    let sources = Arc::new(Failing(origin, Mutex::new(vec![changed()])));
    let fetcher = Fetcher::new(store, sources, limits(), Arc::default());
    let trying = tokio::spawn({
        let fetcher = Arc::clone(&fetcher);
        async move { fetcher.keep_trying(request(&["*"])).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;

    fetcher.give_up(&request(&["*"])).await.unwrap();

    let error = trying.await.unwrap().expect_err("it was tried again");
    assert!(matches!(error, FetchError::Source { .. }), "{error}");
    assert_eq!(fetcher.store().recorded_fetches().unwrap(), []);
}

#[tokio::test(start_paused = true)]
async fn what_failed_can_be_given_up_and_what_is_under_way_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(5000))]);
    let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
    let sources = Arc::new(Failing(origin, Mutex::new(vec![changed()])));
    let fetcher = Fetcher::new(store, sources, limits(), Arc::default());
    let trying = tokio::spawn({
        let fetcher = Arc::clone(&fetcher);
        async move { fetcher.keep_trying(request(&["*"])).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;

    assert!(fetcher.give_up_if_failed(&request(&["*"])).await.unwrap());

    trying.await.unwrap().expect_err("it was tried again");
    assert_eq!(fetcher.store().recorded_fetches().unwrap(), []);
    let under_way = fetcher.fetch(request(&["*"]));
    assert!(!fetcher.give_up_if_failed(&request(&["*"])).await.unwrap());
    under_way.wait().await.expect("it went on");
}
