//! Who may have which model: decided at every request for a volume, also when all bytes are here.
//!
//! The store is shared by all pods of a node, the right to read is not. A digest is no right, and
//! neither is a published snapshot.
//!
//! 1. The policy of the configuration says which namespace may ask for which model.
//! 2. Hub: nobody's, or the requester's own, token must be let in by the Hub, for that revision.
//!    S3: the requester's own keys, or this node's own identity if there are none, must read a byte of each
//!    file that is asked for. Directories: they must lie where this node may read. That the bytes are here
//!    proves nothing: somebody else's keys may have brought them.
//! 3. What the origin said is remembered for a short time, by the fingerprint of the credentials. While the
//!    origin is away nothing else counts, for the node's own identity neither. A no ends what was remembered.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::{Instant, timeout_at};
use weightd_core::blocking;
use weightd_core::digest::Digest;
use weightd_core::errors::Chain;
use weightd_core::model::{ModelRef, Patterns, Revision, Scheme};
use weightd_core::source::{Source, SourceError};
use weightd_core::store::{Store, StoreError};

use crate::config::WhenUnreachable;
use crate::sources::s3::S3Keys;
use crate::sources::{Asker, Origins, Resolved};

mod memory;
mod policy;
#[cfg(test)]
mod tests;

use memory::{Memory, Question};
pub use policy::{Policy, Refused, Rule, RuleError};

/// For [`AccessLimits::patience`]: there are two askers at most, so that it is well below the 110 s that
/// kubelet is made to wait.
pub const PATIENCE: Duration = Duration::from_secs(30);

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
                Some(Digest::of_parts(parts.map(str::as_bytes)))
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
    asker: Arc<Asker>,
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
    /// How long an origin may take to say whether one asker may read.
    pub patience: Duration,
}

/// Decides who may have which model.
pub struct Access {
    origins: Arc<Origins>,
    store: Arc<Store>,
    policy: Policy,
    limits: AccessLimits,
    memory: Arc<Memory>,
    /// The questions that are being asked. All who have the same one wait for one answer.
    asking: Mutex<HashMap<Question, WeakShared<Asking>>>,
}

type Asking = BoxFuture<'static, Result<Resolved, Failed>>;

/// Why a question lets nobody in.
#[derive(Debug, Clone)]
struct Failed {
    error: SourceError,
    /// The origin did answer, and we did not wait to the end. That is no outage: the length of an answer
    /// may be of the asker's own making.
    late: bool,
}

