//! Volumes whose pod says what they hold, and what else the plugin learns from the API server.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use tonic::{Code, Status};
use weightd_standin::{Fault, FaultKind, HubConfig, Origin, Repo};

use crate::api::{Api, Mood, Pod, TOKEN};
use crate::node::{Ask, Node, contents, files, tree};

const MODEL: &str = "hf://org/model";
const OTHER: &str = "hf://org/other";

/// The annotation for the volume `model`, which is the one that [`Node`] mounts.
const OWN: &str = "weightd.io/volume.model";
/// The annotation for all volumes of a pod.
const GENERAL: &str = "weightd.io/model";

/// What the plugin asks in order to know which pods the node has.
const LIST: &str = "list spec.nodeName=node-1";

/// A node and its API server. At its end nothing may have logged the plugin's token.
struct Cluster {
    api: Api,
    node: Node,
}

impl Cluster {
    /// A hub that has `org/model` and `org/other`, and nothing started yet.
    fn new() -> Self {
        let (api, mut node) = (Api::new(), Node::new(HubConfig::default()));
        node.hub
            .add_repo(Repo::new("org/other").commit("main", files(2)));
        // A fetch that stalled goes on soon after it can.
        node.config = "[fetch]\nstall_timeout = '2s'\nattempts = 50\n".to_owned();
        let kubeconfig = node.path("kubeconfig");
        api.write_kubeconfig(&kubeconfig);
        node.plugin_options = vec![format!("--kubeconfig={}", kubeconfig.display())];
        Self { api, node }
    }

    async fn running() -> Self {
        Self::running_with(&[]).await
    }

    async fn running_with(options: &[&str]) -> Self {
        let mut cluster = Self::new();
        let options = options.iter().map(|option| (*option).to_owned());
        cluster.node.plugin_options.extend(options);
        cluster.node.start().await;
        cluster
    }

    /// Mounts `ask`, whose first answer must be a success.
    async fn mounts(&self, ask: &Ask) {
        if let Err(status) = self.node.publish(ask).await {
            panic!("{}: {status}\n{}", ask.name, self.node.logs());
        }
    }

    /// Why `ask` is not mounted.
    async fn refuses(&self, ask: &Ask) -> Status {
        let outcome = self.node.publish(ask).await;
        let status = outcome.expect_err("mounted");
        assert!(!status.message().contains(TOKEN), "{status}");
        assert!(!self.is_mounted(ask), "{:?}", self.node.mounted());
        status
    }

    fn is_mounted(&self, ask: &Ask) -> bool {
        let mounted = self.node.mounted();
        mounted.iter().any(|line| line.contains(&ask.pod))
    }

    /// Waits until the API server is asked `question` `more` times from now on.
    async fn until_asked(&self, question: &str, more: usize) {
        let before = self.api.asked(question);
        let asked = async || self.api.asked(question) >= before + more;
        self.node.until(question, asked).await;
    }

    /// Waits until the plugin has an eye on the pods, which takes it a while.
    async fn until_watched(&self, pods: &[&Ask]) {
        for pod in pods {
            let question = format!("watch metadata.name={}", pod.name);
            let watched = async || self.api.asked(&question) > 0;
            self.node.until(&question, watched).await;
        }
    }

    /// No byte of a shard comes until the hub's faults are cleared.
    fn stall(&self) {
        let stalled = Fault::new(FaultKind::Stall { after_bytes: 1000 });
        self.node.hub.fault(stalled.on(Origin::Cdn).forever());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let told = self.node.logs().contains(TOKEN);
        assert!(!told || thread::panicking(), "the token is in a log");
    }
}

fn uid(pod: &str) -> String {
    format!("uid-of-{pod}")
}

fn pod(name: &str) -> Pod {
    Pod::new(name, &uid(name))
}

/// `csi: {driver: csi.weightd.io, readOnly: true}` in a pod.
fn bare(pod: &str) -> Ask {
    Ask::new(&uid(pod), &[]).named(pod)
}

fn with(pod: &str, attributes: &[(&str, &str)]) -> Ask {
    Ask::new(&uid(pod), attributes).named(pod)
}

#[track_caller]
fn says(status: &Status, code: Code, words: &[&str]) {
    assert_eq!(status.code(), code, "{status}");
    for words in words {
        let message = status.message();
        assert!(message.contains(words), "`{words}` is missing: {message}");
    }
}

