//! The webhook's certificate: from files that somebody else renews, or our own, kept in a Secret.
//!
//! Our own: each time a new authority signs one certificate, and its key is thrown away. So nothing that is stored
//! could sign another, and the Secret holds only the key of what is served. The leader renews; all replicas serve what
//! the Secret holds. The API server is told of a new authority, beside the last one, before any replica serves what
//! that one signed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde_json::json;
use tokio::time::sleep;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::metrics::Metrics;
use weightd_kube::Cause;

mod end;
mod made;

pub(super) use made::Made;

/// The Secret's name.
pub(super) const SECRET: &str = "weightd-webhook-certificate";

/// The name of the object that tells the API server of the webhook.
pub(super) const CONFIGURATION: &str = "weightd-injection";

/// How often a certificate that is served is compared with where it comes from.
const LOOK: Duration = Duration::from_secs(30);

/// The same as long as there is none.
const LOOK_FIRST: Duration = Duration::from_secs(2);

/// How long API servers may take to hear of a new authority.
const SPREAD: Duration = Duration::from_secs(10);

/// Why there is no certificate to serve.
#[derive(Debug, thiserror::Error)]
pub(super) enum CertificateError {
    #[error("cannot read `{}`", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{0} is no certificate chain with its key")]
    Pem(String, #[source] rustls::pki_types::pem::Error),
    #[error("{0} holds a key that does not fit its certificate, or that TLS cannot use")]
    Key(String, #[source] rustls::Error),
    #[error("{0} has no certificate yet")]
    None(String),
    #[error("cannot {op} the {kind} `{name}`")]
    Api {
        op: &'static str,
        kind: &'static str,
        name: &'static str,
        #[source]
        source: Cause,
    },
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    #[error("the MutatingWebhookConfiguration `{CONFIGURATION}` changed meanwhile")]
    Changed,
}

/// What is served at the moment.
#[derive(Debug, Default)]
pub(super) struct Current(RwLock<Option<Arc<CertifiedKey>>>);

impl Current {
    /// Whether there is a certificate.
    pub(super) fn is_there(&self) -> bool {
        self.get().is_some()
    }

    /// When it ends, in seconds since 1970; 0 if there is none.
    fn ends(&self) -> i64 {
        let key = self.get();
        let leaf = key.as_ref().and_then(|key| key.cert.first());
        leaf.and_then(|leaf| end::end(leaf))
            .map_or(0, |end| end.as_second())
    }

    fn get(&self) -> Option<Arc<CertifiedKey>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Serves `chain` with `key` from now on, both PEM. `whose` names them in errors.
    pub(super) fn set(
        &self,
        whose: &str,
        chain: &[u8],
        key: &[u8],
    ) -> Result<(), CertificateError> {
        let pem = |error| CertificateError::Pem(whose.to_owned(), error);
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let chain = chain.map_err(pem)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(pem)?;
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let fit = CertifiedKey::from_der(chain, key, &provider);
        let fit = fit.map_err(|error| CertificateError::Key(whose.to_owned(), error))?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(fit));
        Ok(())
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.get()
    }
}

/// Where the certificate comes from.
pub(super) enum Origin {
    /// `tls.crt` and `tls.key` there.
    Files(PathBuf),
    /// Our Secret.
    Own(Box<Api<Secret>>),
}

impl Origin {
    /// Serves in `current` what is there, now and after each change, until it is dropped.
    pub(super) async fn follow(self, current: Arc<Current>, metrics: Arc<Metrics>) {
        let mut last = None;
        let mut told = String::new();
        loop {
            match self.read().await {
                Ok(found) if last.as_ref() == Some(&found) => {}
                Ok(found) => match current.set(&self.to_string(), &found.0, &found.1) {
                    Ok(()) => {
                        metrics.certificate_ends(current.ends());
                        tracing::info!(from = %self, "serving a new certificate");
                        last = Some(found);
                        told.clear();
                    }
                    Err(error) => self.tell(&error, &mut told),
                },
                Err(error) => self.tell(&error, &mut told),
            }
            let pause = if current.is_there() { LOOK } else { LOOK_FIRST };
            sleep(pause).await;
        }
    }

    /// Says the same only once.
    fn tell(&self, error: &CertificateError, told: &mut String) {
        let text = Chain(error).to_string();
        if *told != text {
            tracing::warn!(error = text, "certificate not read, looking again");
            *told = text;
        }
    }

