//! The pods that wait for a node, as far as they concern us, and the claims of our volumes.
//!
//! Anybody who may create pods writes what stands here: so a pod takes little room, and no namespace takes all of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};

use super::wish::{Asker, Claims, Waiting, Wish};

/// Pods that are kept in mind. More of them wait without us.
const PODS_MAX: usize = 20_000;

/// Those of one namespace: others find room whatever it does.
const OF_ONE_MAX: usize = PODS_MAX / 2;

/// What the watches say.
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub(super) enum News {
    Pod(Event<Pod>),
    Volume(Event<PersistentVolume>),
}

/// By whom each model is wanted: pods by their uid.
pub(super) type Wanted = HashMap<Arc<Wish>, Vec<(String, Asker)>>;

/// The pods without a node.
pub(super) struct Pods {
    driver: String,
    /// By uid.
    kept: HashMap<String, Waiting>,
    /// How many of each namespace.
    counts: HashMap<String, usize>,
    claims: Claims,
    /// Those of a list that is under way.
    listed: HashSet<String>,
}

impl Pods {
    pub(super) fn new(driver: String) -> Self {
        Self {
            driver,
            kept: HashMap::new(),
            counts: HashMap::new(),
            claims: Claims::default(),
            listed: HashSet::new(),
        }
    }

    /// Takes news in; says whether anybody may want anything else now.
    pub(super) fn hear(&mut self, news: News) -> bool {
        match news {
            News::Pod(Event::Init) => {
                self.listed.clear();
                false
            }
            News::Pod(Event::InitApply(pod)) => {
                self.listed.extend(pod.uid());
                self.keep(&pod)
            }
            News::Pod(Event::InitDone) => {
                let listed = std::mem::take(&mut self.listed);
                let gone = self.kept.keys().filter(|uid| !listed.contains(*uid));
                let gone: Vec<_> = gone.cloned().collect();
                gone.iter().for_each(|uid| self.forget(uid));
                true
            }
            News::Pod(Event::Apply(pod)) => self.keep(&pod),
            // It is gone, or has got a node: then it is that node's daemon's.
            News::Pod(Event::Delete(pod)) => {
                self.forget(&pod.uid().unwrap_or_default());
                true
            }
            News::Volume(event) => {
                let changed = self.claims.hear(event, &self.driver);
                if changed {
                    let claiming = self.kept.values_mut().filter(|pod| pod.claims());
                    claiming.for_each(|pod| pod.look_up(&self.claims));
                }
                changed
            }
        }
    }

    /// Keeps what concerns us of a pod.
    fn keep(&mut self, pod: &Pod) -> bool {
        let Some(uid) = pod.uid() else { return false };
        let going = pod.meta().deletion_timestamp.is_some();
        let waiting = Waiting::of(pod, &self.driver).filter(|_| !going);
        self.forget(&uid);
        let Some(mut waiting) = waiting else {
            return true;
        };
        let count = self.counts.get(&waiting.namespace).copied();
        let count = count.unwrap_or(0);
        if self.kept.len() < PODS_MAX && count < OF_ONE_MAX {
            waiting.look_up(&self.claims);
            self.counts.insert(waiting.namespace.clone(), count + 1);
            self.kept.insert(uid, waiting);
        }
        true
    }

