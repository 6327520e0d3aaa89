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
    let mut pages = Pages::new(hub, revision);
    while let Some(page) = pages.next().await? {
        files.extend(page);
        if files.len() > FILES {
            return Err(hub.nonsense(format!("it lists more than {FILES} files")));
        }
    }
    Ok(files)
}

/// Any one file at `revision` whose content is guarded, or else any; `None` if there are no files.
pub(super) async fn any_file(
    hub: &Hub,
    revision: &Revision,
) -> Result<Option<TreeFile>, SourceError> {
    let mut pages = Pages::new(hub, revision);
    let mut any = None;
    while let Some(page) = pages.next().await? {
        let best = |file: &TreeFile| (is_public(file), file.claims.sha256.is_none());
        let found = page.into_iter().min_by_key(best);
        if found.as_ref().is_some_and(|file| !is_public(file)) {
            return Ok(found);
        }
        any = any.or(found);
    }
    Ok(any)
}

/// What the Hub may show to everyone, also in a gated repository: it proves nothing.
fn is_public(file: &TreeFile) -> bool {
    let name = file.path.rsplit('/').next().unwrap_or_default();
    matches!(name, "README.md" | ".gitattributes") || name.starts_with("LICENSE")
}

/// The pages of a list, which must end.
struct Pages<'a> {
    hub: &'a Hub,
    next: Option<Url>,
    seen: HashSet<Url>,
}

impl<'a> Pages<'a> {
    fn new(hub: &'a Hub, revision: &Revision) -> Self {
        Self {
            hub,
            next: Some(hub.tree_url(revision)),
            seen: HashSet::new(),
        }
    }

    async fn next(&mut self) -> Result<Option<Vec<TreeFile>>, SourceError> {
        let Some(url) = self.next.take() else {
            return Ok(None);
        };
        if self.seen.len() == PAGES || !self.seen.insert(url.clone()) {
            let detail = "its list of files never ends".to_owned();
            return Err(self.hub.nonsense(detail));
        }
        let (files, next) = page(self.hub, &url).await?;
        self.next = next;
        Ok(Some(files))
    }
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
        let (path, error) = (short(&entry.path), short(&error.to_string()));
        hub.nonsense(format!(
            "it lists `{path}` with a hash that is none: {error}"
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

/// A foreign text, fit for a terminal and a log.
fn short(text: &str) -> String {
    text.escape_debug().take(200).collect()
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
