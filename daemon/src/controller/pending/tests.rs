use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use weightd_core::model::ModelRef;

use super::super::testing::Api as Server;
use super::fill::tests::{Fixture, fixture};
use super::*;

const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/";

async fn pending(fixture: &Fixture, server: &Server) -> Pending {
    let tier = fixture.config.shared_config().unwrap();
    let (metrics, term) = (Arc::default(), CancellationToken::new());
    let pending = Pending::new(
        &fixture.config,
        tier,
        server.client(),
        "replica-1",
        metrics,
        term,
    );
    pending.await.unwrap()
}

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

impl Pending {
    fn add(&mut self, pod: Pod) {
        self.pods.hear(News::Pod(Event::Apply(pod)));
    }

    fn remove(&mut self, pod: Pod) {
        self.pods.hear(News::Pod(Event::Delete(pod)));
    }

    /// Works until nothing is under way.
    async fn drain(&mut self) {
        self.look();
        let mut looks = interval(Duration::from_millis(20));
        loop {
            tokio::select! {
                ended = self.running.join_next() => match ended {
                    Some(ended) => {
                        let (wish, ended) = ended.unwrap();
                        self.end(&wish, ended);
                        self.look();
                    }
                    None => return,
                },
                _ = looks.tick() => self.look(),
            }
        }
    }

    fn counted(&self, outcome: &str) -> u64 {
        let name = format!("weightd_pending_fills_total{{outcome=\"{outcome}\"}} ");
        let text = self.metrics.encode();
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.unwrap().parse().unwrap()
    }
}

