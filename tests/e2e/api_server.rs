//! An API server on loopback, as far as `weightctl` asks one: objects, lists in pages, and what an account may do.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::response::Response;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

pub(crate) const NODES: &str = "/api/v1/nodes";
pub(crate) const CSI_NODES: &str = "/apis/storage.k8s.io/v1/csinodes";
pub(crate) const PREFETCHES: &str = "/apis/weightd.io/v1alpha1/modelprefetches";
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";

#[derive(Default)]
struct State {
    /// By the path of their kind. A kind without an entry is not served.
    objects: BTreeMap<String, Vec<Value>>,
    /// Paths that begin so are answered with this code.
    refused: Vec<(String, u16)>,
    /// `verb resource` that the account lacks.
    lacking: Vec<String>,
    asked: Vec<String>,
}

pub(crate) struct ApiServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    runtime: Option<Runtime>,
}

impl ApiServer {
    pub(crate) fn start() -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let listener = runtime
            .block_on(TcpListener::bind("127.0.0.1:0"))
            .expect("a port");
        let address = listener.local_addr().expect("an address");
        let state: Arc<Mutex<State>> = Arc::default();
        let answering = Arc::clone(&state);
        let router = Router::new().fallback(move |request: Request| {
            let state = Arc::clone(&answering);
            async move { answer(&state, request).await }
        });
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self {
            address,
            state,
            runtime: Some(runtime),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    pub(crate) fn put(&self, kind: &str, objects: Vec<Value>) {
        self.state().objects.insert(kind.to_owned(), objects);
    }

    /// Answers `code` to what is asked below `path`.
    pub(crate) fn refuse(&self, path: &str, code: u16) {
        self.state().refused.push((path.to_owned(), code));
    }

    /// The account may not do this: `verb resource`.
    pub(crate) fn deny(&self, what: &str) {
        self.state().lacking.push(what.to_owned());
    }

    /// How often something was asked whose method and path hold `text`.
    pub(crate) fn asked(&self, text: &str) -> usize {
        let state = self.state();
        state
            .asked
            .iter()
            .filter(|asked| asked.contains(text))
            .count()
    }

    pub(crate) fn write_kubeconfig(&self, path: &Path) {
        let file = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "here", "cluster": { "server": format!("http://{}", self.address) } }],
            "users": [{ "name": "me", "user": { "token": "aSecretToken" } }],
            "contexts": [{ "name": "it", "context": { "cluster": "here", "user": "me" } }],
            "current-context": "it",
        });
        fs::write(path, file.to_string()).expect("a kubeconfig");
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn answer(state: &Mutex<State>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, 1 << 20).await.expect("a body");
    let (path, query) = (parts.uri.path(), parts.uri.query().unwrap_or_default());
    let mut state = state.lock().expect("nobody panics with it");
    state.asked.push(format!("{} {path}?{query}", parts.method));
    let mut refused = state.refused.iter();
    if let Some((_, code)) = refused.find(|(below, _)| path.starts_with(below.as_str())) {
        return refusal(*code);
    }
    if path == REVIEWS {
        let mut review: Value = serde_json::from_slice(&body).expect("JSON");
        let asked = review["spec"]["resourceAttributes"].clone();
        let word = |name: &str| asked[name].as_str().unwrap_or_default().to_owned();
        let what = format!("{} {}", word("verb"), word("resource"));
        review["status"] = json!({ "allowed": !state.lacking.contains(&what) });
        return json_of(201, &review);
    }
    if let Some(objects) = state.objects.get(path) {
        return json_of(200, &page(objects, query));
    }
    let (kind, name) = path.rsplit_once('/').expect("a path");
    let mut objects = state.objects.get(kind).into_iter().flatten();
    match objects.find(|object| object["metadata"]["name"] == name) {
        Some(object) => json_of(200, object),
        None => refusal(404),
    }
}

/// What `limit` and `continue` ask for.
fn page(objects: &[Value], query: &str) -> Value {
    let parameter = |name: &str| {
        let mut parameters = query.split('&').filter_map(|text| text.split_once('='));
        parameters
            .find(|(key, _)| *key == name)?
            .1
            .parse::<usize>()
            .ok()
    };
    let from = parameter("continue").unwrap_or_default();
    let to = objects
        .len()
        .min(from + parameter("limit").unwrap_or(usize::MAX - from));
    let next = if to < objects.len() {
        to.to_string()
    } else {
        String::new()
    };
    json!({
        "kind": "List", "apiVersion": "v1",
        "metadata": { "resourceVersion": "7", "continue": next },
        "items": objects[from..to],
    })
}

fn refusal(code: u16) -> Response {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        _ => "NotFound",
    };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code,
        "message": format!("the server says {reason}"),
    });
    json_of(code, &status)
}

fn json_of(code: u16, value: &Value) -> Response {
    let response = Response::builder()
        .status(code)
        .header("content-type", "application/json");
    response
        .body(Body::from(value.to_string()))
        .expect("a response")
}
