//! Models under a prefix of a bucket, at Amazon S3 or a server that speaks its protocol.
//!
//! The SDK signs, finds credentials and endpoints, and reads answers. The HTTP client under it is
//! ours (`http`), and so are retries of ranges (the fetcher's) and checks of bytes (the store's).
//!
//! 1. `resolve` lists the prefix (`listing`): the digest of that listing is the revision.
//! 2. `list` looks at each chosen object (`object`): checksums, version, ETag. Thousands of small ones tell theirs when
//!    they are read.
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
mod node;
mod object;
mod refusal;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, TryStreamExt};
use weightd_core::model::{ModelRef, Patterns, RelPath, Revision};
use weightd_core::source::{
    ByteStream, LeftOut, Listing, RemoteFile, Source, SourceError, Vouched, select,
};

use bucket::Bucket;
pub use client::{S3ClientError, S3Clients};
pub use config::{S3Config, S3Identity, S3Keys};
use listing::{Listed, Objects};
pub use node::{NodeCredentials, is_configured, node_credentials};
use object::Object;

/// Objects that are looked at at once.
const LOOKS: usize = 16;

/// Of more small objects than so many, none is looked at before it is read: that would double the requests.
const FEW: usize = 128;

/// A small object: 1 MiB.
const SMALL_BYTES: u64 = 1 << 20;

/// One prefix of a bucket, read with one requester's credentials for the length of one fetch.
pub struct S3Source {
    bucket: Bucket,
    state: Mutex<State>,
}

/// The objects that patterns choose, with path and size.
type Chosen = Vec<(RelPath, u64, Listed)>;

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
        match self.bucket.model.pinned() {
            Some(asked) if asked != now => Err(self.moved(&asked, &now)),
            _ => Ok(now),
        }
    }

    /// The listing at `revision`, if the prefix is still there.
    async fn listing_at(&self, revision: &Revision) -> Result<Arc<Objects>, SourceError> {
        let known = self.state().listing.clone();
        let objects = match known {
            Some(objects) if objects.revision == *revision => objects,
            _ => self.list_anew().await?,
        };
        match objects.revision == *revision {
            true => Ok(objects),
            false => Err(self.moved(revision, &objects.revision)),
        }
    }

    /// Why there is nothing at `asked` when the prefix is at `now`.
    fn moved(&self, asked: &Revision, now: &Revision) -> SourceError {
        let model = &self.bucket.model;
        if model.pinned().as_ref() != Some(asked) {
            return SourceError::Changed {
                what: model.to_string(),
                detail: format!("it is now at {now}"),
            };
        }
        // To list anew would bring the same: the name itself says which revision.
        SourceError::NotFound {
            what: model.to_string(),
            detail: format!("the prefix has changed since, and is now at {now}"),
            hint: Some(format!(
                "to take it as it is now, ask for {}",
                model.at(now)
            )),
        }
    }

    fn choose(
        &self,
        objects: &Objects,
        patterns: &Patterns,
    ) -> Result<(Chosen, LeftOut), SourceError> {
        let all = objects.all.iter().cloned();
        let all = all.map(|object| (object.path.clone(), object.size, object));
        select(&self.bucket.model, all.collect(), patterns)
    }

    /// Proves that who asks may read the bytes of every file that `patterns` choose at `revision`: that they
    /// are listed, and what their headers say, anyone may know who cannot decrypt them.
    ///
    /// # Errors
    ///
    /// As [`Source::list`].
    pub async fn authorise(
        &self,
        revision: &Revision,
        patterns: &Patterns,
    ) -> Result<(), SourceError> {
        let objects = self.listing_at(revision).await?;
        let (chosen, _) = self.choose(&objects, patterns)?;
        let tastes = chosen.into_iter().map(|(_, _, listed)| async move {
            let tasted = object::taste(&self.bucket, &listed).await;
            tasted.inspect_err(|error| self.forget_if_changed(error))
        });
        let tastes = stream::iter(tastes).buffer_unordered(LOOKS);
        tastes.try_collect::<()>().await
    }

    /// Whether S3 gave an answer to any question so far.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        self.bucket.answered.load(Ordering::Relaxed)
    }

    fn forget_if_changed(&self, error: &SourceError) {
        if matches!(error, SourceError::Changed { .. }) {
            self.state().listing = None;
        }
    }

    async fn listing(
        &self,
        revision: &Revision,
        patterns: &Patterns,
    ) -> Result<Listing, SourceError> {
        let objects = self.listing_at(revision).await?;
        let (chosen, left_out) = self.choose(&objects, patterns)?;
        let small = |listed: &Listed| listed.size <= SMALL_BYTES;
        let many = chosen.iter().filter(|(.., listed)| small(listed)).count() > FEW;
        let many = many && !self.bucket.config.look_at_all;
        let looks = chosen.into_iter().map(|(path, _, listed)| async move {
            let unseen = match many && small(&listed) {
                true => object::unseen(&self.bucket, &listed).await?,
                false => None,
            };
            let object = match unseen {
                Some(object) => object,
                None => object::look(&self.bucket, &listed).await?,
            };
            Ok((path, listed.size, Arc::new(object)))
        });
        let looked: Result<Vec<_>, SourceError> =
            stream::iter(looks).buffered(LOOKS).try_collect().await;
        let looked = looked.inspect_err(|error| self.forget_if_changed(error))?;
        let files = looked.iter().map(|(path, size, object)| RemoteFile {
            path: path.clone(),
            size: *size,
            claims: object.claims,
            vouched: match (object.checked_by_s3, self.bucket.config.believe_metadata) {
                (true, _) => Vouched::BySource,
                (false, true) => Vouched::ByUploader,
                (false, false) => Vouched::ByNobody,
            },
            identity: object.identity.clone(),
            xet_hash: None,
            told: object.unseen.then(Arc::default),
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
            object::read(&self.bucket, &object, range, file.told.as_deref()).await
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
