use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::json;
use tokio::task::JoinHandle;

use super::super::testing::Api as Server;
use super::*;

const PATH: &str = "/apis/coordination.k8s.io/v1/namespaces/weightd/leases/weightd-controller";

const PACE: Pace = Pace {
    lease: Duration::from_secs(3),
    renew: Duration::from_secs(2),
    retry: Duration::from_millis(100),
};

/// A replica, and what it is seen to do.
struct Running {
    stop: CancellationToken,
    ended: JoinHandle<()>,
    terms: Arc<AtomicUsize>,
    working: Arc<Mutex<bool>>,
}

impl Running {
    fn start(server: &Server, pod: &str) -> Self {
        let candidate = Candidate::new(server.client(), "weightd", pod, PACE);
        let (stop, terms, working) = (CancellationToken::new(), Arc::default(), Arc::default());
        let (begun, works): (Arc<AtomicUsize>, Arc<Mutex<bool>>) =
            (Arc::clone(&terms), Arc::clone(&working));
        let until = stop.clone();
        let ended = tokio::spawn(async move {
            let work = |term: CancellationToken| {
                begun.fetch_add(1, Ordering::Relaxed);
                let works = Arc::clone(&works);
                *works.lock().unwrap() = true;
                async move {
                    term.cancelled().await;
                    *works.lock().unwrap() = false;
                }
            };
            candidate.run(until, |_| (), work).await;
        });
        Self {
            stop,
            ended,
            terms,
            working,
        }
    }

    fn works(&self) -> bool {
        *self.working.lock().unwrap()
    }

    async fn end(self) {
        self.stop.cancel();
        self.ended.await.unwrap();
    }
}

async fn until(what: &str, mut is: impl FnMut() -> bool) -> Duration {
    let began = std::time::Instant::now();
    while !is() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "not within 20 s: {what}"
        );
        sleep(Duration::from_millis(10)).await;
    }
    began.elapsed()
}

fn holder(server: &Server) -> String {
    let lease = server.get(PATH).expect("a lease");
    lease["spec"]["holderIdentity"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[tokio::test]
async fn one_of_two_leads_and_hands_over_at_once_when_it_ends() {
    let server = Server::start().await;
    let first = Running::start(&server, "a");
    until("a leads", || first.works()).await;
    let second = Running::start(&server, "b");
    sleep(PACE.lease).await;
    assert!(first.works() && !second.works());
    assert!(holder(&server).starts_with("a_"), "{}", holder(&server));

    first.end().await;
    assert_eq!(holder(&server), "");
    let took = until("b leads", || second.works()).await;

    assert!(took < PACE.lease, "{took:?}");
    assert_eq!(server.get(PATH).unwrap()["spec"]["leaseTransitions"], 1);
    second.end().await;
}

#[tokio::test]
async fn a_leader_that_is_killed_is_followed_when_its_lease_has_run_out() {
    let server = Server::start().await;
    let first = Running::start(&server, "a");
    until("a leads", || first.works()).await;
    let second = Running::start(&server, "b");

    first.ended.abort();
    let took = until("b leads", || second.works()).await;

    let least = PACE.lease - PACE.retry * 3;
    assert!(took > least && took < PACE.lease * 3, "{took:?}");
    second.end().await;
}

#[tokio::test]
async fn the_work_ends_before_the_lease_does_when_the_server_is_away() {
    let server = Server::start().await;
    let only = Running::start(&server, "a");
    until("a leads", || only.works()).await;

    server.silence(true);
    let took = until("a leads no more", || !only.works()).await;
    assert!(took < PACE.lease, "{took:?}");

    server.silence(false);
    until("a leads again", || only.works()).await;
    assert_eq!(only.terms.load(Ordering::Relaxed), 2);
    only.end().await;
}

#[tokio::test]
async fn who_finds_another_holder_stops_at_once() {
    let server = Server::start().await;
    let first = Running::start(&server, "a");
    until("a leads", || first.works()).await;

    let mut lease = server.get(PATH).unwrap();
    lease["spec"]["holderIdentity"] = "intruder".into();
    server.put(PATH, lease);

    let took = until("a leads no more", || !first.works()).await;
    assert!(took < PACE.renew, "{took:?}");
    first.end().await;
    assert_eq!(holder(&server), "intruder");
}

#[tokio::test]
async fn work_that_does_not_end_is_broken_off() {
    let server = Server::start().await;
    let candidate = Candidate::new(server.client(), "weightd", "a", PACE);
    let (stop, alive) = (CancellationToken::new(), Arc::new(()));
    let (until_then, held) = (stop.clone(), Arc::downgrade(&alive));
    let mut alive = Some(alive);
    let running = tokio::spawn(async move {
        let work = |_| {
            let alive = alive.take();
            async move {
                std::future::pending::<()>().await;
                drop(alive);
            }
        };
        candidate.run(until_then, |_| (), work).await;
    });
    until("it leads", || server.get(PATH).is_some()).await;

    stop.cancel();
    running.await.unwrap();
    assert_eq!(held.strong_count(), 0);
}

#[tokio::test]
async fn a_lease_that_was_deleted_or_is_empty_is_taken() {
    let server = Server::start().await;
    server.put(PATH, json!({ "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": { "name": LEASE } }));
    let first = Running::start(&server, "a");
    until("a leads", || first.works()).await;

    server.held.lock().unwrap().objects.clear();
    until("the lease is there again", || server.get(PATH).is_some()).await;
    assert!(first.works());
    first.end().await;
}
