//! A node of a cluster, against a small API server on loopback.

use std::ops::Range;
use std::sync::Mutex;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use jiff::Timestamp;
use serde_json::{Value, json};
use tempfile::TempDir;
use weightd_core::digest::{Claims, Digest};
use weightd_core::fetch::{FetchLimits, FetchRequest};
use weightd_core::model::{ModelRef, Patterns, RelPath, Revision};
use weightd_core::source::{
    ByteStream, LeftOut, Listing, RemoteFile, Source, SourceError, Sources, Vouched,
};
use weightd_core::store::{Holder, Store, StoreLimits};
use weightd_core::warm::WarmLimits;

use super::taint::WARMING;
use super::*;
use crate::config::Span;

pub(super) mod server;

use server::{CSI_NODES, NODES, OBJECTS, Server};

/// Models of one small file. `hf://org/slow` never comes to an end, `hf://org/none` does not exist.
#[derive(Default)]
struct Models {
    /// What `main` stands for, in the order of the questions; the last one stays.
    revisions: Mutex<Vec<char>>,
}

struct Model(ModelRef, char);

const CONTENT: &[u8] = b"{}";

impl Sources for Models {
    fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        let mut revisions = self.revisions.lock().unwrap();
        let revision = match revisions.len() {
            0 => 'a',
            1 => revisions[0],
            _ => revisions.remove(0),
        };
        Ok(Arc::new(Model(model.clone(), revision)))
    }
}

impl Source for Model {
    fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>> {
        let missing = self.0.name() == "org/none";
        let error = SourceError::NotFound {
            what: self.0.to_string(),
            detail: String::new(),
            hint: None,
        };
        let revision = Revision::new(&self.1.to_string().repeat(40)).unwrap();
        async move { if missing { Err(error) } else { Ok(revision) } }.boxed()
    }

    fn list<'a>(
        &'a self,
        _: &'a Revision,
        _: &'a Patterns,
    ) -> BoxFuture<'a, Result<Listing, SourceError>> {
        let slow = self.0.name() == "org/slow";
        // Other bytes than those of the other models, which would be reused.
        let (size, digest) = match slow {
            true => (1 << 20, Digest::of(b"slow")),
            false => (CONTENT.len() as u64, Digest::of(CONTENT)),
        };
        let file = RemoteFile {
            path: RelPath::new("config.json").unwrap(),
            size,
            claims: Claims {
                sha256: Some(digest),
                ..Claims::default()
            },
            vouched: Vouched::BySource,
            identity: None,
            xet_hash: None,
            told: None,
        };
        let listing = Listing {
            files: vec![file],
            left_out: LeftOut::default(),
        };
        async move { Ok(listing) }.boxed()
    }

    fn read<'a>(
        &'a self,
        _: &'a RemoteFile,
        _: Range<u64>,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        let slow = self.0.name() == "org/slow";
        let bytes: ByteStream = match slow {
            true => stream::pending().boxed(),
            false => stream::iter([Ok(Bytes::from_static(CONTENT))]).boxed(),
        };
        async move { Ok(bytes) }.boxed()
    }
}

