//! A stand-in API server: the pods of a cluster, of which it tells no more than their metadata, and their Events.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs;
use std::future::pending;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Query, Request};
use axum::response::Response;
use futures::{Stream, StreamExt, stream};
use serde_json::{Value, json};
use tokio::net::TcpSocket;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use crate::ledger::{Ledger, Line, Place};

/// Whoever shows it is the plugin.
pub(crate) const TOKEN: &str = "token-of-the-plugins-service-account";

/// A pod in the namespace `team-a`, on the node `node-1`.
#[derive(Clone, PartialEq)]
pub(crate) struct Pod {
    metadata: Value,
    node: String,
}

impl Pod {
    pub(crate) fn new(name: &str, uid: &str) -> Self {
        let metadata = json!({ "namespace": "team-a", "name": name, "uid": uid });
        Self {
            metadata,
            node: "node-1".to_owned(),
        }
    }

    pub(crate) fn annotated(mut self, key: &str, value: &str) -> Self {
        self.metadata["annotations"][key] = json!(value);
        self
    }

    pub(crate) fn on(mut self, node: &str) -> Self {
        node.clone_into(&mut self.node);
        self
    }

    fn field(&self, key: &str) -> &str {
        self.metadata[key].as_str().unwrap_or_default()
    }

    fn is_at(&self, namespace: &str, name: &str) -> bool {
        self.field("namespace") == namespace && self.field("name") == name
    }

    /// The only form in which it leaves the server.
    fn shown(&self) -> Value {
        json!({
            "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": self.metadata,
        })
    }
}

/// How the server meets whoever asks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mood {
    /// As it should.
    Well,
    /// With no answer, while the connection stays open.
    Silent,
    /// With 503.
    Busy,
    /// With 403: the plugin's role lacks the right.
    Forbids,
    /// With 401: the token is none of its own.
    Forgot,
}

struct Change {
    version: u64,
    kind: &'static str,
    pod: Pod,
}

struct State {
    pods: Vec<Pod>,
    changes: Vec<Change>,
    asked: Vec<String>,
    mood: Mood,
    ledger: Ledger,
    /// For writes of Events.
    ledger_mood: Mood,
}

struct Cluster {
    state: Mutex<State>,
    /// The newest `resourceVersion`.
    version: watch::Sender<u64>,
}

impl Cluster {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    /// Notes what became of `pod`, whose metadata then has that version.
    fn note(&self, state: &mut State, kind: &'static str, pod: &mut Pod) {
        let version = *self.version.borrow() + 1;
        pod.metadata["resourceVersion"] = json!(version.to_string());
        let pod = pod.clone();
        state.changes.push(Change { version, kind, pod });
        self.version.send_replace(version);
    }
}

pub(crate) struct Api {
    cluster: Arc<Cluster>,
    address: SocketAddr,
    /// While the server is away, nobody else gets its port, and a connection is refused.
    _port: TcpSocket,
    serving: Mutex<Option<Runtime>>,
}

fn socket(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("a socket's option");
    socket.bind(address).expect("a port");
    socket
}

impl Api {
    /// A server without pods, which answers.
    pub(crate) fn new() -> Self {
        let port = socket(SocketAddr::from(([127, 0, 0, 1], 0)));
        let state = State {
            pods: Vec::new(),
            changes: Vec::new(),
            asked: Vec::new(),
            mood: Mood::Well,
            ledger: Ledger::default(),
            ledger_mood: Mood::Well,
        };
        let api = Self {
            cluster: Arc::new(Cluster {
                state: Mutex::new(state),
                version: watch::Sender::new(1),
            }),
            address: port.local_addr().expect("an address"),
            _port: port,
            serving: Mutex::new(None),
        };
        api.start();
        api
    }

    pub(crate) fn start(&self) {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        let runtime = runtime.expect("a runtime");
        let listener = {
            let _inside = runtime.enter();
            socket(self.address).listen(64).expect("it listens")
        };
        let cluster = Arc::clone(&self.cluster);
        let router = Router::new().fallback(move |request| answer(Arc::clone(&cluster), request));
        runtime.spawn(async move { axum::serve(listener, router).await });
        *self.serving() = Some(runtime);
    }

    /// Closes all connections, and refuses new ones.
    pub(crate) fn stop(&self) {
        if let Some(runtime) = self.serving().take() {
            // Where async code runs, no runtime can be dropped.
            let dropped = thread::spawn(move || drop(runtime)).join();
            dropped.expect("its tasks end");
        }
    }

