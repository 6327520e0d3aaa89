//! The places that models come from, one file a vendor.

use std::path::PathBuf;
use std::sync::Arc;

use weightd_core::digest::Digest;
use weightd_core::model::{ModelRef, Patterns, Revision, Scheme};
use weightd_core::source::{Source, SourceError, Sources};

use crate::access::Credentials;

use self::directory::DirectorySource;
use self::hf::{HfClients, HfConfig, HfConfigError, HfSource};
use self::s3::{S3ClientError, S3Clients, S3Config, S3Source};

#[cfg(test)]
mod conformance;
pub mod directory;
pub mod hf;
pub mod s3;

/// The sources of one process, with this process's own credentials.
pub struct Origins {
    hf: (Arc<HfClients>, HfConfig),
    s3: (Arc<S3Clients>, S3Config),
    /// The directories that `file://` may name; `None` for all.
    directories: Option<Vec<PathBuf>>,
}

/// No source can be set up.
#[derive(Debug, thiserror::Error)]
pub enum OriginsError {
    /// Not the Hub.
    #[error("cannot set up the Hub's client")]
    Hf(#[from] HfConfigError),
    /// Not S3.
    #[error("cannot set up S3's client")]
    S3(#[from] S3ClientError),
}

impl Origins {
    /// Sources as a configuration says. `directories` limits what `file://` may name.
    ///
    /// # Errors
    ///
    /// [`OriginsError`] if no TLS can be set up.
    pub fn new(
        hf: HfConfig,
        s3: S3Config,
        directories: Option<Vec<PathBuf>>,
    ) -> Result<Self, OriginsError> {
        Ok(Self {
            hf: (HfClients::new()?, hf),
            s3: (S3Clients::new()?, s3),
            directories,
        })
    }

    /// As the environment says, for a user's own process.
    ///
    /// # Errors
    ///
    /// [`OriginsError`] if what it says of the Hub cannot be used.
    pub fn from_env() -> Result<Self, OriginsError> {
        Self::new(HfConfig::from_env()?, S3Config::default(), None)
    }
}

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
                let config = self.s3.1.with_keys(keys);
                vec![Who::Keys(Box::new(config), print)]
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
    /// Tells askers apart; `None` for nobody and for the node itself.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Digest> {
        match &self.who {
            Who::Token(_, print) | Who::Keys(_, print) => Some(*print),
            Who::Anybody(_) | Who::Node => None,
        }
    }

    /// Whether the node's own identity asks, so that only the policy says who may have the answer.
    #[must_use]
    pub fn is_node(&self) -> bool {
        matches!(self.who, Who::Node)
    }

    /// What the model's name stands for now.
    ///
    /// # Errors
    ///
    /// As [`Source::resolve`].
    pub async fn resolve(&self, model: &ModelRef) -> Result<Revision, SourceError> {
        match self.hub(model) {
            Some(source) => source.resolve().await,
            None => self.open(model)?.resolve().await,
        }
    }

    /// Establishes that who asks may read the content, not only list it.
    ///
    /// # Errors
    ///
    /// As [`Source::list`].
    pub async fn prove(
        &self,
        model: &ModelRef,
        revision: &Revision,
        patterns: &Patterns,
    ) -> Result<(), SourceError> {
        match (&self.who, self.hub(model)) {
            (_, Some(source)) => source.authorise(revision).await,
            // S3 lets nobody look at an object who may not read it.
            (Who::Keys(..), None) => self.open(model)?.list(revision, patterns).await.map(drop),
            _ => Ok(()),
        }
    }

    fn hub(&self, model: &ModelRef) -> Option<HfSource> {
        let (Who::Token(config, _) | Who::Anybody(config)) = &self.who else {
            return None;
        };
        let clients = Arc::clone(&self.origins.hf.0);
        Some(HfSource::new(clients, config.clone(), model.clone()))
    }

    /// Opens the source to fetch from.
    ///
    /// # Errors
    ///
    /// As [`Sources::open`].
    pub fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        debug_assert_eq!(model.scheme(), self.scheme);
        match (&self.who, self.scheme) {
            (Who::Token(config, _), _) => {
                let clients = Arc::clone(&self.origins.hf.0);
                let source = HfSource::new(clients, config.clone(), model.clone());
                Ok(Arc::new(source))
            }
            (Who::Keys(config, _), _) => Ok(self.origins.s3_source(config, model)),
            (Who::Node | Who::Anybody(_), _) => self.origins.open(model),
        }
    }
}

impl Origins {
    fn s3_source(&self, config: &S3Config, model: &ModelRef) -> Arc<dyn Source> {
        let clients = Arc::clone(&self.s3.0);
        Arc::new(S3Source::new(clients, config.clone(), model.clone()))
    }
}

impl Sources for Origins {
    fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        let named = model.clone();
        Ok(match model.scheme() {
            Scheme::Hf => Arc::new(HfSource::new(
                Arc::clone(&self.hf.0),
                self.hf.1.clone(),
                named,
            )),
            Scheme::S3 => self.s3_source(&self.s3.1, model),
            Scheme::File => Arc::new(DirectorySource::new(named, self.directories.clone())),
        })
    }
}
