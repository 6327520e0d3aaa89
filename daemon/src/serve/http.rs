//! What Prometheus and kubelet ask over HTTP.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use weightd_core::blocking;
use weightd_core::errors::Chain;

use super::socket::after_error;
use crate::rpc::Engine;

#[derive(Clone)]
struct Asked {
    engine: Arc<Engine>,
    ready: Arc<AtomicBool>,
}

/// Connections at once. Who comes later waits in the kernel's queue, and takes no descriptor from fetches.
const CONNECTIONS: usize = 64;

/// How long a client may take to say what it wants.
const HEADER: Duration = Duration::from_secs(5);

/// How long a connection, which is for one question, may take in all.
const EXCHANGE: Duration = Duration::from_secs(30);

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, routes: Router) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                after_error(&error).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let routes = TowerToHyperService::new(routes.clone());
        connections.spawn(async move {
            let exchange = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), routes);
            match tokio::time::timeout(EXCHANGE, exchange).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(error = %Chain(&error), "a connection broke"),
                Err(_) => tracing::debug!("a connection took too long"),
            }
        });
    }
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
    let engine = &asked.engine;
    engine.metrics.observe_waiting(engine.volumes.waiting());
    engine.metrics.observe_fetches(&engine.fetcher.active());
    let store = Arc::clone(&engine.store);
    match blocking::run(move || store.usage()).await {
        Ok(usage) => engine.metrics.observe_store(&usage),
        Err(error) => tracing::warn!(error = %Chain(&error), "store not measured"),
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], engine.metrics.encode()).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn clients_that_say_nothing_keep_out_nobody_for_long() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let routes = Router::new().route("/healthz", get(|| async { "ok\n" }));
        let serving = tokio::spawn(serve(listener, routes));
        let mut silent = Vec::new();
        for _ in 0..=CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }

        let mut asking = TcpStream::connect(address).await.unwrap();
        let question = b"GET /healthz HTTP/1.1\r\nHost: weightd\r\n\r\n";
        asking.write_all(question).await.unwrap();
        let mut answer = String::new();
        let answered = asking.read_to_string(&mut answer);
        tokio::time::timeout(HEADER * 4, answered)
            .await
            .expect("it was answered")
            .unwrap();

        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        serving.abort();
    }
}
