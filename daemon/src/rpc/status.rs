//! Errors as gRPC codes: what the caller does next. The message is the whole chain, then the remedy.

use std::error::Error;

use tonic::{Code, Status};
use weightd_core::errors::Chain;
use weightd_core::fetch::FetchError;
use weightd_core::source::SourceError;
use weightd_core::store::StoreError;

use crate::access::AccessError;
use crate::volumes::AcquireError;

/// The remedy stands on a line of its own that begins with this.
pub(super) const HINT: &str = "hint: ";

/// The most bytes of a message on the wire. It is a header: h2 takes 16 KiB of headers, and closes the
/// connection, with everybody's calls on it, over more.
const MESSAGE_BYTES: usize = 2048;

/// How many of them the remedy may take.
const HINT_BYTES: usize = 768;

fn status(code: Code, error: &(dyn Error + 'static), hint: Option<String>) -> Status {
    let hint = hint.map(|hint| format!("\n{HINT}{}", capped(&hint, HINT_BYTES)));
    let hint = hint.unwrap_or_default();
    let bytes = MESSAGE_BYTES - hint.chars().map(wire_bytes).sum::<usize>();
    Status::new(code, capped(&Chain(error).to_string(), bytes) + &hint)
}

/// The text, or its beginning and its end if it is longer than `bytes` on the wire: what was tried stands
/// at the one, and why it failed at the other.
fn capped(text: &str, bytes: usize) -> String {
    const GAP: &str = " [...] ";
    if text.chars().map(wire_bytes).sum::<usize>() <= bytes {
        return text.to_owned();
    }
    let half = bytes.saturating_sub(3 * GAP.len()) / 2;
    let fitting = |chars: &mut dyn Iterator<Item = char>| {
        let sizes = chars.scan(0, |sum, char| {
            *sum += wire_bytes(char);
            (*sum <= half).then_some(char.len_utf8())
        });
        sizes.sum::<usize>()
    };
    let (head, tail) = (fitting(&mut text.chars()), fitting(&mut text.chars().rev()));
    format!("{}{GAP}{}", &text[..head], &text[text.len() - tail..])
}

/// How long a character is in a message: what is not plain is percent-encoded, byte by byte.
fn wire_bytes(char: char) -> usize {
    let plain = char.is_ascii_alphanumeric() || "-_.:/,@".contains(char);
    if plain { 1 } else { 3 * char.len_utf8() }
}

/// A request that does not parse.
pub(super) fn invalid(error: &(dyn Error + 'static)) -> Status {
    status(Code::InvalidArgument, error, None)
}

pub(super) fn of_store(error: &StoreError) -> Status {
    status(store_code(error), error, error.hint())
}

pub(super) fn of_fetch(error: &FetchError) -> Status {
    let code = match error {
        FetchError::Source { source, .. } => source_code(source),
        FetchError::Store { source, .. } => store_code(source),
        FetchError::Mismatch { .. } | FetchError::Broken { .. } => Code::DataLoss,
        FetchError::Stopped { .. } => Code::Unavailable,
        FetchError::Unwanted { .. } => Code::Aborted,
        FetchError::Defect { .. } => Code::Internal,
    };
    status(code, error, error.hint())
}

pub(super) fn of_acquire(error: &AcquireError) -> Status {
    let code = match error {
        AcquireError::Access(AccessError::Policy(_)) => Code::PermissionDenied,
        AcquireError::Access(AccessError::Source { source, .. }) => source_code(source),
        AcquireError::Access(AccessError::Store(source)) => store_code(source),
        AcquireError::Fetch(error) => return of_fetch(error),
        AcquireError::Store { source, .. } => store_code(source),
        AcquireError::Evicted { .. } => Code::ResourceExhausted,
        AcquireError::Others { .. } | AcquireError::Released { .. } => Code::Aborted,
        AcquireError::Layout { .. } => Code::InvalidArgument,
    };
    status(code, error, error.hint())
}

fn source_code(error: &SourceError) -> Code {
    match error {
        SourceError::NotFound { .. } => Code::NotFound,
        SourceError::Denied { .. } => Code::PermissionDenied,
        SourceError::Changed { .. } => Code::Aborted,
        SourceError::Unavailable { .. } | SourceError::NoRanges { .. } => Code::Unavailable,
        SourceError::Invalid { .. } => Code::FailedPrecondition,
    }
}

fn store_code(error: &StoreError) -> Code {
    match error {
        _ if error.is_no_space() || error.is_too_many_links() => Code::ResourceExhausted,
        StoreError::NoSpace { .. } => Code::ResourceExhausted,
        StoreError::Missing(_) => Code::NotFound,
        StoreError::Held { .. } => Code::FailedPrecondition,
        StoreError::SetAside(_) => Code::Aborted,
        StoreError::NotAStore { .. }
        | StoreError::NewerFormat { .. }
        | StoreError::ReadOnly { .. }
        | StoreError::NoHardLinks { .. }
        | StoreError::Io { .. } => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use weightd_core::model::RelPath;

    use super::*;

    #[test]
    fn an_error_says_what_to_do_next_by_code_and_by_words() {
        let source = |source| FetchError::Source {
            model: "hf://org/model".parse().unwrap(),
            source,
        };
        let what = || "hf://org/model".to_owned();
        let cases = [
            (
                source(SourceError::Denied {
                    what: what(),
                    detail: "401".into(),
                    hint: Some("log in".into()),
                }),
                Code::PermissionDenied,
                "cannot fetch hf://org/model: access to hf://org/model denied: 401\nhint: log in",
            ),
            (
                source(SourceError::Changed {
                    what: what(),
                    detail: String::new(),
                }),
                Code::Aborted,
                "cannot fetch hf://org/model: hf://org/model changed at its origin while it was fetched\n\
                 hint: run the same command again: it lists the origin anew",
            ),
        ];
        for (error, code, message) in cases {
            let status = of_fetch(&error);
            assert_eq!((status.code(), status.message()), (code, message));
        }
        let full = StoreError::NoSpace {
            root: "/x".into(),
            needed: 2,
            available: 1,
        };
        assert_eq!(of_store(&full).code(), Code::ResourceExhausted);
        let links = StoreError::Io {
            op: "link",
            path: "/x".into(),
            source: std::io::ErrorKind::TooManyLinks.into(),
        };
        assert_eq!(of_store(&links).code(), Code::ResourceExhausted);
        let aside = StoreError::SetAside(RelPath::new("a").unwrap());
        assert_eq!(of_store(&aside).code(), Code::Aborted);
    }

    #[test]
    fn a_long_message_keeps_its_ends_and_its_remedy_and_fits_a_header() {
        let long = |length: usize| FetchError::Source {
            model: "hf://org/model".parse().unwrap(),
            source: SourceError::Denied {
                what: "\u{e4} b".repeat(length),
                detail: "the last word".into(),
                hint: Some("log in".into()),
            },
        };
        assert!(!of_fetch(&long(1)).message().contains("[...]"));
        for length in [1000, 100_000] {
            let status = of_fetch(&long(length));
            let message = status.message();
            assert!(
                message.starts_with("cannot fetch hf://org/model: access to \u{e4} b"),
                "{message}"
            );
            assert!(
                message.ends_with(" denied: the last word\nhint: log in"),
                "{message}"
            );
            let mut headers = http::HeaderMap::new();
            status.add_header(&mut headers).unwrap();
            let sent = headers["grpc-message"].len();
            assert!((1900..=MESSAGE_BYTES).contains(&sent), "{sent}");
        }
        let endless = "x".repeat(10_000);
        let error = std::io::Error::other(endless.clone());
        let status = status(Code::Internal, &error, Some(endless));
        let (text, hint) = status.message().split_once('\n').unwrap();
        assert!(text.len() + hint.len() < MESSAGE_BYTES, "{}", text.len());
        assert!(text.ends_with('x') && hint.starts_with("hint: x") && hint.ends_with('x'));
    }
}
