//! Models in a directory of this machine: seeding, air-gapped sites, the Hub's own cache.
//!
//! A directory has no revisions: the digest of its files' paths, sizes and times stands for one. No
//! claims are made of the bytes; the store hashes them as it takes them in.
//!
//! What must hold: a daemon reads only below the directories that its operator allowed, also when a
//! link or a rename points elsewhere while it reads.

mod reader;
mod walk;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use weightd_core::blocking;
use weightd_core::digest::Claims;
use weightd_core::model::{ModelRef, Patterns, Revision};
use weightd_core::source::{ByteStream, Listing, RemoteFile, Source, SourceError, Vouched, select};

use walk::Found;

/// One directory, read with this process's rights.
pub struct DirectorySource {
    place: Arc<Place>,
    /// What was listed: what `read` reads.
    listed: std::sync::Mutex<Vec<Found>>,
}

/// A model's directory, and where this process may read.
pub(crate) struct Place {
    model: ModelRef,
    root: PathBuf,
    /// `None` is everywhere.
    allowed: Option<Vec<PathBuf>>,
}

impl DirectorySource {
    /// `model` must be of the `file` scheme. With `allowed_roots`, only what lies below one of them is
    /// read; without, all that this process may. Nothing is looked at yet.
    #[must_use]
    pub fn new(model: ModelRef, allowed_roots: Option<Vec<PathBuf>>) -> Self {
        let place = Place {
            root: PathBuf::from(model.name()),
            model,
            allowed: allowed_roots,
        };
        Self {
            place: Arc::new(place),
            listed: std::sync::Mutex::default(),
        }
    }

    /// Establishes that this process may read below the directory. Whatever revision is asked for, the files
    /// were the node's own.
    ///
    /// # Errors
    ///
    /// [`SourceError::Denied`] if it does not lie below an allowed root.
    pub async fn authorise(&self) -> Result<(), SourceError> {
        let place = Arc::clone(&self.place);
        blocking::run(move || {
            place.allow_name()?;
            // A directory that is gone leads nowhere, and its name was allowed.
            match place.root.canonicalize() {
                Ok(real) => place.allow(&real),
                Err(_) => Ok(()),
            }
        })
        .await
    }

    fn listed(&self) -> std::sync::MutexGuard<'_, Vec<Found>> {
        let lock = self.listed.lock();
        lock.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn walk(&self) -> Result<(Revision, Vec<Found>), SourceError> {
        let place = Arc::clone(&self.place);
        let found = blocking::run(move || walk::walk(&place)).await?;
        let line = |file: &Found| {
            let (path, mark) = (&file.path, &file.mark);
            let (modified, changed) = (mark.modified_ns, mark.changed_ns);
            format!("{path}\0{}\0{modified}\0{changed}", mark.size)
        };
        Ok((Revision::of_listing(found.iter().map(line)), found))
    }

    async fn revision(&self) -> Result<Revision, SourceError> {
        let (now, _) = self.walk().await?;
        let model = &self.place.model;
        match model.pinned() {
            Some(asked) if asked != now => Err(SourceError::NotFound {
                what: model.to_string(),
                detail: format!("the directory has changed since, and is now at {now}"),
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
        let (now, found) = self.walk().await?;
        if now != *revision {
            return Err(SourceError::Changed {
                what: self.place.model.to_string(),
                detail: format!("it is now at {now}"),
            });
        }
        let all = found.into_iter();
        let all = all.map(|file| (file.path.clone(), file.mark.size, file));
        let (chosen, left_out) = select(&self.place.model, all.collect(), patterns)?;
        let files = chosen.iter().map(|(path, size, file)| RemoteFile {
            path: path.clone(),
            size: *size,
            claims: Claims::default(),
            vouched: Vouched::ByNobody,
            identity: Some(file.identity()),
            xet_hash: None,
            told: None,
        });
        let files = files.collect();
        *self.listed() = chosen.into_iter().map(|(.., file)| file).collect();
        Ok(Listing { files, left_out })
    }
}

impl Source for DirectorySource {
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
            let path = file.path.as_str();
            let found = self.listed().iter().find(|file| file.path == path).cloned();
            let found = found.ok_or_else(|| {
                let detail = format!("`{path}` is read before it was listed");
                self.place.invalid(detail, None)
            })?;
            reader::read(&self.place, found, range).await
        }
        .boxed()
    }
}

impl fmt::Debug for DirectorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectorySource")
            .field("model", &self.place.model.to_string())
            .field("allowed", &self.place.allowed)
            .finish_non_exhaustive()
    }
}

impl Place {
    fn invalid(&self, detail: String, hint: Option<&str>) -> SourceError {
        SourceError::Invalid {
            what: self.model.to_string(),
            detail,
            hint: hint.map(str::to_owned),
        }
    }

    /// What a failure to `op` `path` means to the user.
    fn failed(&self, op: &str, path: &Path, error: &io::Error) -> SourceError {
        let (what, shown) = (self.model.to_string(), path.display());
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => SourceError::NotFound {
                what,
                detail: format!("there is no `{shown}`"),
                hint: Some("the path is looked up where the model is fetched: on the node".into()),
            },
            io::ErrorKind::PermissionDenied => SourceError::Denied {
                what,
                detail: format!("cannot {op} `{shown}`: {error}"),
                hint: Some("let the user that weightd runs as read it".to_owned()),
            },
            _ => SourceError::Unavailable {
                what,
                detail: format!("cannot {op} `{shown}`: {error}"),
                retry_after: None,
            },
        }
    }

    /// The roots with their links followed, so that real paths can be compared with them. One that is
    /// not there allows nothing.
    fn real_roots(&self) -> Option<Vec<PathBuf>> {
        let allowed = self.allowed.as_ref()?;
        let real = allowed.iter().filter_map(|root| root.canonicalize().ok());
        Some(real.collect())
    }

    /// Refuses a model whose path, as it was typed, is not below an allowed root. Looked at first, so
    /// that nobody learns from our errors what there is elsewhere.
    fn allow_name(&self) -> Result<(), SourceError> {
        let mut typed = self.allowed.iter().flatten();
        match typed.any(|root| self.root.starts_with(root)) {
            true => Ok(()),
            false => self.allow(&self.root),
        }
    }

    /// Refuses a real path that is not below an allowed root.
    fn allow(&self, real: &Path) -> Result<(), SourceError> {
        match self.real_roots() {
            Some(roots) if !roots.iter().any(|root| real.starts_with(root)) => {
                // Not the real path: where a link leads is not for everyone to know.
                Err(SourceError::Denied {
                    what: self.model.to_string(),
                    detail: "it does not lie below a directory that may be read".to_owned(),
                    hint: Some("name a directory above it in `file.allow`".to_owned()),
                })
            }
            _ => Ok(()),
        }
    }
}
