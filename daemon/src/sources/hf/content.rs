//! A file's bytes: where they lie, and ranged reads from there.
//!
//! A file in LFS lies at a CDN, at an address that the Hub signs for a few minutes or hours. It is
//! asked for once and used by all who read the file, until the CDN refuses it; then it is asked for
//! again, once for all of them. The token goes to the Hub only.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::header::{CONTENT_ENCODING, HeaderMap, HeaderValue, LOCATION, RANGE};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::OnceCell;
use tokio::time::timeout;
use url::Url;
use weightd_core::model::{RelPath, Revision};
use weightd_core::source::{ByteStream, RemoteFile, SourceError};

use super::body::body;
use super::hub::{Ask, Hub, host};
use super::limit::{Quota, retry_after};
use super::refusal::{Answer, header, no_answer, passing, refusal, unreachable};

/// How many addresses one read tries. The second is for one that expired; the third for one that
/// expired again while the read waited for its turn.
const ADDRESSES: u32 = 3;

/// How many origins one request is sent on to.
const ORIGINS: u32 = 3;

/// After so many answers with wrong ranges, a file is read without.
const RANGE_FAULTS: u32 = 3;

/// The files that were read from, by path.
#[derive(Default)]
pub(super) struct Files(Mutex<HashMap<RelPath, Arc<FileState>>>);

#[derive(Default)]
struct FileState {
    address: Mutex<Arc<Generation>>,
    range_faults: AtomicU32,
}

/// One answer to "where does the file lie", shared by all who ask while it holds.
#[derive(Default)]
struct Generation(OnceCell<Result<Address, SourceError>>);

/// Where a file's bytes lie. Never printed: a signed address is a secret.
#[derive(Clone)]
enum Address {
    /// At the Hub itself, which wants the token.
    Hub(Url),
    /// Elsewhere, where the token must not go.
    Elsewhere(Url),
}

impl Address {
    fn host(&self) -> String {
        match self {
            Self::Hub(url) | Self::Elsewhere(url) => host(url),
        }
    }
}

impl Files {
    fn state(&self, path: &RelPath) -> Arc<FileState> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(files.entry(path.clone()).or_default())
    }
}

impl FileState {
    /// The generation to use now; a new one if the last could not be had.
    fn generation(&self) -> Arc<Generation> {
        let mut current = self.address.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(current.0.get(), Some(Err(_))) {
            *current = Arc::default();
        }
        Arc::clone(&current)
    }

    /// Drops `refused`, unless someone else has done so already.
    fn expire(&self, refused: &Arc<Generation>) {
        let mut current = self.address.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&current, refused) {
            *current = Arc::default();
        }
    }
}

/// The bytes `range` of `file` at `revision`.
pub(super) async fn read(
    hub: &Hub,
    files: &Files,
    revision: &Revision,
    file: &RemoteFile,
    range: Range<u64>,
) -> Result<ByteStream, SourceError> {
    let what = format!("`{}` of {}", file.path, hub.model);
    let reader = Reader {
        hub,
        revision,
        file,
        range,
        what,
        state: files.state(&file.path),
    };
    reader.read().await
}

/// May this requester read `file`? Asks for its address, and not for its bytes.
pub(super) async fn probe(hub: &Hub, revision: &Revision, path: &str) -> Result<(), SourceError> {
    let ask = Ask::question(hub, Quota::Resolvers);
    let response = head(hub, revision, path, ask).await?;
    // A redirect may lead to a login page: only the Hub's own mark proves that it is the file.
    let marked = match header(response.headers(), "x-repo-commit") {
        Some(commit) => commit == revision.as_str(),
        None => *response.url() == hub.file_url(revision, path) && response.status().is_success(),
    };
    let granted = response.status().is_success() || response.status().is_redirection();
    match (granted, marked) {
        (true, true) => Ok(()),
        (true, false) => Err(hub.nonsense(format!(
            "{} does not say which commit it answers for",
            hub.host()
        ))),
        (false, _) => Err(refusal(hub, &hub.model.to_string(), &Answer::of(&response))),
    }
}

async fn head(
    hub: &Hub,
    revision: &Revision,
    path: &str,
    ask: Ask,
) -> Result<Response, SourceError> {
    let url = hub.file_url(revision, path);
    let (client, headers) = (&hub.clients.api, HeaderMap::new());
    hub.send(client, Method::HEAD, &url, &headers, ask).await
}

/// Where a redirect leads, if we go there.
fn target(from: &Url, location: &str) -> Result<Url, String> {
    let host = host(from);
    let Ok(url) = from.join(location) else {
        return Err(format!("{host} redirects to no address"));
    };
    let (old, new) = (from.scheme(), url.scheme());
    if new == "https" || new == "http" && old == "http" {
        return Ok(url);
    }
    Err(format!(
        "{host} redirects from {old} to {new}, which is refused"
    ))
}

