//! The CDN origin: signed URLs that expire, ranges, and no header that names the model.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use http::header::{AUTHORIZATION, ETAG, HeaderValue};
use http::{Method, Response, StatusCode, request};
use percent_encoding::percent_decode_str;
use sha2::{Digest, Sha256};

use super::State;
use super::routes::encode;
use super::serve_file::serve;
use crate::content::Body;
use crate::watch::{cdn_denied, empty, text};

/// Signs CDN paths.
#[derive(Debug)]
pub(super) struct Signer {
    secret: [u8; 32],
    /// Part of every signature: counting it up makes the older ones worthless.
    generation: AtomicU64,
}

impl Signer {
    pub(super) fn new() -> Self {
        let mut secret = [0; 32];
        fastrand::fill(&mut secret);
        Self {
            secret,
            generation: AtomicU64::new(0),
        }
    }

    pub(super) fn expire_all(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    fn signature(&self, path: &str, expires: u64) -> String {
        let mut hash = Sha256::new();
        hash.update(self.secret);
        hash.update(self.generation.load(Ordering::Relaxed).to_be_bytes());
        hash.update(expires.to_be_bytes());
        hash.update(path);
        hex::encode(hash.finalize())
    }

    /// The query that opens `path`, as it stands in the URL, until `expires`.
    fn query(&self, path: &str, expires: u64) -> String {
        let signature = self.signature(path, expires);
        format!("Expires={expires}&Signature={signature}&Key-Pair-Id=STANDIN")
    }

    fn opens(&self, path: &str, query: &str) -> bool {
        let value = |name: &str| {
            let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        let expires = value("Expires").and_then(|value| value.parse::<u64>().ok());
        let Some((expires, signature)) = expires.zip(value("Signature")) else {
            return false;
        };
        now_s() < expires && signature == self.signature(path, expires)
    }
}

fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// A signed URL of an LFS file.
pub(super) fn signed_url(state: &State, id: &str, sha: &str, path: &str) -> String {
    // One segment for the file: a path with `..` must come back as it was, not resolved away.
    let path = format!("/repos/{id}/{sha}/{}", encode(path, false));
    let expires = now_s() + state.config.url_lifetime.as_secs();
    let query = state.signer.query(&path, expires);
    format!("{}{path}?{query}", state.cdn_endpoint)
}

pub(super) fn answer(state: &State, head: &request::Parts) -> Response<Body> {
    if head.headers.contains_key(AUTHORIZATION) {
        return text(
            StatusCode::BAD_REQUEST,
            "Only one auth mechanism allowed: the URL is signed",
        );
    }
    if head.method != Method::GET && head.method != Method::HEAD {
        return empty(StatusCode::METHOD_NOT_ALLOWED);
    }
    let path = head.uri.path();
    if !state
        .signer
        .opens(path, head.uri.query().unwrap_or_default())
    {
        return cdn_denied();
    }
    find(state, path, head).unwrap_or_else(|| empty(StatusCode::NOT_FOUND))
}

fn find(state: &State, path: &str, head: &request::Parts) -> Option<Response<Body>> {
    let (rest, file) = path.strip_prefix("/repos/")?.rsplit_once('/')?;
    let (id, sha) = rest.rsplit_once('/')?;
    let file = percent_decode_str(file).decode_utf8().ok()?;
    let files = state.repo(id)?.files(sha)?;
    let file = files.find(&file)?;
    let mut response = serve(&file.content, head);
    // Like the real one: 64 hex, and not the hash that it looks like.
    let etag = hex::encode(Sha256::digest(format!("cdn {}", file.etag())));
    if let Ok(etag) = HeaderValue::try_from(format!("\"{etag}\"")) {
        response.headers_mut().insert(ETAG, etag);
    }
    Some(response)
}
