//! Filling the shared tier for pods that wait for a node: by the time Karpenter has launched one, the model is near.
//!
//! One task holds what is known of the cluster: the pods without a node, of each only what concerns us, and the
//! claims of our volumes. A model is filled once, however many pods want it, and at most a few at once; those who
//! come later wait in a queue in which no namespace keeps another back.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume, Pod};
use kube::Client;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;
use weightd_core::metrics::Metrics;
use weightd_core::shared::SharedConfig;
use weightd_kube::Cause;

use crate::config::Config;

mod fill;
mod pods;
mod tell;
mod wish;

use fill::{Ended, Filler, FillerError, Now, Refusal};
use pods::{News, Pods, Wanted};
use tell::{Teller, Word};
use wish::{Asker, Waiting, Wish};

/// Pods of one answer to a list: they come with all their environment, and most are let go at once.
const PAGE: u32 = 100;

/// Models that are wanted, filled or not.
const MODELS_MAX: usize = 1_000;

/// Those of one namespace: others find room whatever it does.
const OF_ONE_MAX: usize = MODELS_MAX / 4;

/// How often the queue is looked at when nothing happens.
const LOOK: Duration = Duration::from_secs(5);

/// The least time between two looks, which go through all pods: thousands may come within a second.
const REST: Duration = Duration::from_millis(300);

/// How long a model that is there is not looked at again: names may move.
const GOOD_FOR: Duration = Duration::from_secs(600);

/// After how long a model that could not be had is tried again, if it is still wanted.
const TRY_AGAIN: Duration = Duration::from_secs(120);

/// How long nobody may want a model before its fill is ended: pods are replaced by others all the time.
const UNWANTED: Duration = Duration::from_secs(30);

/// A fill that has come so far goes on, wanted or not: who wanted it will come again, or is on a node by now.
const FAR: f64 = 0.25;

/// Pods that are told of one fill. All of a thousand would be a thousand writes.
const TOLD_MAX: usize = 10;

/// What is known of the cluster, and what is done about it.
pub(super) struct Pending {
    filler: Arc<Filler>,
    teller: Teller,
    metrics: Arc<Metrics>,
    at_once: usize,
    pods: Pods,
    fills: HashMap<Arc<Wish>, Fill>,
    running: JoinSet<(Arc<Wish>, Ended)>,
    /// Pods have come or gone since the last look.
    changed: bool,
    term: CancellationToken,
}

/// One model that is wanted, or was.
struct Fill {
    state: State,
    /// In which order they came.
    since: Instant,
    /// When somebody last wanted it.
    wanted: Instant,
    /// The pods that were told something, by uid.
    told: HashSet<String>,
}

enum State {
    Queued,
    Running {
        stop: CancellationToken,
        now: watch::Receiver<Now>,
        askers: Vec<Asker>,
    },
    /// Nothing to do until then, unless somebody comes whose right was not looked at.
    Done {
        until: Instant,
        tried: Option<HashSet<Asker>>,
    },
}

impl Pending {
    /// Fills `tier` as the configuration says, in the name of the replica `pod`.
    pub(super) async fn new(
        config: &Config,
        tier: SharedConfig,
        client: Client,
        pod: &str,
        metrics: Arc<Metrics>,
        term: CancellationToken,
    ) -> Result<Self, FillerError> {
        Ok(Self {
            filler: Arc::new(Filler::new(config, tier, Arc::clone(&metrics)).await?),
            teller: Teller::new(client, pod),
            metrics,
            at_once: config.controller.fills,
            pods: Pods::new(config.kubernetes.driver.clone()),
            fills: HashMap::new(),
            running: JoinSet::new(),
            changed: false,
            term,
        })
    }

