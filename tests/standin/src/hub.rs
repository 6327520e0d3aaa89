//! A stand-in Hugging Face Hub: the API and small files on one origin, LFS files on another.
//!
//! It follows the Hub as `huggingface_hub` 2.4 and `hf-hub` 1.0 see it, errors included. What it
//! cannot know, such as which status the Hub picks for each pair of token and private or gated
//! repo, is modelled.

mod access;
mod cdn;
mod file;
mod model;
mod quota;
mod repo;
mod resolve;
mod routes;
mod serve_file;
mod tree;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::fault::{Fault, Origin};
use crate::log::Request;
use crate::server::{self, Owner};
use crate::watch::Watch;

pub(crate) use file::walk;
pub use file::{File, Files};
pub use quota::Quota;
pub use repo::{Gated, Repo};

/// How a [`Hub`] behaves.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// Where the Hub listens; the CDN takes another port of the same address.
    pub listen: SocketAddr,
    /// Tokens that are good, beside those granted to a repo.
    pub tokens: Vec<String>,
    /// Entries of the tree per page; the real Hub's is 1000.
    pub page_size: usize,
    /// How long a signed CDN URL is good, in whole seconds.
    pub url_lifetime: Duration,
    /// Requests a client may make; without it there is no limit.
    pub quota: Option<Quota>,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tokens: Vec::new(),
            page_size: 1000,
            url_lifetime: Duration::from_secs(3600),
            quota: None,
        }
    }
}

impl HubConfig {
    /// Adds a good token.
    pub fn token(mut self, token: &str) -> Self {
        self.tokens.push(token.to_owned());
        self
    }

    /// Entries of the tree per page.
    pub fn page_size(mut self, entries: usize) -> Self {
        self.page_size = entries.max(1);
        self
    }

    /// How long a signed CDN URL is good, in whole seconds.
    pub fn url_lifetime(mut self, lifetime: Duration) -> Self {
        self.url_lifetime = lifetime;
        self
    }

    /// Requests a client may make.
    pub fn quota(mut self, quota: Quota) -> Self {
        self.quota = Some(quota);
        self
    }
}

/// What the listeners know.
#[derive(Debug)]
struct State {
    config: HubConfig,
    endpoint: String,
    cdn_endpoint: String,
    repos: RwLock<BTreeMap<String, Repo>>,
    signer: cdn::Signer,
    counters: quota::Counters,
    watch: Arc<Watch>,
}

