//! What the API server knows of pods: the annotations that choose a model, and which pods still exist.
//!
//! Only metadata is asked for, so no pod's environment ever comes here.

mod error;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Error};
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;

use weightd_kube::Timeouts;
pub use weightd_kube::{Cause, ConnectError};

pub use error::PodError;

/// The annotation of a mirror pod that holds the uid its static pod has on the node.
///
/// Source: `ConfigHashAnnotationKey` in kubernetes/pkg/kubelet/types/pod_update.go.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";

/// The reason of a 404 that speaks of the object. A 404 without it speaks of a wrong server or path.
const NOT_FOUND: &str = "NotFound";

/// Pods of one answer to a list.
///
/// Source: the page size of client-go's pager, `defaultPageSize`.
const PAGE: u32 = 500;

/// The longest pause between two attempts to watch: 30 s.
///
/// Source: the longest backoff of client-go's reflector.
const PAUSE_MAX: Duration = Duration::from_secs(30);

type Metadata = PartialObjectMeta<Pod>;

/// A pod as kubelet names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name, which another pod may have later.
    pub name: String,
    /// What no other pod ever has. Kubelet's, so for a static pod not that of its mirror.
    pub uid: String,
}

/// The pods of a cluster, seen through its API server. Clones share their connections.
#[derive(Clone)]
pub struct Pods {
    client: Client,
    limits: Limits,
}

#[derive(Clone, Copy)]
struct Limits {
    /// Of a call. A connection may be silent for longer than `watch_s`, at whose end the server sends a byte.
    timeouts: Timeouts,
    /// After how many seconds the server ends a watch. Later than that plus 5 s a dead one is noticed.
    watch_s: u32,
    /// After the first failure of a watch; it doubles with each in a row.
    pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            timeouts: Timeouts {
                connect: Duration::from_secs(3),
                call: Duration::from_secs(9),
                idle: Duration::from_secs(75),
            },
            watch_s: 60,
            pause: Duration::from_millis(500),
        }
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A call that had no answer in time.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
struct Slow(Duration);

/// An answer that an API server does not give.
#[derive(Debug, thiserror::Error)]
#[error("the answer was no list of pods")]
struct NoList;

impl Pods {
    /// Prepares for the API server that `kubeconfig` names, else for the cluster's own if this is a pod in one.
    /// `None` if it is not. The server is not contacted yet.
    ///
    /// # Errors
    ///
    /// [`ConnectError`] if the kubeconfig or the service account cannot be used.
    pub async fn connect(kubeconfig: Option<&Path>) -> Result<Option<Self>, ConnectError> {
        Self::open(kubeconfig, Limits::default()).await
    }

    async fn open(kubeconfig: Option<&Path>, limits: Limits) -> Result<Option<Self>, ConnectError> {
        let client = weightd_kube::connect(kubeconfig, limits.timeouts).await?;
        Ok(client.map(|client| Self { client, limits }))
    }

    /// The annotations of `pod`. Answers within 9 s.
    ///
    /// # Errors
    ///
    /// [`PodError`] if the server does not say; [`PodError::Gone`] if no pod has that name, or another one has.
    pub async fn annotations(&self, pod: &PodName) -> Result<BTreeMap<String, String>, PodError> {
        let gone = || PodError::Gone { pod: pod.clone() };
        match self.in_time(self.beside(pod).get(&pod.name)).await {
            Ok(found) if is(&found, pod) => Ok(found.metadata.annotations.unwrap_or_default()),
            Ok(_) => Err(gone()),
            Err(Error::Api(status)) if status.reason == NOT_FOUND => Err(gone()),
            Err(error) => Err(PodError::new("get", format!("pod `{pod}`"), error)),
        }
    }

