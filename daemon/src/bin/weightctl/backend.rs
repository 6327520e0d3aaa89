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
use weightd_core::errors::Chain;
use weightd_core::fetch::{FetchLimits, Fetcher};
use weightd_core::shared::SharedTier;
use weightd_core::store::{Store, StoreLimits};
use weightd_core::warm::Warmer;
use weightd_proto::weightd::v1::VersionRequest;
use weightd_proto::weightd::v1::control_client::ControlClient;
use weightd_proto::weightd::v1::control_server::ControlServer;

use crate::args::Global;
use crate::output;

pub(crate) const DEFAULT_SOCKET: &str = "/run/weightd/weightd.sock";

/// How long an interrupted fetch may take to let go.
const STOP: Duration = Duration::from_secs(5);

/// How long what was fetched may take to be written to the shared tier, too.
const WRITE_BEHIND: Duration = Duration::from_secs(600);

/// How long a daemon may take to say that it is there.
const ANSWER: Duration = Duration::from_secs(5);

/// What is said of a daemon that takes longer.
pub(crate) const NO_ANSWER: &str = "it does not answer";

/// A connection to whoever does the work.
pub(crate) struct Backend {
    pub(crate) client: ControlClient<Channel>,
    worker: Worker,
}

enum Worker {
    /// The daemon at this socket.
    Daemon(PathBuf),
    /// This process.
    Embedded(Arc<Fetcher>),
}

/// The connection to whoever does the work broke.
#[derive(Debug, thiserror::Error)]
#[error("the connection broke ({0})")]
pub(crate) struct Broken(pub(crate) String);

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
pub(crate) enum Place {
    Root(PathBuf),
    Socket(PathBuf),
    /// The daemon if it answers, else this user's own store.
    Either,
}

/// What the user or the environment chose.
pub(crate) fn place(global: &Global) -> anyhow::Result<Place> {
    choose(global, variable("WEIGHTD_ROOT"), variable("WEIGHTD_SOCKET"))
}

