//! Which models a pod will need, from what its author and the volumes' objects say.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use kube::ResourceExt;
use weightd_core::model::{ModelRef, Patterns, Scheme};

const MODEL: &str = "weightd.io/model";
const SECRET: &str = "weightd.io/secret";
const OURS: &str = "weightd.io/";

/// What is kept of a pod. All else of it is let go at once: there may be thousands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Waiting {
    pub name: String,
    pub namespace: String,
    annotations: BTreeMap<String, String>,
    uses: Vec<Use>,
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

/// The volumes of ours that claims stand for, by the claim's namespace and name.
pub(super) type Claims = HashMap<(String, String), Volume>;

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
        let ours = |(key, _): &(&String, &String)| key.starts_with(OURS);
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
        (!uses.is_empty() || annotations.contains_key(MODEL)).then(|| Self {
            name: pod.name_any(),
            namespace: pod.namespace().unwrap_or_default(),
            annotations,
            uses,
        })
    }

    /// What it needs. What names no model, or one of a node's own disk, is left to kubelet's events.
    pub(super) fn wishes(&self, claims: &Claims) -> Vec<(Wish, Asker)> {
        let volumes = self.uses.iter().filter_map(|one| match one {
            Use::Inline(volume) => Some(volume),
            Use::Claim(claim) => claims.get(&(self.namespace.clone(), claim.clone())),
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
        wishes
    }

    /// As the plugin reads a volume: attributes win over annotations, the volume's own one over the pod's.
    fn wish(&self, volume: &Volume) -> Option<(Wish, Asker)> {
        let attribute = |key: &str| {
            let text = volume.attributes.get(key)?.trim();
            (!text.is_empty()).then_some(text)
        };
        let own = format!("weightd.io/volume.{}", volume.name);
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
        (model.scheme() != Scheme::File).then_some((Wish { model, patterns }, asker))
    }
}

/// The claim that a volume of ours is bound to.
pub(super) fn claim(volume: &PersistentVolume, driver: &str) -> Option<((String, String), Volume)> {
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

    fn models(waiting: &Waiting, claims: &Claims) -> Vec<String> {
        let wishes = waiting.wishes(claims).into_iter();
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
            models(&pod, &Claims::new()),
            ["hf://org/a@v1", "hf://org/b", "hf://org/all"]
        );
        let (wish, asker) = &pod.wishes(&Claims::new())[2];
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
        let wishes = pod.wishes(&Claims::new());
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
            assert!(pod.wishes(&Claims::new()).is_empty(), "{model}");
        }
    }

    #[test]
    fn a_claim_is_followed_to_its_volume_once_that_is_known() {
        let pod = waiting(
            json!({}),
            json!([{ "name": "m", "persistentVolumeClaim": { "claimName": "c" } }]),
        )
        .unwrap();
        let mut claims = Claims::new();
        assert!(models(&pod, &claims).is_empty());

        let volume = |namespace: &str| -> PersistentVolume {
            serde_json::from_value(json!({
                "metadata": { "name": "pv" },
                "spec": {
                    "csi": { "driver": DRIVER, "volumeHandle": "x", "volumeAttributes": { "source": "s3://bucket/x" } },
                    "claimRef": { "namespace": namespace, "name": "c" },
                },
            }))
            .unwrap()
        };
        claims.extend(claim(&volume("team-b"), DRIVER));
        assert!(
            models(&pod, &claims).is_empty(),
            "a claim of another namespace"
        );
        claims.extend(claim(&volume("team-a"), DRIVER));
        assert_eq!(models(&pod, &claims), ["s3://bucket/x"]);
        assert_eq!(claim(&volume("team-a"), "other"), None);
    }
}
