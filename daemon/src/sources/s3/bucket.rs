//! One model's place in S3, and how it is asked: in its region, signed if there is somebody to sign.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use tokio::sync::Mutex;
use weightd_core::model::ModelRef;
use weightd_core::source::SourceError;

use super::client::{Connection, S3Clients, Signer};
use super::config::S3Config;
use super::failure::Failure;
use super::refusal;

/// A question that can be refused.
#[derive(Debug, Clone)]
pub(super) struct Question {
    /// The permission it needs, for example `s3:ListBucket`.
    pub(super) permission: &'static str,
    /// What it is about, for example `s3://bucket/prefix`.
    pub(super) what: String,
    /// It was listed, so if it is missing now it went away.
    pub(super) listed: bool,
}

/// What was tried to get one question answered.
#[derive(Default)]
struct Tried {
    moved: bool,
    unsigned: bool,
    chain_anew: bool,
}

/// A model's bucket and prefix.
pub(super) struct Bucket {
    clients: Arc<S3Clients>,
    pub(super) config: S3Config,
    pub(super) model: ModelRef,
    pub(super) name: String,
    /// Ends in a slash, or is empty for the whole bucket.
    pub(super) prefix: String,
    /// A request was answered as it was hoped.
    pub(super) answered: AtomicBool,
    connection: Mutex<Option<Arc<Connection>>>,
}

impl Bucket {
    pub(super) fn new(clients: Arc<S3Clients>, config: S3Config, model: ModelRef) -> Self {
        let (name, prefix) = model.name().split_once('/').unwrap_or((model.name(), ""));
        let prefix = match prefix.trim_end_matches('/') {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        Self {
            clients,
            config,
            name: name.to_owned(),
            prefix,
            model,
            answered: AtomicBool::new(false),
            connection: Mutex::new(None),
        }
    }

    /// `s3://bucket/key`, for a message.
    pub(super) fn address(&self, key: &str) -> String {
        format!("s3://{}/{key}", self.name)
    }

    pub(super) async fn connection(&self) -> Result<Arc<Connection>, SourceError> {
        let mut current = self.connection.lock().await;
        if let Some(connection) = &*current {
            return Ok(Arc::clone(connection));
        }
        let signer = self.clients.signer(&self.config, &self.name);
        let connection = self.clients.connect(&self.config, signer, None).await?;
        Ok(Arc::clone(current.insert(Arc::new(connection))))
    }

    async fn reconnect(&self, signer: Signer, region: &str) -> Result<(), SourceError> {
        let region = Some(region.to_owned());
        let connection = self.clients.connect(&self.config, signer, region).await?;
        *self.connection.lock().await = Some(Arc::new(connection));
        Ok(())
    }

    /// Asks, and again in the bucket's own region, without credentials or with those that are there by
    /// now, if that may be what was wrong.
    pub(super) async fn ask<T, E, F>(
        &self,
        question: &Question,
        ask: impl Fn(Arc<Connection>) -> F,
    ) -> Result<T, SourceError>
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    {
        let mut tried = Tried::default();
        loop {
            let connection = self.connection().await?;
            let error = match ask(Arc::clone(&connection)).await {
                Ok(answer) => {
                    self.answered.store(true, Ordering::Relaxed);
                    self.clients.note_success(connection.signer);
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let mut failure = Failure::of(&error);
            self.config
                .secrets()
                .for_each(|secret| failure.mask(secret));
            if self.clients.chain_worked() {
                failure.credentials_come_back();
            }
            if !self.mend(&connection, &failure, &mut tried).await? {
                return Err(refusal::refusal(self, &connection, question, failure));
            }
        }
    }

    /// Connects anew if that may mend `failure`; says whether it did.
    async fn mend(
        &self,
        connection: &Connection,
        failure: &Failure,
        tried: &mut Tried,
    ) -> Result<bool, SourceError> {
        let region = &connection.region;
        if !tried.unsigned && connection.signer == Signer::Chain && failure.nothing_found() {
            tried.unsigned = true;
            self.clients.note_nothing_found();
            tracing::debug!(bucket = self.name, "no AWS credentials, asking without");
            self.reconnect(Signer::NothingFound, region).await?;
            return Ok(true);
        }
        if !tried.chain_anew && connection.signer == Signer::NothingFound && failure.is_denied() {
            // Nothing may have been found because the instance did not answer just then.
            (tried.chain_anew, tried.unsigned) = (true, false);
            tracing::debug!(bucket = self.name, "looking for AWS credentials anew");
            self.reconnect(Signer::Chain, region).await?;
            return Ok(true);
        }
        if !tried.moved
            && failure.is_elsewhere()
            && let Some(region) = self.region(connection, failure).await
        {
            tried.moved = true;
            tracing::debug!(bucket = self.name, region, "bucket is in another region");
            self.reconnect(connection.signer, &region).await?;
            return Ok(true);
        }
        Ok(false)
    }

    /// The bucket's region, if it is another one than we asked in.
    async fn region(&self, connection: &Connection, failure: &Failure) -> Option<String> {
        let mut region = failure.region.clone();
        if region.is_none() {
            let head = connection.questions.head_bucket().bucket(&self.name);
            region = match head.send().await {
                Ok(answer) => answer.bucket_region().map(str::to_owned),
                Err(error) => Failure::of(&error).region,
            };
        }
        region.filter(|region| *region != connection.region)
    }
}
