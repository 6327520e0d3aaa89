//! The listing of a commit's files, in pages.

use std::collections::BTreeMap;

use http::Response;
use http::header::{CONTENT_TYPE, LINK};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};

use super::access::Refused;
use super::file::{File, Files};
use super::model::COMMITTED;
use super::routes::{Call, Target, pairs};
use crate::content::Body;
use crate::watch;

fn file_entry(path: &str, file: &File, sha: &str, expand: bool) -> Value {
    let mut entry = json!({"type": "file", "oid": file.oid, "size": file.size, "path": path});
    if let Some(lfs) = &file.lfs {
        entry["lfs"] = json!({
            "oid": lfs.sha256,
            "size": file.size,
            "pointerSize": lfs.pointer_size,
        });
    }
    if let Some(hash) = &file.xet_hash {
        entry["xetHash"] = json!(hash);
    }
    if expand {
        entry["lastCommit"] = json!({"id": sha, "title": "Upload model", "date": COMMITTED});
    }
    entry
}

fn folder_entry(path: &str) -> Value {
    let oid = hex::encode(Sha1::digest(format!("tree {path}")));
    json!({"type": "directory", "oid": oid, "size": 0, "path": path})
}

/// Every entry below `folder` (all of them if it is empty) by its path.
fn entries(
    files: &Files,
    folder: &str,
    recursive: bool,
    expand: Option<&str>,
) -> BTreeMap<String, Value> {
    let prefix = match folder {
        "" => String::new(),
        folder => format!("{folder}/"),
    };
    let mut entries = BTreeMap::new();
    for (path, file) in &files.0 {
        let Some(rest) = path.strip_prefix(&prefix) else {
            continue;
        };
        let depth = if recursive { usize::MAX } else { 1 };
        for (at, _) in rest.match_indices('/').take(depth) {
            // A path that begins with a slash is a lie about a file, not a folder without a name.
            if at > 0 {
                let folder = &path[..prefix.len() + at];
                entries.insert(folder.to_owned(), folder_entry(folder));
            }
        }
        if recursive || !rest.contains('/') {
            let sha = expand.unwrap_or_default();
            let entry = file_entry(path, file, sha, expand.is_some());
            entries.insert(path.clone(), entry);
        }
    }
    entries
}

pub(super) fn tree(
    call: &Call<'_>,
    target: &Target,
    sha: &str,
    files: &Files,
) -> Result<Response<Body>, Refused> {
    let folder = target.path.trim_matches('/');
    let expand = call.flag("expand").then_some(sha);
    let all = entries(files, folder, call.flag("recursive"), expand);
    if all.is_empty() && !folder.is_empty() {
        return Err(Refused::NoEntry {
            sha: sha.to_owned(),
            path: folder.to_owned(),
        });
    }
    let asked = call.query("limit").and_then(|limit| limit.parse().ok());
    let page_size = call.state.config.page_size;
    let page_size = asked.map_or(page_size, |asked: usize| asked.clamp(1, page_size));
    let after = match call.query("cursor") {
        None => None,
        Some(cursor) => Some(decode_cursor(&cursor).ok_or(Refused::BadRequest)?),
    };
    let mut page: Vec<(&String, &Value)> = all
        .iter()
        .filter(|(path, _)| after.as_ref().is_none_or(|after| *path > after))
        .take(page_size + 1)
        .collect();
    let more = page.len() > page_size;
    page.truncate(page_size);
    let body: Vec<&Value> = page.iter().map(|(_, entry)| *entry).collect();
    let mut response = watch::json(&body);
    if let (true, Some((last, _))) = (more, page.last()) {
        let link = format!("<{}>; rel=\"next\"", next_page(call, last));
        watch::set(&mut response, LINK, &link);
    }
    Ok(response)
}

/// Absolute, with all that the first request asked for, as the Hub's is.
fn next_page(call: &Call<'_>, last: &str) -> String {
    let query = call.head.uri.query().unwrap_or_default();
    let kept = query
        .split('&')
        .filter(|pair| !pair.is_empty() && !pair.starts_with("cursor="));
    let cursor = format!("cursor={}", hex::encode(last));
    let query: Vec<&str> = kept.chain([cursor.as_str()]).collect();
    let (endpoint, path) = (&call.state.endpoint, call.head.uri.path());
    format!("{endpoint}{path}?{}", query.join("&"))
}

fn decode_cursor(cursor: &str) -> Option<String> {
    String::from_utf8(hex::decode(cursor).ok()?).ok()
}

/// The entries of the paths asked for; those that do not exist are left out.
pub(super) fn paths(call: &Call<'_>, files: &Files) -> Result<Response<Body>, Refused> {
    let kind = call.head.headers.get(CONTENT_TYPE);
    let is_json = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    let asked = if is_json {
        let body: Value = serde_json::from_slice(call.body).map_err(|_| Refused::BadRequest)?;
        match &body["paths"] {
            Value::String(path) => vec![path.clone()],
            Value::Array(paths) => paths
                .iter()
                .filter_map(|path| path.as_str().map(str::to_owned))
                .collect(),
            _ => return Err(Refused::BadRequest),
        }
    } else {
        pairs(&String::from_utf8_lossy(call.body))
            .into_iter()
            .filter_map(|(key, value)| (key == "paths").then_some(value))
            .collect()
    };
    let all = entries(files, "", true, None);
    let found: Vec<&Value> = asked.iter().filter_map(|path| all.get(path)).collect();
    Ok(watch::json(&found))
}
