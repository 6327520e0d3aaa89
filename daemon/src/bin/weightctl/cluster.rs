//! `weightctl cluster`: which node has what, as the API server knows it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ListParams};
use kube::core::PartialObjectMeta;
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use weightd::kube::labels::PREFIX;
use weightd::kube::placement::label_key;
use weightd::kube::prefetch::{ModelPrefetch, NodePhase, NodeStatus};
use weightd_core::errors::Chain;
use weightd_core::model::ModelRef;
use weightd_kube::{Cause, Timeouts, connect_as_kubectl};

use crate::output::{self, Output, bytes, table};
use crate::progress::shorten;

const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    call: Duration::from_secs(30),
    idle: Duration::from_secs(30),
};

/// Nodes of one answer to a list.
///
/// Source: the page size of client-go's pager, `defaultPageSize`.
const NODES: u32 = 500;

/// The same for objects, each of which may tell of thousands of nodes.
const PREFETCHES: u32 = 10;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  weightctl cluster
  weightctl cluster hf://org/model
  weightctl cluster --node ip-10-0-1-7.ec2.internal
  weightctl cluster --kubeconfig ~/.kube/staging
  weightctl --output json cluster | jq '.prefetches[].nodes[] | select(.phase != \"Ready\")'
  weightctl --output json cluster | jq -r '.nodes[] | select(.models[\"hf.org.model\"]) | .name'

It reads ModelPrefetch objects and the labels of Nodes, so whoever may `list` these may run it. A Node has
labels for the models that it used last (16, see kubernetes.labels), and only for names that a label can have.
JSON: {prefetches: [{name, source, revision, pin, priority, summary, nodes: [{name, phase, revision, bytes,
bytesDone, message, updated, gone}]}], nodes: [{name, models: {LABEL: REVISION}}]}; gone: that node has left the
cluster, and nobody has removed what it said.")]
pub(crate) struct ClusterArgs {
    /// Only this model, at whatever revision
    #[arg(value_name = "MODEL")]
    model: Option<ModelRef>,
    /// Only what this node has and gets
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// How to reach the API server, instead of what kubectl would use here
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

/// What the API server knows.
#[derive(Debug, Serialize)]
struct Cluster {
    prefetches: Vec<Prefetch>,
    nodes: Vec<OneNode>,
}

#[derive(Debug, Serialize)]
struct Prefetch {
    name: String,
    source: String,
    revision: Option<String>,
    pin: bool,
    priority: i32,
    summary: Option<String>,
    nodes: Vec<Entry>,
}

/// What one node says of a `ModelPrefetch`.
#[derive(Debug, Serialize)]
struct Entry {
    #[serde(flatten)]
    said: NodeStatus,
    /// There is no such Node any more.
    gone: bool,
}

#[derive(Debug, Serialize)]
struct OneNode {
    name: String,
    /// By what follows the prefix of the label.
    models: BTreeMap<String, String>,
}

/// Asks, and prints what it learns.
pub(crate) async fn run(output: Output, args: &ClusterArgs) -> anyhow::Result<()> {
    let client = connect_as_kubectl(args.kubeconfig.as_deref(), TIMEOUTS).await;
    let client = client.map_err(|error| {
        let hint = error.hint().unwrap_or_default();
        anyhow!("{}\nhint: {hint}", Chain(&error))
    })?;
    let client = client.ok_or_else(|| {
        anyhow!(
            "which cluster? there is no ~/.kube/config, and this is no pod\n\
             hint: name a file with --kubeconfig or in KUBECONFIG, as for kubectl"
        )
    })?;
    let asked = tokio::time::timeout(TIMEOUTS.call, ask(&client)).await;
    let mut cluster = asked.map_err(|_| {
        let limit_s = TIMEOUTS.call.as_secs();
        anyhow!("the API server did not answer within {limit_s} s\nhint: does `kubectl get nodes` work here?")
    })??;
    narrow(&mut cluster, args);
    output.result(&cluster, text)
}

/// Leaves what the user asked for.
fn narrow(cluster: &mut Cluster, args: &ClusterArgs) {
    if let Some(wanted) = &args.model {
        let key = label_key(wanted);
        let key = key.as_deref().and_then(|key| key.strip_prefix(PREFIX));
        cluster
            .prefetches
            .retain(|prefetch| is_of(&prefetch.source, wanted));
        for node in &mut cluster.nodes {
            node.models.retain(|model, _| Some(model.as_str()) == key);
        }
    }
    if let Some(wanted) = &args.node {
        for prefetch in &mut cluster.prefetches {
            prefetch.nodes.retain(|entry| entry.said.name == *wanted);
        }
        cluster
            .prefetches
            .retain(|prefetch| !prefetch.nodes.is_empty());
        cluster.nodes.retain(|node| node.name == *wanted);
    }
    cluster.nodes.retain(|node| !node.models.is_empty());
}

fn is_of(source: &str, wanted: &ModelRef) -> bool {
    let source = source.parse::<ModelRef>();
    source.is_ok_and(|model| (model.scheme(), model.name()) == (wanted.scheme(), wanted.name()))
}

async fn ask(client: &Client) -> anyhow::Result<Cluster> {
    let nodes: Api<PartialObjectMeta<Node>> = Api::all(client.clone());
    let nodes = all(&nodes, NODES).await;
    let nodes = nodes.map_err(|error| refused("nodes", error))?;
    let prefetches: Api<ModelPrefetch> = Api::all(client.clone());
    let prefetches = match all(&prefetches, PREFETCHES).await {
        Ok(prefetches) => prefetches,
        Err(kube::Error::Api(status)) if status.code == 404 => {
            output::note(
                "there is no kind ModelPrefetch here: its CRD comes with the chart of weightd",
            );
            Vec::new()
        }
        Err(error) => return Err(refused("modelprefetches", error)),
    };
    let names: BTreeSet<String> = nodes.iter().map(ResourceExt::name_any).collect();
    let prefetches = prefetches.into_iter();
    Ok(Cluster {
        prefetches: prefetches.map(|it| prefetch(it, &names)).collect(),
        nodes: nodes.iter().filter_map(one_node).collect(),
    })
}

async fn all<K>(objects: &Api<K>, page: u32) -> Result<Vec<K>, kube::Error>
where
    K: Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let mut page = ListParams::default().limit(page);
    let mut all = Vec::new();
    loop {
        let found = objects.list(&page).await?;
        all.extend(found.items);
        page.continue_token = found.metadata.continue_.filter(|token| !token.is_empty());
        if page.continue_token.is_none() {
            return Ok(all);
        }
    }
}

