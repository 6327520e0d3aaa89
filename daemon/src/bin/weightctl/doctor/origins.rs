//! Where models come from: the Hub and S3. No token is sent or shown.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use secrecy::SecretString;
use url::Url;
use weightd::config::{Config, S3Section};
use weightd::sources::hf::{HfClients, HfConfig, TokenPlace};
use weightd::sources::s3::{self, NodeCredentials};
use weightd_core::errors::Chain;

use super::{Finding, Level, PATIENCE, answer};

/// How long the AWS SDK may look for credentials: where there is no instance to ask, it waits.
const CREDENTIALS: Duration = Duration::from_secs(2);

/// Whether the Hub answers, and which token there is for it.
pub(super) async fn hub(config: &Config) -> Vec<Finding> {
    let named = config.hf.token_file.clone();
    let foreign = named.is_some();
    let place = match named {
        Some(path) => TokenPlace::Named(path),
        None => TokenPlace::from_env(),
    };
    let (reached, token) = tokio::join!(
        reach(config),
        answer(PATIENCE, move || token(place, foreign))
    );
    let token = token.unwrap_or_else(|| {
        let found = format!("its file did not answer for {} s", PATIENCE.as_secs());
        let hint = "put the token on a file system that works";
        Finding::error("hub-token", found, hint)
    });
    vec![reached, token]
}

/// Where the Hub is; the empty token keeps the real one from being read, and so from being sent.
fn endpoint(config: &Config) -> Result<Url, String> {
    let named = config.hf.endpoint.as_deref().map(Url::parse).transpose();
    let named = named.map_err(|error| format!("`hf.endpoint` is no web address: {error}"))?;
    let hub = HfConfig::from_env_unless(named, Some(SecretString::default()));
    let hub = hub.map_err(|error| Chain(&error).to_string())?;
    Ok(hub.endpoint().clone())
}

async fn reach(config: &Config) -> Finding {
    let endpoint = match endpoint(config) {
        Ok(endpoint) => endpoint,
        Err(found) => return Finding::error("hub", found, "mend HF_ENDPOINT or `hf.endpoint`"),
    };
    let at = endpoint.as_str().trim_end_matches('/');
    let clients = match HfClients::new() {
        Ok(clients) => clients,
        Err(error) => {
            let hint = "install the system's root certificates (ca-certificates)";
            return Finding::error("hub", Chain(&error).to_string(), hint);
        }
    };
    match clients.reach(&endpoint, PATIENCE).await {
        Ok(status @ 500..) => Finding::warn(
            "hub",
            format!("{at} answers with status {status}"),
            "try again later; if it is a mirror or a proxy, see its log",
        ),
        Ok(407) => Finding::error(
            "hub",
            format!("a proxy before {at} wants to know who asks"),
            "put user and password into HTTPS_PROXY",
        ),
        Ok(_) => Finding::ok("hub", format!("{at} answers")),
        Err(error) => {
            let default = endpoint.host_str() == Some("huggingface.co");
            // Nodes that only read S3 need no Hub; one that somebody named is needed.
            let level = if default { Level::Warn } else { Level::Error };
            let found = format!("{at} cannot be reached: {error}");
            Finding::new("hub", level, found).hint(
                "see that this machine resolves that name and may connect to it (proxy: HTTPS_PROXY; mirror: \
                 HF_ENDPOINT or `hf.endpoint`); for s3:// and file:// models it is not needed",
            )
        }
    }
}

/// Which token there is, without a look at its text but to see that it is one. It is the daemon's if it is `foreign`.
fn token(place: TokenPlace, foreign: bool) -> Finding {
    match place {
        TokenPlace::Nowhere => Finding::ok("hub-token", "none: only public models can be read"),
        TokenPlace::Variable => {
            let text = std::env::var("HF_TOKEN").unwrap_or_default();
            match is_token(&text) {
                true => Finding::ok("hub-token", "in HF_TOKEN"),
                false => no_token("HF_TOKEN"),
            }
        }
        TokenPlace::Named(path) => token_file(&path, foreign).unwrap_or_else(|| {
            let found = format!("{} is not there", path.display());
            let hint = "write the token there, or mend HF_TOKEN_PATH or `hf.token_file`";
            Finding::error("hub-token", found, hint)
        }),
        TokenPlace::Login(path) => token_file(&path, foreign).unwrap_or_else(|| {
            let found = "none: only public models can be read";
            Finding::ok("hub-token", found)
        }),
    }
}

