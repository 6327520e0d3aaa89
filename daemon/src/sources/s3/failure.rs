//! What is left of the SDK's errors: what decides, and what may be shown.

use std::error::Error;
use std::io;
use std::time::Duration;

use aws_config::imds::client::error::ImdsError;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::result::ConnectorError;
use weightd_core::errors::Chain;

/// A request that did not give what it should.
pub(super) struct Failure {
    pub(super) kind: Kind,
    /// Where the bucket is, if the answer said so.
    pub(super) region: Option<String>,
    pub(super) retry_after: Option<Duration>,
}

/// What happened to it.
pub(super) enum Kind {
    /// S3 refused.
    Answer {
        status: u16,
        code: String,
        message: String,
    },
    /// There was no answer, and why.
    NoAnswer(String),
    /// The default chain holds no credentials.
    NothingFound,
    /// The credentials could not be had; `passing` if that may be otherwise a little later.
    NoCredentials { reason: String, passing: bool },
    /// The request could not be made.
    NotSent(String),
}

impl Failure {
    pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let mut failure = Self {
            kind: Kind::NotSent(String::new()),
            region: None,
            retry_after: None,
        };
        if let Some(credentials) = find::<CredentialsError>(error) {
            failure.kind = without_credentials(credentials);
            return failure;
        }
        failure.kind = match (error, error.raw_response()) {
            (_, Some(response)) => {
                failure.region = region(response);
                let after = response.headers().get("retry-after");
                let seconds = after.and_then(|text| text.trim().parse().ok());
                failure.retry_after = seconds.map(Duration::from_secs);
                let metadata = error.as_service_error().map(ProvideErrorMetadata::meta);
                let said = |text: Option<&str>| text.map(printable).unwrap_or_default();
                Kind::Answer {
                    status: response.status().as_u16(),
                    code: said(metadata.and_then(|metadata| metadata.code())),
                    message: said(metadata.and_then(|metadata| metadata.message())),
                }
            }
            (SdkError::TimeoutError(_), _) => Kind::NoAnswer("no answer in time".to_owned()),
            (SdkError::DispatchFailure(_), _) => Kind::NoAnswer(cause(error)),
            _ => Kind::NotSent(cause(error)),
        };
        failure
    }

    /// Takes `secret` out of what the server said.
    pub(super) fn mask(&mut self, secret: &str) {
        if let Kind::Answer { message, code, .. } = &mut self.kind
            && !secret.is_empty()
        {
            *message = message.replace(secret, "***");
            *code = code.replace(secret, "***");
        }
    }

    /// Is that because the default chain holds no credentials?
    pub(super) fn nothing_found(&self) -> bool {
        matches!(self.kind, Kind::NothingFound)
    }

    /// Takes credentials that were not found for ones that cannot be had just now: there were some before.
    pub(super) fn credentials_come_back(&mut self) {
        if self.nothing_found() {
            self.kind = Kind::NoCredentials {
                reason: "none are found now, though there were some before".to_owned(),
                passing: true,
            };
        }
    }

    /// Did S3 refuse for who asked?
    pub(super) fn is_denied(&self) -> bool {
        matches!(&self.kind, Kind::Answer { status, .. } if matches!(status, 401 | 403))
    }

    /// Is that because the bucket is in another region?
    pub(super) fn is_elsewhere(&self) -> bool {
        let Kind::Answer { status, code, .. } = &self.kind else {
            return false;
        };
        let elsewhere = [
            "PermanentRedirect",
            "TemporaryRedirect",
            "AuthorizationHeaderMalformed",
            "IllegalLocationConstraintException",
            "IncorrectEndpoint",
        ];
        matches!(status, 301 | 307 | 308) || elsewhere.contains(&code.as_str())
    }
}

pub(super) fn without_credentials(error: &CredentialsError) -> Kind {
    if let CredentialsError::CredentialsNotLoaded(_) = error {
        return Kind::NothingFound;
    }
    let network = find::<ConnectorError>(error).is_some() || find::<io::Error>(error).is_some();
    let timed_out = matches!(error, CredentialsError::ProviderTimedOut(_));
    Kind::NoCredentials {
        reason: printable(&Chain(error).to_string()),
        passing: network || timed_out || find::<ImdsError>(error).is_some_and(passes),
    }
}

/// May the instance give credentials a little later?
fn passes(error: &ImdsError) -> bool {
    match error {
        ImdsError::ErrorResponse(answer) => {
            let status = answer.response().status().as_u16();
            status == 429 || status >= 500
        }
        _ => true,
    }
}

/// Where S3 says that the bucket is.
fn region(response: &HttpResponse) -> Option<String> {
    let header = response.headers().get("x-amz-bucket-region");
    let body = response.body().bytes().unwrap_or_default();
    let body = String::from_utf8_lossy(body);
    let element = || Some(body.split_once("<Region>")?.1.split_once("</Region>")?.0);
    let region = header.or_else(element)?.trim();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (!region.is_empty() && region.bytes().all(plain)).then(|| region.to_owned())
}

/// A foreign text, fit for a terminal and a log: short, one line, and without what a signed request
/// is made of, which some servers send back.
pub(super) fn printable(text: &str) -> String {
    let secrets = ["signature=", "credential=", "x-amz-", "aws4-hmac", "token="];
    let lower = text.to_lowercase();
    if secrets.iter().any(|secret| lower.contains(secret)) {
        return String::new();
    }
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    let words = words.filter(|word| !word.is_empty());
    let words = words.map(|word| if is_key(word) { "***" } else { word });
    let text = words.collect::<Vec<_>>().join(" ");
    text.chars().take(300).collect()
}

/// Could the word be an access key's id, a secret key, a token or a signature?
fn is_key(word: &str) -> bool {
    let part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
    let bare = word.trim_matches(|c: char| !c.is_ascii() || !part(c as u8));
    let long = bare.len() >= 40 && bare.bytes().all(part);
    long || word.contains("AKIA") || word.contains("ASIA")
}

/// The first error of that type in the chain.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// The cause that lies deepest, in words.
pub(super) fn cause(error: &(dyn Error + 'static)) -> String {
    let mut deepest = error;
    loop {
        let kind = deepest.downcast_ref::<io::Error>().map(io::Error::kind);
        if let Some(text) = kind.and_then(plain) {
            return text.to_owned();
        }
        match deepest.source() {
            Some(source) => deepest = source,
            None => return printable(&deepest.to_string()),
        }
    }
}

fn plain(kind: io::ErrorKind) -> Option<&'static str> {
    match kind {
        io::ErrorKind::ConnectionRefused => Some("connection refused"),
        io::ErrorKind::ConnectionReset => Some("the connection was reset"),
        io::ErrorKind::UnexpectedEof => Some("the connection was closed early"),
        io::ErrorKind::TimedOut => Some("the connection timed out"),
        _ => None,
    }
}
