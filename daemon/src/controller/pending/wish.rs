//! Which models a pod will need, from what its author and the volumes' objects say.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use weightd_core::model::{ModelRef, Patterns, Scheme};

const MODEL: &str = "weightd.io/model";
const SECRET: &str = "weightd.io/secret";
const OF_VOLUME: &str = "weightd.io/volume.";

/// Bytes that are kept of one pod. What needs more names no models, or more than a pod can use.
const KEPT_MAX: usize = 8 << 10;

/// What is kept of a pod. All else of it is let go at once: there may be thousands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Waiting {
    pub name: String,
    pub namespace: String,
    annotations: BTreeMap<String, String>,
    uses: Vec<Use>,
    wishes: Vec<(Arc<Wish>, Asker)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Use {
    /// A volume of the pod's own.
    Inline(Volume),
    /// A claim, which may be for a volume of ours.
    Claim(String),
}

/// What a volume of ours says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Volume {
    name: String,
    attributes: BTreeMap<String, String>,
    secret: bool,
}

impl Volume {
    fn bytes(&self) -> usize {
        let attributes = self.attributes.iter();
        self.name.len()
            + attributes
                .map(|(key, value)| key.len() + value.len())
                .sum::<usize>()
    }
}

/// The volumes of ours that claims stand for.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// By the claim's namespace and name.
    volumes: HashMap<(String, String), Volume>,
    /// Which claim each volume is bound to.
    bound: HashMap<String, (String, String)>,
    /// Those of a list that is under way.
    listed: HashSet<String>,
}

impl Claims {
    fn get(&self, namespace: &str, claim: &str) -> Option<&Volume> {
        self.volumes.get(&(namespace.to_owned(), claim.to_owned()))
    }

    /// Takes news in; says whether that changed anything.
    pub(super) fn hear(&mut self, event: Event<PersistentVolume>, driver: &str) -> bool {
        match event {
            Event::Init => {
                self.listed.clear();
                false
            }
            Event::InitApply(volume) => {
                self.listed.insert(volume.name_any());
                self.set(&volume, driver)
            }
            // What went while nobody watched is in no list.
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                let gone = self.bound.keys().filter(|name| !listed.contains(*name));
                let gone: Vec<_> = gone.cloned().collect();
                gone.iter().for_each(|name| self.remove(name));
                !gone.is_empty()
            }
            Event::Apply(volume) => self.set(&volume, driver),
            Event::Delete(volume) => {
                let name = volume.name_any();
                let was = self.bound.contains_key(&name);
                self.remove(&name);
                was
            }
        }
    }

    fn set(&mut self, volume: &PersistentVolume, driver: &str) -> bool {
        let name = volume.name_any();
        let found = claim(volume, driver).filter(|(_, volume)| volume.bytes() <= KEPT_MAX);
        let Some((claim, volume)) = found else {
            let was = self.bound.contains_key(&name);
            self.remove(&name);
            return was;
        };
        let same = self.bound.get(&name) == Some(&claim);
        if same && self.volumes.get(&claim) == Some(&volume) {
            return false;
        }
        self.remove(&name);
        self.bound.insert(name, claim.clone());
        self.volumes.insert(claim, volume);
        true
    }

    fn remove(&mut self, name: &str) {
        let Some(claim) = self.bound.remove(name) else {
            return;
        };
        // Another volume may be bound to it by now.
        if self
            .volumes
            .get(&claim)
            .is_some_and(|volume| volume.name == name)
        {
            self.volumes.remove(&claim);
        }
    }
}

/// Files of a model that somebody needs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Wish {
    pub model: ModelRef,
    pub patterns: Patterns,
}

/// Whoever has a wish.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Asker {
    pub namespace: String,
    /// It has a Secret of its own to read the model with.
    pub secret: bool,
}

impl Waiting {
    /// `None` for a pod that has nothing to do with us.
    pub(super) fn of(pod: &Pod, driver: &str) -> Option<Self> {
        let ours = |(key, _): &(&String, &String)| {
            [MODEL, SECRET].contains(&key.as_str()) || key.starts_with(OF_VOLUME)
        };
        let own = |(key, value): (&String, &String)| (key.clone(), value.trim().to_owned());
        let annotations: BTreeMap<_, _> = pod.annotations().iter().filter(ours).map(own).collect();
        let volumes = pod
            .spec
            .iter()
            .flat_map(|spec| spec.volumes.iter().flatten());
        let uses: Vec<_> = volumes
            .filter_map(|volume| {
                if let Some(claim) = &volume.persistent_volume_claim {
                    return Some(Use::Claim(claim.claim_name.clone()));
                }
                let csi = volume.csi.as_ref().filter(|csi| csi.driver == driver)?;
                Some(Use::Inline(Volume {
                    name: volume.name.clone(),
                    attributes: csi.volume_attributes.clone().unwrap_or_default(),
                    secret: csi.node_publish_secret_ref.is_some(),
                }))
            })
            .collect();
        let waiting = Self {
            name: pod.name_any(),
            namespace: pod.namespace().unwrap_or_default(),
            annotations,
            uses,
            wishes: Vec::new(),
        };
        let concerns = !waiting.uses.is_empty() || waiting.annotations.contains_key(MODEL);
        (concerns && waiting.bytes() <= KEPT_MAX).then_some(waiting)
    }

