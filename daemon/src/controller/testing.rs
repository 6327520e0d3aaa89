//! A small API server for the tests of this module: objects by path, their versions, and failures on demand.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Json, http};
use kube::Client;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// What the server holds.
#[derive(Default)]
pub(super) struct Held {
    pub objects: HashMap<String, Value>,
    version: u64,
    /// Answers nothing.
    pub silent: bool,
    /// Each request's method and path.
    pub asked: Vec<String>,
}

/// A server, until it is dropped with its runtime.
#[derive(Clone)]
pub(super) struct Api {
    pub held: Arc<Mutex<Held>>,
    pub address: SocketAddr,
}

impl Api {
    pub(super) async fn start() -> Self {
        let held = Arc::new(Mutex::new(Held::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&held));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { held, address }
    }

    pub(super) fn client(&self) -> Client {
        let url: http::Uri = format!("http://{}", self.address).parse().unwrap();
        Client::try_from(kube::Config::new(url)).unwrap()
    }

    pub(super) fn get(&self, path: &str) -> Option<Value> {
        self.held.lock().unwrap().objects.get(path).cloned()
    }

    pub(super) fn put(&self, path: &str, mut object: Value) {
        let mut held = self.held.lock().unwrap();
        held.version += 1;
        object["metadata"]["resourceVersion"] = held.version.to_string().into();
        held.objects.insert(path.to_owned(), object);
    }

    pub(super) fn silence(&self, silent: bool) {
        self.held.lock().unwrap().silent = silent;
    }
}

fn refused(code: StatusCode, reason: &str) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "refused by the test", "reason": reason, "code": code.as_u16(),
    });
    (code, Json(status)).into_response()
}

async fn answer(State(held): State<Arc<Mutex<Held>>>, request: Request<Body>) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let bytes = to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let silent = {
        let mut held = held.lock().unwrap();
        held.asked.push(format!("{method} {path}"));
        held.silent
    };
    if silent {
        std::future::pending::<()>().await;
    }
    let mut held = held.lock().unwrap();
    let (path, created) = match method {
        Method::POST => (
            format!("{path}/{}", body["metadata"]["name"].as_str().unwrap()),
            true,
        ),
        _ => (path, false),
    };
    let found = held.objects.get(&path).cloned();
    let mut next = match (method, found) {
        (Method::GET, Some(found)) => return Json(found).into_response(),
        (Method::POST, None) => body,
        (Method::POST, Some(_)) => return refused(StatusCode::CONFLICT, "AlreadyExists"),
        (_, None) => return refused(StatusCode::NOT_FOUND, "NotFound"),
        (Method::PUT, Some(found)) => {
            let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
            if version(&found) != version(&body) {
                return refused(StatusCode::CONFLICT, "Conflict");
            }
            body
        }
        (Method::PATCH, Some(mut found)) => {
            let patch: json_patch::Patch = serde_json::from_value(body).unwrap();
            json_patch::patch(&mut found, &patch).unwrap();
            found
        }
        (method, _) => panic!("{method} is not for this server"),
    };
    held.version += 1;
    next["metadata"]["resourceVersion"] = held.version.to_string().into();
    held.objects.insert(path, next.clone());
    let code = if created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    (code, Json(next)).into_response()
}
