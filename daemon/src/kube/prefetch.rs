//! `ModelPrefetch`: a model that nodes are to keep, as an object of the cluster.
//!
//! `deploy/chart/crds/modelprefetch.yaml` is made from these types: `UPDATE=1 cargo test -p weightd --test crd`
//! writes it anew.

#![allow(
    unreachable_pub,
    reason = "the derive for schemas makes copies of these types where nobody sees them"
)]
#![allow(
    clippy::duplicated_attributes,
    reason = "two columns of one type are no duplicates"
)]

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use kube::core::{ParseExpressionError, Selector, SelectorExt};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use weightd_core::model::{ModelRef, Patterns};

/// Most nodes that the status of one object tells of: 2,000.
///
/// Source: about 650 bytes for each, entry and managed fields, and etcd's limit of 1.5 MiB a request.
pub const NODES_MAX: usize = 2000;

/// What nodes are to keep.
// These words are those of `kubectl explain`.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "weightd.io",
    version = "v1alpha1",
    kind = "ModelPrefetch",
    plural = "modelprefetches",
    shortname = "mpf",
    status = "ModelPrefetchStatus",
    derive = "PartialEq",
    doc = "A model that nodes fetch before any pod asks for it. Nodes that match let go of it when the object is deleted.",
    printcolumn(name = "Source", type_ = "string", json_path = ".spec.source"),
    printcolumn(name = "Revision", type_ = "string", json_path = ".spec.revision"),
    printcolumn(name = "Priority", type_ = "integer", json_path = ".spec.priority"),
    printcolumn(
        name = "Pin",
        type_ = "boolean",
        json_path = ".spec.pin",
        priority = "1"
    ),
    printcolumn(
        name = "Summary",
        type_ = "string",
        json_path = ".status.summary",
        description = "How many of the nodes have it"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.revision) || !self.source.contains('@')")
    .message("the revision is given twice: leave out `revision`, or the part of `source` from its @ on")
    .field_path(".revision"))]
#[x_kube(validation = Rule::new("!has(self.revision) || !self.source.startsWith('s3://') || self.revision.matches('^[0-9a-f]{64}$')")
    .message("a revision of an s3:// source is the 64 hex digits of an earlier prefetch: leave it out to take what is there")
    .field_path(".revision"))]
pub struct ModelPrefetchSpec {
    /// The model: hf://org/name or s3://bucket/prefix, with @ and a revision after it, or the revision in its own field.
    #[schemars(
        length(min = 6, max = 1400),
        regex(
            pattern = r"^(hf://[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?(@[^@\s]+)?|s3://[a-z0-9.-]{3,63}(/[^@]*)?(@[0-9a-f]{64})?)$"
        )
    )]
    pub source: String,
    /// Which revision, unless source names one: a branch, tag or commit for hf, the 64 hex digits of an earlier
    /// prefetch for s3. One that can move is resolved when a daemon starts and when this spec changes.
    #[schemars(
        with = "String",
        length(min = 1, max = 200),
        regex(pattern = r"^[^@\s]+$")
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Take only files that match one of these globs, instead of what a loader of safetensors needs. * matches / too.
    #[schemars(length(max = 64), inner(length(min = 1, max = 512)))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Leave out files that match one of these globs.
    #[schemars(length(max = 64), inner(length(min = 1, max = 512)))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// On which nodes, by their labels. Left out: on all that run weightd.
    #[schemars(with = "NodeSelector")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<NodeSelector>,
    /// Hold it against eviction as long as this object is there. If false it is fetched once, and goes like any other
    /// model when room is needed.
    #[serde(default = "yes")]
    pub pin: bool,
    /// What a node fetches first, if it is to fetch several: the higher number.
    #[serde(default)]
    pub priority: i32,
    /// Read it into the page cache of the node when it is there, as far as `warm.max_memory_percent` of the daemon's
    /// configuration allows. Pods do not wait for that.
    #[serde(default)]
    pub warm: bool,
}

fn yes() -> bool {
    true
}

/// Which nodes. All conditions must hold; none at all match every node.
#[derive(JsonSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelector {
    /// Labels that the node has, with their values.
    #[schemars(extend("maxProperties" = 32))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// Conditions on labels of the node.
    #[schemars(length(max = 32))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<NodeExpression>,
}

/// A condition on one label of a node.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(
        "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 : !has(self.values) || size(self.values) == 0")
    .message("`values` go with In and NotIn, which need at least one, and with no other operator"))]
pub struct NodeExpression {
    /// The label's key.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// How the label is compared.
    pub operator: NodeOperator,
    /// What it is compared with, for In and NotIn.
    #[schemars(length(max = 64), inner(length(max = 63)))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// How a label is compared.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the words of Kubernetes")]
pub enum NodeOperator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

/// How far the nodes are.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelPrefetchStatus {
    /// How many of the nodes have it, such as "3/4 ready".
    #[schemars(with = "String", length(max = 256))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Each node that matches, as its own daemon sees it.
    #[schemars(length(max = NODES_MAX))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".to_owned()]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeStatus>,
}

/// How far one node is.
#[derive(JsonSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// The Node's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Pending: not begun. Fetching: under way. Ready: all files are there, verified. Waiting: for room or for the origin,
    /// goes on by itself. Failed: somebody has to do something, message says what.
    pub phase: NodePhase,
    /// What the source resolved to.
    #[schemars(with = "String", length(max = 64))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Bytes of the model, once they are known.
    #[schemars(with = "i64", range(min = 0))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// Bytes of it that are on the node.
    #[schemars(with = "i64", range(min = 0))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_done: Option<i64>,
    /// More about the phase, for people.
    #[schemars(length(max = 1024))]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// When this was written.
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub updated: Timestamp,
}