impl From<SourceError> for Failed {
    fn from(error: SourceError) -> Self {
        Self { error, late: false }
    }
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
        let keep = limits.remember.max(limits.unreachable_window);
        Self {
            origins,
            store,
            policy,
            limits,
            memory: Arc::new(Memory::new(keep)),
            asking: Mutex::default(),
        }
    }

    /// Establishes that `requester` may have the files of `model`: asks the origin as the requester, then as
    /// nobody, for a public model is everybody's, whatever token comes along.
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
        let askers = self.origins.askers(model.scheme(), &requester.credentials);
        let askers = askers.map_err(|error| refused(model, error))?;
        let mut askers = askers.into_iter().map(Arc::new);
        let mut refusal = None;
        while let Some(asker) = askers.next() {
            let failed = match self.ask(&asker, model, patterns).await {
                Ok(resolved) => return Ok(self.granted(resolved, asker, requester)?),
                Err(failed) => failed,
            };
            match failed.error {
                SourceError::Denied { .. } | SourceError::NotFound { .. } => {
                    // What the requester's own credentials were told says more.
                    refusal.get_or_insert(failed.error);
                }
                SourceError::Unavailable { .. } => {
                    let left = [asker].into_iter().chain(askers).collect();
                    let refused = refusal.is_some();
                    let (resolved, asker) = self
                        .without_origin(model, patterns, left, refused, failed)
                        .await?;
                    return Ok(self.granted(resolved, asker, requester)?);
                }
                error => return Err(refused(model, error)),
            }
        }
        Err(refused(
            model,
            refusal.unwrap_or_else(|| SourceError::Denied {
                what: model.to_string(),
                detail: "nobody may ask for it".to_owned(),
                hint: None,
            }),
        ))
    }

    /// For how long the origin's rate limit keeps `requester` from asking anything; `None` if it does not.
    #[must_use]
    pub fn limited_for(&self, model: &ModelRef, requester: &Requester) -> Option<Duration> {
        let askers = self.origins.askers(model.scheme(), &requester.credentials);
        let askers = askers.ok()?.into_iter();
        askers
            .filter_map(|asker| asker.inquire(model).limited_for())
            .max()
    }

    /// The grant, if the policy has nothing against what the origin calls the model either.
    fn granted(
        &self,
        resolved: Resolved,
        asker: Arc<Asker>,
        requester: &Requester,
    ) -> Result<Grant, Refused> {
        if let Some(canonical) = &resolved.canonical {
            self.policy.check(canonical, &requester.namespace)?;
        }
        Ok(Grant {
            revision: resolved.revision,
            asker,
        })
    }

    fn question(&self, asker: &Asker, model: &ModelRef, patterns: &Patterns) -> Question {
        Question {
            model: model.clone(),
            part: asker.part(patterns),
            who: asker.fingerprint(),
            by_name: model.scheme() == Scheme::Hf && !self.policy.is_open(),
        }
    }

    async fn ask(
        &self,
        asker: &Arc<Asker>,
        model: &ModelRef,
        patterns: &Patterns,
    ) -> Result<Resolved, Failed> {
        let question = self.question(asker, model, patterns);
        if let Some(error) = self.memory.refusal(&question) {
            return Err(error.into());
        }
        if let Some(resolved) = self.memory.resolved(&question)
            && (self.memory).accepted(&question.at(&resolved.revision), self.limits.remember)
        {
            return Ok(resolved);
        }
        self.asked(question, asker, patterns).await
    }

    /// Asks the origin, or joins those who ask it the same. It goes on while anyone waits for it.
    fn asked(&self, question: Question, asker: &Arc<Asker>, patterns: &Patterns) -> Shared<Asking> {
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(same) = asking.get(&question).and_then(WeakShared::upgrade) {
            return same;
        }
        let inquest = Inquest {
            memory: Arc::clone(&self.memory),
            asker: Arc::clone(asker),
            question: question.clone(),
            patterns: patterns.clone(),
            limits: self.limits,
        };
        let answer = inquest.hold().boxed().shared();
        asking.retain(|_, asking| asking.upgrade().is_some());
        asking.insert(question, answer.downgrade().expect("it was not asked yet"));
        answer
    }

    /// What holds while the origin cannot be asked. `a_refusal` says that it could be, and said no to the
    /// requester's own credentials.
    async fn without_origin(
        &self,
        model: &ModelRef,
        patterns: &Patterns,
        askers: Vec<Arc<Asker>>,
        a_refusal: bool,
        failed: Failed,
    ) -> Result<(Resolved, Arc<Asker>), AccessError> {
        let window = self.limits.unreachable_window;
        let (open, closed) = match self.limits.when_unreachable {
            WhenUnreachable::Remembered => (false, false),
            WhenUnreachable::Deny => (false, true),
            WhenUnreachable::Allow => (!a_refusal && !failed.late, false),
        };
        for asker in askers.into_iter().filter(|_| !closed) {
            let question = self.question(&asker, model, patterns);
            let mut resolved = self.memory.resolved_within(&question, window);
            if resolved.is_none() && open {
                resolved = self.last_resolved(model).await?.map(Resolved::from);
            }
            let Some(resolved) = resolved else {
                continue;
            };
            let at = question.at(&resolved.revision);
            if open || self.memory.accepted(&at, window) {
                tracing::warn!(%model, error = %Chain(&failed.error), "origin unavailable, going by what it said before");
                return Ok((resolved, asker));
            }
        }
        Err(refused(model, failed.error))
    }

    async fn last_resolved(&self, model: &ModelRef) -> Result<Option<Revision>, StoreError> {
        if let Some(pinned) = model.pinned() {
            return Ok(Some(pinned));
        }
        let (store, model) = (Arc::clone(&self.store), model.clone());
        blocking::run(move || store.last_resolved(&model)).await
    }
}

/// One question on its way to an origin.
struct Inquest {
    memory: Arc<Memory>,
    asker: Arc<Asker>,
    question: Question,
    patterns: Patterns,
    limits: AccessLimits,
}

impl Inquest {
    /// Asks, and remembers the answer.
    async fn hold(self) -> Result<Resolved, Failed> {
        let outcome = self.establish().await;
        match outcome.as_ref().map_err(|failed| &failed.error) {
            Err(error @ (SourceError::Denied { .. } | SourceError::NotFound { .. })) => {
                self.memory.refuse(&self.question, error);
            }
            Err(SourceError::Changed { .. }) => self.memory.forget_name(&self.question),
            _ => {}
        }
        outcome
    }

    async fn establish(&self) -> Result<Resolved, Failed> {
        let (memory, question) = (&self.memory, &self.question);
        let inquiry = self.asker.inquire(&question.model);
        let patience = self.limits.patience;
        let end = Instant::now() + patience;
        let late = |what: &str| Failed {
            error: SourceError::Unavailable {
                what: question.model.to_string(),
                detail: format!("{what} took longer than {} s", patience.as_secs_f64()),
                retry_after: None,
            },
            late: inquiry.has_answered(),
        };
        let resolved = match memory.resolved(question) {
            Some(resolved) => resolved,
            None => {
                let resolved = timeout_at(end, inquiry.resolve()).await;
                let resolved = resolved.map_err(|_| late("finding out its revision"))??;
                memory.name(question, &resolved);
                resolved
            }
        };
        let at = question.at(&resolved.revision);
        if !memory.accepted(&at, self.limits.remember) {
            let proof = inquiry.prove(&resolved.revision, &self.patterns);
            let proven = timeout_at(end, proof).await;
            proven.map_err(|_| late("listing its files and trying to read them"))??;
            memory.accept(at);
        }
        Ok(resolved)
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
