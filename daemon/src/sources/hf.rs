//! Models from a Hugging Face Hub, or a mirror that speaks its protocol.
//!
//! `hf-hub` turns a branch into a commit. The list of files, their addresses and their bytes are our
//! own code on `reqwest`: the crate drops the SHA-256 of a listing, fails on files that lie at a
//! CDN, and neither checks nor resumes a download.
//!
//! 1. `resolve` asks for the commit; all that follows names the commit, never the branch.
//! 2. `tree` lists the files with their hashes.
//! 3. `content` asks where a file lies, and reads ranges from there.
//!
//! What must hold: the token goes to the endpoint's own origin and nowhere else; neither it nor a
//! signed address stands in an error, a log line or a `Debug` text.

mod body;
mod client;
mod config;
mod content;
mod hub;
mod limit;
mod refusal;
mod resolve;
mod tree;

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use weightd_core::model::{ModelRef, Patterns, Revision};
use weightd_core::source::{
    ByteStream, Listing, RemoteFile, Source, SourceError, Vouched, git_identity, select,
};

pub use client::HfClients;
pub use config::{HfConfig, HfConfigError, TokenPlace};
use content::Files;
use hub::Hub;

/// One repository of a Hub, read with one requester's token for the length of one fetch.
pub struct HfSource {
    hub: Hub,
    /// The commit that was listed: what `read` reads.
    revision: OnceLock<Revision>,
    files: Files,
}

impl HfSource {
    /// `model` must be of the `hf` scheme. Nothing is asked of the Hub yet.
    #[must_use]
    pub fn new(clients: Arc<HfClients>, config: HfConfig, model: ModelRef) -> Self {
        Self {
            hub: Hub::new(clients, config, model),
            revision: OnceLock::new(),
            files: Files::default(),
        }
    }

    /// Proves that this source's token, or nobody's, may read the content at `revision`. That the
    /// files can be listed does not: the Hub lists gated repositories to everyone.
    ///
    /// # Errors
    ///
    /// [`SourceError::Denied`] or [`SourceError::NotFound`] if it may not;
    /// [`SourceError::Unavailable`] if the Hub could not be asked.
    pub async fn authorise(&self, revision: &Revision) -> Result<(), SourceError> {
        match tree::any_file(&self.hub, revision).await? {
            Some(file) => content::probe(&self.hub, revision, &file.path).await,
            None => Ok(()),
        }
    }

    /// What the Hub calls the repository, if that is another name than the one that was resolved: it redirects
    /// from the names that a repository had before.
    ///
    /// # Errors
    ///
    /// [`SourceError::Invalid`] if that is no name.
    pub fn renamed(&self) -> Result<Option<ModelRef>, SourceError> {
        let canonical = self.hub.canonical.get();
        let other = |name: &&String| !name.eq_ignore_ascii_case(self.hub.model.name());
        let model = canonical.filter(other).map(|name| {
            let parsed = format!("hf://{name}").parse::<ModelRef>();
            parsed.map_err(|error| {
                let host = self.hub.host();
                self.hub
                    .nonsense(format!("{host} calls it otherwise: {error}"))
            })
        });
        model.transpose()
    }

    /// Whether the Hub gave an answer to any request so far.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        self.hub.answered.load(Ordering::Relaxed)
    }

    async fn listing(
        &self,
        revision: &Revision,
        patterns: &Patterns,
    ) -> Result<Listing, SourceError> {
        if self.revision.get_or_init(|| revision.clone()) != revision {
            return Err(self
                .hub
                .nonsense("it was listed at another commit before".to_owned()));
        }
        let files = tree::files(&self.hub, revision).await?;
        let files = files
            .into_iter()
            .map(|file| (file.path.clone(), file.size, file));
        let (files, left_out) = select(&self.hub.model, files.collect(), patterns)?;
        let files = files.into_iter().map(|(path, size, file)| RemoteFile {
            path,
            size,
            claims: file.claims,
            // The Hub takes no LFS object whose bytes are not those that its name says.
            vouched: Vouched::BySource,
            identity: file.claims.git_oid.map(|oid| git_identity(oid, size)),
            xet_hash: file.xet_hash,
            told: None,
        });
        Ok(Listing {
            files: files.collect(),
            left_out,
        })
    }
}

impl Source for HfSource {
    fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>> {
        resolve::revision(&self.hub).boxed()
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
            let pinned = self.hub.model.pinned();
            let Some(revision) = self.revision.get().or(pinned.as_ref()) else {
                return Err(self
                    .hub
                    .nonsense("it is read before it was listed".to_owned()));
            };
            content::read(&self.hub, &self.files, revision, file, range).await
        }
        .boxed()
    }

    fn limited_for(&self) -> Option<Duration> {
        self.hub.limited_for()
    }
}

impl fmt::Debug for HfSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HfSource")
            .field("model", &self.hub.model.to_string())
            .field("endpoint", &self.hub.endpoint())
            .field("has_token", &self.hub.has_token())
            .finish_non_exhaustive()
    }
}
