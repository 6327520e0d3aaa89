//! Faults: plain data that says which requests go wrong, how, and how often.
//!
//! As JSON, for `POST /_standin/faults`:
//!
//! ```json
//! {"on": {"origin": "cdn", "path_contains": ".safetensors"}, "times": {"count": 2},
//!  "what": {"cut": {"after_bytes": 1000}}}
//! ```

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::log::lock;

/// A listener of a stand-in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The Hub: its API and small files.
    Hub,
    /// The Hub's CDN: LFS files.
    Cdn,
    /// The S3 server.
    S3,
}

/// Which requests a fault hits; what is `None` matches every request.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Match {
    /// The listener.
    pub origin: Option<Origin>,
    /// In capitals.
    pub method: Option<String>,
    /// Part of the decoded path. A CDN path ends in the file's own path.
    pub path_contains: Option<String>,
    /// First and last byte; hits requests that ask for at least one byte of it.
    pub range: Option<(u64, u64)>,
    /// Only once this many bytes have been sent for the very same path.
    pub after_bytes: Option<u64>,
    /// Requests that match but are let through first.
    pub skip: usize,
}

/// How often a fault happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Times {
    /// So many times, then no more.
    Count(usize),
    /// Every time.
    Forever,
}

impl From<usize> for Times {
    fn from(count: usize) -> Self {
        Self::Count(count)
    }
}

/// What goes wrong. Those about the body hit only a GET answered with 200 or 206.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// No answer, not even a status, while the connection stays open.
    NoAnswer,
    /// Nothing more after this many bytes of body, while the connection stays open.
    Stall {
        /// Bytes of this body.
        after_bytes: u64,
    },
    /// The connection closes after this many bytes of body.
    Cut {
        /// Bytes of this body.
        after_bytes: u64,
    },
    /// The body trickles.
    Slow {
        /// Of this one body.
        bytes_per_second: u64,
    },
    /// One byte is changed; hits only answers that hold it.
    Corrupt {
        /// Offset in the whole file, not in the body.
        at_byte: u64,
        /// What the byte is xored with; 0 changes nothing.
        xor: u8,
    },
    /// Another status in place of the answer.
    Status {
        /// Such as 503.
        status: u16,
        /// Names and values.
        #[serde(default)]
        headers: Vec<(String, String)>,
        /// As text.
        #[serde(default)]
        body: String,
    },
    /// The CDN's 403 for a URL whose time is over. Never hits another origin.
    ExpiredUrl,
    /// A body longer or shorter than its `Content-Range` says, with a `Content-Length` to match.
    WrongLength {
        /// Bytes more (zeros) or fewer.
        by: i64,
    },
    /// The `Content-Range` of a 206 names bytes that are not those of the body.
    ShiftedRange {
        /// Bytes added to its first and last byte.
        by: i64,
    },
    /// 200 with the whole file although a range was asked for.
    IgnoreRange,
    /// A redirect to the CDN whose `X-Linked-*` headers differ from the tree.
    ChangedFile {
        /// In place of the sha256, without quotes.
        #[serde(default)]
        etag: Option<String>,
        /// In place of the size.
        #[serde(default)]
        size: Option<u64>,
    },
    /// The Hub's 429.
    RateLimit {
        /// "api", "resolvers" or "pages".
        bucket: String,
        /// Requests per window.
        quota: u64,
        /// Seconds per window; the Hub's is 300.
        window_s: u64,
        /// Seconds until the window ends.
        reset_s: u64,
        /// Seconds in a `Retry-After` header, if there is one.
        #[serde(default)]
        retry_after_s: Option<u64>,
    },
}

/// When a fault has to be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Before the request is answered.
    Request,
    /// When the answer's redirect is there.
    Redirect,
    /// When a body is about to be sent.
    Body,
}

impl FaultKind {
    fn stage(&self) -> Stage {
        match self {
            Self::NoAnswer
            | Self::Status { .. }
            | Self::ExpiredUrl
            | Self::IgnoreRange
            | Self::RateLimit { .. } => Stage::Request,
            Self::ChangedFile { .. } => Stage::Redirect,
            Self::Stall { .. }
            | Self::Cut { .. }
            | Self::Slow { .. }
            | Self::Corrupt { .. }
            | Self::WrongLength { .. }
            | Self::ShiftedRange { .. } => Stage::Body,
        }
    }
}

/// Something that goes wrong with some requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Which requests.
    #[serde(default)]
    pub on: Match,
    /// How often.
    #[serde(default = "once")]
    pub times: Times,
    /// What happens.
    pub what: FaultKind,
}

