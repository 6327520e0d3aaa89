//! Which commit a branch, tag or PR ref stands for: the one question that the `hf-hub` crate answers.

use std::error::Error;
use std::sync::atomic::Ordering;

use hf_hub::{HFClient, HFError, split_id};
use secrecy::ExposeSecret;
use tokio::time::timeout;
use weightd_core::model::Revision;
use weightd_core::source::SourceError;

use super::hub::{Ask, Hub};
use super::limit::Quota;
use super::refusal::{Answer, no_answer, refusal, unreachable};

/// Given to `hf-hub` as the token when there is none. Without a token it would look for one in the
/// environment by itself, and send the operator's for a tenant who has none. It leaves the header
/// away if the token does not fit into one, and a line feed does not.
const NO_TOKEN: &str = "\n";

/// The properties to ask for. Without a choice the answer also lists all files, and any property of
/// a form that `hf-hub` does not know makes it fail.
const PROPERTIES: [&str; 1] = ["sha"];

/// The commit that the model's revision stands for now.
pub(super) async fn revision(hub: &Hub) -> Result<Revision, SourceError> {
    let client = client(hub)?;
    let (owner, name) = split_id(hub.model.name());
    let model = client.model(owner, name);
    let asked = hub.model.revision_or_default();
    let timing = *hub.timing();
    let ask = Ask::question(hub, Quota::Api);
    let (mut failures, mut refusals) = (0, 0);
    loop {
        hub.ready(ask).await?;
        let properties = PROPERTIES.map(str::to_owned).to_vec();
        let info = model.info().revision(asked).expand(properties).send();
        let error = match timeout(timing.header + timing.body, info).await {
            Ok(Ok(info)) => {
                hub.answered.store(true, Ordering::Relaxed);
                hub.canonical.get_or_init(|| info.id);
                return checked(hub, info.sha);
            }
            Ok(Err(HFError::RateLimited { retry_after, .. })) if refusals < timing.refusals => {
                refusals += 1;
                match retry_after {
                    Some(wait) => hub.block(Quota::Api, wait),
                    // `hf-hub` drops the header that says how long; our own call reads and obeys it.
                    None => drop(hub.call(&hub.revision_url(asked)).await?),
                }
                continue;
            }
            Ok(Err(error)) => meaning(hub, error),
            Err(_) => no_answer(&hub.host(), timing.header + timing.body),
        };
        hub.wait_to_repeat(error, failures, ask).await?;
        failures += 1;
    }
}

fn client(hub: &Hub) -> Result<HFClient, SourceError> {
    let token = hub.token().map_or(NO_TOKEN, |token| token.expose_secret());
    HFClient::builder()
        .endpoint(hub.endpoint())
        .token(token)
        .client(hub.clients.api.clone())
        .cache_enabled(false)
        // Its own retries know no Retry-After.
        .retry_max_attempts(0)
        .build()
        .map_err(|error| meaning(hub, error))
}

fn checked(hub: &Hub, sha: Option<String>) -> Result<Revision, SourceError> {
    let host = hub.host();
    let sha = sha.ok_or_else(|| hub.nonsense(format!("{host} names no commit for it")))?;
    let revision = Revision::new(&sha).ok().filter(|_| sha.len() == 40);
    let revision =
        revision.ok_or_else(|| hub.nonsense(format!("{host} names a commit that is none")))?;
    match hub.model.pinned() {
        Some(pinned) if pinned != revision => {
            Err(hub.nonsense(format!("{host} answers with the other commit {revision}")))
        }
        _ => Ok(revision),
    }
}

fn meaning(hub: &Hub, error: HFError) -> SourceError {
    let context = match error {
        HFError::Http { context }
        | HFError::AuthRequired { context }
        | HFError::Forbidden { context }
        | HFError::Conflict { context }
        | HFError::RepoNotFound {
            context: Some(context),
            ..
        }
        | HFError::RevisionNotFound {
            context: Some(context),
            ..
        } => (context, None),
        HFError::RateLimited {
            retry_after,
            context,
        } => (context, retry_after),
        HFError::Request { source, .. } if is_json(&source) => {
            return hub.nonsense(format!("the answer of {} is not the Hub's", hub.host()));
        }
        HFError::Request { source, .. } => return unreachable(&hub.host(), source),
        // The rest cannot come from this call, and its text may hold an address.
        _ => return hub.nonsense(format!("the answer of {} is not the Hub's", hub.host())),
    };
    let (context, retry_after) = context;
    let answer = Answer {
        status: context.status,
        code: context.error_code,
        message: context.server_message,
        retry_after,
    };
    refusal(hub, &hub.model.to_string(), &answer)
}

/// Did the body come whole, and was not what it should be?
fn is_json(error: &reqwest::Error) -> bool {
    let source = error.source();
    error.is_decode() && source.is_some_and(|source| source.is::<serde_json::Error>())
}