/// A daemon's part for the cluster, on a store that outlives it.
struct Daemon {
    fetcher: Arc<Fetcher>,
    metrics: Arc<Metrics>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Daemon {
    fn start(home: &TempDir, server: &Server, change: impl FnOnce(&mut KubernetesSection)) -> Self {
        Self::start_with(home, server, Models::default(), Vec::new(), change)
    }

    fn start_with(
        home: &TempDir,
        server: &Server,
        models: Models,
        config: Vec<FetchRequest>,
        change: impl FnOnce(&mut KubernetesSection),
    ) -> Self {
        let store = Store::open(&home.path().join("store"), StoreLimits::default()).unwrap();
        let metrics = Arc::new(Metrics::default());
        let limits = FetchLimits {
            stall_timeout: Duration::from_secs(3600),
            ..FetchLimits::default()
        };
        let warmer = Warmer::new(store.clone(), WarmLimits::default(), metrics.clone());
        let fetcher = Fetcher::new(store, Arc::new(models), limits, Arc::clone(&metrics));
        let mut section = KubernetesSection {
            kubeconfig: Some(kubeconfig(home, server)),
            ..KubernetesSection::default()
        };
        change(&mut section);
        let daemon = Self {
            fetcher,
            metrics,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        daemon.fetcher.resume().unwrap();
        let work = Work {
            section,
            node: "node".to_owned(),
            fetcher: Arc::clone(&daemon.fetcher),
            warmer,
            metrics: Arc::clone(&daemon.metrics),
            tasks: daemon.tasks.clone(),
            stop: daemon.stop.clone(),
        };
        let (swept, is_swept) = oneshot::channel();
        swept.send(()).unwrap();
        work.start(config.into_iter().map(Kept::from).collect(), is_swept);
        daemon
    }

    async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.fetcher.shutdown(Duration::from_secs(5)).await;
    }

    /// The models that are here, each with those who hold it.
    fn held(&self) -> Vec<(String, Vec<String>)> {
        let held = |snapshot: weightd_core::store::Snapshot| {
            let model = snapshot.manifest.model.to_string();
            let holders = snapshot.pinned_by.iter().map(ToString::to_string);
            (model, holders.collect())
        };
        let snapshots = self.fetcher.store().snapshots().unwrap();
        snapshots.into_iter().map(held).collect()
    }
}

fn kubeconfig(home: &TempDir, server: &Server) -> std::path::PathBuf {
    let file = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{ "name": "here", "cluster": { "server": format!("http://{}", server.address) } }],
        "users": [{ "name": "node", "user": {} }],
        "contexts": [{ "name": "it", "context": { "cluster": "here", "user": "node" } }],
    });
    let path = home.path().join("kubeconfig");
    std::fs::write(&path, file.to_string()).unwrap();
    path
}

fn node(annotation: &str, taints: &[&str]) -> Value {
    let taint = |key: &&str| json!({ "key": key, "effect": "NoSchedule" });
    let taints: Vec<Value> = taints.iter().map(taint).collect();
    json!({
        "metadata": {
            "name": "node", "uid": "n1", "labels": { "pool": "gpu", "model.weightd.io/hf.gone": "1" },
            "annotations": { "weightd.io/prefetch": annotation },
            "creationTimestamp": Timestamp::now().to_string(),
        },
        "spec": { "taints": taints },
    })
}

fn object(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "weightd.io/v1alpha1", "kind": "ModelPrefetch",
        "metadata": { "name": name, "uid": format!("uid-{name}") }, "spec": spec,
    })
}

fn csi_node(drivers: &[&str]) -> Value {
    let driver = |name: &&str| json!({ "name": name, "nodeID": "node" });
    let drivers: Vec<Value> = drivers.iter().map(driver).collect();
    json!({ "metadata": { "name": "node" }, "spec": { "drivers": drivers } })
}

/// Waits until `get` gives `expected`.
async fn becomes<T: PartialEq + std::fmt::Debug>(expected: T, mut get: impl FnMut() -> T) {
    let end = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        let now = get();
        if now == expected {
            return;
        }
        assert!(
            tokio::time::Instant::now() < end,
            "{now:?}, not {expected:?}"
        );
        sleep(Duration::from_millis(20)).await;
    }
}

fn taints(server: &Server) -> Vec<String> {
    let node = server.object(NODES, "node");
    let taints = node["spec"]["taints"].as_array().unwrap().iter();
    taints
        .map(|taint| taint["key"].as_str().unwrap().to_owned())
        .collect()
}

fn phase(server: &Server, name: &str) -> String {
    let object = server.object(OBJECTS, name);
    object["status"]["nodes"][0]["phase"]
        .as_str()
        .unwrap_or("none")
        .to_owned()
}

