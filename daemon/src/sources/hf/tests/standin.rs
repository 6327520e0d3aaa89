//! The source against the stand-in Hub, which official clients download from as well.

use weightd_core::digest::{Digest, Verifier};
use weightd_standin::{Fault, FaultKind, Files, Gated, Hub, HubConfig, Origin, Repo};

use super::*;

const SIZE: usize = 1 << 20;

fn bytes() -> Vec<u8> {
    (0..SIZE).map(|at| (at * 13 + at / 509) as u8).collect()
}

async fn hub() -> Hub {
    let hub = Hub::start(HubConfig::default().page_size(1).token(TOKEN)).await;
    let hub = hub.unwrap();
    let files = Files::new()
        .file("config.json", CONFIG)
        .file("sub/tokenizer.json", b"{}".to_vec())
        .lfs("model.safetensors", bytes());
    let repo = |id| Repo::new(id).commit("main", files.clone());
    hub.add_repo(repo("org/model").commit("refs/pr/1", files.clone()));
    hub.add_repo(repo("model"));
    hub.add_repo(repo("org/gated").gated(Gated::Manual).grant("hf_granted"));
    hub.add_repo(repo("org/private").private().grant("hf_granted"));
    hub.add_repo(repo("org/disabled").disabled());
    hub
}

fn open(hub: &Hub, model: &str, token: Option<&str>) -> HfSource {
    source_at(&hub.endpoint(), &clients(), model, token)
}

async fn opened(source: HfSource) -> Result<(HfSource, Listing), SourceError> {
    let revision = source.resolve().await?;
    let listing = source.list(&revision, &Patterns::default()).await?;
    Ok((source, listing))
}

async fn listed(hub: &Hub) -> (HfSource, Listing) {
    opened(open(hub, "hf://org/model", Some(TOKEN)))
        .await
        .unwrap()
}

#[tokio::test]
async fn every_file_arrives_as_the_hub_claims_it() {
    let hub = hub().await;
    for model in ["hf://org/model", "hf://model", "hf://org/model@refs/pr/1"] {
        let (source, listing) = opened(open(&hub, model, Some(TOKEN))).await.unwrap();
        assert_eq!(listing.files.len(), 3, "{model}");
        for file in &listing.files {
            let size = file.size as usize;
            let ranges = [0..size / 3, size / 3..size / 2, size / 2..size];
            let parts = ranges.map(|range| read(&source, file, range));
            let parts = futures::future::try_join_all(parts).await.unwrap();
            let mut verifier = Verifier::new(file.size, file.claims);
            parts.iter().for_each(|part| verifier.update(part));
            verifier.finish().unwrap();
        }
    }
    assert_eq!(hub.token_leaks().len(), 0);
    assert!(hub.cdn_bytes_sent() >= 3 * SIZE as u64);
}

#[tokio::test]
async fn who_may_not_read_is_told_why() {
    let hub = hub().await;
    let fails = async |model: &str, token: Option<&str>| {
        let source = open(&hub, model, token);
        let result = match source.resolve().await {
            Ok(revision) => source.authorise(&revision).await,
            Err(error) => Err(error),
        };
        text(&result.expect_err(model))
    };
    let other = Some(TOKEN);
    for (model, token, part) in [
        ("hf://org/missing", None, "not found, or private: no token"),
        ("hf://org/private", None, "not found, or private: no token"),
        ("hf://org/private", other, "the token cannot see it"),
        ("hf://org/gated", None, "gated, and no token was given"),
        ("hf://org/gated", other, "not among its readers"),
        ("hf://org/model", Some("hf_wrong"), "the token is not valid"),
        ("hf://org/model@nope", None, "no such branch"),
        ("hf://org/disabled", None, "disabled the repository"),
    ] {
        let text = fails(model, token).await;
        assert!(text.contains(part), "{model} {token:?}: {text}");
    }
    for model in ["hf://org/gated", "hf://org/private"] {
        let source = open(&hub, model, Some("hf_granted"));
        let revision = source.resolve().await.unwrap();
        source.authorise(&revision).await.unwrap();
    }
}

#[tokio::test]
async fn signatures_that_expire_are_renewed_once() {
    let hub = hub().await;
    let (source, listing) = listed(&hub).await;
    let file = &listing.files[1];
    read(&source, file, 0..1000).await.unwrap();
    hub.expire_urls();
    hub.clear_requests();
    let reads = (0..16).map(|at| read(&source, file, at * 1000..at * 1000 + 1000));
    let parts = futures::future::try_join_all(reads).await.unwrap();
    assert!(parts.concat() == bytes()[..16_000]);
    let heads = hub
        .requests()
        .into_iter()
        .filter(|seen| seen.method == "HEAD");
    assert_eq!(heads.count(), 1);
    assert_eq!(hub.token_leaks().len(), 0);
}

#[tokio::test]
async fn faults_of_the_cdn_are_worth_a_retry_and_the_bytes_before_them_are_right() {
    let faults = [
        Fault::new(FaultKind::Cut { after_bytes: 1000 }),
        Fault::new(FaultKind::WrongLength { by: -1 }),
        Fault::new(FaultKind::WrongLength { by: 1 }),
        Fault::new(FaultKind::ShiftedRange { by: 1 }),
        Fault::status(503),
        Fault::status(429),
    ];
    for fault in faults {
        let hub = hub().await;
        let (source, listing) = listed(&hub).await;
        let file = &listing.files[1];
        hub.fault(fault.clone().on(Origin::Cdn));
        let result = read(&source, file, 5000..90_000).await;
        let error = result.expect_err("the fault went unseen");
        assert!(
            matches!(error, SourceError::Unavailable { .. }),
            "{fault:?}: {error}"
        );
        text(&error);
        let again = read(&source, file, 5000..90_000).await.unwrap();
        assert!(again == bytes()[5000..90_000], "{fault:?}");
    }
}

#[tokio::test]
async fn a_file_that_changed_and_a_range_that_is_ignored_are_seen() {
    let hub = hub().await;
    let (source, listing) = listed(&hub).await;
    let etag = Some(Digest::of(b"other").to_string());
    hub.fault(Fault::new(FaultKind::ChangedFile { etag, size: None }));
    let error = read(&source, &listing.files[1], 0..10).await.unwrap_err();
    assert!(matches!(error, SourceError::Changed { .. }), "{error}");

    hub.fault(Fault::new(FaultKind::IgnoreRange).on(Origin::Cdn).forever());
    let start = read(&source, &listing.files[1], 0..10).await.unwrap();
    assert!(start == bytes()[..10]);
    let error = read(&source, &listing.files[1], 10..20).await.unwrap_err();
    assert!(matches!(error, SourceError::NoRanges { .. }), "{error}");
    let whole = read(&source, &listing.files[1], 0..SIZE).await.unwrap();
    assert!(whole == bytes());
}

#[tokio::test]
async fn the_hubs_rate_limit_is_waited_out() {
    let hub = hub().await;
    for path in ["/revision/", "/tree/", "/resolve/"] {
        let limit = FaultKind::RateLimit {
            bucket: if path == "/resolve/" {
                "resolvers"
            } else {
                "api"
            }
            .to_owned(),
            quota: 500,
            window_s: 300,
            reset_s: 0,
            retry_after_s: None,
        };
        hub.fault(Fault::new(limit).path(path).times(2));
    }
    let (source, listing) = listed(&hub).await;
    for file in &listing.files {
        read(&source, file, 0..file.size as usize).await.unwrap();
    }
    assert_eq!(hub.faults_fired(), 6);
}
