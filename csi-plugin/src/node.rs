//! The Node service: what kubelet asks of the plugin on its own node.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use weightd_proto::csi::v1 as csi;
use weightd_proto::weightd::v1::acquire_event::Event;
use weightd_proto::weightd::v1::{AcquireRequest, Acquired};

use crate::blocking;
use crate::daemon::Daemon;
use crate::mount::{self, Mount, Place};
use crate::pod::{ModelAnnotation, PodName, Pods, model_annotation};
use crate::volume::{KubeletDir, Target, Volume};

mod words;

/// The label under which a node's name stands in its topology.
pub const TOPOLOGY: &str = "topology.csi.weightd.io/node";

/// How long a publish call waits for a fetch: 110 s.
///
/// Source: kubelet gives a call 2 min, and after an answer waits longer each time before it asks again. A call
/// that is held until the model is here costs no such pause.
pub const PUBLISH_WAIT: Duration = Duration::from_secs(110);

/// After this long a wait is worth a watch on the pod: most volumes are here already.
const WATCH_AFTER: Duration = Duration::from_secs(2);

/// What the plugin knows of its node.
pub struct Node {
    /// The daemon, which has the models.
    pub daemon: Daemon,
    /// Where kubelet wants volumes.
    pub kubelet: KubeletDir,
    /// The API server, if there is one.
    pub pods: Option<Pods>,
    /// The Node object's name.
    pub node_id: String,
    /// How long a publish call waits.
    pub publish_wait: Duration,
    /// Ends all waiting.
    pub stop: CancellationToken,
    busy: Mutex<HashSet<String>>,
}

/// The right to work on one holder's target.
pub(crate) struct Turn<'a> {
    node: &'a Node,
    holder: String,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.node.busy().remove(&self.holder);
    }
}

impl Node {
    /// A plugin that asks `daemon`.
    #[must_use]
    pub fn new(daemon: Daemon, kubelet: KubeletDir, pods: Option<Pods>, node_id: String) -> Self {
        Self {
            daemon,
            kubelet,
            pods,
            node_id,
            publish_wait: PUBLISH_WAIT,
            stop: CancellationToken::new(),
            busy: Mutex::default(),
        }
    }

    /// Nobody else works on the target of `holder` while the turn lasts; `None` if somebody does now.
    pub(crate) fn turn(&self, holder: &str) -> Option<Turn<'_>> {
        let holder = holder.to_owned();
        let free = self.busy().insert(holder.clone());
        free.then_some(Turn { node: self, holder })
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn publish(&self, request: csi::NodePublishVolumeRequest) -> Result<(), Status> {
        let deadline = Instant::now() + self.publish_wait;
        let volume = Volume::parse(request, &self.kubelet)?;
        let target = volume.target.clone();
        let _turn = self.turn(&target.holder).ok_or_else(|| busy(&target))?;
        if self.is_published(&target).await? {
            return Ok(());
        }
        let pod = volume.pod.clone();
        let annotation = match volume.needs_annotation() {
            true => self.annotation(pod.as_ref(), &target).await?,
            false => None,
        };
        let model = annotation.as_ref().map(|found| found.model.as_str());
        let acquired = async {
            let request = volume.request(model)?;
            self.acquire(request, pod.as_ref(), deadline).await
        };
        let acquired = acquired.await.map_err(|status| match &annotation {
            Some(found) => words::of_annotated(&found.key, status),
            None => status,
        })?;
        let (from, to) = (PathBuf::from(&acquired.path), target.path.clone());
        let mounted = blocking(move || mount::bind(&from, &to)).await;
        if let Err(error) = mounted {
            self.let_go(&target).await;
            return Err(words::internal(&error));
        }
        tracing::info!(
            target = %target.path.display(), model = acquired.model, snapshot = acquired.snapshot,
            complete = acquired.complete, "volume mounted"
        );
        Ok(())
    }

    /// Whether the target shows a model already. What a killed plugin left half done is undone.
    async fn is_published(&self, target: &Target) -> Result<bool, Status> {
        let Some(found) = self.mounted_at(target).await? else {
            return Ok(false);
        };
        let store = self.store(&found.all).await?;
        if store.shown_by(&found.top).is_none() {
            return Err(Status::failed_precondition(format!(
                "`{}` has something else mounted on it\nhint: find out what it is with findmnt, and unmount it",
                target.path.display()
            )));
        }
        if found.top.locked_down && self.keep_pinned(target, &found.top, &store).await? {
            return Ok(true);
        }
        self.unmount(target).await?;
        Ok(false)
    }