fn held(model: &str, revision: char, holder: Option<&str>) -> (String, Vec<String>) {
    let model = format!("{model}@{}", revision.to_string().repeat(40));
    (model, holder.into_iter().map(str::to_owned).collect())
}

#[tokio::test]
async fn a_node_gets_what_it_is_to_keep_says_so_and_loses_its_taints() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(
        NODES,
        node(
            "hf://org/a, hf:/typo",
            &["other", "csi.weightd.io/agent-not-ready", WARMING],
        ),
    );
    server.put(
        OBJECTS,
        object(
            "b",
            json!({ "source": "hf://org/b", "nodeSelector": { "matchLabels": { "pool": "gpu" } } }),
        ),
    );
    server.put(
        OBJECTS,
        object(
            "c",
            json!({ "source": "hf://org/c", "nodeSelector": { "matchLabels": { "pool": "cpu" } } }),
        ),
    );
    server.put(CSI_NODES, csi_node(&["other.driver"]));

    let daemon = Daemon::start(&home, &server, |_| ());

    becomes("Ready".to_owned(), || phase(&server, "b")).await;
    becomes(
        vec![
            "other".to_owned(),
            "csi.weightd.io/agent-not-ready".to_owned(),
        ],
        || taints(&server),
    )
    .await;
    server.put(CSI_NODES, csi_node(&["other.driver", "csi.weightd.io"]));
    becomes(vec!["other".to_owned()], || taints(&server)).await;
    assert_eq!(phase(&server, "c"), "none");
    let own = &server.object(OBJECTS, "b")["status"]["nodes"][0];
    assert_eq!(
        (&own["name"], &own["revision"], &own["bytesDone"]),
        (&json!("node"), &json!("a".repeat(40)), &json!(2))
    );
    becomes(2, || daemon.held().len()).await;
    let held = holders(&daemon);
    assert!(held.starts_with("operator/warm.node.hf.org.a"), "{held}");
    assert!(held.ends_with(" operator/warm.object.b"), "{held}");
    becomes(1, || server.asked("POST /apis/events.k8s.io").len()).await;
    let event = &server.asked("POST /apis/events.k8s.io")[0];
    assert!(
        event["note"].as_str().unwrap().contains("hf:/typo"),
        "{event}"
    );
    // One write for an entry that was pending for no time.
    assert_eq!(server.asked("PATCH /apis/weightd.io").len(), 1);
    daemon.end().await;
}

#[tokio::test]
async fn what_an_annotation_asks_for_in_vain_is_told_in_events_of_the_node() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(
        NODES,
        node("hf:/typo, /models/x, hf://org/none, hf://org/a", &[]),
    );

    let daemon = Daemon::start(&home, &server, |_| ());

    let events = || server.asked("POST /apis/events.k8s.io");
    becomes(2, || events().len()).await;
    let note = |reason| {
        let of_reason = |event: &Value| event["reason"] == reason;
        let event = events().into_iter().find(of_reason).unwrap();
        event["note"].as_str().unwrap().to_owned()
    };
    let invalid = note("PrefetchInvalid");
    assert!(
        invalid.contains("hf:/typo") && invalid.contains("/models/x"),
        "{invalid}"
    );
    let failed = note("PrefetchFailed");
    assert!(failed.contains("hf://org/none"), "{failed}");
    becomes(1, || daemon.held().len()).await;
    // Another mistake is another Event, not a repetition of the first.
    assert!(server.asked("PATCH /apis/events.k8s.io").is_empty());
    daemon.end().await;
}

#[tokio::test]
async fn an_object_that_cannot_be_read_any_more_lets_go_of_nothing() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    server.put(OBJECTS, object("a", json!({ "source": "hf://org/a" })));
    let daemon = Daemon::start(&home, &server, |_| ());
    becomes("Ready".to_owned(), || phase(&server, "a")).await;
    let kept = vec![held("hf://org/a", 'a', Some("operator/warm.object.a"))];
    becomes(kept.clone(), || daemon.held()).await;

    let mut newer = object("a", json!({ "origin": "hf://org/a" }));
    newer["status"] = server.object(OBJECTS, "a")["status"].clone();
    server.put(OBJECTS, newer);

    becomes("Failed".to_owned(), || phase(&server, "a")).await;
    assert_eq!(daemon.held(), kept);
    server.delete(OBJECTS, "a");
    becomes(vec![held("hf://org/a", 'a', None)], || daemon.held()).await;
    daemon.end().await;
}

