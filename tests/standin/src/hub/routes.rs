//! Which request is meant. By hand, because a model's id has one or two segments, and a revision
//! may hold an encoded slash.

use http::header::AUTHORIZATION;
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::access::{self, Refused};
use super::{State, model, resolve, tree};
use crate::content::Body;
use crate::watch::empty;

const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

const UNRESERVED_AND_SLASH: &AsciiSet = &UNRESERVED.remove(b'/');

/// Percent-encodes a path or, without slashes kept, one segment of a path.
pub(super) fn encode(text: &str, keep_slashes: bool) -> String {
    let set = if keep_slashes {
        UNRESERVED_AND_SLASH
    } else {
        UNRESERVED
    };
    utf8_percent_encode(text, set).to_string()
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Endpoint {
    Model,
    Tree,
    PathsInfo,
    Refs,
    XetToken,
    Resolve,
    ResolveCache,
}

/// What a request is about; all parts are decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) endpoint: Endpoint,
    pub(super) id: String,
    pub(super) revision: String,
    pub(super) path: String,
}

impl Target {
    pub(super) fn parse(path: &str) -> Option<Self> {
        if let Some(rest) = path.strip_prefix("/api/models/") {
            return Self::parse_api(rest);
        }
        if let Some(rest) = path.strip_prefix("/api/resolve-cache/models/") {
            let (id, rest) = split_at_sha(rest)?;
            return Self::new(Endpoint::ResolveCache, id, rest);
        }
        let (id, _, rest) = split_id(path.strip_prefix('/')?, &["resolve"])?;
        Self::new(Endpoint::Resolve, id, rest)
    }

    fn parse_api(rest: &str) -> Option<Self> {
        let markers = ["revision", "tree", "paths-info", "refs", "xet-read-token"];
        let Some((id, marker, rest)) = split_id(rest, &markers) else {
            return Self::new(Endpoint::Model, rest, "main");
        };
        let endpoint = match marker {
            "revision" => Endpoint::Model,
            "tree" => Endpoint::Tree,
            "paths-info" => Endpoint::PathsInfo,
            "refs" => Endpoint::Refs,
            _ => Endpoint::XetToken,
        };
        Self::new(endpoint, id, rest)
    }

    /// `rest` is the revision, and a path after the next slash.
    fn new(endpoint: Endpoint, id: &str, rest: &str) -> Option<Self> {
        let segments: Vec<&str> = rest.split('/').collect();
        // The Hub also takes `refs/pr/1` with its slashes as they are.
        let parts = match segments.as_slice() {
            ["refs", "pr" | "convert", _, ..] => 3,
            _ => 1,
        };
        let decode = |text: &str| {
            let text = percent_decode_str(text).decode_utf8().ok()?;
            Some(text.into_owned())
        };
        let id = decode(id.trim_end_matches('/'))?;
        if id.is_empty() || id.matches('/').count() > 1 {
            return None;
        }
        Some(Self {
            endpoint,
            id,
            revision: decode(&segments[..parts].join("/"))?,
            path: decode(&segments[parts..].join("/"))?,
        })
    }
}

/// Splits `id/marker/rest`, where `id` has one or two segments.
fn split_id<'a>(path: &'a str, markers: &[&str]) -> Option<(&'a str, &'a str, &'a str)> {
    let slashes: Vec<usize> = path.match_indices('/').map(|(at, _)| at).take(3).collect();
    [0, 1].into_iter().find_map(|index| {
        let start = *slashes.get(index)?;
        let end = slashes.get(index + 1).copied().unwrap_or(path.len());
        let marker = &path[start + 1..end];
        let rest = path.get(end + 1..).unwrap_or_default();
        markers
            .contains(&marker)
            .then_some((&path[..start], marker, rest))
    })
}

/// Splits `id/sha/path`, where `id` has one or two segments.
fn split_at_sha(path: &str) -> Option<(&str, &str)> {
    let is_sha = |text: &str| text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit());
    path.match_indices('/').find_map(|(at, _)| {
        let rest = &path[at + 1..];
        let (sha, _) = rest.split_once('/')?;
        is_sha(sha).then_some((&path[..at], rest))
    })
}

