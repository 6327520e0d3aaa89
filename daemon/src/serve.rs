//! The daemon: its socket, its metrics, and what it does by itself.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::fetch::Fetcher;
use weightd_core::metrics::Metrics;
use weightd_core::shared::SharedTier;
use weightd_core::store::{Partial, Store, StoreError};
use weightd_core::warm::Warmer;
use weightd_proto::weightd::v1::control_server::ControlServer;

use crate::access::Access;
use crate::config::{Config, ConfigError, Kept};
use crate::kube;
use crate::process::Signals;
use crate::rpc::{ControlService, Engine};
use crate::sources::{Origins, OriginsError};
use crate::volumes::Volumes;

pub(crate) mod http;
mod label;
mod scrub;
pub(crate) mod socket;

pub use label::LabelError;

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The store cannot be used.
    #[error("cannot open the store")]
    Store(#[from] StoreError),
    /// The store cannot get the label that pods may read.
    #[error("cannot label the store")]
    Label(#[from] LabelError),
    /// A setting cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A source's client cannot be made.
    #[error(transparent)]
    Origins(#[from] OriginsError),
    /// Another daemon serves the socket.
    #[error("another process serves {}", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// A socket cannot be served.
    #[error("cannot {op} {on}")]
    Listen {
        /// What was tried.
        op: &'static str,
        /// On which socket or address.
        on: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The control API broke off.
    #[error("the control API broke off")]
    Control(#[from] tonic::transport::Error),
}

impl ServeError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Store(error) => error.hint(),
            Self::Label(_) => Some(
                "is SELinux on here, and may this process relabel (the chart's selinux.type)? else leave store.selinux_label out".to_owned(),
            ),
            Self::Taken { .. } => {
                Some("stop it first, or give this one another --socket and --root".to_owned())
            }
            Self::Listen { .. } => {
                Some("choose an address or path that this user may serve".to_owned())
            }
            Self::Config(_) | Self::Origins(_) | Self::Control(_) => None,
        }
    }
}

/// Runs the daemon until SIGTERM or SIGINT; a second one ends it at once.
///
/// # Errors
///
/// [`ServeError`] if it cannot start, or breaks off.
pub async fn run(config: Config) -> Result<(), ServeError> {
    // First: a signal that comes while the store is opened must end the start cleanly.
    let mut signals = Signals::catch().map_err(|source| ServeError::Listen {
        op: "listen for",
        on: "signals".into(),
        source,
    })?;
    let started = tokio::select! {
        started = start(&config) => started?,
        () = signals.next() => {
            tracing::info!("stopped before it had started");
            return Ok(());
        }
    };
    let Started {
        daemon,
        kept,
        listener,
        socket,
        metrics_server,
    } = started;
    tracing::info!(root = %daemon.engine.store.root().display(), socket = %config.socket.display(), "weightd started");
    let control = Server::builder()
        .add_service(ControlServer::new(ControlService::new(Arc::clone(
            &daemon.engine,
        ))))
        .serve_with_incoming_shutdown(
            socket::incoming(listener, config.socket_uids.clone()),
            daemon.stop.clone().cancelled_owned(),
        );
    let control = tokio::spawn(control);
    daemon.start_work(&config, kept);
    let outcome = daemon
        .until_stopped(control, signals, config.shutdown.deadline.0)
        .await;
    // The successor waits for the socket, and then needs the address too: it must be free by then.
    if let Some(server) = metrics_server {
        server.end().await;
    }
    drop(socket);
    tracing::info!("weightd stopped");
    outcome
}

/// What runs until the daemon is stopped.
struct Started {
    daemon: Daemon,
    kept: Vec<Kept>,
    listener: UnixListener,
    socket: socket::Socket,
    metrics_server: Option<Owned>,
}

async fn start(config: &Config) -> Result<Started, ServeError> {
    let (root, limits) = (config.root.clone(), config.store_limits());
    let kept = config.kept()?;
    let sources = Origins::new(
        config.hf_config()?,
        config.s3_config()?,
        Some(config.file.allow.clone()),
    )?;
    let sources = Arc::new(sources);
    let label = config.store.selinux_label.clone();
    let store = blocking::run(move || {
        // First: what is made in the root takes its label.
        if let Some(label) = label {
            label::label(&root, &label)?;
        }
        Ok::<_, ServeError>(Store::open(&root, limits)?)
    });
    let store = store.await?;
    let metrics = Arc::new(Metrics::default());
    let tier = config.shared_config();
    let tier = tier.map(|config| SharedTier::new(config, Arc::clone(&metrics)));
    let fetcher = Fetcher::with_tier(
        Arc::clone(&store),
        Arc::<Origins>::clone(&sources),
        config.fetch_limits(),
        Arc::clone(&metrics),
        tier,
    );
    let policy = config.policy()?;
    if policy.is_open() {
        tracing::info!("no access rules: pods of any namespace may mount what this node may read");
    }
    let access = Access::new(sources, Arc::clone(&store), policy, config.access_limits());
    let limits = config.warm_limits();
    let warmer = Warmer::new(Arc::clone(&store), limits, Arc::clone(&metrics));
    let engine = Arc::new(Engine {
        volumes: Volumes::new(Arc::clone(&fetcher), Arc::clone(&warmer), access),
        store,
        fetcher,
        warmer,
        metrics,
    });
    let daemon = Daemon {
        engine,
        ready: Arc::default(),
        stop: CancellationToken::new(),
        tasks: TaskTracker::new(),
    };
    let (listener, socket) = socket::listen(&config.socket, &config.socket_uids).await?;
    let metrics_server = match config.metrics.listen {
        Some(address) => Some(daemon.serve_metrics(address).await?),
        None => None,
    };
    Ok(Started {
        daemon,
        kept,
        listener,
        socket,
        metrics_server,
    })
}

#[derive(Clone)]
struct Daemon {
    engine: Arc<Engine>,
    ready: Arc<AtomicBool>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Ends its task when it is dropped.
struct Owned(tokio::task::JoinHandle<()>);

impl Owned {
    async fn end(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Daemon {
    async fn serve_metrics(&self, address: SocketAddr) -> Result<Owned, ServeError> {
        let failed = |source| ServeError::Listen {
            op: "serve metrics at",
            on: address.to_string(),
            source,
        };
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        tracing::info!(%address, "serving metrics");
        let app = http::routes(Arc::clone(&self.engine), Arc::clone(&self.ready));
        Ok(Owned(tokio::spawn(http::serve(listener, app))))
    }

    /// Starts what the daemon does by itself, after a look at what dead processes left. The control API is
    /// served meanwhile.
    fn start_work(&self, config: &Config, kept: Vec<Kept>) {
        let (daemon, stop) = (self.clone(), self.stop.clone());
        let (interval, rate) = (config.scrub.interval.0, config.scrub.bytes_per_second.0);
        let (swept, is_swept) = oneshot::channel();
        // In a cluster they are part of the warm set.
        let kept = match self.cluster_work(config) {
            Some(work) => {
                work.start(kept, is_swept);
                Vec::new()
            }
            None => kept,
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => return,
                () = daemon.clear_and_resume() => {}
            }
            let _ = swept.send(());
            for model in kept {
                daemon.bring(model);
            }
            daemon.ready.store(true, Ordering::Relaxed);
            if !interval.is_zero() {
                scrub::run(daemon, interval, rate).await;
            }
        });
    }

    /// What there is to do if this is a node of a cluster.
    fn cluster_work(&self, config: &Config) -> Option<kube::Work> {
        Some(kube::Work {
            node: config.kubernetes.node.clone()?,
            section: config.kubernetes.clone(),
            fetcher: Arc::clone(&self.engine.fetcher),
            warmer: Arc::clone(&self.engine.warmer),
            metrics: Arc::clone(&self.engine.metrics),
            tasks: self.tasks.clone(),
            stop: self.stop.clone(),
        })
    }

    /// Fetches in a task of its own, until it is here or the daemon stops.
    fn bring(&self, kept: Kept) {
        let (engine, stop) = (Arc::clone(&self.engine), self.stop.clone());
        self.tasks.spawn(async move {
            let brought = tokio::select! {
                () = stop.cancelled() => return,
                brought = engine.fetcher.keep_trying(kept.request) => brought,
            };
            if let (Ok(fetched), true) = (brought, kept.warm) {
                let manifest = &fetched.snapshot.manifest;
                engine.warmer.warm(&manifest.model, &manifest.snapshot);
            }
        });
    }

    /// Clears what dead processes left, and goes on with what they began. One unreadable file is no reason
    /// to bring no models at all, so what fails is only told.
    async fn clear_and_resume(&self) {
        let store = Arc::clone(&self.engine.store);
        match blocking::run(move || store.collect(Partial::Stale)).await {
            Ok(collected) => tracing::debug!(?collected, "store swept"),
            Err(error) => tracing::error!(error = %Chain(&error), "store not swept"),
        }
        let fetcher = Arc::clone(&self.engine.fetcher);
        if let Err(error) = fetcher.resume() {
            tracing::error!(error = %Chain(&error), "earlier fetches not resumed");
        }
        if let Err(error) = self.engine.volumes.resume().await {
            tracing::error!(error = %Chain(&error), "earlier volumes not resumed");
        }
    }

    /// Waits for a signal, then lets requests and fetches end.
    async fn until_stopped(
        &self,
        mut control: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
        mut signals: Signals,
        deadline: Duration,
    ) -> Result<(), ServeError> {
        tokio::select! {
            ended = &mut control => return Ok(ended.expect("the control API does not panic")?),
            () = signals.next() => {}
        }
        tracing::info!(deadline_s = deadline.as_secs(), "stopping");
        self.ready.store(false, Ordering::Relaxed);
        self.stop.cancel();
        self.tasks.close();
        let end = Instant::now() + deadline;
        let drain = async {
            // Fetches and warming first: the clients that wait for them are then told, and leave.
            self.engine.fetcher.shutdown(deadline).await;
            let _ = tokio::time::timeout_at(end, self.engine.warmer.shutdown()).await;
            let _ = tokio::time::timeout_at(end, self.engine.volumes.shutdown()).await;
            let _ = tokio::time::timeout_at(end, self.tasks.wait()).await;
            if tokio::time::timeout_at(end, &mut control).await.is_err() {
                tracing::warn!("clients did not leave in time");
            }
        };
        tokio::select! {
            () = drain => Ok(()),
            () = signals.next() => std::process::exit(130),
        }
    }
}