    /// Waits until `pod` is being deleted, is gone, or another one has its name. No failure ends the wait.
    pub async fn being_deleted(&self, pod: &PodName) {
        let config = watcher::Config::default()
            .fields(&format!("metadata.name={}", pod.name))
            .timeout(self.limits.watch_s);
        let mut events = pin!(watcher(self.beside(pod), config));
        let mut alive = false;
        let mut pause = self.limits.pause;
        loop {
            let event = events.next().await;
            match event.expect("a watcher starts anew, whatever broke it") {
                Ok(Event::Init) => {
                    alive = false;
                    continue;
                }
                Ok(Event::InitApply(found) | Event::Apply(found)) => {
                    alive = is(&found, pod) && found.metadata.deletion_timestamp.is_none();
                }
                Ok(Event::Delete(_)) => alive = false,
                Ok(Event::InitDone) => {}
                Err(error) => {
                    if pause == self.limits.pause {
                        let error = Cause::from(error);
                        tracing::warn!(%pod, %error, "watch of the pod failed, retrying");
                    }
                    // Unequal pauses: else all nodes would come at once to a server that has just started.
                    sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
                    pause = PAUSE_MAX.min(pause * 2);
                    continue;
                }
            }
            if !alive {
                return;
            }
            pause = self.limits.pause;
        }
    }

    /// The uids of all pods on `node`, as the node's own directories have them. Answers within 9 s.
    ///
    /// # Errors
    ///
    /// As [`Pods::on`].
    pub async fn uids_on(&self, node: &str) -> Result<HashSet<String>, PodError> {
        Ok(self.on(node).await?.into_keys().collect())
    }

    /// All pods on `node`, by each uid that the node's own directories may have for them. Answers within 9 s.
    ///
    /// # Errors
    ///
    /// [`PodError`] if one page is missing: a uid that is not in the answer stands for a pod that is gone.
    pub async fn on(&self, node: &str) -> Result<HashMap<String, PodName>, PodError> {
        self.in_time(self.all_on(node))
            .await
            .map_err(|error| PodError::new("list", format!("the pods of node `{node}`"), error))
    }

    async fn all_on(&self, node: &str) -> Result<HashMap<String, PodName>, Error> {
        let pods: Api<Metadata> = Api::all(self.client.clone());
        let mut page = ListParams::default()
            .fields(&format!("spec.nodeName={node}"))
            // From the server's cache: what is a moment old is as good, and costs etcd nothing.
            .match_any()
            .limit(PAGE);
        let mut all = HashMap::new();
        loop {
            let found = pods.list(&page).await?;
            // Whatever lacks items reads as a list without any, and all pods would count as gone.
            if found.metadata.resource_version.is_none() {
                return Err(Error::Service(Box::new(NoList)));
            }
            all.extend(found.items.iter().flat_map(named));
            page.continue_token = found.metadata.continue_.filter(|token| !token.is_empty());
            if page.continue_token.is_none() {
                return Ok(all);
            }
        }
    }

    /// The way to the server.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The namespace of `pod`.
    fn beside(&self, pod: &PodName) -> Api<Metadata> {
        Api::namespaced(self.client.clone(), &pod.namespace)
    }

    async fn in_time<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let limit = self.limits.timeouts.call;
        timeout(limit, call)
            .await
            .unwrap_or_else(|_| Err(Error::Service(Box::new(Slow(limit)))))
    }
}

/// Under which uids kubelet may know the pod.
fn uids(found: &Metadata) -> impl Iterator<Item = &str> {
    let annotations = found.metadata.annotations.as_ref();
    let of_static = annotations.and_then(|all| all.get(CONFIG_HASH));
    found
        .metadata
        .uid
        .iter()
        .chain(of_static)
        .map(String::as_str)
}

/// The pod under each of its uids.
fn named(found: &Metadata) -> impl Iterator<Item = (String, PodName)> {
    uids(found).map(|uid| {
        let pod = PodName {
            namespace: found.metadata.namespace.clone().unwrap_or_default(),
            name: found.metadata.name.clone().unwrap_or_default(),
            uid: uid.to_owned(),
        };
        (uid.to_owned(), pod)
    })
}

fn is(found: &Metadata, pod: &PodName) -> bool {
    uids(found).any(|uid| uid == pod.uid)
}

/// A model that an annotation names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelAnnotation {
    /// The annotation.
    pub key: String,
    /// What it says, without the white space around it.
    pub model: String,
}

/// What the annotations choose for `volume`: its own one, else the pod's. A blank one is none.
pub fn model_annotation(
    annotations: &BTreeMap<String, String>,
    volume: &str,
) -> Option<ModelAnnotation> {
    let own = format!("weightd.io/volume.{volume}");
    [own, "weightd.io/model".to_owned()]
        .into_iter()
        .find_map(|key| {
            // A block of YAML ends in a line break.
            let model = annotations.get(&key)?.trim().to_owned();
            (!model.is_empty()).then_some(ModelAnnotation { key, model })
        })
}
