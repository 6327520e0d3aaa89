//! What the daemon does in a Kubernetes cluster: it keeps the warm set of its node, removes the taints that wait for it,
//! and says in labels which models are here.
//!
//! | Module | Holds |
//! |---|---|
//! | [`prefetch`] | the custom resource `ModelPrefetch` |
//! | `warm` | the models that this node is to keep |
//! | [`taint`] | the taints that wait for the driver and the warm set |
//! | [`labels`], [`placement`] | which models the Node says it has |
//! | `neighbour` | what a node that is gone has left in objects |
//! | `node`, `watch` | this Node, and watching anything |
//!
//! At rest that is two watches, which begin anew every 290 s, and a few questions an hour: 0.5 requests a minute.

pub mod labels;
mod neighbour;
mod node;
pub mod placement;
pub mod prefetch;
pub mod taint;
#[cfg(test)]
mod tests;
mod warm;
mod watch;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use kube::Client;
use kube::api::Api;
use kube::runtime::watcher;
use tokio::sync::{self, oneshot};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weightd_core::errors::Chain;
use weightd_core::fetch::Fetcher;
use weightd_core::metrics::Metrics;
use weightd_core::warm::Warmer;
use weightd_kube::{ConnectError, Timeouts};

use crate::config::{Kept, KubernetesSection};
use node::{NodeView, ThisNode};
use taint::{Taint, Warmth, driver_registered};
use warm::{ObjectView, Said, SlimObject, Warm};
use watch::{Name, Seen, follow};

pub use node::PREFETCH;

/// How long a watch lasts before the server ends it: 290 s.
///
/// Source: the default of kube's watcher, which stays below the 300 s of most load balancers.
pub const WATCH: Duration = Duration::from_secs(290);

const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    call: Duration::from_secs(15),
    idle: Duration::from_secs(WATCH.as_secs() + 15),
};

/// Objects of one answer to a list: each may tell of thousands of nodes, and a page is in memory as a whole.
const PAGE: u32 = 20;

/// How often it is tried to find a way to the API server.
const CONNECT: Duration = Duration::from_secs(30);

/// Prepares for the API server that `kubeconfig` names, else for the cluster's own if this is a pod in one.
/// `None` if it is not. The server is not contacted yet.
///
/// # Errors
///
/// [`ConnectError`] if the kubeconfig or the service account cannot be used.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Option<Client>, ConnectError> {
    weightd_kube::connect(kubeconfig, TIMEOUTS).await
}

/// The work for the cluster, which goes on until the daemon stops. Clones do the same work.
#[derive(Clone)]
pub struct Work {
    /// What to do, by the configuration.
    pub section: KubernetesSection,
    /// This machine's Node.
    pub node: String,
    /// Brings models.
    pub fetcher: Arc<Fetcher>,
    /// Reads them into memory.
    pub warmer: Arc<Warmer>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Its tasks.
    pub tasks: TaskTracker,
    /// Ends them.
    pub stop: CancellationToken,
}

/// What one part tells the others.
#[derive(Clone, Default)]
struct Channels {
    nodes: sync::watch::Sender<Seen<NodeView>>,
    objects: sync::watch::Sender<Seen<ObjectView>>,
}

impl Work {
    /// Starts it all, with the models that the configuration names. They come also without a way to the API server.
    /// Nothing is fetched before `swept`: the store was looked through, and the fetches of a former daemon go on.
    pub fn start(self, requests: Vec<Kept>, swept: oneshot::Receiver<()>) {
        let work = self.clone();
        let swept = swept.map(drop).shared();
        self.spawn(async move {
            let client = match work.try_connect(true).await {
                Some(client) => client,
                None => {
                    let alone = Channels::default();
                    let (warmth, _) = sync::watch::channel(Warmth::Cold);
                    let warm = work.warm(None, requests.clone(), &alone, warmth);
                    let after = swept.clone();
                    tokio::select! {
                        () = async move { after.await; warm.run().await } => return,
                        client = work.connected() => client,
                    }
                }
            };
            work.serve(client, requests, swept);
        });
    }

