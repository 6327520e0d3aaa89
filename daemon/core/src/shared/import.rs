//! A directory with models in the layout of the Hugging Face cache becomes content of the shared tier: each file
//! is read once, to hash it, and nothing is downloaded.
//!
//! ```text
//! models--org--name/
//!   blobs/<hash>                SHA-256 of a file of LFS or Xet, else the object id that git gives it
//!   snapshots/<commit>/<path>   link to ../../blobs/<hash>; a plain file where there are no links
//!   refs/<branch>               the commit
//!   trees/<commit>.json         newer versions: the hashes of the files
//! ```
//!
//! A blob is linked into the tier under a name of its own, hashed there, and gets its final name if the hash is
//! the one that the cache names it by. Then come the checksums of its segments: nodes that see the name without
//! them bring those segments once more, and nothing wrong is ever read. The other way round they could take
//! for whole what another node has only begun to write.
//!
//! What is linked must not be changed in place afterwards, and `huggingface_hub` never does. Files that not all
//! may read are copied: other nodes may be other users.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::Serialize;

use self::bring::{Bringing, Fate, How, is_whole};
use self::cache::{CachedFile, CachedModel, CachedRevision, Findings};
use super::{SharedError, SharedFile, SharedLease, SharedSnapshot, SharedStore};
use crate::digest::{Claims, Digest};
use crate::model::{ModelRef, Patterns, RelPath, SnapshotId};
use crate::source::{git_identity, select};
use crate::store::StageKey;

mod bring;
mod cache;
#[cfg(test)]
mod tests;

/// How often the lease on what is imported is kept up.
const BEAT: Duration = Duration::from_secs(3);

/// Why nothing, or not all, was imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// There is nothing in it that could be imported.
    #[error("{} holds no models in the layout of the Hugging Face cache", path.display())]
    NotACache {
        /// The directory.
        path: PathBuf,
    },
    /// The cache cannot be read.
    #[error("cannot {op} `{}` in the cache", path.display())]
    Cache {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The shared tier cannot be read or written.
    #[error(transparent)]
    Shared(#[from] SharedError),
}

impl ImportError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotACache { .. } => {
                Some("name HF_HOME, its directory `hub`, or one `models--org--name` in that")
            }
            Self::Cache { .. } => None,
            Self::Shared(error) => error.hint(),
        }
    }
}

/// What an import did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Imported {
    /// The models that are in the shared tier now.
    pub models: Vec<ImportedModel>,
    /// Files whose bytes are not those that they should be.
    pub damaged: Vec<DamagedFile>,
    /// What could lead out of the cache. The snapshots that hold it are left out.
    pub refused: Vec<Left>,
    /// What was left out for other reasons.
    pub skipped: Vec<Left>,
}

/// A model that was imported, at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImportedModel {
    /// The model at its commit.
    pub model: ModelRef,
    /// How many files.
    pub files: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes that were read and hashed. What several models hold counts for the first, here and below.
    pub bytes_hashed: u64,
    /// Bytes that the shared tier and the cache have in common now.
    pub bytes_linked: u64,
    /// Bytes that were copied.
    pub bytes_copied: u64,
    /// Bytes that were in the shared tier already.
    pub bytes_present: u64,
}

/// A file whose bytes are not those that the cache says, or cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamagedFile {
    /// Where it lies.
    pub path: PathBuf,
    /// What is wrong.
    pub why: String,
    /// The models that hold it: they are left out.
    pub models: Vec<ModelRef>,
}

/// Something that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Left {
    /// Where it lies.
    pub path: PathBuf,
    /// Why.
    pub why: String,
}

/// One file to bring, which several snapshots may hold.
struct Job<'a> {
    from: &'a CachedModel,
    /// Below the model's directory.
    path: String,
    size: u64,
    claims: Claims,
    /// The blob's digest, if it is in the shared tier already.
    present: Option<Digest>,
}

impl Job<'_> {
    /// The blob's name, if the cache says enough; `None` for an empty file, too.
    fn key(&self) -> Option<StageKey> {
        key(self.size, &self.claims)
    }
}

/// As `StageKey::of` names what the Hub lists.
fn key(size: u64, claims: &Claims) -> Option<StageKey> {
    match (claims.sha256, claims.git_oid) {
        _ if size == 0 => None,
        (Some(digest), _) => Some(StageKey::of_digest(digest)),
        (None, Some(oid)) => Some(StageKey::of_identity(&git_identity(oid, size))),
        (None, None) => None,
    }
}

