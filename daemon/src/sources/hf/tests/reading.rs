//! Bytes of files: ranges, addresses that expire, servers that answer otherwise than asked.

use super::*;

#[tokio::test]
async fn ranges_make_up_the_file_and_the_token_stays_at_the_hub() {
    let world = World::new(no_fault(), no_fault()).await;
    let (source, listing) = world.listed().await;
    let file = &listing.files[1];
    let ranges = [0..100_000, 100_000..250_000, 250_000..WEIGHTS];
    let parts = ranges.map(|range| read(&source, file, range));
    let parts = futures::future::try_join_all(parts).await.unwrap();
    assert!(parts.concat() == weights());
    assert!(read(&source, file, 0..WEIGHTS).await.unwrap() == weights());
    assert_eq!(read(&source, file, 7..7).await.unwrap(), b"");

    assert_eq!(
        world.hub.count("HEAD", "/resolve/"),
        1,
        "one address serves all"
    );
    assert_eq!(world.cdn.seen().len(), 4);
    for seen in world.cdn.seen() {
        assert_eq!(seen.authorization, None, "a token left the Hub");
    }
    for small in [&listing.files[0], &listing.files[2]] {
        let bytes = read(&source, small, 0..CONFIG.len()).await.unwrap();
        assert_eq!(bytes, CONFIG);
    }
    assert_eq!(world.hub.count("GET", "/sub%20dir/a%25b%23%3F.json"), 2);
    let bearer = format!("Bearer {TOKEN}");
    for seen in world.hub.seen() {
        assert_eq!(seen.authorization.as_ref(), Some(&bearer), "{}", seen.path);
    }
}

#[tokio::test]
async fn weights_that_lie_at_the_hub_itself_are_read_with_the_token() {
    let direct: Fault = Box::new(|seen| {
        let (first, last) = seen.range.unwrap_or((0, WEIGHTS - 1));
        let range = format!("bytes {first}-{last}/{WEIGHTS}");
        let headers = [("x-repo-commit", SHA), ("content-range", &range)];
        let wanted = seen.path.contains("/model.safetensors");
        wanted.then(|| match seen.range {
            Some(_) => answer(206, &headers, weights()[first..=last].to_vec()),
            None => answer(200, &headers[..1], weights()),
        })
    });
    let world = World::new(direct, no_fault()).await;
    let (source, listing) = world.listed().await;
    let file = &listing.files[1];
    assert!(read(&source, file, 500..9000).await.unwrap() == weights()[500..9000]);
    assert!(read(&source, file, 0..WEIGHTS).await.unwrap() == weights());
    assert_eq!(world.cdn.seen().len(), 0);
    assert!(
        world
            .hub
            .seen()
            .iter()
            .all(|seen| seen.authorization.is_some())
    );
}

