//! `weightd controller`: what a cluster needs once, beside the daemons on its nodes.
//!
//! All replicas answer the admission webhook. One of them, the leader, keeps the webhook's certificate, fills the
//! shared tier for pods that wait for a node, and sums up ModelPrefetch objects. It is none of the daemons' business
//! whether there is a controller.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use kube::Client;
use kube::api::Api;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use weightd_core::errors::Chain;
use weightd_core::metrics::Metrics;
use weightd_kube::ConnectError;

use crate::config::{Config, ConfigError};
use crate::process::Signals;
use crate::serve::http;

mod certificate;
mod election;
mod inject;
mod pending;
mod summary;
#[cfg(test)]
mod testing;
mod tls;
mod webhook;

use certificate::{Current, Origin, Renewal};
use election::{Candidate, Pace};
use pending::Pending;
use webhook::Webhook;

/// How long the webhook is answered after SIGTERM: until API servers have heard that this pod goes.
const LAST_CALLS: Duration = Duration::from_secs(4);

/// How long until it is tried again to prepare for fills: a term may last for months.
const PREPARE_AGAIN: Duration = Duration::from_secs(60);

/// Who this replica is.
#[derive(Debug, Clone)]
pub struct Replica {
    /// The namespace of its pod, with the Lease and the Secret.
    pub namespace: String,
    /// Its pod.
    pub pod: String,
}

/// Why the controller does not run.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// There is no cluster.
    #[error("no API server is known")]
    NoCluster,
    /// The API server cannot be reached as it is set.
    #[error("cannot prepare for the API server")]
    Connect(#[from] ConnectError),
    /// An address cannot be served, or signals not be caught.
    #[error("cannot {op} {on}")]
    Listen {
        /// What was tried.
        op: &'static str,
        /// With what.
        on: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A setting cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A part of it panicked.
    #[error("cannot go on: {0} broke off")]
    Broken(&'static str),
}

impl ControllerError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoCluster => Some(
                "run it in a pod, or set kubernetes.kubeconfig in its configuration".to_owned(),
            ),
            Self::Connect(error) => error.hint(),
            Self::Listen { .. } => Some("choose an address that this user may serve".to_owned()),
            Self::Broken(_) => {
                Some("start it again, and report what it said before this as a bug".to_owned())
            }
            Self::Config(_) => None,
        }
    }
}

/// What all parts share.
struct Controller {
    config: Config,
    replica: Replica,
    client: Client,
    metrics: Arc<Metrics>,
    certificate: Arc<Current>,
    /// This process is to end.
    stopping: AtomicBool,
}

/// Runs the controller until SIGTERM or SIGINT; a second one ends it at once.
///
/// # Errors
///
/// [`ControllerError`] if it cannot start.
pub async fn run(config: Config, replica: Replica) -> Result<(), ControllerError> {
    let mut signals = Signals::catch().map_err(|source| ControllerError::Listen {
        op: "listen for",
        on: "signals".to_owned(),
        source,
    })?;
    let kubeconfig = config.kubernetes.kubeconfig.as_deref();
    let client = crate::kube::connect(kubeconfig).await?;
    let controller = Arc::new(Controller {
        client: client.ok_or(ControllerError::NoCluster)?,
        metrics: Arc::default(),
        certificate: Arc::default(),
        stopping: AtomicBool::new(false),
        config,
        replica,
    });
    let mut serving = JoinSet::new();
    if let Some(address) = controller.config.metrics.listen {
        let listener = bind("serve metrics at", address).await?;
        serving.spawn(http::serve(listener, controller.routes()));
    }
    let last = CancellationToken::new();
    let webhook = controller.config.controller.webhook;
    if let Some(address) = webhook {
        let listener = bind("serve the webhook at", address).await?;
        let current = Arc::clone(&controller.certificate);
        let metrics = Arc::clone(&controller.metrics);
        serving.spawn(controller.certificate_origin().follow(current, metrics));
        serving.spawn(controller.answer(listener, last.clone()));
    }
    tracing::info!(pod = controller.replica.pod, "controller started");
    let stop = CancellationToken::new();
    let mut leading = JoinSet::new();
    leading.spawn(Arc::clone(&controller).lead(stop.clone()));
    asked_to_end(signals.next(), &mut serving, &mut leading).await?;
    tracing::info!("stopping");
    controller.stopping.store(true, Ordering::Relaxed);
    stop.cancel();
    let drain = async {
        let calls = async {
            if webhook.is_some() {
                tokio::time::sleep(LAST_CALLS).await;
                last.cancel();
                // The others never end.
                let _ = serving.join_next().await;
            }
        };
        let _ = tokio::join!(leading.join_next(), calls);
    };
    tokio::select! {
        () = drain => {}
        () = signals.next() => std::process::exit(130),
    }
    tracing::info!("controller stopped");
    Ok(())
}

/// Waits for `signal`. Nothing ends before it by itself: what does has panicked, and a replica that answers probes and
/// does nothing else would never be replaced.
async fn asked_to_end(
    signal: impl Future<Output = ()>,
    serving: &mut JoinSet<()>,
    leading: &mut JoinSet<()>,
) -> Result<(), ControllerError> {
    tokio::select! {
        () = signal => Ok(()),
        Some(_) = serving.join_next() => Err(ControllerError::Broken("what answers others")),
        Some(_) = leading.join_next() => Err(ControllerError::Broken("what leads")),
    }
}

