//! What is found under a prefix, and what is claimed of it.

use weightd_core::digest::Digest;
use weightd_standin::Checksum;

use super::*;

#[tokio::test]
async fn a_prefix_is_listed_over_many_pages_and_nothing_beside_it() {
    let s3 = model().await;
    for key in ["x/", "x/sub/", "xy/config.json", "x.json"] {
        s3.put("models", key, "", PutOptions::default());
    }
    for name in ["s3://models/x", "s3://models/x/"] {
        let files = listed(&s3, name).await.unwrap();
        assert_eq!(
            paths(&files),
            ["config.json", "model.safetensors", "sub/vocab.txt"],
            "{name}"
        );
        assert_eq!(file(&files, "model.safetensors").size, 1_000_000);
    }
    let whole = listed(&s3, "s3://models").await.unwrap();
    assert!(paths(&whole).contains(&"xy/config.json"), "{whole:?}");
}

#[tokio::test]
async fn a_prefix_is_listed_once_for_both_questions() {
    let s3 = model().await;
    s3.put(
        "models",
        "x/pytorch_model.bin",
        "unwanted",
        PutOptions::default(),
    );

    let listing = list(&open(&s3, "s3://models/x")).await.unwrap();

    assert_eq!((listing.left_out.files, listing.left_out.bytes), (1, 8));
    let requests = s3.requests();
    let lists = requests
        .iter()
        .filter(|request| request.query.contains("list-type"));
    assert_eq!(lists.count(), 2, "two pages of two keys");
    let heads = requests.iter().filter(|request| request.method == "HEAD");
    assert_eq!(heads.count(), 3, "what is left out is not looked at");
}

#[tokio::test]
async fn a_revision_stands_for_exactly_one_listing() {
    let s3 = model().await;
    let first = open(&s3, "s3://models/x").resolve().await.unwrap();
    assert_eq!(open(&s3, "s3://models/x").resolve().await.unwrap(), first);
    let pinned = format!("s3://models/x@{first}");
    assert_eq!(open(&s3, &pinned).resolve().await.unwrap(), first);

    s3.put("models", "x/config.json", "[]", PutOptions::default());

    let source = open(&s3, "s3://models/x");
    let second = source.resolve().await.unwrap();
    assert_ne!(second, first);
    let listing = source.list(&first, &Patterns::default()).await.unwrap_err();
    assert!(matches!(listing, SourceError::Changed { .. }), "{listing}");
    let gone = open(&s3, &pinned).resolve().await.unwrap_err();
    assert!(matches!(gone, SourceError::NotFound { .. }), "{gone}");
    assert!(gone.hint().unwrap().contains(second.as_str()), "{gone:?}");
}

#[tokio::test]
async fn a_listing_that_goes_round_in_a_circle_is_refused() {
    let s3 = model().await;
    for token in ["a", "b", "a", "b", "a"] {
        let page = format!(
            "<ListBucketResult><Name>models</Name><Prefix>x/</Prefix><KeyCount>0</KeyCount>\
             <MaxKeys>2</MaxKeys><IsTruncated>true</IsTruncated>\
             <NextContinuationToken>{token}</NextContinuationToken></ListBucketResult>"
        );
        s3.fault(weightd_standin::Fault::new(
            weightd_standin::FaultKind::Status {
                status: 200,
                headers: vec![],
                body: page,
            },
        ));
    }
    let error = open(&s3, "s3://models/x").resolve().await.unwrap_err();
    assert!(error.to_string().contains("does not go on"), "{error}");
    assert_eq!(s3.requests().len(), 3);
}

#[tokio::test]
async fn a_listing_at_a_revision_needs_no_question_before_it() {
    let s3 = model().await;
    let revision = open(&s3, "s3://models/x").resolve().await.unwrap();
    let listing = open(&s3, "s3://models/x")
        .list(&revision, &Patterns::default())
        .await;
    assert_eq!(listing.unwrap().files.len(), 3);
}

#[tokio::test]
async fn an_object_that_changes_between_listing_and_look_is_seen() {
    let s3 = model().await;
    let source = open(&s3, "s3://models/x");
    let revision = source.resolve().await.unwrap();
    s3.put("models", "x/config.json", "[]", PutOptions::default());

    for _ in 0..2 {
        let error = source
            .list(&revision, &Patterns::default())
            .await
            .unwrap_err();
        assert!(matches!(error, SourceError::Changed { .. }), "{error}");
    }
}

