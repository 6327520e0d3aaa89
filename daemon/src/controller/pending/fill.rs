//! Filling the shared tier with one model.
//!
//! Each fill has a store, a fetcher and a view of the tier of its own: so it can be ended alone, and leaves nothing
//! behind but what it wrote to the tier. The store is scratch: what has come is shared segment by segment, and a
//! fill that begins anew takes those from there.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::fetch::{FetchLimits, FetchRequest, Fetcher, Plan};
use weightd_core::metrics::Metrics;
use weightd_core::model::{ModelRef, Revision, Scheme};
use weightd_core::shared::{SharedConfig, SharedTier, is_shareable};
use weightd_core::source::{Source, SourceError, Sources};
use weightd_core::store::{Store, StoreError, StoreLimits};

use super::wish::{Asker, Wish};
use crate::access::{Access, AccessError, Policy, Requester};
use crate::config::{Config, ConfigError};
use crate::sources::{Origins, OriginsError};

/// How long what is written behind may take after the last byte has come.
const SETTLE: Duration = Duration::from_secs(900);

/// How long a fetch may take to let go when it is ended.
const LET_GO: Duration = Duration::from_secs(2);

/// Why nothing can be filled.
#[derive(Debug, thiserror::Error)]
pub(in crate::controller) enum FillerError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Origins(#[from] OriginsError),
    #[error("cannot use the scratch directory")]
    Store(#[from] StoreError),
}

/// How a fill ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// The tier has all that can be shared.
    Filled(String),
    /// It had all before.
    There(String),
    /// Nothing of the model can be shared.
    Unshareable(String),
    /// None of those who asked may have it.
    Denied(Vec<Refusal>),
    /// It may succeed later.
    Failed(String),
    /// It was no longer wanted, or this process leads no more.
    Stopped,
}

/// What somebody is told who may not have a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub asker: Asker,
    pub text: String,
    /// It says nothing against the pod: its node has what the controller lacks.
    pub expected: bool,
}

impl Refusal {
    fn new(error: &AccessError, asker: &Asker) -> Self {
        let closed = match error {
            AccessError::Source {
                model,
                source: SourceError::Denied { .. } | SourceError::NotFound { .. },
            } => asker.secret.then_some(model),
            _ => None,
        };
        let text = match closed {
            Some(model) => format!(
                "{model} is not public, and the controller does not see the pod's Secret: its node fetches it"
            ),
            None => Chain(error).to_string(),
        };
        Self {
            asker: asker.clone(),
            text,
            expected: closed.is_some(),
        }
    }
}

/// How far a fill is.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Now {
    /// What pods are told, once it is known what there is to do.
    pub text: Option<String>,
    /// The part of the bytes that has come, from 0 to 1.
    pub done: f64,
}

/// Fills the tier, one model a call.
pub(super) struct Filler {
    origins: Arc<Origins>,
    access: Access,
    policy: Policy,
    /// Models that nobody may read may be filled with the controller's own credentials.
    own_credentials: bool,
    scratch: PathBuf,
    store: StoreLimits,
    fetch: FetchLimits,
    tier: SharedConfig,
    metrics: Arc<Metrics>,
}

/// A model that may be filled: where, and as what.
struct Permitted {
    revision: Revision,
    source: Arc<dyn Source>,
}