async fn bind(op: &'static str, address: SocketAddr) -> Result<TcpListener, ControllerError> {
    let failed = |source| ControllerError::Listen {
        op,
        on: address.to_string(),
        source,
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    tracing::info!(%address, "ready to {op}");
    Ok(listener)
}

/// Does `work` in a task of its own: a busy moment of it must not keep the lease from being renewed. It ends when what
/// is returned is dropped.
async fn apart(work: impl Future<Output = ()> + Send + 'static) {
    let task = AbortOnDropHandle::new(tokio::spawn(work));
    if let Err(error) = task.await
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}

impl Controller {
    /// What Prometheus and kubelet ask.
    fn routes(self: &Arc<Self>) -> Router {
        let (ready, metrics) = (Arc::clone(self), Arc::clone(&self.metrics));
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(move || async move { ready.readiness() }))
            .route(
                "/metrics",
                get(move || async move { ([(header::CONTENT_TYPE, kind)], metrics.encode()) }),
            )
    }

    /// Whether API servers may send questions here.
    fn readiness(&self) -> (StatusCode, &'static str) {
        let webhook = self.config.controller.webhook.is_some();
        if self.stopping.load(Ordering::Relaxed) {
            (StatusCode::SERVICE_UNAVAILABLE, "stopping\n")
        } else if webhook && !self.certificate.is_there() {
            let text = "the webhook has no certificate yet\n";
            (StatusCode::SERVICE_UNAVAILABLE, text)
        } else {
            (StatusCode::OK, "ok\n")
        }
    }

    fn certificate_origin(&self) -> Origin {
        match &self.config.controller.certificate_dir {
            Some(dir) => Origin::Files(dir.clone()),
            None => Origin::Own(Box::new(Api::namespaced(
                self.client.clone(),
                &self.replica.namespace,
            ))),
        }
    }

    /// Answers the webhook until `last`.
    fn answer(
        &self,
        listener: TcpListener,
        last: CancellationToken,
    ) -> impl Future<Output = ()> + use<> {
        let webhook = Webhook::new(
            self.config.kubernetes.driver.clone(),
            self.replica.namespace.clone(),
            Arc::clone(&self.metrics),
        );
        let tls = tls::config(Arc::<Current>::clone(&self.certificate));
        tls::serve(listener, tls, webhook.routes(), last)
    }

    /// Leads whenever it is elected, until `stop`.
    async fn lead(self: Arc<Self>, stop: CancellationToken) {
        let Replica { namespace, pod } = &self.replica;
        let candidate = Candidate::new(self.client.clone(), namespace, pod, Pace::default());
        candidate
            .run(
                stop,
                |leads| self.metrics.leads(leads),
                |term| apart(Arc::clone(&self).work(term)),
            )
            .await;
    }

    /// What only the leader does, for one term.
    async fn work(self: Arc<Self>, term: CancellationToken) {
        let settings = &self.config.controller;
        let own = settings.webhook.is_some() && settings.certificate_dir.is_none();
        let renewal = own.then(|| {
            let namespace = &self.replica.namespace;
            Renewal::new(self.client.clone(), namespace, self.certificate_names())
        });
        let renew = async {
            if let Some(renewal) = renewal {
                renewal.run().await;
            }
        };
        let fill = self.fill_for_pending(term.clone());
        let sum_up = summary::run(self.client.clone());
        tokio::join!(
            term.run_until_cancelled(renew),
            term.run_until_cancelled(sum_up),
            fill,
            term.cancelled(),
        );
    }

    /// Fills the shared tier for pods without a node, if there is one.
    async fn fill_for_pending(&self, term: CancellationToken) {
        let settings = &self.config.controller;
        let Some(tier) = self.config.shared_config().filter(|_| settings.pending) else {
            tracing::info!(
                "nothing is filled for pods without a node: there is no shared tier, or it is not wanted"
            );
            return;
        };
        loop {
            let (client, metrics) = (self.client.clone(), Arc::clone(&self.metrics));
            let (tier, until) = (tier.clone(), term.clone());
            let pod = &self.replica.pod;
            match Pending::new(&self.config, tier, client, pod, metrics, until).await {
                Ok(pending) => return pending.run(self.client.clone()).await,
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "nothing is filled for pods without a node, trying again");
                }
            }
            let pause = tokio::time::sleep(PREPARE_AGAIN);
            if term.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    fn certificate_names(&self) -> Vec<String> {
        let (settings, namespace) = (&self.config.controller, &self.replica.namespace);
        let host = format!("{}.{namespace}.svc", settings.service);
        [host]
            .into_iter()
            .chain(settings.certificate_names.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_part_that_panics_ends_the_process() {
        let (mut serving, mut leading) = (JoinSet::new(), JoinSet::new());
        serving.spawn(std::future::pending());
        leading.spawn(apart(async { panic!("as the test wants it") }));

        let ended = asked_to_end(std::future::pending(), &mut serving, &mut leading).await;

        let error = ended.expect_err("it went on");
        assert!(
            matches!(error, ControllerError::Broken("what leads")),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_signal_ends_it_without_an_error() {
        let mut serving = JoinSet::new();
        serving.spawn(std::future::pending());
        let ended = asked_to_end(std::future::ready(()), &mut serving, &mut JoinSet::new()).await;
        ended.expect("it was asked to end");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn work_that_is_busy_keeps_nothing_else_waiting() {
        const BUSY: Duration = Duration::from_millis(500);
        let mut work = std::pin::pin!(apart(async { std::thread::sleep(BUSY) }));
        let began = Instant::now();

        tokio::select! {
            biased;
            () = &mut work => panic!("it was waited for"),
            () = tokio::time::sleep(Duration::from_millis(10)) => {}
        }

        assert!(began.elapsed() < BUSY, "{:?}", began.elapsed());
    }
}
