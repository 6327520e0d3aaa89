//! The domain's values as messages.

use std::path::Path;
use std::time::SystemTime;

use secrecy::SecretString;
use secrecy::zeroize::Zeroizing;
use tonic::Status;
use weightd_core::fetch::{Fetched, Phase, Plan, Progress, Wait};
use weightd_core::model::{ModelRef, Patterns};
use weightd_core::shared::SharedTier;
use weightd_core::source::LeftOut;
use weightd_core::store::{
    Collected, Holder, Layout, Snapshot, Usage, Verified, Volume, VolumeRecord,
};
use weightd_core::warm::{WarmState, Warming};
use weightd_proto::weightd::v1 as wire;

use crate::access::{Credentials, Requester};
use crate::sources::s3::S3Keys;
use crate::volumes::{Acquired, Told, VolumeRequest};

pub(super) fn snapshot(snapshot: &Snapshot, with_files: bool) -> wire::Snapshot {
    let manifest = &snapshot.manifest;
    let files = manifest.files.iter().map(|file| wire::File {
        path: file.path.to_string(),
        bytes: file.size,
        sha256: file.sha256.to_string(),
    });
    wire::Snapshot {
        snapshot: manifest.snapshot.to_string(),
        model: manifest.model.to_string(),
        path: snapshot.path.display().to_string(),
        files: manifest.files.len() as u64,
        bytes: manifest.bytes(),
        last_used: snapshot.last_used,
        pinned_by: snapshot.pinned_by.iter().map(ToString::to_string).collect(),
        file: if with_files {
            files.collect()
        } else {
            Vec::new()
        },
        published_at: manifest.published_at,
    }
}

pub(super) fn progress(progress: &Progress) -> wire::Progress {
    let phase = match progress.phase {
        Phase::Resolving => wire::progress::Phase::Resolving,
        Phase::WaitingForRoom => wire::progress::Phase::WaitingForRoom,
        Phase::Fetching => wire::progress::Phase::Fetching,
        Phase::Publishing => wire::progress::Phase::Publishing,
    };
    wire::Progress {
        model: progress.model.to_string(),
        snapshot: progress
            .snapshot
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        phase: phase.into(),
        files: progress.files,
        files_done: progress.files_done,
        bytes: progress.bytes,
        bytes_done: progress.bytes_done,
        bytes_fetched: progress.bytes_fetched,
        bytes_per_second: progress.bytes_per_second,
        eta_seconds: progress.eta.map(|eta| eta.as_secs_f64()),
        elapsed_seconds: progress.elapsed.as_secs_f64(),
        bytes_shared: progress.bytes_shared,
        wait: progress.wait.as_ref().map(wait),
        bytes_per_second_shared: progress.bytes_per_second_shared,
    }
}

fn wait(wait: &Wait) -> wire::Wait {
    let kind = match wait {
        Wait::RateLimit { .. } => wire::wait::Kind::RateLimit,
        Wait::Origin { .. } => wire::wait::Kind::Origin,
        Wait::Silence => wire::wait::Kind::Silence,
        Wait::Neighbour => wire::wait::Kind::Neighbour,
        Wait::Others => wire::wait::Kind::Others,
        Wait::Turn => wire::wait::Kind::Turn,
    };
    let seconds = |until: SystemTime| {
        let since = until.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        i64::try_from(since.as_secs()).ok()
    };
    wire::Wait {
        kind: kind.into(),
        detail: wait.to_string(),
        until: wait.until().and_then(seconds),
    }
}

pub(super) fn fetched(fetched: &Fetched) -> wire::Prefetched {
    wire::Prefetched {
        snapshot: Some(snapshot(&fetched.snapshot, false)),
        bytes_fetched: fetched.bytes_fetched,
        bytes_reused: fetched.bytes_reused,
        seconds: fetched.seconds,
        left_out: Some(left_out(&fetched.left_out)),
        bytes_shared: fetched.bytes_shared,
        warming: None,
    }
}

