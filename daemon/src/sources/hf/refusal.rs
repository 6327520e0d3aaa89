//! What the Hub's refusals and a connection's failures mean to a user.

use std::error::Error;
use std::io;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{Response, StatusCode};
use secrecy::ExposeSecret;
use weightd_core::source::SourceError;

use super::hub::Hub;
use super::limit::retry_after;

const GIVE_TOKEN: &str = "give a token that may read it: HF_TOKEN or HF_TOKEN_PATH, the daemon's \
                          `hf.token_file`, or for a pod its volume's nodePublishSecretRef";

/// An answer of the Hub that is not the one wanted.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// `X-Error-Code`.
    pub(super) code: Option<String>,
    /// `X-Error-Message`.
    pub(super) message: Option<String>,
    pub(super) retry_after: Option<Duration>,
}

impl Answer {
    pub(super) fn of(response: &Response) -> Self {
        Self {
            status: response.status(),
            code: header(response.headers(), "x-error-code"),
            message: header(response.headers(), "x-error-message"),
            retry_after: retry_after(response.headers()),
        }
    }
}

pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}

/// May the same request succeed a little later?
pub(super) fn passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// What `answer`, to a question about `what`, means to the user.
///
/// Source: HfApi's `hf_raise_for_status` for the codes.
pub(super) fn refusal(hub: &Hub, what: &str, answer: &Answer) -> SourceError {
    let said = said(hub, answer);
    let code = answer.code.as_deref().unwrap_or_default();
    let message = answer.message.as_deref().unwrap_or_default();
    let what = what.to_owned();
    let denied = |detail: String, hint: String| SourceError::Denied {
        what: what.clone(),
        detail,
        hint: Some(hint),
    };
    match (answer.status.as_u16(), code) {
        (401 | 403 | 404, "RepoNotFound") => no_repository(hub, what),
        (401 | 403, "GatedRepo") => gated(hub, what, answer.status),
        (404, "RevisionNotFound") => SourceError::NotFound {
            what,
            detail: "the repository has no such branch, tag, PR ref or commit".to_owned(),
            hint: Some(format!("see which there are at {}/tree/main", hub.page())),
        },
        (404 | 410, _) => SourceError::NotFound {
            what,
            detail: said,
            hint: None,
        },
        (403, _) if message.contains("disabled") => SourceError::Denied {
            what,
            detail: "the Hub has disabled the repository".to_owned(),
            hint: Some(format!("see {} for the reason", hub.page())),
        },
        (401, _) if hub.has_token() => denied(
            format!("the token is not valid ({said})"),
            "make a new token in the Hub's settings; a public model needs none".to_owned(),
        ),
        (401 | 403 | 451, _) => denied(said, GIVE_TOKEN.to_owned()),
        (status, _) if passing(answer.status) || status >= 500 => SourceError::Unavailable {
            what,
            detail: said,
            retry_after: answer.retry_after,
        },
        (300..=399, _) => SourceError::Invalid {
            what,
            detail: format!("{} redirects to another origin", hub.host()),
            hint: Some("set HF_ENDPOINT to the address that serves the Hub's API".to_owned()),
        },
        _ => SourceError::Invalid {
            what,
            detail: said,
            hint: None,
        },
    }
}

fn no_repository(hub: &Hub, what: String) -> SourceError {
    let (detail, hint) = if hub.has_token() {
        (
            "repository not found, or private: the token cannot see it",
            "check the name, and that the token's account may read the repository".to_owned(),
        )
    } else {
        (
            "repository not found, or private: no token was given",
            format!("check the name; if it is private, {GIVE_TOKEN}"),
        )
    };
    SourceError::NotFound {
        what,
        detail: detail.to_owned(),
        hint: Some(hint),
    }
}

fn gated(hub: &Hub, what: String, status: StatusCode) -> SourceError {
    let page = hub.page();
    let (detail, hint) = match (hub.has_token(), status) {
        (false, _) => (
            "the repository is gated, and no token was given",
            format!("accept its conditions at {page}, then {GIVE_TOKEN}"),
        ),
        (true, StatusCode::UNAUTHORIZED) => (
            "the repository is gated, and the token was not accepted",
            format!("check the token, and that its account has accepted the conditions at {page}"),
        ),
        (true, _) => (
            "the repository is gated, and the token's account is not among its readers",
            format!("accept its conditions at {page} with the account that owns the token"),
        ),
    };
    SourceError::Denied {
        what,
        detail: detail.to_owned(),
        hint: Some(hint),
    }
}

/// `the Hub at host answered 503 Service Unavailable: message`.
fn said(hub: &Hub, answer: &Answer) -> String {
    let mut text = format!("{} answered {}", hub.host(), answer.status);
    if let Some(message) = &answer.message {
        text.push_str(": ");
        text.push_str(&printable(message, hub));
    }
    text
}

/// A foreign text, fit for a terminal and a log: short, one line, and never with the token in it.
fn printable(text: &str, hub: &Hub) -> String {
    let text = match hub.token() {
        Some(token) => text.replace(token.expose_secret(), "***"),
        None => text.to_owned(),
    };
    let text = text.chars().filter(|c| !c.is_control());
    text.take(200).collect()
}

/// A request that got no answer: `what` is the host that was asked.
pub(super) fn unreachable(what: &str, error: reqwest::Error) -> SourceError {
    if error.is_redirect() {
        return SourceError::Invalid {
            what: what.to_owned(),
            detail: "it redirects in circles".to_owned(),
            hint: None,
        };
    }
    SourceError::Unavailable {
        what: what.to_owned(),
        detail: cause(error),
        retry_after: None,
    }
}

/// A request that got no answer in time.
pub(super) fn no_answer(what: &str, waited: Duration) -> SourceError {
    SourceError::Unavailable {
        what: what.to_owned(),
        detail: format!("no answer within {} s", waited.as_secs_f64()),
        retry_after: None,
    }
}

/// The cause that lies deepest, in words, without an address: signed ones are secrets.
pub(super) fn cause(error: reqwest::Error) -> String {
    if error.is_connect() && error.is_timeout() {
        return "no connection in time".to_owned();
    }
    let error = error.without_url();
    let mut deepest: &(dyn Error + 'static) = &error;
    loop {
        if let Some(kind) = deepest.downcast_ref::<io::Error>().map(io::Error::kind)
            && let Some(text) = plain(kind)
        {
            return text.to_owned();
        }
        match deepest.source() {
            Some(source) => deepest = source,
            None => return deepest.to_string(),
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
