//! The control API. It decides nothing: it turns messages into calls and errors into codes.
//!
//! `weightd` serves it on a unix socket, `weightctl` without a daemon serves it to itself in memory, so
//! that a command does the same with and without a daemon.

use std::ops::ControlFlow;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};
use weightd_core::blocking;
use weightd_core::fetch::{FetchRequest, Fetcher, Progress};
use weightd_core::metrics::Metrics;
use weightd_core::model::{ModelRef, Patterns, SnapshotId};
use weightd_core::store::{Holder, Partial, Snapshot, Store, StoreError};
use weightd_core::warm::Warmer;
use weightd_proto::weightd::v1 as wire;
use weightd_proto::weightd::v1::control_server::Control;

use crate::volumes::Volumes;

mod convert;
mod prefetch;
mod status;

use status::{invalid, of_acquire, of_fetch, of_store};

/// Events that a slow client may lag behind.
const EVENTS: usize = 16;

type Events<T> = ReceiverStream<Result<T, Status>>;

/// Everything that a request needs.
pub struct Engine {
    /// The local tier.
    pub store: Arc<Store>,
    /// What fills it.
    pub fetcher: Arc<Fetcher>,
    /// What reads it into memory.
    pub warmer: Arc<Warmer>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What pods mount.
    pub volumes: Arc<Volumes>,
}

/// The control API on an [`Engine`].
#[derive(Clone)]
pub struct ControlService(Arc<Engine>);

impl ControlService {
    /// Serves `engine`.
    #[must_use]
    pub fn new(engine: Arc<Engine>) -> Self {
        Self(engine)
    }

    async fn on_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let store = Arc::clone(&self.0.store);
        blocking::run(move || work(&store))
            .await
            .map_err(|error| of_store(&error))
    }

    /// The snapshot that a user names, or the error that it is not here.
    async fn find_here(&self, spec: Option<wire::ModelSpec>) -> Result<Snapshot, Status> {
        let (model, patterns) = parse(spec)?;
        self.on_store(move |store| {
            let found = store.find(&model, &patterns)?;
            found.ok_or_else(|| StoreError::Missing(model.to_string()))
        })
        .await
    }
}

fn parse(spec: Option<wire::ModelSpec>) -> Result<(ModelRef, Patterns), Status> {
    let spec = spec.ok_or_else(|| Status::invalid_argument("the request names no model"))?;
    let model = spec
        .model
        .parse::<ModelRef>()
        .map_err(|error| invalid(&error))?;
    let patterns = Patterns::new(spec.include, spec.exclude).map_err(|error| invalid(&error))?;
    Ok((model, patterns))
}

fn operator(name: &str) -> Result<Holder, Status> {
    Holder::operator(name).map_err(|error| invalid(&error))
}

#[tonic::async_trait]
impl Control for ControlService {
    type PrefetchStream = Events<wire::PrefetchEvent>;
    type VerifyStream = Events<wire::VerifyEvent>;
    type AcquireStream = Events<wire::AcquireEvent>;

