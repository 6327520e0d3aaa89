//! What the API server says of this node, asked as the daemon asks it.

use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::CSINode;
use kube::Client;
use kube::api::{Api, ListParams, PostParams};
use kube::core::DeserializeGuard;
use weightd::config::KubernetesSection;
use weightd::kube::prefetch::{ModelPrefetch, NodePhase};
use weightd::kube::taint::{WARMING, startup_key};
use weightd_core::errors::Chain;
use weightd_kube::{Cause, Timeouts};

use super::{Finding, PATIENCE};

/// The check of the Node, and of all if none of them can be made.
const NODE: &str = "kubernetes";
const DRIVER: &str = "kubernetes-driver";
const WARM_SET: &str = "kubernetes-warm-set";
const RIGHTS: &str = "kubernetes-rights";

const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(3),
    call: PATIENCE,
    idle: PATIENCE,
};

/// Objects of one answer to a list: each may tell of thousands of nodes.
const PAGE: u32 = 10;

/// What daemon and plugin do through the API server: verb, group, resource, subresource.
const NEEDED: [(&str, &str, &str, &str); 11] = [
    ("get", "", "pods", ""),
    ("list", "", "pods", ""),
    ("watch", "", "pods", ""),
    ("watch", "", "nodes", ""),
    ("patch", "", "nodes", ""),
    ("watch", "storage.k8s.io", "csinodes", ""),
    ("create", "events.k8s.io", "events", ""),
    ("patch", "", "events", ""),
    ("list", "weightd.io", "modelprefetches", ""),
    ("watch", "weightd.io", "modelprefetches", ""),
    ("patch", "weightd.io", "modelprefetches", "status"),
];

const MEND_RIGHTS: &str = "install the chart's ClusterRole of the same version as the image";

/// Asks the API server of `section`, as the Node that it or NODE_NAME names.
pub(super) async fn check(section: &KubernetesSection) -> Vec<Finding> {
    let name = section.node.clone();
    let Some(name) = name.or_else(|| std::env::var("NODE_NAME").ok()) else {
        let found = "not asked: neither `kubernetes.node` nor NODE_NAME names this machine's Node";
        return vec![Finding::ok(NODE, found)];
    };
    let client = match weightd_kube::connect(section.kubeconfig.as_deref(), TIMEOUTS).await {
        Ok(Some(client)) => client,
        Ok(None) => {
            let found =
                "no way to the API server: this is no pod, and `kubernetes.kubeconfig` is not set";
            let hint = "run this in the daemon's container, with `kubectl exec`, or set `kubernetes.kubeconfig`";
            return vec![Finding::error(NODE, found, hint)];
        }
        Err(error) => {
            let hint = error.hint().unwrap_or_default();
            return vec![Finding::error(NODE, Chain(&error).to_string(), hint)];
        }
    };
    let nodes: Api<Node> = Api::all(client.clone());
    let node = match in_time(nodes.get(&name)).await {
        Ok(found) => node(&found, section),
        Err(Refusal { code: 404, .. }) => {
            let found = format!("there is no Node `{name}`");
            let hint = "`kubernetes.node`, --node-name or NODE_NAME has to be the name of this machine's Node";
            return vec![Finding::error(NODE, found, hint)];
        }
        Err(refusal) if refusal.code == 403 => refusal.finding(NODE, "get nodes"),
        // What has no answer has none for the other questions either.
        Err(refusal) => return vec![refusal.finding(NODE, "get this Node")],
    };
    let (driver, warm_set, rights) = tokio::join!(
        driver(&client, &name, &section.driver),
        warm_set(&client, &name, section.warm_set),
        rights(&client),
    );
    vec![node, driver, warm_set, rights]
}

/// Why a call brought nothing.
struct Refusal {
    /// HTTP's; 0 if there was no answer.
    code: u16,
    why: String,
}

impl Refusal {
    fn finding(&self, check: &'static str, what: &str) -> Finding {
        let found = format!("cannot {what}: {}", self.why);
        let hint = match self.code {
            401 => {
                "the API server does not know this account: is its token, or that of the kubeconfig, still valid?"
            }
            403 => MEND_RIGHTS,
            _ => {
                "see whether this machine reaches the API server: a NetworkPolicy, DNS, a firewall"
            }
        };
        Finding::error(check, found, hint)
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Refusal> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => {
            let code = match &error {
                kube::Error::Api(status) => status.code,
                _ => 0,
            };
            let why = Cause::from(error).to_string();
            Err(Refusal { code, why })
        }
        Err(_) => {
            let why = format!("no answer within {} s", PATIENCE.as_secs());
            Err(Refusal { code: 0, why })
        }
    }
}

/// What keeps pods away from the node, as far as it has to do with us.
fn node(found: &Node, section: &KubernetesSection) -> Finding {
    let name = found.metadata.name.clone().unwrap_or_default();
    let taints = found
        .spec
        .iter()
        .flat_map(|spec| spec.taints.iter().flatten());
    let has = |key: &str| taints.clone().any(|taint| taint.key == key);
    let conditions = found
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    let is = |kind: &str, status: &str| {
        let mut conditions = conditions.clone();
        conditions.any(|condition| condition.type_ == kind && condition.status == status)
    };
    let startup = startup_key(&section.driver);
    if has(&startup) {
        let hint = match section.startup_taint {
            true => {
                "the daemon removes it when kubelet has registered the driver: see the next finding"
            }
            false => "`kubernetes.startup_taint` is false, so somebody else has to remove it",
        };
        return Finding::warn(NODE, format!("Node `{name}` has the taint {startup}"), hint);
    }
    if is("DiskPressure", "True") {
        let found = format!(
            "Node `{name}` is under DiskPressure: kubelet evicts pods and takes no new ones"
        );
        let hint = "free room on kubelet's disk; if the store is on the same one, lower `store.high_watermark_percent` or \
                    set `store.max_bytes`";
        return Finding::warn(NODE, found, hint);
    }
    if has(WARMING) {
        let found = format!("Node `{name}` has the taint {WARMING}: its warm set is not complete");
        let hint = "the daemon removes it when the warm set is here, or after `kubernetes.warming_timeout`";
        return Finding::warn(NODE, found, hint);
    }
    if !is("Ready", "True") {
        let hint = "see `kubectl describe node`: no pod starts here until that is mended";
        return Finding::warn(NODE, format!("Node `{name}` is not ready"), hint);
    }
    Finding::ok(
        NODE,
        format!("the API server answers, and Node `{name}` is ready"),
    )
}

