//! What was asked of an origin and what it sent.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::header::AUTHORIZATION;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};

use crate::fault::Origin;
use crate::range::Asked;

/// One request, as it came in, and how much of an answer it got.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Which listener it reached.
    pub origin: Origin,
    /// In capitals.
    pub method: String,
    /// As sent, still percent-encoded.
    pub path: String,
    /// As sent, without the `?`; empty if there was none.
    pub query: String,
    /// First and last byte asked for. An open end is the last byte sent, or `u64::MAX` if none was.
    pub range: Option<(u64, u64)>,
    /// The whole header, scheme included.
    pub authorization: Option<String>,
    /// All headers, names in lower case; a repeated header keeps its last value.
    pub headers: BTreeMap<String, String>,
    /// 0 while the answer has not begun.
    pub status: u16,
    /// Bytes of body handed to the socket; what the client read may be less.
    pub bytes_sent: u64,
    /// Since the origin started.
    pub at: Duration,
}

impl Request {
    /// The path with its percent-encoding undone.
    pub fn decoded_path(&self) -> String {
        percent_decode_str(&self.path)
            .decode_utf8_lossy()
            .into_owned()
    }

    /// A header by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// One line of the log, which grows while the answer is sent.
#[derive(Debug)]
pub(crate) struct Entry(Mutex<Request>);

impl Entry {
    pub(crate) fn update(&self, change: impl FnOnce(&mut Request)) {
        change(&mut lock(&self.0));
    }
}

#[derive(Debug, Default)]
struct Lines {
    entries: Vec<Arc<Entry>>,
    in_flight: BTreeMap<Origin, (usize, usize)>,
}

/// The requests of one stand-in, in the order they came in.
#[derive(Debug)]
pub(crate) struct Log {
    started: Instant,
    lines: Mutex<Lines>,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            lines: Mutex::default(),
        }
    }

    pub(crate) fn open(&self, origin: Origin, head: &http::request::Parts) -> Arc<Entry> {
        let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into();
        let entry = Arc::new(Entry(Mutex::new(Request {
            origin,
            method: head.method.to_string(),
            path: head.uri.path().to_owned(),
            query: head.uri.query().unwrap_or_default().to_owned(),
            range: Asked::parse(&head.headers).map(Asked::bounds),
            authorization: head.headers.get(AUTHORIZATION).map(text),
            headers: head
                .headers
                .iter()
                .map(|(name, value)| (name.to_string(), text(value)))
                .collect(),
            status: 0,
            bytes_sent: 0,
            at: self.started.elapsed(),
        })));
        lock(&self.lines).entries.push(entry.clone());
        entry
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        let entries = lock(&self.lines).entries.clone();
        entries.iter().map(|entry| lock(&entry.0).clone()).collect()
    }

    pub(crate) fn clear(&self) {
        let mut lines = lock(&self.lines);
        lines.entries.clear();
        for (now, most) in lines.in_flight.values_mut() {
            *most = *now;
        }
    }

    /// Bytes of body sent with 200 or 206 for paths that contain `path`.
    pub(crate) fn bytes_sent(&self, origin: Option<Origin>, path: &str) -> u64 {
        self.requests()
            .iter()
            .filter(|request| origin.is_none_or(|origin| origin == request.origin))
            .filter(|request| matches!(request.status, 200 | 206))
            .filter(|request| request.decoded_path().contains(path))
            .map(|request| request.bytes_sent)
            .sum()
    }

    /// Bytes of body sent with 200 or 206 for this very path, as it stands in the request line.
    pub(crate) fn bytes_of(&self, path: &str) -> u64 {
        let lines = lock(&self.lines);
        let requests = lines.entries.iter().map(|entry| lock(&entry.0));
        requests
            .filter(|request| request.path == path && matches!(request.status, 200 | 206))
            .map(|request| request.bytes_sent)
            .sum()
    }

    /// The most requests of `origin` that were answered at the same time.
    pub(crate) fn most_in_flight(&self, origin: Origin) -> usize {
        lock(&self.lines)
            .in_flight
            .get(&origin)
            .map_or(0, |(_, most)| *most)
    }
}

/// Counts a request as in flight until dropped.
#[derive(Debug)]
pub(crate) struct InFlight {
    log: Arc<Log>,
    origin: Origin,
}

impl InFlight {
    pub(crate) fn new(log: &Arc<Log>, origin: Origin) -> Self {
        let mut lines = lock(&log.lines);
        let (now, most) = lines.in_flight.entry(origin).or_default();
        *now += 1;
        *most = (*most).max(*now);
        Self {
            log: log.clone(),
            origin,
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some((now, _)) = lock(&self.log.lines).in_flight.get_mut(&self.origin) {
            *now -= 1;
        }
    }
}

/// Locks even after a panic elsewhere: a test that failed must still be able to print the log.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