pub(super) fn warming(warming: &Warming) -> wire::Warming {
    use wire::warming::State;
    let (state, detail) = match &warming.state {
        WarmState::Waiting => (State::Waiting, String::new()),
        WarmState::Reading => (State::Reading, String::new()),
        WarmState::Warm => (State::Warm, String::new()),
        WarmState::Partly(why) => (State::Partly, why.to_string()),
        WarmState::Failed(error) => (State::Failed, error.clone()),
        WarmState::Stopped => (State::Stopped, String::new()),
    };
    wire::Warming {
        model: warming.model.to_string(),
        snapshot: warming.snapshot.to_string(),
        state: state.into(),
        bytes: warming.bytes,
        bytes_warm: warming.bytes_warm,
        bytes_read: warming.bytes_read,
        detail,
    }
}

fn left_out(left_out: &LeftOut) -> wire::LeftOut {
    wire::LeftOut {
        files: left_out.files,
        bytes: left_out.bytes,
        examples: left_out.examples.clone(),
    }
}

pub(super) fn tier(tier: &str, root: &Path, usage: &Usage) -> wire::TierStatus {
    wire::TierStatus {
        tier: tier.to_owned(),
        root: root.display().to_string(),
        capacity_bytes: usage.capacity,
        free_bytes: usage.free,
        store_bytes: usage.store,
        pinned_bytes: usage.pinned,
        high_watermark_bytes: usage.high,
        low_watermark_bytes: usage.low,
        snapshots: usage.snapshots,
        partial_bytes: usage.partial,
        max_bytes: usage.max,
        state: "in use".to_owned(),
        detail: String::new(),
    }
}

/// The shared tier: what its file system said when it was last asked.
pub(super) fn shared_tier(tier: &SharedTier, capacity: Option<(u64, u64)>) -> wire::TierStatus {
    let state = tier.state();
    let (capacity_bytes, free_bytes) = capacity.unwrap_or_default();
    wire::TierStatus {
        tier: "shared".to_owned(),
        root: tier.config().root.display().to_string(),
        capacity_bytes,
        free_bytes,
        state: match (state.readable, state.writable) {
            (true, true) => "in use",
            (true, false) => "only read",
            (false, _) => "left out",
        }
        .to_owned(),
        detail: state.detail,
        ..wire::TierStatus::default()
    }
}

/// What was measured so far.
pub(super) fn rates(tier: &SharedTier) -> Vec<wire::Rate> {
    let rates = tier.rates();
    let ways = [
        ("origin", &rates.origin),
        ("shared_read", &rates.shared),
        ("shared_write", &rates.written),
    ];
    let known = ways.into_iter().filter_map(|(way, rate)| {
        Some(wire::Rate {
            way: way.to_owned(),
            bytes_per_second: rate.get()?,
        })
    });
    known.collect()
}

pub(super) fn plan(plan: Plan) -> wire::PlanResponse {
    let file = plan.files.iter().map(|file| wire::PlannedFile {
        path: file.path.to_string(),
        bytes: file.bytes,
        local: file.local,
        bytes_shared: file.shared,
    });
    wire::PlanResponse {
        file: file.collect(),
        model: plan.model.to_string(),
        snapshot: plan.snapshot.to_string(),
        files: plan.files.len() as u64,
        bytes: plan.bytes,
        bytes_local: plan.bytes_local,
        bytes_to_fetch: plan.bytes_to_fetch,
        evict: plan.room.evict.iter().map(ToString::to_string).collect(),
        evict_bytes: plan.room.freed,
        bytes_short: plan.room.short,
        seconds_from_origin: plan.seconds_from_origin,
        left_out: Some(left_out(&plan.left_out)),
        published: plan.published,
        bytes_shared: plan.bytes_shared,
        seconds_from_shared: plan.seconds_from_shared,
    }
}

pub(super) fn collected(collected: Collected) -> wire::CollectResponse {
    wire::CollectResponse {
        blobs: collected.blobs,
        bytes_freed: collected.bytes,
        partial: collected.partial,
        trees: collected.trees,
    }
}

