//! The files of a repository at a commit: the tree API, page by page.

use std::collections::HashSet;

use reqwest::header::{HeaderMap, LINK};
use serde::Deserialize;
use url::Url;
use weightd_core::digest::{Claims, Digest};
use weightd_core::model::Revision;
use weightd_core::source::SourceError;

use super::hub::Hub;

/// The Hub advises at most 100,000 files in a repository. Beyond this it is a trick.
const FILES: usize = 1_000_000;

/// A page may hold few entries, but not so few that this is reached.
const PAGES: usize = 10_000;

/// One file, as the tree API tells it.
#[derive(Debug)]
pub(super) struct TreeFile {
    pub(super) path: String,
    pub(super) size: u64,
    pub(super) claims: Claims,
    pub(super) xet_hash: Option<String>,
}

/// An entry on the wire. For a file in LFS, `oid` and `size` at the top are not those of its bytes.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    oid: String,
    #[serde(default)]
    size: u64,
    path: String,
    lfs: Option<Lfs>,
    #[serde(rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

/// All files at `revision`.
pub(super) async fn files(hub: &Hub, revision: &Revision) -> Result<Vec<TreeFile>, SourceError> {
    let mut files = Vec::new();
    let mut next = Some(hub.tree_url(revision));
    let mut seen = HashSet::new();
    while let Some(url) = next {
        if seen.len() == PAGES || !seen.insert(url.clone()) {
            return Err(hub.nonsense("its list of files never ends".to_owned()));
        }
        let (page, following) = page(hub, &url).await?;
        files.extend(page);
        if files.len() > FILES {
            return Err(hub.nonsense(format!("it lists more than {FILES} files")));
        }
        next = following;
    }
    Ok(files)
}

/// Any one file at `revision` whose content is guarded, if there is one on the first page: rather a
/// weights file than a model card, which the Hub may show to everyone.
pub(super) async fn any_file(
    hub: &Hub,
    revision: &Revision,
) -> Result<Option<TreeFile>, SourceError> {
    let (files, _) = page(hub, &hub.tree_url(revision)).await?;
    let public = |file: &TreeFile| file.path.ends_with(".md") || file.path.starts_with('.');
    let best = |file: &TreeFile| (file.claims.sha256.is_none(), public(file));
    Ok(files.into_iter().min_by_key(best))
}

async fn page(hub: &Hub, url: &Url) -> Result<(Vec<TreeFile>, Option<Url>), SourceError> {
    let (body, headers) = hub.call(url).await?;
    let entries: Vec<Entry> = serde_json::from_slice(&body)
        .map_err(|error| hub.nonsense(format!("{} sends no list of files: {error}", hub.host())))?;
    let files = entries.into_iter().filter(|entry| entry.kind == "file");
    let files = files.map(|entry| file(hub, entry));
    Ok((
        files.collect::<Result<_, _>>()?,
        next_page(hub, url, &headers)?,
    ))
}

fn file(hub: &Hub, entry: Entry) -> Result<TreeFile, SourceError> {
    let bad = |error: weightd_core::digest::ParseDigestError| {
        hub.nonsense(format!(
            "it lists `{}` with a hash that is none: {error}",
            entry.path.escape_debug()
        ))
    };
    let mut claims = Claims::default();
    let mut size = entry.size;
    match &entry.lfs {
        Some(lfs) => {
            claims.sha256 = Some(lfs.oid.parse().map_err(bad)?);
            size = lfs.size;
        }
        None => claims.git_oid = Some(entry.oid.parse().map_err(bad)?),
    }
    // A Xet hash has the form of a SHA-256. It is only recorded, so a strange one does no harm.
    let xet_hash = entry.xet_hash.filter(|hash| hash.parse::<Digest>().is_ok());
    Ok(TreeFile {
        path: entry.path,
        size,
        claims,
        xet_hash,
    })
}

/// The `rel="next"` of the `Link` headers. It gets the token, so it must not lead elsewhere.
fn next_page(hub: &Hub, page: &Url, headers: &HeaderMap) -> Result<Option<Url>, SourceError> {
    let texts = headers.get_all(LINK).iter();
    let Some(link) = texts
        .filter_map(|text| text.to_str().ok())
        .find_map(next_link)
    else {
        return Ok(None);
    };
    let url = page.join(link).ok().filter(|url| hub.owns(url));
    match url {
        Some(url) => Ok(Some(url)),
        None => Err(hub.nonsense(format!(
            "{} continues its list of files at another origin, which is refused",
            hub.host()
        ))),
    }
}

/// Source: RFC 8288, section 3: `<target>; rel="next", <target>; rel=…`.
fn next_link(text: &str) -> Option<&str> {
    let mut rest = text;
    while let Some((_, after)) = rest.split_once('<') {
        let (target, after) = after.split_once('>')?;
        let parameters = after.split_once('<').map_or(after, |(before, _)| before);
        let next = parameters.split([';', ',']).any(|parameter| {
            let (key, value) = parameter.split_once('=').unwrap_or_default();
            let mut relations = value.trim().trim_matches('"').split(' ');
            key.trim().eq_ignore_ascii_case("rel") && relations.any(|relation| relation == "next")
        });
        if next {
            return Some(target);
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_found_among_links() {
        assert_eq!(
            next_link("<https://h/x?a=1,2>; rel=\"next\""),
            Some("https://h/x?a=1,2")
        );
        assert_eq!(
            next_link("</a>; rel=prev, </b>; title=x; rel=next"),
            Some("/b")
        );
        assert_eq!(next_link("</a>; rel=\"last next\""), Some("/a"));
        assert_eq!(next_link("</a>; rel=prev"), None);
        assert_eq!(next_link("</a; rel=next"), None);
        assert_eq!(next_link(""), None);
    }
}