#[tokio::test]
async fn a_bare_volume_is_the_model_that_its_pod_is_annotated_with() {
    let cluster = Cluster::running().await;
    for (name, annotations) in [
        ("own", &[(OWN, MODEL)][..]),
        ("general", &[(GENERAL, MODEL)]),
        ("both", &[(GENERAL, OTHER), (OWN, MODEL)]),
        (
            "foreign",
            &[("weightd.io/volume.x", OTHER), (GENERAL, MODEL)],
        ),
        ("blank", &[(OWN, " "), (GENERAL, MODEL)]),
        // As a block of YAML ends.
        ("line", &[(OWN, " hf://org/model\n")]),
    ] {
        let annotated = annotations
            .iter()
            .fold(pod(name), |pod, (key, value)| pod.annotated(key, value));
        cluster.api.put(annotated);
        let ask = bare(name);

        cluster.mounts(&ask).await;

        assert_eq!(tree(&cluster.node.tree(&ask.pod)), contents(1), "{name}");
        let asked = cluster.api.asked(&format!("get team-a/{name}"));
        assert_eq!(asked, 1, "{name}");
    }
}

#[tokio::test]
async fn two_bare_volumes_of_one_pod_are_two_models() {
    let cluster = Cluster::running().await;
    let annotated = pod("web").annotated(GENERAL, MODEL);
    let annotated = annotated.annotated("weightd.io/volume.draft", OTHER);
    cluster.api.put(annotated);
    let ask = bare("web");
    let mut draft = cluster.node.request(&ask);
    draft.target_path = draft.target_path.replace("/model/mount", "/draft/mount");
    let parent = draft
        .target_path
        .strip_suffix("/mount")
        .expect("it ends so");
    fs::create_dir_all(parent).expect("kubelet's directory");

    cluster.mounts(&ask).await;
    let mut client = cluster.node.client().await;
    let published = client.node_publish_volume(draft).await;

    published.expect("published");
    let dir = cluster.node.tree(&ask.pod);
    assert_eq!(tree(&dir), contents(1));
    assert_eq!(tree(&dir.join("../../draft/mount")), contents(2));
}

#[tokio::test]
async fn the_attribute_source_goes_before_annotations_and_nobody_asks_for_those() {
    let cluster = Cluster::running().await;
    let annotated = pod("web").annotated(OWN, MODEL).annotated(GENERAL, MODEL);
    cluster.api.put(annotated);
    let ask = with("web", &[("source", OTHER)]);

    cluster.mounts(&ask).await;

    assert_eq!(tree(&cluster.node.tree(&ask.pod)), contents(2));
    assert_eq!(cluster.api.asked("get team-a/web"), 0);
    let unknown = with("unknown", &[("source", OTHER)]);
    cluster.mounts(&unknown).await;
    assert_eq!(cluster.api.asked("get team-a/unknown"), 0);
}

#[tokio::test]
async fn attributes_say_how_the_annotated_model_is_mounted() {
    let cluster = Cluster::running().await;
    let sha = cluster.node.hub.sha("org/model", "main").expect("a commit");
    for name in ["cache", "pinned", "small", "early"] {
        cluster.api.put(pod(name).annotated(GENERAL, MODEL));
    }
    let mount = async |ask: Ask| {
        cluster.mounts(&ask).await;
        cluster.node.tree(&ask.pod)
    };

    let small = mount(with("small", &[("include", "*.json")])).await;
    let early = mount(with("early", &[("mode", "async")])).await;
    let cache = mount(with("cache", &[("layout", "hf-cache")])).await;
    let pinned = mount(with("pinned", &[("revision", &sha)])).await;

    let mut wanted = contents(1);
    wanted.retain(|(path, _)| path.ends_with(".json"));
    assert_eq!(tree(&small), wanted);
    let mark = early.join(".weightd/complete");
    let node = &cluster.node;
    node.until("it is complete", async || mark.exists()).await;
    let snapshot = cache.join("models--org--model/snapshots").join(&sha);
    assert_eq!(tree(&snapshot), contents(1));
    assert_eq!(tree(&pinned), contents(1));
}

#[tokio::test]
async fn a_volume_for_which_nothing_names_a_model_says_what_would() {
    let cluster = Cluster::running().await;
    cluster.api.put(pod("none"));
    cluster
        .api
        .put(pod("others").annotated("weightd.io/volume.x", MODEL));
    cluster
        .api
        .put(pod("blank").annotated(OWN, "").annotated(GENERAL, " "));
    for name in ["none", "others", "blank"] {
        let status = cluster.refuses(&bare(name)).await;

        let remedy = ["hint: ", "`source`", OWN, GENERAL];
        says(&status, Code::InvalidArgument, &remedy);
    }
}

