//! The Node service: what kubelet asks of the plugin on its own node.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use weightd_proto::csi::v1 as csi;
use weightd_proto::weightd::v1::acquire_event::Event;
use weightd_proto::weightd::v1::{AcquireRequest, Acquired};

use crate::blocking;
use crate::daemon::Daemon;
use crate::events::{Events, Telling};
use crate::mount::{self, Mount, Shown, Workshop};
use crate::pod::{ModelAnnotation, PodName, Pods, model_annotation};
use crate::volume::{self, KubeletDir, Target, Volume};

pub(crate) mod words;

/// The label under which a node's name stands in its topology.
pub const TOPOLOGY: &str = "topology.csi.weightd.io/node";

/// How long a publish call waits for a fetch: 110 s.
///
/// Source: kubelet gives a call 2 min, and after an answer waits longer each time before it asks again. A call
/// that is held until the model is here costs no such pause.
pub const PUBLISH_WAIT: Duration = Duration::from_secs(110);

/// After this long a wait is worth a watch on the pod: most volumes are here already.
const WATCH_AFTER: Duration = Duration::from_secs(2);

/// How long a call waits for the reconciler to be done with its target.
const RECONCILER: Duration = Duration::from_secs(10);

/// What the plugin knows of its node.
pub struct Node {
    /// The daemon, which has the models.
    pub daemon: Daemon,
    /// Where kubelet wants volumes.
    pub kubelet: KubeletDir,
    /// Where mounts are prepared.
    pub workshop: Workshop,
    /// The API server, if there is one.
    pub pods: Option<Pods>,
    /// What pods are told of their volumes, if there is somebody to tell.
    pub events: Option<Events>,
    /// The Node object's name.
    pub node_id: String,
    /// How long a publish call waits.
    pub publish_wait: Duration,
    /// Ends all waiting.
    pub stop: CancellationToken,
    busy: Mutex<HashMap<String, By>>,
    /// A turn has ended.
    ended: Notify,
}

/// Who works on a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    Call,
    Reconciler,
}

/// The right to work on one holder's target.
pub(crate) struct Turn<'a> {
    node: &'a Node,
    holder: String,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.node.busy().remove(&self.holder);
        self.node.ended.notify_waiters();
    }
}

impl Node {
    /// A plugin that asks `daemon`.
    #[must_use]
    pub fn new(
        daemon: Daemon,
        kubelet: KubeletDir,
        workshop: Workshop,
        pods: Option<Pods>,
        node_id: String,
    ) -> Self {
        Self {
            daemon,
            kubelet,
            workshop,
            pods,
            events: None,
            node_id,
            publish_wait: PUBLISH_WAIT,
            stop: CancellationToken::new(),
            busy: Mutex::default(),
            ended: Notify::new(),
        }
    }

