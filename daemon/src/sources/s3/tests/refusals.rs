//! What a user is told, and what nobody is.

use weightd_standin::{Fault, FaultKind, Times};

use super::*;

fn xml(status: u16, code: &str, message: &str) -> FaultKind {
    FaultKind::Status {
        status,
        headers: vec![("content-type".to_owned(), "application/xml".to_owned())],
        body: format!("<Error><Code>{code}</Code><Message>{message}</Message></Error>"),
    }
}

async fn refused(s3: &S3Server, config: S3Config, model: &str) -> SourceError {
    let source = S3Source::new(clients(), config, model.parse().unwrap());
    let error = list(&source).await.expect_err(model);
    let texts = format!("{error} {error:?} {source:?}");
    assert!(
        !texts.contains(s3.secret_key()) && !texts.contains("AKIA"),
        "{texts}"
    );
    error
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let s3 = model().await;
    s3.create_bucket("empty");
    for (model, words, hint) in [
        (
            "s3://absent/x",
            "bucket absent not found",
            "AWS_ENDPOINT_URL_S3",
        ),
        (
            "s3://models/y",
            "`models` holds nothing under `y/`",
            "upper and lower case",
        ),
        (
            "s3://models/x/s",
            "holds nothing under `x/s/`",
            "s3://models/x/sub",
        ),
        (
            "s3://models/x/config.json",
            "is one object",
            "s3://models/x",
        ),
        ("s3://empty", "`empty` is empty", "upload"),
    ] {
        let error = refused(&s3, config(&s3), model).await;
        assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
    }
}

#[tokio::test]
async fn a_closed_bucket_needs_credentials_and_an_open_one_none() {
    let s3 = model().await;
    let nobody = S3Config {
        identity: S3Identity::Nobody,
        ..config(&s3)
    };
    let error = refused(&s3, nobody.clone(), "s3://models/x").await;
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("s3:ListBucket"), "{error}");

    s3.allow_anonymous("models");
    s3.clear_requests();
    let named = S3Config {
        unsigned_buckets: vec!["models".to_owned()],
        ..config(&s3)
    };
    for config in [nobody, named] {
        let source = S3Source::new(clients(), config, "s3://models/x".parse().unwrap());
        let files = list(&source).await.unwrap().files;
        assert_eq!(
            bytes(&source, file(&files, "config.json"), 0..2)
                .await
                .unwrap(),
            b"{}"
        );
    }
    assert!(
        s3.requests()
            .iter()
            .all(|request| request.authorization.is_none())
    );
}

