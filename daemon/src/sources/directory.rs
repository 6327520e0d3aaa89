//! A directory of this machine that holds a model: for seeding a store, and behind an air gap.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use weightd_core::blocking;
use weightd_core::digest::Claims;
use weightd_core::model::{ModelRef, Patterns, RelPath, Revision};
use weightd_core::source::{ByteStream, Listing, RemoteFile, Source, SourceError, select};

/// Bytes that are read at a time.
const PIECE: u64 = 512 << 10;

/// What tools keep beside a model's files.
const SKIPPED: &[&str] = &[".git", ".cache", ".locks"];

/// One model in a directory, for one fetch.
pub struct DirectorySource {
    model: ModelRef,
    allowed: Option<Arc<[PathBuf]>>,
}

/// A file as it was when it was listed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    path: PathBuf,
    size: u64,
    modified: (i64, i64),
    inode: (u64, u64),
}

impl Seen {
    fn new(path: &Path, metadata: &Metadata) -> Self {
        Self {
            path: path.to_owned(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            inode: (metadata.dev(), metadata.ino()),
        }
    }
}

impl DirectorySource {
    /// Reads `model`, whose scheme is `file`. With `allowed`, only below those directories.
    #[must_use]
    pub fn new(model: ModelRef, allowed: Option<Arc<[PathBuf]>>) -> Self {
        Self { model, allowed }
    }

    async fn walk(&self) -> Result<Vec<(String, u64, Seen)>, SourceError> {
        let (model, allowed) = (self.model.clone(), self.allowed.clone());
        blocking::run(move || {
            let walk = Walk {
                model: &model,
                allowed: allowed.as_deref(),
            };
            walk.all()
        })
        .await
    }
}

fn revision(files: &[(String, u64, Seen)]) -> Revision {
    Revision::of_listing(
        files
            .iter()
            .map(|(path, size, seen)| format!("{path}\0{size}\0{:?}", seen.modified)),
    )
}

struct Walk<'a> {
    model: &'a ModelRef,
    allowed: Option<&'a [PathBuf]>,
}

impl Walk<'_> {
    fn all(&self) -> Result<Vec<(String, u64, Seen)>, SourceError> {
        let root = Path::new(self.model.name());
        let real = fs::canonicalize(root).map_err(|error| self.failed(root, &error))?;
        self.check_allowed(&real)?;
        let mut files = Vec::new();
        let mut visited = HashSet::new();
        self.below(&real, String::new(), &mut visited, &mut files)?;
        Ok(files)
    }

    fn below(
        &self,
        dir: &Path,
        prefix: String,
        visited: &mut HashSet<(u64, u64)>,
        files: &mut Vec<(String, u64, Seen)>,
    ) -> Result<(), SourceError> {
        let metadata = fs::metadata(dir).map_err(|error| self.failed(dir, &error))?;
        // A link to a folder above would never end.
        if !visited.insert((metadata.dev(), metadata.ino())) {
            return Ok(());
        }
        for entry in fs::read_dir(dir).map_err(|error| self.failed(dir, &error))? {
            let path = entry.map_err(|error| self.failed(dir, &error))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(name) = name else {
                return Err(self.invalid(&path, "its name is not UTF-8"));
            };
            if SKIPPED.contains(&name) {
                continue;
            }
            // Links are followed: a Hugging Face cache holds its files as links.
            let metadata = fs::metadata(&path).map_err(|error| self.failed(&path, &error))?;
            let relative = format!("{prefix}{name}");
            if metadata.is_dir() {
                self.below(&path, format!("{relative}/"), visited, files)?;
            } else if metadata.is_file() {
                if self.allowed.is_some() {
                    self.check_allowed(
                        &fs::canonicalize(&path).map_err(|error| self.failed(&path, &error))?,
                    )?;
                }
                files.push((relative, metadata.len(), Seen::new(&path, &metadata)));
            } else {
                return Err(self.invalid(&path, "it is neither a file nor a folder"));
            }
        }
        Ok(())
    }

    fn check_allowed(&self, real: &Path) -> Result<(), SourceError> {
        let allowed =
            |root: &PathBuf| fs::canonicalize(root).is_ok_and(|root| real.starts_with(root));
        match self.allowed {
            Some(roots) if !roots.iter().any(allowed) => Err(SourceError::Denied {
                what: self.model.to_string(),
                detail: format!(
                    "{} is not among the directories that the daemon may read",
                    real.display()
                ),
                hint: Some(
                    "add its folder to `file.allow` in the daemon's configuration".to_owned(),
                ),
            }),
            _ => Ok(()),
        }
    }

    fn invalid(&self, path: &Path, reason: &str) -> SourceError {
        let detail = format!("{}: {reason}", path.display());
        SourceError::Invalid {
            what: self.model.to_string(),
            detail,
            hint: None,
        }
    }

    fn failed(&self, path: &Path, error: &io::Error) -> SourceError {
        let what = self.model.to_string();
        let detail = format!("{}: {error}", path.display());
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => SourceError::NotFound {
                what,
                detail,
                hint: Some("name a directory that holds a model".to_owned()),
            },
            io::ErrorKind::PermissionDenied => SourceError::Denied {
                what,
                detail,
                hint: None,
            },
            _ => SourceError::Invalid {
                what,
                detail,
                hint: None,
            },
        }
    }
}