fn once() -> Times {
    Times::Count(1)
}

impl Fault {
    /// Hits the next request, whichever it is.
    pub fn new(what: FaultKind) -> Self {
        Self {
            on: Match::default(),
            times: once(),
            what,
        }
    }

    /// A bare status such as 503.
    pub fn status(status: u16) -> Self {
        Self::new(FaultKind::Status {
            status,
            headers: Vec::new(),
            body: String::new(),
        })
    }

    /// Only at this listener.
    pub fn on(mut self, origin: Origin) -> Self {
        self.on.origin = Some(origin);
        self
    }

    /// Only for this method.
    pub fn method(mut self, method: &str) -> Self {
        self.on.method = Some(method.to_owned());
        self
    }

    /// Only for decoded paths that contain `part`.
    pub fn path(mut self, part: &str) -> Self {
        self.on.path_contains = Some(part.to_owned());
        self
    }

    /// Only for requests that ask for a byte from `first` to `last`.
    pub fn range(mut self, first: u64, last: u64) -> Self {
        self.on.range = Some((first, last));
        self
    }

    /// Only once `bytes` have been sent for the same path.
    pub fn after_bytes(mut self, bytes: u64) -> Self {
        self.on.after_bytes = Some(bytes);
        self
    }

    /// Lets the first `requests` that match through.
    pub fn skip(mut self, requests: usize) -> Self {
        self.on.skip = requests;
        self
    }

    /// So many times instead of once.
    pub fn times(mut self, times: impl Into<Times>) -> Self {
        self.times = times.into();
        self
    }

    /// Every time instead of once.
    pub fn forever(self) -> Self {
        self.times(Times::Forever)
    }
}

/// What a fault can see of a request.
pub(crate) struct Probe<'a> {
    pub(crate) origin: Origin,
    pub(crate) method: &'a str,
    /// Decoded.
    pub(crate) path: &'a str,
    /// First and last byte asked for or, once known, sent.
    pub(crate) range: (u64, u64),
    pub(crate) has_range: bool,
    /// Bytes sent for this path before.
    pub(crate) bytes_sent: u64,
}

impl Fault {
    fn hits(&self, probe: &Probe<'_>, stage: Stage) -> bool {
        let (first, last) = probe.range;
        let overlaps = |from: u64, to: u64| first <= to && from <= last;
        let on = &self.on;
        let can = match &self.what {
            FaultKind::Corrupt { at_byte, .. } => overlaps(*at_byte, *at_byte),
            FaultKind::ExpiredUrl => probe.origin == Origin::Cdn,
            FaultKind::IgnoreRange | FaultKind::ShiftedRange { .. } => probe.has_range,
            _ => true,
        };
        can && self.what.stage() == stage
            && (stage != Stage::Body || probe.method == "GET")
            && on.origin.is_none_or(|origin| origin == probe.origin)
            && on
                .method
                .as_ref()
                .is_none_or(|method| method == probe.method)
            && on
                .path_contains
                .as_ref()
                .is_none_or(|part| probe.path.contains(part))
            && on.range.is_none_or(|(from, to)| overlaps(from, to))
            && on.after_bytes.is_none_or(|bytes| probe.bytes_sent >= bytes)
    }
}

#[derive(Debug, Default)]
struct Armed {
    faults: Vec<Fault>,
    fired: usize,
}

/// The faults set on one stand-in.
#[derive(Debug, Default)]
pub(crate) struct Faults(Mutex<Armed>);

impl Faults {
    pub(crate) fn add(&self, fault: Fault) {
        lock(&self.0).faults.push(fault);
    }

    pub(crate) fn clear(&self) {
        lock(&self.0).faults.clear();
    }

    pub(crate) fn fired(&self) -> usize {
        lock(&self.0).fired
    }

    /// What happens to this request, and one time less of it to come.
    pub(crate) fn take(&self, probe: &Probe<'_>, stage: Stage) -> Vec<FaultKind> {
        let mut armed = lock(&self.0);
        let mut taken = Vec::new();
        for fault in &mut armed.faults {
            if fault.times == Times::Count(0) || !fault.hits(probe, stage) {
                continue;
            }
            if fault.on.skip > 0 {
                fault.on.skip -= 1;
                continue;
            }
            if let Times::Count(left) = &mut fault.times {
                *left -= 1;
            }
            taken.push(fault.what.clone());
            // Two statuses cannot be sent: the second fault waits for the next request.
            if stage == Stage::Request && !matches!(fault.what, FaultKind::IgnoreRange) {
                break;
            }
        }
        armed.fired += taken.len();
        taken
    }
}
