//! The bytes of the objects that were listed, and never those of others.

use weightd_core::digest::Claims;
use weightd_standin::{Fault, FaultKind};

use super::*;

#[tokio::test]
async fn a_range_is_read_of_exactly_what_was_listed() {
    let s3 = model().await;
    let source = open(&s3, "s3://models/x");
    let files = list(&source).await.unwrap().files;
    let weights = file(&files, "model.safetensors");
    s3.clear_requests();

    assert!(bytes(&source, weights, 0..1_000_000).await.unwrap() == large());
    assert!(bytes(&source, weights, 7..700_000).await.unwrap() == large()[7..700_000]);
    assert!(bytes(&source, weights, 9..9).await.unwrap().is_empty());

    let requests = s3.requests();
    let ranges: Vec<_> = requests.iter().map(|request| request.range).collect();
    assert_eq!(ranges, [Some((0, 999_999)), Some((7, 699_999))]);
    for request in &requests {
        assert!(
            request.header("if-match").unwrap().starts_with('"'),
            "{request:?}"
        );
        assert_eq!(request.header("x-amz-checksum-mode"), None);
    }
}

#[tokio::test]
async fn keys_of_any_spelling_are_read() {
    let s3 = server().await;
    let names = [
        "a b.json",
        "a+b.json",
        "a%2Fb.json",
        "é~(1)'!*.json",
        "a=b&c?d#e.json",
    ];
    for name in names {
        s3.put(
            "models",
            &format!("p @1/{name}"),
            name.to_owned(),
            PutOptions::default(),
        );
    }
    let source = open(&s3, "s3://models/p %401");

    let files = list(&source).await.unwrap().files;

    assert_eq!(files.len(), names.len());
    for file in &files {
        let got = bytes(&source, file, 0..file.size).await.unwrap();
        assert_eq!(String::from_utf8(got).unwrap(), file.path.as_str());
    }
}

