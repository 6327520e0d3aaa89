//! Models under a prefix of a bucket, at Amazon S3 or a server that speaks its protocol.
//!
//! The SDK signs, finds credentials and endpoints, and reads answers. The HTTP client under it is
//! ours (`http`), and so are retries of ranges (the fetcher's) and checks of bytes (the store's).
//!
//! 1. `resolve` lists the prefix (`listing`): the digest of that listing is the revision.
//! 2. `list` looks at each chosen object (`object`): checksums, version, ETag.
//! 3. `read` reads ranges of exactly that ETag and version.
//!
//! What must hold: bytes of two versions of an object never meet in one file; no credential and no
//! signature stands in an error, a log line or a `Debug` text.

mod bucket;
mod client;
mod config;
mod failure;
mod http;
mod listing;
mod object;
mod refusal;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, TryStreamExt};
use weightd_core::model::{ModelRef, Patterns, RelPath, Revision};
use weightd_core::source::{ByteStream, Listing, RemoteFile, Source, SourceError, select};

use bucket::Bucket;
pub use client::{S3ClientError, S3Clients};
pub use config::{S3Config, S3Identity, S3Keys};
use listing::Objects;
use object::Object;

/// Objects that are looked at at once.
const LOOKS: usize = 16;

/// One prefix of a bucket, read with one requester's credentials for the length of one fetch.
pub struct S3Source {
    bucket: Bucket,
    state: Mutex<State>,
}

/// What was learnt so far.
#[derive(Default)]
struct State {
    listing: Option<Arc<Objects>>,
    objects: HashMap<RelPath, Arc<Object>>,
}

impl S3Source {
    /// `model` must be of the `s3` scheme. Nothing is asked of S3 yet.
    #[must_use]
    pub fn new(clients: Arc<S3Clients>, config: S3Config, model: ModelRef) -> Self {
        Self {
            bucket: Bucket::new(clients, config, model),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn list_anew(&self) -> Result<Arc<Objects>, SourceError> {
        // Addresses are read as web addresses, where these parts would name another object.
        if self
            .bucket
            .prefix
            .split('/')
            .any(|part| matches!(part, "." | ".."))
        {
            return Err(self.invalid("its prefix has a part `.` or `..`"));
        }
        let objects = Arc::new(listing::list(&self.bucket).await?);
        self.state().listing = Some(Arc::clone(&objects));
        Ok(objects)
    }

    async fn revision(&self) -> Result<Revision, SourceError> {
        let now = self.list_anew().await?.revision.clone();
        let model = &self.bucket.model;
        match model.pinned() {
            Some(asked) if asked != now => Err(SourceError::NotFound {
                what: model.to_string(),
                detail: format!("the prefix has changed since, and is now at {now}"),
                hint: Some(format!(
                    "to take it as it is now, ask for {}",
                    model.at(&now)
                )),
            }),
            _ => Ok(now),
        }
    }

    async fn listing(
        &self,
        revision: &Revision,
        patterns: &Patterns,
    ) -> Result<Listing, SourceError> {
        let known = self.state().listing.clone();
        let objects = match known {
            Some(objects) if objects.revision == *revision => objects,
            _ => self.list_anew().await?,
        };
        if objects.revision != *revision {
            return Err(SourceError::Changed {
                what: self.bucket.model.to_string(),
                detail: format!("it is now at {}", objects.revision),
            });
        }
        let all = objects.all.iter().cloned();
        let all = all.map(|object| (object.path.clone(), object.size, object));
        let (chosen, left_out) = select(&self.bucket.model, all.collect(), patterns)?;
        let looks = chosen.into_iter().map(|(path, _, listed)| async move {
            let object = object::look(&self.bucket, &listed).await?;
            Ok((path, listed.size, Arc::new(object)))
        });
        let looked: Result<Vec<_>, SourceError> =
            stream::iter(looks).buffered(LOOKS).try_collect().await;
        let looked = looked.inspect_err(|error| {
            if matches!(error, SourceError::Changed { .. }) {
                self.state().listing = None;
            }
        })?;
        let files = looked.iter().map(|(path, size, object)| RemoteFile {
            path: path.clone(),
            size: *size,
            claims: object.claims,
            // An uploader's word (`x-amz-meta-sha256`) is checked, and opens nothing: the owner of one bucket
            // could have written the digest of another's model.
            vouched: object.checked_by_s3,
            identity: object.identity.clone(),
            xet_hash: None,
        });
        let files = files.collect();
        let objects = looked.into_iter().map(|(path, _, object)| (path, object));
        self.state().objects.extend(objects);
        Ok(Listing { files, left_out })
    }

    fn invalid(&self, detail: &str) -> SourceError {
        SourceError::Invalid {
            what: self.bucket.model.to_string(),
            detail: detail.to_owned(),
            hint: None,
        }
    }
}

impl Source for S3Source {
    fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>> {
        self.revision().boxed()
    }

    fn list<'a>(
        &'a self,
        revision: &'a Revision,
        patterns: &'a Patterns,
    ) -> BoxFuture<'a, Result<Listing, SourceError>> {
        self.listing(revision, patterns).boxed()
    }

    fn read<'a>(
        &'a self,
        file: &'a RemoteFile,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        async move {
            let object = self.state().objects.get(&file.path).cloned();
            let object = object.ok_or_else(|| self.invalid("it is read before it was listed"))?;
            object::read(&self.bucket, &object, range).await
        }
        .boxed()
    }
}

impl fmt::Debug for S3Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Source")
            .field("model", &self.bucket.model.to_string())
            .finish_non_exhaustive()
    }
}
