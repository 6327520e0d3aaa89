//! What `kubectl describe pod` shows of a volume.

use std::thread;
use std::time::{Duration, Instant};

use tonic::Code;
use weightd_standin::{Fault, FaultKind, HubConfig, Origin, Repo};

use crate::api::{Api, Mood, Pod, TOKEN};
use crate::ledger::Line;
use crate::node::{Ask, Node, files};

const MODEL: &str = "hf://org/model";

/// A node with an API server, whose plugin tells pods after 1 s, then after pauses from 6 s on.
struct Cluster {
    api: Api,
    node: Node,
}

impl Cluster {
    fn new() -> Self {
        let (api, mut node) = (Api::new(), Node::new(HubConfig::default()));
        node.config = "[fetch]\nstall_timeout = '2s'\nattempts = 50\n".to_owned();
        let kubeconfig = node.path("kubeconfig");
        api.write_kubeconfig(&kubeconfig);
        node.plugin_options = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            "--events-after=1".to_owned(),
        ];
        Self { api, node }
    }

    /// One whose plugin tells after 30 s, so that it makes no difference how busy this machine is.
    async fn patient() -> Self {
        let mut cluster = Self::new();
        let options = &mut cluster.node.plugin_options;
        *options.last_mut().expect("an option") = "--events-after=30".to_owned();
        cluster.node.start().await;
        cluster
    }

    async fn running() -> Self {
        let mut cluster = Self::new();
        cluster.node.start().await;
        cluster
    }

    /// No byte of a shard comes until the hub's faults are cleared.
    fn stall(&self) {
        let stalled = Fault::new(FaultKind::Stall { after_bytes: 1000 });
        self.node.hub.fault(stalled.on(Origin::Cdn).forever());
    }

    fn events(&self, ask: &Ask) -> Vec<Line> {
        self.api.events(&ask.name, &ask.pod)
    }

    /// The pod's Events, once the last of them has this reason and says all these words.
    async fn told(&self, ask: &Ask, reason: &str, words: &[&str]) -> Vec<Line> {
        let what = format!("{reason}: {words:?}");
        let so = async || {
            let events = self.events(ask);
            events.last().is_some_and(|line| {
                line.reason == reason && words.iter().all(|words| line.message.contains(words))
            })
        };
        let begun = Instant::now();
        while !so().await {
            let waited = begun.elapsed() < Duration::from_secs(40);
            assert!(
                waited,
                "{what}\n{:#?}\n{}",
                self.events(ask),
                self.node.logs()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.events(ask)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let told = self.node.logs().contains(TOKEN);
        assert!(!told || thread::panicking(), "the token is in a log");
    }
}

/// A volume of the pod `name`, which the API server has.
fn ask(cluster: &Cluster, name: &str, attributes: &[(&str, &str)]) -> Ask {
    let ask = Ask::new(&format!("uid-of-{name}"), attributes).named(name);
    cluster.api.put(Pod::new(name, &ask.pod));
    ask
}

fn reasons(events: &[Line]) -> Vec<(&str, &str)> {
    let lines = events.iter();
    lines
        .map(|line| (line.kind.as_str(), line.reason.as_str()))
        .collect()
}

#[tokio::test]
async fn a_volume_that_is_mounted_soon_has_no_events() {
    let cluster = Cluster::patient().await;
    let quick = ask(&cluster, "web", &[("source", MODEL)]);

    cluster.node.mounts(&quick).await;

    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(cluster.events(&quick), []);
    assert_eq!(cluster.api.event_writes(), 0);
}

#[tokio::test]
async fn a_slow_fetch_is_told_from_its_first_bytes_to_the_mount() {
    let cluster = Cluster::running().await;
    cluster.stall();
    let slow = ask(&cluster, "web", &[("source", MODEL)]);
    let told = async {
        let words = [
            "fetching hf://org/model for volume `model`: ",
            " of 1.9 MiB",
        ];
        let events = cluster.told(&slow, "WeightsFetching", &words).await;
        assert_eq!(reasons(&events), [("Normal", "WeightsFetching")]);
        // The same Event, told again.
        while cluster.events(&slow)[0].count < 2 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        cluster.node.hub.clear_faults();
    };

    let (mounted, ()) = tokio::join!(cluster.node.publish(&slow), told);

    mounted.expect("mounted");
    let words = [
        "volume `model` is mounted with hf://org/model: 1.9 MiB in ",
        " from the Hub",
    ];
    let events = cluster.told(&slow, "WeightsReady", &words).await;
    let expected = [("Normal", "WeightsFetching"), ("Normal", "WeightsReady")];
    assert_eq!(reasons(&events), expected);
    assert!(
        cluster.api.event_writes() <= 5,
        "{}",
        cluster.api.event_writes()
    );
}

#[tokio::test]
async fn what_cannot_be_mounted_is_a_warning_with_the_remedy() {
    let cluster = Cluster::patient().await;
    let token = "hf_secretofateam";
    let missing = ask(&cluster, "web", &[("source", "hf://org/missing")]).secret("hf-token", token);

    for _ in 0..3 {
        let status = cluster.node.publish(&missing).await;
        let code = status.expect_err("there is no such model").code();
        assert!(
            matches!(code, Code::NotFound | Code::PermissionDenied),
            "{code}"
        );
    }

    let words = ["volume `model`: ", "hf://org/missing", "; hint: "];
    let events = cluster.told(&missing, "WeightsFailed", &words).await;
    assert_eq!(reasons(&events), [("Warning", "WeightsFailed")]);
    assert!(!events[0].message.contains(token), "{events:?}");
    // That kubelet asks again and again is no news.
    assert_eq!(cluster.api.event_writes(), 1);
}

#[tokio::test]
async fn waiting_for_room_is_told_and_so_is_its_end() {
    let mut cluster = Cluster::new();
    cluster.node.config += "[store]\nmax_bytes = '1MiB'\n";
    cluster.node.start().await;
    let large = ask(&cluster, "web", &[("source", MODEL)]);
    let status = cluster.node.publish(&large).await.expect_err("no room");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");

    let words = [
        "waiting for room for hf://org/model for volume `model`: ",
        "; hint: ",
    ];
    let events = cluster.told(&large, "WeightsFetching", &words).await;

    assert_eq!(reasons(&events), [("Normal", "WeightsFetching")]);
    cluster.node.kill_daemon();
    cluster.node.config = cluster.node.config.replace("'1MiB'", "'1GiB'");
    cluster.node.start_daemon().await;
    cluster.node.mounts(&large).await;
    cluster
        .told(&large, "WeightsReady", &["is mounted with"])
        .await;
}

#[tokio::test]
async fn a_volume_that_is_mounted_at_once_is_told_of_until_it_is_complete() {
    let cluster = Cluster::running().await;
    cluster.stall();
    let attributes = [("source", MODEL), ("mode", "async")];
    let early = ask(&cluster, "web", &attributes);

    cluster.node.publish(&early).await.expect("mounted");

    let words = [
        "filling volume `model`, which is mounted already, with hf://org/model: ",
        " of 1.9 MiB",
    ];
    cluster.told(&early, "WeightsFetching", &words).await;
    cluster.node.hub.clear_faults();
    let words = [
        "volume `model` is complete with hf://org/model: 1.9 MiB in ",
        " from the Hub",
    ];
    let events = cluster.told(&early, "WeightsReady", &words).await;
    let expected = [("Normal", "WeightsFetching"), ("Normal", "WeightsReady")];
    assert_eq!(reasons(&events), expected);
}

#[tokio::test]
async fn a_new_plugin_goes_on_telling_of_a_volume_that_is_filled() {
    let mut cluster = Cluster::running().await;
    cluster.stall();
    let early = ask(&cluster, "web", &[("source", MODEL), ("mode", "async")]);
    cluster.node.publish(&early).await.expect("mounted");
    cluster.told(&early, "WeightsFetching", &[]).await;

    cluster.node.kill_plugin();
    cluster.node.start_plugin().await;

    while cluster.events(&early)[0].count < 2 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.node.hub.clear_faults();
    let words = ["volume `model` is complete with hf://org/model"];
    let events = cluster.told(&early, "WeightsReady", &words).await;
    let expected = [("Normal", "WeightsFetching"), ("Normal", "WeightsReady")];
    assert_eq!(reasons(&events), expected);
}

#[tokio::test]
async fn a_volume_that_is_unmounted_while_it_is_filled_is_told_of_no_more() {
    let cluster = Cluster::running().await;
    cluster.stall();
    let early = ask(&cluster, "web", &[("source", MODEL), ("mode", "async")]);
    cluster.node.publish(&early).await.expect("mounted");
    cluster.told(&early, "WeightsFetching", &[]).await;

    cluster.node.unpublish(&early.pod).await.expect("unmounted");

    cluster.node.hub.clear_faults();
    let before = cluster.api.event_writes();
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(cluster.api.event_writes(), before);
}

#[tokio::test]
async fn a_retry_after_aborted_goes_on_with_the_same_story() {
    let mut cluster = Cluster::new();
    cluster
        .node
        .plugin_options
        .push("--publish-wait=2".to_owned());
    cluster.node.start().await;
    cluster.stall();
    let slow = ask(&cluster, "web", &[("source", MODEL)]);

    for _ in 0..2 {
        let status = cluster
            .node
            .publish(&slow)
            .await
            .expect_err("it takes longer");
        assert_eq!(status.code(), Code::Aborted, "{status}");
        assert!(status.message().contains("hint: nothing to do"), "{status}");
    }

    let events = cluster.told(&slow, "WeightsFetching", &[]).await;
    assert_eq!(reasons(&events), [("Normal", "WeightsFetching")]);
    assert!(cluster.api.event_writes() <= 2, "{events:?}");
    // Not even a new plugin tells it anew.
    cluster.node.kill_plugin();
    cluster.node.start_plugin().await;
    let status = cluster
        .node
        .publish(&slow)
        .await
        .expect_err("it takes longer");
    assert_eq!(status.code(), Code::Aborted, "{status}");
    cluster.node.hub.clear_faults();
    cluster.node.mounts(&slow).await;
    let events = cluster.told(&slow, "WeightsReady", &[]).await;
    let expected = [("Normal", "WeightsFetching"), ("Normal", "WeightsReady")];
    assert_eq!(reasons(&events), expected);
}

#[tokio::test]
async fn the_hubs_rate_limit_is_told_with_its_end() {
    let mut cluster = Cluster::new();
    cluster
        .node
        .plugin_options
        .push("--publish-wait=8".to_owned());
    cluster.node.start().await;
    cluster
        .node
        .hub
        .add_repo(Repo::new("org/busy").commit("main", files(3)));
    let sha = cluster.node.hub.sha("org/busy", "main").expect("a commit");
    let limit = FaultKind::RateLimit {
        bucket: "resolvers".to_owned(),
        quota: 1000,
        window_s: 300,
        reset_s: 20,
        retry_after_s: None,
    };
    let limit = Fault::new(limit).on(Origin::Hub).path("/resolve/");
    cluster.node.hub.fault(limit);
    let model = format!("hf://org/busy@{sha}");
    let limited = ask(&cluster, "web", &[("source", &model)]);

    let words = ["waiting for the origin's rate limit, until ", " UTC"];

    let (status, events) = tokio::join!(
        cluster.node.publish(&limited),
        cluster.told(&limited, "WeightsFetching", &words)
    );

    let status = status.expect_err("it takes longer");
    assert_eq!(status.code(), Code::Aborted, "{status}");
    for words in words {
        assert!(status.message().contains(words), "{status}");
    }
    assert_eq!(reasons(&events), [("Normal", "WeightsFetching")]);
}

#[tokio::test]
async fn without_the_right_to_write_events_volumes_are_mounted_and_it_is_logged_once() {
    let cluster = Cluster::running().await;
    cluster.api.set_for_events(Mood::Forbids);
    cluster.stall();
    let asks: Vec<Ask> = ["web-0", "web-1", "web-2"]
        .iter()
        .map(|name| ask(&cluster, name, &[("source", MODEL)]))
        .collect();
    let cleared = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        cluster.node.hub.clear_faults();
    };

    let [a, b, c] = &asks[..] else { unreachable!() };
    let publish = |ask| cluster.node.publish(ask);
    let (a, b, c, ()) = tokio::join!(publish(a), publish(b), publish(c), cleared);

    for mounted in [a, b, c] {
        mounted.expect("mounted");
    }
    let logs = cluster.node.logs();
    let warnings: Vec<_> = logs
        .lines()
        .filter(|line| line.contains("may not write events"))
        .collect();
    assert_eq!(warnings.len(), 1, "{logs}");
    for words in ["\"verb\":\"create\"", "events.events.k8s.io", "team-a"] {
        assert!(
            warnings[0].contains(words),
            "{words} is missing: {}",
            warnings[0]
        );
    }
    assert_eq!(cluster.api.event_writes(), 1, "quiet for a while");
}

