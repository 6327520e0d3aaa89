//! One fetch, from the name that was typed to the published snapshot.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use futures::StreamExt;
use futures::stream::{self, FuturesUnordered};

use super::file::{MANY, OneFile, is_little, link_if_here};
use super::parts::Origin;
use super::patience::pause;
use super::progress::Phase;
use super::room::Reserved;
use super::seal::Sealer;
use super::{FetchError, Fetched, Fetcher, FileTurns, Job, check};
use crate::blocking;
use crate::errors::Chain;
use crate::manifest::{FileEntry, Manifest};
use crate::model::{Patterns, RelPath, Revision, SnapshotId};
use crate::shared::{KeptLease, SharedSnapshot, is_shareable};
use crate::source::{LeftOut, Listing, RemoteFile, Source, SourceError};
use crate::store::{FetchRecord, Lease, Snapshot, SnapshotLease, StageKey, Store, StoreError};

/// Small files that are begun at once, of one fetch: more than have a turn or wait to be sealed. Each takes memory from then
/// on, and there may be many thousands of them.
const BEGUN: usize = 1024;

impl Fetcher {
    /// Brings the snapshot that `job` asks for.
    pub(super) async fn bring(&self, job: &Arc<Job>) -> Result<Fetched, FetchError> {
        let (model, patterns) = (&job.request.model, &job.request.patterns);
        if let Some(revision) = model.pinned() {
            let id = SnapshotId::new(model, &revision, patterns);
            if let Some(fetched) = self.take_published(job, &revision, &id).await? {
                return Ok(fetched);
            }
        }
        let source = match &job.source {
            Some(source) => Arc::clone(source),
            None => {
                let opened = self.shared.sources.open(model);
                opened.map_err(|error| job.source_error(error))?
            }
        };
        job.meter.waits().source(&source);
        let revision = self.patiently(job, || source.resolve()).await?;
        let id = SnapshotId::new(model, &revision, patterns);
        job.meter.set(|progress| {
            progress.model = model.at(&revision);
            progress.snapshot = Some(id.clone());
        });
        let turn = self.turns.of(&id);
        let _turn = turn.take(job).await;
        if let Some(fetched) = self.take_published(job, &revision, &id).await? {
            return Ok(fetched);
        }
        job.meter.follow(None);
        let listing = self
            .patiently(job, || source.list(&revision, patterns))
            .await?;
        let left_out = listing.left_out.clone();
        let lease = self.gather(job, source, listing, &revision, &id).await?;
        let finished = self.finish(job, &revision, &id, lease, left_out).await?;
        finished.ok_or_else(|| job.store_error(StoreError::Missing(id.to_string())))
    }

    /// Ends the fetch with the snapshot that is here; `None` if there is none.
    async fn take_published(
        &self,
        job: &Job,
        revision: &Revision,
        id: &SnapshotId,
    ) -> Result<Option<Fetched>, FetchError> {
        let wanted = id.clone();
        let look = move |store: &Arc<Store>| store.lease_snapshot(&wanted);
        match job.on_store(&self.shared.store, look).await? {
            Some(lease) => {
                let nothing = LeftOut::default();
                self.finish(job, revision, id, lease, nothing).await
            }
            None => Ok(None),
        }
    }

    /// Marks the snapshot as used, pins it and says what it took. `None` if it was withdrawn meanwhile,
    /// which a lease does not prevent.
    async fn finish(
        &self,
        job: &Job,
        revision: &Revision,
        id: &SnapshotId,
        lease: SnapshotLease,
        left_out: LeftOut,
    ) -> Result<Option<Fetched>, FetchError> {
        let (request, id, revision) = (job.request.clone(), id.clone(), revision.clone());
        let snapshot = job
            .on_store(&self.shared.store, move |store| {
                let taken = take(store, &request, &revision, &id);
                drop(lease);
                taken
            })
            .await?;
        let Some(snapshot) = snapshot else {
            return Ok(None);
        };
        let bytes = snapshot.manifest.bytes();
        let bytes_fetched = job.meter.bytes_fetched();
        // Not the difference: bytes that proved wrong were fetched twice.
        let bytes_shared = job.meter.bytes_shared();
        let bytes_reused = match bytes_fetched + bytes_shared {
            0 => bytes,
            _ => job.meter.bytes_found().min(bytes),
        };
        let elapsed = job.meter.elapsed();
        self.shared
            .metrics
            .reused(job.request.model.scheme(), bytes_reused);
        let model = snapshot.manifest.model.to_string();
        tracing::info!(
            model,
            bytes,
            bytes_fetched,
            bytes_shared,
            elapsed_s = elapsed.as_secs_f64(),
            "snapshot ready"
        );
        Ok(Some(Fetched {
            snapshot,
            bytes_fetched,
            bytes_shared,
            bytes_reused,
            seconds: elapsed.as_secs_f64(),
            left_out,
        }))
    }