/// Answers a request at the Hub's origin.
pub(super) async fn answer(state: &State, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else {
        return empty(StatusCode::BAD_REQUEST);
    };
    let call = Call {
        state,
        head: &head,
        body: &body.to_bytes(),
    };
    let path = head.uri.path();
    let standing = match &state.config.quota {
        // What the Hub redirects to itself is not counted twice.
        Some(quota) if !path.starts_with("/api/resolve-cache/") => {
            let client = head.headers.get(AUTHORIZATION);
            let client = client.map_or("", |value| value.to_str().unwrap_or_default());
            Some(state.counters.count(quota, path, client))
        }
        _ => None,
    };
    if let Some(refusal) = standing.as_ref().and_then(|standing| standing.refusal()) {
        return refusal;
    }
    let mut response = match call.answer() {
        Ok(response) => response,
        Err(refused) => refused.response(),
    };
    if let Some(standing) = standing {
        standing.stamp(&mut response);
    }
    if head.method == Method::HEAD && !response.status().is_success() {
        *response.body_mut() = crate::content::full("");
    }
    response
}

/// One request at the Hub's origin.
pub(super) struct Call<'a> {
    pub(super) state: &'a State,
    pub(super) head: &'a http::request::Parts,
    pub(super) body: &'a [u8],
}

impl Call<'_> {
    fn answer(&self) -> Result<Response<Body>, Refused> {
        let target = Target::parse(self.head.uri.path()).ok_or(Refused::NoRoute)?;
        let token = access::token(self.state, &self.head.headers)?;
        let token = token.as_deref();
        let repo = access::readable(self.state, &target.id, token)?;
        if target.endpoint == Endpoint::Refs {
            return Ok(model::refs(self, &repo));
        }
        let no_revision = || Refused::NoRevision {
            revision: target.revision.clone(),
        };
        let sha = repo.resolve(&target.revision).ok_or_else(no_revision)?;
        let files = repo.files(sha).ok_or_else(no_revision)?;
        match target.endpoint {
            Endpoint::Model => Ok(model::model(self, &repo, sha, &files)),
            Endpoint::Tree => tree::tree(self, &target, sha, &files),
            Endpoint::PathsInfo => tree::paths(self, &files),
            Endpoint::XetToken => {
                access::check_gate(&repo, token)?;
                Ok(model::xet_token(self))
            }
            Endpoint::Resolve => {
                access::check_gate(&repo, token)?;
                resolve::resolve(self, &target, sha, &files)
            }
            Endpoint::ResolveCache => {
                access::check_gate(&repo, token)?;
                resolve::cached(self, &target, sha, &files)
            }
            Endpoint::Refs => Err(Refused::NoRoute),
        }
    }

    /// A value of the query, decoded.
    pub(super) fn query(&self, name: &str) -> Option<String> {
        pairs(self.head.uri.query().unwrap_or_default())
            .into_iter()
            .find_map(|(key, value)| (key == name).then_some(value))
    }

    /// Whether a flag of the query is set; Python sends `True`.
    pub(super) fn flag(&self, name: &str) -> bool {
        let value = self.query(name);
        value.is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1")
    }
}

/// The pairs of a query or form, decoded.
pub(super) fn pairs(text: &str) -> Vec<(String, String)> {
    let decode = |text: &str| {
        let text = text.replace('+', " ");
        percent_decode_str(&text).decode_utf8_lossy().into_owned()
    };
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_told_apart() {
        let table = "
            /api/models/org/model                       Model org/model main ''
            /api/models/model                           Model model main ''
            /api/models/model/revision/refs%2Fpr%2F1    Model model refs/pr/1 ''
            /api/models/org/model/tree/main/a/b         Tree org/model main a/b
            /api/models/org/model/refs                  Refs org/model '' ''
            /org/model/resolve/refs/pr/1/a%20b          Resolve org/model refs/pr/1 a b
            /model/resolve/v1/x                         Resolve model v1 x";
        for line in table.lines().skip(1) {
            let (path, expected) = line.trim().split_once(' ').unwrap();
            let target = Target::parse(path).unwrap();
            let or_none = |text: &str| {
                if text.is_empty() {
                    "''".into()
                } else {
                    text.to_owned()
                }
            };
            let (revision, file) = (or_none(&target.revision), or_none(&target.path));
            let got = format!("{:?} {} {revision} {file}", target.endpoint, target.id);
            assert_eq!(got, expected.trim(), "{path}");
        }
        for path in ["/", "/org/model", "/api/models/a/b/c", "/api/whoami-v2"] {
            assert_eq!(Target::parse(path), None, "{path}");
        }
    }

    #[test]
    fn a_cached_file_is_found_by_its_sha() {
        let sha = "0123456789abcdef0123456789abcdef01234567";
        let path = format!("/api/resolve-cache/models/org/model/{sha}/a/b.json");
        let target = Target::parse(&path).unwrap();
        assert_eq!(target.endpoint, Endpoint::ResolveCache);
        assert_eq!(
            (target.id.as_str(), target.revision.as_str()),
            ("org/model", sha)
        );
        assert_eq!(target.path, "a/b.json");
    }
}
