//! How the Hub is reached: its endpoint and the token, read as Hugging Face's own tools read them.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};
use url::Url;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Where the Hub is, and the token to use there.
#[derive(Clone)]
pub struct HfConfig {
    endpoint: Url,
    token: Option<SecretString>,
}

/// The Hub's endpoint or token cannot be used. No text of it holds the token.
#[derive(Debug, thiserror::Error)]
pub enum HfConfigError {
    /// The endpoint is not one.
    #[error("the Hub's endpoint (HF_ENDPOINT) cannot be used: {reason}")]
    Endpoint {
        /// What is wrong with it.
        reason: String,
    },
    /// The file that should hold the token cannot be read.
    #[error("cannot read the Hub's token from `{}`", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The text is no token.
    #[error("the Hub's token from {from} holds spaces, control or non-ASCII characters")]
    Token {
        /// Where the text came from, for example `HF_TOKEN`.
        from: String,
    },
    /// No HTTP client can be made, for example because no root certificates were found.
    #[error("cannot set up an HTTP client")]
    Client(#[source] reqwest::Error),
}

impl HfConfig {
    /// `token` is trimmed; an empty one is none.
    ///
    /// # Errors
    ///
    /// [`HfConfigError::Endpoint`] unless `endpoint` is an http or https address without
    /// credentials, query or fragment; [`HfConfigError::Token`] if no header can carry `token`.
    pub fn new(endpoint: Url, token: Option<SecretString>) -> Result<Self, HfConfigError> {
        let refuse = |reason: &str| {
            Err(HfConfigError::Endpoint {
                reason: reason.to_owned(),
            })
        };
        if !matches!(endpoint.scheme(), "http" | "https") || endpoint.host_str().is_none() {
            return refuse("it does not begin with https:// or http:// and a host");
        }
        if !endpoint.username().is_empty() || endpoint.password().is_some() {
            return refuse("it holds a user name or password");
        }
        if endpoint.query().is_some() || endpoint.fragment().is_some() {
            return refuse("it holds a query or a fragment");
        }
        let token = token
            .map(|token| clean(token.expose_secret(), "the request"))
            .transpose()?;
        Ok(Self {
            endpoint,
            token: token.flatten(),
        })
    }

    /// Reads `HF_ENDPOINT`, and the token from `HF_TOKEN`, the file `HF_TOKEN_PATH`, or the file that
    /// `hf auth login` writes. With `HF_HUB_DISABLE_IMPLICIT_TOKEN` set there is no token.
    ///
    /// Source: `huggingface_hub/constants.py` and `utils/_auth.py`.
    ///
    /// # Errors
    ///
    /// As [`HfConfig::new`]; [`HfConfigError::TokenFile`] if a token file is there but unreadable.
    pub fn from_env() -> Result<Self, HfConfigError> {
        Self::from_env_unless(None, None)
    }

    /// The same, but what is given is not looked for: it may be wrong there.
    ///
    /// # Errors
    ///
    /// [`HfConfigError`].
    pub fn from_env_unless(
        endpoint: Option<Url>,
        token: Option<SecretString>,
    ) -> Result<Self, HfConfigError> {
        Self::from_variables_unless(endpoint, token, |name| {
            std::env::var(name).ok().filter(|text| !text.is_empty())
        })
    }

    fn from_variables_unless(
        endpoint: Option<Url>,
        given: Option<SecretString>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, HfConfigError> {
        let endpoint = match endpoint {
            Some(endpoint) => endpoint,
            None => {
                let text = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
                Url::parse(text.trim()).map_err(|error| HfConfigError::Endpoint {
                    reason: error.to_string(),
                })?
            }
        };
        let token = match given {
            Some(token) => Some(token),
            None => token(variable)?,
        };
        Self::new(endpoint, token)
    }

    /// The same endpoint with another requester's token, or none.
    ///
    /// # Errors
    ///
    /// [`HfConfigError::Token`] if no header can carry `token`.
    pub fn with_token(&self, token: Option<SecretString>) -> Result<Self, HfConfigError> {
        Self::new(self.endpoint.clone(), token)
    }

    /// The Hub's address; a mirror's may have a path.
    #[must_use]
    pub fn endpoint(&self) -> &Url {
        &self.endpoint
    }

    /// The token, fit for a header.
    #[must_use]
    pub fn token(&self) -> Option<&SecretString> {
        self.token.as_ref()
    }
}

impl fmt::Debug for HfConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HfConfig")
            .field("endpoint", &self.endpoint.as_str())
            .field("has_token", &self.token.is_some())
            .finish()
    }
}

/// Where the environment says that a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenPlace {
    /// Nowhere, or `HF_HUB_DISABLE_IMPLICIT_TOKEN` says that it is not to be used.
    Nowhere,
    /// In `HF_TOKEN`.
    Variable,
    /// In the file that `HF_TOKEN_PATH` names.
    Named(PathBuf),
    /// In the file that `hf auth login` writes, if it has been.
    Login(PathBuf),
}

