//! A file's bytes over HTTP, whole or by range.

use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE};
use http::{HeaderValue, Method, Response, StatusCode, request};

use crate::content::{Body, Content, full};
use crate::range::Asked;
use crate::watch::{empty, set};

/// 200, 206 or 416.
pub(super) fn serve(content: &Content, head: &request::Parts) -> Response<Body> {
    let size = content.size();
    let asked = Asked::parse(&head.headers);
    let (status, start, length) = match asked.map(|asked| asked.within(size)) {
        None => (StatusCode::OK, 0, size),
        Some(Some((first, last))) => (StatusCode::PARTIAL_CONTENT, first, last - first + 1),
        Some(None) => {
            let mut response = empty(StatusCode::RANGE_NOT_SATISFIABLE);
            set(&mut response, CONTENT_RANGE, &format!("bytes */{size}"));
            return response;
        }
    };
    let body = if head.method == Method::HEAD {
        Ok(full(""))
    } else {
        content.body(start, length)
    };
    let Ok(body) = body else {
        return empty(StatusCode::INTERNAL_SERVER_ERROR);
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    if status == StatusCode::PARTIAL_CONTENT {
        let last = start + length - 1;
        let range = format!("bytes {start}-{last}/{size}");
        set(&mut response, CONTENT_RANGE, &range);
    }
    response
}
