//! The places that models come from, one file a vendor.

use std::sync::Arc;

use weightd_core::model::{ModelRef, Scheme};
use weightd_core::source::{Source, SourceError, Sources};

use self::hf::{HfClients, HfConfig, HfConfigError, HfSource};

pub mod hf;

/// The sources of one process, with this process's own credentials.
pub struct Origins {
    hf: (Arc<HfClients>, HfConfig),
}

impl Origins {
    /// As the environment says, for a user's own process.
    ///
    /// # Errors
    ///
    /// [`HfConfigError`] if what it says of the Hub cannot be used.
    pub fn from_env() -> Result<Self, HfConfigError> {
        Ok(Self {
            hf: (HfClients::new()?, HfConfig::from_env()?),
        })
    }
}

impl Sources for Origins {
    fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        match model.scheme() {
            Scheme::Hf => {
                let (clients, config) = &self.hf;
                Ok(Arc::new(HfSource::new(
                    Arc::clone(clients),
                    config.clone(),
                    model.clone(),
                )))
            }
            Scheme::S3 | Scheme::File => Err(SourceError::Invalid {
                what: model.to_string(),
                detail: "not yet".to_owned(),
                hint: None,
            }),
        }
    }
}