pub(super) fn verified(verified: &Verified) -> wire::Verified {
    let damaged = verified.damaged.iter().map(|damaged| wire::Damaged {
        sha256: damaged.sha256.to_string(),
        got: damaged
            .got
            .map(|digest| digest.to_string())
            .unwrap_or_default(),
        snapshots: damaged.snapshots.iter().map(ToString::to_string).collect(),
        set_aside: damaged
            .set_aside
            .as_ref()
            .map(|path| path.display().to_string())
            .unwrap_or_default(),
    });
    wire::Verified {
        checked: verified.checked,
        bytes: verified.bytes,
        damaged: damaged.collect(),
    }
}

pub(super) fn volume_request(
    request: wire::AcquireRequest,
    model: ModelRef,
    patterns: Patterns,
    given: Given,
) -> Result<VolumeRequest, Status> {
    let layout = match request.layout() {
        wire::acquire_request::Layout::Unspecified | wire::acquire_request::Layout::Flat => {
            Layout::Flat
        }
        wire::acquire_request::Layout::HfCache => Layout::HfCache,
    };
    Ok(VolumeRequest {
        holder: super::holder(&request.holder)?,
        model,
        patterns,
        layout,
        at_once: request.at_once,
        warm: request.warm,
        requester: Requester {
            namespace: request.namespace,
            credentials: given.credentials()?,
        },
    })
}

/// The request for the rest of what a mounted volume was opened for.
pub(super) fn mounted_request(
    request: wire::AcquireRequest,
    holder: Holder,
    opened: VolumeRecord,
    given: Given,
) -> Result<VolumeRequest, Status> {
    Ok(VolumeRequest {
        holder,
        model: opened.model,
        patterns: opened.patterns,
        layout: opened.layout,
        at_once: true,
        warm: request.warm,
        requester: Requester {
            namespace: request.namespace,
            credentials: given.credentials()?,
        },
    })
}

/// Credentials as they came, in memory that is wiped however the request ends. Taken out of it first, for
/// nothing else of the request wipes them when it is refused.
pub(super) struct Given {
    hf_token: Option<SecretString>,
    access_key_id: String,
    secret_access_key: Option<SecretString>,
    session_token: Option<SecretString>,
}

impl Given {
    pub(super) fn take(request: &mut wire::AcquireRequest) -> Self {
        let wire = request.credentials.take().unwrap_or_default();
        let secret = |text: String| {
            let text = Zeroizing::new(text);
            // From a borrowed text: one that is handed over may be moved to shrink it.
            (!text.is_empty()).then(|| SecretString::from(text.as_str()))
        };
        Self {
            hf_token: secret(wire.hf_token),
            access_key_id: wire.aws_access_key_id,
            secret_access_key: secret(wire.aws_secret_access_key),
            session_token: secret(wire.aws_session_token),
        }
    }

    fn credentials(self) -> Result<Credentials, Status> {
        let s3 = match (self.access_key_id.is_empty(), self.secret_access_key) {
            (true, None) => None,
            (false, Some(secret_access_key)) => Some(S3Keys {
                access_key_id: self.access_key_id,
                secret_access_key,
                session_token: self.session_token,
            }),
            _ => {
                return Err(Status::invalid_argument(
                    "aws-access-key-id and aws-secret-access-key go together",
                ));
            }
        };
        Ok(Credentials {
            hf_token: self.hf_token,
            s3,
        })
    }
}

pub(super) fn acquired(acquired: &Acquired) -> wire::Acquired {
    wire::Acquired {
        path: acquired.path.display().to_string(),
        model: acquired.model.to_string(),
        snapshot: acquired.snapshot.to_string(),
        complete: acquired.complete,
    }
}

pub(super) fn volume(volume: &Volume, told: Option<&Told>) -> wire::Volume {
    wire::Volume {
        holder: volume.holder.to_string(),
        snapshots: volume.snapshots.iter().map(ToString::to_string).collect(),
        complete: volume.complete,
        progress: told.and_then(|told| told.progress.as_ref()).map(progress),
        error: told.map(|told| told.error.clone()).unwrap_or_default(),
    }
}
