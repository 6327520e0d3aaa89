//! `weightd-csi`: serves kubelet on a socket.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{ArgAction, Parser};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use weightd_csi::daemon::Daemon;
use weightd_csi::endpoint::Endpoint;
use weightd_csi::events::{self, Events};
use weightd_csi::mount::Workshop;
use weightd_csi::node::Node;
use weightd_csi::pod::Pods;
use weightd_csi::reconcile;
use weightd_csi::volume::KubeletDir;

/// What is logged if `RUST_LOG` says nothing. Each failed request to the API server is told of where it is made.
const DEFAULT_FILTER: &str = "info,kube_client::client::builder=off";

/// The CSI plugin of weightd: mounts verified model weights, read-only, into pods.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "`weightd-csi expose --help`: shows a directory, such as that of a volume claim, to the node."
)]
struct Arguments {
    /// The socket on which kubelet calls: unix:///path/to/csi.sock
    #[arg(long, env = "CSI_ENDPOINT", value_name = "URL")]
    endpoint: Endpoint,

    /// The name of this node, as the Node object has it
    #[arg(long, value_name = "NAME")]
    node_id: String,

    /// The daemon's socket
    #[arg(
        long,
        env = "WEIGHTD_SOCKET",
        value_name = "PATH",
        default_value = "/run/weightd/weightd.sock"
    )]
    daemon_socket: PathBuf,

    /// Kubelet's directory: volumes are mounted below its `pods`, and nowhere else
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,

    /// How long a call may wait for a fetch, in seconds; kubelet gives up after 120
    #[arg(long, value_name = "SECONDS", default_value = "110", value_parser = clap::value_parser!(u64).range(1..=115))]
    publish_wait: u64,

    /// How long a mount without a pod, or a pin without a mount, is left alone, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = reconcile::GRACE.as_secs())]
    grace: u64,

    /// Tell pods by Events how far their volumes are
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    events: bool,

    /// How long a volume may take before its pod is told, in seconds; later words come after growing pauses
    #[arg(long, value_name = "SECONDS", default_value_t = events::AFTER.as_secs(), value_parser = clap::value_parser!(u64).range(1..=3600))]
    events_after: u64,

    /// How to reach the API server, which is asked for pod annotations; the pod's service account if left out
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

/// Shows a directory at another place of the node until SIGTERM: the volume claim of the shared tier, which the
/// daemon is not to depend on.
#[derive(Debug, Parser)]
#[command(name = "weightd-csi expose", version)]
struct Expose {
    /// The directory to show
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    from: PathBuf,

    /// Where to show it, below a directory that propagates to the node; made if it is not there
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    to: PathBuf,
}

fn absolute(given: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(given);
    path.is_absolute()
        .then_some(path)
        .ok_or("write an absolute path")
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut words = std::env::args_os();
    let program = words.next();
    let rest: Vec<_> = words.collect();
    if rest.first().is_some_and(|word| word == "expose") {
        let arguments = Expose::parse_from(program.into_iter().chain(rest.into_iter().skip(1)));
        log();
        let code = told(expose(arguments).await, "not exposed any more");
        // A call that hangs in a file system that is away would keep the runtime from ending.
        std::process::exit(code.into());
    }
    let arguments = Arguments::parse();
    log();
    told(run(arguments).await, "plugin failed").into()
}

/// Tells of the error, and gives the exit code.
fn told(outcome: anyhow::Result<()>, what: &'static str) -> u8 {
    let Err(error) = outcome else { return 0 };
    tracing::error!(error = format!("{error:#}"), "{what}");
    1
}

async fn expose(arguments: Expose) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let Expose { from, to } = arguments;
    let what = format!("cannot show {} at {}", from.display(), to.display());
    weightd_csi::expose::run(from, to, stop).await.context(what)
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    // Before the socket is there: a signal that comes as soon as it is must already be caught.
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let listening = arguments
        .endpoint
        .listen()
        .await
        .with_context(|| format!("cannot serve {}", arguments.endpoint))?;
    let kubelet = KubeletDir::new(&arguments.kubelet_dir).with_context(|| {
        let dir = arguments.kubelet_dir.display();
        format!("cannot use kubelet's directory `{dir}` (is it mounted here? see --kubelet-dir)")
    })?;
    let pods = Pods::connect(arguments.kubeconfig.as_deref())
        .await
        .context("cannot set up the API server's client")?;
    let mut workshop = arguments.endpoint.path().as_os_str().to_owned();
    workshop.push(".mounts");
    let mut node = Node::new(
        Daemon::at(&arguments.daemon_socket),
        kubelet,
        Workshop::at(workshop.into()),
        pods,
        arguments.node_id.clone(),
    );
    node.publish_wait = Duration::from_secs(arguments.publish_wait);
    let after = Duration::from_secs(arguments.events_after);
    let tells = arguments.events && node.pods.is_some();
    node.events = tells.then(|| Events::new(after));
    let node = Arc::new(node);
    tracing::info!(
        endpoint = %arguments.endpoint,
        node_id = arguments.node_id,
        daemon_socket = %arguments.daemon_socket.display(),
        kubelet_dir = %arguments.kubelet_dir.display(),
        reads_pods = node.pods.is_some(),
        tells_pods = node.events.is_some(),
        kubeconfig = arguments.kubeconfig.map(|path| path.display().to_string()),
        version = env!("CARGO_PKG_VERSION"),
        "listening"
    );
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    // After the socket: kubelet may ask while what crashes left is set right.
    let grace = Duration::from_secs(arguments.grace);
    let reconciler = tokio::spawn(reconcile::run(Arc::clone(&node), grace));
    let teller = tokio::spawn(events::run(Arc::clone(&node)));
    let served = weightd_csi::serve(listening, node, stop).await;
    reconciler.abort();
    teller.abort();
    served.with_context(|| format!("cannot go on serving {}", arguments.endpoint))
}

/// Logs to stderr: for people on a terminal, else one JSON object a line. `RUST_LOG` chooses what.
fn log() {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would tell of a closed stderr on stderr, and panic.
        .log_internal_errors(false)
        .with_writer(io::stderr);
    if io::stderr().is_terminal() {
        subscriber.init();
    } else {
        subscriber.json().flatten_event(true).init();
    }
}
