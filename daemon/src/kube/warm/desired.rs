//! Which models this node is to keep, by what its configuration, its Node and the cluster's objects say.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Deserialize;
use serde_json::Value;
use weightd_core::digest::Digest;
use weightd_core::fetch::FetchRequest;
use weightd_core::model::{ModelRef, Patterns, Scheme};
use weightd_core::store::Holder;

use crate::config::Kept;
use crate::kube::neighbour::{self, Neighbour};
use crate::kube::node::{NodeView, PREFETCH};
use crate::kube::prefetch::{ModelPrefetch, ModelPrefetchSpec, NodeStatus};

/// What the names of all holders begin with that pin for the warm set, but for those that the configuration names.
pub(super) const HOLDERS: &str = "warm.";
/// The same, for what the Node's annotation names.
pub(super) const OF_NODE: &str = "warm.node.";
/// The same, for objects.
pub(super) const OF_OBJECTS: &str = "warm.object.";
const OF_CONFIG: &str = "warm.config.";
/// The same, for marks.
const MARKS: &str = "warm.named.";

/// Where it is said.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// In the configuration: the how-manieth entry.
    Config(usize),
    /// In the Node's annotation: the text between two commas.
    Node(String),
    /// In the object of this name.
    Object(String),
}

/// A model that is to be here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// What is fetched. Its pin is the holder, also if that is to let go in the end: so nobody else makes this request.
    pub(super) request: FetchRequest,
    /// Hold it as long as it is wanted.
    pub(super) pin: bool,
    /// If the configuration names the holder, which may hold other things for other reasons: a second one that says
    /// what is held for this entry.
    pub(super) mark: Option<Holder>,
    pub(super) priority: i32,
    /// Read it into the page cache when it is here.
    pub(super) warm: bool,
}

impl Target {
    /// Who holds what is held for this, and nothing else.
    pub(super) fn own_holder(&self) -> Option<&Holder> {
        self.mark.as_ref().or(self.request.pin.as_ref())
    }
}

/// What one origin wants, or why that cannot be told.
pub(super) type Wish = Result<Target, String>;

/// An object as it is watched. Each of its parts is read by itself: what another version of weightd writes into one must
/// not cost this one the others.
#[derive(Resource, Debug, Clone, Deserialize)]
#[resource(inherit = ModelPrefetch)]
pub(in crate::kube) struct SlimObject {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
    #[serde(default)]
    status: Option<SlimStatus>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct SlimStatus {
    #[serde(default)]
    nodes: Vec<Value>,
}

/// An object as far as it is read.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kube) struct ObjectView {
    pub(super) uid: String,
    spec: Result<ModelPrefetchSpec, String>,
    /// What it says of this node.
    pub(super) own: Option<NodeStatus>,
    /// Of how many nodes its status tells.
    pub(super) nodes: usize,
    /// Whose entry we see to.
    pub(in crate::kube) before: Option<Neighbour>,
}

impl ObjectView {
    /// What is read of an object on the node of this name. The status of other nodes, which is most of it, is not kept.
    pub(in crate::kube) fn read(object: SlimObject, node: &str) -> Self {
        let spec = serde_json::from_value(object.spec);
        let nodes = object.status.unwrap_or_default().nodes;
        let own = nodes.iter().position(|entry| entry["name"] == node);
        Self {
            uid: object.metadata.uid.unwrap_or_default(),
            spec: spec.map_err(|error| format!("this version of weightd cannot read it: {error}")),
            own: own.and_then(|own| NodeStatus::deserialize(&nodes[own]).ok()),
            before: own.and_then(|own| neighbour::before(own, &nodes)),
            nodes: nodes.len(),
        }
    }

    /// What it wants of a node with these labels; `None` if it is for others.
    fn wish(&self, name: &str, labels: &BTreeMap<String, String>) -> Option<Wish> {
        let spec = match &self.spec {
            Ok(spec) => spec,
            Err(error) => return Some(Err(error.clone())),
        };
        match spec.selects(labels) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => return Some(Err(format!("its nodeSelector makes no sense: {error}"))),
        }
        let wanted = spec.wanted().map_err(|error| error.to_string());
        Some(wanted.map(|(model, patterns)| Target {
            request: FetchRequest {
                model,
                patterns,
                pin: Some(holder_of_object(name)),
            },
            pin: spec.pin,
            mark: None,
            priority: spec.priority,
            warm: spec.warm,
        }))
    }
}

/// What the configuration wants.
pub(super) fn of_config(kept: Vec<Kept>) -> BTreeMap<Origin, Wish> {
    let target = |Kept { request, warm }: Kept| match &request.pin {
        Some(named) => Target {
            mark: mark(named, &spelled(&request.model, &request.patterns)),
            request,
            pin: true,
            priority: 0,
            warm,
        },
        None => Target {
            request: FetchRequest {
                pin: Some(holder(
                    OF_CONFIG,
                    &spelled(&request.model, &request.patterns),
                )),
                ..request
            },
            pin: false,
            mark: None,
            priority: 0,
            warm,
        },
    };
    let wishes = kept.into_iter().map(|kept| Ok(target(kept)));
    (0..).map(Origin::Config).zip(wishes).collect()
}

