//! What a fetch would do, without doing it.

use std::collections::HashSet;
use std::sync::Arc;

use super::{FetchError, Fetcher, Job, Meter};
use crate::model::{ModelRef, Patterns, RelPath, SnapshotId};
use crate::source::{LeftOut, RemoteFile};
use crate::store::{FetchRecord, RoomPlan, StageKey, Store, StoreError};
use tokio::sync::watch;

/// What a fetch would do now.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The model at its resolved revision.
    pub model: ModelRef,
    /// The snapshot that it would publish.
    pub snapshot: SnapshotId,
    /// Its files.
    pub files: Vec<PlannedFile>,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes that are here.
    pub bytes_local: u64,
    /// Bytes that the origin would have to send.
    pub bytes_to_fetch: u64,
    /// What would be evicted.
    pub room: RoomPlan,
    /// How long the origin would take, at the rate of earlier fetches.
    pub seconds_from_origin: Option<f64>,
    /// What the patterns leave out.
    pub left_out: LeftOut,
    /// Whether it is here already, and nothing would be done.
    pub published: bool,
}

/// One file of a [`Plan`].
#[derive(Debug, Clone)]
pub struct PlannedFile {
    /// Its path.
    pub path: RelPath,
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether its bytes are here.
    pub local: bool,
}

impl Fetcher {
    /// Asks the origin, and says what [`Fetcher::fetch`] would do.
    ///
    /// # Errors
    ///
    /// [`FetchError`], as a fetch would have it before its first byte; too little room is no error here.
    pub async fn plan(&self, model: &ModelRef, patterns: &Patterns) -> Result<Plan, FetchError> {
        let request = FetchRecord {
            model: model.clone(),
            patterns: patterns.clone(),
            pin: None,
        };
        let meter = Arc::new(Meter::new(model.clone()));
        let job = Job {
            request,
            source: None,
            meter,
            tree: watch::channel(None).0,
            outcome: watch::channel(None).0,
        };
        let source = self
            .shared
            .sources
            .open(model)
            .map_err(|error| job.source_error(error))?;
        let revision = self.patiently(&job, || source.resolve()).await?;
        let listing = self
            .patiently(&job, || source.list(&revision, patterns))
            .await?;
        let snapshot = SnapshotId::new(model, &revision, patterns);
        let resolved = model.at(&revision);
        job.on_store(&self.shared.store, move |store| {
            let published = store.snapshot(&snapshot)?.is_some();
            let mut plan = Plan {
                seconds_from_origin: None,
                model: resolved,
                snapshot,
                files: Vec::new(),
                bytes: 0,
                bytes_local: 0,
                bytes_to_fetch: 0,
                room: RoomPlan::default(),
                left_out: listing.left_out,
                published,
            };
            let mut staged = HashSet::new();
            for file in &listing.files {
                let here = bytes_here(store, file)?;
                // Files with the same bytes are fetched once.
                if staged.insert(StageKey::of(file)) {
                    plan.bytes_to_fetch += file.size - here;
                }
                plan.bytes += file.size;
                plan.bytes_local += here;
                plan.files.push(PlannedFile {
                    path: file.path.clone(),
                    bytes: file.size,
                    local: here == file.size,
                });
            }
            plan.room = store.plan_room(plan.bytes_to_fetch)?;
            let rate = store.rate(plan.model.scheme())?;
            plan.seconds_from_origin = rate.map(|rate| plan.bytes_to_fetch as f64 / rate);
            Ok(plan)
        })
        .await
    }
}

/// Bytes of a file that need not be fetched: all, or what an earlier fetch left.
fn bytes_here(store: &Store, file: &RemoteFile) -> Result<u64, StoreError> {
    let digest = store.digest_of(file)?;
    if digest.is_some_and(|(digest, _)| store.has(digest)) {
        return Ok(file.size);
    }
    Ok(store.journaled_bytes(&StageKey::of(file)).min(file.size))
}
