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

fn status(code: Code, error: &(dyn Error + 'static), hint: Option<String>) -> Status {
    let mut message = Chain(error).to_string();
    if let Some(hint) = hint {
        message.push('\n');
        message.push_str(HINT);
        message.push_str(&hint);
    }
    Status::new(code, message)
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
        _ if error.is_no_space() => Code::ResourceExhausted,
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
        let aside = StoreError::SetAside(RelPath::new("a").unwrap());
        assert_eq!(of_store(&aside).code(), Code::Aborted);
    }
}