    async fn read(&self) -> Result<(Vec<u8>, Vec<u8>), CertificateError> {
        match self {
            Self::Files(dir) => {
                let dir = dir.clone();
                blocking::run(move || Ok((read(&dir, "tls.crt")?, read(&dir, "tls.key")?))).await
            }
            Self::Own(secrets) => {
                let secret = get_secret(secrets).await?;
                let mut data = secret.data.unwrap_or_default();
                match (data.remove("tls.crt"), data.remove("tls.key")) {
                    (Some(chain), Some(key)) => Ok((chain.0, key.0)),
                    _ => Err(CertificateError::None(self.to_string())),
                }
            }
        }
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Files(dir) => write!(f, "`{}`", dir.display()),
            Self::Own(_) => write!(f, "the Secret `{SECRET}`"),
        }
    }
}

fn read(dir: &Path, name: &str) -> Result<Vec<u8>, CertificateError> {
    let path = dir.join(name);
    std::fs::read(&path).map_err(|source| CertificateError::Read { path, source })
}

async fn get_secret(secrets: &Api<Secret>) -> Result<Secret, CertificateError> {
    secrets
        .get(SECRET)
        .await
        .map_err(|error| CertificateError::Api {
            op: "read",
            kind: "Secret",
            name: SECRET,
            source: error.into(),
        })
}

/// The leader's part: keeps a good certificate in the Secret, and its authority in the webhook's configuration.
pub(super) struct Renewal {
    secrets: Api<Secret>,
    configurations: Api<MutatingWebhookConfiguration>,
    /// What the certificate is for.
    names: Vec<String>,
}

impl Renewal {
    pub(super) fn new(client: Client, namespace: &str, names: Vec<String>) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
            configurations: Api::all(client),
            names,
        }
    }

    /// Works until it is dropped.
    pub(super) async fn run(&self) {
        let mut told = String::new();
        loop {
            let mut pause = LOOK;
            match self.look().await {
                Ok(()) => told.clear(),
                Err(error) => {
                    let text = Chain(&error).to_string();
                    if told != text {
                        tracing::error!(error = text, "webhook not set up, trying again");
                        told = text;
                    }
                    pause = LOOK_FIRST * 3;
                }
            }
            sleep(pause).await;
        }
    }

    /// Looks at both objects, and mends what is wrong.
    async fn look(&self) -> Result<(), CertificateError> {
        let secret = get_secret(&self.secrets).await?;
        let found = Made::read(&secret);
        let good = found
            .as_ref()
            .filter(|made| made.is_for(&self.names) && !made.is_old());
        if let Some(made) = good {
            return self.announce(&made.authorities).await;
        }
        let next = Made::make(&self.names, found.as_ref())?;
        if found.is_some() {
            self.announce(&next.authorities).await?;
            sleep(SPREAD).await;
        }
        let changed = Secret {
            data: Some(next.data()),
            ..secret
        };
        let sent = PostParams::default();
        let written = self.secrets.replace(SECRET, &sent, &changed).await;
        written.map_err(|error| CertificateError::Api {
            op: "write",
            kind: "Secret",
            name: SECRET,
            source: error.into(),
        })?;
        tracing::info!(names = ?self.names, renew_after = %next.about.renew_after, "certificate made");
        self.announce(&next.authorities).await
    }

    /// Has the API server believe `authorities`, PEM.
    async fn announce(&self, authorities: &str) -> Result<(), CertificateError> {
        let failed = |op| {
            move |error: kube::Error| CertificateError::Api {
                op,
                kind: "MutatingWebhookConfiguration",
                name: CONFIGURATION,
                source: error.into(),
            }
        };
        let found = self.configurations.get(CONFIGURATION).await;
        let found = found.map_err(failed("read"))?;
        let bundle = ByteString(authorities.as_bytes().to_vec());
        let webhooks = found.webhooks.unwrap_or_default();
        let steps = webhooks
            .iter()
            .enumerate()
            .filter(|(_, webhook)| webhook.client_config.ca_bundle.as_ref() != Some(&bundle));
        let steps: Vec<_> = steps
            .flat_map(|(index, webhook)| {
                let at = format!("/webhooks/{index}");
                [
                    json!({ "op": "test", "path": format!("{at}/name"), "value": webhook.name }),
                    json!({ "op": "add", "path": format!("{at}/clientConfig/caBundle"), "value": bundle }),
                ]
            })
            .collect();
        if steps.is_empty() {
            return Ok(());
        }
        let patch = serde_json::from_value(steps.into()).map_err(|_| CertificateError::Changed)?;
        let patch = Patch::<MutatingWebhookConfiguration>::Json(patch);
        let sent = PatchParams::default();
        let patched = self
            .configurations
            .patch(CONFIGURATION, &sent, &patch)
            .await;
        patched.map_err(failed("put our authority into"))?;
        tracing::info!("the API server is told of our certificate's authority");
        Ok(())
    }
}

#[cfg(test)]
mod tests;
