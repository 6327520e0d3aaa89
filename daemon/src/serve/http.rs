//! What Prometheus and kubelet ask over HTTP.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use weightd_core::blocking;
use weightd_core::errors::Chain;

use crate::rpc::Engine;

#[derive(Clone)]
struct Asked {
    engine: Arc<Engine>,
    ready: Arc<AtomicBool>,
}

pub(super) fn routes(engine: Arc<Engine>, ready: Arc<AtomicBool>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        // Alive is who answers. It never touches the disk: a slow disk is no reason to be killed.
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(Asked { engine, ready })
}

async fn readyz(State(asked): State<Asked>) -> (StatusCode, &'static str) {
    if asked.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting or stopping\n")
    }
}

async fn metrics(State(asked): State<Asked>) -> Response {
    let store = Arc::clone(&asked.engine.store);
    match blocking::run(move || store.usage()).await {
        Ok(usage) => asked.engine.metrics.observe_store(&usage),
        Err(error) => tracing::warn!(error = %Chain(&error), "store not measured"),
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (
        [(header::CONTENT_TYPE, kind)],
        asked.engine.metrics.encode(),
    )
        .into_response()
}
