//! Who may have which model: decided at every request for a volume, also when all bytes are here.
//!
//! The store is shared by all pods of a node, the right to read is not. A digest is no right, and
//! neither is a published snapshot.
//!
//! 1. The policy of the configuration says which namespace may ask for which model.
//! 2. Hub: nobody's, or the requester's own, token must be let in by the Hub, for that revision.
//!    S3 with keys of the requester's own: S3 must let these keys list and look. Else the policy, and what
//!    this node's own identity may read, decide.
//! 3. What the origin said is remembered for a short time, by the fingerprint of the credentials.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;
use weightd_core::blocking;
use weightd_core::digest::Digest;
use weightd_core::errors::Chain;
use weightd_core::model::{ModelRef, Patterns, Revision, Scheme};
use weightd_core::source::{Source, SourceError};
use weightd_core::store::{Store, StoreError};

use crate::config::WhenUnreachable;
use crate::sources::s3::S3Keys;
use crate::sources::{Asker, Origins};

mod policy;

pub use policy::{Policy, Refused, Rule, RuleError};

/// How long what a branch or a prefix stood for is taken for granted: 30 s. Hundreds of pods that start
/// together then cost the Hub one question.
const NAME: Duration = Duration::from_secs(30);

/// How long an origin may take to say who may read: with what the daemon does before and after it, well
/// below the 110 s that kubelet is made to wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a requester proves its rights with. It never leaves memory.
#[derive(Default)]
pub struct Credentials {
    /// A token of the Hub's.
    pub hf_token: Option<SecretString>,
    /// Keys of S3's.
    pub s3: Option<S3Keys>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("has_hf_token", &self.hf_token.is_some())
            .field("has_s3_keys", &self.s3.is_some())
            .finish()
    }
}

impl Credentials {
    /// Tells the requesters of one kind of source apart; `None` for nobody, or the node's own identity.
    pub(crate) fn fingerprint(&self, scheme: Scheme) -> Option<Digest> {
        match scheme {
            Scheme::Hf => {
                let token = self.hf_token.as_ref()?;
                Some(Digest::of(token.expose_secret().as_bytes()))
            }
            Scheme::S3 => {
                let keys = self.s3.as_ref()?;
                let token = keys.session_token.as_ref();
                let parts = [
                    keys.access_key_id.as_str(),
                    keys.secret_access_key.expose_secret(),
                    token.map_or("", |token| token.expose_secret()),
                ];
                Some(Digest::of(parts.join("\n").as_bytes()))
            }
            Scheme::File => None,
        }
    }
}

/// Who asks for a model.
#[derive(Debug, Default)]
pub struct Requester {
    /// The namespace, as kubelet says it; empty if nobody vouches for one.
    pub namespace: String,
    /// What it proves its rights with.
    pub credentials: Credentials,
}

/// The right to have a model at a revision.
pub struct Grant {
    /// What the model's name stands for.
    pub revision: Revision,
    asker: Asker,
}

impl Grant {
    /// Opens the source with the credentials that were accepted.
    ///
    /// # Errors
    ///
    /// [`SourceError`] if they cannot be used.
    pub fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        self.asker.open(model)
    }
}