#[tokio::test]
async fn bad_keys_are_told_from_missing_rights() {
    let s3 = model().await;
    let with = |identity: S3Identity| S3Config {
        identity,
        ..config(&s3)
    };
    let secret = refused(&s3, with(keys(s3.access_key(), "wrong")), "s3://models/x").await;
    assert!(secret.to_string().contains("signature"), "{secret}");
    for (code, words) in [
        ("InvalidAccessKeyId", "does not know the access key"),
        ("ExpiredToken", "expired"),
        (
            "AccessDenied",
            "s3:ListBucket is not allowed to the keys that came with the request",
        ),
        ("RequestTimeTooSkewed", "403"),
    ] {
        s3.fault(Fault::new(xml(403, code, "No.")));
        let error = refused(&s3, config(&s3), "s3://models/x").await;
        assert!(matches!(error, SourceError::Denied { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.hint().is_some(), "{error}");
    }
}

#[tokio::test]
async fn an_object_that_may_not_be_read_names_the_right_it_needs() {
    let s3 = model().await;
    s3.fault(Fault::status(403).method("HEAD").times(Times::Forever));
    let error = refused(&s3, config(&s3), "s3://models/x").await;
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("s3:GetObject"), "{error}");
    assert!(
        error.hint().unwrap().contains("arn:aws:s3:::models/x/*"),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_server_that_sends_credentials_back_does_not_get_them_shown() {
    let s3 = model().await;
    for message in [
        "Credential=AKIASTANDIN/2026, Signature=0123abcd",
        "no key AKIASTANDIN here",
        "X-Amz-Security-Token: stand-in-secret",
        "the secret is stand-in-secret.",
    ] {
        s3.fault(Fault::new(xml(403, "AccessDenied", message)));
        refused(&s3, config(&s3), "s3://models/x").await;
    }
    let shown = format!("{:?} {:?}", config(&s3), clients());
    assert!(
        !shown.contains("stand-in-secret") && !shown.contains("AKIA"),
        "{shown}"
    );
}

#[tokio::test]
async fn a_bucket_in_another_region_is_asked_there() {
    let s3 = model().await;
    let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    s3.fault(Fault::new(FaultKind::Status {
        status: 301,
        headers: vec![header("x-amz-bucket-region", "eu-west-1")],
        body: "<Error><Code>PermanentRedirect</Code></Error>".to_owned(),
    }));
    assert_eq!(listed(&s3, "s3://models/x").await.unwrap().len(), 3);
    let malformed = "<Error><Code>AuthorizationHeaderMalformed</Code>\
                     <Region>eu-west-2</Region></Error>";
    s3.fault(Fault::new(FaultKind::Status {
        status: 400,
        headers: Vec::new(),
        body: malformed.to_owned(),
    }));
    assert_eq!(listed(&s3, "s3://models/x").await.unwrap().len(), 3);

    let signed = |region: &str| {
        let scope = format!("/{region}/s3/");
        let requests = s3.requests();
        let signed = requests.iter().filter(|request| {
            let header = request.authorization.as_deref().unwrap_or_default();
            header.contains(&scope)
        });
        signed.count()
    };
    assert_eq!(
        (
            signed("us-east-1"),
            signed("eu-west-1"),
            signed("eu-west-2")
        ),
        (2, 5, 5)
    );
}

#[tokio::test]
async fn a_region_that_cannot_be_found_is_asked_for() {
    let s3 = model().await;
    let error = xml(301, "PermanentRedirect", "Use the other endpoint.");
    s3.fault(Fault::new(error).times(Times::Forever));
    let error = refused(&s3, config(&s3), "s3://models/x").await;
    assert!(
        error.to_string().contains("another region than us-east-1"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("AWS_REGION"), "{error:?}");
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_or_used_is_named() {
    let s3 = model().await;
    let at = |endpoint: &str| S3Config {
        endpoint: Some(endpoint.parse().unwrap()),
        ..config(&s3)
    };
    let closed = refused(&s3, at("http://127.0.0.1:1"), "s3://models/x").await;
    assert!(
        matches!(closed, SourceError::Unavailable { .. }),
        "{closed}"
    );
    assert!(
        closed
            .to_string()
            .contains("127.0.0.1:1: connection refused"),
        "{closed}"
    );
    for endpoint in ["http://user:password@127.0.0.1:1", "ftp://127.0.0.1"] {
        let error = refused(&s3, at(endpoint), "s3://models/x").await;
        assert!(matches!(error, SourceError::Invalid { .. }), "{error}");
        assert!(!error.to_string().contains("password@"), "{error}");
    }
}

#[tokio::test]
async fn an_answer_that_is_no_xml_is_understood_by_its_status() {
    let s3 = model().await;
    let html = |status: u16| FaultKind::Status {
        status,
        headers: Vec::new(),
        body: "<html><body>Bad gateway<br>".to_owned(),
    };
    s3.fault(Fault::new(html(502)).times(3));
    let error = refused(&s3, config(&s3), "s3://models/x").await;
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    s3.clear_faults();
    s3.fault(Fault::new(html(403)));
    let error = refused(&s3, config(&s3), "s3://models/x").await;
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
}

#[tokio::test]
async fn localhost_is_addressed_by_path() {
    let s3 = model().await;
    let local = s3.endpoint().replace("127.0.0.1", "localhost");
    let config = S3Config {
        endpoint: Some(local.parse().unwrap()),
        ..config(&s3)
    };
    let source = S3Source::new(clients(), config, "s3://models/x".parse().unwrap());
    assert_eq!(list(&source).await.unwrap().files.len(), 3);
}

#[test]
fn what_looks_like_a_key_is_not_shown_and_what_does_not_is() {
    // Keys of the AWS documentation's examples, and one of the session's form.
    for key in [
        "ASIAIOSFODNN7EXAMPLE",
        "`wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY`",
        &"ab12".repeat(16),
    ] {
        let shown = failure::printable(&format!("no\u{1b} {key}\nhere"));
        assert_eq!(shown, "no *** here");
    }
    let user = "User: arn:aws:sts::123456789012:assumed-role/weightd/i-0123456789abcdef0 is not \
                authorized to perform: s3:ListBucket";
    assert_eq!(failure::printable(user), user);
}
