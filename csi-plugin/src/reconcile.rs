//! Setting right what crashes left: the mounts that the kernel lists are compared with the pins that the
//! daemon lists, at the start and from time to time. Calls of kubelet are not counted on: it gives no
//! guarantee of an unpublish after a publish that failed.
//!
//! | Found | Done |
//! |---|---|
//! | a mount that is not locked down | locked down |
//! | a mount without its pin | pinned |
//! | a mount whose pod is gone, for the grace period | unmounted and released |
//! | a pin without a mount, for the grace period | released |

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;

use crate::blocking;
use crate::mount;
use crate::node::{self, Node};
use crate::volume::Target;

/// How often is compared: once a minute. Each time costs a read of mountinfo and two small calls.
const INTERVAL: Duration = Duration::from_secs(60);

/// How soon is tried again if the daemon is away.
const AGAIN: Duration = Duration::from_secs(5);

/// How long something must be wrong before it is undone: 5 min.
///
/// Source: kubelet asks again for a volume at most 2 min 2 s after an answer, which it may wait 2 min for.
pub const GRACE: Duration = Duration::from_secs(300);

/// Compares mounts and pins until the plugin stops.
pub async fn run(node: Arc<Node>, grace: Duration) {
    let mut reconciler = Reconciler {
        node,
        grace,
        since: HashMap::new(),
    };
    let stop = reconciler.node.stop.clone();
    let forever = async {
        loop {
            let pause = match reconciler.pass().await {
                Ok(()) => INTERVAL.min(grace.max(Duration::from_millis(100))),
                Err(status) => {
                    tracing::warn!(error = status.message(), "mounts and pins not compared");
                    AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = forever => {}
    }
}

struct Reconciler {
    node: Arc<Node>,
    grace: Duration,
    /// Since when something is wrong with a holder.
    since: HashMap<String, Instant>,
}

impl Reconciler {
    async fn pass(&mut self) -> Result<(), Status> {
        let node = Arc::clone(&self.node);
        // The pins first: what is mounted later and pinned before that is then no pin without a mount.
        let pinned = node.daemon.volumes().await?;
        let mounts = node::mounts().await?;
        let store = node.store(&mounts).await?;
        let pods = node.kubelet.pods();
        let ours = mounts
            .iter()
            .filter(|mount| mount.target.starts_with(&pods) && store.shown_by(mount).is_some());
        let mounted: Vec<(Target, &mount::Mount)> = ours
            .filter_map(|mount| Some((node.kubelet.mounted(&mount.target)?, mount)))
            .collect();
        let alive = self.alive().await;
        let mut wrong = HashSet::new();
        for (target, mount) in &mounted {
            let Some(_turn) = node.turn(&target.holder) else {
                continue;
            };
            let gone = match (&alive, &target.pod_uid) {
                (Some(alive), Some(uid)) => !alive.contains(uid),
                _ => false,
            };
            if gone {
                wrong.insert(target.holder.clone());
                if self.overdue(&target.holder) {
                    tracing::warn!(target = %target.path.display(), "the pod is gone, unmounting its volume");
                    node.unmount(target).await?;
                    node.let_go(target).await;
                }
                continue;
            }
            self.keep(target, mount, &store).await?;
        }
        let held: HashSet<&str> = mounted
            .iter()
            .map(|(target, _)| target.holder.as_str())
            .collect();
        for volume in pinned
            .iter()
            .filter(|volume| !held.contains(volume.holder.as_str()))
        {
            wrong.insert(volume.holder.clone());
            if self.overdue(&volume.holder) {
                self.release(&volume.holder).await?;
            }
        }
        self.since.retain(|holder, _| wrong.contains(holder));
        Ok(())
    }

    /// Sees to it that a mount is locked down and pinned.
    async fn keep(
        &self,
        target: &Target,
        mount: &mount::Mount,
        store: &mount::Place,
    ) -> Result<(), Status> {
        if !mount.locked_down {
            let path = target.path.clone();
            tracing::warn!(target = %path.display(), "a mount was not locked down");
            let locked = blocking(move || mount::lock_down(&path)).await;
            locked.map_err(|error| Status::internal(error.to_string()))?;
        }
        if !self.node.keep_pinned(target, mount, store).await? {
            tracing::error!(
                target = %target.path.display(), root = %mount.root.display(),
                "a mounted model is not in the store any more: restart the pod"
            );
        }
        Ok(())
    }

    /// Releases a pin without a mount.
    async fn release(&self, holder: &str) -> Result<(), Status> {
        let node = &self.node;
        // With the turn in hand nothing is mounted between the look and the release.
        let Some(_turn) = node.turn(holder) else {
            return Ok(());
        };
        let mounts = node::mounts().await?;
        let mounted = mounts.iter().any(|mount| {
            let target = node.kubelet.mounted(&mount.target);
            target.is_some_and(|target| target.holder == holder)
        });
        if mounted {
            return Ok(());
        }
        tracing::info!(holder, "nothing is mounted, releasing the pin");
        node.daemon.release(holder).await
    }

    /// The pods of this node; `None` if nobody says.
    async fn alive(&self) -> Option<HashSet<String>> {
        let pods = self.node.pods.as_ref()?;
        match pods.uids_on(&self.node.node_id).await {
            Ok(uids) => Some(uids),
            Err(error) => {
                tracing::debug!(%error, "the API server does not list this node's pods");
                None
            }
        }
    }

    /// Notes that something is wrong with a holder; true once it has been so for the grace period.
    fn overdue(&mut self, holder: &str) -> bool {
        let now = Instant::now();
        let since = self.since.entry(holder.to_owned()).or_insert(now);
        now.duration_since(*since) >= self.grace
    }
}
