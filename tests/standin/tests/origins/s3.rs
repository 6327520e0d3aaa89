//! The S3 server. Signatures are proven by a real client, in `tests/python`.

use weightd_standin::{
    Checksum, Fault, FaultKind, Origin, Pattern, PutOptions, S3Config, S3Server,
};

use crate::client::{Answer, ask, get, get_range, head};

/// A server with the bucket `models`, readable without a signature.
async fn s3() -> S3Server {
    let s3 = S3Server::start(S3Config::default()).await.expect("start");
    s3.allow_anonymous("models");
    s3
}

fn url(s3: &S3Server, path: &str) -> String {
    format!("{}/models/{path}", s3.endpoint())
}

fn text(answer: &Answer) -> String {
    String::from_utf8_lossy(&answer.body).into_owned()
}

/// The content of every `tag` in an answer's XML.
fn values(answer: &Answer, tag: &str) -> Vec<String> {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let body = text(answer);
    let parts = body.split(&open).skip(1);
    parts
        .map(|part| part.split(&close).next().unwrap_or_default().to_owned())
        .collect()
}

#[tokio::test]
async fn objects_are_read_whole_and_by_range() {
    let s3 = s3().await;
    let options = PutOptions::default().meta("sha256", "abc");
    let stored = s3.put("models", "m/a b.bin", "0123456789", options);
    // `printf 0123456789 | md5sum`
    assert_eq!(stored.etag, "781e5e245d69b566979b86e28d23f2c7");
    let url = url(&s3, "m/a%20b.bin");
    for answer in [head(&url).await, get(&url).await] {
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("etag"), format!("\"{}\"", stored.etag));
        assert_eq!(answer.header("content-length"), "10");
        assert_eq!(answer.header("x-amz-meta-sha256"), "abc");
        assert!(!answer.headers.contains_key("x-amz-version-id"));
    }
    let part = get_range(&url, 2, 4).await;
    assert_eq!((part.status, text(&part).as_str()), (206, "234"));
    assert_eq!(part.header("content-range"), "bytes 2-4/10");
    assert_eq!(get_range(&url, 10, 12).await.status, 416);
    let request = &s3.requests()[2];
    assert_eq!(request.origin, Origin::S3);
    assert_eq!(request.range, Some((2, 4)));
    assert_eq!(request.decoded_path(), "/models/m/a b.bin");
    assert_eq!(s3.bytes_sent("a b.bin"), 13);
}

#[tokio::test]
async fn a_changed_object_fails_its_precondition() {
    let s3 = s3().await;
    let stored = s3.put("models", "k", "old", PutOptions::default());
    let wanted = format!("\"{}\"", stored.etag);
    let conditional = || ask("GET", &url(&s3, "k")).header("If-Match", &wanted);
    assert_eq!(conditional().send().await.status, 200);
    s3.put("models", "k", "new", PutOptions::default());
    let answer = conditional().send().await;
    assert_eq!(answer.status, 412);
    assert_eq!(values(&answer, "Code"), ["PreconditionFailed"]);
    assert_eq!(s3.requests()[1].header("if-match"), Some(wanted.as_str()));
}

#[tokio::test]
async fn checksums_come_when_asked_for() {
    let s3 = s3().await;
    // The check values of each algorithm, in base64.
    let table = [
        (
            Checksum::Crc64Nvme,
            "x-amz-checksum-crc64nvme",
            "rosUhgp5mIg=",
        ),
        (Checksum::Crc32c, "x-amz-checksum-crc32c", "4waSgw=="),
        (Checksum::Crc32, "x-amz-checksum-crc32", "y/Q5Jg=="),
        (
            Checksum::Sha1,
            "x-amz-checksum-sha1",
            "98O8HYCOBHMq32eZZczDTKeuNEE=",
        ),
        (
            Checksum::Sha256,
            "x-amz-checksum-sha256",
            "FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU=",
        ),
    ];
    for (checksum, header, value) in table {
        s3.put("models", "k", "123456789", PutOptions::checksum(checksum));
        for method in ["HEAD", "GET"] {
            let asked = ask(method, &url(&s3, "k")).header("x-amz-checksum-mode", "ENABLED");
            let asked = asked.send().await;
            assert_eq!(asked.header(header), value, "{method} {header}");
            assert_eq!(asked.header("x-amz-checksum-type"), "FULL_OBJECT");
            let unasked = ask(method, &url(&s3, "k")).send().await;
            assert_eq!(unasked.header(header), "", "{method} {header}");
        }
    }
    let multipart = PutOptions::checksum(Checksum::Sha256).parts(3);
    let stored = s3.put("models", "k", "123456789", multipart);
    assert!(stored.etag.ends_with("-3"), "{stored:?}");
    let asked = ask("HEAD", &url(&s3, "k")).header("x-amz-checksum-mode", "ENABLED");
    let asked = asked.send().await;
    assert_eq!(asked.header("x-amz-checksum-type"), "COMPOSITE");
    assert!(
        asked.header("x-amz-checksum-sha256").ends_with("=-3"),
        "{asked:?}"
    );
}