    /// Asks the origin until it answers, or has failed too often.
    pub(super) async fn patiently<T, F>(
        &self,
        job: &Job,
        ask: impl Fn() -> F,
    ) -> Result<T, FetchError>
    where
        F: Future<Output = Result<T, SourceError>>,
    {
        let mut failures = 0;
        loop {
            let error = match ask().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            failures += 1;
            let SourceError::Unavailable { retry_after, .. } = &error else {
                return Err(job.source_error(error));
            };
            let again = failures < self.shared.limits.attempts;
            let pause = pause(failures, *retry_after).filter(|_| again);
            let Some(pause) = pause else {
                return Err(job.source_error(error));
            };
            tracing::debug!(model = %job.request.model, failures, %error, "origin unavailable, asking again");
            job.meter.waits().paused(&error, pause);
            tokio::time::sleep(pause).await;
        }
    }

    /// Brings all files of the listing together and publishes them.
    async fn gather(
        &self,
        job: &Job,
        source: Arc<dyn Source>,
        listing: Listing,
        revision: &Revision,
        id: &SnapshotId,
    ) -> Result<SnapshotLease, FetchError> {
        let mut files: Vec<Arc<RemoteFile>> = listing.files.into_iter().map(Arc::new).collect();
        job.meter.set(|progress| {
            progress.files = files.len() as u64;
            progress.bytes = files.iter().map(|file| file.size).sum();
            progress.phase = Phase::WaitingForRoom;
        });
        // Small files first: they are what a loader opens first, and what fails first if access is denied.
        let limits = &self.shared.limits;
        files.sort_by_cached_key(|file| (!limits.is_small(file.size), file.path.clone()));
        let keys = shared_keys(&files);
        let leased = match &self.shared.tier {
            Some(tier) if tier.answers().await => {
                tier.lease(keys.values().cloned().collect()).await
            }
            _ => None,
        };
        let lease = Arc::new(job.on_store(&self.shared.store, Store::lease).await?);
        job.tree.send_replace(Some(lease.tree()));
        let (here, missing) = self.look_up(job, &lease, &files).await?;
        for entry in &here {
            job.meter.file().found(entry.size);
            job.meter.file_done();
        }
        let room = self.reserve(job, &missing).await?;
        job.meter.set(|progress| progress.phase = Phase::Fetching);
        let mut entries = here;
        entries.extend(
            self.fetch_files(job, source, missing, &lease, &room)
                .await?,
        );
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        job.meter.set(|progress| progress.phase = Phase::Publishing);
        let published = self.publish(job, lease, entries, revision, id).await?;
        self.note_shared(job, id, keys, leased);
        Ok(published)
    }

    /// Notes in the shared tier which blobs the model needs, behind.
    /// Until then they are leased.
    fn note_shared(
        &self,
        job: &Job,
        id: &SnapshotId,
        keys: HashMap<RelPath, StageKey>,
        leased: Option<KeptLease>,
    ) {
        let Some(tier) = &self.shared.tier else {
            return;
        };
        let noting = Arc::clone(tier);
        let (store, id) = (Arc::clone(&self.shared.store), id.clone());
        let asked = job.request.model.clone();
        let note = async move {
            let found = blocking::run(move || store.snapshot(&id)).await;
            let Ok(Some(snapshot)) = found else { return };
            let shared = SharedSnapshot::of(&snapshot.manifest, |path| keys.get(path).cloned());
            let noted = noting
                .run(move |store| store.publish(&shared, &asked))
                .await;
            if let Err(error) = noted {
                tracing::warn!(error = %Chain(&error), "model not noted in the shared tier");
            }
            drop(leased);
        };
        tier.behind().spawn(note);
    }

    /// Links what is here already into the lease; returns that and the rest.
    async fn look_up(
        &self,
        job: &Job,
        lease: &Arc<Lease>,
        files: &[Arc<RemoteFile>],
    ) -> Result<(Vec<FileEntry>, Vec<Arc<RemoteFile>>), FetchError> {
        let (lease, files) = (Arc::clone(lease), files.to_vec());
        job.on_store(&self.shared.store, move |store| {
            let (mut here, mut missing) = (Vec::new(), Vec::new());
            for file in files {
                match link_if_here(store, &lease, &file)? {
                    Some(entry) => here.push(entry),
                    None => missing.push(file),
                }
            }
            Ok((here, missing))
        })
        .await
    }