    /// Sees to it that what is mounted is pinned. False if it is not in the store any more.
    pub(crate) async fn keep_pinned(
        &self,
        target: &Target,
        mount: &Mount,
        store: &Place,
    ) -> Result<bool, Status> {
        match store.shown_by(mount).and_then(snapshot_of) {
            Some(snapshot) => self.daemon.hold(&target.holder, &snapshot).await,
            // A volume's own directory is there as long as it is held.
            None => Ok(!mount
                .root
                .as_os_str()
                .as_encoded_bytes()
                .ends_with(b"//deleted")),
        }
    }

    /// Where the daemon's store lies.
    pub(crate) async fn store(&self, mounts: &[Mount]) -> Result<Place, Status> {
        let root = self.daemon.root().await?;
        Place::of(&root, mounts)
            .ok_or_else(|| Status::internal(format!("`{}` is on no mount", root.display())))
    }

    async fn mounted_at(&self, target: &Target) -> Result<Option<Found>, Status> {
        let path = target.path.clone();
        let all = mounts().await?;
        let top = mount::at(&path, &all).cloned();
        Ok(top.map(|top| Found { top, all }))
    }

    /// Which model the pod's annotations name.
    async fn annotation(
        &self,
        pod: Option<&PodName>,
        target: &Target,
    ) -> Result<Option<ModelAnnotation>, Status> {
        let Some(pod) = pod else {
            return Ok(None);
        };
        let Some(pods) = &self.pods else {
            return Err(Status::failed_precondition(
                "the volume has no attribute `source`, and the plugin knows no API server to read the pod's \
                 annotations from\nhint: set `source`, or start weightd-csi in the cluster or with --kubeconfig",
            ));
        };
        let annotations = pods.annotations(pod).await;
        let annotations = annotations.map_err(|error| words::of_pod(&error))?;
        let volume = target.volume.as_deref().unwrap_or_default();
        Ok(model_annotation(&annotations, volume))
    }

    /// Waits for the daemon; not longer than kubelet does, and not for a pod that is going away.
    async fn acquire(
        &self,
        request: AcquireRequest,
        pod: Option<&PodName>,
        deadline: Instant,
    ) -> Result<Acquired, Status> {
        let model = request.model.as_ref();
        let model = model.map(|spec| spec.model.clone()).unwrap_or_default();
        let told = Mutex::new(None);
        let acquired = async {
            let mut events = self.daemon.acquire(request).await?;
            loop {
                let event = events.message().await;
                match event.map_err(|status| self.daemon.readable(status))? {
                    Some(event) => match event.event {
                        Some(Event::Done(acquired)) => return Ok(acquired),
                        Some(Event::Progress(now)) => {
                            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
                        }
                        None => {}
                    },
                    None => return Err(Status::unavailable("the weightd daemon is stopping")),
                }
            }
        };
        tokio::select! {
            biased;
            acquired = acquired => acquired,
            () = self.deleted(pod) => Err(Status::aborted(format!(
                "the pod is being deleted: its volume is not waited for (the fetch of {model} goes on)"
            ))),
            () = self.stop.cancelled() => Err(Status::unavailable(
                "the plugin is stopping\nhint: nothing to do: the fetch goes on, and kubelet asks again",
            )),
            () = tokio::time::sleep_until(deadline) => {
                let told = told.lock().unwrap_or_else(PoisonError::into_inner).take();
                Err(words::still_fetching(&model, told.as_ref()))
            }
        }
    }

    async fn deleted(&self, pod: Option<&PodName>) {
        match (&self.pods, pod) {
            (Some(pods), Some(pod)) => {
                tokio::time::sleep(WATCH_AFTER).await;
                pods.being_deleted(pod).await;
            }
            _ => std::future::pending().await,
        }
    }