#[tokio::test]
async fn connections_are_used_again() {
    let world = World::new(no_fault(), no_fault()).await;
    let (source, listing) = world.listed().await;
    for at in 0..10 {
        read(&source, &listing.files[1], at * 1000..at * 1000 + 1000)
            .await
            .unwrap();
    }
    assert_eq!(world.cdn.connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_expired_address_is_renewed_once_for_all_readers() {
    let world = World::new(no_fault(), no_fault()).await;
    let (source, listing) = world.listed().await;
    let file = &listing.files[1];
    read(&source, file, 0..10).await.unwrap();
    world.valid.store(1, Ordering::SeqCst);
    let reads = (1..17).map(|at| read(&source, file, at * 1000..at * 1000 + 1000));
    let parts = futures::future::try_join_all(reads).await.unwrap();
    assert!(parts.concat() == weights()[1000..17_000]);
    assert_eq!(world.hub.count("HEAD", "/resolve/"), 2);
}

#[tokio::test]
async fn a_cdn_that_refuses_fresh_addresses_is_not_asked_for_ever() {
    let world = World::new(no_fault(), no_fault()).await;
    let (source, listing) = world.listed().await;
    world.valid.store(u32::MAX, Ordering::SeqCst);
    let error = read(&source, &listing.files[1], 0..10).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
    assert!(text(&error).contains("clock"), "{error:?}");
    assert_eq!(world.hub.count("HEAD", "/resolve/"), 3);
    assert_eq!(world.cdn.seen().len(), 3);
}

#[tokio::test]
async fn an_address_that_could_not_be_had_is_asked_for_again() {
    let reply = || answer(503, &[], "");
    let world = World::new(first(4, "/resolve/", reply), no_fault()).await;
    let (source, listing) = world.listed().await;
    let error = read(&source, &listing.files[1], 0..10).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    read(&source, &listing.files[1], 0..10).await.unwrap();
}

#[tokio::test]
async fn a_server_without_ranges_serves_from_the_first_byte_only() {
    let whole: fn() -> _ = || answer(200, &[], weights());
    let world = World::new(no_fault(), always("/blob", whole)).await;
    let (source, listing) = world.listed().await;
    let file = &listing.files[1];
    assert!(read(&source, file, 0..1000).await.unwrap() == weights()[..1000]);
    let error = read(&source, file, 1000..2000).await.unwrap_err();
    assert!(matches!(error, SourceError::NoRanges { .. }), "{error}");

    let short: fn() -> _ = || answer(200, &[], "<html>");
    let world = World::new(no_fault(), always("/blob", short)).await;
    let (source, listing) = world.listed().await;
    let error = read(&source, &listing.files[1], 0..1000).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn wrong_ranges_are_refused_and_in_the_end_the_file_is_read_whole() {
    let shifted: fn() -> _ = || {
        let range = [("content-range", "bytes 1-1000/300000")];
        answer(206, &range, weights()[1..=1000].to_vec())
    };
    let beyond: fn() -> _ = || answer(416, &[], "");
    let longer: fn() -> _ = || {
        let range = [("content-range", "bytes 0-999/300000")];
        answer(206, &range, weights()[..2000].to_vec())
    };
    for reply in [shifted, beyond, longer] {
        let world = World::new(no_fault(), always("/blob", reply)).await;
        let (source, listing) = world.listed().await;
        for _ in 0..2 {
            let error = read(&source, &listing.files[1], 0..1000).await.unwrap_err();
            assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
        }
        let error = read(&source, &listing.files[1], 0..1000).await.unwrap_err();
        assert!(matches!(error, SourceError::NoRanges { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_gives_what_came_and_then_an_error() {
    let cut: fn() -> _ = || {
        let chunks = [
            Ok(weights()[..500].to_vec()),
            Err(std::io::Error::other("cut")),
        ];
        // Only a server that waits sends what it has.
        let chunks = futures::stream::iter(chunks).then(|chunk| async {
            tokio::task::yield_now().await;
            chunk
        });
        let body = Body::from_stream(chunks);
        answer(206, &[("content-range", "bytes 0-999/300000")], body)
    };
    let early: fn() -> _ = || {
        let chunks = [Ok::<_, std::io::Error>(weights()[..500].to_vec())];
        let body = Body::from_stream(futures::stream::iter(chunks));
        answer(206, &[("content-range", "bytes 0-999/300000")], body)
    };
    for reply in [cut, early] {
        let world = World::new(no_fault(), always("/blob", reply)).await;
        let (source, listing) = world.listed().await;
        let mut stream = source.read(&listing.files[1], 0..1000).await.unwrap();
        let mut bytes = Vec::new();
        let error = loop {
            match stream.try_next().await {
                Ok(chunk) => bytes.extend(chunk.expect("the stream ends without an error")),
                Err(error) => break error,
            }
        };
        assert!(bytes == weights()[..500]);
        assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
        text(&error);
        assert!(
            stream.try_next().await.unwrap().is_none(),
            "goes on after an error"
        );
    }
}

#[tokio::test]
async fn a_cdn_that_is_busy_may_be_asked_later() {
    let busy: fn() -> _ = || answer(503, &[("retry-after", "7")], "");
    let world = World::new(no_fault(), always("/blob", busy)).await;
    let (source, listing) = world.listed().await;
    let error = read(&source, &listing.files[1], 0..10).await.unwrap_err();
    let seven = Some(Duration::from_secs(7));
    assert!(
        matches!(error, SourceError::Unavailable { retry_after, .. } if retry_after == seven),
        "{error:?}"
    );
    text(&error);
}

#[tokio::test]
async fn a_file_that_is_no_longer_the_one_listed_is_refused() {
    let commit: fn() -> _ = || answer(302, &[("x-repo-commit", OTHER)], "");
    let hash: fn() -> _ = || {
        let other = format!("\"{}\"", Digest::of(b"other"));
        answer(
            302,
            &[("x-repo-commit", SHA), ("x-linked-etag", &other)],
            "",
        )
    };
    let size: fn() -> _ = || answer(302, &[("x-linked-size", "7")], "");
    for reply in [commit, hash, size] {
        let world = World::new(always("/model.safetensors", reply), no_fault()).await;
        let (source, listing) = world.listed().await;
        let error = read(&source, &listing.files[1], 0..10).await.unwrap_err();
        assert!(matches!(error, SourceError::Changed { .. }), "{error}");
        assert_eq!(world.cdn.seen().len(), 0);
    }
}
