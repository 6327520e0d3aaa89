//! What the API says of a whole repo.

use std::time::{SystemTime, UNIX_EPOCH};

use http::Response;
use http::header::HeaderName;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::file::{File, Files};
use super::repo::{Gated, Repo};
use super::routes::Call;
use crate::content::Body;
use crate::watch;

/// When every commit was made; nothing that downloads a model depends on it.
pub(super) const COMMITTED: &str = "2026-01-02T03:04:05.000Z";

pub(super) fn model(call: &Call<'_>, repo: &Repo, sha: &str, files: &Files) -> Response<Body> {
    let blobs = call.flag("blobs");
    let siblings: Vec<Value> = files
        .0
        .iter()
        .map(|(path, file)| sibling(path, file, blobs))
        .collect();
    let gated = match repo.gated {
        Gated::No => json!(false),
        Gated::Auto => json!("auto"),
        Gated::Manual => json!("manual"),
    };
    let id = repo.id();
    watch::json(&json!({
        "_id": hex::encode(&Sha256::digest(id)[..12]),
        "id": id,
        "modelId": id,
        "author": id.split_once('/').map(|(owner, _)| owner),
        "sha": sha,
        "lastModified": COMMITTED,
        "createdAt": COMMITTED,
        "private": repo.private,
        "gated": gated,
        "disabled": repo.disabled,
        "downloads": 0,
        "likes": 0,
        "tags": ["safetensors"],
        "siblings": siblings,
    }))
}

fn sibling(path: &str, file: &File, blobs: bool) -> Value {
    let mut sibling = json!({"rfilename": path});
    if blobs {
        sibling["blobId"] = json!(file.oid);
        sibling["size"] = json!(file.size);
        // Called `oid` in the tree, `sha256` here.
        if let Some(lfs) = &file.lfs {
            sibling["lfs"] = json!({
                "sha256": lfs.sha256,
                "size": file.size,
                "pointerSize": lfs.pointer_size,
            });
        }
    }
    sibling
}

pub(super) fn refs(call: &Call<'_>, repo: &Repo) -> Response<Body> {
    watch::json(&repo.refs(call.flag("include_prs")))
}

/// A token for a Xet server, which the stand-in has not got.
pub(super) fn xet_token(call: &Call<'_>) -> Response<Body> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let expires = now.map_or(0, |now| now.as_secs()) + 3600;
    let url = format!("{}/xet", call.state.cdn_endpoint);
    let token = "xet-stand-in";
    let mut response = watch::json(&json!({"casUrl": url, "accessToken": token, "exp": expires}));
    let headers = [
        ("x-xet-cas-url", url.as_str()),
        ("x-xet-access-token", token),
        ("x-xet-token-expiration", &expires.to_string()),
    ];
    for (name, value) in headers {
        watch::set(&mut response, HeaderName::from_static(name), value);
    }
    response
}