/// Why a requester does not get a model.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The configuration says no.
    #[error(transparent)]
    Policy(#[from] Refused),
    /// The origin says no, or cannot be asked.
    #[error("cannot establish that {model} may be read")]
    Source {
        /// What was asked for.
        model: ModelRef,
        /// What the origin said.
        #[source]
        source: SourceError,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How long rights are remembered.
#[derive(Debug, Clone, Copy)]
pub struct AccessLimits {
    /// How long an origin's yes holds without asking again.
    pub remember: Duration,
    /// What holds while an origin cannot be asked.
    pub when_unreachable: WhenUnreachable,
    /// How old a yes may be then.
    pub unreachable_window: Duration,
}

/// Decides who may have which model.
pub struct Access {
    origins: Arc<Origins>,
    store: Arc<Store>,
    policy: Policy,
    limits: AccessLimits,
    memory: Mutex<Memory>,
}

#[derive(Default)]
struct Memory {
    /// What a name stood for, for whom.
    names: HashMap<(ModelRef, Option<Digest>), (Revision, Instant)>,
    /// Who was let in: to the model at that revision, by which credentials.
    accepted: HashMap<(ModelRef, Option<Digest>), Instant>,
}

impl Access {
    /// Asks `origins`, within `policy`.
    #[must_use]
    pub fn new(
        origins: Arc<Origins>,
        store: Arc<Store>,
        policy: Policy,
        limits: AccessLimits,
    ) -> Self {
        Self {
            origins,
            store,
            policy,
            limits,
            memory: Mutex::default(),
        }
    }

    /// Establishes that `requester` may have the files of `model`.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if it may not, or that cannot be established now.
    pub async fn grant(
        &self,
        model: &ModelRef,
        patterns: &Patterns,
        requester: &Requester,
    ) -> Result<Grant, AccessError> {
        self.policy.check(model, &requester.namespace)?;
        let late = || {
            Err(SourceError::Unavailable {
                what: model.to_string(),
                detail: format!("no answer within {} s", PATIENCE.as_secs()),
                retry_after: None,
            })
        };
        let asked = self.ask(model, patterns, &requester.credentials);
        let asked = tokio::time::timeout(PATIENCE, asked);
        match asked.await.unwrap_or_else(|_| late()) {
            Ok(grant) => Ok(grant),
            Err(error @ SourceError::Unavailable { .. }) => {
                self.without_origin(model, &requester.credentials, error)
                    .await
            }
            Err(source) => Err(refused(model, source)),
        }
    }

    /// Asks the origin as the requester, then as nobody: a public model is everybody's, whatever token
    /// comes along.
    async fn ask(
        &self,
        model: &ModelRef,
        patterns: &Patterns,
        credentials: &Credentials,
    ) -> Result<Grant, SourceError> {
        let mut refused = None;
        for asker in self.origins.askers(model.scheme(), credentials)? {
            match self.ask_as(asker, model, patterns).await {
                Err(error @ (SourceError::Denied { .. } | SourceError::NotFound { .. })) => {
                    // What the requester's own credentials were told says more.
                    refused.get_or_insert(error);
                }
                outcome => return outcome,
            }
        }
        Err(refused.unwrap_or_else(|| SourceError::Denied {
            what: model.to_string(),
            detail: "nobody may ask for it".to_owned(),
            hint: None,
        }))
    }

    async fn ask_as(
        &self,
        asker: Asker,
        model: &ModelRef,
        patterns: &Patterns,
    ) -> Result<Grant, SourceError> {
        let who = asker.fingerprint();
        let known = model.pinned().or_else(|| self.named(model, who, NAME));
        let revision = match known {
            Some(revision) => revision,
            None => asker.resolve(model).await?,
        };
        let at = model.at(&revision);
        if !self.accepted(&at, who, self.limits.remember) {
            asker.prove(&at, &revision, patterns).await?;
            self.remember(model, &revision, who);
        }
        Ok(Grant { revision, asker })
    }

    /// What holds while the origin cannot be asked.
    async fn without_origin(
        &self,
        model: &ModelRef,
        credentials: &Credentials,
        error: SourceError,
    ) -> Result<Grant, AccessError> {
        let window = self.limits.unreachable_window;
        let askers = self.origins.askers(model.scheme(), credentials);
        for asker in askers.map_err(|error| refused(model, error))? {
            let who = asker.fingerprint();
            let open = self.limits.when_unreachable == WhenUnreachable::Allow;
            let closed = self.limits.when_unreachable == WhenUnreachable::Deny;
            // What only the policy guards needs no origin's word.
            let trusted = open || asker.is_node();
            let mut revision = model.pinned().or_else(|| self.named(model, who, window));
            if revision.is_none() && trusted {
                revision = self.last_resolved(model).await?;
            }
            let Some(revision) = revision.filter(|_| !closed) else {
                continue;
            };
            if trusted || self.accepted(&model.at(&revision), who, window) {
                tracing::warn!(%model, error = %Chain(&error), "origin unavailable, going by what it said before");
                return Ok(Grant { revision, asker });
            }
        }
        Err(refused(model, error))
    }

    async fn last_resolved(&self, model: &ModelRef) -> Result<Option<Revision>, StoreError> {
        let (store, model) = (Arc::clone(&self.store), model.clone());
        blocking::run(move || store.last_resolved(&model)).await
    }

    fn named(&self, model: &ModelRef, who: Option<Digest>, within: Duration) -> Option<Revision> {
        let memory = self.memory();
        let (revision, at) = memory.names.get(&(model.clone(), who))?;
        (at.elapsed() < within).then(|| revision.clone())
    }

    fn accepted(&self, at: &ModelRef, who: Option<Digest>, within: Duration) -> bool {
        let memory = self.memory();
        let accepted = memory.accepted.get(&(at.clone(), who));
        accepted.is_some_and(|accepted| accepted.elapsed() < within)
    }

    fn remember(&self, model: &ModelRef, revision: &Revision, who: Option<Digest>) {
        let now = Instant::now();
        let keep = self.limits.remember.max(self.limits.unreachable_window);
        let mut memory = self.memory();
        // A daemon meets many tokens and revisions; what is too old to count needs no memory.
        memory.names.retain(|_, (_, at)| at.elapsed() < keep);
        memory.accepted.retain(|_, at| at.elapsed() < keep);
        memory
            .names
            .insert((model.clone(), who), (revision.clone(), now));
        memory.accepted.insert((model.at(revision), who), now);
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(model: &ModelRef, source: SourceError) -> AccessError {
    AccessError::Source {
        model: model.clone(),
        source,
    }
}

impl AccessError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Policy(_) => Some(
                "access.allow and access.deny of the daemon's configuration decide that".to_owned(),
            ),
            Self::Source {
                source: source @ SourceError::Denied { .. },
                model,
            } if model.scheme() == Scheme::Hf => {
                let said = source.hint().unwrap_or_default();
                Some(format!(
                    "{said}{}name a Secret with the key hf-token in the volume's nodePublishSecretRef",
                    if said.is_empty() { "" } else { "; for a pod: " }
                ))
            }
            Self::Source { source, .. } => source.hint().map(str::to_owned),
            Self::Store(error) => error.hint(),
        }
    }
}