impl State {
    fn repo(&self, id: &str) -> Option<Repo> {
        let repos = self.repos.read();
        let repos = repos.unwrap_or_else(std::sync::PoisonError::into_inner);
        repos.get(id).cloned()
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Repo>)) {
        let repos = self.repos.write();
        change(&mut repos.unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

/// A running stand-in Hub; stops when dropped.
#[derive(Debug)]
pub struct Hub {
    state: Arc<State>,
    _owner: Owner,
}

impl Hub {
    /// Starts on the current tokio runtime.
    ///
    /// # Errors
    ///
    /// If a port cannot be bound.
    pub async fn start(config: HubConfig) -> io::Result<Self> {
        let (state, tasks) = State::start(config)?;
        Ok(Self {
            state,
            _owner: Owner::Tasks(tasks),
        })
    }

    /// Starts on a runtime in a thread of its own, for callers without one.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started or a port cannot be bound.
    pub fn spawn_thread(config: HubConfig) -> io::Result<Self> {
        let (state, owner) = server::spawn_thread(|| State::start(config))?;
        Ok(Self {
            state,
            _owner: owner,
        })
    }

    /// The Hub's URL, for `HF_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        self.state.endpoint.clone()
    }

    /// The CDN's URL.
    pub fn cdn_endpoint(&self) -> String {
        self.state.cdn_endpoint.clone()
    }

    /// Adds a repo, in place of one of the same name.
    pub fn add_repo(&self, repo: Repo) {
        self.state.change(|repos| {
            repos.insert(repo.id().to_owned(), repo);
        });
    }

    /// A repo as it stands.
    pub fn repo(&self, id: &str) -> Option<Repo> {
        self.state.repo(id)
    }

    /// Changes a repo, for instance by a further [`Repo::commit`] to a branch.
    ///
    /// # Panics
    ///
    /// If there is no such repo.
    pub fn update_repo(&self, id: &str, change: impl FnOnce(Repo) -> Repo) {
        let repo = self.state.repo(id).expect("the repo was added before");
        self.add_repo(change(repo));
    }

    /// Takes a repo away.
    pub fn remove_repo(&self, id: &str) {
        self.state.change(|repos| drop(repos.remove(id)));
    }

    /// The commit that a branch, tag or ref of a repo stands at.
    pub fn sha(&self, id: &str, revision: &str) -> Option<String> {
        self.state.repo(id)?.resolve(revision).map(str::to_owned)
    }

    /// Arms a fault.
    pub fn fault(&self, fault: Fault) {
        self.state.watch.faults.add(fault);
    }

    /// Disarms all faults.
    pub fn clear_faults(&self) {
        self.state.watch.faults.clear();
    }

    /// How many times a fault has happened.
    pub fn faults_fired(&self) -> usize {
        self.state.watch.faults.fired()
    }

    /// Makes every CDN URL signed so far worthless.
    pub fn expire_urls(&self) {
        self.state.signer.expire_all();
    }

    /// All requests at both origins so far, in order.
    pub fn requests(&self) -> Vec<Request> {
        self.state.watch.log.requests()
    }

    /// Forgets all requests, and with them the counts taken from them.
    pub fn clear_requests(&self) {
        self.state.watch.log.clear();
    }

    /// Bytes of body sent with 200 or 206 by both origins for paths that contain `path`.
    pub fn bytes_sent(&self, path: &str) -> u64 {
        self.state.watch.log.bytes_sent(None, path)
    }

    /// Bytes of body sent with 200 or 206 by the CDN.
    pub fn cdn_bytes_sent(&self) -> u64 {
        self.state.watch.log.bytes_sent(Some(Origin::Cdn), "")
    }

    /// The requests that brought an `Authorization` header to the CDN.
    pub fn token_leaks(&self) -> Vec<Request> {
        let mut requests = self.requests();
        requests.retain(|request| request.origin == Origin::Cdn && request.authorization.is_some());
        requests
    }

    /// The most CDN requests that were answered at the same time.
    pub fn max_concurrent_cdn_requests(&self) -> usize {
        self.state.watch.log.most_in_flight(Origin::Cdn)
    }
}

impl State {
    /// Binds both origins and spawns their tasks.
    fn start(config: HubConfig) -> io::Result<(Arc<Self>, Vec<AbortHandle>)> {
        let (hub, hub_address) = server::bind(config.listen)?;
        let (cdn, cdn_address) = server::bind(SocketAddr::new(config.listen.ip(), 0))?;
        let state = Arc::new(Self {
            endpoint: format!("http://{hub_address}"),
            cdn_endpoint: format!("http://{cdn_address}"),
            repos: RwLock::default(),
            signer: cdn::Signer::new(),
            counters: quota::Counters::default(),
            watch: Watch::new(),
            config,
        });
        let tasks = vec![state.clone().serve_hub(hub)?, state.clone().serve_cdn(cdn)?];
        Ok((state, tasks))
    }

    fn serve_hub(self: Arc<Self>, listener: TcpListener) -> io::Result<AbortHandle> {
        server::serve(listener, move |request| {
            let state = self.clone();
            let watch = state.watch.clone();
            watch.answer(Origin::Hub, request, |request| async move {
                routes::answer(&state, request).await
            })
        })
    }

    fn serve_cdn(self: Arc<Self>, listener: TcpListener) -> io::Result<AbortHandle> {
        server::serve(listener, move |request| {
            let state = self.clone();
            let watch = state.watch.clone();
            watch.answer(Origin::Cdn, request, |request| async move {
                cdn::answer(&state, &request.into_parts().0)
            })
        })
    }
}