#[tokio::test]
async fn an_api_server_that_hangs_or_is_away_delays_no_volume() {
    for mood in [Mood::Silent, Mood::Busy] {
        let cluster = Cluster::running().await;
        cluster.api.set_for_events(mood);
        cluster.stall();
        let slow = ask(&cluster, "web", &[("source", MODEL)]);
        let cleared = async {
            while cluster.api.event_writes() == 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            cluster.node.hub.clear_faults();
            Instant::now()
        };

        let (mounted, cleared) = tokio::join!(cluster.node.publish(&slow), cleared);

        mounted.expect("mounted");
        assert!(cleared.elapsed() < Duration::from_secs(4), "{mood:?}");
        let quick = ask(&cluster, "quick", &[("source", MODEL)]);
        let begun = Instant::now();
        cluster.node.mounts(&quick).await;
        assert!(begun.elapsed() < Duration::from_secs(1), "{mood:?}");
    }
}

#[tokio::test]
async fn events_can_be_switched_off() {
    let mut cluster = Cluster::new();
    cluster
        .node
        .plugin_options
        .push("--events=false".to_owned());
    cluster.node.start().await;
    let missing = ask(&cluster, "web", &[("source", "hf://org/missing")]);

    cluster
        .node
        .publish(&missing)
        .await
        .expect_err("there is no such model");

    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(cluster.api.event_writes(), 0);
}

#[tokio::test]
async fn an_event_that_the_server_forgot_is_written_anew() {
    let cluster = Cluster::running().await;
    cluster.stall();
    let slow = ask(&cluster, "web", &[("source", MODEL)]);
    let forgotten = async {
        cluster.told(&slow, "WeightsFetching", &[]).await;
        cluster.api.forget_events();
        let events = cluster.told(&slow, "WeightsFetching", &[]).await;
        assert_eq!(events[0].count, 1);
        cluster.node.hub.clear_faults();
    };

    let (mounted, ()) = tokio::join!(cluster.node.publish(&slow), forgotten);

    mounted.expect("mounted");
}
