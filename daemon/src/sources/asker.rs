//! Asking an origin on somebody's behalf: who they are to it, and what it lets them read.

use std::sync::Arc;
use std::time::Duration;

use weightd_core::digest::Digest;
use weightd_core::model::{ModelRef, Patterns, Revision, Scheme};
use weightd_core::source::{Source, SourceError, Sources};

use super::Origins;
use super::directory::DirectorySource;
use super::hf::{HfConfig, HfConfigError, HfSource};
use super::s3::{S3Config, S3Source};
use crate::access::Credentials;

/// One way to ask an origin: as the requester, as nobody, or as this node.
pub struct Asker {
    origins: Arc<Origins>,
    scheme: Scheme,
    who: Who,
}

enum Who {
    /// A requester of the Hub's.
    Token(HfConfig, Digest),
    /// Anybody. Bytes are then fetched with this process's own token, which has a quota of its own.
    Anybody(HfConfig),
    /// A requester of S3's.
    Keys(Box<S3Config>, Digest),
    /// This process's own identity.
    Node,
}

impl Origins {
    /// The ways to ask on behalf of a requester, the one to try first first.
    ///
    /// # Errors
    ///
    /// [`SourceError::Denied`] if the credentials cannot be used.
    pub fn askers(
        self: &Arc<Self>,
        scheme: Scheme,
        credentials: &Credentials,
    ) -> Result<Vec<Asker>, SourceError> {
        let unfit = |error: HfConfigError| SourceError::Denied {
            what: "the Hub".to_owned(),
            detail: error.to_string(),
            hint: Some("put the token alone into the Secret's key hf-token".to_owned()),
        };
        let fingerprint = credentials.fingerprint(scheme);
        let whos = match (scheme, fingerprint) {
            (Scheme::Hf, print) => {
                let token = credentials.hf_token.clone().zip(print);
                let own = token.map(|(token, print)| {
                    let config = self.hf.1.with_token(Some(token)).map_err(unfit)?;
                    Ok(Who::Token(config, print))
                });
                let nobody = self.hf.1.with_token(None).map_err(unfit)?;
                let own = own.transpose()?;
                own.into_iter().chain([Who::Anybody(nobody)]).collect()
            }
            (Scheme::S3, Some(print)) => {
                let keys = credentials.s3.clone().expect("they have a fingerprint");
                vec![Who::Keys(Box::new(self.s3.1.with_keys(keys)), print)]
            }
            (Scheme::S3, None) | (Scheme::File, _) => vec![Who::Node],
        };
        let asker = |who| Asker {
            origins: Arc::clone(self),
            scheme,
            who,
        };
        Ok(whos.into_iter().map(asker).collect())
    }
}

impl Asker {
    /// Tells the askers of one scheme apart; `None` for nobody, and for the node itself.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Digest> {
        match &self.who {
            Who::Token(_, print) | Who::Keys(_, print) => Some(*print),
            Who::Anybody(_) | Who::Node => None,
        }
    }

    /// Tells apart what a right is for: at S3 each object has its own, so that it holds for the files that
    /// were asked for; a repository and a directory are read whole or not at all.
    #[must_use]
    pub fn part(&self, patterns: &Patterns) -> Option<Digest> {
        (self.scheme == Scheme::S3).then(|| {
            let text = serde_json::to_vec(patterns).expect("lists of texts are JSON");
            Digest::of(&text)
        })
    }

    /// Readies questions about one model. Nothing is asked yet.
    #[must_use]
    pub fn inquire(&self, model: &ModelRef) -> Inquiry {
        debug_assert_eq!(model.scheme(), self.scheme);
        let (origins, named) = (&self.origins, model.clone());
        match (&self.who, self.scheme) {
            (Who::Token(config, _) | Who::Anybody(config), _) => {
                let clients = Arc::clone(&origins.hf.0);
                Inquiry::Hub(HfSource::new(clients, config.clone(), named))
            }
            (Who::Keys(config, _), _) => Inquiry::S3(origins.s3_source(config, model)),
            (Who::Node, Scheme::File) => {
                let allowed = origins.directories.clone();
                Inquiry::Directory(DirectorySource::new(named, allowed))
            }
            // The Hub is never asked as the node: its own token opens nothing for pods.
            (Who::Node, Scheme::S3 | Scheme::Hf) => {
                Inquiry::S3(origins.s3_source(&origins.s3.1, model))
            }
        }
    }

    /// Opens the source to fetch from.
    ///
    /// # Errors
    ///
    /// As [`Sources::open`].
    pub fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        match (&self.who, self.inquire(model)) {
            (Who::Anybody(_), _) => self.origins.open(model),
            (_, Inquiry::Hub(source)) => Ok(Arc::new(source)),
            (_, Inquiry::S3(source)) => Ok(Arc::new(source)),
            (_, Inquiry::Directory(source)) => Ok(Arc::new(source)),
        }
    }
}

/// What a model's name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The revision.
    pub revision: Revision,
    /// What the origin calls the model, if that is something else: a repository may have been renamed.
    pub canonical: Option<ModelRef>,
}

impl From<Revision> for Resolved {
    fn from(revision: Revision) -> Self {
        Self {
            revision,
            canonical: None,
        }
    }
}

/// Questions to an origin about one model. What it said to one helps with the next.
pub enum Inquiry {
    /// A repository.
    Hub(HfSource),
    /// A prefix.
    S3(S3Source),
    /// A directory.
    Directory(DirectorySource),
}

impl Inquiry {
    /// As [`Source::limited_for`].
    #[must_use]
    pub fn limited_for(&self) -> Option<Duration> {
        match self {
            Self::Hub(source) => source.limited_for(),
            Self::S3(source) => source.limited_for(),
            Self::Directory(source) => source.limited_for(),
        }
    }

    /// What the model's name stands for now.
    ///
    /// # Errors
    ///
    /// As [`Source::resolve`].
    pub async fn resolve(&self) -> Result<Resolved, SourceError> {
        match self {
            Self::Hub(source) => Ok(Resolved {
                revision: source.resolve().await?,
                canonical: source.renamed()?,
            }),
            Self::S3(source) => source.resolve().await.map(Resolved::from),
            Self::Directory(source) => source.resolve().await.map(Resolved::from),
        }
    }

    /// Whether the origin gave an answer to any of the questions.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        match self {
            Self::Hub(source) => source.has_answered(),
            Self::S3(source) => source.has_answered(),
            // There is nobody else to be away.
            Self::Directory(_) => true,
        }
    }

    /// Establishes that who asks may read the content, not only list it.
    ///
    /// # Errors
    ///
    /// As [`Source::list`].
    pub async fn prove(&self, revision: &Revision, patterns: &Patterns) -> Result<(), SourceError> {
        match self {
            Self::Hub(source) => source.authorise(revision).await,
            Self::S3(source) => source.authorise(revision, patterns).await,
            Self::Directory(source) => source.authorise().await,
        }
    }
}