impl TokenPlace {
    /// As this process's environment says.
    #[must_use]
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok().filter(|text| !text.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let disabled = variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|text| {
            matches!(text.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
        });
        if disabled {
            return Self::Nowhere;
        }
        if variable("HF_TOKEN").is_some() {
            return Self::Variable;
        }
        if let Some(path) = variable("HF_TOKEN_PATH") {
            return Self::Named(path.into());
        }
        let home = variable("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
            Some(cache?.join("huggingface"))
        });
        home.map_or(Self::Nowhere, |home| Self::Login(home.join("token")))
    }
}

fn token(variable: impl Fn(&str) -> Option<String>) -> Result<Option<SecretString>, HfConfigError> {
    let text = variable("HF_TOKEN").map(SecretString::from);
    match (TokenPlace::from_variables(variable), text) {
        (TokenPlace::Variable, Some(text)) => clean(text.expose_secret(), "HF_TOKEN"),
        (TokenPlace::Variable, None) | (TokenPlace::Nowhere, _) => Ok(None),
        (TokenPlace::Named(path), _) => {
            let token = token_file(&path)?;
            if token.is_none() {
                tracing::warn!(path = %path.display(), "HF_TOKEN_PATH names no file with a token");
            }
            Ok(token)
        }
        (TokenPlace::Login(path), _) => token_file(&path),
    }
}

fn token_file(path: &Path) -> Result<Option<SecretString>, HfConfigError> {
    match std::fs::read_to_string(path).map(SecretString::from) {
        Ok(text) => clean(text.expose_secret(), &format!("`{}`", path.display())),
        Err(error) if missing(&error) => Ok(None),
        Err(source) => Err(HfConfigError::TokenFile {
            path: path.to_owned(),
            source,
        }),
    }
}

fn missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// What `huggingface_hub` calls cleaning: no white space around it, and empty is none.
fn clean(text: &str, from: &str) -> Result<Option<SecretString>, HfConfigError> {
    let text = text.trim();
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(HfConfigError::Token {
            from: from.to_owned(),
        });
    }
    Ok((!text.is_empty()).then(|| SecretString::from(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<HfConfig, HfConfigError> {
        HfConfig::from_variables_unless(None, None, |name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    fn token_of(variables: &[(&str, &str)]) -> Option<String> {
        let config = from(variables).unwrap();
        config.token().map(|token| token.expose_secret().to_owned())
    }

    #[test]
    fn the_token_is_found_where_the_hubs_own_tools_find_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "from-file\n").unwrap();
        let (home, file) = (dir.path().to_str().unwrap(), file.to_str().unwrap());

        assert_eq!(token_of(&[]), None);
        assert_eq!(token_of(&[("HF_HOME", home)]).unwrap(), "from-file");
        assert_eq!(token_of(&[("HF_TOKEN_PATH", file)]).unwrap(), "from-file");
        let both = [("HF_TOKEN", " from-env\n"), ("HF_TOKEN_PATH", file)];
        assert_eq!(token_of(&both).unwrap(), "from-env");
        let off = [("HF_TOKEN", "x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
        assert_eq!(token_of(&off), None);
        assert_eq!(token_of(&[("HF_TOKEN_PATH", "/nonexistent/token")]), None);
        std::fs::create_dir_all(dir.path().join(".cache/huggingface")).unwrap();
        std::fs::write(dir.path().join(".cache/huggingface/token"), "login").unwrap();
        assert_eq!(token_of(&[("HOME", home)]).unwrap(), "login");
    }

    #[test]
    fn what_is_given_is_not_looked_for() {
        let wrong = |_: &str| Some("://\u{7}".to_owned());
        let endpoint = Url::parse("https://hub.example").unwrap();
        let token = || Some(SecretString::from("given"));
        let with = HfConfig::from_variables_unless;

        assert!(with(Some(endpoint.clone()), token(), wrong).is_ok());
        assert!(matches!(
            with(None, token(), wrong),
            Err(HfConfigError::Endpoint { .. })
        ));
        assert!(matches!(
            with(Some(endpoint), None, wrong),
            Err(HfConfigError::Token { .. })
        ));
    }

    #[test]
    fn a_token_file_that_cannot_be_read_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let error = from(&[("HF_TOKEN_PATH", path)]).unwrap_err();
        assert!(error.to_string().contains(path), "{error}");
    }

    #[test]
    fn no_error_and_no_debug_text_shows_the_token() {
        let error = from(&[("HF_TOKEN", "hf_secret\u{7}x")]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("secret"), "{error}");
        let config = from(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{config:?}").contains("secret"));
    }

    #[test]
    fn an_endpoint_is_a_plain_http_address() {
        for bad in [
            "ftp://host",
            "host",
            "https://user:pw@host",
            "https://host/?a=b",
        ] {
            let error = from(&[("HF_ENDPOINT", bad)]).expect_err(bad);
            assert!(!error.to_string().contains("pw"), "{error}");
        }
        let config = from(&[("HF_ENDPOINT", "http://127.0.0.1:8080/mirror/")]).unwrap();
        assert_eq!(config.endpoint().as_str(), "http://127.0.0.1:8080/mirror/");
        assert_eq!(from(&[]).unwrap().endpoint().scheme(), "https");
    }
}
