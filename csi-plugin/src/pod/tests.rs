//! The client against a small API server on loopback, which answers by a script.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::error::Error as StdError;
use std::fs;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;

use super::*;

const TOKEN: &str = "very-secret-token";

/// A certificate authority that signed nothing, in base64 as kubeconfigs have it.
const AUTHORITY: &str = "\
LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUJjVENDQVJlZ0F3SUJBZ0lVVjNWYUh3akMxdjJKMWY4K1ZhSzBhc3RSQ0VF\
d0NnWUlLb1pJemowRUF3SXcKRFRFTE1Ba0dBMVVFQXd3Q1kyRXdJQmNOTWpZeE1USXhNRGN5T0RJM1doZ1BNakV5TmpFd01qZ3dO\
ekk0TWpkYQpNQTB4Q3pBSkJnTlZCQU1NQW1OaE1Ga3dFd1lIS29aSXpqMENBUVlJS29aSXpqMERBUWNEUWdBRU1hRC94NjU3Cmgr\
QXJ2b3JVSDdtU3Mxa3d4Y25pTWhab2VQY3JIL0NRK3pzOWxlWDA5SVV4WERtU1V6dXJRLzFnVk8vbHE3OWgKSTF5ZHMyOWhpNURm\
ZktOVE1GRXdIUVlEVlIwT0JCWUVGTHduUEw1R0Z0VzJoOWdua1I5aW5vV1ltVUVaTUI4RwpBMVVkSXdRWU1CYUFGTHduUEw1R0Z0\
VzJoOWdua1I5aW5vV1ltVUVaTUE4R0ExVWRFd0VCL3dRRk1BTUJBZjh3CkNnWUlLb1pJemowRUF3SURTQUF3UlFJZ2U2Y2VHU3Nz\
NTJMbW1LdnRFZkhwU2FtT3M4N0I2Qko5Y01WMldCVDcKMEw0Q0lRQ0F2NHcrV053MFVxdU9ick5tcVBRR1dQQjdrSWxmRzdlazMy\
cUs0L2ErblE9PQotLS0tLUVORCBDRVJUSUZJQ0FURS0tLS0tCg==";

const SHORT: Limits = Limits {
    timeouts: Timeouts {
        connect: Duration::from_millis(600),
        call: Duration::from_millis(600),
        idle: Duration::from_millis(700),
    },
    watch_s: 1,
    pause: Duration::from_millis(5),
};

/// More than anything here takes that does not hang.
const SOON: Duration = Duration::from_secs(5);

enum Answer {
    Json(u16, Value),
    Plain(u16, String),
    /// Events, then nothing more.
    Watch(Vec<Value>),
    /// Events, then a broken connection.
    Broken(Vec<Value>),
    Silence,
}

/// An API server that gives one answer after the other, then none.
struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
}

#[derive(Debug, Clone)]
struct Asked {
    path: String,
    query: String,
    token: Option<String>,
    accept: String,
}

impl Server {
    async fn start(script: impl IntoIterator<Item = Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let script = Arc::new(Mutex::new(script.into_iter().collect::<VecDeque<_>>()));
        let router = Router::new().fallback(move |request: Request| {
            seen.lock().unwrap().push(Asked::new(&request));
            let answer = script.lock().unwrap().pop_front();
            respond(answer.unwrap_or(Answer::Silence))
        });
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, asked }
    }

    async fn pods(&self) -> Pods {
        connect(&kubeconfig(&format!("http://{}", self.address)), SHORT).await
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl Asked {
    fn new(request: &Request) -> Self {
        let header = |name| {
            let value = request.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        Self {
            path: request.uri().path().to_owned(),
            query: request.uri().query().unwrap_or_default().to_owned(),
            token: header("authorization"),
            accept: header("accept").unwrap_or_default(),
        }
    }
}

async fn respond(answer: Answer) -> Response {
    let (code, body) = match answer {
        Answer::Json(code, value) => (code, Body::from(value.to_string())),
        Answer::Plain(code, text) => (code, Body::from(text)),
        Answer::Watch(events) => {
            let lines = tokio_stream::iter(lines(events)).chain(tokio_stream::pending());
            (200, Body::from_stream(lines.map(Ok::<_, Infallible>)))
        }
        Answer::Broken(events) => {
            let cut = Err(io::Error::other("cut"));
            let lines = lines(events).into_iter().map(Ok).chain([cut]);
            (200, Body::from_stream(tokio_stream::iter(lines)))
        }
        Answer::Silence => pending().await,
    };
    Response::builder().status(code).body(body).unwrap()
}

fn lines(events: Vec<Value>) -> Vec<String> {
    events
        .into_iter()
        .map(|event| format!("{event}\n"))
        .collect()
}

fn kubeconfig(server: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let file = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "here", "cluster": {
            "server": server, "certificate-authority-data": AUTHORITY,
        } }],
        "users": [{ "name": "plugin", "user": { "token": TOKEN } }],
        "contexts": [{ "name": "it", "context": { "cluster": "here", "user": "plugin" } }],
        "current-context": "it",
    });
    fs::write(directory.path().join("config"), file.to_string()).unwrap();
    directory
}