#[tokio::test]
async fn checksums_of_the_whole_object_become_claims() {
    let s3 = server().await;
    // Check values of "123456789": the catalogue of parametrised CRC algorithms.
    let digest = Digest::of(b"123456789");
    let hex = digest.to_string().to_uppercase();
    for (key, options) in [
        ("x/crc64nvme.json", PutOptions::default()),
        ("x/crc32c.json", PutOptions::checksum(Checksum::Crc32c)),
        ("x/sha256.json", PutOptions::checksum(Checksum::Sha256)),
        (
            "x/parts.json",
            PutOptions::checksum(Checksum::Sha256).parts(3),
        ),
        ("x/none.json", PutOptions::checksum(Checksum::None)),
        (
            "x/meta.json",
            PutOptions::checksum(Checksum::None).meta("sha256", &hex),
        ),
        (
            "x/odd.json",
            PutOptions::checksum(Checksum::None).meta("sha256", "?"),
        ),
        (
            "x/both.json",
            PutOptions::checksum(Checksum::Sha256).meta("sha256", &hex),
        ),
    ] {
        s3.put("models", key, "123456789", options);
    }

    let files = listed(&s3, "s3://models/x").await.unwrap();

    let claims = |path: &str| file(&files, path).claims;
    assert_eq!(
        claims("crc64nvme.json").crc64nvme,
        Some(0xae8b_1486_0a79_9888)
    );
    assert_eq!(claims("crc32c.json").crc32c, Some(0xe306_9283));
    for path in ["sha256.json", "meta.json", "both.json"] {
        assert_eq!(claims(path).sha256, Some(digest), "{path}");
    }
    for path in ["none.json", "parts.json", "odd.json"] {
        assert_eq!(
            claims(path),
            weightd_core::digest::Claims::default(),
            "{path}"
        );
    }
}

#[tokio::test]
async fn metadata_that_contradicts_the_checksum_is_refused() {
    let s3 = server().await;
    let other = Digest::of(b"other").to_string();
    let options = PutOptions::checksum(Checksum::Sha256).meta("sha256", &other);
    s3.put("models", "x/config.json", "{}", options);

    let error = listed(&s3, "s3://models/x").await.unwrap_err();

    assert!(matches!(error, SourceError::Invalid { .. }), "{error}");
    assert!(error.to_string().contains("x-amz-meta-sha256"), "{error}");
}

#[tokio::test]
async fn an_identity_names_the_bytes_and_their_place() {
    let s3 = server().await;
    s3.put("models", "x/a:b @.json", "{}", PutOptions::default());
    s3.set_versioned("other");
    let stored = s3.put("other", "x/a.json", "{}", PutOptions::default());
    let (version, etag) = (stored.version_id.unwrap(), stored.etag);

    let odd = listed(&s3, "s3://models/x")
        .await
        .unwrap()
        .remove(0)
        .identity
        .unwrap();
    let versioned = listed(&s3, "s3://other/x")
        .await
        .unwrap()
        .remove(0)
        .identity
        .unwrap();

    let port = s3.endpoint().rsplit(':').next().unwrap().to_owned();
    let place = format!("s3:http%3A//127.0.0.1%3A{port}");
    assert_eq!(odd, format!("{place}:models/x/a%3Ab%20%40.json:{etag}::2"));
    assert_eq!(
        versioned,
        format!("{place}:other/x/a.json:{etag}:{version}:2")
    );
}

#[tokio::test]
async fn an_archived_object_is_refused_before_it_is_read() {
    let s3 = server().await;
    let stored = s3.put("models", "x/config.json", "", PutOptions::default());
    let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let head = weightd_standin::FaultKind::Status {
        status: 200,
        headers: vec![
            header("etag", &format!("\"{}\"", stored.etag)),
            header("x-amz-storage-class", "DEEP_ARCHIVE"),
        ],
        body: String::new(),
    };
    s3.fault(weightd_standin::Fault::new(head).method("HEAD"));

    let error = listed(&s3, "s3://models/x").await.unwrap_err();

    assert!(error.to_string().contains("DEEP_ARCHIVE"), "{error}");
    assert!(error.hint().unwrap().contains("restore"), "{error:?}");
}

#[tokio::test]
async fn a_hostile_key_is_refused() {
    let s3 = model().await;
    s3.put(
        "models",
        "x/../../etc/passwd.json",
        "{}",
        PutOptions::default(),
    );
    let error = listed(&s3, "s3://models/x").await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid { .. }), "{error}");
    let error = listed(&s3, "s3://models/x/../y").await.unwrap_err();
    assert!(error.to_string().contains("`..`"), "{error}");
}