#[tokio::test]
async fn an_object_that_changes_is_never_read_on() {
    let s3 = model().await;
    let source = open(&s3, "s3://models/x");
    let files = list(&source).await.unwrap().files;
    let weights = file(&files, "model.safetensors");
    assert_eq!(bytes(&source, weights, 0..5).await.unwrap(), large()[..5]);

    s3.put(
        "models",
        "x/model.safetensors",
        vec![0; 1_000_000],
        PutOptions::default(),
    );
    let replaced = bytes(&source, weights, 5..10).await.unwrap_err();
    s3.delete("models", "x/model.safetensors");
    let deleted = bytes(&source, weights, 5..10).await.unwrap_err();

    for error in [replaced, deleted] {
        assert!(matches!(error, SourceError::Changed { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_version_stays_readable_after_the_object_changed() {
    let s3 = server().await;
    s3.set_versioned("models");
    s3.put("models", "x/config.json", "first", PutOptions::default());
    let source = open(&s3, "s3://models/x");
    let files = list(&source).await.unwrap().files;

    s3.put("models", "x/config.json", "second", PutOptions::default());

    assert_eq!(bytes(&source, &files[0], 0..5).await.unwrap(), b"first");
}

#[tokio::test]
async fn a_server_that_ignores_the_precondition_is_caught() {
    let s3 = model().await;
    let source = open(&s3, "s3://models/x");
    let files = list(&source).await.unwrap().files;
    for (etag, range) in [("\"other\"", "bytes 0-1/2"), ("", "bytes 0-1/2")] {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let other = FaultKind::Status {
            status: 206,
            headers: vec![header("etag", etag), header("content-range", range)],
            body: "[]".to_owned(),
        };
        s3.fault(Fault::new(other));
        let error = bytes(&source, file(&files, "config.json"), 0..2)
            .await
            .unwrap_err();
        assert!(matches!(error, SourceError::Changed { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_weak_etag_is_no_precondition_but_compared() {
    let s3 = server().await;
    s3.put("models", "x/a.json", "{}", PutOptions::default());
    let weak = |status, more: &[(&str, &str)], body: &str| {
        let headers = [&[("etag", "W/\"a\"")], more].concat();
        let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        Fault::new(FaultKind::Status {
            status,
            headers: headers.into_iter().map(own).collect(),
            body: body.to_owned(),
        })
    };
    let page = "<ListBucketResult><Contents><Key>x/a.json</Key><Size>2</Size>\
                <ETag>W/&quot;a&quot;</ETag></Contents></ListBucketResult>";
    s3.fault(weak(200, &[], page));
    s3.fault(weak(200, &[], "{}").method("HEAD"));
    let source = open(&s3, "s3://models/x");
    let files = list(&source).await.unwrap().files;
    assert_eq!(files[0].identity, None);
    s3.clear_requests();

    s3.fault(weak(206, &[("content-range", "bytes 0-1/2")], "{}"));
    let same = bytes(&source, &files[0], 0..2).await.unwrap();
    let other = bytes(&source, &files[0], 0..2).await.unwrap_err();

    assert_eq!(same, b"{}");
    assert!(matches!(other, SourceError::Changed { .. }), "{other}");
    let requests = s3.requests();
    assert!(
        requests
            .iter()
            .all(|request| request.header("if-match").is_none())
    );
}

#[tokio::test]
async fn a_server_without_ranges_is_read_from_the_first_byte_only() {
    let s3 = model().await;
    s3.allow_anonymous("models");
    // The fault takes the header away before signatures are checked.
    let config = S3Config {
        identity: S3Identity::Nobody,
        ..config(&s3)
    };
    let source = S3Source::new(clients(), config, "s3://models/x".parse().unwrap());
    let files = list(&source).await.unwrap().files;
    let weights = file(&files, "model.safetensors");
    s3.fault(Fault::new(FaultKind::IgnoreRange).times(2));

    assert!(bytes(&source, weights, 0..1000).await.unwrap() == large()[..1000]);
    let error = bytes(&source, weights, 1000..2000).await.unwrap_err();

    assert!(matches!(error, SourceError::NoRanges { .. }), "{error}");
}

#[tokio::test]
async fn other_bytes_than_those_asked_for_are_refused() {
    let s3 = model().await;
    let source = open(&s3, "s3://models/x");
    let files = list(&source).await.unwrap().files;
    let weights = file(&files, "model.safetensors");
    for what in [
        FaultKind::ShiftedRange { by: 8 },
        FaultKind::WrongLength { by: 3 },
    ] {
        s3.fault(Fault::new(what));
        let error = bytes(&source, weights, 0..1000).await.unwrap_err();
        assert!(matches!(error, SourceError::Invalid { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_gives_what_came_and_then_an_error() {
    let s3 = model().await;
    let source = open(&s3, "s3://models/x");
    let files = list(&source).await.unwrap().files;
    s3.fault(Fault::new(FaultKind::Cut {
        after_bytes: 300_000,
    }));
    let weights = file(&files, "model.safetensors");
    let mut stream = source.read(weights, 0..1_000_000).await.unwrap();

    let mut got = Vec::new();
    let error = loop {
        match stream.try_next().await {
            Ok(piece) => got.extend(piece.expect("an error comes first")),
            Err(error) => break error,
        }
    };

    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    assert!(got.len() <= 300_000 && got == large()[..got.len()]);
    assert!(stream.try_next().await.unwrap().is_none());
}

#[tokio::test]
async fn a_range_is_asked_for_once_and_a_question_again() {
    let s3 = model().await;
    let source = open(&s3, "s3://models/x");
    s3.fault(Fault::status(503).times(2));
    let files = list(&source).await.unwrap().files;
    s3.clear_requests();
    s3.fault(Fault::new(FaultKind::Status {
        status: 503,
        headers: vec![("retry-after".to_owned(), "7".to_owned())],
        body: "<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>".to_owned(),
    }));

    let error = bytes(&source, &files[0], 0..2).await.unwrap_err();

    assert_eq!(s3.requests().len(), 1, "the fetcher retries, not the SDK");
    let SourceError::Unavailable { retry_after, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(retry_after.unwrap().as_secs(), 7);
    assert!(error.to_string().contains("SlowDown"), "{error}");
}

#[tokio::test]
async fn many_ranges_are_read_at_once_over_connections_that_stay() {
    let s3 = model().await;
    let source = open(&s3, "s3://models/x");
    let files = list(&source).await.unwrap().files;
    let weights = file(&files, "model.safetensors");
    s3.fault(
        Fault::new(FaultKind::Slow {
            bytes_per_second: 50_000,
        })
        .times(64),
    );

    let ranges = (0..64_u64).map(|at| bytes(&source, weights, at * 10_000..(at + 1) * 10_000));
    let parts = futures::future::try_join_all(ranges).await.unwrap();

    assert!(parts.concat() == large()[..640_000]);
    assert!(
        s3.max_concurrent_requests() >= 48,
        "{}",
        s3.max_concurrent_requests()
    );
}

/// A server with more small objects than are looked at, and a large one, under `s3://models/many`.
async fn many() -> S3Server {
    let s3 = S3Server::start(weightd_standin::S3Config::default().page_size(1000))
        .await
        .unwrap();
    for number in 0..=FEW {
        let key = format!("many/{number:03}.json");
        s3.put("models", &key, number.to_string(), PutOptions::default());
    }
    let large = vec![7; usize::try_from(SMALL_BYTES).unwrap() + 1];
    s3.put("models", "many/large.bin", large, PutOptions::default());
    s3
}

fn looks(s3: &S3Server) -> usize {
    let requests = s3.requests();
    let heads = requests.iter().filter(|request| request.method == "HEAD");
    heads.count()
}

fn everything() -> Patterns {
    Patterns::new(vec!["*".to_owned()], vec![]).unwrap()
}

async fn list_all(source: &S3Source) -> Vec<RemoteFile> {
    let revision = source.resolve().await.unwrap();
    source.list(&revision, &everything()).await.unwrap().files
}

#[tokio::test]
async fn of_many_small_objects_each_tells_its_checksum_when_it_is_read() {
    let s3 = many().await;
    let source = open(&s3, "s3://models/many");

    let files = list_all(&source).await;

    assert_eq!(looks(&s3), 1, "the large one");
    let large = file(&files, "large.bin");
    assert!(large.told.is_none() && large.claims.crc64nvme.is_some());
    let small = file(&files, "100.json");
    assert_eq!(
        (small.claims, small.all_claims()),
        (Claims::default(), None)
    );
    assert!(small.identity.is_some());
    assert_eq!(bytes(&source, small, 1..3).await.unwrap(), b"00");
    assert_eq!(small.all_claims(), None, "S3 tells it with the whole only");
    assert_eq!(bytes(&source, small, 0..3).await.unwrap(), b"100");
    let told = small.all_claims().expect("told");
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, b"100");
    assert_eq!(told.crc64nvme, Some(crc));
}

#[tokio::test]
async fn all_objects_are_looked_at_where_what_is_claimed_of_them_is_needed_before() {
    let s3 = many().await;
    let config = S3Config {
        look_at_all: true,
        ..config(&s3)
    };
    let source = S3Source::new(clients(), config, "s3://models/many".parse().unwrap());

    let files = list_all(&source).await;

    assert_eq!(looks(&s3), FEW + 2);
    assert!(files.iter().all(|file| file.all_claims().is_some()));
}

#[tokio::test]
async fn a_small_object_that_was_not_looked_at_is_read_only_as_it_was_listed() {
    let s3 = many().await;
    let source = open(&s3, "s3://models/many");
    let files = list_all(&source).await;
    s3.put("models", "many/100.json", "new", PutOptions::default());

    let read = bytes(&source, file(&files, "100.json"), 0..3).await;

    assert!(matches!(read, Err(SourceError::Changed { .. })), "{read:?}");
}

#[tokio::test]
async fn a_checksum_that_is_told_and_wrong_is_for_the_verifier() {
    let s3 = many().await;
    let wrong = PutOptions {
        claimed_checksum: Some("AAAAAAAAAAA=".to_owned()),
        ..PutOptions::default()
    };
    s3.put("models", "many/100.json", "100", wrong);
    let source = open(&s3, "s3://models/many");
    let files = list_all(&source).await;
    let small = file(&files, "100.json");

    assert_eq!(bytes(&source, small, 0..3).await.unwrap(), b"100");

    assert_eq!(small.all_claims().unwrap().crc64nvme, Some(0));
}