#[tokio::test]
async fn listings_come_in_pages_with_etags() {
    let s3 = s3().await;
    let keys = ["m/a", "m/b", "m/sub/c", "m/sub/d", "n"];
    for key in keys {
        s3.put("models", key, key, PutOptions::default());
    }
    let mut found = Vec::new();
    let mut token = String::new();
    for page in 1..=2 {
        let query = format!("?list-type=2&prefix=m/&max-keys=2{token}");
        let answer = get(&url(&s3, &query)).await;
        assert_eq!(values(&answer, "ETag").len(), 2, "{}", text(&answer));
        assert_eq!(values(&answer, "Size").len(), 2);
        assert_eq!(values(&answer, "ChecksumType"), ["FULL_OBJECT"; 2]);
        found.extend(values(&answer, "Key"));
        assert_eq!(values(&answer, "IsTruncated"), [(page == 1).to_string()]);
        token = values(&answer, "NextContinuationToken")
            .first()
            .map_or_else(String::new, |next| format!("&continuation-token={next}"));
    }
    assert_eq!(found, keys[..4]);
    let answer = get(&url(&s3, "?list-type=2&prefix=m/&delimiter=/")).await;
    assert_eq!(values(&answer, "Key"), keys[..2]);
    assert_eq!(
        values(&answer, "CommonPrefixes"),
        ["<Prefix>m/sub/</Prefix>"]
    );
}

#[tokio::test]
async fn older_versions_stay_readable() {
    let s3 = s3().await;
    s3.set_versioned("models");
    let first = s3.put("models", "k", "first", PutOptions::default());
    let second = s3.put("models", "k", "second", PutOptions::default());
    s3.delete("models", "k");
    assert_eq!(get(&url(&s3, "k")).await.status, 404);
    for (stored, content) in [(first, "first"), (second, "second")] {
        let version = stored.version_id.expect("a version");
        let answer = get(&url(&s3, &format!("k?versionId={version}"))).await;
        assert_eq!(text(&answer), content);
        assert_eq!(answer.header("x-amz-version-id"), version);
    }
    let absent = get(&url(&s3, "k?versionId=absent")).await;
    assert_eq!(values(&absent, "Code"), ["NoSuchVersion"]);
    let versions = get(&url(&s3, "?versions")).await;
    assert_eq!(
        values(&versions, "VersionId").len(),
        3,
        "{}",
        text(&versions)
    );
}

#[tokio::test]
async fn only_an_open_bucket_needs_no_signature() {
    let s3 = s3().await;
    s3.put("closed", "k", "secret", PutOptions::default());
    s3.put("models", "k", "open", PutOptions::default());
    assert_eq!(get(&url(&s3, "k")).await.status, 200);
    let closed = get(&format!("{}/closed/k", s3.endpoint())).await;
    assert_eq!(
        (closed.status, values(&closed, "Code")),
        (403, vec!["AccessDenied".into()])
    );
    assert_eq!(ask("PUT", &url(&s3, "k")).send().await.status, 403);
    assert_eq!(get(&url(&s3, "absent")).await.status, 404);
}

#[tokio::test]
async fn faults_hit_objects_too() {
    let s3 = s3().await;
    s3.put_pattern(
        "models",
        "w.safetensors",
        Pattern::Noise(3),
        6_000_000,
        PutOptions::checksum(Checksum::None),
    );
    let url = url(&s3, "w.safetensors");
    let right = get(&url).await;
    assert!(right.is_whole());
    s3.fault(
        Fault::new(FaultKind::Cut {
            after_bytes: 1_000_001,
        })
        .path("w.safe"),
    );
    assert_eq!(get(&url).await.body.len(), 1_000_001);
    s3.fault(Fault::new(FaultKind::Corrupt {
        at_byte: 5_000_000,
        xor: 1,
    }));
    let part = get_range(&url, 4_999_999, 5_000_001).await.body;
    let expected = &right.body[4_999_999..=5_000_001];
    assert_eq!(part, [expected[0], expected[1] ^ 1, expected[2]]);
    s3.fault(Fault::status(503).times(2));
    assert_eq!(get(&url).await.status, 503);
    assert_eq!(head(&url).await.status, 503);
    assert!(get(&url).await.body == right.body);
    assert_eq!(s3.faults_fired(), 4);
}

#[test]
fn a_server_runs_without_a_runtime_and_serves_a_directory() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("models/sub")).unwrap();
    std::fs::write(root.path().join("models/sub/k"), "on disk").unwrap();
    let s3 = S3Server::spawn_thread(S3Config::default()).expect("start");
    assert_eq!(s3.put_directory(root.path()).unwrap(), ["models"]);
    s3.allow_anonymous("models");
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().unwrap();
    let answer = runtime.block_on(get(&url(&s3, "sub/k")));
    assert_eq!(text(&answer), "on disk");
    assert!(answer.header("etag").ends_with("-1\""), "{answer:?}");
}