/// What the Node's annotation wants.
pub(super) fn of_node(node: &NodeView) -> BTreeMap<Origin, Wish> {
    let texts: BTreeSet<&str> = node
        .prefetch
        .iter()
        .flat_map(|text| text.split(|c: char| c == ',' || c.is_whitespace()))
        .filter(|text| !text.is_empty())
        .collect();
    let one = |text: &str| (Origin::Node(text.to_owned()), of_text(text));
    texts.into_iter().map(one).collect()
}

fn of_text(text: &str) -> Wish {
    let model: ModelRef = text
        .parse()
        .map_err(|error| format!("in the annotation {PREFETCH}: {error}"))?;
    if model.scheme() == Scheme::File {
        return Err(format!(
            "in the annotation {PREFETCH}: `{text}` is on no node for sure, name models by hf:// or s3://"
        ));
    }
    Ok(Target {
        request: FetchRequest {
            pin: Some(holder(OF_NODE, text)),
            model,
            patterns: Patterns::default(),
        },
        pin: true,
        mark: None,
        priority: 0,
        warm: false,
    })
}

/// What the objects want of a node with these labels.
pub(super) fn of_objects(
    objects: &BTreeMap<String, ObjectView>,
    labels: &BTreeMap<String, String>,
) -> BTreeMap<Origin, Wish> {
    let wishes = objects.iter().filter_map(|(name, object)| {
        let wish = object.wish(name, labels)?;
        Some((Origin::Object(name.clone()), wish))
    });
    wishes.collect()
}

fn spelled(model: &ModelRef, patterns: &Patterns) -> String {
    let (include, exclude) = (patterns.include(), patterns.exclude());
    match include.is_empty() && exclude.is_empty() {
        true => model.to_string(),
        false => format!("{model} {include:?} {exclude:?}"),
    }
}

/// The holder of what the object of this name wants.
pub(super) fn holder_of_object(name: &str) -> Holder {
    holder(OF_OBJECTS, name)
}

/// The holder of what `text` names: readable where a holder's name can be that, and different for different texts.
fn holder(prefix: &str, text: &str) -> Holder {
    const LONGEST: usize = 128;
    let keep = |c: char| match c.is_ascii_alphanumeric() || "._-".contains(c) {
        true => c,
        false => '-',
    };
    let dotted = text.replace("://", ".").replace('/', ".");
    let mut name: String = dotted.chars().map(keep).collect();
    if name != text || prefix.len() + name.len() > LONGEST {
        let hash = Digest::of(text.as_bytes()).to_string();
        name = name.chars().take(60).collect();
        name = format!("{name}-{}", &hash[..12]);
    }
    Holder::operator(&format!("{prefix}{name}")).expect("its characters and length were seen to")
}

/// The mark of an entry of the configuration that names its holder. `None` if the name is too long to have one.
fn mark(named: &Holder, entry: &str) -> Option<Holder> {
    let hash = Digest::of(entry.as_bytes()).to_string();
    let name = named.as_str().strip_prefix("operator/")?;
    Holder::operator(&format!("{MARKS}{}.{name}", &hash[..12])).ok()
}