struct Reader<'a> {
    hub: &'a Hub,
    revision: &'a Revision,
    file: &'a RemoteFile,
    range: Range<u64>,
    what: String,
    state: Arc<FileState>,
}

impl Reader<'_> {
    async fn read(self) -> Result<ByteStream, SourceError> {
        let Range { start, end } = self.range;
        if start > end || end > self.file.size {
            return Err(self.invalid(format!("it has no bytes {start} to {end}")));
        }
        if start == end {
            return Ok(Box::pin(futures::stream::empty()));
        }
        let mut attempt = 1;
        loop {
            let generation = self.state.generation();
            let address = generation.0.get_or_init(|| self.locate()).await.clone()?;
            let (response, address) = self.get(address).await?;
            let status = response.status();
            let signed = matches!(address, Address::Elsewhere(_));
            // Some stores answer 400 to a signature that has expired.
            if !signed || !matches!(status.as_u16(), 400 | 401 | 403) {
                return self.accept(response, &address);
            }
            if attempt == ADDRESSES {
                return Err(self.refused(&address, status));
            }
            attempt += 1;
            tracing::debug!(path = %self.file.path, %status, "signed address refused");
            self.state.expire(&generation);
        }
    }

    /// Asks the Hub where the file lies, and checks that it is still the file that was listed.
    async fn locate(&self) -> Result<Address, SourceError> {
        let asked = self.hub.file_url(self.revision, self.file.path.as_str());
        // Small files lie at the Hub itself: the read will see, with one request less.
        if self.file.claims.sha256.is_none() {
            return Ok(Address::Hub(asked));
        }
        let ask = Ask::read(self.hub.timing().repeats);
        let response = head(self.hub, self.revision, self.file.path.as_str(), ask).await?;
        self.check(&response)?;
        if response.status().is_success() {
            // Not where redirects led to: that address may expire.
            return Ok(Address::Hub(asked));
        }
        self.redirected(&response).map(Address::Elsewhere)
    }

    /// Where an answer leads to: another origin, as redirects within one were followed.
    fn redirected(&self, response: &Response) -> Result<Url, SourceError> {
        let from = response.url();
        let location = response.headers().get(LOCATION);
        let location = location.filter(|_| response.status().is_redirection());
        let Some(location) = location.and_then(|text| text.to_str().ok()) else {
            return Err(refusal(self.hub, &self.what, &Answer::of(response)));
        };
        target(from, location).map_err(|detail| self.invalid(detail))
    }

    /// Does the Hub still mean the file that it listed?
    fn check(&self, response: &Response) -> Result<(), SourceError> {
        let headers = response.headers();
        let changed = |detail: String| {
            Err(SourceError::Changed {
                what: self.what.clone(),
                detail,
            })
        };
        match header(headers, "x-repo-commit") {
            Some(commit) if commit != self.revision.as_str() => {
                return changed("the Hub answers for another commit".to_owned());
            }
            _ => {}
        }
        let tag = header(headers, "x-linked-etag").unwrap_or_default();
        let tag = tag.trim_start_matches("W/").trim_matches('"');
        if let (Some(claimed), Ok(linked)) = (self.file.claims.sha256, tag.parse())
            && claimed != linked
        {
            return changed(format!("its SHA-256 is now {linked}"));
        }
        match header(headers, "x-linked-size") {
            Some(size) if size.parse() != Ok(self.file.size) => {
                changed(format!("it was listed with {} bytes", self.file.size))
            }
            _ => Ok(()),
        }
    }

    /// Asks for the range. Returns where the answer came from, too.
    async fn get(&self, address: Address) -> Result<(Response, Address), SourceError> {
        let url = match address {
            Address::Elsewhere(url) => return self.get_elsewhere(url).await,
            Address::Hub(url) => url,
        };
        let (client, range) = (&self.hub.clients.content, self.range_header());
        let ask = Ask::read(0);
        let response = self
            .hub
            .send(client, Method::GET, &url, &range, ask)
            .await?;
        self.check(&response)?;
        if response.status().is_redirection() {
            return self.get_elsewhere(self.redirected(&response)?).await;
        }
        Ok((response, Address::Hub(url)))
    }

    /// Asks another origin for the range, without the token, wherever that leads to.
    async fn get_elsewhere(&self, mut url: Url) -> Result<(Response, Address), SourceError> {
        let limit = self.hub.timing().header;
        for _ in 0..ORIGINS {
            let request = self.hub.clients.content.get(url.clone());
            let request = request.headers(self.range_header()).send();
            let response = match timeout(limit, request).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => return Err(unreachable(&host(&url), error)),
                Err(_) => return Err(no_answer(&host(&url), limit)),
            };
            if !response.status().is_redirection() {
                return Ok((response, Address::Elsewhere(url)));
            }
            url = self.redirected(&response)?;
        }
        Err(self.invalid(format!("{} redirects without end", host(&url))))
    }

    fn whole(&self) -> bool {
        self.range == (0..self.file.size)
    }

    /// A whole file is asked for without a range: that always works.
    fn range_header(&self) -> HeaderMap {
        if self.whole() {
            return HeaderMap::new();
        }
        let text = format!("bytes={}-{}", self.range.start, self.range.end - 1);
        let value = HeaderValue::try_from(text).expect("digits make a header");
        HeaderMap::from_iter([(RANGE, value)])
    }

    /// Takes an answer for what it is. Anything but the very bytes asked for is an error.
    fn accept(&self, response: Response, address: &Address) -> Result<ByteStream, SourceError> {
        let host = address.host();
        let encoded = response.headers().get(CONTENT_ENCODING);
        if encoded.is_some_and(|encoding| encoding != "identity") {
            return Err(self.invalid(format!(
                "{host} sends it compressed, which was not asked for"
            )));
        }
        let asked = self.range.end - self.range.start;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = header(response.headers(), "content-range");
                let length = response.content_length();
                if !self.range_fits(range.as_deref()) || length.is_some_and(|bytes| bytes != asked)
                {
                    return Err(self.range_fault(&host, range.as_deref().unwrap_or("no range")));
                }
            }
            StatusCode::OK if self.range.start > 0 => return Err(self.no_ranges()),
            StatusCode::OK => match response.content_length() {
                Some(length) if length != self.file.size => {
                    return Err(self.unavailable(format!(
                        "{host} sends {length} bytes, the Hub lists {}",
                        self.file.size
                    )));
                }
                None if !self.whole() => return Err(self.no_ranges()),
                _ => {}
            },
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return Err(self.range_fault(&host, "no such range"));
            }
            status => return Err(self.failed(address, status, &response)),
        }
        Ok(body(response, asked, self.what.clone(), host))
    }

    /// Is `Content-Range` the range asked for, of a file of the size listed?
    fn range_fits(&self, text: Option<&str>) -> bool {
        let parse = || {
            let (range, total) = text?.strip_prefix("bytes ")?.split_once('/')?;
            let (first, last) = range.split_once('-')?;
            let total = match total {
                "*" => self.file.size,
                total => total.parse().ok()?,
            };
            Some((first.parse().ok()?, last.parse().ok()?, total))
        };
        parse() == Some((self.range.start, self.range.end - 1, self.file.size))
    }

    fn failed(&self, address: &Address, status: StatusCode, response: &Response) -> SourceError {
        let host = address.host();
        match address {
            Address::Hub(_) => refusal(self.hub, &self.what, &Answer::of(response)),
            Address::Elsewhere(_) if passing(status) || status.as_u16() >= 404 => {
                SourceError::Unavailable {
                    what: self.what.clone(),
                    detail: format!("{host} answered {status}"),
                    retry_after: retry_after(response.headers()),
                }
            }
            Address::Elsewhere(_) => self.invalid(format!("{host} answered {status}")),
        }
    }

    /// Fresh addresses are refused, too: asking on is no use.
    fn refused(&self, address: &Address, status: StatusCode) -> SourceError {
        let host = address.host();
        SourceError::Denied {
            what: self.what.clone(),
            detail: format!("{host} answered {status} to an address that the Hub has just given"),
            hint: Some(format!(
                "check this machine's clock, and any proxy between it and {host}"
            )),
        }
    }

    /// A range was answered wrongly. Once may be bad luck; then the file is better read whole.
    fn range_fault(&self, host: &str, got: &str) -> SourceError {
        if self.whole()
            || self.state.range_faults.fetch_add(1, Ordering::Relaxed) + 1 < RANGE_FAULTS
        {
            let Range { start, end } = &self.range;
            return self.unavailable(format!(
                "{host} answered with {} to a request for bytes {start} to {end}",
                got.escape_debug()
            ));
        }
        self.no_ranges()
    }

    fn no_ranges(&self) -> SourceError {
        SourceError::NoRanges {
            what: self.what.clone(),
        }
    }

    fn unavailable(&self, detail: String) -> SourceError {
        SourceError::Unavailable {
            what: self.what.clone(),
            detail,
            retry_after: None,
        }
    }

    fn invalid(&self, detail: String) -> SourceError {
        SourceError::Invalid {
            what: self.what.clone(),
            detail,
            hint: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_never_leads_out_of_tls() {
        let tls: Url = "https://hub.example/a/b".parse().unwrap();
        let plain: Url = "http://hub.example/a/b".parse().unwrap();
        for location in [
            "http://cdn.example/x",
            "ftp://cdn.example/x",
            "file:///x",
            "data:x",
        ] {
            let detail = target(&tls, location).unwrap_err();
            assert!(!detail.contains("cdn.example"), "{detail}");
        }
        assert!(target(&plain, "file:///x").is_err());
        assert!(target(&plain, "http://cdn.example/x").is_ok());
        assert!(target(&tls, "https://cdn.example/x").is_ok());
        let relative = target(&tls, "/c?d").unwrap();
        assert_eq!(relative.as_str(), "https://hub.example/c?d");
    }
}
