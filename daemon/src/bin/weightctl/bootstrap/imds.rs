//! The instance metadata service of EC2, version 2 only: the AWS SDK's own client asks for a token first.

use aws_config::BehaviorVersion;
use aws_config::imds::client::Client;
use aws_config::imds::client::error::ImdsError;
use aws_config::provider_config::ProviderConfig;
use weightd_core::errors::Chain;

use super::list::{self, List};

use std::time::Duration;

/// Tags whose key is this, or begins with this and a point, hold models.
///
/// Source: Amazon EC2 user guide, "View tags for your EC2 instances using instance metadata": keys of tags that
/// the service shows hold letters, digits and `+-=.,_:@` only, so the `weightd.io/prefetch` of annotations cannot
/// be one. A value has at most 256 characters, so there may be several.
const TAG: &str = "weightd.prefetch";

const USER_DATA: &str = "/latest/user-data";
const TAGS: &str = "/latest/meta-data/tags/instance";

/// A service that answers takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no list.
#[derive(Debug)]
pub(super) struct Unheard {
    pub(super) text: String,
    /// No other question will be answered either.
    pub(super) away: bool,
}

pub(super) struct Imds(Client);

impl Imds {
    pub(super) fn new() -> Self {
        let config = ProviderConfig::empty().with_behavior_version(Some(BehaviorVersion::latest()));
        let client = Client::builder()
            .configure(&config)
            .connect_timeout(Duration::from_secs(2))
            .read_timeout(PATIENCE)
            .operation_attempt_timeout(PATIENCE)
            .build();
        Self(client)
    }

    /// The models that the user data names.
    pub(super) async fn user_data(&self) -> Result<List, Unheard> {
        let text = self.ask(USER_DATA).await?;
        Ok(text.map_or_else(List::default, |text| list::in_user_data(&text)))
    }

    /// The models that the tags name, by the tags' keys.
    pub(super) async fn tags(&self) -> Result<List, Unheard> {
        let Some(keys) = self.ask(TAGS).await? else {
            return Ok(List::default());
        };
        let mut keys: Vec<&str> = keys
            .lines()
            .map(str::trim)
            .filter(|key| is_ours(key))
            .collect();
        keys.sort_unstable();
        let mut all = List::default();
        for key in keys {
            let value = self.ask(&format!("{TAGS}/{key}")).await?;
            all.add(list::parse(
                &value.unwrap_or_default(),
                &format!("the tag {key}"),
            ));
        }
        Ok(all)
    }

    /// What stands at `path`; `None` if there is nothing.
    async fn ask(&self, path: &str) -> Result<Option<String>, Unheard> {
        let disabled = std::env::var("AWS_EC2_METADATA_DISABLED");
        if disabled.is_ok_and(|value| value.eq_ignore_ascii_case("true")) {
            return Err(Unheard {
                text:
                    "cannot ask the instance metadata service: AWS_EC2_METADATA_DISABLED is true\n\
                       hint: give the list with --file"
                        .to_owned(),
                away: true,
            });
        }
        match self.0.get(path).await {
            Ok(text) => Ok(Some(text.into())),
            Err(ImdsError::ErrorResponse(answer)) if answer.response().status().as_u16() == 404 => {
                Ok(None)
            }
            Err(error) => Err(explain(path, &error)),
        }
    }
}

fn is_ours(key: &str) -> bool {
    let rest = key.strip_prefix(TAG);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn explain(path: &str, error: &ImdsError) -> Unheard {
    const AWAY: &str = "this is no EC2 instance, its metadata service is turned off, or the answer takes more hops \
        than `httpPutResponseHopLimit` allows (in a container it takes 2); or give the list with --file";
    const NO_TOKEN: &str = "only version 2 of the service is used: it must answer PUT /latest/api/token; look at \
        `metadataOptions` of the node class (`httpEndpoint: enabled`), or give the list with --file";
    const BINARY: &str = "user data that is compressed or binary is not read: put the list into a file, and give it with --file";
    // Also of an answer that takes more hops than allowed: it is dropped on its way.
    let silent = match error {
        ImdsError::FailedToLoadToken(token) => {
            token.is_dispatch_failure() || Chain(error).to_string().contains("timed out")
        }
        error => matches!(error, ImdsError::IoError(_)),
    };
    let (hint, away) = match error {
        _ if silent => (AWAY, true),
        ImdsError::FailedToLoadToken(_) => (NO_TOKEN, true),
        ImdsError::ErrorResponse(_) => {
            ("it may be overloaded; or give the list with --file", false)
        }
        _ => (BINARY, false),
    };
    let why = match error {
        ImdsError::ErrorResponse(answer) => {
            format!("it answers {}", answer.response().status().as_u16())
        }
        error => Chain(error).to_string(),
    };
    Unheard {
        text: format!("cannot read {path} of the instance metadata service: {why}\nhint: {hint}"),
        away,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_tags_are_told_from_others() {
        let ours = [
            "weightd.prefetch",
            "weightd.prefetch.1",
            "weightd.prefetch.b",
        ];
        assert!(ours.iter().all(|key| is_ours(key)));
        let others = [
            "weightd.prefetched",
            "weightd",
            "Name",
            "weightd.io/prefetch",
        ];
        assert!(!others.iter().any(|key| is_ours(key)));
        // What the service shows keys of.
        let allowed = |c: char| c.is_ascii_alphanumeric() || "+-=.,_:@".contains(c);
        assert!(TAG.chars().all(allowed));
    }
}
