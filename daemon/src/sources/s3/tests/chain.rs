//! The AWS SDK's default chain, which reads the environment: each test runs a process of its own.

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{RawForm, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};

use super::*;

/// What the process prints before its result.
const MARK: &str = "RESULT ";

/// Is run by the other tests as a process with an environment of theirs. By itself it does nothing.
#[tokio::test]
async fn a_process_of_its_own() {
    let Ok(model) = std::env::var("WEIGHTD_TEST_MODEL") else {
        return;
    };
    let unsigned = std::env::var("WEIGHTD_TEST_UNSIGNED").into_iter();
    let config = S3Config {
        unsigned_buckets: unsigned.collect(),
        ..S3Config::default()
    };
    let (clients, model) = (
        S3Clients::new().unwrap(),
        model.parse::<ModelRef>().unwrap(),
    );
    let open = || S3Source::new(Arc::clone(&clients), config.clone(), model.clone());
    // The second fetch of a process must not ask for credentials again.
    drop(list(&open()).await);
    let source = open();
    let result = match list(&source).await {
        Ok(listing) => format!("{} files", listing.files.len()),
        Err(error) => format!("{error} | {}", error.hint().unwrap_or_default()),
    };
    let mut out = std::io::stdout();
    std::io::Write::write_all(&mut out, format!("{MARK}{result}\n").as_bytes()).unwrap();
}

/// What listing `s3://models/x` gives with only these variables set.
async fn run(s3: &S3Server, home: &Path, variables: &[(&str, &str)]) -> String {
    let mut command = tokio::process::Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "sources::s3::tests::chain::a_process_of_its_own",
            "--nocapture",
        ])
        .env_clear()
        .env("HOME", home)
        .env("WEIGHTD_TEST_MODEL", "s3://models/x")
        .env("AWS_ENDPOINT_URL_S3", s3.endpoint())
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    for (name, _) in variables.iter().filter(|(_, value)| value.is_empty()) {
        command.env_remove(name);
    }
    let output = command.output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.split_once(MARK).map(|(_, rest)| rest.lines().next());
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    line.flatten()
        .unwrap_or_else(|| panic!("{text}\n{errors}"))
        .to_owned()
}

/// STS and the container's credentials, both giving the stand-in's own keys.
#[derive(Clone)]
struct Issuer {
    access_key: String,
    secret_key: String,
    issued: Arc<AtomicUsize>,
}

async fn web_identity(
    State(issuer): State<Issuer>,
    RawForm(form): RawForm,
) -> (StatusCode, String) {
    let form = String::from_utf8_lossy(&form).into_owned();
    let asked = [
        "Action=AssumeRoleWithWebIdentity",
        "WebIdentityToken=web-token",
        "role%2Fweightd",
    ];
    if !asked.iter().all(|part| form.contains(part)) {
        let error = "<ErrorResponse><Error><Code>AccessDenied</Code>\
                     <Message>Not authorized to perform sts:AssumeRoleWithWebIdentity</Message>\
                     </Error></ErrorResponse>";
        return (StatusCode::FORBIDDEN, error.to_owned());
    }
    issuer.issued.fetch_add(1, Ordering::Relaxed);
    let Issuer {
        access_key,
        secret_key,
        ..
    } = issuer;
    let answer = format!(
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
         <AccessKeyId>{access_key}</AccessKeyId><SecretAccessKey>{secret_key}</SecretAccessKey>\
         <SessionToken>session</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>\
         </Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
    );
    (StatusCode::OK, answer)
}

async fn container(State(issuer): State<Issuer>, headers: HeaderMap) -> (StatusCode, String) {
    let token = headers
        .get("authorization")
        .and_then(|token| token.to_str().ok());
    if token != Some("pod-token") {
        return (StatusCode::UNAUTHORIZED, String::new());
    }
    issuer.issued.fetch_add(1, Ordering::Relaxed);
    let answer = serde_json::json!({
        "AccessKeyId": issuer.access_key,
        "SecretAccessKey": issuer.secret_key,
        "Token": "session",
        "Expiration": "2099-01-01T00:00:00Z",
    });
    (StatusCode::OK, answer.to_string())
}

