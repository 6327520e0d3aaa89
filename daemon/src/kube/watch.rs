//! Watching objects: what the API server has of them, however often the way to it breaks.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::Resource;
use kube::api::Api;
use kube::runtime::watcher::{self, Event, watcher};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::sleep;
use weightd_core::metrics::Metrics;
use weightd_kube::Cause;

use super::WATCH;

/// The longest pause between two attempts: 30 s.
///
/// Source: the longest backoff of client-go's reflector.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// The same where nothing but an operator can help: 2 min.
const PAUSE_REFUSED: Duration = Duration::from_secs(120);

/// What is known of the objects that are watched, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Seen<T> {
    /// Nothing yet.
    #[default]
    NotYet,
    /// Nothing, and the API server says that we may not, or that there is no such kind.
    Refused,
    /// All of them, as they were at the last contact.
    These(BTreeMap<String, T>),
}

impl<T> Seen<T> {
    /// All of them, once they are known.
    pub(super) fn all(&self) -> Option<&BTreeMap<String, T>> {
        match self {
            Self::These(all) => Some(all),
            Self::NotYet | Self::Refused => None,
        }
    }
}

/// One watch, for messages and metrics.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name {
    /// As metrics call it.
    pub(super) call: &'static str,
    /// What is watched.
    pub(super) what: &'static str,
    /// What to do if the API server refuses it.
    pub(super) remedy: &'static str,
}

/// Keeps `seen` up to date with what `read` makes of each object, for ever. Whoever receives is told of changes to
/// that only. No failure takes back what was seen.
pub(super) async fn follow<K, T>(
    objects: Api<K>,
    config: watcher::Config,
    name: Name,
    metrics: Arc<Metrics>,
    seen: &watch::Sender<Seen<T>>,
    read: impl Fn(K) -> T,
) where
    K: Resource<DynamicType: Default + Eq + std::hash::Hash>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + 'static,
    T: PartialEq,
{
    let config = config.timeout(u32::try_from(WATCH.as_secs()).expect("minutes"));
    let mut events = pin!(watcher(objects, config));
    let mut listed = BTreeMap::new();
    let mut outage = Outage::new(name, metrics);
    loop {
        let event = events.next().await;
        match event.expect("a watcher starts anew, whatever broke it") {
            Ok(Event::Init) => {
                listed.clear();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                listed.insert(key(&object), read(object));
            }
            Ok(Event::InitDone) => put(seen, Seen::These(std::mem::take(&mut listed))),
            Ok(Event::Apply(object)) => {
                let (key, value) = (key(&object), read(object));
                seen.send_if_modified(|seen| match seen {
                    Seen::These(all) if all.get(&key) == Some(&value) => false,
                    Seen::These(all) => all.insert(key, value).is_none_or(|_| true),
                    Seen::NotYet | Seen::Refused => false,
                });
            }
            Ok(Event::Delete(object)) => {
                seen.send_if_modified(|seen| match seen {
                    Seen::These(all) => all.remove(&key(&object)).is_some(),
                    Seen::NotYet | Seen::Refused => false,
                });
            }
            Err(error) => {
                if outage.is_refusal(&error) && *seen.borrow() == Seen::NotYet {
                    put(seen, Seen::Refused);
                }
                sleep(outage.note(error)).await;
                continue;
            }
        }
        outage.end();
    }
}

fn key<K: Resource>(object: &K) -> String {
    object.meta().name.clone().unwrap_or_default()
}

fn put<T: PartialEq>(seen: &watch::Sender<Seen<T>>, now: Seen<T>) {
    seen.send_if_modified(|seen| {
        let changed = *seen != now;
        *seen = now;
        changed
    });
}

/// Failures in a row.
struct Outage {
    name: Name,
    metrics: Arc<Metrics>,
    pause: Option<Duration>,
}

impl Outage {
    fn new(name: Name, metrics: Arc<Metrics>) -> Self {
        Self {
            name,
            metrics,
            pause: None,
        }
    }

    fn is_refusal(&self, error: &watcher::Error) -> bool {
        let code = match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status))
            | watcher::Error::WatchFailed(kube::Error::Api(status)) => status.code,
            watcher::Error::WatchError(status) => status.code,
            _ => 0,
        };
        matches!(code, 401 | 403 | 404)
    }

    /// Counts a failure, tells of the first, and says how long to wait.
    fn note(&mut self, error: watcher::Error) -> Duration {
        let Name { call, what, remedy } = self.name;
        let refused = self.is_refusal(&error);
        let error = Cause::from(error);
        self.metrics.kube_failed(call);
        match self.pause {
            Some(_) => tracing::debug!(what, %error, "watch failed again"),
            None if refused => tracing::error!(what, %error, remedy, "watch refused, retrying"),
            None => tracing::warn!(what, %error, "watch failed, retrying"),
        }
        let longest = if refused { PAUSE_REFUSED } else { PAUSE_MAX };
        let first = Duration::from_millis(500);
        let pause = self.pause.map_or(first, |pause| pause * 2).min(longest);
        self.pause = Some(pause);
        // Unequal pauses: else all nodes would come at once to a server that has just started.
        pause.mul_f64(0.5 + fastrand::f64())
    }

    fn end(&mut self) {
        if self.pause.take().is_some() {
            tracing::info!(what = self.name.what, "watch works again");
        }
    }
}
