//! Events on the pods whose volumes wait: how far they are, in plain words and with few writes.
//!
//! ```text
//! node ── Telling: what happens to one volume
//!  └ story    what of it is worth an Event, and when
//!     └ words    the note
//!        └ post     the write, within the node's budget
//! ```
//!
//! Calls of kubelet only note what happened; one task writes. So no call waits for an API server, and what
//! is posted late is the newest state, not a queue of old ones.

mod post;
mod story;
#[cfg(test)]
mod tests;
mod words;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::Client;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::{Code, Status};
use weightd_proto::weightd::v1::{Acquired, Progress, Volume};

use crate::daemon::Daemon;
use crate::node::Node;
use crate::node::words::chain;
use crate::pod::{PodName, Pods};
use crate::volume::{self, Target};
use post::{Budget, Poster, Refusal};
use story::{Story, Turn};

/// A volume that is mounted sooner than this has no events.
pub const AFTER: Duration = Duration::from_secs(5);

/// How many volumes are told of at once. A node has some hundred pods.
const MOST: usize = 512;

/// How long a volume that nobody asks for any more is remembered: kubelet asks again within some 4 min.
const FORGOTTEN: Duration = Duration::from_secs(900);

/// How long nothing is written after the API server said that we may not.
const DENIED: Duration = Duration::from_secs(600);

/// The pauses after the API server was away.
const AWAY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// What pods are told.
#[derive(Clone)]
pub struct Events(Arc<Shared>);

struct Shared {
    stories: Mutex<HashMap<String, Story>>,
    changed: Notify,
    after: Duration,
    /// There are too many, and that was logged.
    crowded: AtomicBool,
}

/// Tells of one volume while a call works on it. Without API server it tells nobody.
pub(crate) struct Telling(Option<(Events, String)>);

/// Tells the pods of `node` until it is dropped, if there is a way to.
pub async fn run(node: Arc<Node>) {
    if let (Some(events), Some(pods)) = (&node.events, &node.pods) {
        let filled = async {
            events.resume(&node, pods).await;
            events.watch(&node.daemon).await;
        };
        tokio::join!(events.write(pods.client(), &node.node_id), filled);
    }
}

/// Holder, volume and pod of all that is mounted and not complete.
async fn unfinished(node: &Node, pods: &Pods) -> Result<Vec<(String, String, PodName)>, String> {
    let volumes = node.daemon.volumes().await;
    let volumes = volumes.map_err(|status| status.message().to_owned())?;
    let volumes: Vec<_> = volumes
        .into_iter()
        .filter(|volume| !volume.complete)
        .collect();
    if volumes.is_empty() {
        return Ok(Vec::new());
    }
    let pods = pods.on(&node.node_id).await;
    let pods = pods.map_err(|error| chain(&error))?;
    let found = volumes.into_iter().filter_map(|found| {
        let (uid, volume) = volume::of_holder(&found.holder)?;
        let pod = pods.get(uid)?.clone();
        Some((found.holder.clone(), volume.to_owned(), pod))
    });
    Ok(found.collect())
}

impl Events {
    /// Events for volumes that take longer than `after`. Nothing is written before [`run`].
    #[must_use]
    pub fn new(after: Duration) -> Self {
        Self(Arc::new(Shared {
            stories: Mutex::default(),
            changed: Notify::new(),
            after,
            crowded: AtomicBool::new(false),
        }))
    }

