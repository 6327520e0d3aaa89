//! Setting right what crashes left: the mounts that the kernel lists are compared with the pins that the
//! daemon lists, at the start and from time to time. Calls of kubelet are not counted on: it gives no
//! guarantee of an unpublish after a publish that failed.
//!
//! | Found | Done |
//! |---|---|
//! | a mount that is not locked down | mounted anew, locked down |
//! | a mount without its pin | pinned |
//! | a mount whose pod is gone, for the grace period | unmounted and released |
//! | a pin without a mount, for the grace period | released, unless the pod is known to live |

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;

use crate::mount::{Mount, Shown};
use crate::node::{self, By, Node, words};
use crate::volume::{self, Target};

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
        told: None,
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
    /// Why nobody says which pods there are, as it was logged.
    told: Option<String>,
}

fn is_pinned(pinned: &HashMap<String, Vec<String>>, target: &Target, mount: &Mount) -> bool {
    match (pinned.get(&target.holder), mount.shown_to(&target.holder)) {
        (Some(ids), Some(Shown::Snapshot(id))) => ids.contains(&id),
        (Some(_), Some(Shown::Own)) => true,
        _ => false,
    }
}

impl Reconciler {
    async fn pass(&mut self) -> Result<(), Status> {
        let node = Arc::clone(&self.node);
        // The pins first: what is mounted later and pinned before that is then no pin without a mount.
        let pinned = node.daemon.volumes().await?;
        let pinned: HashMap<String, Vec<String>> = pinned
            .into_iter()
            .map(|volume| (volume.holder, volume.snapshots))
            .collect();
        let mounted = self.mounted().await?;
        let alive = match mounted.is_empty() && pinned.is_empty() {
            true => None,
            false => self.alive().await,
        };
        let mut wrong = HashSet::new();
        for (target, mount) in &mounted {
            let gone = alive
                .as_ref()
                .is_some_and(|alive| !alive.contains(&target.pod_uid));
            if gone {
                wrong.insert(target.holder.clone());
                if self.overdue(&target.holder) {
                    self.clear(target).await;
                }
            } else if !mount.locked_down || !is_pinned(&pinned, target, mount) {
                self.keep(target).await?;
            }
        }
        let held: HashSet<&str> = mounted.iter().map(|(at, _)| at.holder.as_str()).collect();
        let lost = pinned
            .keys()
            .filter(|holder| !held.contains(holder.as_str()));
        for holder in lost {
            if !self.may_be_gone(holder, alive.as_ref()) {
                continue;
            }
            wrong.insert(holder.clone());
            if self.overdue(holder) {
                self.release(holder).await?;
            }
        }
        self.since.retain(|holder, _| wrong.contains(holder));
        Ok(())
    }

    /// The volumes that are mounted. Whatever else lies in kubelet's directory is none of ours.
    async fn mounted(&self) -> Result<Vec<(Target, Mount)>, Status> {
        let mounts = node::mounts().await?;
        let ours = mounts.into_iter().filter_map(|mount| {
            let target = self.node.kubelet.known(&mount.target)?;
            mount.shown_to(&target.holder)?;
            Some((target, mount))
        });
        Ok(ours.collect())
    }

    /// Whether a pin without a mount may be one that nobody needs. A plugin that sees the wrong directory sees no
    /// mounts at all, and what it released then would be missed by pods that run.
    fn may_be_gone(&self, holder: &str, alive: Option<&HashSet<String>>) -> bool {
        match (alive, volume::of_holder(holder)) {
            (Some(alive), Some((uid, _))) => !alive.contains(uid),
            _ => self.node.kubelet.has_pods(),
        }
    }

    /// Pins what is mounted.
    async fn keep(&self, target: &Target) -> Result<(), Status> {
        // A call that works on it sees to that itself.
        let Ok(_turn) = self.node.turn(&target.holder, By::Reconciler) else {
            return Ok(());
        };
        // Kubelet may have unmounted it since it was listed.
        let Some(mount) = node::mounted_at(target).await? else {
            return Ok(());
        };
        let Some(shown) = mount.shown_to(&target.holder) else {
            return Ok(());
        };
        match shown {
            Shown::Snapshot(id) => self.node.keep_pinned(target, &id).await,
            // It is pinned as long as its directory is there.
            Shown::Own => {}
            Shown::Deleted => tracing::error!(
                target = %target.path.display(), root = %mount.root.display(),
                "a mounted volume is not in the store any more: restart its pod"
            ),
        }
        if !mount.locked_down
            && let Err(status) = self.node.lock_down(target).await
        {
            tracing::error!(target = %target.path.display(), error = status.message(), "not locked down");
        }
        Ok(())
    }

    /// Takes away the volume of a pod that is gone.
    async fn clear(&self, target: &Target) {
        let Ok(_turn) = self.node.turn(&target.holder, By::Reconciler) else {
            return;
        };
        let path = target.path.display();
        tracing::warn!(target = %path, "the pod is gone, unmounting its volume");
        if let Err(status) = self.node.take_away(target).await {
            tracing::warn!(target = %path, error = status.message(), "not unmounted");
        }
    }

    /// Releases a pin without a mount.
    async fn release(&self, holder: &str) -> Result<(), Status> {
        let node = &self.node;
        // With the turn in hand nothing is mounted between the look and the release.
        let Ok(_turn) = node.turn(holder, By::Reconciler) else {
            return Ok(());
        };
        let mounted = self.mounted().await?;
        if mounted.iter().any(|(target, _)| target.holder == holder) {
            return Ok(());
        }
        tracing::info!(holder, "nothing is mounted, releasing the pin");
        if let Err(status) = node.daemon.release(holder).await {
            tracing::warn!(holder, error = status.message(), "not released");
        }
        Ok(())
    }

    /// The pods of this node; `None` if nobody says.
    async fn alive(&mut self) -> Option<HashSet<String>> {
        let node = Arc::clone(&self.node);
        let pods = node.pods.as_ref()?;
        let why = match pods.uids_on(&node.node_id).await {
            Ok(uids) if !uids.is_empty() => {
                self.told = None;
                return Some(uids);
            }
            // The plugin itself is a pod of this node. Whoever asks for another node would unmount everything.
            Ok(_) => format!(
                "the API server knows no pods on node `{}`: is that what --node-id must be?",
                node.node_id
            ),
            Err(error) => words::chain(&error),
        };
        if self.told.as_ref() != Some(&why) {
            tracing::warn!(why, "volumes of pods that are gone stay mounted meanwhile");
            self.told = Some(why);
        }
        None
    }

    /// Notes that something is wrong with a holder; true once it has been so for the grace period.
    fn overdue(&mut self, holder: &str) -> bool {
        let now = Instant::now();
        let since = self.since.entry(holder.to_owned()).or_insert(now);
        now.duration_since(*since) >= self.grace
    }
}
