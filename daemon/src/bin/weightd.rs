//! `weightd`: the node daemon.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use weightd::config::Config;
use weightd::{process, serve, telemetry};
use weightd_core::errors::Chain;

/// The node daemon: brings model weights onto this node, verified, and keeps them.
#[derive(Debug, Parser)]
#[command(
    version,
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
}

fn main() -> ExitCode {
    let args = Args::parse();
    let config = match settings(&args) {
        Ok(config) => config,
        Err(text) => {
            say(&format!("error: {text}"));
            return ExitCode::from(2);
        }
    };
    if args.check_config {
        return ExitCode::SUCCESS;
    }
    telemetry::start(config.log.format, &config.log.level);
    process::raise_file_limit();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("error: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(serve::run(config));
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let hint = error
                .hint()
                .map(|hint| format!("\nhint: {hint}"))
                .unwrap_or_default();
            say(&format!("error: {}{hint}", Chain(&error)));
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