/// The events that were written, once one of them is for `action`.
async fn events(server: &Server, action: &str) -> Vec<Value> {
    for _ in 0..500 {
        let events: Vec<_> = {
            let held = server.held.lock().unwrap();
            let events = held
                .objects
                .iter()
                .filter(|(path, _)| path.starts_with(EVENTS));
            events.map(|(_, event)| event.clone()).collect()
        };
        if events.iter().any(|event| event["action"] == action) {
            return events;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("there is no event for {action}");
}

#[tokio::test]
async fn a_model_is_filled_once_for_all_pods_and_a_few_are_told() {
    let (fixture, server) = (fixture().await, Server::start().await);
    let mut pending = pending(&fixture, &server).await;
    for index in 0..500 {
        pending.add(pod(
            &format!("p{index}"),
            &format!("team-{}", index % 7),
            "hf://org/model",
        ));
    }
    pending.drain().await;

    assert_eq!(pending.counted("filled"), 1, "{}", pending.metrics.encode());
    let told = events(&server, "FilledSharedTier").await;
    assert!(told.len() <= 2 * TOLD_MAX, "{} events", told.len());
    let last = told
        .iter()
        .find(|event| event["action"] == "FilledSharedTier")
        .expect("the end");
    assert_eq!(last["reason"], "WeightsPrefetching");
    assert_eq!(last["type"], "Normal");
    assert_eq!(last["reportingController"], "weightd.io/controller");
    assert_eq!(last["reportingInstance"], "replica-1");
    assert_eq!(last["regarding"]["kind"], "Pod");
    assert!(
        last["note"].as_str().unwrap().contains("hf://org/model@"),
        "{last}"
    );

    pending.add(pod("late", "team-a", "hf://org/model"));
    pending.drain().await;
    assert_eq!(pending.counted("filled") + pending.counted("there"), 1);
}

#[tokio::test]
async fn a_pod_that_may_not_have_it_is_told_why_and_another_ones_right_counts() {
    let (mut fixture, server) = (fixture().await, Server::start().await);
    fixture.config.access.deny = vec![crate::access::Rule {
        source: "hf://org/model".to_owned(),
        namespace: "team-a".to_owned(),
    }];
    let mut pending = pending(&fixture, &server).await;
    pending.add(pod("p", "team-a", "hf://org/model"));
    pending.drain().await;

    let told = events(&server, "FillSharedTier").await;
    assert_eq!(told[0]["reason"], "WeightsNotPrefetched");
    assert_eq!(told[0]["type"], "Warning");
    assert!(
        told[0]["note"].as_str().unwrap().contains("may not use"),
        "{told:?}"
    );

    pending.add(pod("q", "team-b", "hf://org/model"));
    pending.drain().await;
    assert_eq!(pending.counted("denied"), 1);
    assert_eq!(pending.counted("filled"), 1);
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_taken_out_of_the_queue() {
    let (mut fixture, server) = (fixture().await, Server::start().await);
    fixture.config.controller.fills = 1;
    let mut pending = pending(&fixture, &server).await;
    pending.add(pod("first", "team-a", "hf://org/model"));
    pending.look();
    pending.add(pod("second", "team-a", "hf://org/other"));
    pending.look();
    assert_eq!(pending.fills.len(), 2);

    pending.remove(pod("second", "team-a", "hf://org/other"));
    pending.drain().await;

    assert_eq!(pending.counted("filled"), 1);
    assert_eq!(pending.fills.len(), 1);
    let asked = fixture.hub.requests();
    assert!(
        asked
            .iter()
            .all(|request| !format!("{request:?}").contains("other"))
    );
}

#[tokio::test(start_paused = true)]
async fn a_fill_that_nobody_wants_ends_unless_it_is_far() {
    let (fixture, server) = (fixture().await, Server::start().await);
    let mut pending = pending(&fixture, &server).await;
    let wish = Arc::new(Wish {
        model: "hf://org/model".parse().unwrap(),
        patterns: Default::default(),
    });
    for (done, ended) in [(0.1, true), (0.9, false)] {
        let (report, now) = watch::channel(Now::default());
        report.send_modify(|now| now.done = done);
        let stop = CancellationToken::new();
        let state = State::Running {
            stop: stop.clone(),
            now,
            askers: Vec::new(),
        };
        let at = Instant::now();
        let fill = Fill {
            state,
            since: at,
            wanted: at,
            told: HashSet::new(),
        };
        pending.fills.insert(wish.clone(), fill);
        pending.look();
        assert!(!stop.is_cancelled(), "another pod may come");
        tokio::time::advance(UNWANTED * 2).await;
        pending.look();
        assert_eq!(stop.is_cancelled(), ended);
    }
}

#[tokio::test]
async fn a_namespace_with_many_models_keeps_no_other_back() {
    let (mut fixture, server) = (fixture().await, Server::start().await);
    fixture.config.controller.fills = 2;
    let mut pending = pending(&fixture, &server).await;
    for index in 0..20 {
        pending.add(pod(
            &format!("a{index}"),
            "team-a",
            &format!("hf://org/a{index}"),
        ));
    }
    pending.look();
    pending.add(pod("b", "team-b", "hf://org/b"));
    pending.look();
    // One of the two places is free again.
    let ended = pending.running.join_next().await.unwrap().unwrap();
    pending.end(&ended.0, ended.1);
    pending.look();

    let b: ModelRef = "hf://org/b".parse().unwrap();
    let state = pending.fills.iter().find(|(wish, _)| wish.model == b);
    assert!(matches!(state.unwrap().1.state, State::Running { .. }));
}

#[tokio::test]
async fn a_namespace_with_more_models_than_there_is_room_for_leaves_room() {
    let (fixture, server) = (fixture().await, Server::start().await);
    let mut pending = pending(&fixture, &server).await;
    pending.at_once = 0;
    for index in 0..OF_ONE_MAX + 50 {
        let model = format!("hf://org/a{index}");
        pending.add(pod(&format!("a{index}"), "team-a", &model));
    }
    pending.look();
    pending.add(pod("b", "team-b", "hf://org/b"));
    pending.look();
    pending.look();

    let wanted = pending.pods.wanted();
    let of = |namespace: &str| {
        let fills = pending.fills.keys();
        fills
            .filter(|wish| namespaces(&wanted[*wish]).contains(namespace))
            .count()
    };
    assert_eq!((of("team-a"), of("team-b")), (OF_ONE_MAX, 1));
}

#[tokio::test]
async fn five_thousand_pods_are_kept_in_little_room() {
    let (fixture, server) = (fixture().await, Server::start().await);
    let mut pending = pending(&fixture, &server).await;
    pending.at_once = 0;
    for index in 0..5_000 {
        let mut pod = pod(&format!("p{index}"), "team-a", "hf://org/model");
        let notes = pod.metadata.annotations.as_mut().unwrap();
        notes.insert("other".to_owned(), "x".repeat(10_000));
        pending.pods.hear(News::Pod(Event::InitApply(pod)));
    }
    pending.pods.hear(News::Pod(Event::InitDone));

    assert_eq!(pending.pods.wanted().values().next().unwrap().len(), 5_000);
    let kept: usize = (0..5_000)
        .map(|index| format!("{:?}", pending.pods.get(&format!("uid-p{index}"))).len())
        .sum();
    assert!(kept < 5_000 * 500, "{kept}");
}
