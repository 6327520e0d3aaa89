//! What a fetch would do, without doing it.

use std::collections::HashSet;
use std::sync::Arc;

use super::{FetchError, Fetcher, Job, Meter};
use crate::model::{ModelRef, Patterns, RelPath, SnapshotId};
use crate::shared::{SharedError, SharedStore, SharedTier, is_shareable};
use crate::source::{LeftOut, RemoteFile};
use crate::store::{FetchRecord, RoomPlan, StageKey, Store, StoreError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

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
    /// Bytes that are not here.
    pub bytes_to_fetch: u64,
    /// Bytes of those that the shared tier has.
    pub bytes_shared: u64,
    /// What would be evicted.
    pub room: RoomPlan,
    /// How long the origin would take, at the rate of earlier fetches.
    pub seconds_from_origin: Option<f64>,
    /// How long it takes to copy what the shared tier has, at the rate that was measured.
    pub seconds_from_shared: Option<f64>,
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
    /// How many of the others the shared tier has.
    pub shared: u64,
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
            given_up: CancellationToken::new(),
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
        let plan = Plan {
            seconds_from_origin: None,
            model: resolved,
            snapshot,
            files: Vec::new(),
            bytes: 0,
            bytes_local: 0,
            bytes_to_fetch: 0,
            bytes_shared: 0,
            seconds_from_shared: None,
            room: RoomPlan::default(),
            left_out: listing.left_out,
            published: false,
        };
        let listed = listing.files.clone();
        let planned = job.on_store(&self.shared.store, move |store| {
            plan_local(store, &listed, plan)
        });
        let mut plan = planned.await?;
        if let Some(tier) = &self.shared.tier {
            plan_shared(tier, listing.files, &mut plan).await;
        }
        Ok(plan)
    }
}

/// Adds what is here, and what room it takes.
fn plan_local(store: &Store, files: &[RemoteFile], mut plan: Plan) -> Result<Plan, StoreError> {
    plan.published = store.snapshot(&plan.snapshot)?.is_some();
    let mut staged = HashSet::new();
    for file in files {
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
            shared: 0,
        });
    }
    plan.room = store.plan_room(plan.bytes_to_fetch)?;
    let rate = store.rate(plan.model.scheme())?;
    plan.seconds_from_origin = rate.map(|rate| plan.bytes_to_fetch as f64 / rate);
    Ok(plan)
}

/// Adds what the shared tier would give.
async fn plan_shared(tier: &SharedTier, files: Vec<RemoteFile>, plan: &mut Plan) {
    if !tier.answers().await {
        return;
    }
    let wanted: Vec<bool> = plan.files.iter().map(|file| !file.local).collect();
    let looked = tier.run(move |store| {
        let files = files.iter().zip(wanted);
        let bytes = files.map(|(file, wanted)| match wanted && is_shareable(file) {
            true => bytes_shared(store, file),
            false => Ok(0),
        });
        bytes.collect::<Result<Vec<u64>, _>>()
    });
    // A tier that cannot say has nothing to give.
    for (file, bytes) in plan.files.iter_mut().zip(looked.await.unwrap_or_default()) {
        file.shared = bytes;
        plan.bytes_shared += bytes;
    }
    plan.bytes_shared = plan.bytes_shared.min(plan.bytes_to_fetch);
    let rates = tier.rates();
    plan.seconds_from_shared = rates
        .shared
        .get()
        .map(|rate| plan.bytes_shared as f64 / rate);
    if let Some(rate) = rates.origin.get() {
        plan.seconds_from_origin = Some(plan.bytes_to_fetch as f64 / rate);
    }
}

fn bytes_shared(store: &SharedStore, file: &RemoteFile) -> Result<u64, SharedError> {
    let Some(fill) = store.find(&StageKey::of(file), file.size)? else {
        return Ok(0);
    };
    let view = fill.look()?;
    let here = view.segments.iter().enumerate().filter(|(_, one)| one.here);
    let bytes = here.map(|(index, _)| {
        let range = fill.range(index);
        range.end - range.start
    });
    Ok(bytes.sum())
}

/// Bytes of a file that need not be fetched: all, or what an earlier fetch left.
fn bytes_here(store: &Store, file: &RemoteFile) -> Result<u64, StoreError> {
    let digest = store.digest_of(file)?;
    if digest.is_some_and(|(digest, _)| store.has(digest)) {
        return Ok(file.size);
    }
    Ok(store.journaled_bytes(&StageKey::of(file)).min(file.size))
}
