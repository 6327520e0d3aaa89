//! A stand-in for the instance metadata service: version 2, which asks for a token, and the ways it fails.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};

const TOKEN: &str = "a-token";

/// How it behaves.
#[derive(Clone, Copy, Default)]
pub(super) struct Manner {
    /// Every answer takes so long.
    pub(super) delay: Duration,
    /// What a request for a token is answered with, if not with one. Zero: nothing at all.
    pub(super) no_token: Option<u16>,
}

struct Shared {
    manner: Manner,
    paths: BTreeMap<String, Vec<u8>>,
    asked: Mutex<Vec<String>>,
}

/// It serves until it is dropped.
pub(super) struct Imds {
    address: SocketAddr,
    shared: Arc<Shared>,
    _runtime: tokio::runtime::Runtime,
}

impl Imds {
    pub(super) fn start(manner: Manner, paths: &[(&str, &[u8])]) -> Self {
        let paths = paths.iter();
        let paths = paths.map(|(path, body)| (format!("/latest/{path}"), body.to_vec()));
        let shared = Arc::new(Shared {
            manner,
            paths: paths.collect(),
            asked: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("it can be set");
        let address = listener.local_addr().expect("an address");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let app = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&shared));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            axum::serve(listener, app).await
        });
        Self {
            address,
            shared,
            _runtime: runtime,
        }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Method and path of every request.
    pub(super) fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().expect("nobody panics").clone()
    }
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    request: Request,
) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let line = format!("{method} {path}");
    shared.asked.lock().expect("nobody panics").push(line);
    tokio::time::sleep(shared.manner.delay).await;
    if path == "/latest/api/token" && method == Method::PUT {
        return token(&shared, &headers).await;
    }
    // Version 1 would answer without; whoever asks it so has no token to send.
    if headers
        .get("x-aws-ec2-metadata-token")
        .is_none_or(|token| token != TOKEN)
    {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    match shared.paths.get(&path) {
        Some(body) => body.clone().into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn token(shared: &Shared, headers: &HeaderMap) -> Response {
    const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
    match shared.manner.no_token {
        Some(0) => std::future::pending().await,
        Some(status) => {
            let status = StatusCode::from_u16(status).expect("a status");
            return status.into_response();
        }
        None => {}
    }
    match headers.get(TTL) {
        Some(ttl) => ([(TTL, ttl.clone())], TOKEN).into_response(),
        None => StatusCode::BAD_REQUEST.into_response(),
    }
}