impl Source for DirectorySource {
    fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>> {
        async {
            let revision = revision(&self.walk().await?);
            match self.model.pinned() {
                Some(asked) if asked != revision => Err(SourceError::NotFound {
                    what: self.model.to_string(),
                    detail: format!(
                        "the directory now holds revision {revision}, no longer {asked}"
                    ),
                    hint: Some("leave the revision away to take what is there now".to_owned()),
                }),
                _ => Ok(revision),
            }
        }
        .boxed()
    }

    fn list<'a>(
        &'a self,
        at: &'a Revision,
        patterns: &'a Patterns,
    ) -> BoxFuture<'a, Result<Listing, SourceError>> {
        async move {
            let files = self.walk().await?;
            if revision(&files) != *at {
                return Err(SourceError::Changed {
                    what: self.model.to_string(),
                    detail: String::new(),
                });
            }
            let (chosen, left_out) = select(&self.model, files, patterns)?;
            let file = |(path, size, seen): (RelPath, u64, Seen)| RemoteFile {
                path,
                size,
                claims: Claims::default(),
                // All that tells one state of the file from another, short of reading it.
                identity: Some(format!(
                    "file\0{:?}\0{size}\0{:?}",
                    seen.inode, seen.modified
                )),
                xet_hash: None,
            };
            Ok(Listing {
                files: chosen.into_iter().map(file).collect(),
                left_out,
            })
        }
        .boxed()
    }

    fn read<'a>(
        &'a self,
        file: &'a RemoteFile,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        async move {
            let path = Path::new(self.model.name()).join(&file.path);
            let what = format!("file://{}", path.display());
            let (model, allowed, identity) = (
                self.model.clone(),
                self.allowed.clone(),
                file.identity.clone(),
            );
            let size = file.size;
            let opened = blocking::run(move || {
                let walk = Walk {
                    model: &model,
                    allowed: allowed.as_deref(),
                };
                let failed = |error: io::Error| walk.failed(&path, &error);
                let opened = File::open(&path).map_err(failed)?;
                let seen = Seen::new(&path, &opened.metadata().map_err(failed)?);
                let now = format!("file\0{:?}\0{size}\0{:?}", seen.inode, seen.modified);
                if seen.size != size || identity.is_some_and(|then| then != now) {
                    let what = model.to_string();
                    return Err(SourceError::Changed {
                        what,
                        detail: path.display().to_string(),
                    });
                }
                if walk.allowed.is_some() {
                    // What was opened, not what the name stands for by now.
                    let real = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()))
                        .map_err(failed)?;
                    walk.check_allowed(&real)?;
                }
                Ok(opened)
            });
            Ok(pieces(what, Arc::new(opened.await?), range))
        }
        .boxed()
    }
}