    async fn version(
        &self,
        _: Request<wire::VersionRequest>,
    ) -> Result<Response<wire::VersionResponse>, Status> {
        Ok(Response::new(wire::VersionResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: self.0.store.root().display().to_string(),
        }))
    }

    async fn prefetch(
        &self,
        request: Request<wire::PrefetchRequest>,
    ) -> Result<Response<Self::PrefetchStream>, Status> {
        let request = request.into_inner();
        let (model, patterns) = parse(request.model)?;
        let pin = if request.pin.is_empty() {
            None
        } else {
            Some(operator(&request.pin)?)
        };
        let fetch = self.0.fetcher.fetch(FetchRequest {
            model,
            patterns,
            pin,
        });
        let (events, stream) = mpsc::channel(EVENTS);
        let warmer = request.warm.then(|| Arc::clone(&self.0.warmer));
        tokio::spawn(prefetch::follow(fetch, warmer, events));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn list(
        &self,
        request: Request<wire::ListRequest>,
    ) -> Result<Response<wire::ListResponse>, Status> {
        let with_files = request.into_inner().with_files;
        let snapshots = self.on_store(Store::snapshots).await?;
        let snapshots = snapshots
            .iter()
            .map(|snapshot| convert::snapshot(snapshot, with_files));
        Ok(Response::new(wire::ListResponse {
            snapshots: snapshots.collect(),
        }))
    }

    async fn find(
        &self,
        request: Request<wire::FindRequest>,
    ) -> Result<Response<wire::FindResponse>, Status> {
        let snapshot = self.find_here(request.into_inner().model).await?;
        Ok(Response::new(wire::FindResponse {
            snapshot: Some(convert::snapshot(&snapshot, false)),
        }))
    }

    async fn status(
        &self,
        _: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusResponse>, Status> {
        let fetches = self
            .0
            .fetcher
            .active()
            .iter()
            .map(convert::progress)
            .collect();
        let usage = self.on_store(Store::usage).await?;
        let mut tiers = vec![convert::tier("local", self.0.store.root(), &usage)];
        let mut rates = Vec::new();
        if let Some(tier) = self.0.fetcher.tier() {
            tier.seen().await;
            let capacity = tier.run(|store| store.capacity()).await.ok();
            tiers.push(convert::shared_tier(tier, capacity));
            rates = convert::rates(tier);
        }
        let warmings = self.0.warmer.told().await;
        Ok(Response::new(wire::StatusResponse {
            fetches,
            tiers,
            rates,
            warmings: warmings.iter().map(convert::warming).collect(),
        }))
    }

    async fn plan(
        &self,
        request: Request<wire::PlanRequest>,
    ) -> Result<Response<wire::PlanResponse>, Status> {
        let (model, patterns) = parse(request.into_inner().model)?;
        let plan = self
            .0
            .fetcher
            .plan(&model, &patterns)
            .await
            .map_err(|error| of_fetch(&error))?;
        Ok(Response::new(convert::plan(plan)))
    }

    async fn pin(
        &self,
        request: Request<wire::PinRequest>,
    ) -> Result<Response<wire::PinResponse>, Status> {
        let request = request.into_inner();
        let holder = operator(&request.name)?;
        let id = self.find_here(request.model).await?.manifest.snapshot;
        let pinned = self.on_store(move |store| {
            store.pin(&id, &holder)?;
            store
                .snapshot(&id)?
                .ok_or_else(|| StoreError::Missing(id.to_string()))
        });
        Ok(Response::new(wire::PinResponse {
            snapshot: Some(convert::snapshot(&pinned.await?, false)),
        }))
    }

    async fn unpin(
        &self,
        request: Request<wire::UnpinRequest>,
    ) -> Result<Response<wire::UnpinResponse>, Status> {
        let request = request.into_inner();
        let holder = operator(&request.name)?;
        let id = self.find_here(request.model).await?.manifest.snapshot;
        let unpinned = self.on_store(move |store| {
            let released = store.unpin(&id, &holder)?;
            let snapshot = store
                .snapshot(&id)?
                .ok_or_else(|| StoreError::Missing(id.to_string()))?;
            Ok((snapshot, released))
        });
        let (snapshot, released) = unpinned.await?;
        Ok(Response::new(wire::UnpinResponse {
            snapshot: Some(convert::snapshot(&snapshot, false)),
            released,
        }))
    }

    async fn remove(
        &self,
        request: Request<wire::RemoveRequest>,
    ) -> Result<Response<wire::RemoveResponse>, Status> {
        let id = self
            .find_here(request.into_inner().model)
            .await?
            .manifest
            .snapshot;
        let snapshots = vec![id.to_string()];
        let bytes_freed = self.on_store(move |store| store.remove(&id)).await?;
        Ok(Response::new(wire::RemoveResponse {
            snapshots,
            bytes_freed,
        }))
    }

    async fn collect(
        &self,
        request: Request<wire::CollectRequest>,
    ) -> Result<Response<wire::CollectResponse>, Status> {
        let partial = if request.into_inner().partial {
            Partial::All
        } else {
            Partial::Stale
        };
        let collected = self.on_store(move |store| store.collect(partial)).await?;
        Ok(Response::new(convert::collected(collected)))
    }

    async fn verify(
        &self,
        request: Request<wire::VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        use wire::verify_event::Event;
        let only = match request.into_inner().model {
            None => None,
            spec => Some(self.find_here(spec).await?.manifest.snapshot),
        };
        let (events, stream) = mpsc::channel(EVENTS);
        let engine = Arc::clone(&self.0);
        tokio::spawn(blocking::run(move || {
            let verified = engine
                .store
                .bytes_to_verify(only.as_ref())
                .and_then(|bytes| {
                    let mut bytes_done = 0;
                    engine.store.verify(only.as_ref(), &mut |hashed| {
                        bytes_done += hashed;
                        let progress = Event::Progress(wire::VerifyProgress { bytes, bytes_done });
                        // Progress that nobody reads in time may be lost. A client that left wants no more.
                        match events.try_send(Ok(wire::VerifyEvent {
                            event: Some(progress),
                        })) {
                            Err(mpsc::error::TrySendError::Closed(_)) => ControlFlow::Break(()),
                            _ => ControlFlow::Continue(()),
                        }
                    })
                });
            let last = verified.map_err(|error| of_store(&error)).map(|verified| {
                engine
                    .metrics
                    .verified(verified.bytes, verified.damaged.len() as u64);
                wire::VerifyEvent {
                    event: Some(Event::Done(convert::verified(&verified))),
                }
            });
            let _ = events.blocking_send(last);
        }));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn acquire(
        &self,
        request: Request<wire::AcquireRequest>,
    ) -> Result<Response<Self::AcquireStream>, Status> {
        use wire::acquire_event::Event;
        let mut request = request.into_inner();
        let given = convert::Given::take(&mut request);
        let mounted = request.mounted;
        let request = if mounted {
            let holder = holder(&request.holder)?;
            let opened = self.0.volumes.opened_for(&holder).await;
            let opened = opened.map_err(|error| of_store(&error))?.ok_or_else(|| {
                Status::not_found(format!("{holder} has no directory of its own any more"))
            })?;
            convert::mounted_request(request, holder, opened, given)?
        } else {
            let (model, patterns) = parse(request.model.take())?;
            convert::volume_request(request, model, patterns, given)?
        };
        let (events, stream) = mpsc::channel(EVENTS);
        let engine = Arc::clone(&self.0);
        tokio::spawn(async move {
            let mut report = |progress: &Progress| {
                let event = Event::Progress(convert::progress(progress));
                // Progress that nobody reads in time may be lost.
                let _ = events.try_send(Ok(wire::AcquireEvent { event: Some(event) }));
            };
            // The pod of one that is mounted runs already.
            let asking = (!mounted).then(|| engine.volumes.asked(&request.holder));
            let acquired = tokio::select! {
                biased;
                // What a client that left was given is taken back: its next call begins anew.
                () = events.closed() => return,
                acquired = engine.volumes.acquire(&request, &mut report) => acquired,
            };
            let acquired = acquired.map_err(|error| of_acquire(&error));
            engine.metrics.acquired(match &acquired {
                Ok(_) => "ok",
                Err(status) if status.code() == Code::PermissionDenied => "denied",
                Err(_) => "failed",
            });
            // One that is mounted was counted before.
            if let (Ok(acquired), Some(asking)) = (&acquired, asking) {
                engine.metrics.volume(acquired.waited, acquired.bytes);
                asking.given();
            }
            let last = acquired.as_ref().map(|acquired| wire::AcquireEvent {
                event: Some(Event::Done(convert::acquired(acquired))),
            });
            let sent = events.send(last.map_err(Status::clone)).await;
            if let (Ok(acquired), Ok(())) = (acquired, sent) {
                acquired.told();
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn release(
        &self,
        request: Request<wire::ReleaseRequest>,
    ) -> Result<Response<wire::ReleaseResponse>, Status> {
        let holder = holder(&request.into_inner().holder)?;
        let released = self.0.volumes.release(holder).await;
        let released = released.map_err(|error| of_store(&error))?;
        Ok(Response::new(wire::ReleaseResponse { released }))
    }

    async fn volumes(
        &self,
        _: Request<wire::VolumesRequest>,
    ) -> Result<Response<wire::VolumesResponse>, Status> {
        let volumes = self.0.volumes.list().await;
        let told = self.0.volumes.told();
        let volumes = volumes.map_err(|error| of_store(&error))?;
        Ok(Response::new(wire::VolumesResponse {
            volumes: volumes
                .iter()
                .map(|volume| convert::volume(volume, told.get(&volume.holder)))
                .collect(),
        }))
    }

    async fn hold(
        &self,
        request: Request<wire::HoldRequest>,
    ) -> Result<Response<wire::HoldResponse>, Status> {
        let request = request.into_inner();
        let holder = holder(&request.holder)?;
        let id = request.snapshot.parse::<SnapshotId>();
        let id = id.map_err(|error| invalid(&error))?;
        let held = self.0.volumes.pin_again(holder, id).await;
        let held = held.map_err(|error| of_store(&error))?;
        Ok(Response::new(wire::HoldResponse { held }))
    }
}

/// A volume's holder.
fn holder(text: &str) -> Result<Holder, Status> {
    let holder = text.parse::<Holder>().map_err(|error| invalid(&error))?;
    match holder.is_volume() {
        true => Ok(holder),
        false => Err(Status::invalid_argument(format!(
            "`{text}` is no volume's holder: csi/<name>"
        ))),
    }
}