    async fn unpublish(&self, request: csi::NodeUnpublishVolumeRequest) -> Result<(), Status> {
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("the request has no volume id"));
        }
        let target = self.kubelet.target(&request.target_path)?;
        let _turn = self.turn(&target.holder).ok_or_else(|| busy(&target))?;
        self.unmount(&target).await?;
        self.let_go(&target).await;
        tracing::info!(target = %target.path.display(), "volume unmounted");
        Ok(())
    }

    pub(crate) async fn unmount(&self, target: &Target) -> Result<(), Status> {
        let path = target.path.clone();
        let removed = blocking(move || mount::remove(&path)).await;
        removed.map_err(|error| words::internal(&error))
    }

    /// Releases what the target's holder holds. If the daemon is away, the reconciler does it when it is back: a
    /// pod must not wait for that in order to go.
    pub(crate) async fn let_go(&self, target: &Target) {
        if let Err(status) = self.daemon.release(&target.holder).await {
            tracing::warn!(
                holder = target.holder,
                error = status.message(),
                "not released yet"
            );
        }
    }

    async fn stats(
        &self,
        request: csi::NodeGetVolumeStatsRequest,
    ) -> Result<csi::NodeGetVolumeStatsResponse, Status> {
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("the request has no volume id"));
        }
        if request.volume_path.is_empty() {
            return Err(Status::invalid_argument("the request has no volume path"));
        }
        let missing =
            || Status::not_found(format!("no volume is mounted at `{}`", request.volume_path));
        let target = self.kubelet.target(&request.volume_path);
        let target = target.map_err(|_| missing())?;
        if self.mounted_at(&target).await?.is_none() {
            return Err(missing());
        }
        let (bytes, files) = blocking(move || usage(&target.path))
            .await
            .map_err(|error| {
                Status::internal(format!("cannot measure `{}`: {error}", request.volume_path))
            })?;
        let usage = |amount, unit: csi::volume_usage::Unit| csi::VolumeUsage {
            available: 0,
            total: amount,
            used: amount,
            unit: unit.into(),
        };
        Ok(csi::NodeGetVolumeStatsResponse {
            usage: vec![
                usage(bytes, csi::volume_usage::Unit::Bytes),
                usage(files, csi::volume_usage::Unit::Inodes),
            ],
            volume_condition: None,
        })
    }
}

struct Found {
    top: Mount,
    all: Vec<Mount>,
}

pub(crate) async fn mounts() -> Result<Vec<Mount>, Status> {
    let mounts = blocking(mount::mounts).await;
    mounts.map_err(|error| words::internal(&error))
}

fn busy(target: &Target) -> Status {
    Status::aborted(format!(
        "another call for `{}` is under way",
        target.path.display()
    ))
}

/// The snapshot whose own tree a mount shows.
pub(crate) fn snapshot_of(below_store: &Path) -> Option<String> {
    let parts: Vec<&str> = below_store
        .iter()
        .filter_map(std::ffi::OsStr::to_str)
        .collect();
    match parts.as_slice() {
        ["snapshots", id, "tree"] => Some((*id).to_owned()),
        _ => None,
    }
}

/// Bytes and inodes of all files and folders below `dir`.
fn usage(dir: &Path) -> std::io::Result<(i64, i64)> {
    let (mut bytes, mut inodes, mut folders) = (0, 1, vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            inodes += 1;
            if metadata.is_dir() {
                folders.push(entry.path());
            } else {
                bytes += i64::try_from(metadata.len()).unwrap_or(i64::MAX);
            }
        }
    }
    Ok((bytes, inodes))
}

/// The Node service on a [`Node`].
#[derive(Clone)]
pub struct NodeService(pub Arc<Node>);

fn unimplemented<T>(call: &str) -> Result<Response<T>, Status> {
    let text = format!("csi.weightd.io does not serve {call}: it is not among its capabilities");
    Err(Status::unimplemented(text))
}

#[tonic::async_trait]
impl csi::node_server::Node for NodeService {
    async fn node_stage_volume(
        &self,
        _: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        unimplemented("NodeStageVolume")
    }

    async fn node_unstage_volume(
        &self,
        _: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        unimplemented("NodeUnstageVolume")
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let path = request.get_ref().target_path.clone();
        let outcome = self.0.publish(request.into_inner()).await;
        let outcome = outcome.inspect_err(|status| words::log("volume not mounted", &path, status));
        outcome.map(|()| Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let path = request.get_ref().target_path.clone();
        let outcome = self.0.unpublish(request.into_inner()).await;
        let outcome =
            outcome.inspect_err(|status| words::log("volume not unmounted", &path, status));
        outcome.map(|()| Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        self.0.stats(request.into_inner()).await.map(Response::new)
    }

    async fn node_expand_volume(
        &self,
        _: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        unimplemented("NodeExpandVolume")
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        use csi::node_service_capability::{Rpc, Type, rpc};
        let stats = Rpc {
            r#type: rpc::Type::GetVolumeStats.into(),
        };
        let stats = csi::NodeServiceCapability {
            r#type: Some(Type::Rpc(stats)),
        };
        Ok(Response::new(csi::NodeGetCapabilitiesResponse {
            capabilities: vec![stats],
        }))
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        let segments = HashMap::from([(TOPOLOGY.to_owned(), self.0.node_id.clone())]);
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: self.0.node_id.clone(),
            max_volumes_per_node: 0,
            accessible_topology: Some(csi::Topology { segments }),
        }))
    }
}
