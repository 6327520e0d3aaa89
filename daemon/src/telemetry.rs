//! Logs: text on a terminal, JSON in a pod. Never a token or a signed URL.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// In which form log lines are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text if stderr is a terminal, else JSON.
    #[default]
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging of a daemon to stderr. `RUST_LOG`, if set, wins over `level`.
pub fn start(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    // They call every refused request an error; our own code tells those that are.
    let filter = [
        "hf_hub=off",
        "kube_client::client=off",
        "kube_runtime::watcher=off",
    ]
    .into_iter()
    .fold(filter, |filter, quiet| {
        filter.add_directive(quiet.parse().expect("a directive"))
    });
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would tell of a closed stderr on stderr, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let text = match format {
        LogFormat::Auto => std::io::stderr().is_terminal(),
        LogFormat::Text => true,
        LogFormat::Json => false,
    };
    if text {
        builder.init();
    } else {
        builder.json().flatten_event(true).init();
    }
}

/// Starts logging of a command: silent, since it prints its errors itself, unless asked for.
pub fn start_for_command_line(verbose: u8) {
    let level = match verbose {
        0 => "off",
        1 => "weightd=info,weightd_core=info,warn",
        _ => "weightd=debug,weightd_core=debug,info",
    };
    start(LogFormat::Text, level);
}
