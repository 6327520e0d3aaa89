//! Who does the work: the daemon on its socket, or the same service in this process.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Server};
use weightd::access::{Access, Policy};
use weightd::config::Config;
use weightd::rpc::{ControlService, Engine};
use weightd::sources::Origins;
use weightd::volumes::Volumes;
use weightd_core::fetch::{FetchLimits, Fetcher};
use weightd_core::store::{Store, StoreLimits};
use weightd_proto::weightd::v1::control_client::ControlClient;
use weightd_proto::weightd::v1::control_server::ControlServer;

use crate::args::Global;
use crate::output;

const DEFAULT_SOCKET: &str = "/run/weightd/weightd.sock";

/// How long an interrupted fetch may take to let go.
const STOP: Duration = Duration::from_secs(5);

/// A connection to whoever does the work.
pub(crate) struct Backend {
    pub(crate) client: ControlClient<Channel>,
    embedded: Option<Arc<Fetcher>>,
}

/// The daemon does not answer.
#[derive(Debug)]
pub(crate) struct Unreachable(pub(crate) PathBuf, pub(crate) String);

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "cannot reach the daemon at {}: {}",
            self.0.display(),
            self.1
        )?;
        f.write_str(
            "hint: start weightd, name its socket with --socket, or work without it: --root DIR",
        )
    }
}

impl std::error::Error for Unreachable {}

/// Where the work is done.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Root(PathBuf),
    Socket(PathBuf),
    /// The daemon if it answers, else this user's own store.
    Either,
}

fn place(global: &Global) -> anyhow::Result<Place> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    choose(global, variable("WEIGHTD_ROOT"), variable("WEIGHTD_SOCKET"))
}

fn choose(
    global: &Global,
    root: Option<PathBuf>,
    socket: Option<PathBuf>,
) -> anyhow::Result<Place> {
    match (&global.root, &global.socket, root, socket) {
        (Some(root), ..) => Ok(Place::Root(root.clone())),
        (_, Some(socket), ..) => Ok(Place::Socket(socket.clone())),
        (.., Some(_), Some(_)) => Err(crate::Usage::error(
            "WEIGHTD_ROOT and WEIGHTD_SOCKET are both set: choose with --root or --socket",
        )),
        (.., Some(root), None) => Ok(Place::Root(root)),
        (.., None, Some(socket)) => Ok(Place::Socket(socket)),
        (.., None, None) => Ok(Place::Either),
    }
}

impl Backend {
    pub(crate) async fn open(global: &Global) -> anyhow::Result<Self> {
        match place(global)? {
            Place::Root(root) => Self::embedded(&root).await,
            Place::Socket(socket) => Self::daemon(&socket).await,
            Place::Either => match Self::daemon(Path::new(DEFAULT_SOCKET)).await {
                Ok(daemon) => {
                    output::note(&format!("using the daemon at {DEFAULT_SOCKET}"));
                    Ok(daemon)
                }
                Err(_) => {
                    let root = user_store()?;
                    output::note(&format!(
                        "no daemon at {DEFAULT_SOCKET}, using the store at {}",
                        root.display()
                    ));
                    Self::embedded(&root).await
                }
            },
        }
    }

    async fn daemon(socket: &Path) -> anyhow::Result<Self> {
        let path = socket.to_owned();
        // The address is never looked up: the connector goes to the socket.
        let endpoint =
            Endpoint::from_static("http://weightd").connect_timeout(Duration::from_secs(5));
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|error| {
                let chain = weightd_core::errors::Chain(&error).to_string();
                Unreachable(
                    socket.to_owned(),
                    chain.trim_start_matches("transport error: ").to_owned(),
                )
            })?;
        Ok(Self {
            client: client(channel),
            embedded: None,
        })
    }

    /// Opens the store in this process and serves the daemon's API on it, to itself.
    async fn embedded(root: &Path) -> anyhow::Result<Self> {
        let path = root.to_owned();
        let store = weightd_core::blocking::run(move || Store::open(&path, StoreLimits::default()));
        let store = store.await.map_err(|error| {
            let hint = error
                .hint()
                .map(|hint| format!("\nhint: {hint}"))
                .unwrap_or_default();
            anyhow::anyhow!("{}{hint}", weightd_core::errors::Chain(&error))
        })?;
        let sources = Arc::new(Origins::from_env()?);
        let metrics = Arc::default();
        let fetcher = Fetcher::new(
            Arc::clone(&store),
            Arc::<Origins>::clone(&sources),
            FetchLimits::default(),
            Arc::clone(&metrics),
        );
        let config = Config::default();
        let access = Access::new(
            sources,
            Arc::clone(&store),
            Policy::default(),
            config.access_limits(),
        );
        let service = ControlService::new(Arc::new(Engine {
            store,
            volumes: Volumes::new(Arc::clone(&fetcher), access),
            fetcher: Arc::clone(&fetcher),
            metrics,
        }));
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let incoming = futures::stream::once(async { Ok::<_, std::io::Error>(theirs) });
        let server = Server::builder().add_service(ControlServer::new(service));
        tokio::spawn(server.serve_with_incoming(incoming.chain(futures::stream::pending())));
        let mut ours = Some(TokioIo::new(ours));
        let connector = tower::service_fn(move |_| {
            let ours = ours
                .take()
                .ok_or_else(|| std::io::Error::other("the embedded service is gone"));
            async { ours }
        });
        let channel = Endpoint::from_static("http://embedded")
            .connect_with_connector(connector)
            .await?;
        Ok(Self {
            client: client(channel),
            embedded: Some(fetcher),
        })
    }

    /// What to say when the user interrupts, after fetches in this process have let go.
    pub(crate) async fn interrupted(&self) -> &'static str {
        match &self.embedded {
            Some(fetcher) => {
                fetcher.shutdown(STOP).await;
                "interrupted\nhint: run it again: it goes on where it stopped"
            }
            None => {
                "interrupted; a prefetch goes on in the daemon\nhint: `weightctl status` shows how far it is"
            }
        }
    }
}

fn client(channel: Channel) -> ControlClient<Channel> {
    // A list with the files of many models is longer than the default limit.
    ControlClient::new(channel).max_decoding_message_size(usize::MAX)
}

fn user_store() -> anyhow::Result<PathBuf> {
    use etcetera::BaseStrategy;
    let base = etcetera::choose_base_strategy()
        .context("cannot find this user's cache directory: set --root")?;
    Ok(base.cache_dir().join("weightd"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Format;

    #[test]
    fn flags_come_before_the_environment() {
        let global = |root: Option<&str>, socket: Option<&str>| Global {
            root: root.map(PathBuf::from),
            socket: socket.map(PathBuf::from),
            output: Format::Text,
            verbose: 0,
        };
        let path = |text: &str| Some(PathBuf::from(text));
        let chosen = |global, root, socket| choose(&global, root, socket).unwrap();
        assert_eq!(
            chosen(global(Some("/r"), None), path("/x"), path("/y")),
            Place::Root("/r".into())
        );
        assert_eq!(
            chosen(global(None, Some("/s")), path("/x"), None),
            Place::Socket("/s".into())
        );
        assert_eq!(
            chosen(global(None, None), path("/x"), None),
            Place::Root("/x".into())
        );
        assert_eq!(
            chosen(global(None, None), None, path("/y")),
            Place::Socket("/y".into())
        );
        assert_eq!(chosen(global(None, None), None, None), Place::Either);
        assert!(choose(&global(None, None), path("/x"), path("/y")).is_err());
    }
}