#[tokio::test]
async fn a_watch_that_is_too_old_begins_anew_and_is_no_failure() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    server.put(OBJECTS, object("a", json!({ "source": "hf://org/a" })));
    let daemon = Daemon::start(&home, &server, |_| ());
    becomes("Ready".to_owned(), || phase(&server, "a")).await;

    server.expire(OBJECTS);
    server.put(OBJECTS, object("b", json!({ "source": "hf://org/b" })));

    becomes("Ready".to_owned(), || phase(&server, "b")).await;
    let metrics = daemon.metrics.encode();
    let none = "weightd_kube_failures_total{call=\"watch_prefetches\"} 0";
    assert!(metrics.contains(none), "{metrics}");
    daemon.end().await;
}

#[tokio::test]
async fn a_taint_that_comes_again_goes_again_and_a_conflict_is_no_trouble() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &["csi.weightd.io/agent-not-ready"]));
    server.put(CSI_NODES, csi_node(&["csi.weightd.io"]));
    server.refuse("PATCH /api/v1/nodes", 422, 1);

    let daemon = Daemon::start(&home, &server, |section| section.labels = 0);

    becomes(Vec::<String>::new(), || taints(&server)).await;
    server.put(NODES, node("", &["x", "csi.weightd.io/agent-not-ready"]));
    becomes(vec!["x".to_owned()], || taints(&server)).await;
    daemon.end().await;
}

#[tokio::test]
async fn a_node_that_does_not_get_ready_loses_its_taints_all_the_same() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    let mut old = node(
        "hf://org/slow",
        &["csi.weightd.io/agent-not-ready", WARMING],
    );
    old["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
    server.put(NODES, old);
    server.refuse("csinodes", 403, usize::MAX);

    let daemon = Daemon::start(&home, &server, |_| ());

    becomes(Vec::<String>::new(), || taints(&server)).await;
    daemon.end().await;
}

#[tokio::test]
async fn a_node_works_on_what_is_most_wanted_and_the_rest_waits_its_turn() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    for (name, model, priority) in [("a", "a", -1), ("b", "slow", 5), ("c", "slow", 9)] {
        let spec = json!({ "source": format!("hf://org/{model}"), "priority": priority });
        server.put(OBJECTS, object(name, spec));
    }

    let daemon = Daemon::start(&home, &server, |_| ());

    becomes("Pending".to_owned(), || phase(&server, "a")).await;
    assert!(daemon.held().is_empty(), "{:?}", daemon.held());
    server.delete(OBJECTS, "c");
    becomes("Ready".to_owned(), || phase(&server, "a")).await;
    daemon.end().await;
}

#[tokio::test]
async fn a_model_that_cannot_be_had_says_why_and_holds_up_neither_others_nor_pods() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[WARMING]));
    server.put(
        OBJECTS,
        object("none", json!({ "source": "hf://org/none", "priority": 9 })),
    );
    server.put(OBJECTS, object("wrong", json!({ "source": "hf://a/b/c" })));
    server.put(OBJECTS, object("a", json!({ "source": "hf://org/a" })));

    let daemon = Daemon::start(&home, &server, |section| {
        section.warming_timeout = Span(Duration::from_millis(1500));
    });

    becomes("Failed".to_owned(), || phase(&server, "none")).await;
    becomes("Failed".to_owned(), || phase(&server, "wrong")).await;
    becomes("Ready".to_owned(), || phase(&server, "a")).await;
    becomes(Vec::<String>::new(), || taints(&server)).await;
    let message = &server.object(OBJECTS, "none")["status"]["nodes"][0]["message"];
    assert!(message.as_str().unwrap().contains("not found"), "{message}");
    let metrics = daemon.metrics.encode();
    assert!(
        metrics.contains("weightd_warm_models{phase=\"failed\"} 2"),
        "{metrics}"
    );
    daemon.end().await;
}

