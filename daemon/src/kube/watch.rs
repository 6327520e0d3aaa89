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
use tokio::time::{Instant, sleep, timeout};
use weightd_core::metrics::Metrics;
use weightd_kube::Cause;

use super::node::slow;
use super::{TIMEOUTS, WATCH};

/// The shortest pause between two attempts.
const PAUSE_MIN: Duration = Duration::from_millis(500);

/// The longest pause between two attempts: 30 s.
///
/// Source: the longest backoff of client-go's reflector.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Over this time all nodes list anew that have to.
const SPREAD: Duration = Duration::from_secs(5);

/// After this long without a failure a watch has worked, also if nothing has happened that it could show. Longer than
/// any attempt lasts that fails.
const CALM: Duration = Duration::from_secs(60);

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
    let begin = || watcher(objects.clone(), config.clone());
    let mut events = pin!(begin());
    let mut listing = true;
    let mut listed = BTreeMap::new();
    let mut outage = Outage::new(name, metrics);
    loop {
        let next = events.next();
        let event = match listing {
            // A watch may be silent, and has its own limit; a page of a list may not.
            true => timeout(TIMEOUTS.call, next).await,
            false => Ok(next.await),
        };
        let Ok(event) = event else {
            events.set(begin());
            sleep(outage.note(&Cause::from(slow()), false)).await;
            continue;
        };
        match event.expect("a watcher starts anew, whatever broke it") {
            Ok(Event::Init) => {
                listing = true;
                listed.clear();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                listed.insert(key(&object), read(object));
            }
            Ok(Event::InitDone) => {
                listing = false;
                put(seen, Seen::These(std::mem::take(&mut listed)));
            }
            Ok(Event::Apply(object)) => set(seen, key(&object), read(object)),
            Ok(Event::Delete(object)) => unset(seen, &key(&object)),
            Err(error) if code(&error) == 410 => {
                // What was seen last is too old to go on from: that is no trouble, but it happens to all nodes at once.
                tracing::debug!(what = name.what, "listed anew");
                listing = true;
                events.set(begin());
                sleep(SPREAD.mul_f64(fastrand::f64())).await;
                continue;
            }
            Err(error) => {
                let refused = matches!(code(&error), 401 | 403 | 404);
                if refused && *seen.borrow() == Seen::NotYet {
                    put(seen, Seen::Refused);
                }
                sleep(outage.note(&Cause::from(error), refused)).await;
                continue;
            }
        }
        outage.end();
    }
}

/// What the API server says of a failure; 0 if it does not say a thing.
fn code(error: &watcher::Error) -> u16 {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status.code,
        _ => 0,
    }
}

fn key<K: Resource>(object: &K) -> String {
    object.meta().name.clone().unwrap_or_default()
}

fn set<T: PartialEq>(seen: &watch::Sender<Seen<T>>, key: String, value: T) {
    seen.send_if_modified(|seen| match seen {
        Seen::These(all) if all.get(&key) == Some(&value) => false,
        Seen::These(all) => all.insert(key, value).is_none_or(|_| true),
        Seen::NotYet | Seen::Refused => false,
    });
}

fn unset<T>(seen: &watch::Sender<Seen<T>>, key: &str) {
    seen.send_if_modified(|seen| match seen {
        Seen::These(all) => all.remove(key).is_some(),
        Seen::NotYet | Seen::Refused => false,
    });
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
    /// When the next attempt after the last failure was to begin.
    again: Instant,
}

impl Outage {
    fn new(name: Name, metrics: Arc<Metrics>) -> Self {
        Self {
            name,
            metrics,
            pause: None,
            again: Instant::now(),
        }
    }

    /// Counts a failure, tells of the first, and says how long to wait.
    fn note(&mut self, error: &Cause, refused: bool) -> Duration {
        let Name { call, what, remedy } = self.name;
        self.metrics.kube_failed(call);
        if self.again.elapsed() >= CALM {
            self.pause = None;
        }
        match self.pause {
            Some(_) => tracing::debug!(what, %error, "watch failed again"),
            None if refused => tracing::error!(what, %error, remedy, "watch refused, retrying"),
            None => tracing::warn!(what, %error, "watch failed, retrying"),
        }
        let longest = if refused { PAUSE_REFUSED } else { PAUSE_MAX };
        let pause = self.pause.map_or(PAUSE_MIN, |pause| pause * 2).min(longest);
        self.pause = Some(pause);
        // Unequal pauses: else all nodes would come at once to a server that has just started.
        let pause = pause.mul_f64(0.5 + fastrand::f64());
        self.again = Instant::now() + pause;
        pause
    }

    fn end(&mut self) {
        if self.pause.take().is_some() {
            tracing::info!(what = self.name.what, "watch works again");
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::{Client, Config};
    use tokio::net::TcpListener;

    use super::*;
    use crate::kube::node::ThisNode;

    #[tokio::test(start_paused = true)]
    async fn a_list_that_has_no_answer_is_given_up() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", silent.local_addr().unwrap());
        let mut config = Config::new(address.parse().unwrap());
        (config.connect_timeout, config.read_timeout) = (None, None);
        let metrics = Arc::<Metrics>::default();
        let client = Client::try_from(config).unwrap();
        let node = ThisNode::new(client, "node", Arc::clone(&metrics));
        let (seen, _) = watch::channel(Seen::NotYet);
        let failed = async {
            while metrics.encode().contains("{call=\"watch_node\"} 0") {
                sleep(Duration::from_secs(1)).await;
            }
        };

        let given_up = async {
            tokio::select! {
                () = node.watch(&seen) => {}
                () = failed => {}
            }
        };

        let in_time = timeout(TIMEOUTS.call * 2, given_up).await;
        assert!(in_time.is_ok(), "it still waits");
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_while_nothing_works_and_begin_anew_after_a_watch_without_events() {
        let name = Name {
            call: "watch_node",
            what: "this Node",
            remedy: "",
        };
        let mut outage = Outage::new(name, Arc::default());
        let away = || Cause::from(slow());
        let fail = |outage: &mut Outage| outage.note(&away(), false);

        for most in [750, 1500, 3000] {
            let pause = fail(&mut outage);
            assert!(pause <= Duration::from_millis(most), "{pause:?}");
            tokio::time::advance(pause).await;
        }
        tokio::time::advance(CALM).await;

        let pause = fail(&mut outage);
        assert!(pause <= Duration::from_millis(750), "{pause:?}");
        assert!(fail(&mut outage) >= Duration::from_millis(500));
    }
}
