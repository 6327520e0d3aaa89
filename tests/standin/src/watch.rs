//! The layer in front of every origin: request log, faults and the control endpoint.
//!
//! The control endpoint is for a stand-in that runs as a child process: `POST /_standin/faults`
//! with one [`Fault`] or a list of them, `DELETE /_standin/faults`, `GET /_standin/requests` and
//! `DELETE /_standin/requests`. It is neither logged nor hit by faults.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName, LOCATION, RANGE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use percent_encoding::percent_decode_str;

use crate::content::{Body, full};
use crate::fault::{Fault, FaultKind, Faults, Origin, Probe, Stage};
use crate::log::{Entry, InFlight, Log};
use crate::outgoing::{Outgoing, Plan};
use crate::range::{Asked, content_range};

const CONTROL: &str = "/_standin/";

/// Body of the CDN's 403, for a bad signature and for one whose time is over.
pub(crate) const CDN_DENIED: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
    <Error><Code>AccessDenied</Code><Message>Access denied</Message></Error>";

/// What the listeners of one stand-in share.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) log: Arc<Log>,
    pub(crate) faults: Faults,
}

impl Watch {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            log: Arc::new(Log::new()),
            faults: Faults::default(),
        })
    }

    /// Logs `request`, lets `inner` answer it, and applies the faults that hit.
    pub(crate) async fn answer<H, F>(
        self: Arc<Self>,
        origin: Origin,
        mut request: Request<Incoming>,
        inner: H,
    ) -> Response<Outgoing>
    where
        H: FnOnce(Request<Incoming>) -> F,
        F: Future<Output = Response<Body>>,
    {
        if request.uri().path().starts_with(CONTROL) {
            return self.control(request).await.map(Outgoing::plain);
        }
        let (head, body) = request.into_parts();
        let entry = self.log.open(origin, &head);
        let in_flight = InFlight::new(&self.log, origin);
        let asked = Asked::parse(&head.headers);
        let seen = Seen {
            origin,
            method: head.method.clone(),
            bytes_sent: self.log.bytes_of(head.uri.path()),
            path: percent_decode_str(head.uri.path())
                .decode_utf8_lossy()
                .into_owned(),
            range: asked.map_or((0, u64::MAX), Asked::bounds),
            has_range: asked.is_some(),
        };
        request = Request::from_parts(head, body);

        let mut replaced = None;
        for kind in self.faults.take(&seen.probe(), Stage::Request) {
            match kind {
                FaultKind::NoAnswer => std::future::pending().await,
                FaultKind::IgnoreRange => drop(request.headers_mut().remove(RANGE)),
                kind => replaced = instead(kind),
            }
        }
        let response = match replaced {
            Some(response) => response,
            None => inner(request).await,
        };
        self.send(seen, response, entry, in_flight)
    }

    fn send(
        &self,
        mut seen: Seen,
        response: Response<Body>,
        entry: Arc<Entry>,
        in_flight: InFlight,
    ) -> Response<Outgoing> {
        let (mut head, body) = response.into_parts();
        if head.headers.contains_key(LOCATION) {
            for kind in self.faults.take(&seen.probe(), Stage::Redirect) {
                change_linked(&mut head.headers, &kind);
            }
        }
        let mut plan = Plan::default();
        let exact = body.size_hint().exact().or_else(|| {
            let length = head.headers.get(CONTENT_LENGTH)?;
            length.to_str().ok()?.parse().ok()
        });
        if let (StatusCode::OK | StatusCode::PARTIAL_CONTENT, Some(length)) = (head.status, exact) {
            let start = match content_range(&head.headers) {
                Some((first, last, _)) => {
                    seen.range = (first, last);
                    entry.update(|request| request.range = Some((first, last)));
                    first
                }
                None => {
                    seen.range = (0, length.saturating_sub(1));
                    0
                }
            };
            let kinds = self.faults.take(&seen.probe(), Stage::Body);
            plan = Plan::new(&kinds, start, length);
            for kind in &kinds {
                shift_range(&mut head.headers, kind);
            }
        }
        if seen.method != Method::HEAD
            && let Some(length) = exact
        {
            let length = HeaderValue::from(plan.length(length));
            head.headers.insert(CONTENT_LENGTH, length);
        }
        entry.update(|request| request.status = head.status.as_u16());
        Response::from_parts(head, Outgoing::new(body, plan, entry, in_flight))
    }

    async fn control(&self, request: Request<Incoming>) -> Response<Body> {
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let body = match request.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => return empty(StatusCode::BAD_REQUEST),
        };
        match (method.as_str(), &path[CONTROL.len()..]) {
            ("POST", "faults") => match parse_faults(&body) {
                Ok(faults) => {
                    faults.into_iter().for_each(|fault| self.faults.add(fault));
                    empty(StatusCode::NO_CONTENT)
                }
                Err(error) => text(StatusCode::BAD_REQUEST, error.to_string()),
            },
            ("DELETE", "faults") => {
                self.faults.clear();
                empty(StatusCode::NO_CONTENT)
            }
            ("GET", "requests") => json(&self.log.requests()),
            ("DELETE", "requests") => {
                self.log.clear();
                empty(StatusCode::NO_CONTENT)
            }
            _ => empty(StatusCode::NOT_FOUND),
        }
    }
}