    /// Watches and fills until the term ends, and then until what is under way has been ended.
    pub(super) async fn run(mut self, client: Client) {
        let unbound = watcher::Config::default()
            .fields("spec.nodeName=,status.phase=Pending")
            .page_size(PAGE);
        let pods = watcher(Api::<Pod>::all(client.clone()), unbound).default_backoff();
        let volumes = watcher::Config::default().page_size(PAGE);
        let volumes = watcher(Api::<PersistentVolume>::all(client), volumes).default_backoff();
        let pods = pods.map(|event| event.map(News::Pod)).boxed();
        let volumes = volumes.map(|event| event.map(News::Volume)).boxed();
        let mut news = futures::stream::select(pods, volumes);
        let (mut looks, mut looked) = (interval(REST), Instant::now());
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            let term = self.term.clone();
            tokio::select! {
                () = term.cancelled() => break,
                Some(event) = news.next() => match event {
                    Ok(event) => {
                        failing = false;
                        self.changed |= self.pods.hear(event);
                    }
                    Err(error) if !failing => {
                        failing = true;
                        let error = Cause::from(error);
                        tracing::warn!(%error, "watch of pods without a node failed, retrying");
                    }
                    Err(_) => {}
                },
                Some(ended) = self.running.join_next() => match ended {
                    Ok((wish, ended)) => self.end(&wish, ended),
                    Err(error) => tracing::error!(%error, "a fill broke off"),
                },
                _ = looks.tick() => if self.changed || looked.elapsed() >= LOOK {
                    self.look();
                    looked = Instant::now();
                },
            }
        }
        // Each ends by itself, as soon as it has let go of its claims.
        while self.running.join_next().await.is_some() {}
    }

    /// Compares what is wanted with what is done about it.
    fn look(&mut self) {
        self.changed = false;
        let (wanted, now) = (self.pods.wanted(), Instant::now());
        self.fills.retain(|wish, fill| match &fill.state {
            _ if wanted.contains_key(wish) => true,
            State::Queued => false,
            State::Running {
                stop, now: seen, ..
            } => {
                if fill.wanted + UNWANTED < now && seen.borrow().done < FAR {
                    stop.cancel();
                }
                true
            }
            State::Done { until, .. } => now < *until,
        });
        self.take_in(&wanted, now);
        while self.running.len() < self.at_once && self.begin(&wanted) {}
        self.tell_begun(&wanted);
    }

    /// Remembers who wants what, as far as there is room.
    fn take_in(&mut self, wanted: &Wanted, now: Instant) {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for wish in self.fills.keys() {
            for namespace in namespaces(wanted.get(wish).map_or(&[], Vec::as_slice)) {
                *counts.entry(namespace).or_default() += 1;
            }
        }
        for (wish, who) in wanted {
            if !self.fills.contains_key(wish) {
                let whose = namespaces(who);
                let has_room = |one: &&str| counts.get(one).is_none_or(|count| *count < OF_ONE_MAX);
                if self.fills.len() >= MODELS_MAX || !whose.iter().any(has_room) {
                    continue;
                }
                for namespace in whose {
                    *counts.entry(namespace).or_default() += 1;
                }
            }
            let fill = self.fills.entry(Arc::clone(wish)).or_insert_with(|| Fill {
                state: State::Queued,
                since: now,
                wanted: now,
                told: HashSet::new(),
            });
            fill.wanted = now;
            if let State::Done { until, tried } = &fill.state {
                let untried =
                    |tried: &HashSet<Asker>| who.iter().any(|(_, asker)| !tried.contains(asker));
                if *until <= now || tried.as_ref().is_some_and(untried) {
                    fill.state = State::Queued;
                    fill.since = now;
                    fill.told.clear();
                }
            }
        }
    }

    /// Begins with the next one of the queue, if there is one.
    fn begin(&mut self, wanted: &Wanted) -> bool {
        let mut busy: HashMap<&str, usize> = HashMap::new();
        for fill in self.fills.values() {
            if let State::Running { askers, .. } = &fill.state {
                for asker in askers {
                    *busy.entry(&asker.namespace).or_default() += 1;
                }
            }
        }
        let load = |wish: &Arc<Wish>| {
            let askers = wanted.get(wish).into_iter().flatten();
            let loads =
                askers.map(|(_, asker)| busy.get(asker.namespace.as_str()).copied().unwrap_or(0));
            loads.min().unwrap_or(0)
        };
        let queued = self
            .fills
            .iter()
            .filter(|(_, fill)| matches!(fill.state, State::Queued));
        let next = queued.min_by_key(|(wish, fill)| (load(wish), fill.since));
        let Some(wish) = next.map(|(wish, _)| Arc::clone(wish)) else {
            return false;
        };
        let mut askers: Vec<Asker> = Vec::new();
        for (_, asker) in &wanted[&wish] {
            if !askers.contains(asker) {
                askers.push(asker.clone());
            }
        }
        let (stop, (report, now)) = (self.term.child_token(), watch::channel(Now::default()));
        let (filler, until) = (Arc::clone(&self.filler), stop.clone());
        let (model, who) = (Arc::clone(&wish), askers.clone());
        self.running.spawn(async move {
            let ended = filler.fill(&model, &who, &report, &until).await;
            (model, ended)
        });
        let fill = self.fills.get_mut(&wish).expect("it was found there");
        fill.state = State::Running { stop, now, askers };
        true
    }

    /// Tells the pods that a fill is for them, as soon as there is something to tell.
    fn tell_begun(&mut self, wanted: &Wanted) {
        for (wish, fill) in &mut self.fills {
            let State::Running { now, .. } = &fill.state else {
                continue;
            };
            let Some(text) = now.borrow().text.clone() else {
                continue;
            };
            for (uid, _) in wanted.get(wish).into_iter().flatten() {
                if fill.told.len() >= TOLD_MAX {
                    break;
                }
                if fill.told.insert(uid.clone())
                    && let Some(pod) = self.pods.get(uid)
                {
                    self.teller.tell(&reference(uid, pod), Word::Begun, &text);
                }
            }
        }
    }

    /// What has come of a fill.
    fn end(&mut self, wish: &Wish, ended: Ended) {
        let (outcome, why) = match &ended {
            Ended::Filled(text) => ("filled", text.as_str()),
            Ended::There(text) => ("there", text.as_str()),
            Ended::Unshareable(text) => ("unshareable", text.as_str()),
            Ended::Denied(refusals) => (
                "denied",
                refusals.first().map_or("", |first| first.text.as_str()),
            ),
            Ended::Failed(text) => ("failed", text.as_str()),
            Ended::Stopped => ("stopped", ""),
        };
        self.metrics.pending_fill(outcome);
        tracing::info!(model = %wish.model, outcome, why, "fill for pods without a node ended");
        // There is room for the next one. Not at once: who asks for what is refused in no time would keep us busy.
        self.changed = true;
        let (text, word, pause) = match ended {
            Ended::Filled(text) | Ended::There(text) => (text, Word::Done, GOOD_FOR),
            Ended::Unshareable(text) => (text, Word::Left, GOOD_FOR),
            Ended::Failed(text) => (text, Word::Not, TRY_AGAIN),
            Ended::Denied(refusals) => return self.refuse(wish, refusals),
            Ended::Stopped => {
                self.fills.remove(wish);
                return;
            }
        };
        let uids = self.told_first(wish);
        for uid in &uids {
            if let Some(pod) = self.pods.get(uid) {
                self.teller.tell(&reference(uid, pod), word, &text);
            }
        }
        if let Some(fill) = self.fills.get_mut(wish) {
            let until = Instant::now() + pause;
            fill.state = State::Done { until, tried: None };
        }
    }

    fn refuse(&mut self, wish: &Wish, refusals: Vec<Refusal>) {
        for refusal in &refusals {
            let word = match refusal.expected {
                true => Word::Left,
                false => Word::Not,
            };
            let having = self.pods.wanting(wish, Some(&refusal.asker));
            for (uid, pod) in having.take(TOLD_MAX) {
                self.teller.tell(&reference(uid, pod), word, &refusal.text);
            }
        }
        if let Some(fill) = self.fills.get_mut(wish) {
            let tried = refusals.into_iter().map(|refusal| refusal.asker).collect();
            let until = Instant::now() + GOOD_FOR;
            fill.state = State::Done {
                until,
                tried: Some(tried),
            };
        }
    }

    /// The pods that are told how it ended: those who were told that it began, else the first.
    fn told_first(&self, wish: &Wish) -> Vec<String> {
        let told = self.fills.get(wish).map(|fill| &fill.told);
        let told = told.filter(|told| !told.is_empty());
        if let Some(told) = told {
            return told.iter().cloned().collect();
        }
        let having = self.pods.wanting(wish, None);
        having.take(TOLD_MAX).map(|(uid, _)| uid.clone()).collect()
    }
}

fn namespaces(who: &[(String, Asker)]) -> HashSet<&str> {
    let all = who.iter().map(|(_, asker)| asker.namespace.as_str());
    all.collect()
}

fn reference(uid: &str, pod: &Waiting) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: Some(pod.name.clone()),
        namespace: Some(pod.namespace.clone()),
        uid: Some(uid.to_owned()),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests;