    /// A way to the API server, as soon as there is one.
    async fn connected(&self) -> Client {
        loop {
            sleep(CONNECT).await;
            if let Some(client) = self.try_connect(false).await {
                return client;
            }
        }
    }

    async fn try_connect(&self, first: bool) -> Option<Client> {
        let (error, hint) = match connect(self.section.kubeconfig.as_deref()).await {
            Ok(Some(client)) => return Some(client),
            Ok(None) => (
                "this is no pod".to_owned(),
                "set kubernetes.kubeconfig".to_owned(),
            ),
            Err(error) => (Chain(&error).to_string(), error.hint().unwrap_or_default()),
        };
        match first {
            true => tracing::error!(error, hint, "no way to the API server, retrying"),
            false => tracing::debug!(error, "still no way to the API server"),
        }
        self.metrics.kube_failed("watch_node");
        None
    }

    fn serve(
        &self,
        client: Client,
        requests: Vec<Kept>,
        swept: impl Future<Output = ()> + Send + 'static,
    ) {
        let section = &self.section;
        let node = ThisNode::new(client, &self.node, Arc::clone(&self.metrics));
        let channels = Channels::default();
        let (warmth, is_warm) = sync::watch::channel(Warmth::Cold);

        let warm = self.warm(Some(node.clone()), requests, &channels, warmth);
        self.spawn(async move {
            swept.await;
            warm.run().await;
        });
        if section.startup_taint {
            let taint =
                Taint::of_startup(node.clone(), &section.driver, channels.nodes.subscribe());
            let (of, driver) = (node.clone(), section.driver.clone());
            self.spawn(async move {
                taint.keep_off(|| driver_registered(&of, &driver)).await;
            });
        }
        let limit = section.warming_timeout.0;
        let taint = Taint::of_warming(node.clone(), limit, channels.nodes.subscribe());
        self.spawn(async move { taint.keep_off(|| taint::warm(is_warm.clone())).await });
        let store = Arc::clone(self.fetcher.store());
        let nodes = channels.nodes.subscribe();
        self.spawn(labels::keep(node.clone(), store, section.labels, nodes));
        if section.warm_set {
            let objects = channels.objects.subscribe();
            self.spawn(neighbour::keep_clean(node.clone(), objects));
            let (node, objects) = (node.clone(), channels.objects);
            self.spawn(async move { watch_objects(&node, &objects).await });
        }
        let (of, nodes) = (node.clone(), channels.nodes.subscribe());
        self.spawn(async move { of.tell_if_missing(nodes).await });
        self.spawn(async move { node.watch(&channels.nodes).await });
    }

    fn warm(
        &self,
        node: Option<ThisNode>,
        config: Vec<Kept>,
        channels: &Channels,
        warmth: sync::watch::Sender<Warmth>,
    ) -> Warm {
        let said = Said {
            config,
            node: channels.nodes.subscribe(),
            objects: channels.objects.subscribe(),
            cluster: self.section.warm_set,
        };
        let (fetcher, metrics) = (Arc::clone(&self.fetcher), Arc::clone(&self.metrics));
        let warmer = Arc::clone(&self.warmer);
        Warm::new(fetcher, warmer, metrics, node, said, warmth)
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                // First: what ends with the daemon must not look like trouble to the others.
                biased;
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }
}

/// Watches the `ModelPrefetch` objects, for ever.
async fn watch_objects(node: &ThisNode, seen: &sync::watch::Sender<Seen<ObjectView>>) {
    let name = Name {
        call: "watch_prefetches",
        what: "ModelPrefetch objects",
        remedy: "install the CRD modelprefetches.weightd.io, and let the service account get, list and watch modelprefetches",
    };
    let objects: Api<SlimObject> = Api::all(node.client.clone());
    let read = |object| ObjectView::read(object, &node.name);
    let (config, metrics) = (
        watcher::Config::default().page_size(PAGE),
        Arc::clone(&node.metrics),
    );
    follow(objects, config, name, metrics, seen, read).await;
}