    fn serving(&self) -> MutexGuard<'_, Option<Runtime>> {
        self.serving.lock().expect("nobody panics with it")
    }

    /// Writes what the plugin needs in order to come here.
    pub(crate) fn write_kubeconfig(&self, path: &Path) {
        let server = format!("http://{}", self.address);
        let file = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "here", "cluster": { "server": server } }],
            "users": [{ "name": "plugin", "user": { "token": TOKEN } }],
            "contexts": [{ "name": "it", "context": { "cluster": "here", "user": "plugin" } }],
            "current-context": "it",
        });
        fs::write(path, file.to_string()).expect("a kubeconfig");
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.cluster.state().mood = mood;
    }

    /// How it meets whoever writes an Event.
    pub(crate) fn set_for_events(&self, mood: Mood) {
        self.cluster.state().ledger_mood = mood;
    }

    /// The Events of a pod as `kubectl describe pod` shows them.
    pub(crate) fn events(&self, pod: &str, uid: &str) -> Vec<Line> {
        self.cluster.state().ledger.of(pod, uid)
    }

    /// How often somebody tried to write an Event.
    pub(crate) fn event_writes(&self) -> usize {
        self.cluster.state().ledger.writes()
    }

    /// All Events are too old.
    pub(crate) fn forget_events(&self) {
        self.cluster.state().ledger.forget();
    }

    /// Adds a pod. One that had the name is gone.
    pub(crate) fn put(&self, mut pod: Pod) {
        self.remove(pod.field("name"));
        let mut state = self.cluster.state();
        self.cluster.note(&mut state, "ADDED", &mut pod);
        state.pods.push(pod);
    }

    /// Begins the deletion of a pod, as `kubectl delete` does.
    pub(crate) fn terminate(&self, name: &str) {
        let mut pod = self.take(name).expect("there is that pod");
        pod.metadata["deletionTimestamp"] = json!("2026-01-01T00:00:30Z");
        pod.metadata["deletionGracePeriodSeconds"] = json!(30);
        let mut state = self.cluster.state();
        self.cluster.note(&mut state, "MODIFIED", &mut pod);
        state.pods.push(pod);
    }

    /// Ends the deletion of a pod, or forces it, as `kubectl delete --force` does.
    pub(crate) fn remove(&self, name: &str) {
        if let Some(mut pod) = self.take(name) {
            let mut state = self.cluster.state();
            self.cluster.note(&mut state, "DELETED", &mut pod);
        }
    }

    fn take(&self, name: &str) -> Option<Pod> {
        let mut state = self.cluster.state();
        let at = state.pods.iter().position(|pod| pod.field("name") == name);
        at.map(|at| state.pods.remove(at))
    }

    /// How often it was asked `question`, whatever the answer: `get team-a/web`, `watch metadata.name=web` or
    /// `list spec.nodeName=node-1`.
    pub(crate) fn asked(&self, question: &str) -> usize {
        let asked = &self.cluster.state().asked;
        asked.iter().filter(|one| *one == question).count()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Question {
    verb: &'static str,
    namespace: Option<String>,
    name: Option<String>,
    /// The field selector's key and value.
    field: Option<(String, String)>,
    version: Option<u64>,
    timeout: Duration,
}

impl Question {
    fn parse(request: &Request) -> Option<Self> {
        let path = request.uri().path().strip_prefix("/api/v1/")?;
        let parts: Vec<&str> = path.split('/').collect();
        let (namespace, name) = match parts.as_slice() {
            ["pods"] => (None, None),
            ["namespaces", namespace, "pods"] => (Some(*namespace), None),
            ["namespaces", namespace, "pods", name] => (Some(*namespace), Some(*name)),
            _ => return None,
        };
        let query: Query<HashMap<String, String>> = Query::try_from_uri(request.uri()).ok()?;
        let watches = query.get("watch").is_some_and(|watch| watch == "true");
        let field = query.get("fieldSelector").and_then(|selector| {
            let (key, value) = selector.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        });
        let number = |key| query.get(key).and_then(|text| text.parse().ok());
        Some(Self {
            verb: match name {
                Some(_) => "get",
                None if watches => "watch",
                None => "list",
            },
            namespace: namespace.map(str::to_owned),
            name: name.map(str::to_owned),
            field,
            version: number("resourceVersion"),
            timeout: Duration::from_secs(number("timeoutSeconds").unwrap_or(1800)),
        })
    }

    fn text(&self) -> String {
        let verb = self.verb;
        match (&self.namespace, &self.name, &self.field) {
            (Some(namespace), Some(name), _) => format!("{verb} {namespace}/{name}"),
            (_, _, Some((key, value))) => format!("{verb} {key}={value}"),
            _ => format!("{verb} pods"),
        }
    }

    fn selects(&self, pod: &Pod) -> bool {
        let here = self.namespace.as_deref();
        let field = self.field.as_ref();
        here.is_none_or(|namespace| namespace == pod.field("namespace"))
            && field.is_none_or(|(key, value)| match key.as_str() {
                "metadata.name" => value == pod.field("name"),
                "spec.nodeName" => *value == pod.node,
                _ => panic!("a field that the stand-in does not know: {key}"),
            })
    }
}

async fn answer(cluster: Arc<Cluster>, request: Request) -> Response {
    if let Some(place) = Place::parse(request.uri().path()) {
        return write_event(&cluster, &place, request).await;
    }
    let answer = answer_if_any(&cluster, &request);
    drop(request);
    match answer {
        Some(answer) => answer,
        None => pending().await,
    }
}

async fn write_event(cluster: &Arc<Cluster>, place: &Place, request: Request) -> Response {
    let body = to_bytes(request.into_body(), 1 << 20)
        .await
        .expect("a body");
    let body: Value = serde_json::from_slice(&body).expect("JSON");
    let mood = {
        let mut state = cluster.state();
        state.ledger.asked(place);
        match state.ledger_mood {
            Mood::Well => return state.ledger.write(place, &body),
            mood => mood,
        }
    };
    match mood {
        Mood::Forbids => {
            let (group, verb) = place.right();
            let text = format!(
                "events is forbidden: User \"system:serviceaccount:weightd:weightd-node\" cannot {verb} resource \
                 \"events\" in API group \"{group}\" in the namespace \"team-a\""
            );
            status(403, "Forbidden", &text)
        }
        Mood::Silent => pending().await,
        _ => status(503, "ServiceUnavailable", "the server is starting"),
    }
}

fn answer_if_any(cluster: &Arc<Cluster>, request: &Request) -> Option<Response> {
    let Some(question) = Question::parse(request) else {
        return Some(respond(404, "404 page not found"));
    };
    let header = |name| {
        let value = request.headers().get(name);
        value.and_then(|value| value.to_str().ok())
    };
    let known = header("authorization") == Some(&format!("Bearer {TOKEN}"));
    // Without it the server would send whole pods, with the secrets that stand in their environment.
    let form = header("accept").unwrap_or_default();
    let bare = form.contains("as=PartialObjectMetadata") && form.contains("g=meta.k8s.io;v=v1");
    let mut state = cluster.state();
    state.asked.push(question.text());
    let mood = state.mood;
    Some(match mood {
        Mood::Silent => return None,
        Mood::Busy => status(503, "ServiceUnavailable", "the server is starting"),
        _ if !known || mood == Mood::Forgot => status(401, "Unauthorized", "Unauthorized"),
        Mood::Forbids => forbidden(&question),
        _ if !bare => status(406, "NotAcceptable", "the stand-in has only metadata"),
        _ => match (question.verb, question.version) {
            ("get", _) => get(&state, &question),
            ("list", _) => list(&state, *cluster.version.borrow(), &question),
            (_, Some(after)) => {
                let timeout = tokio::time::sleep(question.timeout);
                let lines = changes(Arc::clone(cluster), question, after).take_until(timeout);
                respond(200, Body::from_stream(lines))
            }
            (_, None) => status(400, "BadRequest", "the stand-in watches from a version on"),
        },
    })
}

fn forbidden(question: &Question) -> Response {
    let text = format!(
        "pods is forbidden: User \"system:serviceaccount:weightd:weightd-csi\" cannot {} resource \"pods\" in API \
         group \"\"",
        question.verb
    );
    status(403, "Forbidden", &text)
}

fn get(state: &State, question: &Question) -> Response {
    let (namespace, name) = (question.namespace.as_deref(), question.name.as_deref());
    let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
    match state.pods.iter().find(|pod| pod.is_at(namespace, name)) {
        Some(pod) => respond(200, pod.shown().to_string()),
        None => status(404, "NotFound", &format!("pods \"{name}\" not found")),
    }
}

fn list(state: &State, version: u64, question: &Question) -> Response {
    let found = state.pods.iter().filter(|pod| question.selects(pod));
    let items: Vec<Value> = found.map(Pod::shown).collect();
    let list = json!({
        "kind": "PartialObjectMetadataList",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": { "resourceVersion": version.to_string() },
        "items": items,
    });
    respond(200, list.to_string())
}

/// What happened after a version to the pods that are asked for, and what happens from now on.
fn changes(
    cluster: Arc<Cluster>,
    question: Question,
    after: u64,
) -> impl Stream<Item = Result<String, Infallible>> {
    let newest = cluster.version.subscribe();
    stream::unfold((newest, after), move |(mut newest, after)| {
        let next = {
            let state = cluster.state();
            let mut later = state.changes.iter().filter(|one| one.version > after);
            let found = later.find(|one| question.selects(&one.pod));
            found.map(|one| {
                let event = json!({ "type": one.kind, "object": one.pod.shown() });
                (one.version, format!("{event}\n"))
            })
        };
        async move {
            match next {
                Some((version, line)) => Some((Some(Ok(line)), (newest, version))),
                None => {
                    newest.changed().await.ok()?;
                    Some((None, (newest, after)))
                }
            }
        }
    })
    .filter_map(async |line| line)
}

pub(crate) fn status(code: u16, reason: &str, message: &str) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    respond(code, status.to_string())
}

pub(crate) fn respond(code: u16, body: impl Into<Body>) -> Response {
    let response = Response::builder().status(code);
    let response = response.header("content-type", "application/json");
    response.body(body.into()).expect("a response")
}