#[tokio::test]
async fn what_an_object_wants_warm_is_read_into_the_page_cache_once_it_is_here() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    let warm = json!({ "source": "hf://org/a", "warm": true });
    server.put(OBJECTS, object("a", warm));
    server.put(OBJECTS, object("b", json!({ "source": "hf://org/b" })));

    let daemon = Daemon::start(&home, &server, |_| ());

    becomes("Ready".to_owned(), || phase(&server, "b")).await;
    let warm = "weightd_page_cache_warmings_total{outcome=\"warm\"} 1";
    becomes(true, || daemon.metrics.encode().contains(warm)).await;
    daemon.end().await;
}

#[tokio::test]
async fn what_is_no_longer_wanted_is_let_go_also_while_it_is_fetched() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("hf://org/a", &[]));
    server.put(
        OBJECTS,
        object("slow", json!({ "source": "hf://org/slow" })),
    );
    let daemon = Daemon::start(&home, &server, |_| ());
    becomes("Fetching".to_owned(), || phase(&server, "slow")).await;
    becomes(1, || daemon.held().len()).await;

    server.delete(OBJECTS, "slow");
    server.put(NODES, node("", &[]));

    becomes(vec![held("hf://org/a", 'a', None)], || daemon.held()).await;
    becomes(0, || daemon.fetcher.active().len()).await;
    becomes(0, || {
        daemon.fetcher.store().recorded_fetches().unwrap().len()
    })
    .await;
    daemon.end().await;
}

#[tokio::test]
async fn what_was_removed_while_no_daemon_ran_is_let_go_when_the_api_server_says_so_and_not_before()
{
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    server.put(OBJECTS, object("a", json!({ "source": "hf://org/a" })));
    let daemon = Daemon::start(&home, &server, |_| ());
    let kept = held("hf://org/a", 'a', Some("operator/warm.object.a"));
    becomes(vec![kept.clone()], || daemon.held()).await;
    daemon.end().await;
    server.delete(OBJECTS, "a");
    server.refuse("GET /apis/weightd.io", 403, 2);

    let daemon = Daemon::start(&home, &server, |_| ());

    becomes(1, || {
        server
            .asked("GET /apis/weightd.io")
            .len()
            .saturating_sub(2)
            .min(1)
    })
    .await;
    assert_eq!(daemon.held(), [kept]);
    becomes(vec![held("hf://org/a", 'a', None)], || daemon.held()).await;
    let metrics = daemon.metrics.encode();
    assert!(
        metrics.contains("weightd_kube_failures_total{call=\"watch_prefetches\"} 2"),
        "{metrics}"
    );
    daemon.end().await;
}

#[tokio::test]
async fn a_name_that_moved_is_held_where_it_stands_now() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    server.put(OBJECTS, object("a", json!({ "source": "hf://org/a" })));
    let daemon = Daemon::start(&home, &server, |_| ());
    becomes(1, || daemon.held().len()).await;
    daemon.end().await;
    let models = Models {
        revisions: Mutex::new(vec!['b']),
    };

    let daemon = Daemon::start_with(&home, &server, models, Vec::new(), |_| ());

    let expected = vec![
        held("hf://org/a", 'a', None),
        held("hf://org/a", 'b', Some("operator/warm.object.a")),
    ];
    becomes(expected, || daemon.held()).await;
    becomes(json!("b".repeat(40)), || {
        server.object(OBJECTS, "a")["status"]["nodes"][0]["revision"].clone()
    })
    .await;
    daemon.end().await;
}