/// What is remembered of a request while it is answered.
struct Seen {
    origin: Origin,
    method: Method,
    path: String,
    range: (u64, u64),
    has_range: bool,
    bytes_sent: u64,
}

impl Seen {
    fn probe(&self) -> Probe<'_> {
        Probe {
            origin: self.origin,
            method: self.method.as_str(),
            path: &self.path,
            range: self.range,
            has_range: self.has_range,
            bytes_sent: self.bytes_sent,
        }
    }
}

fn parse_faults(body: &Bytes) -> serde_json::Result<Vec<Fault>> {
    if body.trim_ascii_start().starts_with(b"[") {
        return serde_json::from_slice(body);
    }
    serde_json::from_slice(body).map(|fault| vec![fault])
}

/// The answer that a fault sends in place of the real one.
fn instead(kind: FaultKind) -> Option<Response<Body>> {
    match kind {
        FaultKind::Status {
            status,
            headers,
            body,
        } => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let mut response = text(status, body);
            for (name, value) in headers {
                if let (Ok(name), Ok(value)) =
                    (HeaderName::try_from(name), HeaderValue::try_from(value))
                {
                    response.headers_mut().append(name, value);
                }
            }
            Some(response)
        }
        FaultKind::ExpiredUrl => Some(cdn_denied()),
        FaultKind::RateLimit {
            bucket,
            quota,
            window_s,
            reset_s,
            retry_after_s,
        } => Some(rate_limited(
            &bucket,
            quota,
            window_s,
            reset_s,
            retry_after_s,
        )),
        _ => None,
    }
}

pub(crate) fn cdn_denied() -> Response<Body> {
    let mut response = text(StatusCode::FORBIDDEN, CDN_DENIED);
    set(&mut response, CONTENT_TYPE, "application/xml");
    response
}

/// The Hub's 429.
pub(crate) fn rate_limited(
    bucket: &str,
    quota: u64,
    window_s: u64,
    reset_s: u64,
    retry_after_s: Option<u64>,
) -> Response<Body> {
    let message = "We had to rate limit you, you hit the quota of requests per 5 minutes period.";
    let mut response = text(StatusCode::TOO_MANY_REQUESTS, message);
    set_rate_limit(&mut response, bucket, (0, quota), (reset_s, window_s));
    if let Some(seconds) = retry_after_s {
        set(
            &mut response,
            http::header::RETRY_AFTER,
            &seconds.to_string(),
        );
    }
    response
}

/// Requests left and per window; seconds left and per window.
pub(crate) fn set_rate_limit(
    response: &mut Response<Body>,
    bucket: &str,
    (left, quota): (u64, u64),
    (reset_s, window_s): (u64, u64),
) {
    let state = format!("\"{bucket}\";r={left};t={reset_s}");
    let policy = format!("\"fixed window\";\"{bucket}\";q={quota};w={window_s}");
    set(response, HeaderName::from_static("ratelimit"), &state);
    set(
        response,
        HeaderName::from_static("ratelimit-policy"),
        &policy,
    );
}

fn change_linked(headers: &mut http::HeaderMap, kind: &FaultKind) {
    let FaultKind::ChangedFile { etag, size } = kind else {
        return;
    };
    if let Some(etag) = etag
        && let Ok(value) = HeaderValue::try_from(format!("\"{etag}\""))
    {
        headers.insert("x-linked-etag", value);
    }
    if let Some(size) = size {
        headers.insert("x-linked-size", HeaderValue::from(*size));
    }
}

fn shift_range(headers: &mut http::HeaderMap, kind: &FaultKind) {
    if let FaultKind::ShiftedRange { by } = kind
        && let Some((first, last, size)) = content_range(headers)
    {
        let first = first.saturating_add_signed(*by);
        let last = last.saturating_add_signed(*by);
        if let Ok(value) = HeaderValue::try_from(format!("bytes {first}-{last}/{size}")) {
            headers.insert(CONTENT_RANGE, value);
        }
    }
}

/// Sets a header; a value that cannot stand in one is left out.
pub(crate) fn set(response: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

pub(crate) fn empty(status: StatusCode) -> Response<Body> {
    respond(status, Bytes::new())
}

pub(crate) fn respond(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let body = body.into();
    let length = HeaderValue::from(body.len());
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_LENGTH, length);
    response
}

pub(crate) fn text(status: StatusCode, body: impl Into<String>) -> Response<Body> {
    let mut response = respond(status, body.into());
    set(&mut response, CONTENT_TYPE, "text/plain; charset=utf-8");
    response
}

pub(crate) fn json(value: &impl serde::Serialize) -> Response<Body> {
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut response = respond(StatusCode::OK, body);
    set(
        &mut response,
        CONTENT_TYPE,
        "application/json; charset=utf-8",
    );
    response
}