/// Where a node is with a model.
#[derive(
    JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[allow(missing_docs, reason = "the field's words say it")]
pub enum NodePhase {
    Pending,
    Fetching,
    Ready,
    Failed,
    Waiting,
}

/// Why a node cannot tell what an object asks for.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Its source and revision name no model.
    #[error(transparent)]
    Model(#[from] weightd_core::model::ParseModelError),
    /// They do, but one that no cluster can share.
    #[error("a ModelPrefetch names a model by hf:// or s3://, not `{0}`")]
    Scheme(String),
    /// The revision stands in two places.
    #[error("the revision is given twice: leave out `revision`, or what follows the @ of `source`")]
    Twice,
    /// Its globs are none.
    #[error(transparent)]
    Pattern(#[from] weightd_core::model::PatternError),
}

impl NodePhase {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Fetching,
        Self::Ready,
        Self::Failed,
        Self::Waiting,
    ];

    /// As it stands in the object, and in tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Fetching => "Fetching",
            Self::Ready => "Ready",
            Self::Failed => "Failed",
            Self::Waiting => "Waiting",
        }
    }
}

impl ModelPrefetchSpec {
    /// The model and the files of it that are asked for.
    ///
    /// # Errors
    ///
    /// [`SpecError`]: an object may be older than the schema, or its text one that a pattern does not tell from a good one.
    pub fn wanted(&self) -> Result<(ModelRef, Patterns), SpecError> {
        let model: ModelRef = match &self.revision {
            Some(_) if self.source.contains('@') => return Err(SpecError::Twice),
            Some(revision) => format!("{}@{revision}", self.source).parse()?,
            None => self.source.parse()?,
        };
        if model.scheme() == weightd_core::model::Scheme::File {
            return Err(SpecError::Scheme(model.to_string()));
        }
        let patterns = Patterns::new(self.include.clone(), self.exclude.clone())?;
        Ok((model, patterns))
    }

    /// Whether a node with these labels is to have it.
    ///
    /// # Errors
    ///
    /// [`ParseExpressionError`] for a condition that the schema does not let pass.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> Result<bool, ParseExpressionError> {
        let Some(selector) = self.node_selector.clone() else {
            return Ok(true);
        };
        let selector = Selector::try_from(LabelSelector::from(selector))?;
        Ok(selector.matches(labels))
    }
}

impl From<NodeSelector> for LabelSelector {
    fn from(selector: NodeSelector) -> Self {
        let expression = |expression: NodeExpression| LabelSelectorRequirement {
            key: expression.key,
            operator: match expression.operator {
                NodeOperator::In => "In",
                NodeOperator::NotIn => "NotIn",
                NodeOperator::Exists => "Exists",
                NodeOperator::DoesNotExist => "DoesNotExist",
            }
            .to_owned(),
            values: Some(expression.values),
        };
        let expressions = selector.match_expressions.into_iter().map(expression);
        Self {
            match_labels: Some(selector.match_labels),
            match_expressions: Some(expressions.collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(value: serde_json::Value) -> ModelPrefetchSpec {
        serde_json::from_value(value).expect("a spec")
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(own).collect()
    }

    #[test]
    fn what_is_left_out_has_the_defaults_of_the_schema() {
        let spec = spec(json!({ "source": "hf://org/model" }));

        assert!(spec.pin && spec.priority == 0 && !spec.warm);
        let (model, patterns) = spec.wanted().expect("a model");
        assert_eq!(model.to_string(), "hf://org/model");
        assert_eq!(patterns, Patterns::default());
        assert!(spec.selects(&BTreeMap::new()).expect("no selector"));
    }

    #[test]
    fn a_revision_stands_in_one_place() {
        let one = spec(json!({ "source": "hf://org/model", "revision": "v1" }));
        assert_eq!(
            one.wanted().expect("a model").0.to_string(),
            "hf://org/model@v1"
        );

        let two = spec(json!({ "source": "hf://org/model@v2", "revision": "v1" }));
        let error = two.wanted().expect_err("took both").to_string();
        assert!(error.contains("given twice"), "{error}");
    }

    #[test]
    fn what_names_no_model_of_the_cluster_is_refused() {
        for (source, words) in [
            ("hf://a/b/c", "org/name"),
            ("file:///models/x", "hf:// or s3://"),
            ("org/model", "hf://"),
        ] {
            let error = spec(json!({ "source": source }))
                .wanted()
                .expect_err(source)
                .to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn nodes_are_chosen_by_labels_and_conditions() {
        let spec = spec(json!({ "source": "hf://org/model", "nodeSelector": {
            "matchLabels": { "pool": "gpu" },
            "matchExpressions": [
                { "key": "zone", "operator": "In", "values": ["a", "b"] },
                { "key": "old", "operator": "DoesNotExist" },
            ],
        } }));
        for (node, expected) in [
            (&[("pool", "gpu"), ("zone", "a")][..], true),
            (&[("pool", "gpu"), ("zone", "c")], false),
            (&[("pool", "gpu"), ("zone", "a"), ("old", "")], false),
            (&[("zone", "a")], false),
        ] {
            assert_eq!(
                spec.selects(&labels(node)).expect("sound"),
                expected,
                "{node:?}"
            );
        }
    }
}
