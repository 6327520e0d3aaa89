//! The places that models come from, one file a vendor.

use std::path::PathBuf;
use std::sync::Arc;

use weightd_core::model::{ModelRef, Scheme};
use weightd_core::source::{Source, SourceError, Sources};

use self::directory::DirectorySource;
use self::hf::{HfClients, HfConfig, HfConfigError, HfSource};
use self::s3::{S3ClientError, S3Clients, S3Config, S3Source};

mod asker;
#[cfg(test)]
mod conformance;
pub mod directory;
pub mod hf;
pub mod s3;

pub use asker::{Asker, Inquiry, Resolved};

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

    /// As the environment says, for a user's own process. With `shared`, it takes part in a shared tier.
    ///
    /// # Errors
    ///
    /// [`OriginsError`] if what it says of the Hub cannot be used.
    pub fn from_env(shared: bool) -> Result<Self, OriginsError> {
        let s3 = S3Config {
            believe_metadata: true,
            look_at_all: shared,
            ..S3Config::default()
        };
        Self::new(HfConfig::from_env()?, s3, None)
    }
}

impl Origins {
    fn s3_source(&self, config: &S3Config, model: &ModelRef) -> S3Source {
        let clients = Arc::clone(&self.s3.0);
        S3Source::new(clients, config.clone(), model.clone())
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
            Scheme::S3 => Arc::new(self.s3_source(&self.s3.1, model)),
            Scheme::File => Arc::new(DirectorySource::new(named, self.directories.clone())),
        })
    }
}