fn pieces(what: String, file: Arc<File>, range: Range<u64>) -> ByteStream {
    let pieces = stream::unfold(range, move |range| {
        let (what, file) = (what.clone(), Arc::clone(&file));
        async move {
            if range.is_empty() {
                return None;
            }
            let length = (range.end - range.start).min(PIECE);
            let read = blocking::run(move || {
                let mut piece = vec![0; usize::try_from(length).expect("at most PIECE")];
                file.read_exact_at(&mut piece, range.start)
                    .map(|()| Bytes::from(piece))
            });
            let next = range.start + length..range.end;
            Some(match read.await {
                Ok(piece) => (Ok(piece), next),
                Err(error) => {
                    let error = SourceError::Changed {
                        what,
                        detail: error.to_string(),
                    };
                    (Err(error), range.end..range.end)
                }
            })
        }
    });
    pieces.boxed()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::os::unix::fs::symlink;

    use futures::TryStreamExt;

    use super::*;

    type ByPath = HashMap<String, Vec<u8>>;

    async fn read_all(source: &DirectorySource) -> Result<ByPath, SourceError> {
        let revision = source.resolve().await?;
        let patterns = Patterns::new(vec!["*".to_owned()], vec![]).unwrap();
        let mut files = ByPath::new();
        for file in source.list(&revision, &patterns).await?.files {
            let pieces: Vec<Bytes> = source
                .read(&file, 0..file.size)
                .await?
                .try_collect()
                .await?;
            files.insert(file.path.to_string(), pieces.concat());
        }
        Ok(files)
    }

    fn source(dir: &Path, allowed: Option<&Path>) -> DirectorySource {
        let model = format!("file://{}", dir.display()).parse().unwrap();
        DirectorySource::new(model, allowed.map(|dir| Arc::from([dir.to_owned()])))
    }

    #[tokio::test]
    async fn links_are_followed_and_loops_end() {
        let dir = tempfile::tempdir().unwrap();
        let (blobs, tree) = (dir.path().join("blobs"), dir.path().join("snapshots/x"));
        fs::create_dir_all(&blobs).unwrap();
        fs::create_dir_all(tree.join("sub")).unwrap();
        fs::write(blobs.join("1"), "weights").unwrap();
        symlink(blobs.join("1"), tree.join("model.bin")).unwrap();
        symlink(&tree, tree.join("sub/loop")).unwrap();
        fs::write(tree.join("sub/a.json"), "{}").unwrap();

        let files = read_all(&source(&tree, None)).await.unwrap();

        let expected = [("model.bin", &b"weights"[..]), ("sub/a.json", b"{}")];
        assert_eq!(
            files,
            expected
                .map(|(path, bytes)| (path.to_owned(), bytes.to_vec()))
                .into()
        );
    }

    #[tokio::test]
    async fn a_daemon_reads_only_what_it_may() {
        let dir = tempfile::tempdir().unwrap();
        let (seed, secret) = (dir.path().join("seed"), dir.path().join("secret"));
        fs::create_dir_all(&seed).unwrap();
        fs::create_dir_all(&secret).unwrap();
        fs::write(seed.join("a.json"), "{}").unwrap();
        fs::write(secret.join("b.json"), "{}").unwrap();
        assert_eq!(
            read_all(&source(&seed, Some(&seed))).await.unwrap().len(),
            1
        );
        let denied =
            |result: Result<ByPath, SourceError>| matches!(result, Err(SourceError::Denied { .. }));
        assert!(denied(read_all(&source(&secret, Some(&seed))).await));
        symlink(secret.join("b.json"), seed.join("b.json")).unwrap();
        assert!(denied(read_all(&source(&seed, Some(&seed))).await));
    }

    #[tokio::test]
    async fn a_file_that_changes_is_no_mixture() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.json"), "before").unwrap();
        let source = source(dir.path(), None);
        let revision = source.resolve().await.unwrap();
        let listing = source.list(&revision, &Patterns::default()).await.unwrap();
        fs::write(dir.path().join("a.json"), "after!").unwrap();
        let read = source.read(&listing.files[0], 0..6).await;
        assert!(matches!(read.map(|_| ()), Err(SourceError::Changed { .. })));
        let gone = source.list(&revision, &Patterns::default()).await;
        assert!(matches!(gone, Err(SourceError::Changed { .. })));
    }

    #[tokio::test]
    async fn a_missing_directory_is_said_to_be_missing() {
        let error = source(Path::new("/nowhere/at/all"), None)
            .resolve()
            .await
            .unwrap_err();
        assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
    }
}