fn refused(what: &str, error: kube::Error) -> anyhow::Error {
    let code = match &error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    };
    let hint = match code {
        401 => {
            "the API server does not know you: renew the credentials of your kubeconfig".to_owned()
        }
        403 => format!("ask who runs the cluster for the right to list {what}"),
        _ => "does `kubectl get nodes` work here?".to_owned(),
    };
    anyhow!("cannot list {what}: {}\nhint: {hint}", Cause::from(error))
}

/// `there` are the nodes of the cluster.
fn prefetch(object: ModelPrefetch, there: &BTreeSet<String>) -> Prefetch {
    let name = object.name_any();
    let status = object.status.unwrap_or_default();
    let entry = |said: NodeStatus| Entry {
        gone: !there.contains(&said.name),
        said,
    };
    let mut nodes: Vec<Entry> = status.nodes.into_iter().map(entry).collect();
    nodes.sort_by(|a, b| a.said.name.cmp(&b.said.name));
    Prefetch {
        name,
        source: object.spec.source,
        revision: object.spec.revision,
        pin: object.spec.pin,
        priority: object.spec.priority,
        summary: status.summary,
        nodes,
    }
}

/// A node that says in labels that it has models; `None` if it does not.
fn one_node(node: &PartialObjectMeta<Node>) -> Option<OneNode> {
    let models = node.labels().iter().filter_map(|(key, value)| {
        let model = key.strip_prefix(PREFIX)?;
        Some((model.to_owned(), value.clone()))
    });
    let models: BTreeMap<String, String> = models.collect();
    (!models.is_empty()).then(|| OneNode {
        name: node.name_any(),
        models,
    })
}

fn text(cluster: &Cluster) -> String {
    let mut rows = Vec::new();
    for prefetch in &cluster.prefetches {
        let model = match &prefetch.revision {
            Some(revision) => shorten(&format!("{}@{revision}", prefetch.source)),
            None => shorten(&prefetch.source),
        };
        if prefetch.nodes.is_empty() {
            let says = "no node has told of it yet";
            rows.push(row([&model, &prefetch.name, "-", "-", "-", "-", says]));
        }
        rows.extend(prefetch.nodes.iter().map(|entry| {
            let node = &entry.said;
            let revision = node.revision.as_deref().map_or("-".to_owned(), short);
            let (phase, says) = match entry.gone {
                true => ("Gone", "this node has left the cluster".to_owned()),
                false => (node.phase.as_str(), first_words(&node.message)),
            };
            row([
                &model,
                &prefetch.name,
                &node.name,
                phase,
                &done(node),
                &revision,
                &says,
            ])
        }));
    }
    for node in &cluster.nodes {
        for (model, revision) in &node.models {
            if !is_told(cluster, &node.name, model) {
                rows.push(row([
                    model,
                    "-",
                    &node.name,
                    "Ready",
                    "-",
                    &short(revision),
                    "by its label",
                ]));
            }
        }
    }
    if rows.is_empty() {
        return "no node says that it has a model, and no ModelPrefetch asks for one".to_owned();
    }
    rows.sort();
    rows.insert(
        0,
        row([
            "MODEL", "PREFETCH", "NODE", "PHASE", "DONE", "REVISION", "SAYS",
        ]),
    );
    table(&rows)
}