async fn connect(directory: &TempDir, limits: Limits) -> Pods {
    let path = directory.path().join("config");
    let pods = Pods::open(Some(&path), limits).await;
    pods.expect("connect").expect("a kubeconfig is a cluster")
}

fn name() -> PodName {
    PodName {
        namespace: "team".to_owned(),
        name: "model-0".to_owned(),
        uid: "u1".to_owned(),
    }
}

fn pod(uid: &str) -> Value {
    json!({ "metadata": {
        "namespace": "team", "name": "model-0", "uid": uid, "resourceVersion": "7",
        "annotations": { "weightd.io/model": "hf://org/model" },
    } })
}

fn terminating(uid: &str) -> Value {
    let mut pod = pod(uid);
    pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    pod
}

fn list(items: &[Value], next: &str) -> Answer {
    let metadata = json!({ "resourceVersion": "6", "continue": next });
    let kind = "PartialObjectMetadataList";
    Answer::Json(
        200,
        json!({ "kind": kind, "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "items": items }),
    )
}

fn event(kind: &str, object: Value) -> Value {
    json!({ "type": kind, "object": object })
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

/// All that a caller could print of `error`, which must be without the token.
fn text(error: &(dyn StdError + 'static), hint: Option<String>) -> String {
    let hint = hint.unwrap_or_default();
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    let text = format!("{error}: {cause}\nhint: {hint}");
    assert!(!format!("{text}\n{error:?}").contains(TOKEN), "{text}");
    text
}

/// What is said when the API server gives `answer`.
async fn refusal(answer: Answer) -> (PodError, String) {
    let server = Server::start([answer]).await;
    refusal_of(&server.pods().await).await
}

async fn refusal_of(pods: &Pods) -> (PodError, String) {
    let start = Instant::now();
    let error = pods.annotations(&name()).await.expect_err("got some");
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    let text = text(&error, error.hint());
    (error, text)
}

/// Waits for the deletion of the pod `u1`, against a server with this script. `None` if it is not seen in time.
async fn deletion(script: impl IntoIterator<Item = Answer>, at_most: Duration) -> Option<Server> {
    let server = Server::start(script).await;
    let pods = server.pods().await;
    let seen = timeout(at_most, pods.being_deleted(&name())).await;
    seen.is_ok().then_some(server)
}

#[tokio::test]
async fn annotations_are_those_of_the_pod_with_that_uid() {
    let server = Server::start([Answer::Json(200, pod("u1"))]).await;

    let annotations = server.pods().await.annotations(&name()).await.expect("get");

    assert_eq!(annotations["weightd.io/model"], "hf://org/model");
    let asked = &server.asked()[0];
    assert_eq!(asked.path, "/api/v1/namespaces/team/pods/model-0");
    assert_eq!(asked.token, Some(format!("Bearer {TOKEN}")));
    assert!(asked.accept.contains("PartialObjectMetadata"), "{asked:?}");
}

#[tokio::test]
async fn a_pod_without_annotations_has_none() {
    let bare = json!({ "metadata": { "name": "model-0", "uid": "u1" } });
    let server = Server::start([Answer::Json(200, bare)]).await;

    let annotations = server.pods().await.annotations(&name()).await.expect("get");

    assert!(annotations.is_empty(), "{annotations:?}");
}

#[tokio::test]
async fn a_static_pod_has_the_uid_that_its_mirror_notes() {
    let mut mirror = pod("of-the-mirror");
    mirror["metadata"]["annotations"][CONFIG_HASH] = json!("u1");
    let server = Server::start([Answer::Json(200, mirror)]).await;

    let annotations = server.pods().await.annotations(&name()).await.expect("get");

    assert_eq!(annotations["weightd.io/model"], "hf://org/model");
}

#[tokio::test]
async fn another_pod_of_that_name_or_none_means_gone() {
    let message = "pods \"model-0\" not found";
    let none = Answer::Json(404, status(404, NOT_FOUND, message));
    for answer in [Answer::Json(200, pod("u2")), none] {
        let (error, text) = refusal(answer).await;

        assert!(matches!(error, PodError::Gone { .. }), "{error:?}");
        assert!(text.contains("`team/model-0` with uid u1"), "{text}");
    }
}

#[tokio::test]
async fn denied_names_the_verb_and_rbac() {
    let message = "pods \"model-0\" is forbidden: User \"weightd\" cannot get resource \"pods\"";

    let (error, text) = refusal(Answer::Json(403, status(403, "Forbidden", message))).await;

    assert!(
        matches!(error, PodError::Denied { code: 403, .. }),
        "{error:?}"
    );
    assert!(
        text.contains("does not let the plugin get pod `team/model-0`"),
        "{text}"
    );
    assert!(
        text.contains("RBAC lacks `get` on pods") && text.contains("get, list and watch"),
        "{text}"
    );
    assert_eq!(text.matches("is forbidden").count(), 1, "{text}");
}

#[tokio::test]
async fn unknown_credentials_are_denied_with_another_remedy() {
    let (error, text) = refusal(Answer::Json(
        401,
        status(401, "Unauthorized", "Unauthorized"),
    ))
    .await;

    assert!(
        matches!(error, PodError::Denied { code: 401, .. }),
        "{error:?}"
    );
    assert!(
        text.contains("token") && !text.contains("ClusterRole"),
        "{text}"
    );
}

#[tokio::test]
async fn what_a_retry_may_mend_is_unavailable() {
    for (answer, cause) in [
        (
            Answer::Json(500, status(500, "InternalError", "etcd lost")),
            "etcd lost (500 Inter",
        ),
        (Answer::Plain(429, "too many".to_owned()), "429 Too Many"),
        (Answer::Plain(503, format!("Bearer {TOKEN}")), "503 Service"),
        (Answer::Plain(404, "404 page not found".to_owned()), "404"),
        (Answer::Plain(200, "<html>".to_owned()), "deserializing"),
        (Answer::Silence, "no answer within 600ms"),
    ] {
        let (error, text) = refusal(answer).await;

        assert!(matches!(error, PodError::Unavailable { .. }), "{error:?}");
        assert!(text.contains("cannot get pod `team/model-0`: "), "{text}");
        assert_eq!(text.matches(cause).count(), 1, "{text}");
        assert!(text.contains("tried again"), "{text}");
    }
}

#[tokio::test]
async fn a_server_that_is_away_or_speaks_no_tls_is_unavailable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let away = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let server = Server::start([]).await;
    let no_tls = format!("https://{}", server.address);
    for (url, cause) in [(away, "Connection refused"), (no_tls, "corrupt message")] {
        let pods = connect(&kubeconfig(&url), SHORT).await;

        let (error, text) = refusal_of(&pods).await;

        assert!(matches!(error, PodError::Unavailable { .. }), "{error:?}");
        assert_eq!(text.matches(cause).count(), 1, "{text}");
    }
}

#[tokio::test]
async fn being_deleted_sees_the_mark_and_the_end() {
    for last in [
        event("MODIFIED", terminating("u1")),
        event("DELETED", pod("u1")),
        event("ADDED", pod("u2")),
    ] {
        let watch = Answer::Watch(vec![event("MODIFIED", pod("u1")), last]);

        let server = deletion([list(&[pod("u1")], ""), watch], SOON).await;

        let asked = server.expect("not seen").asked();
        assert_eq!(asked.len(), 2, "{asked:?}");
        assert_eq!(asked[1].path, "/api/v1/namespaces/team/pods");
        for part in ["watch=true", "metadata.name%3Dmodel-0", "resourceVersion=6"] {
            assert!(asked[1].query.contains(part), "{asked:?}");
        }
    }
}

#[tokio::test]
async fn being_deleted_sees_what_happened_before() {
    for items in [vec![], vec![terminating("u1")], vec![pod("u2")]] {
        let server = deletion([list(&items, "")], SOON).await;

        assert!(server.is_some(), "not seen: {items:?}");
    }
}

#[tokio::test]
async fn being_deleted_survives_what_breaks_it() {
    let forbidden = || status(403, "Forbidden", "pods is forbidden");
    let expired = event("ERROR", status(410, "Expired", "too old resource version"));
    let script = [
        Answer::Json(403, forbidden()),
        Answer::Plain(500, "panic".to_owned()),
        Answer::Silence,
        list(&[pod("u1")], ""),
        Answer::Json(403, forbidden()),
        Answer::Broken(vec![event("MODIFIED", pod("u1"))]),
        Answer::Watch(vec![expired]),
        list(&[pod("u1")], ""),
        Answer::Broken(vec![]),
        Answer::Watch(vec![event("DELETED", pod("u1"))]),
    ];
    let requests = script.len();

    let server = deletion(script, SOON).await;

    let asked = server.expect("not seen").asked();
    assert_eq!(asked.len(), requests, "{asked:?}");
}

#[tokio::test]
async fn being_deleted_waits_as_long_as_the_pod_lives() {
    for script in [
        vec![list(&[pod("u1")], "")],
        vec![Answer::Json(404, status(404, NOT_FOUND, "not found"))],
    ] {
        let seen = deletion(script, Duration::from_millis(300)).await;

        assert!(seen.is_none(), "a living pod was lost");
    }
}

#[tokio::test]
async fn uids_on_a_node_come_from_all_pages_and_from_static_pods() {
    let mut mirror = pod("of-the-mirror");
    mirror["metadata"]["annotations"][CONFIG_HASH] = json!("of-the-file");
    let server = Server::start([
        list(&[pod("u1"), mirror], "more"),
        list(&[terminating("u2")], ""),
    ])
    .await;

    let uids = server.pods().await.uids_on("node-a").await.expect("list");

    let expected = ["u1", "u2", "of-the-mirror", "of-the-file"];
    assert_eq!(uids, expected.map(str::to_owned).into());
    let asked = server.asked();
    assert_eq!(asked[0].path, "/api/v1/pods");
    for part in ["fieldSelector=spec.nodeName%3Dnode-a", "limit=500"] {
        assert!(asked[0].query.contains(part), "{asked:?}");
    }
    assert!(asked[1].query.contains("continue=more"), "{asked:?}");
}

#[tokio::test]
async fn a_missing_page_is_an_error_and_never_fewer_uids() {
    let forbidden = || status(403, "Forbidden", "pods is forbidden");
    let no_list = Answer::Json(200, json!({ "metadata": {}, "items": [] }));
    let no_kind = Answer::Json(200, json!({}));
    for last in [
        Answer::Json(403, forbidden()),
        Answer::Silence,
        no_list,
        no_kind,
    ] {
        let server = Server::start([list(&[pod("u1")], "more"), last]).await;

        let error = server.pods().await.uids_on("node-a").await;

        let error = error.expect_err("half an answer");
        let text = text(&error, error.hint());
        assert!(text.contains("list the pods of node `node-a`"), "{text}");
    }
}

#[tokio::test]
async fn outside_a_cluster_there_are_no_pods() {
    let pods = Pods::open(None, SHORT).await.expect("open");

    assert!(pods.is_none());
}

#[tokio::test]
async fn an_unusable_kubeconfig_is_named_without_its_secrets() {
    let broken = format!("users:\n- name: plugin\n  user:\n    token: {TOKEN}\n   exec: [\n");
    let mistyped = format!("kind: Config\nusers: {TOKEN}\n");
    let command = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "interactiveMode": "Never",
        "args": ["-c", format!("echo {TOKEN}; exit 3")],
    });
    let failing = json!({
        "clusters": [{ "name": "a", "cluster": { "server": "http://127.0.0.1:1" } }],
        "users": [{ "name": "a", "user": { "exec": command } }],
        "contexts": [{ "name": "a", "context": { "cluster": "a", "user": "a" } }],
        "current-context": "a",
    });
    let odd = failing.to_string().replace("exit 3", "exit 0");
    let failing = failing.to_string();
    for (content, cause) in [
        (Some(broken), "from line 5"),
        (Some(mistyped), "from line 2"),
        (Some("kind: Config\n".to_owned()), "context"),
        (Some(failing), "failed: exit status: 3"),
        (Some(odd), "printed none"),
        (None, "No such file"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }

        let error = match Pods::open(Some(&path), SHORT).await {
            Ok(_) => panic!("connected, expected: {cause}"),
            Err(error) => error,
        };

        let text = text(&error, error.hint());
        assert!(text.starts_with("cannot use the kubeconfig `"), "{text}");
        assert_eq!(text.matches(cause).count(), 1, "{text}");
        assert_eq!(text.matches("/config").count(), 1, "{text}");
    }
}

#[test]
fn a_volumes_own_annotation_goes_before_the_pods() {
    let annotations = |pairs: &[(&str, &str)]| {
        let owned = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        owned.collect::<BTreeMap<_, _>>()
    };
    let (own, pods) = ("weightd.io/volume.weights", "weightd.io/model");
    for (pairs, expected) in [
        (&[(own, "a"), (pods, "b")][..], Some((own, "a"))),
        (&[(own, " "), (pods, "b")], Some((pods, "b"))),
        (
            &[("weightd.io/volume.other", "a"), (pods, "b")],
            Some((pods, "b")),
        ),
        (&[(own, " a\n")], Some((own, "a"))),
        (&[(pods, "\t")], None),
        (&[], None),
    ] {
        let annotations = annotations(pairs);

        let chosen = model_annotation(&annotations, "weights");

        let chosen = chosen
            .as_ref()
            .map(|it| (it.key.as_str(), it.model.as_str()));
        assert_eq!(chosen, expected, "{pairs:?}");
    }
}