    /// A call works on a volume: the first one, or one that goes on with its story.
    pub(crate) fn tell(&self, target: &Target, pod: &PodName) -> Telling {
        let now = Instant::now();
        let mut stories = self.stories();
        if !stories.contains_key(&target.holder) {
            stories.retain(|_, story| !story.is_forgotten(now, FORGOTTEN));
            if stories.len() >= MOST {
                if !self.0.crowded.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        volumes = MOST,
                        "too many volumes wait, the pods of some are told nothing"
                    );
                }
                return Telling::nobody();
            }
            self.0.crowded.store(false, Ordering::Relaxed);
        }
        let story = stories
            .entry(target.holder.clone())
            .or_insert_with(|| Story::begin(pod.clone(), target.volume.clone(), now, self.0.after));
        story.called();
        drop(stories);
        self.0.changed.notify_one();
        Telling(Some((self.clone(), target.holder.clone())))
    }

    /// The volume is no more.
    pub(crate) fn end(&self, holder: &str) {
        let mut stories = self.stories();
        if stories.get(holder).is_some_and(|story| !story.has_ended()) {
            stories.remove(holder);
        }
    }

    fn stories(&self) -> MutexGuard<'_, HashMap<String, Story>> {
        let stories = self.0.stories.lock();
        stories.unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, holder: &str, change: impl FnOnce(&mut Story, Instant)) {
        if let Some(story) = self.stories().get_mut(holder) {
            change(story, Instant::now());
            self.0.changed.notify_one();
        }
    }

    /// Goes on with the volumes that were mounted before this process began, and are not complete: kubelet does
    /// not ask for them again.
    async fn resume(&self, node: &Node, pods: &Pods) {
        let mut pause = AWAY.0;
        loop {
            match unfinished(node, pods).await {
                Ok(found) => {
                    let now = Instant::now();
                    let mut stories = self.stories();
                    for (holder, volume, pod) in found.into_iter().take(MOST) {
                        stories
                            .entry(holder)
                            .or_insert_with(|| Story::resume(pod, volume, now, self.0.after));
                    }
                    return;
                }
                Err(error) => tracing::debug!(error, "volumes that are filled not known yet"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(AWAY.1);
        }
    }

    /// Writes until it is dropped, as node `node_id`.
    async fn write(&self, client: Client, node_id: &str) {
        let poster = Poster::new(client, node_id);
        let mut budget = Budget::full(Instant::now());
        let mut quiet = Quiet::default();
        loop {
            let changed = self.0.changed.notified();
            let now = Instant::now();
            let free = budget.next(now).max(quiet.all.unwrap_or(now));
            let turn = story::next(&mut self.stories(), now, |namespace| {
                quiet.namespaces.get(namespace).copied()
            });
            let (holder, post) = match turn {
                Turn::Now(holder, post) if free <= now => (holder, post),
                Turn::Now(..) => {
                    // What is most urgent then may be something else.
                    sleep_until(free).await;
                    continue;
                }
                Turn::At(at) => {
                    tokio::select! {
                        () = changed => {}
                        () = sleep_until(at) => {}
                    }
                    continue;
                }
                Turn::Never => {
                    changed.await;
                    continue;
                }
            };
            budget.take();
            self.change(&holder, |story, _| story.posting(true));
            let outcome = poster.post(&post).await;
            let now = Instant::now();
            quiet.note(&post.pod.namespace, &outcome, now);
            let mut stories = self.stories();
            if let Some(story) = stories.get_mut(&holder) {
                story.posting(false);
                match outcome {
                    Ok(count) => story.posted(&post, count, now),
                    Err(Refusal::Never(_)) => story.give_up(),
                    Err(Refusal::Denied { .. } | Refusal::Away(_)) => {}
                }
                if story.is_over() {
                    stories.remove(&holder);
                }
            }
        }
    }

    /// Asks the daemon how far the volumes are that were mounted before their files were here.
    async fn watch(&self, daemon: &Daemon) {
        loop {
            sleep(self.0.after / 2).await;
            let filling: HashSet<String> = {
                let stories = self.stories();
                let filling = stories.iter().filter(|(_, story)| story.is_filling());
                filling.map(|(holder, _)| holder.clone()).collect()
            };
            if filling.is_empty() {
                continue;
            }
            // An answer that fails is no news: kubelet or the reconciler tell of a daemon that is away.
            let Ok(volumes) = daemon.volumes().await else {
                continue;
            };
            let volumes: HashMap<&str, &Volume> = volumes
                .iter()
                .map(|volume| (volume.holder.as_str(), volume))
                .collect();
            let now = Instant::now();
            self.stories().retain(|holder, story| {
                // One that was mounted meanwhile may not be in the answer yet.
                let seen = !filling.contains(holder) || volumes.contains_key(holder.as_str());
                if let Some(volume) = volumes.get(holder.as_str()) {
                    story.filled(volume, now);
                }
                seen && !story.is_over()
            });
            self.0.changed.notify_one();
        }
    }
}

impl Telling {
    /// Tells nobody.
    pub(crate) fn nobody() -> Self {
        Self(None)
    }

    fn change(&self, change: impl FnOnce(&mut Story, Instant)) {
        if let Some((events, holder)) = &self.0 {
            events.change(holder, change);
        }
    }

    /// Which model it is.
    pub(crate) fn model(&self, model: &str) {
        self.change(|story, _| story.model(model));
    }

    pub(crate) fn progress(&self, progress: &Progress) {
        self.change(|story, now| story.progress(progress.clone(), now));
    }

    /// The daemon's answer is an error. One that may pass is why the volume waits.
    pub(crate) fn refused(&self, status: &Status) {
        if !is_final(status.code()) {
            self.change(|story, now| story.waits(status, now));
        }
    }

    /// The call ends with an error. Of one that may pass the daemon knows more.
    pub(crate) fn failed(&self, status: &Status) {
        if is_final(status.code()) {
            self.change(|story, now| story.failed(status.message(), now));
        }
    }

    pub(crate) fn mounted(&self, acquired: &Acquired) {
        self.change(|story, now| story.mounted(acquired, now));
        self.drop_if_over();
    }

    /// The pod is going away: nobody reads on.
    pub(crate) fn gone(&self) {
        if let Some((events, holder)) = &self.0 {
            events.end(holder);
        }
    }

    fn drop_if_over(&self) {
        if let Some((events, holder)) = &self.0 {
            let mut stories = events.stories();
            if stories.get(holder).is_some_and(Story::is_over) {
                stories.remove(holder);
            }
        }
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        self.change(Story::left);
    }
}

/// Whether kubelet takes the answer for final.
///
/// Source: `isFinalError` in kubernetes/pkg/volume/csi/csi_client.go.
fn is_final(code: Code) -> bool {
    !matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    )
}