/// An instance whose role is there only after it was asked for a few times, or that fails that often.
#[derive(Clone)]
struct Instance {
    issuer: Issuer,
    failures: Arc<AtomicUsize>,
    status: StatusCode,
}

async fn role(State(instance): State<Instance>) -> (StatusCode, String) {
    let left = |left: usize| left.checked_sub(1);
    let (relaxed, failures) = (Ordering::Relaxed, &instance.failures);
    match failures.fetch_update(relaxed, relaxed, left) {
        Ok(_) => (instance.status, String::new()),
        Err(_) => (StatusCode::OK, "weightd".to_owned()),
    }
}

async fn role_keys(State(instance): State<Instance>) -> String {
    let answer = serde_json::json!({
        "Code": "Success",
        "Type": "AWS-HMAC",
        "LastUpdated": "2020-01-01T00:00:00Z",
        "AccessKeyId": instance.issuer.access_key,
        "SecretAccessKey": instance.issuer.secret_key,
        "Token": "session",
        "Expiration": "2099-01-01T00:00:00Z",
    });
    answer.to_string()
}

async fn instance(s3: &S3Server, failures: usize, status: StatusCode) -> String {
    let issuer = Issuer {
        access_key: s3.access_key().to_owned(),
        secret_key: s3.secret_key().to_owned(),
        issued: Arc::default(),
    };
    let instance = Instance {
        issuer,
        failures: Arc::new(AtomicUsize::new(failures)),
        status,
    };
    let token = || async {
        let ttl = [("x-aws-ec2-metadata-token-ttl-seconds", "21600")];
        (ttl, "token")
    };
    let roles = "/latest/meta-data/iam/security-credentials/";
    let routes = Router::new()
        .route("/latest/api/token", axum::routing::put(token))
        .route(roles, get(role))
        .route(&format!("{roles}weightd"), get(role_keys))
        .with_state(instance);
    serve(routes).await
}

async fn serve(routes: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await });
    format!("http://{address}")
}

async fn issuer(s3: &S3Server) -> (String, Arc<AtomicUsize>) {
    let issued = Arc::default();
    let issuer = Issuer {
        access_key: s3.access_key().to_owned(),
        secret_key: s3.secret_key().to_owned(),
        issued: Arc::clone(&issued),
    };
    let routes = Router::new().route("/", post(web_identity));
    let routes = routes
        .route("/v1/credentials", get(container))
        .with_state(issuer);
    (serve(routes).await, issued)
}

