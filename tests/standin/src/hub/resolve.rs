//! Where a file's bytes are: small ones at the Hub itself, LFS files at the CDN.

use http::header::{ACCEPT_RANGES, ETAG, HeaderName, LOCATION};
use http::{Method, Response, StatusCode};

use super::access::Refused;
use super::cdn;
use super::file::{File, Files};
use super::routes::{Call, Target, encode};
use super::serve_file::serve;
use crate::content::{Body, full};
use crate::watch::{set, text};

fn find<'a>(files: &'a Files, target: &Target, sha: &str) -> Result<&'a File, Refused> {
    files.find(&target.path).ok_or_else(|| Refused::NoEntry {
        sha: sha.to_owned(),
        path: target.path.clone(),
    })
}

/// 307 to the Hub's own cache, or 302 to the CDN.
pub(super) fn resolve(
    call: &Call<'_>,
    target: &Target,
    sha: &str,
    files: &Files,
) -> Result<Response<Body>, Refused> {
    let file = find(files, target, sha)?;
    let (status, location) = if file.lfs.is_some() {
        let url = cdn::signed_url(call.state, &target.id, sha, &target.path);
        (StatusCode::FOUND, url)
    } else {
        let cached = format!(
            "/api/resolve-cache/models/{}/{sha}/{}?{}=&etag=%22{}%22",
            target.id,
            encode(&target.path, true),
            encode(call.head.uri.path(), false),
            encode(file.etag(), false),
        );
        (StatusCode::TEMPORARY_REDIRECT, cached)
    };
    let mut response = text(status, format!("Redirecting to {location}"));
    set(&mut response, LOCATION, &location);
    set(&mut response, ACCEPT_RANGES, "bytes");
    commit(&mut response, sha);
    if file.lfs.is_some() {
        let linked = [
            ("x-linked-etag", format!("\"{}\"", file.etag())),
            ("x-linked-size", file.size.to_string()),
        ];
        for (name, value) in linked {
            set(&mut response, HeaderName::from_static(name), &value);
        }
    }
    if let Some(hash) = &file.xet_hash {
        set(&mut response, HeaderName::from_static("x-xet-hash"), hash);
        let endpoint = &call.state.endpoint;
        let auth = format!(
            "<{endpoint}/api/models/{}/xet-read-token/{sha}>; rel=\"xet-auth\"",
            target.id
        );
        set(&mut response, http::header::LINK, &auth);
    }
    if call.head.method == Method::HEAD {
        *response.body_mut() = full("");
    }
    Ok(response)
}

/// A small file itself.
pub(super) fn cached(
    call: &Call<'_>,
    target: &Target,
    sha: &str,
    files: &Files,
) -> Result<Response<Body>, Refused> {
    let file = find(files, target, sha)?;
    let mut response = serve(&file.content, call.head);
    set(&mut response, ETAG, &format!("\"{}\"", file.etag()));
    commit(&mut response, sha);
    Ok(response)
}

fn commit(response: &mut Response<Body>, sha: &str) {
    set(response, HeaderName::from_static("x-repo-commit"), sha);
}