#[tokio::test]
async fn an_annotation_that_is_wrong_is_named_beside_what_is_wrong_with_it() {
    let cluster = Cluster::running().await;
    for (name, key, model, code, words) in [
        (
            "typo",
            OWN,
            "org/model",
            Code::InvalidArgument,
            "hf://org/model",
        ),
        (
            "scheme",
            GENERAL,
            "ftp://x/y",
            Code::InvalidArgument,
            "none of hf, s3, file",
        ),
        (
            "missing",
            OWN,
            "hf://org/nothing",
            Code::NotFound,
            "hf://org/nothing",
        ),
        (
            "branch",
            GENERAL,
            "hf://org/model@nothing",
            Code::NotFound,
            "@nothing",
        ),
    ] {
        cluster.api.put(pod(name).annotated(key, model));

        let status = cluster.refuses(&bare(name)).await;

        says(&status, code, &[words, &format!("annotation `{key}`")]);
    }
    cluster
        .api
        .put(pod("twice").annotated(OWN, "hf://org/model@main"));
    // The attribute wins over the annotation's own revision.
    let status = cluster.refuses(&with("twice", &[("revision", "v1")])).await;
    let words = [
        "hf://org/model@v1",
        &format!("annotation `{OWN}`"),
        "hint: ",
    ];
    says(&status, Code::NotFound, &words);
    let source = with("typo", &[("source", "org/model")]);
    let status = cluster.refuses(&source).await;
    assert!(!status.message().contains("annotation"), "{status}");
}

#[tokio::test]
async fn an_annotation_of_another_pod_with_that_name_is_not_used() {
    let cluster = Cluster::running().await;
    let successor = Pod::new("web", "uid-of-its-successor");
    cluster.api.put(successor.annotated(OWN, MODEL));
    for name in ["web", "never"] {
        let status = cluster.refuses(&bare(name)).await;

        let pod = format!("pod `team-a/{name}` with uid {} is gone", uid(name));
        says(&status, Code::Aborted, &[&pod]);
    }
    let elsewhere = bare("web").namespace("team-b");
    cluster.refuses(&elsewhere).await;
    assert_eq!(cluster.api.asked("get team-b/web"), 1);
    assert_eq!(cluster.node.hub.cdn_bytes_sent(), 0, "a model was fetched");
    assert!(cluster.node.pins().is_empty(), "{:?}", cluster.node.pins());
}

#[tokio::test]
async fn without_an_api_server_a_bare_volume_says_what_it_lacks() {
    let mut cluster = Cluster::new();
    cluster.node.plugin_options.clear();
    cluster.node.start().await;

    let status = cluster.refuses(&bare("web")).await;

    let remedy = ["hint: ", "`source`", "--kubeconfig"];
    says(&status, Code::FailedPrecondition, &remedy);
}

#[tokio::test]
async fn an_api_server_that_does_not_answer_holds_a_call_only_for_a_while() {
    let cluster = Cluster::running().await;
    cluster.api.put(pod("web").annotated(OWN, MODEL));
    cluster.api.set(Mood::Silent);
    let begun = Instant::now();

    let status = cluster.refuses(&bare("web")).await;

    assert!(begun.elapsed() < Duration::from_secs(15), "{status}");
    let words = ["cannot get pod `team-a/web`", "no answer within", "hint: "];
    says(&status, Code::Unavailable, &words);
    cluster.api.set(Mood::Well);
    cluster.mounts(&bare("web")).await;
}

#[tokio::test]
async fn an_api_server_that_is_away_is_asked_again_when_it_is_back() {
    let mut cluster = Cluster::new();
    cluster.api.put(pod("web").annotated(OWN, MODEL));
    // Not even the plugin's start may need it.
    cluster.api.stop();
    cluster.node.start().await;
    let begun = Instant::now();

    let refused = cluster.refuses(&bare("web")).await;
    cluster.api.start();
    cluster.api.set(Mood::Busy);
    let busy = cluster.refuses(&bare("web")).await;
    cluster.api.stop();
    let cut = cluster.refuses(&bare("web")).await;

    let words = ["cannot get pod `team-a/web`", "hint: it is tried again"];
    for status in [&refused, &busy, &cut] {
        says(status, Code::Unavailable, &words);
    }
    says(&refused, Code::Unavailable, &["onnection refused"]);
    says(&busy, Code::Unavailable, &["503 ServiceUnavailable"]);
    assert!(begun.elapsed() < Duration::from_secs(10), "{cut}");
    cluster.api.start();
    cluster.api.set(Mood::Well);
    cluster.mounts(&bare("web")).await;
    assert_eq!(
        tree(&cluster.node.tree(&uid("web"))),
        contents(1),
        "another model"
    );
}

