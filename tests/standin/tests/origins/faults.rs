//! Faults hit what they were set on, as often as they were told to.

use std::time::{Duration, Instant};

use bytes::Bytes;
use weightd_standin::{Fault, FaultKind, Files, Hub, HubConfig, Origin, Repo};

use crate::client::{Answer, ask, get, get_range, head};

const SIZE: usize = 2_000_000;

fn weights() -> Bytes {
    (0..SIZE).map(|n| (n % 253) as u8).collect()
}

/// A hub with one LFS file, and the signed URL of it.
async fn hub() -> (Hub, String) {
    let hub = Hub::start(HubConfig::default()).await.expect("start");
    let files = Files::new().lfs("w.safetensors", weights());
    hub.add_repo(Repo::new("org/model").commit("main", files.file("config.json", "{}")));
    let url = signed_url(&hub).await;
    hub.clear_requests();
    (hub, url)
}

async fn signed_url(hub: &Hub) -> String {
    resolve(hub).await.header("location").to_owned()
}

async fn resolve(hub: &Hub) -> Answer {
    head(&format!(
        "{}/org/model/resolve/main/w.safetensors",
        hub.endpoint()
    ))
    .await
}

#[tokio::test]
async fn a_stalled_body_stays_open() {
    let (hub, url) = hub().await;
    hub.fault(Fault::new(FaultKind::Stall { after_bytes: 1000 }).on(Origin::Cdn));
    let patience = Duration::from_millis(300);
    let answer = ask("GET", &url).patience(patience).send().await;
    assert_eq!((answer.body.len(), answer.closed), (1000, false));
    assert_eq!(hub.requests()[0].bytes_sent, 1000);

    hub.fault(Fault::new(FaultKind::NoAnswer));
    let answer = ask("GET", &url).patience(patience).send().await;
    assert_eq!((answer.status, answer.closed), (0, false));
    assert!(get(&url).await.is_whole());
}

#[tokio::test]
async fn a_cut_body_ends_where_it_was_told_to() {
    let (hub, url) = hub().await;
    hub.fault(
        Fault::new(FaultKind::Cut {
            after_bytes: 70_001,
        })
        .times(2),
    );
    for _ in 0..2 {
        let answer = get(&url).await;
        assert_eq!((answer.body.len(), answer.closed), (70_001, true));
        assert!(!answer.is_whole());
    }
    assert!(get(&url).await.is_whole());
    assert_eq!(hub.faults_fired(), 2);
}

#[tokio::test]
async fn a_slow_body_keeps_its_rate() {
    let (hub, url) = hub().await;
    hub.fault(Fault::new(FaultKind::Slow {
        bytes_per_second: 100_000,
    }));
    let began = Instant::now();
    assert!(get_range(&url, 0, 29_999).await.is_whole());
    let took = began.elapsed().as_secs_f64();
    assert!((0.2..3.0).contains(&took), "{took}");
}

#[tokio::test]
async fn corruption_waits_for_the_range_that_holds_the_byte() {
    let (hub, url) = hub().await;
    hub.fault(Fault::new(FaultKind::Corrupt {
        at_byte: 1_500_000,
        xor: 0x80,
    }));
    assert!(get_range(&url, 0, 999_999).await.body == weights()[..1_000_000]);
    let hit = get_range(&url, 1_000_000, 1_999_999).await;
    let right = weights().slice(1_000_000..);
    let differ: Vec<usize> = (0..1_000_000)
        .filter(|at| hit.body[*at] != right[*at])
        .collect();
    assert_eq!(differ, [500_000]);
    assert!(get(&url).await.body == weights());
}

#[tokio::test]
async fn lengths_and_ranges_can_disagree() {
    let (hub, url) = hub().await;
    for (by, length) in [(-10, 90), (10, 110)] {
        hub.fault(Fault::new(FaultKind::WrongLength { by }));
        let answer = get_range(&url, 0, 99).await;
        assert_eq!(answer.header("content-range"), "bytes 0-99/2000000");
        assert_eq!((answer.body.len(), answer.is_whole()), (length, true));
    }
    hub.fault(Fault::new(FaultKind::ShiftedRange { by: 5 }));
    let answer = get_range(&url, 0, 99).await;
    assert_eq!(answer.header("content-range"), "bytes 5-104/2000000");
    hub.fault(Fault::new(FaultKind::IgnoreRange));
    let answer = get_range(&url, 10, 99).await;
    assert_eq!((answer.status, answer.body.len()), (200, SIZE));
}