/// When nothing is to be written, and what was logged of it.
#[derive(Default)]
struct Quiet {
    all: Option<Instant>,
    pause: Duration,
    namespaces: HashMap<String, Instant>,
    /// Until then another refusal is no news.
    told: Option<Instant>,
    failures: u64,
}

impl Quiet {
    fn note(&mut self, namespace: &str, outcome: &Result<i32, Refusal>, now: Instant) {
        self.namespaces.retain(|_, until| *until > now);
        match outcome {
            Ok(_) => {
                if self.failures > 0 {
                    tracing::info!(failures = self.failures, "events are written again");
                }
                (self.all, self.pause, self.failures) = (None, Duration::ZERO, 0);
            }
            Err(Refusal::Denied { verb, error }) => {
                self.namespaces.insert(namespace.to_owned(), now + DENIED);
                if self.is_news(now) {
                    tracing::warn!(
                        verb, resource = post::resource(verb), namespace, %error, quiet_s = DENIED.as_secs(),
                        "the plugin may not write events, pods are not told how far their volumes are"
                    );
                }
            }
            Err(Refusal::Never(error)) => {
                tracing::debug!(namespace, %error, "event refused, its volume is told of no more");
            }
            Err(Refusal::Away(error)) => {
                self.pause = (self.pause * 2).clamp(AWAY.0, AWAY.1);
                self.all = Some(now + self.pause);
                if self.is_news(now) {
                    tracing::warn!(%error, "event not written, trying again later");
                }
            }
        }
    }

    fn is_news(&mut self, now: Instant) -> bool {
        self.failures += 1;
        let news = self.told.is_none_or(|until| until <= now);
        if news {
            self.told = Some(now + DENIED);
        }
        news
    }
}