#[tokio::test]
async fn a_plugin_without_the_right_to_read_pods_names_it() {
    let cluster = Cluster::running().await;
    cluster.api.put(pod("web").annotated(OWN, MODEL));
    let code = Code::FailedPrecondition;

    cluster.api.set(Mood::Forbids);
    let forbidden = cluster.refuses(&bare("web")).await;
    cluster.api.set(Mood::Forgot);
    let unknown = cluster.refuses(&bare("web")).await;

    let words = ["RBAC lacks `get` on pods", "ClusterRole", "team-a/web"];
    says(&forbidden, code, &words);
    says(&unknown, code, &["does not know the plugin", "token"]);
    let ask = with("web", &[("source", MODEL)]);
    cluster.mounts(&ask).await;
    cluster.api.set(Mood::Well);
    cluster.api.put(pod("later").annotated(OWN, MODEL));
    cluster.mounts(&bare("later")).await;
}

#[tokio::test]
async fn nobody_waits_for_the_volume_of_a_pod_that_goes_away() {
    let cluster = Cluster::running().await;
    cluster.stall();
    for name in ["ending", "forced", "renewed", "kept"] {
        cluster.api.put(pod(name).annotated(OWN, MODEL));
    }
    let (ending, forced) = (bare("ending"), with("forced", &[("source", MODEL)]));
    let (renewed, kept) = (bare("renewed"), bare("kept"));
    let leave = async {
        let all = [&ending, &forced, &renewed, &kept];
        cluster.until_watched(&all).await;
        cluster.api.terminate("ending");
        cluster.api.remove("forced");
        let successor = Pod::new("renewed", "uid-of-its-successor");
        cluster.api.put(successor.annotated(OWN, MODEL));
        Instant::now()
    };
    let left = async {
        tokio::join!(
            leave,
            cluster.refuses(&ending),
            cluster.refuses(&forced),
            cluster.refuses(&renewed)
        )
    };
    let waits = cluster.node.publish(&kept);
    tokio::pin!(waits);

    let (since, ending, forced, renewed) = tokio::select! {
        left = left => left,
        outcome = &mut waits => panic!("a living pod was not waited for: {outcome:?}"),
    };

    assert!(since.elapsed() < Duration::from_secs(5), "{since:?}");
    for status in [ending, forced, renewed] {
        let words = ["the pod is being deleted", "the fetch of hf://org/model"];
        says(&status, Code::Aborted, &words);
    }
    cluster.node.hub.clear_faults();
    waits.await.expect("published");
    assert_eq!(cluster.node.pins(), ["pins/csi/uid-of-kept.model"]);
}

#[tokio::test]
async fn a_wait_outlives_the_api_server_and_sees_what_it_missed() {
    let cluster = Cluster::running().await;
    cluster.stall();
    for name in ["gone", "kept"] {
        cluster.api.put(pod(name).annotated(OWN, MODEL));
    }
    let (gone, kept) = (bare("gone"), bare("kept"));
    let leave = async {
        cluster.until_watched(&[&gone, &kept]).await;
        cluster.api.stop();
        let failed = async || {
            let logs = cluster.node.logs();
            logs.matches("watch of the pod failed").count() == 2
        };
        cluster.node.until("both watches failed", failed).await;
        cluster.api.remove("gone");
        cluster.api.start();
    };
    let left = async { tokio::join!(leave, cluster.refuses(&gone)).1 };
    let waits = cluster.node.publish(&kept);
    tokio::pin!(waits);

    let status = tokio::select! {
        status = left => status,
        outcome = &mut waits => panic!("a living pod was not waited for: {outcome:?}"),
    };

    says(&status, Code::Aborted, &["the pod is being deleted"]);
    cluster.api.stop();
    cluster.node.hub.clear_faults();
    waits.await.expect("published");
}