fn row(cells: [&str; 7]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// Whether a `ModelPrefetch` tells of the model that the node's label names.
fn is_told(cluster: &Cluster, node: &str, model: &str) -> bool {
    let key = format!("{PREFIX}{model}");
    cluster.prefetches.iter().any(|prefetch| {
        let source = prefetch.source.parse().ok();
        let same = source.and_then(|model| label_key(&model)).as_ref() == Some(&key);
        let mut there = prefetch.nodes.iter().map(|entry| &entry.said);
        same && there.any(|it| it.name == node && it.phase == NodePhase::Ready)
    })
}

fn done(node: &NodeStatus) -> String {
    let number = |bytes: Option<i64>| bytes.and_then(|bytes| u64::try_from(bytes).ok());
    match (number(node.bytes), number(node.bytes_done)) {
        (Some(all), _) if node.phase == NodePhase::Ready => bytes(all),
        (Some(all), Some(done)) if all > 0 => {
            format!(
                "{} % of {}",
                u128::from(done) * 100 / u128::from(all),
                bytes(all)
            )
        }
        _ => "-".to_owned(),
    }
}

fn short(revision: &str) -> String {
    revision.chars().take(12).collect()
}

/// As much as a line of a table bears; the JSON has it all.
fn first_words(message: &str) -> String {
    const LONGEST: usize = 100;
    match message.chars().count() > LONGEST {
        true => message.chars().take(LONGEST).chain(['…']).collect(),
        false => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cluster() -> Cluster {
        let object = |name: &str, source: &str, nodes: serde_json::Value| {
            let object = json!({
                "apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch",
                "metadata": { "name": name }, "spec": { "source": source },
                "status": { "summary": "1/2 ready", "nodes": nodes },
            });
            let there = ["node-a", "node-b", "node-c"].map(str::to_owned);
            prefetch(serde_json::from_value(object).unwrap(), &there.into())
        };
        let at = "2026-01-01T00:00:00Z";
        let revision = "0e9e39f249a16976918f6564b8830bc894c89659";
        let nodes = json!([
            { "name": "node-b", "phase": "Fetching", "bytes": 400, "bytesDone": 100, "updated": at,
              "message": "12.0 MiB/s, 3 min left" },
            { "name": "node-a", "phase": "Ready", "revision": revision, "bytes": 2048,
              "bytesDone": 2048, "updated": at },
            { "name": "node-x", "phase": "Ready", "revision": revision, "bytes": 2048,
              "bytesDone": 2048, "updated": at },
        ]);
        let labelled = |name: &str, model: &str| OneNode {
            name: name.to_owned(),
            models: BTreeMap::from([(model.to_owned(), revision.to_owned())]),
        };
        Cluster {
            prefetches: vec![
                object("chat", "hf://org/model", nodes),
                object("none", "s3://bucket/x", json!([])),
            ],
            nodes: vec![
                labelled("node-a", "hf.org.model"),
                labelled("node-c", "hf.org.other"),
            ],
        }
    }

    #[test]
    fn every_node_that_has_or_gets_a_model_has_a_line() {
        let expected = "\
MODEL           PREFETCH  NODE    PHASE     DONE           REVISION      SAYS
hf.org.other    -         node-c  Ready     -              0e9e39f249a1  by its label
hf://org/model  chat      node-a  Ready     2.0 KiB        0e9e39f249a1
hf://org/model  chat      node-b  Fetching  25 % of 400 B  -             12.0 MiB/s, 3 min left
hf://org/model  chat      node-x  Gone      2.0 KiB        0e9e39f249a1  this node has left the cluster
s3://bucket/x   none      -       -         -              -             no node has told of it yet
";

        assert_eq!(text(&cluster()), expected);
    }

    #[test]
    fn an_empty_cluster_is_no_empty_line() {
        let none = Cluster {
            prefetches: Vec::new(),
            nodes: Vec::new(),
        };

        assert!(text(&none).contains("no node says"), "{}", text(&none));
    }

    #[test]
    fn json_has_the_names_of_the_objects() {
        let value = serde_json::to_value(cluster()).unwrap();

        assert_eq!(value["prefetches"][0]["nodes"][0]["bytesDone"], 2048);
        let gone: Vec<_> = value["prefetches"][0]["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|node| &node["gone"])
            .collect();
        assert_eq!(gone, [false, false, true]);
        assert_eq!(value["nodes"][1]["name"], "node-c");
    }
}
