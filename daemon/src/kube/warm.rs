//! The models that this node is to keep: those of the configuration, of the Node's annotation `weightd.io/prefetch` and of
//! the `ModelPrefetch` objects that select it.
//!
//! Each entry has a holder of its own in the store (`operator/warm.node.…`, `operator/warm.object.…`; for one whose
//! holder the configuration names, `operator/warm.named.…` marks what that holds for it), so what is no longer
//! wanted is let go also if it was removed while no daemon ran; but never before the API server has told all of that part, so
//! one that is away changes nothing. A name that can move, such as `@main`, is resolved when the daemon starts and
//! when its entry changes; what it stood for before is let go when the new revision is known.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use weightd_core::errors::Chain;
use weightd_core::fetch::{FetchError, FetchRequest, Fetched, Fetcher};
use weightd_core::metrics::Metrics;
use weightd_core::store::{Holder, Store};
use weightd_core::warm::Warmer;

mod complaints;
mod desired;
mod entry;
mod pins;
mod status;
mod teller;

pub(super) use desired::{ObjectView, SlimObject};

use super::node::{NodeView, ThisNode};
use super::prefetch::NodePhase;
use super::taint::Warmth;
use super::watch::Seen;
use crate::config::Kept;
use complaints::Complaints;
use desired::{Origin, Wish};
use entry::Entry;
use pins::Known;
use teller::Teller;

/// Fetches at once: the lines are shared, so more of them would only make those of high priority end later.
const AT_ONCE: usize = 2;

/// How often entries are looked at, while some of them are not ready and else.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_AT_REST: Duration = Duration::from_secs(60);

/// What is to be kept, as it is said.
pub(super) struct Said {
    pub(super) config: Vec<Kept>,
    pub(super) node: watch::Receiver<Seen<NodeView>>,
    pub(super) objects: watch::Receiver<Seen<ObjectView>>,
    /// Whether the Node and objects count.
    pub(super) cluster: bool,
}

/// Keeps the warm set. Dropping it stops no fetch.
pub(super) struct Warm {
    fetcher: Arc<Fetcher>,
    /// Reads into the page cache what is to be there.
    warmer: Arc<Warmer>,
    metrics: Arc<Metrics>,
    said: Said,
    /// `None` without a way to the API server.
    node: Option<ThisNode>,
    config: BTreeMap<Origin, Wish>,
    entries: BTreeMap<Origin, Entry>,
    /// What the entries were made of. What was said since counts in the next round: else a part that is known only now
    /// would look like one that wants nothing.
    heard: Heard,
    /// What was seen to last, so that pins are compared only when something changed.
    settled: Option<(Known, BTreeSet<Holder>)>,
    fetches: JoinSet<Ended>,
    complaints: Complaints,
    events: JoinSet<()>,
    teller: Option<Teller>,
    warmth: watch::Sender<Warmth>,
    looked: Instant,
}

/// What was known of the cluster at one moment.
struct Heard {
    known: Known,
    objects: Seen<ObjectView>,
}

struct Ended {
    origin: Origin,
    request: FetchRequest,
    outcome: Result<Fetched, FetchError>,
}

impl Warm {
    pub(super) fn new(
        fetcher: Arc<Fetcher>,
        warmer: Arc<Warmer>,
        metrics: Arc<Metrics>,
        node: Option<ThisNode>,
        mut said: Said,
        warmth: watch::Sender<Warmth>,
    ) -> Self {
        Self {
            config: desired::of_config(std::mem::take(&mut said.config)),
            teller: node.clone().map(Teller::new),
            fetcher,
            warmer,
            metrics,
            said,
            node,
            entries: BTreeMap::new(),
            heard: Heard {
                known: Known {
                    node: false,
                    objects: false,
                },
                objects: Seen::NotYet,
            },
            settled: None,
            fetches: JoinSet::new(),
            complaints: Complaints::default(),
            events: JoinSet::new(),
            warmth,
            looked: Instant::now(),
        }
    }