    fn bytes(&self) -> usize {
        let annotations = self.annotations.iter();
        let annotations = annotations.map(|(key, value)| key.len() + value.len());
        let uses = self.uses.iter().map(|one| match one {
            Use::Inline(volume) => volume.bytes(),
            Use::Claim(claim) => claim.len(),
        });
        annotations.chain(uses).sum()
    }

    /// Whether `claims` may change what it needs.
    pub(super) fn claims(&self) -> bool {
        self.uses.iter().any(|one| matches!(one, Use::Claim(_)))
    }

    /// What it needs.
    pub(super) fn wishes(&self) -> &[(Arc<Wish>, Asker)] {
        &self.wishes
    }

    /// Finds out what it needs. What names no model, or one of a node's own disk, is left to kubelet's events.
    pub(super) fn look_up(&mut self, claims: &Claims) {
        let volumes = self.uses.iter().filter_map(|one| match one {
            Use::Inline(volume) => Some(volume),
            Use::Claim(claim) => claims.get(&self.namespace, claim),
        });
        let mut any = false;
        let of_volumes = volumes.inspect(|_| any = true);
        let mut wishes: Vec<_> = of_volumes.filter_map(|one| self.wish(one)).collect();
        if !any {
            // Nobody gave it a volume yet: perhaps its image knows where to ask.
            let bare = Volume {
                secret: self.annotations.contains_key(SECRET),
                ..Volume::default()
            };
            wishes.extend(self.wish(&bare));
        }
        self.wishes = wishes;
    }

    /// As the plugin reads a volume: attributes win over annotations, the volume's own one over the pod's.
    fn wish(&self, volume: &Volume) -> Option<(Arc<Wish>, Asker)> {
        let attribute = |key: &str| {
            let text = volume.attributes.get(key)?.trim();
            (!text.is_empty()).then_some(text)
        };
        let own = format!("{OF_VOLUME}{}", volume.name);
        let annotations = [own.as_str(), MODEL].into_iter();
        let annotated = annotations.filter_map(|key| self.annotations.get(key));
        let annotated = annotated.map(String::as_str).find(|text| !text.is_empty());
        let source = attribute("source").or(annotated)?;
        let model = match attribute("revision") {
            Some(revision) => {
                let name = source.split_once('@').map_or(source, |(name, _)| name);
                format!("{name}@{revision}")
            }
            None => source.to_owned(),
        };
        let model: ModelRef = model.parse().ok()?;
        let globs = |key| globs(attribute(key).unwrap_or_default());
        let patterns = Patterns::new(globs("include"), globs("exclude")).ok()?;
        let asker = Asker {
            namespace: self.namespace.clone(),
            secret: volume.secret,
        };
        (model.scheme() != Scheme::File).then(|| (Arc::new(Wish { model, patterns }), asker))
    }
}

/// The claim that a volume of ours is bound to.
fn claim(volume: &PersistentVolume, driver: &str) -> Option<((String, String), Volume)> {
    let spec = volume.spec.as_ref()?;
    let csi = spec.csi.as_ref().filter(|csi| csi.driver == driver)?;
    let claim = spec.claim_ref.as_ref()?;
    let asked = Volume {
        name: volume.name_any(),
        attributes: csi.volume_attributes.clone().unwrap_or_default(),
        secret: csi.node_publish_secret_ref.is_some(),
    };
    Some(((claim.namespace.clone()?, claim.name.clone()?), asked))
}