#[tokio::test]
async fn keys_are_found_in_the_environment_and_the_profile() {
    let (s3, home) = (model().await, tempfile::tempdir().unwrap());
    let keys = [
        ("AWS_ACCESS_KEY_ID", s3.access_key()),
        ("AWS_SECRET_ACCESS_KEY", s3.secret_key()),
    ];
    assert_eq!(run(&s3, home.path(), &keys).await, "3 files");
    let mut unsigned = keys.to_vec();
    unsigned.push(("WEIGHTD_TEST_UNSIGNED", "models"));
    let refused = run(&s3, home.path(), &unsigned).await;
    assert!(refused.contains("unsigned requests"), "{refused}");

    let file = home.path().join("credentials");
    let (id, secret) = (s3.access_key(), s3.secret_key());
    let profile = format!("[work]\naws_access_key_id={id}\naws_secret_access_key={secret}\n");
    std::fs::write(&file, profile).unwrap();
    let named = [
        ("AWS_PROFILE", "work"),
        ("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap()),
    ];
    assert_eq!(run(&s3, home.path(), &named).await, "3 files");
}

#[tokio::test]
async fn a_profile_names_the_endpoint_of_s3() {
    let (s3, home) = (model().await, tempfile::tempdir().unwrap());
    let local = s3.endpoint().replace("127.0.0.1", "localhost");
    let (id, secret) = (s3.access_key(), s3.secret_key());
    let file = home.path().join("config");
    let profile = format!(
        "[default]\nservices=here\naws_access_key_id={id}\naws_secret_access_key={secret}\n\
         [services here]\ns3 =\n  endpoint_url = {local}\n"
    );
    std::fs::write(&file, profile).unwrap();
    let named = [
        ("AWS_CONFIG_FILE", file.to_str().unwrap()),
        ("AWS_ENDPOINT_URL_S3", ""),
    ];
    assert_eq!(run(&s3, home.path(), &named).await, "3 files");
}

#[tokio::test]
async fn a_service_accounts_web_identity_is_exchanged() {
    let (s3, home) = (model().await, tempfile::tempdir().unwrap());
    let ((issuer, issued), token) = (issuer(&s3).await, home.path().join("token"));
    let irsa = [
        ("AWS_ENDPOINT_URL_STS", issuer.as_str()),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/weightd"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap()),
    ];
    std::fs::write(&token, "web-token").unwrap();
    assert_eq!(run(&s3, home.path(), &irsa).await, "3 files");
    assert_eq!(issued.load(Ordering::Relaxed), 1);
    assert!(
        s3.requests()
            .iter()
            .all(|request| request.authorization.is_some())
    );

    std::fs::write(&token, "stolen-token").unwrap();
    let error = run(&s3, home.path(), &irsa).await;
    assert!(error.contains("sts:AssumeRoleWithWebIdentity"), "{error}");
    assert!(
        error.contains("trust policy") && !error.contains("stolen"),
        "{error}"
    );
}

#[tokio::test]
async fn a_pods_identity_is_asked_of_the_nodes_agent() {
    let (s3, home) = (model().await, tempfile::tempdir().unwrap());
    let ((issuer, issued), token) = (issuer(&s3).await, home.path().join("token"));
    std::fs::write(&token, "pod-token").unwrap();
    let address = format!("{issuer}/v1/credentials");
    let pod = [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", address.as_str()),
        (
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
            token.to_str().unwrap(),
        ),
    ];
    assert_eq!(run(&s3, home.path(), &pod).await, "3 files");
    assert_eq!(issued.load(Ordering::Relaxed), 1);
    assert!(
        s3.requests()
            .iter()
            .all(|request| request.authorization.is_some())
    );
}

#[tokio::test]
async fn without_credentials_public_buckets_can_be_read_and_others_say_what_to_do() {
    let (s3, home) = (model().await, tempfile::tempdir().unwrap());
    let closed = run(&s3, home.path(), &[]).await;
    assert!(closed.contains("no AWS credentials were found"), "{closed}");
    assert!(closed.contains("IRSA"), "{closed}");

    s3.allow_anonymous("models");
    s3.clear_requests();
    assert_eq!(run(&s3, home.path(), &[]).await, "3 files");
    assert!(
        s3.requests()
            .iter()
            .all(|request| request.authorization.is_none())
    );
    // An instance's address that takes connections and says nothing, as some networks' do.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let instance = [
        ("AWS_EC2_METADATA_DISABLED", "false"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", silent.as_str()),
    ];
    let started = Instant::now();
    assert_eq!(run(&s3, home.path(), &instance).await, "3 files");
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn an_instance_that_finds_no_role_at_first_is_asked_again() {
    // The first list of the process asks it twice, and the second list once more.
    for (failures, status) in [(1, 404), (2, 404), (0, 200)] {
        let (s3, home) = (model().await, tempfile::tempdir().unwrap());
        let instance = instance(&s3, failures, StatusCode::from_u16(status).unwrap()).await;
        let variables = [
            ("AWS_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "false"),
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", instance.as_str()),
        ];
        let result = run(&s3, home.path(), &variables).await;
        assert_eq!(result, "3 files", "after {failures} failures");
    }
}

#[tokio::test]
async fn an_instance_that_fails_is_unavailable_and_denies_nothing() {
    let (s3, home) = (model().await, tempfile::tempdir().unwrap());
    let instance = instance(&s3, 1000, StatusCode::INTERNAL_SERVER_ERROR).await;
    let variables = [
        ("AWS_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "false"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", instance.as_str()),
    ];
    let error = run(&s3, home.path(), &variables).await;
    assert!(error.contains("is unavailable"), "{error}");
}