    async fn reserve(
        &self,
        job: &Job,
        missing: &[Arc<RemoteFile>],
    ) -> Result<Arc<Reserved>, FetchError> {
        // By what is staged: files with the same bytes need room for them once.
        let files = missing.iter().map(|file| (StageKey::of(file), file.size));
        let files: HashMap<StageKey, u64> = files.collect();
        let room = job
            .on_store(&self.shared.store, move |store| {
                let needed =
                    |(key, bytes): (&StageKey, &u64)| bytes.saturating_sub(store.staged_bytes(key));
                store.reserve(|| files.iter().map(needed).sum())
            })
            .await?;
        if !room.evicted.is_empty() {
            self.shared
                .metrics
                .evicted(room.evicted.len() as u64, room.freed);
            tracing::info!(
                snapshots = room.evicted.len(),
                bytes = room.freed,
                "evicted to make room"
            );
        }
        Ok(Arc::new(Reserved::new(room)))
    }

    async fn fetch_files(
        &self,
        job: &Job,
        source: Arc<dyn Source>,
        missing: Vec<Arc<RemoteFile>>,
        lease: &Arc<Lease>,
        room: &Arc<Reserved>,
    ) -> Result<Vec<FileEntry>, FetchError> {
        let origin = Origin {
            source,
            scheme: job.request.model.scheme(),
            shared: Arc::clone(&self.shared),
            pace: Arc::default(),
            meter: Arc::clone(&job.meter),
        };
        // Of its own, too: the files of this fetch must not stand in line before those of all others.
        let own = FileTurns::of_one(&self.shared.limits);
        let sealer = Sealer::new(lease, room);
        let many = missing.iter().filter(|file| is_little(file)).count() > MANY;
        let fetch = |file| {
            let one = OneFile {
                job,
                origin: &origin,
                file,
                lease,
                room,
                sealer: &sealer,
                own: &own,
                many,
            };
            one.fetch()
        };
        let limits = &self.shared.limits;
        let (small, large): (Vec<_>, Vec<_>) = missing
            .into_iter()
            .partition(|file| limits.is_small(file.size));
        // Each kind for itself, so that neither waits for the other.
        let small = stream::iter(small).map(fetch).buffer_unordered(BEGUN);
        let large: FuturesUnordered<_> = large.into_iter().map(fetch).collect();
        let mut fetches = std::pin::pin!(stream::select(small, large));
        let mut entries = Vec::new();
        while let Some(entry) = fetches.next().await {
            entries.push(entry?);
            job.meter.file_done();
        }
        Ok(entries)
    }

    async fn publish(
        &self,
        job: &Job,
        lease: Arc<Lease>,
        files: Vec<FileEntry>,
        revision: &Revision,
        id: &SnapshotId,
    ) -> Result<SnapshotLease, FetchError> {
        let model = job.request.model.at(revision);
        let patterns = job.request.patterns.clone();
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let published_at = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let format = Manifest::FORMAT;
        let manifest = Manifest {
            format,
            snapshot: id.clone(),
            model,
            patterns,
            published_at,
            files,
        };
        let whole = manifest.patterns == Patterns::default();
        let checked = blocking::run(move || {
            let checked = check::model(&lease.tree(), &manifest.files, whole);
            checked.map(|()| (lease, manifest))
        });
        let failed = |error| match error {
            check::ModelError::Store(source) => job.store_error(source),
            check::ModelError::Broken(source) => FetchError::Broken {
                model: job.request.model.clone(),
                source,
            },
        };
        let (lease, manifest) = checked.await.map_err(failed)?;
        job.on_store(&self.shared.store, move |_| {
            let lease =
                Arc::into_inner(lease).expect("no file of this fetch is under way any more");
            lease.publish(&manifest)
        })
        .await
    }
}

/// Marks a snapshot as used and pins it; `None` if it was withdrawn.
fn take(
    store: &Store,
    request: &FetchRecord,
    revision: &Revision,
    id: &SnapshotId,
) -> Result<Option<Snapshot>, StoreError> {
    let used = store.touch(&request.model, revision, id);
    let held = used.and_then(|()| match &request.pin {
        Some(holder) => store.pin(id, holder),
        None => Ok(()),
    });
    match held {
        // Whatever failed, if it is not here any more that is why.
        Err(error) => match store.snapshot(id)? {
            Some(_) => Err(error),
            None => Ok(None),
        },
        Ok(()) => store.snapshot(id),
    }
}

/// What files are called in the shared tier; those that are not shared are left out.
fn shared_keys(files: &[Arc<RemoteFile>]) -> HashMap<RelPath, StageKey> {
    let shared = files.iter().filter(|file| is_shareable(file));
    shared
        .map(|file| (file.path.clone(), StageKey::of(file)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreLimits;

    #[test]
    fn a_snapshot_that_was_withdrawn_meanwhile_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
        let request = FetchRecord {
            model: "hf://org/model".parse().unwrap(),
            patterns: Patterns::default(),
            pin: None,
        };
        let revision = Revision::new(&"a".repeat(40)).unwrap();
        let id = SnapshotId::new(&request.model, &revision, &request.patterns);

        let taken = take(&store, &request, &revision, &id);

        assert!(matches!(taken, Ok(None)), "{taken:?}");
    }
}