#[tokio::test]
async fn the_mount_of_a_pod_that_is_gone_is_undone_after_the_grace() {
    let cluster = Cluster::running_with(&["--grace=1"]).await;
    for name in ["gone", "moved", "ending", "kept"] {
        cluster.api.put(pod(name));
    }
    let mirror = Pod::new("static", "uid-of-its-mirror");
    let mirror = mirror.annotated("kubernetes.io/config.hash", &uid("static"));
    cluster.api.put(mirror);
    let names = ["gone", "moved", "ending", "kept", "static"];
    for name in names {
        cluster.mounts(&with(name, &[("source", MODEL)])).await;
    }
    cluster.until_asked(LIST, 3).await;
    assert_eq!(cluster.node.mounted().len(), names.len());
    let lists = cluster.api.asked(LIST);

    cluster.api.remove("gone");
    cluster.api.put(pod("moved").on("node-2"));
    cluster.api.terminate("ending");

    let node = &cluster.node;
    let stay = ["ending", "kept", "static"];
    let pins = stay.map(|name| format!("pins/csi/{}.model", uid(name)));
    node.until("they are unmounted", async || {
        node.mounted().len() == stay.len() && node.pins() == pins
    })
    .await;
    // The plugin looks once a grace. What one look finds, none but a later one undoes.
    assert!(cluster.api.asked(LIST) >= lists + 2, "no grace");
    cluster.until_asked(LIST, 3).await;
    for name in stay {
        assert_eq!(tree(&node.tree(&uid(name))), contents(1), "{name}");
    }
    assert_eq!(node.pins(), pins);
    assert!(!node.target(&uid("gone")).exists(), "the target is left");
}

#[tokio::test]
async fn while_the_api_server_does_not_list_pods_nothing_is_unmounted() {
    let cluster = Cluster::running_with(&["--grace=1"]).await;
    let ask = with("web", &[("source", MODEL)]);
    cluster.api.put(pod("web"));
    cluster.mounts(&ask).await;
    // The last one knows no pod of this node at all, as if asked for a node of another name.
    for mood in [Mood::Busy, Mood::Forbids, Mood::Forgot, Mood::Well] {
        cluster.api.set(mood);
        cluster.api.remove("web");

        cluster.until_asked(LIST, 4).await;

        assert!(cluster.is_mounted(&ask), "{mood:?}");
        assert_eq!(cluster.node.pins(), ["pins/csi/uid-of-web.model"]);
    }
    let logs = cluster.node.logs();
    assert!(logs.contains("is that what --node-id must be?"), "{logs}");
    // It was the API server alone that kept the mount.
    cluster.api.put(pod("weightd"));
    let gone = async || !cluster.is_mounted(&ask);
    cluster.node.until("it is unmounted", gone).await;
}

#[tokio::test]
async fn a_volume_that_is_mounted_needs_no_api_server() {
    let mut cluster = Cluster::running().await;
    cluster.api.put(pod("web").annotated(OWN, MODEL));
    let ask = bare("web");
    cluster.mounts(&ask).await;

    cluster.api.stop();
    // Again if the plugin is just comparing mounts and pins, as kubelet does.
    cluster.node.mounts(&ask).await;
    cluster.node.kill_plugin();
    cluster.node.start_plugin().await;
    cluster.node.mounts(&ask).await;
    cluster.api.start();
    cluster.api.set(Mood::Forbids);
    cluster.node.mounts(&ask).await;

    assert_eq!(cluster.node.mounted().len(), 1);
    // What the annotation says later is for the next pod.
    cluster.api.set(Mood::Well);
    cluster.api.put(pod("web").annotated(OWN, OTHER));
    cluster.node.mounts(&ask).await;
    assert_eq!(tree(&cluster.node.tree(&ask.pod)), contents(1));
    assert_eq!(cluster.api.asked("get team-a/web"), 1);
}

#[tokio::test]
async fn not_even_the_finest_log_shows_the_token() {
    let mut cluster = Cluster::new();
    let finest = ("RUST_LOG".to_owned(), "trace".to_owned());
    cluster.node.plugin_environment = vec![finest];
    cluster.node.start().await;
    cluster.stall();
    cluster.api.put(pod("web").annotated(OWN, MODEL));
    let ask = bare("web");
    for mood in [Mood::Busy, Mood::Forbids, Mood::Forgot] {
        cluster.api.set(mood);
        cluster.refuses(&ask).await;
    }
    cluster.api.set(Mood::Well);

    let ended = async {
        cluster.until_watched(&[&ask]).await;
        cluster.api.remove("web");
    };
    tokio::join!(ended, cluster.refuses(&ask));

    let logs = cluster.node.logs();
    assert!(logs.contains("\"TRACE\""), "not the finest log");
    assert!(logs.contains("/api/v1/namespaces/team-a/pods"), "{logs}");
    assert!(!logs.contains(TOKEN), "{logs}");
}