/// Globs as the plugin reads them: separated by commas or white space; a comma between braces belongs to its glob.
fn globs(text: &str) -> Vec<String> {
    let mut depth = 0_u32;
    let parts = text.split(|c: char| {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c.is_whitespace() || (c == ',' && depth == 0)
    });
    let parts = parts.filter(|part| !part.is_empty());
    parts.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const DRIVER: &str = "csi.weightd.io";

    fn waiting(annotations: Value, volumes: Value) -> Option<Waiting> {
        let pod = json!({
            "metadata": { "name": "p", "namespace": "team-a", "annotations": annotations },
            "spec": { "containers": [], "volumes": volumes },
        });
        Waiting::of(&serde_json::from_value(pod).unwrap(), DRIVER)
    }

    fn wishes(waiting: &Waiting, claims: &Claims) -> Vec<(Arc<Wish>, Asker)> {
        let mut waiting = waiting.clone();
        waiting.look_up(claims);
        waiting.wishes().to_vec()
    }

    fn models(waiting: &Waiting, claims: &Claims) -> Vec<String> {
        let wishes = wishes(waiting, claims).into_iter();
        wishes.map(|(wish, _)| wish.model.to_string()).collect()
    }

    fn inline(name: &str, attributes: Value) -> Value {
        json!({ "name": name, "csi": { "driver": DRIVER, "volumeAttributes": attributes } })
    }

    #[test]
    fn attributes_win_over_annotations_and_the_volumes_own_over_the_pods() {
        let annotations =
            json!({ "weightd.io/model": "hf://org/all", "weightd.io/volume.b": "hf://org/b\n" });
        let volumes = json!([
            inline("a", json!({ "source": "hf://org/a", "revision": "v1" })),
            inline("b", json!(null)),
            inline("c", json!({ "include": "*.json,{a,b}.bin" })),
        ]);
        let pod = waiting(annotations, volumes).unwrap();

        assert_eq!(
            models(&pod, &Claims::default()),
            ["hf://org/a@v1", "hf://org/b", "hf://org/all"]
        );
        let (wish, asker) = &wishes(&pod, &Claims::default())[2];
        assert_eq!(wish.patterns.include(), ["*.json", "{a,b}.bin"]);
        assert_eq!(
            asker,
            &Asker {
                namespace: "team-a".into(),
                secret: false
            }
        );
    }

    #[test]
    fn a_pod_without_a_volume_is_known_by_its_annotation() {
        let annotations =
            json!({ "weightd.io/model": "hf://org/model", "weightd.io/secret": "token" });
        let pod = waiting(annotations, json!([])).unwrap();
        let wishes = wishes(&pod, &Claims::default());
        assert_eq!(wishes[0].0.model.to_string(), "hf://org/model");
        assert!(wishes[0].1.secret);
    }

    #[test]
    fn others_and_models_of_a_nodes_own_disk_are_nothing_to_fill() {
        let other =
            json!([{ "name": "x", "csi": { "driver": "other" } }, { "name": "y", "emptyDir": {} }]);
        assert_eq!(waiting(json!({ "app": "x" }), other), None);
        for model in ["org/model", "file:///models/x", ""] {
            let pod = waiting(json!({ "weightd.io/model": model }), json!([])).unwrap();
            assert!(models(&pod, &Claims::default()).is_empty(), "{model}");
        }
    }

    /// A volume of ours that is bound to the claim `c` of this namespace.
    fn persistent(name: &str, namespace: &str, source: &str) -> PersistentVolume {
        serde_json::from_value(json!({
            "metadata": { "name": name },
            "spec": {
                "csi": { "driver": DRIVER, "volumeHandle": "x", "volumeAttributes": { "source": source } },
                "claimRef": { "namespace": namespace, "name": "c" },
            },
        }))
        .unwrap()
    }

    fn claiming() -> Waiting {
        let volumes = json!([{ "name": "m", "persistentVolumeClaim": { "claimName": "c" } }]);
        waiting(json!({}), volumes).unwrap()
    }

    #[test]
    fn a_claim_is_followed_to_its_volume_once_that_is_known() {
        let pod = claiming();
        let mut claims = Claims::default();
        assert!(models(&pod, &claims).is_empty());

        let apply = |namespace| Event::Apply(persistent("pv", namespace, "s3://bucket/x"));
        claims.hear(apply("team-b"), DRIVER);
        assert!(
            models(&pod, &claims).is_empty(),
            "a claim of another namespace"
        );
        claims.hear(apply("team-a"), DRIVER);
        assert_eq!(models(&pod, &claims), ["s3://bucket/x"]);
        assert_eq!(
            claims.volumes.len(),
            1,
            "it is bound to one claim at a time"
        );
        assert_eq!(claim(&persistent("pv", "team-a", "x"), "other"), None);
    }

    #[test]
    fn a_volume_that_went_while_nobody_watched_is_forgotten() {
        let pod = claiming();
        let mut claims = Claims::default();
        for (name, model) in [("old", "hf://org/old"), ("new", "hf://org/new")] {
            claims.hear(Event::Apply(persistent(name, "team-a", model)), DRIVER);
        }
        assert_eq!(models(&pod, &claims), ["hf://org/new"]);

        claims.hear(Event::Init, DRIVER);
        claims.hear(
            Event::InitApply(persistent("new", "team-a", "hf://org/new")),
            DRIVER,
        );
        assert!(claims.hear(Event::InitDone, DRIVER), "`old` is gone");
        assert_eq!(models(&pod, &claims), ["hf://org/new"]);

        claims.hear(Event::Init, DRIVER);
        assert!(claims.hear(Event::InitDone, DRIVER));
        assert!(models(&pod, &claims).is_empty());
        assert!(claims.volumes.is_empty() && claims.bound.is_empty());
    }

    #[test]
    fn what_is_too_long_to_be_a_model_is_not_kept() {
        let long = "x".repeat(KEPT_MAX);
        let model = "hf://org/model";
        assert_eq!(
            waiting(json!({ "weightd.io/model": long }), json!([])),
            None
        );
        let volumes = json!([inline("m", json!({ "source": model, "include": long }))]);
        assert_eq!(waiting(json!({}), volumes), None);

        let others = json!({ "weightd.io/model": model, "weightd.io/note": long, "note": long });
        let pod = waiting(others, json!([])).unwrap();
        assert_eq!(models(&pod, &Claims::default()), [model]);
    }
}
