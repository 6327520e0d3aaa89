//! The CDN: signatures, ranges, and content of every kind.

use std::time::Duration;

use sha2::{Digest, Sha256};
use weightd_standin::{Files, HubConfig, Pattern, Repo};

use crate::client::{Answer, ask, get, get_range, head};
use crate::hub::{WEIGHTS, hub, hub_with, signed_url, weights};

#[tokio::test]
async fn lfs_files_come_from_a_cdn_that_knows_nothing() {
    let hub = hub().await;
    let sha256 = hex::encode(Sha256::digest(weights()));
    let url = format!("{}/org/model/resolve/main/{WEIGHTS}", hub.endpoint());
    let redirect = head(&url).await;
    assert_eq!(redirect.status, 302);
    assert_eq!(redirect.header("x-linked-etag"), format!("\"{sha256}\""));
    assert_eq!(redirect.header("x-linked-size"), "400000");
    assert_eq!(
        redirect.header("x-repo-commit"),
        hub.sha("org/model", "main").unwrap()
    );
    let location = redirect.header("location");
    assert!(location.starts_with(&hub.cdn_endpoint()), "{location}");

    let answer = get(location).await;
    assert_eq!((answer.status, answer.body == weights()), (200, true));
    assert_eq!(head(location).await.header("content-length"), "400000");
    let etag = answer.header("etag").trim_matches('"');
    assert!(etag.len() == 64 && etag != sha256, "{etag}");
    assert!(
        !answer.headers.keys().any(|name| name.starts_with("x-")),
        "{answer:?}"
    );
    assert_eq!(hub.cdn_bytes_sent(), 400_000);
    assert_eq!(hub.bytes_sent(WEIGHTS), 400_000);
}

#[tokio::test]
async fn the_cdn_serves_ranges() {
    let hub = hub().await;
    let url = signed_url(&hub).await;
    let table: [(&str, u16, &str, std::ops::Range<usize>); 6] = [
        ("bytes=10-19", 206, "bytes 10-19/400000", 10..20),
        (
            "bytes=399990-",
            206,
            "bytes 399990-399999/400000",
            399_990..400_000,
        ),
        (
            "bytes=-5",
            206,
            "bytes 399995-399999/400000",
            399_995..400_000,
        ),
        (
            "bytes=399999-500000",
            206,
            "bytes 399999-399999/400000",
            399_999..400_000,
        ),
        ("bytes=400000-", 416, "bytes */400000", 0..0),
        ("bytes=0-1,5-6", 200, "", 0..400_000),
    ];
    for (range, status, content_range, bytes) in table {
        let answer = ask("GET", &url).header("Range", range).send().await;
        assert_eq!(answer.status, status, "{range}");
        assert_eq!(answer.header("content-range"), content_range, "{range}");
        assert!(answer.body == weights()[bytes], "{range}");
        assert!(answer.is_whole(), "{range}");
    }
    assert_eq!(hub.requests()[1].range, Some((10, 19)));
    assert_eq!(hub.requests()[2].range, Some((399_990, 399_999)));
}

fn assert_denied(answer: &Answer, why: &str) {
    assert_eq!(answer.status, 403, "{why}");
    assert!(answer.body.starts_with(b"<?xml"), "{why}: {answer:?}");
}

#[tokio::test]
async fn the_cdn_opens_only_to_a_good_signature() {
    let hub = hub().await;
    let url = signed_url(&hub).await;
    assert_denied(&get(url.split_once('?').unwrap().0).await, "unsigned");
    assert_denied(
        &get(&url.replace("Expires=", "Expires=9")).await,
        "later expiry",
    );
    assert_denied(
        &get(&url.replace(WEIGHTS, "config.json")).await,
        "another path",
    );
    hub.expire_urls();
    assert_denied(&get(&url).await, "expired now");
    assert_eq!(get(&signed_url(&hub).await).await.status, 200);

    let hub = hub_with(HubConfig::default().url_lifetime(Duration::ZERO)).await;
    assert_denied(&get(&signed_url(&hub).await).await, "no lifetime");
}

#[tokio::test]
async fn a_token_at_the_cdn_is_refused_and_recorded() {
    let hub = hub().await;
    let url = signed_url(&hub).await;
    assert!(hub.token_leaks().is_empty());
    assert_eq!(ask("GET", &url).token("hf_x").send().await.status, 400);
    let leaks = hub.token_leaks();
    assert_eq!(leaks.len(), 1);
    assert_eq!(leaks[0].authorization.as_deref(), Some("Bearer hf_x"));
}

#[tokio::test]
async fn content_on_disk_and_patterns_of_any_size_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.bin");
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(&disk, &bytes).unwrap();
    let claimed = "1".repeat(64);
    let files = Files::new()
        .lfs_path("disk.bin", &disk)
        .unwrap()
        .lfs_pattern("big.bin", Pattern::Zeros, 60_000_000_000, Some(&claimed))
        .lfs_pattern("noise.bin", Pattern::Noise(1), 5_000_000, None);
    let sha256 = files
        .find("noise.bin")
        .unwrap()
        .sha256()
        .unwrap()
        .to_owned();
    let hub = hub().await;
    hub.add_repo(Repo::new("org/big").commit("main", files));
    let url = async |file: &str| {
        let url = format!("{}/org/big/resolve/main/{file}", hub.endpoint());
        head(&url).await.header("location").to_owned()
    };
    assert!(get(&url("disk.bin").await).await.body == bytes);
    let part = get_range(&url("disk.bin").await, 1_000_000, 1_999_999).await;
    assert!(part.body == bytes[1_000_000..2_000_000]);
    let end = get_range(&url("big.bin").await, 59_999_999_990, 59_999_999_999).await;
    assert_eq!((end.status, end.body), (206, vec![0; 10]));
    let noise = get(&url("noise.bin").await).await.body;
    assert_eq!(hex::encode(Sha256::digest(&noise)), sha256);
    let part = get_range(&url("noise.bin").await, 4_194_300, 4_194_309).await;
    assert_eq!(part.body, noise[4_194_300..=4_194_309]);
}
