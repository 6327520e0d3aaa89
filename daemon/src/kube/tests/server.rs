//! A small API server on loopback: it holds one Node, its CSINode and `ModelPrefetch` objects, and knows lists, watches and
//! the patches that we make.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::response::Response;
use futures::{StreamExt, stream};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub(in crate::kube) const NODES: &str = "/api/v1/nodes";
pub(in crate::kube) const OBJECTS: &str = "/apis/weightd.io/v1alpha1/modelprefetches";
pub(in crate::kube) const CSI_NODES: &str = "/apis/storage.k8s.io/v1/csinodes";

/// Clones are the same server.
#[derive(Clone)]
pub(in crate::kube) struct Server {
    pub(in crate::kube) address: SocketAddr,
    state: Arc<Mutex<State>>,
    changes: watch::Sender<usize>,
}

#[derive(Default)]
struct State {
    /// By the path of their kind, then by name.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// What happened: the kind's path and the event. Its index is the version.
    log: Vec<(String, Value)>,
    asked: Vec<(String, Value)>,
    /// What is asked with this text in it has this code, so many times.
    refused: Vec<(String, u16, usize)>,
}

impl Server {
    pub(in crate::kube) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            state: Arc::default(),
            changes: watch::Sender::new(0),
        };
        let answering = server.clone();
        let router = Router::new().fallback(move |request: Request| {
            let server = answering.clone();
            async move { server.answer(request).await }
        });
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        server
    }

    pub(in crate::kube) fn client(&self) -> Client {
        let address = format!("http://{}", self.address).parse().unwrap();
        Client::try_from(Config::new(address)).unwrap()
    }

    /// Tells all who watch objects of this kind that what they saw last is too old to go on from.
    pub(in crate::kube) fn expire(&self, kind: &str) {
        let mut state = self.state.lock().unwrap();
        let event = json!({ "type": "ERROR", "object": status(410) });
        state.log.push((kind.to_owned(), event));
        self.changes.send_replace(state.log.len());
    }

    /// Puts an object, made or changed by others.
    pub(in crate::kube) fn put(&self, kind: &str, object: Value) {
        let mut state = self.state.lock().unwrap();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        state.store(kind, &name, object);
        self.changes.send_replace(state.log.len());
    }

    pub(in crate::kube) fn delete(&self, kind: &str, name: &str) {
        let mut state = self.state.lock().unwrap();
        let object = state.objects.get_mut(kind).unwrap().remove(name).unwrap();
        state.note(kind, "DELETED", object);
        self.changes.send_replace(state.log.len());
    }

    pub(in crate::kube) fn object(&self, kind: &str, name: &str) -> Value {
        let state = self.state.lock().unwrap();
        state.objects[kind][name].clone()
    }

    /// Answers `code` to the next `times` requests whose method and path hold `text`.
    pub(in crate::kube) fn refuse(&self, text: &str, code: u16, times: usize) {
        let mut state = self.state.lock().unwrap();
        state.refused.push((text.to_owned(), code, times));
    }

    /// The bodies of the requests whose method and path hold `text`.
    pub(in crate::kube) fn asked(&self, text: &str) -> Vec<Value> {
        let state = self.state.lock().unwrap();
        let asked = state.asked.iter().filter(|(what, _)| what.contains(text));
        asked.map(|(_, body)| body.clone()).collect()
    }

    async fn answer(&self, request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let body = to_bytes(body, 1 << 20).await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let (path, query) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or(""));
        let asked = format!("{} {path}?{query}", parts.method);
        if query.contains("watch=true") {
            let from = query.split_once("resourceVersion=").unwrap().1;
            let from = from.split('&').next().unwrap().parse().unwrap();
            return match self.note(asked, body) {
                Some(code) => refusal(code),
                None => self.watch(path, from),
            };
        }
        let mut state = self.state.lock().unwrap();
        if let Some(code) = state.note_asked(asked, body.clone()) {
            return refusal(code);
        }
        let kind = path.trim_end_matches("/status").rsplit_once('/');
        let answer = match (parts.method.as_str(), kind) {
            ("POST", _) => (201, body),
            ("GET", _) if [NODES, OBJECTS, CSI_NODES].contains(&path.as_str()) => {
                let items: Vec<Value> = state
                    .objects
                    .entry(path)
                    .or_default()
                    .values()
                    .cloned()
                    .collect();
                let version = state.log.len().to_string();
                (
                    200,
                    json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": version }, "items": items }),
                )
            }
            ("GET", Some((kind, name))) => {
                match state.objects.get(kind).and_then(|all| all.get(name)) {
                    Some(object) => (200, object.clone()),
                    None => (404, status(404)),
                }
            }
            (_, Some((kind, name))) => state.patch(kind, name, &body),
            _ => unreachable!("{path}"),
        };
        self.changes.send_replace(state.log.len());
        json_of(answer.0, &answer.1)
    }

    fn note(&self, asked: String, body: Value) -> Option<u16> {
        self.state.lock().unwrap().note_asked(asked, body)
    }

    fn watch(&self, kind: String, from: usize) -> Response {
        let events = stream::unfold((self.clone(), from), move |(server, at)| {
            let kind = kind.clone();
            async move {
                let mut changes = server.changes.subscribe();
                changes.wait_for(|known| *known > at).await.unwrap();
                let (of, event) = server.state.lock().unwrap().log[at].clone();
                let line = if of == kind {
                    format!("{event}\n")
                } else {
                    String::new()
                };
                Some((line, (server, at + 1)))
            }
        });
        let lines = events.filter(|line| std::future::ready(!line.is_empty()));
        Response::new(Body::from_stream(lines.map(Ok::<_, Infallible>)))
    }
}

