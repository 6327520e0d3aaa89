//! S3's errors in our words: what the caller does next, and what the user can do.

use std::time::Duration;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use weightd_core::errors::Chain;
use weightd_core::source::SourceError;

/// Why S3 did not answer as asked.
#[derive(Debug)]
pub(super) enum Ask {
    /// The bucket is in this region: ask there.
    Region(String),
    /// It cannot.
    Error(SourceError),
}

impl Ask {
    pub(super) fn into_error(self) -> SourceError {
        match self {
            Self::Error(error) => error,
            Self::Region(region) => SourceError::Unavailable {
                what: "S3".to_owned(),
                detail: format!("the bucket is in the region {region}"),
                retry_after: Some(Duration::ZERO),
            },
        }
    }
}

/// What happened when `action` was asked of `what`.
pub(super) fn of_sdk<E>(what: &str, action: &str, error: &SdkError<E>) -> Ask
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    let Some(raw) = error.raw_response() else {
        return Ask::Error(unreachable(what, error));
    };
    let status = raw.status().as_u16();
    let code = error.code().unwrap_or_default();
    let moved = matches!(status, 301 | 307 | 400) || code == "PermanentRedirect";
    if let (true, Some(region)) = (moved, raw.headers().get("x-amz-bucket-region")) {
        return Ask::Region(region.to_owned());
    }
    let retry_after = raw
        .headers()
        .get("retry-after")
        .and_then(|text| text.parse().ok())
        .map(Duration::from_secs);
    Ask::Error(answered(what, action, status, error, retry_after))
}

/// An answer that is an error.
fn answered<E: ProvideErrorMetadata>(
    what: &str,
    action: &str,
    status: u16,
    error: &E,
    retry_after: Option<Duration>,
) -> SourceError {
    let code = error.code().unwrap_or_default();
    let what = what.to_owned();
    let said = match (code, error.message()) {
        ("", _) => format!("S3 answered {status}"),
        (code, None) => format!("S3 answered {status} {code}"),
        (code, Some(message)) => format!("S3 answered {status} {code}: {message}"),
    };
    match (status, code) {
        (412, _) | (409, "ConditionalRequestConflict") => SourceError::Changed {
            what,
            detail: "it is another object now".to_owned(),
        },
        (416, _) => SourceError::Changed {
            what,
            detail: "it is shorter now".to_owned(),
        },
        (403 | 400, "InvalidObjectState") => SourceError::Invalid {
            what,
            detail: "the object is archived".to_owned(),
            hint: Some("restore it from its Glacier storage class first".to_owned()),
        },
        (401 | 403, _) | (400, "ExpiredToken" | "InvalidToken") => SourceError::Denied {
            what,
            detail: said,
            hint: Some(denied_hint(code, action)),
        },
        (404, "NoSuchBucket") => SourceError::NotFound {
            what,
            detail: "there is no such bucket".to_owned(),
            hint: Some(
                "check the bucket's name, and the endpoint and account that are asked".to_owned(),
            ),
        },
        (404, _) => SourceError::NotFound {
            what,
            detail: said,
            hint: None,
        },
        (408 | 429 | 500..=599, _) => SourceError::Unavailable {
            what,
            detail: said,
            retry_after,
        },
        _ => SourceError::Invalid {
            what,
            detail: said,
            hint: None,
        },
    }
}

fn denied_hint(code: &str, action: &str) -> String {
    match code {
        "InvalidAccessKeyId" => {
            "the access key does not exist there: check AWS_ACCESS_KEY_ID and the endpoint"
                .to_owned()
        }
        "SignatureDoesNotMatch" => {
            "the secret key is wrong: check AWS_SECRET_ACCESS_KEY".to_owned()
        }
        "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" => {
            "the session has expired: get new credentials, for example with `aws sso login`"
                .to_owned()
        }
        "RequestTimeTooSkewed" => "this machine's clock is wrong".to_owned(),
        _ => format!(
            "its identity needs {action} there; without credentials only public buckets can be read"
        ),
    }
}

/// No answer at all.
fn unreachable<E>(what: &str, error: &SdkError<E>) -> SourceError
where
    E: std::error::Error + 'static,
{
    let detail = match error {
        SdkError::TimeoutError(_) => "no answer in time".to_owned(),
        SdkError::DispatchFailure(failure) => match failure.as_connector_error() {
            Some(error) => Chain(error).to_string(),
            None => "the request could not be sent".to_owned(),
        },
        SdkError::ConstructionFailure(_) => {
            return SourceError::Invalid {
                what: what.to_owned(),
                detail: Chain(error).to_string(),
                hint: Some("check the region, the endpoint and the bucket's name".to_owned()),
            };
        }
        _ => Chain(error).to_string(),
    };
    SourceError::Unavailable {
        what: what.to_owned(),
        detail,
        retry_after: None,
    }
}
