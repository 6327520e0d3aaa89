//! How the daemon and the plugin reach the API server, and how they say why they could not.

mod error;

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::HeaderValue;
use http::header::USER_AGENT;
use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};

pub use error::{Cause, ConnectError};

/// How long each part of a call may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For a connection with its TLS handshake.
    pub connect: Duration,
    /// For a call with all its pages.
    pub call: Duration,
    /// For a connection without a byte. More than a watch lasts: at its end the server sends one.
    pub idle: Duration,
}

/// Prepares for the API server that `kubeconfig` names, else for the cluster's own if this is a pod in one.
/// `None` if it is not. The server is not contacted yet.
///
/// # Errors
///
/// [`ConnectError`] if the kubeconfig or the service account cannot be used.
pub async fn connect(
    kubeconfig: Option<&Path>,
    timeouts: Timeouts,
) -> Result<Option<Client>, ConnectError> {
    let in_cluster = env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    if kubeconfig.is_none() && !in_cluster {
        return Ok(None);
    }
    match client(kubeconfig, timeouts).await {
        Ok(client) => Ok(Some(client)),
        Err(source) => Err(match kubeconfig {
            Some(path) => ConnectError::Kubeconfig {
                path: path.to_owned(),
                source,
            },
            None => ConnectError::ServiceAccount { source },
        }),
    }
}

/// Prepares for the API server that kubectl would ask on this machine: the one that `kubeconfig` names, else that of the
/// files in `KUBECONFIG`, of `~/.kube/config`, or the cluster's own if this is a pod in one. `None` if there is none of
/// these. The server is not contacted yet.
///
/// # Errors
///
/// [`ConnectError`] as [`connect`].
pub async fn connect_as_kubectl(
    kubeconfig: Option<&Path>,
    timeouts: Timeouts,
) -> Result<Option<Client>, ConnectError> {
    if kubeconfig.is_some() {
        return connect(kubeconfig, timeouts).await;
    }
    let named = env::var_os("KUBECONFIG").filter(|names| !names.is_empty());
    let own = env::home_dir().map(|home| home.join(".kube/config"));
    let Some(path) = named
        .map(PathBuf::from)
        .or(own.filter(|path| path.exists()))
    else {
        return connect(None, timeouts).await;
    };
    let client = async {
        // Several files are merged, as kubectl does.
        let config = of_kubeconfig(Kubeconfig::read()?).await?;
        finish(config, timeouts)
    };
    match client.await {
        Ok(client) => Ok(Some(client)),
        Err(source) => Err(ConnectError::Kubeconfig { path, source }),
    }
}

async fn client(kubeconfig: Option<&Path>, timeouts: Timeouts) -> Result<Client, Cause> {
    let config = match kubeconfig {
        Some(path) => of_kubeconfig(Kubeconfig::read_from(path)?).await?,
        None => Config::incluster()?,
    };
    finish(config, timeouts)
}

async fn of_kubeconfig(file: Kubeconfig) -> Result<Config, Cause> {
    Ok(Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?)
}

fn finish(mut config: Config, timeouts: Timeouts) -> Result<Client, Cause> {
    config.connect_timeout = Some(timeouts.connect);
    config.write_timeout = Some(timeouts.call);
    config.read_timeout = Some(timeouts.idle);
    config.headers.push((USER_AGENT, user_agent()));
    // Else the time that a connection was not needed would count as silence of the server.
    config.reset_reader_on_write = true;
    // A server may ask for retries later than a call may last, and the caller has its own way to try again.
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

/// This program and its version: by it an audit log tells the daemon from the plugin, which share an account.
fn user_agent() -> HeaderValue {
    let program = env::current_exe().ok();
    let program = program.as_deref().and_then(Path::file_name);
    let program = program.map_or("weightd".into(), |name| name.to_string_lossy());
    let text = format!("{program}/{}", env!("CARGO_PKG_VERSION"));
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("weightd"))
}
