//! Serving HTTPS to whoever connects: few promises to a client, and short ones.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::server::ResolvesServerCert;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use weightd_core::errors::Chain;

use crate::serve::socket::after_error;

/// Connections at once. Who comes later waits in the kernel's queue.
const CONNECTIONS: usize = 256;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(3);

/// How long a client may take to say what it wants.
const HEADER: Duration = Duration::from_secs(3);

/// How long a connection, which is for one question, may take in all.
const EXCHANGE: Duration = Duration::from_secs(15);

/// How long those that are open may take when no more are accepted.
const LAST: Duration = Duration::from_secs(5);

/// TLS with the certificate that `certificate` has at each handshake.
pub(super) fn config(certificate: Arc<dyn ResolvesServerCert>) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider);
    let builder = builder
        .with_safe_default_protocol_versions()
        .expect("the provider has the ciphers of TLS 1.2 and 1.3");
    let mut config = builder
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

/// Serves until `stop`, and then what has been accepted.
pub(super) async fn serve(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    routes: Router,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(config);
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        let accepted = stop.run_until_cancelled(listener.accept()).await;
        let stream = match accepted {
            None => break,
            Some(Ok((stream, _))) => stream,
            Some(Err(error)) => {
                after_error(&error).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let (acceptor, routes) = (acceptor.clone(), routes.clone());
        connections.spawn(async move {
            if timeout(EXCHANGE, exchange(stream, acceptor, routes))
                .await
                .is_err()
            {
                tracing::debug!("a connection took too long");
            }
        });
    }
    drop(listener);
    let rest = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(LAST, rest).await;
}

async fn exchange(stream: TcpStream, acceptor: TlsAcceptor, routes: Router) {
    let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        // An API server that does not trust us yet says so here, and says it itself in its log.
        Ok(Err(error)) => return tracing::debug!(%error, "a handshake failed"),
        Err(_) => return tracing::debug!("a handshake took too long"),
    };
    // A connection that waits for the next question is closed by one side just as the other speaks: then the
    // API server would admit a pod without us. A handshake costs less than that.
    let exchange = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    if let Err(error) = exchange.await {
        tracing::debug!(error = %Chain(&error), "a connection broke");
    }
}
