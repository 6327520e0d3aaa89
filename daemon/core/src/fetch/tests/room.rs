//! Fetches into a store that is short of room.

use super::*;

/// A fetcher into a store that may hold so many bytes.
pub(super) fn within(root: &std::path::Path, origin: &Arc<Origin>, max_bytes: u64) -> Arc<Fetcher> {
    let store_limits = StoreLimits {
        max_bytes: Some(max_bytes),
        ..StoreLimits::default()
    };
    let store = Store::open(root, store_limits).unwrap();
    let sources = Arc::new(Only(Arc::clone(origin)));
    Fetcher::new(store, sources, limits(), Arc::default())
}

#[tokio::test]
async fn files_with_the_same_bytes_need_room_for_them_once() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(6000)), ("twin.bin", content(6000))]);
    let fetcher = within(dir.path(), &origin, 10_000);
    let asked = request(&["*"]);

    let plan = fetcher.plan(&asked.model, &asked.patterns).await.unwrap();
    let fetched = fetcher.fetch(asked).wait().await.unwrap();

    assert_tree(&fetched, &origin);
    assert_eq!((plan.bytes_to_fetch, plan.room.short), (6000, 0));
    assert_eq!(fetched.bytes_fetched, 6000);
}