#[tokio::test]
async fn without_rights_the_configuration_counts_and_metrics_tell() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("hf://org/b", &[]));
    server.refuse("", 403, usize::MAX);
    let config = vec![FetchRequest {
        model: "hf://org/a".parse().unwrap(),
        patterns: Patterns::default(),
        pin: Some(Holder::operator("serving").unwrap()),
    }];

    let daemon = Daemon::start_with(&home, &server, Models::default(), config, |_| ());

    becomes(true, || holders(&daemon).contains("operator/serving")).await;
    let counted = || daemon.metrics.encode().contains("{call=\"watch_node\"} 0");
    becomes(false, counted).await;
    daemon.end().await;
}

/// Who holds something.
fn holders(daemon: &Daemon) -> String {
    let held = daemon.held().into_iter();
    held.flat_map(|(_, holders)| holders)
        .collect::<Vec<_>>()
        .join(" ")
}

#[tokio::test]
async fn what_the_configuration_names_no_more_is_let_go_and_what_others_hold_stays() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    let serving = Holder::operator("serving").unwrap();
    let entry = |model: &str| FetchRequest {
        model: model.parse().unwrap(),
        patterns: Patterns::default(),
        pin: Some(serving.clone()),
    };
    let config = vec![entry("hf://org/a"), entry("hf://org/b")];
    let models = Models::default;
    let daemon = Daemon::start_with(&home, &server, models(), config, |_| ());
    becomes(2, || holders(&daemon).matches("warm.named.").count()).await;
    let all = daemon.fetcher.store().snapshots().unwrap();
    let of = |model: &str| {
        let found = all.iter().find(|one| one.manifest.model.name() == model);
        found.unwrap().manifest.snapshot.clone()
    };
    let other = Holder::operator("other").unwrap();
    daemon.fetcher.store().pin(&of("org/a"), &other).unwrap();
    daemon.end().await;

    let daemon = Daemon::start_with(&home, &server, models(), vec![entry("hf://org/b")], |_| ());

    let expected = held("hf://org/a", 'a', Some("operator/other"));
    becomes(Some(expected), || daemon.held().into_iter().next()).await;
    let kept = daemon
        .fetcher
        .store()
        .snapshot(&of("org/b"))
        .unwrap()
        .unwrap();
    assert!(kept.pinned_by.contains(&serving), "{kept:?}");
    daemon.end().await;
}

#[tokio::test]
async fn an_entry_that_is_not_to_be_pinned_is_only_fetched() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    server.put(
        OBJECTS,
        object("a", json!({ "source": "hf://org/a", "pin": false })),
    );

    let daemon = Daemon::start(&home, &server, |_| ());

    becomes("Ready".to_owned(), || phase(&server, "a")).await;
    becomes(vec![held("hf://org/a", 'a', None)], || daemon.held()).await;
    // Of a node that matches no longer the entry goes.
    let mut moved = object(
        "a",
        json!({ "source": "hf://org/a", "nodeSelector": { "matchLabels": { "no": "node" } } }),
    );
    moved["status"] = server.object(OBJECTS, "a")["status"].clone();
    server.put(OBJECTS, moved);
    becomes("none".to_owned(), || phase(&server, "a")).await;
    daemon.end().await;
}

#[tokio::test]
async fn labels_say_what_is_here() {
    let (home, server) = (tempfile::tempdir().unwrap(), Server::start().await);
    server.put(NODES, node("", &[]));
    let first = Daemon::start(&home, &server, |_| ());
    let labels = || server.object(NODES, "node")["metadata"]["labels"].clone();
    // Those of a former daemon are gone.
    becomes(json!({ "pool": "gpu" }), labels).await;
    first.end().await;
    server.put(OBJECTS, object("a", json!({ "source": "hf://org/a" })));
    let second = Daemon::start(&home, &server, |_| ());
    becomes("Ready".to_owned(), || phase(&server, "a")).await;
    second.end().await;

    let third = Daemon::start(&home, &server, |_| ());

    becomes(
        json!({ "pool": "gpu", "model.weightd.io/hf.org.a": "a".repeat(40) }),
        labels,
    )
    .await;
    third.end().await;
}