    fn forget(&mut self, uid: &str) {
        let Some(pod) = self.kept.remove(uid) else {
            return;
        };
        if let Some(count) = self.counts.get_mut(&pod.namespace) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&pod.namespace);
            }
        }
    }

    pub(super) fn get(&self, uid: &str) -> Option<&Waiting> {
        self.kept.get(uid)
    }

    /// Who wants what now.
    pub(super) fn wanted(&self) -> Wanted {
        let mut wanted = Wanted::new();
        for (uid, pod) in &self.kept {
            for (wish, asker) in pod.wishes() {
                let who = wanted.entry(Arc::clone(wish)).or_default();
                who.push((uid.clone(), asker.clone()));
            }
        }
        wanted
    }

    /// Those who want this; of an asker, or of anybody.
    pub(super) fn wanting<'a>(
        &'a self,
        wish: &'a Wish,
        asker: Option<&'a Asker>,
    ) -> impl Iterator<Item = (&'a String, &'a Waiting)> {
        self.kept.iter().filter(move |(_, pod)| {
            let mut wishes = pod.wishes().iter();
            wishes.any(|(one, whose)| **one == *wish && asker.is_none_or(|asker| asker == whose))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, namespace: &str, model: &str) -> Pod {
        let pod = json!({
            "metadata": {
                "name": name, "namespace": namespace, "uid": format!("uid-{name}"),
                "annotations": { "weightd.io/model": model },
            },
            "spec": { "containers": [] },
        });
        serde_json::from_value(pod).unwrap()
    }

    fn pods() -> Pods {
        Pods::new("csi.weightd.io".to_owned())
    }

    fn add(pods: &mut Pods, pod: Pod) {
        pods.hear(News::Pod(Event::Apply(pod)));
    }

    #[test]
    fn a_list_ends_the_memory_of_pods_that_went_while_nobody_watched() {
        let mut pods = pods();
        for name in ["a", "b"] {
            add(&mut pods, pod(name, "team-a", "hf://org/model"));
        }

        pods.hear(News::Pod(Event::Init));
        pods.hear(News::Pod(Event::InitApply(pod(
            "b",
            "team-a",
            "hf://org/model",
        ))));
        assert!(pods.hear(News::Pod(Event::InitDone)));

        assert!(pods.get("uid-a").is_none() && pods.get("uid-b").is_some());
        assert_eq!(pods.counts["team-a"], 1);
    }

    #[test]
    fn a_namespace_with_many_pods_leaves_room_for_others() {
        let mut pods = pods();
        for index in 0..OF_ONE_MAX + 10 {
            add(
                &mut pods,
                pod(&format!("a{index}"), "team-a", "hf://org/model"),
            );
        }
        add(&mut pods, pod("b", "team-b", "hf://org/model"));
        assert_eq!(pods.kept.len(), OF_ONE_MAX + 1);
        assert!(pods.get("uid-b").is_some());

        // One that is known stays known, and one that goes makes room.
        add(&mut pods, pod("a0", "team-a", "hf://org/other"));
        assert!(pods.get("uid-a0").is_some());
        pods.hear(News::Pod(Event::Delete(pod(
            "a0",
            "team-a",
            "hf://org/other",
        ))));
        add(&mut pods, pod("late", "team-a", "hf://org/model"));
        assert!(pods.get("uid-late").is_some());
    }

    /// Each look goes through all pods, so it must not read their words again.
    #[test]
    fn what_a_pod_wants_is_read_once() {
        let mut pods = pods();
        add(&mut pods, pod("a", "team-a", "hf://org/model"));
        let (first, second) = (pods.wanted(), pods.wanted());
        let of = |wanted: &Wanted| wanted.keys().next().cloned().expect("a wish");
        assert!(Arc::ptr_eq(&of(&first), &of(&second)));
    }

    #[test]
    fn a_pod_that_is_being_deleted_wants_nothing() {
        let mut pods = pods();
        let mut going = pod("a", "team-a", "hf://org/model");
        add(&mut pods, going.clone());
        going.metadata.deletion_timestamp =
            Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        add(&mut pods, going);
        assert!(pods.wanted().is_empty());
    }

    #[test]
    fn pods_that_claim_follow_what_becomes_of_their_claim() {
        let mut pods = pods();
        let mut claiming = pod("a", "team-a", "hf://org/bare");
        let volumes = json!([{ "name": "m", "persistentVolumeClaim": { "claimName": "c" } }]);
        claiming.spec.as_mut().unwrap().volumes = serde_json::from_value(volumes).unwrap();
        add(&mut pods, claiming);
        let volume: PersistentVolume = serde_json::from_value(json!({
            "metadata": { "name": "pv" },
            "spec": {
                "csi": { "driver": "csi.weightd.io", "volumeHandle": "x", "volumeAttributes": { "source": "hf://org/claimed" } },
                "claimRef": { "namespace": "team-a", "name": "c" },
            },
        }))
        .unwrap();
        let names = |pods: &Pods| -> Vec<String> {
            let wanted = pods.wanted();
            wanted.keys().map(|wish| wish.model.to_string()).collect()
        };
        assert_eq!(names(&pods), ["hf://org/bare"]);

        assert!(pods.hear(News::Volume(Event::Apply(volume.clone()))));
        assert_eq!(names(&pods), ["hf://org/claimed"]);
        assert!(
            !pods.hear(News::Volume(Event::Apply(volume.clone()))),
            "nothing new"
        );

        assert!(pods.hear(News::Volume(Event::Delete(volume))));
        assert_eq!(names(&pods), ["hf://org/bare"]);
    }
}
