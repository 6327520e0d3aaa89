//! `Range` and `Content-Range`.

use http::HeaderMap;
use http::header::{CONTENT_RANGE, RANGE};

/// What a `Range` header with one range asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    From { first: u64, last: Option<u64> },
    Suffix(u64),
}

impl Asked {
    /// `None` also for several ranges or nonsense, which RFC 9110 lets a server ignore.
    pub(crate) fn parse(headers: &HeaderMap) -> Option<Self> {
        let value = headers.get(RANGE)?.to_str().ok()?;
        let (first, last) = value.strip_prefix("bytes=")?.trim().split_once('-')?;
        if first.is_empty() {
            return Some(Self::Suffix(last.parse().ok()?));
        }
        let first = first.parse().ok()?;
        let last = match last {
            "" => None,
            last => Some(last.parse().ok().filter(|last| *last >= first)?),
        };
        Some(Self::From { first, last })
    }

    /// The first and last byte asked for; an open end is `u64::MAX`.
    pub(crate) fn bounds(self) -> (u64, u64) {
        match self {
            Self::From { first, last } => (first, last.unwrap_or(u64::MAX)),
            Self::Suffix(_) => (0, u64::MAX),
        }
    }

    /// The first and last byte to send of a file of `size` bytes, or `None` if it has none of them.
    pub(crate) fn within(self, size: u64) -> Option<(u64, u64)> {
        let end = size.checked_sub(1)?;
        match self {
            Self::From { first, last } => {
                (first <= end).then(|| (first, last.unwrap_or(end).min(end)))
            }
            Self::Suffix(0) => None,
            Self::Suffix(length) => Some((size.saturating_sub(length), end)),
        }
    }
}

/// First byte, last byte and size in a response's `Content-Range`.
pub(crate) fn content_range(headers: &HeaderMap) -> Option<(u64, u64, u64)> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, size) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?, size.parse().ok()?))
}
