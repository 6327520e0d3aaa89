//! `weightd`: the node daemon.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use weightd::config::Config;
use weightd::controller::{self, Replica};
use weightd::{process, serve, telemetry};
use weightd_core::errors::Chain;

/// The node daemon: brings model weights onto this node, verified, and keeps them.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  weightd --config /etc/weightd/weightd.toml
  weightd --root /mnt/k8s-disks/0/weightd --metrics 127.0.0.1:9808
  weightd --config weightd.toml --check-config

Flags win over the file. Exit codes: 0 stopped, 1 failed, 2 wrong usage or configuration."
)]
struct Args {
    /// Read settings from FILE
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of the store
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Unix socket of the control API
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Directory of the shared tier, on a file system that all nodes mount
    #[arg(long, value_name = "DIR")]
    shared_root: Option<PathBuf>,
    /// Serve /metrics, /healthz and /readyz at ADDR
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// Name of this machine's Node object; turns on the work for Kubernetes
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// Check the settings and exit
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Run what a cluster needs once: the admission webhook, and what one leader does for all nodes
    #[command(after_help = "\
Examples:
  weightd controller --config /etc/weightd/weightd.toml
  weightd controller --config weightd.toml --namespace weightd --pod-name a-developers-machine
  weightd controller --config weightd.toml --check-config

It reads the daemons' configuration, its own section is [controller]. Run two or more: all answer the webhook, one
leads. Exit codes: 0 stopped, 1 failed, 2 wrong usage or configuration.")]
    Controller(ControllerArgs),
}

#[derive(Debug, clap::Args)]
struct ControllerArgs {
    /// Read settings from FILE
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Namespace of the Lease and of the certificate's Secret
    #[arg(
        long,
        value_name = "NAME",
        env = "POD_NAMESPACE",
        default_value = "weightd"
    )]
    namespace: String,
    /// Name of this replica
    #[arg(
        long,
        value_name = "NAME",
        env = "POD_NAME",
        default_value = "weightd-controller"
    )]
    pod_name: String,
    /// Check the settings and exit
    #[arg(long)]
    check_config: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match &args.role {
        None => program(settings(&args), args.check_config, |config| async {
            let outcome = serve::run(config).await;
            outcome.map_err(|error| Failure::new(&error, error.hint()))
        }),
        Some(Role::Controller(args)) => {
            let replica = Replica {
                namespace: args.namespace.clone(),
                pod: args.pod_name.clone(),
            };
            let config = Config::read(&args.config);
            let config = config.and_then(|config| config.check().map(|()| config));
            let config = config.map_err(|error| Chain(&error).to_string());
            program(config, args.check_config, |config| async {
                let outcome = controller::run(config, replica).await;
                outcome.map_err(|error| Failure::new(&error, error.hint()))
            })
        }
    }
}

/// What is said at the end.
struct Failure {
    text: String,
    hint: Option<String>,
}

impl Failure {
    fn new(error: &(dyn std::error::Error + 'static), hint: Option<String>) -> Self {
        let text = Chain(error).to_string();
        Self { text, hint }
    }
}

fn program<F: Future<Output = Result<(), Failure>>>(
    config: Result<Config, String>,
    only_check: bool,
    run: impl FnOnce(Config) -> F,
) -> ExitCode {
    let config = match config {
        Ok(config) => config,
        Err(text) => {
            say(&format!("error: {text}"));
            return ExitCode::from(2);
        }
    };
    if only_check {
        return ExitCode::SUCCESS;
    }
    telemetry::start(config.log.format, &config.log.level);
    process::raise_file_limit();
    process::keep_freed_memory();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("error: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(config));
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { text, hint }) => {
            let hint = hint
                .map(|hint| format!("\nhint: {hint}"))
                .unwrap_or_default();
            say(&format!("error: {text}{hint}"));
            ExitCode::FAILURE
        }
    }
}

fn settings(args: &Args) -> Result<Config, String> {
    let read = args
        .config
        .as_deref()
        .map_or_else(|| Ok(Config::default()), Config::read);
    let mut config = read.map_err(|error| Chain(&error).to_string())?;
    let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    if let Some(root) = &args.root {
        config.root = absolute(root);
    }
    if let Some(socket) = &args.socket {
        config.socket = absolute(socket);
    }
    if let Some(root) = &args.shared_root {
        config.shared.root = Some(absolute(root));
    }
    if let Some(address) = args.metrics {
        config.metrics.listen = Some(address);
    }
    if let Some(name) = &args.node_name {
        config.kubernetes.node = Some(name.clone());
    }
    config.check().map_err(|error| Chain(&error).to_string())?;
    Ok(config)
}

/// Before the log is up, and for the last word. Who closed stderr does not want to know.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