impl Filler {
    /// As the configuration says. What an earlier process left in the scratch directory is removed.
    pub(super) async fn new(
        config: &Config,
        tier: SharedConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self, FillerError> {
        let origins = Origins::new(config.hf_config()?, config.s3_config()?, Some(Vec::new()))?;
        let origins = Arc::new(origins);
        let scratch = config.root.join("pending");
        let (dir, limits) = (scratch.clone(), config.store_limits());
        let store = blocking::run(move || {
            // Not ours to report: opening the store says what is wrong with the directory.
            let _ = std::fs::remove_dir_all(&dir);
            Store::open(&dir.join("rights"), limits)
        });
        let access = Access::new(
            Arc::clone(&origins),
            store.await?,
            config.policy()?,
            config.access_limits(),
        );
        let fills = config.controller.fills;
        let mut fetch = config.fetch_limits();
        fetch.connections = (fetch.connections / fills).max(1);
        fetch.memory_bytes =
            (fetch.memory_bytes / fills as u64).max(fetch.connections as u64 * (64 << 10));
        Ok(Self {
            origins,
            access,
            policy: config.policy()?,
            own_credentials: config.controller.own_credentials && !config.access.allow.is_empty(),
            scratch,
            store: config.store_limits(),
            fetch,
            tier,
            metrics,
        })
    }

    /// Fills the tier with `wish`, if one of `askers` may have it. Ends soon after `stop`.
    pub(super) async fn fill(
        &self,
        wish: &Wish,
        askers: &[Asker],
        now: &watch::Sender<Now>,
        stop: &CancellationToken,
    ) -> Ended {
        let permitted = self.permitted(wish, askers);
        let permitted = match stop.run_until_cancelled(permitted).await {
            Some(Ok(permitted)) => permitted,
            Some(Err(ended)) => return ended,
            None => return Ended::Stopped,
        };
        let scratch = self.scratch.join(uuid::Uuid::new_v4().to_string());
        let ended = self
            .bring(wish, permitted, scratch.clone(), now, stop)
            .await;
        blocking::run(move || drop(std::fs::remove_dir_all(&scratch))).await;
        ended.unwrap_or_else(|ended| ended)
    }

    /// Finds somebody who may have it, as a daemon would if none of them had a Secret.
    async fn permitted(&self, wish: &Wish, askers: &[Asker]) -> Result<Permitted, Ended> {
        let mut refusals = Vec::new();
        for asker in askers {
            match self.ask(wish, asker).await {
                Ok(permitted) => return Ok(permitted),
                // It is away for whoever asks, and may be back soon.
                Err(
                    error @ AccessError::Source {
                        source: SourceError::Unavailable { .. } | SourceError::Changed { .. },
                        ..
                    },
                ) => return Err(Ended::Failed(Chain(&error).to_string())),
                Err(error) => refusals.push(Refusal::new(&error, asker)),
            }
        }
        Err(Ended::Denied(refusals))
    }

    async fn ask(&self, wish: &Wish, asker: &Asker) -> Result<Permitted, AccessError> {
        let (model, patterns) = (&wish.model, &wish.patterns);
        let requester = Requester {
            namespace: asker.namespace.clone(),
            ..Requester::default()
        };
        let of_source = |source| AccessError::Source {
            model: model.clone(),
            source,
        };
        let refusal = if asker.secret && model.scheme() == Scheme::S3 {
            // Whether its keys open it cannot be known here, and ours are not what it will be asked with.
            of_source(SourceError::Denied {
                what: model.to_string(),
                detail: "it is read with a Secret, which the controller does not see".to_owned(),
                hint: None,
            })
        } else {
            match self.access.grant(model, patterns, &requester).await {
                Ok(grant) => {
                    let source = grant.open(&model.at(&grant.revision)).map_err(of_source)?;
                    let revision = grant.revision;
                    return Ok(Permitted { revision, source });
                }
                Err(error) => error,
            }
        };
        let denied = matches!(
            refusal,
            AccessError::Source {
                source: SourceError::Denied { .. } | SourceError::NotFound { .. },
                ..
            }
        );
        if !(self.own_credentials && denied && asker.secret) {
            return Err(refusal);
        }
        self.policy.check(model, &asker.namespace)?;
        let source = self.origins.open(model).map_err(of_source)?;
        let revision = source.resolve().await.map_err(|_| refusal)?;
        let source = self.origins.open(&model.at(&revision)).map_err(of_source)?;
        Ok(Permitted { revision, source })
    }

    async fn bring(
        &self,
        wish: &Wish,
        permitted: Permitted,
        scratch: PathBuf,
        now: &watch::Sender<Now>,
        stop: &CancellationToken,
    ) -> Result<Ended, Ended> {
        let Permitted { revision, source } = permitted;
        let model = wish.model.at(&revision);
        let failed =
            |error: &(dyn std::error::Error + 'static)| Ended::Failed(Chain(error).to_string());
        let (store, fresh) = self.stores(scratch).await?;
        let here = self.fetcher(&store);
        let looking = async {
            let listing = source.list(&revision, &wish.patterns).await;
            let listing = listing.map_err(|error| failed(&error))?;
            let alone = listing.files.iter().filter(|file| !is_shareable(file));
            let alone: u64 = alone.map(|file| file.size).sum();
            Ok((alone, here.look(&model, wish).await?))
        };
        let looked = stop
            .run_until_cancelled(looking)
            .await
            .unwrap_or(Err(Ended::Stopped));
        let (alone, plan) = match looked {
            Ok(looked) => looked,
            Err(ended) => {
                here.end().await;
                return Err(ended);
            }
        };
        let can = plan.bytes_to_fetch.saturating_sub(alone);
        if can == 0 || plan.bytes_shared >= can {
            here.end().await;
            return Ok(match can {
                0 => Ended::Unshareable(format!(
                    "the origin names no checksum for the files of {model}: each node fetches them for itself"
                )),
                _ => Ended::There(format!("the shared tier has {model}, {}", bytes(can))),
            });
        }
        now.send_modify(|now| now.text = Some(begun(&plan, can)));
        let request = FetchRequest {
            model: model.clone(),
            patterns: wish.patterns.clone(),
            pin: None,
        };
        let seconds = here.fetch(source, request, now, stop).await?;
        // The tier itself is asked: what was written behind may have failed.
        let after = self.fetcher(&fresh);
        let looked = stop.run_until_cancelled(after.look(&model, wish)).await;
        after.end().await;
        let has = looked.unwrap_or(Err(Ended::Stopped))?.bytes_shared;
        if has < can {
            let (has, can) = (bytes(has), bytes(can));
            return Err(Ended::Failed(format!(
                "the shared tier took {has} of {can} of {model}"
            )));
        }
        let (can, pace) = (bytes(can), seconds.round());
        Ok(Ended::Filled(format!(
            "the shared tier has {model}, {can}, after {pace} s: nodes copy it from there"
        )))
    }

    /// A store to fetch into, and one that stays empty.
    async fn stores(&self, scratch: PathBuf) -> Result<(Arc<Store>, Arc<Store>), Ended> {
        let limits = self.store;
        let opened = blocking::run(move || {
            let fresh = Store::open(&scratch.join("after"), limits)?;
            Ok((Store::open(&scratch.join("before"), limits)?, fresh))
        });
        let opened: Result<_, StoreError> = opened.await;
        opened.map_err(|error| Ended::Failed(Chain(&error).to_string()))
    }

    fn fetcher(&self, store: &Arc<Store>) -> Fetching {
        let tier = SharedTier::new(self.tier.clone(), Arc::clone(&self.metrics));
        let fetcher = Fetcher::with_tier(
            Arc::clone(store),
            Arc::<Origins>::clone(&self.origins),
            self.fetch,
            Arc::clone(&self.metrics),
            Some(Arc::clone(&tier)),
        );
        Fetching { tier, fetcher }
    }
}

/// A fetcher with its view of the tier.
struct Fetching {
    tier: Arc<SharedTier>,
    fetcher: Arc<Fetcher>,
}

impl Fetching {
    /// What there is to do; an error if the tier cannot be written.
    async fn look(&self, model: &ModelRef, wish: &Wish) -> Result<Plan, Ended> {
        self.tier.seen().await;
        let state = self.tier.state();
        if !state.writable {
            return Err(Ended::Failed(format!(
                "the shared tier cannot be written: {}",
                state.detail
            )));
        }
        let plan = self.fetcher.plan(model, &wish.patterns).await;
        plan.map_err(|error| Ended::Failed(Chain(&error).to_string()))
    }

    /// Fetches, and waits until the tier has it. Gives the seconds that took.
    async fn fetch(
        self,
        source: Arc<dyn Source>,
        request: FetchRequest,
        now: &watch::Sender<Now>,
        stop: &CancellationToken,
    ) -> Result<f64, Ended> {
        let began = Instant::now();
        let fetch = self.fetcher.fetch_from(source, request);
        let mut progress = fetch.progress();
        let outcome = fetch.wait();
        tokio::pin!(outcome);
        let outcome = loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    self.end().await;
                    return Err(Ended::Stopped);
                }
                outcome = &mut outcome => break outcome,
                Ok(()) = progress.changed() => {
                    let seen = progress.borrow_and_update().clone();
                    let done = seen.bytes_done as f64 / seen.bytes.max(1) as f64;
                    now.send_modify(|now| now.done = done);
                }
            }
        };
        let settled = stop
            .run_until_cancelled(self.fetcher.shutdown(SETTLE))
            .await;
        if settled.is_none() {
            self.end().await;
            return Err(Ended::Stopped);
        }
        match outcome {
            Ok(_) => Ok(began.elapsed().as_secs_f64()),
            Err(error) => Err(Ended::Failed(Chain(&error).to_string())),
        }
    }

    /// Ends what is under way.
    async fn end(self) {
        self.fetcher.shutdown(LET_GO).await;
    }
}

fn begun(plan: &Plan, can: u64) -> String {
    let origin = match plan.model.scheme() {
        Scheme::Hf => "the Hub",
        Scheme::S3 => "S3",
        Scheme::File => "disk",
    };
    let (model, all, has) = (&plan.model, bytes(can), bytes(plan.bytes_shared));
    let missing = bytes(can - plan.bytes_shared);
    match plan.bytes_shared {
        0 => format!("filling the shared tier with {model}: {all} from {origin}"),
        _ => format!(
            "filling the shared tier with {model}: {missing} from {origin}, {has} of {all} are there"
        ),
    }
}

/// Bytes for people: `16.1 GiB`.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = "B";
    for larger in UNITS {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    match unit {
        "B" => format!("{count} B"),
        _ => format!("{value:.1} {unit}"),
    }
}

#[cfg(test)]
pub(super) mod tests;