/// A path that the environment names.
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    value.map(PathBuf::from)
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
            Place::Root(root) => Self::embedded(&root, global).await,
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
                    Self::embedded(&root, global).await
                }
            },
        }
    }

    pub(crate) async fn daemon(socket: &Path) -> anyhow::Result<Self> {
        let path = socket.to_owned();
        // The address is never looked up: the connector goes to the socket.
        let endpoint =
            Endpoint::from_static("http://weightd").connect_timeout(Duration::from_secs(5));
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let unreachable = |detail: &str| {
            let detail = detail.trim_start_matches("transport error: ");
            Unreachable(socket.to_owned(), detail.to_owned())
        };
        let channel = endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|error| unreachable(&Chain(&error).to_string()))?;
        let mut client = client(channel);
        // Only an answer shows that somebody is there, and lets us in: the kernel connects by itself.
        let answer = tokio::time::timeout(ANSWER, client.version(VersionRequest {})).await;
        match answer {
            Err(_) => return Err(unreachable(NO_ANSWER).into()),
            Ok(Err(status)) if std::error::Error::source(&status).is_some() => {
                return Err(unreachable(&Chain(&status).to_string()).into());
            }
            Ok(_) => {}
        }
        Ok(Self {
            client,
            worker: Worker::Daemon(socket.to_owned()),
        })
    }

    /// Opens the store in this process and serves the daemon's API on it, to itself.
    async fn embedded(root: &Path, global: &Global) -> anyhow::Result<Self> {
        let config = config(root, global)?;
        let path = root.to_owned();
        let store = weightd_core::blocking::run(move || Store::open(&path, StoreLimits::default()));
        let store = store.await.map_err(|error| {
            let hint = error
                .hint()
                .map(|hint| format!("\nhint: {hint}"))
                .unwrap_or_default();
            anyhow::anyhow!("{}{hint}", Chain(&error))
        })?;
        let tier = config.shared_config();
        let sources = Arc::new(Origins::from_env(tier.is_some())?);
        let metrics = Arc::default();
        let tier = tier.map(|config| SharedTier::new(config, Arc::clone(&metrics)));
        let fetcher = Fetcher::with_tier(
            Arc::clone(&store),
            Arc::<Origins>::clone(&sources),
            FetchLimits::default(),
            Arc::clone(&metrics),
            tier,
        );
        let access = Access::new(
            sources,
            Arc::clone(&store),
            Policy::default(),
            config.access_limits(),
        );
        let limits = config.warm_limits();
        let warmer = Warmer::new(Arc::clone(&store), limits, Arc::clone(&metrics));
        let service = ControlService::new(Arc::new(Engine {
            store,
            volumes: Volumes::new(Arc::clone(&fetcher), Arc::clone(&warmer), access),
            fetcher: Arc::clone(&fetcher),
            warmer,
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
            worker: Worker::Embedded(fetcher),
        })
    }

    /// Ends what goes on in this process behind the command: what it owes the other nodes is
    /// written first. `fetched`: the command would have used the shared tier.
    pub(crate) async fn finish(&self, fetched: bool) {
        let Worker::Embedded(fetcher) = &self.worker else {
            return;
        };
        let Some(tier) = fetcher.tier() else { return };
        let state = tier.state();
        if fetched && !state.writable {
            let root = tier.config().root.display();
            let how = if state.readable {
                "only read"
            } else {
                "left out"
            };
            output::note(&format!(
                "the shared tier at {root} is {how}: {}",
                state.detail
            ));
        }
        if tier.writes_under_way() > 0 {
            output::note("writing to the shared tier what other nodes lack");
        }
        tier.settle(WRITE_BEHIND).await;
    }

    /// What a failed command means here: without a daemon, none is out of reach.
    pub(crate) fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        match (error.downcast::<Broken>(), &self.worker) {
            (Ok(broken), Worker::Daemon(socket)) => {
                Unreachable(socket.clone(), broken.to_string()).into()
            }
            (Ok(Broken(detail)), Worker::Embedded(_)) => {
                anyhow::anyhow!("weightctl's own service broke off: {detail}")
            }
            (Err(error), _) => error,
        }
    }

    /// What to say when the user interrupts, after fetches in this process have let go.
    pub(crate) async fn interrupted(&self) -> &'static str {
        match &self.worker {
            Worker::Embedded(fetcher) => {
                fetcher.shutdown(STOP).await;
                "interrupted\nhint: run it again: it goes on where it stopped"
            }
            Worker::Daemon(_) => {
                "interrupted; a prefetch goes on in the daemon\nhint: `weightctl status` shows how far it is"
            }
        }
    }
}

/// The daemon's configuration as far as the command line has it.
fn config(root: &Path, global: &Global) -> anyhow::Result<Config> {
    settings(Config::default(), root, global)
}

/// A configuration with what the command line says: it wins.
pub(crate) fn settings(base: Config, root: &Path, global: &Global) -> anyhow::Result<Config> {
    let mut config = Config {
        root: std::path::absolute(root).unwrap_or_else(|_| root.to_owned()),
        ..base
    };
    if let Some(shared) = &global.shared_root {
        let shared = std::path::absolute(shared).context("cannot resolve --shared-root")?;
        config.shared.root = Some(shared);
    }
    if let Some(segment) = global.tier.segment {
        config.shared.segment = Some(segment);
    }
    if let Some(egress) = global.tier.egress {
        config.shared.egress = egress;
    }
    if let Some(timeout) = global.tier.claim_timeout {
        config.shared.claim_timeout = timeout;
    }
    match config.check_shared() {
        Ok(()) => Ok(config),
        Err(error) => Err(crate::Usage::error(&error.to_string())),
    }
}

fn client(channel: Channel) -> ControlClient<Channel> {
    // A list with the files of many models is longer than the default limit.
    ControlClient::new(channel).max_decoding_message_size(usize::MAX)
}

/// This user's own store.
pub(crate) fn user_store() -> anyhow::Result<PathBuf> {
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
            shared_root: None,
            tier: crate::args::TierArgs::default(),
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
