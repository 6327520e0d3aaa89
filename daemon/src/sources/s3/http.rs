//! The HTTP client under the SDK: HTTP/1.1 and as many connections as there are requests.
//!
//! The SDK's own client offers HTTP/2, and a server that accepts it would serve all ranges over one
//! TCP connection, with one congestion window.

use std::time::Duration;

use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;

/// Connections kept open between requests, for each host.
///
/// Source: AWS CRT opens 250 for a node of 100 Gbit/s.
const IDLE_CONNECTIONS: usize = 256;

/// For a TCP and TLS connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// From a request to the header of its answer.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
pub(super) struct Http(reqwest::Client);

impl Http {
    /// # Errors
    ///
    /// If no TLS can be set up.
    pub(super) fn new() -> reqwest::Result<Self> {
        let client = reqwest::Client::builder()
            .http1_only()
            // Signatures are made for one host, and a redirect tells the region.
            .redirect(Policy::none())
            .referer(false)
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .dns_resolver(Spread)
            .build()?;
        Ok(Self(client))
    }

    async fn exchange(self, request: HttpRequest) -> Result<HttpResponse, ConnectorError> {
        let request = request
            .try_into_http1x()
            .map_err(|error| ConnectorError::user(error.into()))?;
        let (parts, body) = request.into_parts();
        let body = body.bytes().map(Bytes::copy_from_slice);
        let body = body.ok_or_else(|| ConnectorError::user("a request with a stream".into()))?;
        let request = reqwest::Request::try_from(http::Request::from_parts(parts, body))
            .map_err(|error| ConnectorError::user(error.without_url().into()))?;
        let answer = tokio::time::timeout(HEADER_TIMEOUT, self.0.execute(request)).await;
        let response = match answer {
            Ok(response) => response.map_err(failure)?,
            Err(_) => {
                let seconds = HEADER_TIMEOUT.as_secs();
                let text = format!("no answer within {seconds} s");
                return Err(ConnectorError::timeout(text.into()));
            }
        };
        let response = http::Response::from(response).map(SdkBody::from_body_1_x);
        HttpResponse::try_from(response).map_err(|error| ConnectorError::other(error.into(), None))
    }
}

impl HttpClient for Http {
    fn http_connector(
        &self,
        _: &HttpConnectorSettings,
        _: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for Http {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        HttpConnectorFuture::new(self.clone().exchange(request))
    }
}

fn failure(error: reqwest::Error) -> ConnectorError {
    let (timeout, connect) = (error.is_timeout(), error.is_connect());
    let error = error.without_url().into();
    match (timeout, connect) {
        (true, _) => ConnectorError::timeout(error),
        (false, true) => ConnectorError::io(error).never_connected(),
        (false, false) => ConnectorError::io(error),
    }
}

/// Spreads connections over all addresses of a host: S3 names several, and each serves a part of
/// what a fast node can take.
struct Spread;

impl Resolve for Spread {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let mut addresses: Vec<_> = found.collect();
            // The system puts the family that works first.
            let first = addresses.first().map(std::net::SocketAddr::is_ipv4);
            fastrand::shuffle(&mut addresses);
            addresses.sort_by_key(|address| Some(address.is_ipv4()) != first);
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}
