//! Who may read what, and the errors for those who may not.

use http::header::{AUTHORIZATION, HeaderName};
use http::{HeaderMap, Response, StatusCode};
use serde_json::json;

use super::State;
use super::repo::{Gated, Repo};
use crate::content::Body;
use crate::watch::{self, set};

/// Why a request is refused. Each becomes one status and one `X-Error-Code`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refused {
    BadToken,
    NoRepo { has_token: bool },
    Disabled,
    Gated { repo: String, has_token: bool },
    NoRevision { revision: String },
    NoEntry { sha: String, path: String },
    NoRoute,
    BadRequest,
}

impl Refused {
    fn parts(&self) -> (StatusCode, Option<&'static str>, String) {
        let unauthorized_unless = |known: bool, other| {
            if known {
                other
            } else {
                StatusCode::UNAUTHORIZED
            }
        };
        match self {
            Self::BadToken => (
                StatusCode::UNAUTHORIZED,
                None,
                "Invalid credentials in Authorization header".to_owned(),
            ),
            Self::NoRepo { has_token } => (
                unauthorized_unless(*has_token, StatusCode::NOT_FOUND),
                Some("RepoNotFound"),
                "Repository not found".to_owned(),
            ),
            Self::Disabled => (
                StatusCode::FORBIDDEN,
                None,
                "Access to this resource is disabled.".to_owned(),
            ),
            Self::Gated { repo, has_token } => (
                unauthorized_unless(*has_token, StatusCode::FORBIDDEN),
                Some("GatedRepo"),
                format!(
                    "Access to model {repo} is restricted. You must have access to it and be \
                     authenticated to access it."
                ),
            ),
            Self::NoRevision { revision } => (
                StatusCode::NOT_FOUND,
                Some("RevisionNotFound"),
                format!("Invalid rev id: {revision}"),
            ),
            Self::NoEntry { path, .. } => (
                StatusCode::NOT_FOUND,
                Some("EntryNotFound"),
                format!("Entry not found: {path}"),
            ),
            Self::NoRoute => (StatusCode::NOT_FOUND, None, "Not found".to_owned()),
            Self::BadRequest => (StatusCode::BAD_REQUEST, None, "Bad request".to_owned()),
        }
    }

    pub(super) fn response(&self) -> Response<Body> {
        let (status, code, message) = self.parts();
        let mut response = watch::json(&json!({"error": message}));
        *response.status_mut() = status;
        set(
            &mut response,
            HeaderName::from_static("x-error-message"),
            &message,
        );
        if let Some(code) = code {
            set(&mut response, HeaderName::from_static("x-error-code"), code);
        }
        if let Self::NoEntry { sha, .. } = self {
            set(&mut response, HeaderName::from_static("x-repo-commit"), sha);
        }
        response
    }
}

/// The good token of a request, if it has one.
pub(super) fn token(state: &State, headers: &HeaderMap) -> Result<Option<String>, Refused> {
    let Some(header) = headers.get(AUTHORIZATION) else {
        return Ok(None);
    };
    let header = header.to_str().map_err(|_| Refused::BadToken)?;
    let token = header.strip_prefix("Bearer ").ok_or(Refused::BadToken)?;
    let mut good = state.config.tokens.iter().any(|known| known == token);
    state.change(|repos| good = good || repos.values().any(|repo| repo.grants(token)));
    if good {
        Ok(Some(token.to_owned()))
    } else {
        Err(Refused::BadToken)
    }
}

/// The repo, if its metadata may be read. That of a gated repo may.
pub(super) fn readable(state: &State, id: &str, token: Option<&str>) -> Result<Repo, Refused> {
    let hidden = Refused::NoRepo {
        has_token: token.is_some(),
    };
    let repo = state.repo(id).ok_or(hidden.clone())?;
    if repo.private && !token.is_some_and(|token| repo.grants(token)) {
        return Err(hidden);
    }
    if repo.disabled {
        return Err(Refused::Disabled);
    }
    Ok(repo)
}

/// Refuses the content of a gated repo to those not let in.
pub(super) fn check_gate(repo: &Repo, token: Option<&str>) -> Result<(), Refused> {
    if repo.gated == Gated::No || token.is_some_and(|token| repo.grants(token)) {
        return Ok(());
    }
    Err(Refused::Gated {
        repo: repo.id().to_owned(),
        has_token: token.is_some(),
    })
}