fn is_token(text: &str) -> bool {
    text.trim().bytes().all(|byte| byte.is_ascii_graphic())
}

fn no_token(from: &str) -> Finding {
    let found = format!("{from} holds something else than a token");
    let hint = "write the token alone there, without spaces or quotes";
    Finding::error("hub-token", found, hint)
}

/// `None` if there is no such file. A `foreign` one is the daemon's.
fn token_file(path: &Path, foreign: bool) -> Option<Finding> {
    let at = path.display();
    let unreadable = |error: io::Error| {
        let found = format!("{at} cannot be read: {error}");
        let hint = "run this as the user who is to read it, or let this one: `chown` it";
        // The daemon's own may well be closed to others.
        let level = match foreign && error.kind() == io::ErrorKind::PermissionDenied {
            true => Level::Warn,
            false => Level::Error,
        };
        Finding::new("hub-token", level, found).hint(hint)
    };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => return Some(unreadable(error)),
    };
    Some(match world_readable(path) {
        Err(error) => unreadable(error),
        Ok(_) if !is_token(&text) => no_token(&at.to_string()),
        Ok(_) if text.trim().is_empty() => Finding::warn(
            "hub-token",
            format!("{at} is empty: only public models can be read"),
            "write the token into it, for example with `hf auth login`",
        ),
        Ok(true) => Finding::warn(
            "hub-token",
            format!("in {at}, which every user of this machine can read"),
            format!("`chmod 600 {at}`"),
        ),
        Ok(false) => Finding::ok("hub-token", format!("in {at}")),
    })
}

fn world_readable(path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path)?.permissions().mode() & 0o004 != 0)
}

/// As whom S3 is asked.
pub(super) async fn s3(section: &S3Section) -> Vec<Finding> {
    let finding = if section.anonymous {
        Finding::ok(
            "s3",
            "requests are unsigned, as `s3.anonymous` says: only public buckets can be read",
        )
    } else if section.endpoint.is_none() && section.region.is_none() && !s3::is_configured() {
        Finding::ok(
            "s3",
            "not checked: neither settings, environment nor profile say anything of it",
        )
    } else {
        credentials(section).await
    };
    vec![finding]
}

async fn credentials(section: &S3Section) -> Finding {
    let hint = "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the node a role (Pod \
                Identity, IRSA, instance profile)";
    match tokio::time::timeout(CREDENTIALS, s3::node_credentials()).await {
        Ok(NodeCredentials::Found(region)) => {
            let region = section.region.clone().unwrap_or(region);
            Finding::ok(
                "s3",
                format!("credentials are there, and the region is {region}"),
            )
        }
        Ok(NodeCredentials::Nothing) => Finding::warn(
            "s3",
            "no credentials: requests are unsigned, and only public buckets can be read",
            hint,
        ),
        Ok(NodeCredentials::Failed(reason)) => {
            Finding::error("s3", format!("credentials cannot be had: {reason}"), hint)
        }
        Err(_) => Finding::warn(
            "s3",
            format!(
                "credentials were not found within {} s",
                CREDENTIALS.as_secs()
            ),
            format!(
                "{hint}; AWS_EC2_METADATA_DISABLED=true saves the wait where there is no instance to ask"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_token_file_is_judged_without_being_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let look = |text: &str, mode: u32| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let finding = token(TokenPlace::Named(path.clone()), false);
            assert!(!finding.text().contains("secret"), "{finding:?}");
            finding.level
        };
        assert_eq!(look("hf_secret\n", 0o600), Level::Ok);
        assert_eq!(look("hf_secret\n", 0o644), Level::Warn);
        assert_eq!(look("\n", 0o600), Level::Warn);
        assert_eq!(look("not a secret\n", 0o600), Level::Error);
    }

    #[test]
    fn a_token_file_is_missed_only_if_somebody_named_it() {
        let path = PathBuf::from("/nowhere/token");
        assert_eq!(
            token(TokenPlace::Login(path.clone()), false).level,
            Level::Ok
        );
        assert_eq!(token(TokenPlace::Named(path), true).level, Level::Error);
    }
}