/// Whether kubelet has registered the driver.
async fn driver(client: &Client, node: &str, driver: &str) -> Finding {
    let nodes: Api<CSINode> = Api::all(client.clone());
    let listed = match in_time(nodes.get(node)).await {
        Ok(found) => found
            .spec
            .drivers
            .iter()
            .any(|listed| listed.name == driver),
        Err(Refusal { code: 404, .. }) => false,
        Err(refusal) => return refusal.finding(DRIVER, "get csinodes"),
    };
    if listed {
        return Finding::ok(DRIVER, format!("kubelet has registered {driver}"));
    }
    Finding::error(
        DRIVER,
        format!("kubelet has not registered {driver}: pods cannot mount models here"),
        "see the logs of plugin and node-driver-registrar; usually `kubelet.dir` of the chart is not kubelet's directory",
    )
}

/// How far this node is with the models that the cluster wants on it.
async fn warm_set(client: &Client, node: &str, kept: bool) -> Finding {
    if !kept {
        return Finding::ok(WARM_SET, "not kept, as `kubernetes.warm_set` says");
    }
    // One that this version cannot read is none of its business.
    let objects: Api<DeserializeGuard<ModelPrefetch>> = Api::all(client.clone());
    let mut page = ListParams::default().limit(PAGE);
    let (mut ready, mut all, mut trouble) = (0, 0, Vec::new());
    loop {
        let found = match in_time(objects.list(&page)).await {
            Ok(found) => found,
            Err(Refusal { code: 404, .. }) => {
                let hint = "install the CRD of the chart: `kubectl apply -f deploy/chart/crds`";
                return Finding::warn(
                    WARM_SET,
                    "there is no kind ModelPrefetch in this cluster",
                    hint,
                );
            }
            Err(refusal) => return refusal.finding(WARM_SET, "list modelprefetches"),
        };
        for object in found.items.into_iter().filter_map(|object| object.0.ok()) {
            let name = object.metadata.name.unwrap_or_default();
            let entries = object.status.unwrap_or_default().nodes;
            for entry in entries.iter().filter(|entry| entry.name == node) {
                all += 1;
                match entry.phase {
                    NodePhase::Ready => ready += 1,
                    NodePhase::Failed | NodePhase::Waiting => {
                        trouble.push(format!(
                            "{name}: {}: {}",
                            entry.phase.as_str(),
                            entry.message
                        ));
                    }
                    NodePhase::Pending | NodePhase::Fetching => {}
                }
            }
        }
        page.continue_token = found.metadata.continue_.filter(|token| !token.is_empty());
        if page.continue_token.is_none() {
            break;
        }
    }
    let found =
        format!("{ready} of {all} models that ModelPrefetch objects want on this node are here");
    if trouble.is_empty() {
        return Finding::ok(WARM_SET, found);
    }
    let hint = "`Waiting` goes on by itself when there is room or the origin is back; `Failed` has to be mended in the \
                object or at the origin";
    Finding::warn(WARM_SET, format!("{found}; {}", trouble.join("; ")), hint)
}

/// Whether this account may do what daemon and plugin do.
async fn rights(client: &Client) -> Finding {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let asked = NEEDED.map(|(verb, group, resource, subresource)| {
        let review = review(verb, group, resource, subresource);
        let reviews = reviews.clone();
        async move {
            let answer = in_time(reviews.create(&PostParams::default(), &review)).await?;
            let allowed = answer.status.is_some_and(|status| status.allowed);
            let dot = if group.is_empty() { "" } else { "." };
            let slash = if subresource.is_empty() { "" } else { "/" };
            Ok((!allowed).then(|| format!("{verb} {resource}{dot}{group}{slash}{subresource}")))
        }
    });
    let answers: Result<Vec<Option<String>>, Refusal> = join_all(asked).await.into_iter().collect();
    let lacking: Vec<String> = match answers {
        Ok(answers) => answers.into_iter().flatten().collect(),
        Err(refusal) => {
            let found = format!("cannot be seen: {}", refusal.why);
            let hint = "`kubectl auth can-i --list --as=system:serviceaccount:NAMESPACE:ACCOUNT` shows them";
            return Finding::warn(RIGHTS, found, hint);
        }
    };
    if lacking.is_empty() {
        return Finding::ok(RIGHTS, "this account has all that daemon and plugin need");
    }
    let found = format!("this account may not {}", lacking.join(", "));
    Finding::error(RIGHTS, found, MEND_RIGHTS)
}

fn review(verb: &str, group: &str, resource: &str, subresource: &str) -> SelfSubjectAccessReview {
    let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                verb: text(verb),
                group: text(group),
                resource: text(resource),
                subresource: text(subresource),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    }
}