    /// Keeps the warm set, for ever.
    pub(super) async fn run(mut self) {
        loop {
            self.hear().await;
            self.settle().await;
            self.start_due();
            self.look().await;
            self.tell();
            let pause = self.pause();
            tokio::select! {
                Ok(()) = self.said.node.changed() => {}
                Ok(()) = self.said.objects.changed() => {}
                Some(ended) = self.fetches.join_next() => if let Ok(ended) = ended { self.ended(ended).await },
                Some(_) = self.events.join_next() => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// How long nothing is to be done, unless something is said or ends.
    fn pause(&self) -> Duration {
        let told = self.teller.as_ref().is_none_or(Teller::is_idle);
        if !told || !self.fetches.is_empty() {
            return LOOK;
        }
        let due = self.entries.values().filter_map(|entry| entry.due).min();
        let until_due = due.map(|due| due.saturating_duration_since(Instant::now()));
        until_due.map_or(LOOK_AT_REST, |pause| pause.clamp(LOOK, LOOK_AT_REST))
    }

    fn store(&self) -> &Arc<Store> {
        self.fetcher.store()
    }

    fn view(&self) -> Option<NodeView> {
        let node = self.node.as_ref()?;
        self.said.node.borrow().all()?.get(&*node.name).cloned()
    }

    /// Takes over what is said now. What is not known stays as it was.
    async fn hear(&mut self) {
        self.said.node.mark_unchanged();
        self.said.objects.mark_unchanged();
        let view = self.view().filter(|_| self.said.cluster);
        let objects = self.said.objects.borrow().clone();
        let mut wanted = self.config.clone();
        if let Some(view) = &view {
            wanted.extend(desired::of_node(view));
            if let Some(objects) = objects.all() {
                wanted.extend(desired::of_objects(objects, &view.labels));
            }
        }
        let known = Known {
            node: !self.said.cluster || view.is_some(),
            objects: !self.said.cluster || (view.is_some() && objects.all().is_some()),
        };
        self.heard = Heard { known, objects };
        let is_known = |origin: &Origin| match origin {
            Origin::Config(_) => true,
            Origin::Node(_) => known.node,
            Origin::Object(_) => known.objects,
        };
        for (origin, entry) in &mut self.entries {
            if let Some(wish) = wanted.get(origin) {
                entry.rank_as(wish);
            }
        }
        let unwanted = self.entries.extract_if(.., |origin, entry| {
            is_known(origin) && wanted.get(origin) != Some(&entry.wish)
        });
        for (origin, entry) in unwanted.collect::<Vec<_>>() {
            tracing::debug!(?origin, "no longer to be kept so");
            if let Ok(target) = entry.wish {
                self.give_up(&target.request).await;
            }
        }
        for (origin, wish) in wanted {
            if !self.entries.contains_key(&origin) {
                self.take_on(origin, wish);
            }
        }
    }

    fn take_on(&mut self, origin: Origin, wish: Wish) {
        match &wish {
            Ok(target) => {
                tracing::info!(model = %target.request.model, ?origin, "model to be kept")
            }
            Err(reason) => tracing::warn!(?origin, reason, "a model to be kept makes no sense"),
        }
        self.entries.insert(origin, Entry::new(wish));
    }

    async fn give_up(&self, request: &FetchRequest) {
        if let Err(error) = self.fetcher.give_up(request).await {
            tracing::warn!(model = %request.model, error = %Chain(&error), "a fetch that nobody wants stays on record");
        }
    }

    /// Lets go of what is held for entries that are gone, also those of a former daemon.
    async fn settle(&mut self) {
        let holders = self.entries.iter().filter_map(|(origin, entry)| {
            match (entry.target(), origin) {
                (Some(target), _) => target.own_holder().cloned(),
                // Of an object that cannot be read it is not known that it wants nothing.
                (None, Origin::Object(name)) => Some(desired::holder_of_object(name)),
                (None, Origin::Config(_) | Origin::Node(_)) => None,
            }
        });
        let now = (self.heard.known, holders.collect::<BTreeSet<_>>());
        if self.settled.as_ref() == Some(&now) {
            return;
        }
        let (known, holders) = now.clone();
        for record in pins::release_stale(self.store(), holders, known).await {
            self.give_up(&record).await;
            // It may have ended, and pinned, in between.
            if let Some(holder) = record.pin {
                let store = Arc::clone(self.store());
                let released = weightd_core::blocking::run(move || store.release(&holder)).await;
                if let Err(error) = released {
                    tracing::warn!(error = %Chain(&error), "a model that is no longer to be kept stays held");
                }
            }
        }
        self.settled = Some(now);
    }

    /// Starts what is due, the highest priority first.
    fn start_due(&mut self) {
        let now = Instant::now();
        while self.fetches.len() < AT_ONCE {
            let due = self
                .entries
                .iter_mut()
                .filter(|(_, entry)| entry.is_due(now));
            let next = due.min_by_key(|(_, entry)| {
                std::cmp::Reverse(entry.target().map_or(i32::MIN, |target| target.priority))
            });
            let Some((origin, entry)) = next else {
                return;
            };
            let Some(target) = entry.target() else {
                return;
            };
            let (origin, request) = (origin.clone(), target.request.clone());
            let fetch = self.fetcher.fetch(request.clone());
            entry.started(fetch.progress());
            self.fetches.spawn(async move {
                Ended {
                    outcome: fetch.wait().await,
                    origin,
                    request,
                }
            });
        }
    }

    async fn ended(&mut self, ended: Ended) {
        let store = Arc::clone(self.store());
        let entry = self.entries.get_mut(&ended.origin);
        let Some(entry) = entry.filter(|entry| entry.wants(&ended.request)) else {
            // It may have been pinned before it was given up.
            self.settled = None;
            return;
        };
        let Ok(target) = entry.wish.clone() else {
            return;
        };
        match ended.outcome {
            Ok(fetched) => {
                entry.ready(&fetched.snapshot);
                let id = &fetched.snapshot.manifest.snapshot;
                pins::hold_only(&store, &target, id, true).await;
                if target.warm {
                    self.warmer.warm(&fetched.snapshot.manifest.model, id);
                }
            }
            // This process is ending, or another entry that has gone wanted the very same.
            Err(FetchError::Stopped { .. } | FetchError::Unwanted { .. }) => {
                *entry = Entry::new(Ok(target));
            }
            Err(error) => {
                let earlier = pins::earlier(&store, &target).await;
                entry.failed(&error, earlier.as_ref());
            }
        }
    }

    /// Takes over how far fetches are, and sees whether what is ready is still here.
    async fn look(&mut self) {
        let store = Arc::clone(self.store());
        for entry in self.entries.values_mut() {
            if let Some(id) = entry.look()
                && let Some(target) = entry.target()
            {
                pins::hold_only(&store, target, &id, false).await;
            }
        }
        if self.looked.elapsed() >= LOOK_AT_REST {
            self.looked = Instant::now();
            for entry in self.entries.values_mut() {
                if entry.phase == NodePhase::Ready
                    && let (Some(target), Some(id)) = (entry.target(), &entry.snapshot)
                    && !pins::is_here(&store, target, id).await
                {
                    let pin = target.pin;
                    entry.lost(pin);
                }
            }
        }
    }

    /// Tells the metrics, the taint and the objects.
    fn tell(&mut self) {
        for phase in NodePhase::ALL {
            let in_phase = self.entries.values().filter(|entry| entry.phase == phase);
            let name = match phase {
                NodePhase::Pending => "pending",
                NodePhase::Fetching => "fetching",
                NodePhase::Ready => "ready",
                NodePhase::Failed => "failed",
                NodePhase::Waiting => "waiting",
            };
            self.metrics.warm_models(name, in_phase.count());
        }
        let warmth = match self.is_warm() {
            true => Warmth::Warm,
            false => Warmth::Cold,
        };
        self.warmth.send_if_modified(|now| {
            let changed = *now != warmth;
            *now = warmth;
            changed
        });
        if let Some(teller) = &mut self.teller
            && self.heard.known.objects
            && let Some(objects) = self.heard.objects.all()
        {
            teller.tell(objects, &self.entries);
        }
        self.complain();
    }

    fn complain(&mut self) {
        let (Some(node), Some(view)) = (&self.node, self.view()) else {
            return;
        };
        for (reason, note) in self.complaints.due(&self.entries, Instant::now()) {
            let (node, uid) = (node.clone(), view.uid.clone());
            self.events
                .spawn(async move { node.warn(&uid, reason, note).await });
        }
    }

    /// Whether all that is to be here is, as far as it can be told what that is.
    fn is_warm(&self) -> bool {
        let known = self.heard.known;
        // Whoever may not read the objects, or has no such kind, has none.
        let refused = self.heard.objects == Seen::Refused;
        let mut sensible = self.entries.values().filter(|entry| entry.wish.is_ok());
        known.node && (known.objects || refused) && sensible.all(Entry::is_settled)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kube::{Client, Config};
    use weightd_core::model::ModelRef;
    use weightd_core::source::{Source, SourceError, Sources};
    use weightd_core::store::StoreLimits;

    use super::*;

    struct Nothing;

    impl Sources for Nothing {
        fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
            unreachable!("{model}")
        }
    }

    #[tokio::test]
    async fn what_is_known_only_since_it_was_heard_does_not_look_like_nothing_to_be_kept() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path(), StoreLimits::default()).unwrap();
        let metrics = Arc::<Metrics>::default();
        let warmer = Warmer::new(store.clone(), Default::default(), metrics.clone());
        let fetcher = Fetcher::new(
            store,
            Arc::new(Nothing),
            Default::default(),
            metrics.clone(),
        );
        let config = Config::new("http://127.0.0.1:1".parse().unwrap());
        let client = Client::try_from(config).unwrap();
        let node = ThisNode::new(client, "node", metrics.clone());
        let (nodes, objects) = (watch::Sender::default(), watch::Sender::default());
        let said = Said {
            config: Vec::new(),
            node: nodes.subscribe(),
            objects: objects.subscribe(),
            cluster: true,
        };
        let mut warm = Warm::new(
            fetcher,
            warmer,
            metrics,
            Some(node),
            said,
            watch::Sender::default(),
        );

        warm.hear().await;
        let view = NodeView {
            prefetch: Some("hf://org/model".to_owned()),
            ..NodeView::default()
        };
        nodes.send_replace(Seen::These([("node".to_owned(), view)].into()));
        objects.send_replace(Seen::These(BTreeMap::new()));

        assert!(!warm.is_warm() && !warm.heard.known.node);
        warm.hear().await;
        assert!(!warm.is_warm() && warm.entries.len() == 1);
    }
}