impl State {
    fn note_asked(&mut self, asked: String, body: Value) -> Option<u16> {
        let mut refused = self.refused.iter_mut();
        let refused = refused.find(|(text, _, times)| asked.contains(text.as_str()) && *times > 0);
        let code = refused.map(|(_, code, times)| {
            *times -= 1;
            *code
        });
        self.asked.push((asked, body));
        code
    }

    fn store(&mut self, kind: &str, name: &str, mut object: Value) -> Value {
        object["metadata"]["resourceVersion"] = json!((self.log.len() + 1).to_string());
        let objects = self.objects.entry(kind.to_owned()).or_default();
        let event = match objects.insert(name.to_owned(), object.clone()) {
            Some(_) => "MODIFIED",
            None => "ADDED",
        };
        self.note(kind, event, object.clone());
        object
    }

    fn note(&mut self, kind: &str, event: &str, mut object: Value) {
        object["metadata"]["resourceVersion"] = json!((self.log.len() + 1).to_string());
        self.log
            .push((kind.to_owned(), json!({ "type": event, "object": object })));
    }

    fn patch(&mut self, kind: &str, name: &str, patch: &Value) -> (u16, Value) {
        let Some(mut object) = self.objects[kind].get(name).cloned() else {
            return (404, status(404));
        };
        match patch {
            Value::Array(steps) if kind == OBJECTS => {
                let at = |step: &Value| step["path"].as_str().unwrap().to_owned();
                if object.pointer(&at(&steps[0])) != Some(&steps[0]["value"]) {
                    return (422, status(422));
                }
                let index = at(&steps[1]).rsplit_once('/').unwrap().1.parse().unwrap();
                object["status"]["nodes"]
                    .as_array_mut()
                    .unwrap()
                    .remove(index);
            }
            Value::Array(steps) => {
                if object["spec"]["taints"] != steps[0]["value"] {
                    return (422, status(422));
                }
                object["spec"]["taints"] = steps[1]["value"].clone();
            }
            applied if kind == OBJECTS => {
                object["status"]["nodes"] = applied["status"]["nodes"].clone();
            }
            merged => {
                let labels = object["metadata"]["labels"].as_object_mut().unwrap();
                for (key, value) in merged["metadata"]["labels"].as_object().unwrap() {
                    match value {
                        Value::Null => labels.remove(key),
                        value => labels.insert(key.clone(), value.clone()),
                    };
                }
            }
        }
        (200, self.store(kind, name, object))
    }
}

fn status(code: u16) -> Value {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        _ => "Invalid",
    };
    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": "no" })
}

fn refusal(code: u16) -> Response {
    json_of(code, &status(code))
}

fn json_of(code: u16, value: &Value) -> Response {
    let body = Body::from(value.to_string());
    Response::builder().status(code).body(body).unwrap()
}