/// One snapshot with the files that a loader needs.
struct Chosen<'a> {
    from: &'a CachedModel,
    revision: &'a CachedRevision,
    /// Each with its job; `None` if its bytes are missing.
    files: Vec<(RelPath, u64, Option<usize>)>,
}

impl Chosen<'_> {
    fn model(&self) -> ModelRef {
        self.from.model.at(&self.revision.revision)
    }

    fn path(&self) -> PathBuf {
        let commit = self.revision.revision.as_str();
        self.from.path.join("snapshots").join(commit)
    }
}

impl SharedStore {
    /// Imports the models in `dir`: an `HF_HOME`, the hub cache in it, or one model's directory in that. With
    /// `copy` no file is linked. `progress` gets the bytes hashed so far, and all that there are to hash.
    ///
    /// # Errors
    ///
    /// [`ImportError`]. What is wrong with single files is told in the result.
    pub fn import(
        &self,
        dir: &Path,
        copy: bool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Imported, ImportError> {
        let mut findings = Findings::default();
        let models = cache::models(dir, &mut findings)?;
        let mut imported = Imported::default();
        let mut jobs = Vec::new();
        let chosen = choose(&models, &mut jobs, &mut imported);
        let fates = self.bring_all(&mut jobs, copy, progress)?;
        self.note_all(&chosen, &jobs, &fates, &mut imported)?;
        imported.refused.extend(findings.refused);
        imported.skipped.extend(findings.skipped);
        imported.skipped.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(imported)
    }

    /// Brings all files, several at once. Their blobs are leased meanwhile: no note needs them yet.
    fn bring_all(
        &self,
        jobs: &mut [Job<'_>],
        copy: bool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Vec<Fate>, SharedError> {
        let keys: Vec<StageKey> = jobs.iter().filter_map(Job::key).collect();
        let lease = self.lease(&keys, &format!("import {}", uuid::Uuid::new_v4()))?;
        let (over, ended) = mpsc::channel::<()>();
        let brought = thread::scope(|scope| {
            let lease = &lease;
            scope.spawn(move || keep_up(lease, &ended));
            let known = self.known_digests()?;
            for job in jobs.iter_mut() {
                job.present = self.present(job, &known)?;
            }
            let brought = Bringing::new(self, jobs, copy, progress).run();
            drop(over);
            brought
        });
        lease.end()?;
        brought
    }

    /// Digests of blobs that are named by something else, as earlier notes say.
    fn known_digests(&self) -> Result<HashMap<String, Digest>, SharedError> {
        let notes = self.snapshots()?.into_iter();
        let files = notes.flat_map(|(_, note)| note.files);
        Ok(files
            .filter_map(|file| Some((file.key?, file.sha256)))
            .collect())
    }

    /// The digest of a file's bytes if the tier holds them, and it need not be read to know.
    fn present(
        &self,
        job: &Job<'_>,
        known: &HashMap<String, Digest>,
    ) -> Result<Option<Digest>, SharedError> {
        let Some(key) = job.key() else {
            return Ok(None);
        };
        let known = job.claims.sha256.or(known.get(&key.to_string()).copied());
        match self.find(&key, job.size)? {
            Some(fill) if is_whole(&fill)? => Ok(known),
            _ => Ok(None),
        }
    }

    /// Notes each snapshot whose files are all here.
    fn note_all(
        &self,
        chosen: &[Chosen<'_>],
        jobs: &[Job<'_>],
        fates: &[Fate],
        imported: &mut Imported,
    ) -> Result<(), SharedError> {
        let mut damaged = BTreeMap::<usize, Vec<ModelRef>>::new();
        let mut counted = vec![false; jobs.len()];
        for snapshot in chosen {
            let found = snapshot.files.iter().filter_map(|(_, _, job)| *job);
            let bad: Vec<usize> = found.filter(|job| fates[*job].is_err()).collect();
            for job in &bad {
                damaged.entry(*job).or_default().push(snapshot.model());
            }
            let missing = { snapshot.files.iter() }.find(|(_, _, job)| job.is_none());
            let why = match (missing, bad.len()) {
                (Some((path, ..)), _) => format!("the bytes of `{path}` are missing"),
                (None, 0) => {
                    let model = self.note(snapshot, fates, &mut counted)?;
                    imported.models.push(model);
                    continue;
                }
                (None, _) => "it holds a damaged file".to_owned(),
            };
            let path = snapshot.path();
            imported.skipped.push(Left { path, why });
        }
        for (job, models) in damaged {
            imported.damaged.push(DamagedFile {
                path: jobs[job].from.path.join(&jobs[job].path),
                why: fates[job].clone().err().unwrap_or_default(),
                models,
            });
        }
        Ok(())
    }

    fn note(
        &self,
        chosen: &Chosen<'_>,
        fates: &[Fate],
        counted: &mut [bool],
    ) -> Result<ImportedModel, SharedError> {
        let (model, patterns) = (chosen.model(), Patterns::default());
        let mut imported = ImportedModel {
            model: model.clone(),
            files: chosen.files.len() as u64,
            bytes: chosen.files.iter().map(|(_, size, _)| size).sum(),
            bytes_hashed: 0,
            bytes_linked: 0,
            bytes_copied: 0,
            bytes_present: 0,
        };
        let mut files = Vec::new();
        for (path, size, job) in &chosen.files {
            let job = job.expect("none is missing");
            let sound = fates[job].as_ref().expect("none is damaged");
            let first = !std::mem::replace(&mut counted[job], true);
            match sound.how {
                How::Linked if first => imported.bytes_linked += size,
                How::Copied if first => imported.bytes_copied += size,
                _ => imported.bytes_present += size,
            }
            if first && matches!(sound.how, How::Linked | How::Copied) {
                imported.bytes_hashed += size;
            }
            files.push(SharedFile {
                path: path.clone(),
                size: *size,
                sha256: sound.sha256,
                key: sound.key.clone(),
            });
        }
        let revision = &chosen.revision.revision;
        let note = SharedSnapshot {
            format: 1,
            snapshot: SnapshotId::new(&model, revision, &patterns),
            model: model.clone(),
            patterns,
            published_at: jiff::Timestamp::now().as_second(),
            files,
        };
        self.publish(&note, &model)?;
        for (asked, commit) in &chosen.from.refs {
            if commit == revision.as_str() {
                self.publish(&note, asked)?;
            }
        }
        Ok(imported)
    }
}

/// Chooses the files that a fetch would take, and makes one job for all snapshots that hold the same.
fn choose<'a>(
    models: &'a [CachedModel],
    jobs: &mut Vec<Job<'a>>,
    imported: &mut Imported,
) -> Vec<Chosen<'a>> {
    let mut chosen = Vec::new();
    for from in models {
        let mut known = HashMap::<&str, usize>::new();
        for revision in &from.revisions {
            let mut snapshot = Chosen {
                from,
                revision,
                files: Vec::new(),
            };
            let files = { revision.files.iter() }.map(|file| (file.path.clone(), file.size, file));
            let model = snapshot.model();
            let selected = match select(&model, files.collect(), &Patterns::default()) {
                Ok((selected, _)) => selected,
                Err(error) => {
                    let (path, why) = (snapshot.path(), error.to_string());
                    imported.skipped.push(Left { path, why });
                    continue;
                }
            };
            for (path, size, file) in selected {
                let job = file.bytes.as_deref().map(|bytes| {
                    *known.entry(bytes).or_insert_with(|| {
                        jobs.push(job(from, file, bytes));
                        jobs.len() - 1
                    })
                });
                snapshot.files.push((path, size, job));
            }
            chosen.push(snapshot);
        }
    }
    chosen
}

fn job<'a>(from: &'a CachedModel, file: &CachedFile, path: &str) -> Job<'a> {
    Job {
        from,
        path: path.to_owned(),
        size: file.size,
        claims: file.claims,
        present: None,
    }
}

fn keep_up(lease: &SharedLease, ended: &mpsc::Receiver<()>) {
    let mut beat = 0;
    while ended.recv_timeout(BEAT) == Err(mpsc::RecvTimeoutError::Timeout) {
        beat += 1;
        // What it protects is young: without it the collector's grace still does.
        if let Err(error) = lease.beat(beat) {
            tracing::debug!(error = %crate::errors::Chain(&error), "lease not kept up");
        }
    }
}