/// The holder that the configuration named, if `mark` is a mark.
pub(super) fn named(mark: &Holder) -> Option<Holder> {
    let (_, name) = mark
        .as_str()
        .strip_prefix("operator/")?
        .strip_prefix(MARKS)?
        .split_once('.')?;
    Holder::operator(name).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(annotation: &str) -> NodeView {
        NodeView {
            prefetch: Some(annotation.to_owned()),
            ..NodeView::default()
        }
    }

    fn object(spec: Value) -> ObjectView {
        let object = json!({
            "apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch",
            "metadata": { "name": "it", "uid": "u" }, "spec": spec,
            "status": { "nodes": [
                { "name": "other", "phase": "Ready", "updated": "2026-01-01T00:00:00Z" },
                { "name": "mine", "phase": "Pending", "updated": "2026-01-01T00:00:00Z" },
            ] },
        });
        ObjectView::read(serde_json::from_value(object).unwrap(), "mine")
    }

    fn wishes(spec: Value, labels: &[(&str, &str)]) -> Vec<Wish> {
        let objects = BTreeMap::from([("it".to_owned(), object(spec))]);
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let labels = labels.iter().map(own).collect();
        of_objects(&objects, &labels).into_values().collect()
    }

    #[test]
    fn an_annotation_names_models_between_commas_and_white_space() {
        let wanted = of_node(&node(" hf://org/a@v1,s3://bucket/b\n, hf://org/a@v1,"));

        let models: Vec<String> = wanted
            .values()
            .map(|wish| wish.as_ref().unwrap().request.model.to_string())
            .collect();
        assert_eq!(models, ["hf://org/a@v1", "s3://bucket/b"]);
        let holders: BTreeSet<_> = wanted
            .values()
            .map(|wish| wish.as_ref().unwrap().request.pin.clone().unwrap())
            .collect();
        assert_eq!(holders.len(), 2, "{holders:?}");
        assert!(of_node(&NodeView::default()).is_empty());
    }

    #[test]
    fn a_typo_in_an_annotation_spoils_only_itself() {
        let wanted = of_node(&node("hf:/org/a, hf://org/b, file:///models/c"));

        let failed: Vec<&String> = wanted
            .values()
            .filter_map(|wish| wish.as_ref().err())
            .collect();
        assert_eq!(wanted.len(), 3);
        assert_eq!(failed.len(), 2, "{failed:?}");
        assert!(
            failed.iter().all(|text| text.contains(PREFETCH)),
            "{failed:?}"
        );
    }

    #[test]
    fn an_object_is_for_the_nodes_that_it_selects() {
        let spec = json!({
            "source": "hf://org/model", "priority": 7, "pin": false, "warm": true,
            "nodeSelector": { "matchLabels": { "gpu": "h100" } },
        });

        assert_eq!(wishes(spec.clone(), &[("gpu", "a100")]), []);
        let found = wishes(spec, &[("gpu", "h100")]);

        let target = found[0].as_ref().unwrap();
        assert_eq!((target.priority, target.pin, target.warm), (7, false, true));
        let holder = target.request.pin.as_ref().unwrap();
        assert_eq!(holder.as_str(), "operator/warm.object.it");
    }

    #[test]
    fn an_object_that_makes_no_sense_is_a_failure_of_its_own() {
        for (spec, words) in [
            (json!({ "source": "hf://a/b/c" }), "org/name"),
            (json!({ "sauce": "hf://org/model" }), "cannot read it"),
            (
                json!({ "source": "hf://org/model", "include": ["["] }),
                "pattern",
            ),
        ] {
            let error = wishes(spec.clone(), &[])[0].clone().unwrap_err();
            assert!(error.contains(words), "{spec}: {error}");
        }
    }

    #[test]
    fn of_the_status_only_our_own_part_is_kept() {
        let view = object(json!({ "source": "hf://org/model" }));

        assert_eq!(view.nodes, 2);
        assert_eq!(view.own.expect("it is there").name, "mine");
    }

    #[test]
    fn what_another_version_says_of_other_nodes_spoils_nothing() {
        let object = json!({
            "metadata": { "name": "it" }, "spec": { "source": "hf://org/model", "later": 1 },
            "status": { "later": {}, "nodes": [
                { "name": "other", "phase": "Thawing", "updated": "2036-01-01T00:00:00Z" },
                { "name": "mine", "phase": "Ready", "updated": "2026-01-01T00:00:00Z", "later": [] },
            ] },
        });

        let view = ObjectView::read(serde_json::from_value(object).unwrap(), "mine");

        assert!(view.wish("it", &BTreeMap::new()).unwrap().is_ok());
        assert_eq!((view.own.unwrap().name.as_str(), view.nodes), ("mine", 2));
    }

    #[test]
    fn an_object_that_cannot_be_read_still_says_what_it_says_of_us() {
        let view = object(json!({ "sauce": "hf://org/model" }));

        assert!(view.own.is_some());
    }

    #[test]
    fn holders_stay_apart_and_within_their_bounds() {
        let long = "x".repeat(250);
        let names = [
            holder(OF_NODE, "hf://org/a"),
            holder(OF_NODE, "hf:--org-a"),
            holder(OF_OBJECTS, &long),
            holder(OF_OBJECTS, &format!("{long}y")),
        ];
        assert_eq!(BTreeSet::from(names.clone()).len(), 4, "{names:?}");
    }

    #[test]
    fn what_the_configuration_pins_keeps_its_name() {
        let request = |pin: Option<&str>| Kept {
            request: FetchRequest {
                model: "hf://org/model".parse().unwrap(),
                patterns: Patterns::default(),
                pin: pin.map(|name| Holder::operator(name).unwrap()),
            },
            warm: pin.is_some(),
        };
        let wanted = of_config(vec![request(Some("serving")), request(None)]);

        let of = |n| wanted[&Origin::Config(n)].clone().unwrap();
        let serving = of(0).request.pin.unwrap();
        assert_eq!(serving.as_str(), "operator/serving");
        assert!(of(0).pin && of(0).warm && !of(1).warm);
        assert_eq!(named(&of(0).mark.unwrap()), Some(serving));
        assert!(!of(1).pin && of(1).request.pin.unwrap().as_str().contains("warm.config."));
    }
}