#[tokio::test]
async fn statuses_replace_the_answer() {
    let (hub, url) = hub().await;
    hub.fault(Fault::status(503).on(Origin::Cdn).skip(1).times(2));
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(get_range(&url, 0, 9).await.status);
    }
    assert_eq!(statuses, [206, 503, 503, 206]);

    hub.fault(Fault::new(FaultKind::Status {
        status: 500,
        headers: vec![("Retry-After".into(), "7".into())],
        body: "broken".into(),
    }));
    let answer = get(&url).await;
    assert_eq!((answer.status, answer.header("retry-after")), (500, "7"));
    assert_eq!(answer.body, b"broken");

    hub.fault(Fault::new(FaultKind::ExpiredUrl).forever());
    assert_eq!(resolve(&hub).await.status, 302);
    for _ in 0..3 {
        assert_eq!(get(&url).await.status, 403);
    }
    hub.clear_faults();
    assert_eq!(get(&url).await.status, 200);
}

#[tokio::test]
async fn a_rate_limit_has_the_hubs_headers() {
    let (hub, _) = hub().await;
    hub.fault(Fault::new(FaultKind::RateLimit {
        bucket: "api".into(),
        quota: 500,
        window_s: 300,
        reset_s: 2,
        retry_after_s: Some(2),
    }));
    let url = format!("{}/api/models/org/model", hub.endpoint());
    let answer = get(&url).await;
    assert_eq!(answer.status, 429);
    assert_eq!(answer.header("ratelimit"), "\"api\";r=0;t=2");
    assert_eq!(
        answer.header("ratelimit-policy"),
        "\"fixed window\";\"api\";q=500;w=300"
    );
    assert_eq!(answer.header("retry-after"), "2");
    assert_eq!(get(&url).await.status, 200);
}

#[tokio::test]
async fn a_changed_file_differs_from_the_tree() {
    let (hub, _) = hub().await;
    hub.fault(Fault::new(FaultKind::ChangedFile {
        etag: Some("f".repeat(64)),
        size: Some(1),
    }));
    let answer = resolve(&hub).await;
    assert_eq!(
        answer.header("x-linked-etag"),
        format!("\"{}\"", "f".repeat(64))
    );
    assert_eq!(answer.header("x-linked-size"), "1");
    assert_eq!(
        resolve(&hub).await.header("x-linked-size"),
        SIZE.to_string()
    );
}

#[tokio::test]
async fn a_fault_matches_path_range_and_bytes_sent() {
    let (hub, url) = hub().await;
    hub.fault(Fault::status(500).path("absent").forever());
    hub.fault(Fault::status(501).range(100, 199).forever());
    hub.fault(Fault::status(502).method("HEAD").on(Origin::Cdn).forever());
    hub.fault(
        Fault::status(503)
            .on(Origin::Cdn)
            .after_bytes(150)
            .forever(),
    );
    assert_eq!(get_range(&url, 0, 99).await.status, 206);
    assert_eq!(get_range(&url, 150, 160).await.status, 501);
    assert_eq!(
        ask("HEAD", &url)
            .header("Range", "bytes=0-1")
            .send()
            .await
            .status,
        502
    );
    assert_eq!(get_range(&url, 0, 99).await.status, 206);
    assert_eq!(get_range(&url, 0, 99).await.status, 503);
}

#[tokio::test]
async fn a_child_process_is_driven_over_http() {
    let (hub, url) = hub().await;
    let faults = format!("{}/_standin/faults", hub.endpoint());
    let requests = format!("{}/_standin/requests", hub.endpoint());
    let fault = r#"{"on":{"origin":"cdn"},"times":"forever","what":{"cut":{"after_bytes":10}}}"#;
    let set = ask("POST", &faults)
        .body("application/json", fault)
        .send()
        .await;
    assert_eq!(set.status, 204, "{set:?}");
    assert_eq!(get(&url).await.body.len(), 10);
    assert_eq!(ask("DELETE", &faults).send().await.status, 204);
    assert!(get(&url).await.is_whole());

    let log = get(&requests).await.json();
    assert_eq!(log.as_array().map(Vec::len), Some(2));
    assert_eq!(
        (&log[0]["origin"], &log[0]["status"]),
        (&"cdn".into(), &200.into())
    );
    assert_eq!(log[0]["bytes_sent"], 10);
    assert_eq!(ask("DELETE", &requests).send().await.status, 204);
    assert!(hub.requests().is_empty());
    assert_eq!(ask("POST", &faults).body("", "{}").send().await.status, 400);
}

#[tokio::test]
async fn requests_at_the_same_time_are_counted() {
    let (hub, url) = hub().await;
    let slow = FaultKind::Slow {
        bytes_per_second: 10_000,
    };
    hub.fault(Fault::new(slow).forever());
    tokio::join!(
        get_range(&url, 0, 1999),
        get_range(&url, 0, 1999),
        get_range(&url, 0, 1999)
    );
    assert_eq!(hub.max_concurrent_cdn_requests(), 3);
}