    /// Nobody else works on the target of `holder` while the turn lasts.
    ///
    /// # Errors
    ///
    /// Who works on it now.
    pub(crate) fn turn(&self, holder: &str, by: By) -> Result<Turn<'_>, By> {
        match self.busy().entry(holder.to_owned()) {
            Entry::Occupied(entry) => Err(*entry.get()),
            Entry::Vacant(entry) => {
                entry.insert(by);
                Ok(Turn {
                    node: self,
                    holder: holder.to_owned(),
                })
            }
        }
    }

    /// The turn of a call. Another call's is not waited for: kubelet asks again. The reconciler's is short.
    async fn turn_of_call(&self, target: &Target) -> Result<Turn<'_>, Status> {
        let turn = async {
            loop {
                let ended = self.ended.notified();
                match self.turn(&target.holder, By::Call) {
                    Ok(turn) => return Some(turn),
                    Err(By::Call) => return None,
                    Err(By::Reconciler) => ended.await,
                }
            }
        };
        let turn = tokio::time::timeout(RECONCILER, turn).await;
        turn.ok().flatten().ok_or_else(|| {
            Status::aborted(format!(
                "another call for `{}` is under way",
                target.path.display()
            ))
        })
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, HashMap<String, By>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `left` says that kubelet gave up on the call. Waiting ends then; a mount that was begun does not.
    ///
    /// What is mounted is looked at before the request is: kubelet asks again after its own restart, and would take
    /// a running pod's volume away for any refusal.
    async fn publish(
        self: Arc<Self>,
        request: csi::NodePublishVolumeRequest,
        left: CancellationToken,
    ) -> Result<(), Status> {
        let deadline = Instant::now() + self.publish_wait;
        let target = self.kubelet.target(&request.target_path)?;
        let _turn = self.turn_of_call(&target).await?;
        let shown = self.shown_at(&target).await?;
        match &shown {
            Some(Shown::Snapshot(id)) => {
                self.keep_pinned(&target, id).await;
                return Ok(());
            }
            Some(Shown::Own) => {
                self.complete(request, &target, deadline, &left).await;
                return Ok(());
            }
            Some(Shown::Deleted) | None => {}
        }
        let telling = self.telling(&request, &target);
        let mounted = async {
            let volume = Volume::parse(request, &self.kubelet)?;
            let acquired = self.ask(volume, deadline, &left, &telling).await?;
            if shown.is_some() {
                self.unmount(&target).await?;
            }
            self.mount(&acquired, &target).await?;
            Ok(acquired)
        };
        match mounted.await {
            Ok(acquired) => telling.mounted(&acquired),
            Err(status) => {
                telling.failed(&status);
                return Err(status);
            }
        }
        Ok(())
    }

    async fn mount(self: &Arc<Self>, acquired: &Acquired, target: &Target) -> Result<(), Status> {
        let (from, to) = (PathBuf::from(&acquired.path), target.path.clone());
        let node = Arc::clone(self);
        let mounted = blocking(move || node.workshop.bind(&from, &to)).await;
        if let Err(error) = mounted {
            self.let_go(target).await;
            return Err(words::of_mount(&error));
        }
        tracing::info!(
            target = %target.path.display(), model = acquired.model, snapshot = acquired.snapshot,
            complete = acquired.complete, "volume mounted"
        );
        Ok(())
    }

    /// Tells the pod that kubelet vouches for.
    fn telling(&self, request: &csi::NodePublishVolumeRequest, target: &Target) -> Telling {
        let pod = volume::pod(&request.volume_context, target).ok().flatten();
        match (&self.events, pod) {
            (Some(events), Some(pod)) => events.tell(target, &pod),
            _ => Telling::nobody(),
        }
    }

    /// Has the rest of a mounted volume brought, with the pod's credentials, which the daemon may have lost. The
    /// pod keeps what it has, whatever comes of that.
    async fn complete(
        &self,
        request: csi::NodePublishVolumeRequest,
        target: &Target,
        deadline: Instant,
        left: &CancellationToken,
    ) {
        if is_complete(target).await {
            return;
        }
        let telling = self.telling(&request, target);
        let asked = async {
            let volume = Volume::parse(request, &self.kubelet)?;
            let pod = volume.pod.clone();
            let rest = volume.rest();
            let waiting = (deadline, left);
            self.acquire(rest, pod.as_ref(), waiting, &telling).await
        };
        match asked.await {
            Ok(acquired) => telling.mounted(&acquired),
            Err(status) => words::log(
                "volume not completed",
                &target.path.display().to_string(),
                &status,
            ),
        }
    }

    /// What the target shows already.
    ///
    /// # Errors
    ///
    /// `FAILED_PRECONDITION` if that is none of ours.
    async fn shown_at(self: &Arc<Self>, target: &Target) -> Result<Option<Shown>, Status> {
        let all = mounts().await?;
        let here: Vec<&Mount> = all
            .iter()
            .filter(|mount| mount.target == target.path)
            .collect();
        let shown: Option<Vec<Shown>> = here
            .iter()
            .map(|mount| mount.shown_to(&target.holder))
            .collect();
        let shown = shown.ok_or_else(|| foreign(target))?;
        if here.last().is_some_and(|top| !top.locked_down) {
            self.lock_down(target).await?;
        }
        Ok(shown.into_iter().last())
    }

    /// Mounts what the target shows anew, for one that can be written to: a lock that is put on a mount does not
    /// reach the node.
    pub(crate) async fn lock_down(self: &Arc<Self>, target: &Target) -> Result<(), Status> {
        tracing::warn!(target = %target.path.display(), "a volume was not locked down, mounting it anew");
        let (node, path) = (Arc::clone(self), target.path.clone());
        let locked = blocking(move || node.workshop.bind_again(&path)).await;
        locked.map_err(|error| words::of_mount(&error))
    }

    async fn unmount(&self, target: &Target) -> Result<(), Status> {
        let path = target.path.clone();
        let unmounted = blocking(move || mount::unmount(&path)).await;
        unmounted.map_err(|error| words::of_mount(&error))
    }

    /// Sees to it that a mounted snapshot is pinned. If that cannot be had, the mount stays all the same: the
    /// pod reads on, and kubelet would take a refusal for a reason to unmount.
    pub(crate) async fn keep_pinned(&self, target: &Target, snapshot: &str) {
        let target_path = target.path.display();
        match self.daemon.hold(&target.holder, snapshot).await {
            Ok(true) => {}
            Ok(false) => tracing::error!(
                target = %target_path, snapshot,
                "a mounted model was withdrawn from the store: restart the pod, it is fetched anew then"
            ),
            Err(status) => tracing::warn!(
                target = %target_path, snapshot, error = status.message(), "not pinned anew"
            ),
        }
    }

    /// Which model it is, and then the daemon.
    async fn ask(
        &self,
        volume: Volume,
        deadline: Instant,
        left: &CancellationToken,
        telling: &Telling,
    ) -> Result<Acquired, Status> {
        let target = volume.target.clone();
        let annotation = match volume.needs_annotation() {
            true => self.annotation(volume.pod.as_ref(), &target).await?,
            false => None,
        };
        let model = annotation.as_ref().map(|found| found.model.as_str());
        let pod = volume.pod.clone();
        let acquired = async {
            let request = volume.request(model)?;
            let waiting = (deadline, left);
            self.acquire(request, pod.as_ref(), waiting, telling).await
        };
        acquired.await.map_err(|status| match &annotation {
            Some(found) => words::of_annotated(&found.key, status),
            None => status,
        })
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
        Ok(model_annotation(&annotations, &target.volume))
    }

    /// Waits for the daemon; not longer than kubelet does, and not for a pod that is going away.
    async fn acquire(
        &self,
        request: AcquireRequest,
        pod: Option<&PodName>,
        (deadline, left): (Instant, &CancellationToken),
        telling: &Telling,
    ) -> Result<Acquired, Status> {
        let model = request.model.as_ref();
        let model = model.map(|spec| spec.model.clone()).unwrap_or_default();
        telling.model(&model);
        let told = Mutex::new(None);
        let acquired = async {
            let mut events = self.daemon.acquire(request).await?;
            loop {
                let event = events.message().await;
                match event.map_err(|status| self.daemon.readable(status))? {
                    Some(event) => match event.event {
                        Some(Event::Done(acquired)) => return Ok(acquired),
                        Some(Event::Progress(now)) => {
                            telling.progress(&now);
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
            acquired = acquired => acquired.inspect_err(|status| telling.refused(status)),
            () = self.deleted(pod) => {
                telling.gone();
                Err(Status::aborted(format!(
                    "the pod is being deleted: its volume is not waited for (the fetch of {model} goes on)"
                )))
            }
            () = left.cancelled() => Err(Status::cancelled("kubelet gave up on the call")),
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

    async fn unpublish(
        self: Arc<Self>,
        request: csi::NodeUnpublishVolumeRequest,
    ) -> Result<(), Status> {
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("the request has no volume id"));
        }
        let target = self.kubelet.target(&request.target_path)?;
        let _turn = self.turn_of_call(&target).await?;
        self.take_away(&target).await?;
        tracing::info!(target = %target.path.display(), "volume unmounted");
        Ok(())
    }

    /// Unmounts and releases a volume. The caller has the turn.
    pub(crate) async fn take_away(self: &Arc<Self>, target: &Target) -> Result<(), Status> {
        let all = mounts().await?;
        let mut here = all.iter().filter(|mount| mount.target == target.path);
        if here.any(|mount| mount.shown_to(&target.holder).is_none()) {
            return Err(foreign(target));
        }
        self.unmount(target).await?;
        if let Some(events) = &self.events {
            events.end(&target.holder);
        }
        // What is not mounted needs no pin, whatever else lies in the directory.
        self.let_go(target).await;
        let path = target.path.clone();
        let removed = blocking(move || mount::remove_dir(&path)).await;
        removed.map_err(|error| words::of_mount(&error))
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
        if mounted_at(&target).await?.is_none() {
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

pub(crate) async fn mounts() -> Result<Vec<Mount>, Status> {
    let mounts = blocking(mount::mounts).await;
    mounts.map_err(|error| words::of_mount(&error))
}

/// What is on top at the target now.
pub(crate) async fn mounted_at(target: &Target) -> Result<Option<Mount>, Status> {
    let all = mounts().await?;
    Ok(mount::at(&target.path, &all).cloned())
}

/// Whether a volume's own directory has all its files.
async fn is_complete(target: &Target) -> bool {
    let mark = target.path.join(".weightd/complete");
    blocking(move || mark.exists()).await
}

fn foreign(target: &Target) -> Status {
    Status::failed_precondition(format!(
        "`{}` has something mounted on it that is no volume of csi.weightd.io\nhint: find out what it is with \
         findmnt, and unmount it",
        target.path.display()
    ))
}

/// Runs a call to its end, also if kubelet gives up on it: a mount that lands after its call has ended would
/// meet the next call's work. `work` is told that kubelet left.
async fn to_its_end<F: Future<Output = Result<(), Status>> + Send + 'static>(
    work: impl FnOnce(CancellationToken) -> F,
) -> Result<(), Status> {
    let left = CancellationToken::new();
    let _guard = left.clone().drop_guard();
    match tokio::spawn(work(left)).await {
        Ok(outcome) => outcome,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
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
        let (node, request) = (Arc::clone(&self.0), request.into_inner());
        let outcome = to_its_end(|left| node.publish(request, left)).await;
        let outcome = outcome.inspect_err(|status| words::log("volume not mounted", &path, status));
        outcome.map(|()| Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let path = request.get_ref().target_path.clone();
        let (node, request) = (Arc::clone(&self.0), request.into_inner());
        let outcome = to_its_end(|_| node.unpublish(request)).await;
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
