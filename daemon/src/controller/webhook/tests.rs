//! The webhook as an API server reaches it: over TLS, on loopback.

use std::net::SocketAddr;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::super::certificate::{Current, Made};
use super::super::tls;
use super::*;

const HOST: &str = "weightd-webhook.weightd.svc";

struct Served {
    address: SocketAddr,
    authority: String,
    current: Arc<Current>,
    metrics: Arc<Metrics>,
    _stop: DropGuard,
}

/// A certificate for the webhook, served by `current`; gives its authority.
fn certify(current: &Current) -> String {
    let made = Made::make(&[HOST.to_owned()], None).unwrap();
    let data = made.data();
    current
        .set("the test's", &data["tls.crt"].0, &data["tls.key"].0)
        .unwrap();
    made.authorities
}

async fn served() -> Served {
    let (current, metrics) = (Arc::new(Current::default()), Arc::new(Metrics::default()));
    let authority = certify(&current);
    let webhook = Webhook::new(
        "csi.weightd.io".into(),
        "weightd".into(),
        Arc::clone(&metrics),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let config = tls::config(Arc::<Current>::clone(&current));
    tokio::spawn(tls::serve(listener, config, webhook.routes(), stop.clone()));
    Served {
        address,
        authority,
        current,
        metrics,
        _stop: stop.drop_guard(),
    }
}

impl Served {
    /// A client that believes only `authority`.
    fn client(&self, authority: &str) -> reqwest::Client {
        let root = reqwest::Certificate::from_pem(authority.as_bytes()).unwrap();
        reqwest::Client::builder()
            .tls_certs_only([root])
            .resolve(HOST, self.address)
            .no_proxy()
            .build()
            .unwrap()
    }

    async fn ask(&self, body: impl Into<reqwest::Body>) -> reqwest::Response {
        let url = format!("https://{HOST}:{}/mutate", self.address.port());
        self.client(&self.authority)
            .post(url)
            .body(body)
            .send()
            .await
            .unwrap()
    }

    async fn review(&self, question: &Value) -> Value {
        let answer = self.ask(question.to_string()).await;
        assert_eq!(answer.status(), 200);
        answer.json().await.unwrap()
    }

    fn counted(&self, outcome: &str) -> bool {
        let line = format!("weightd_admission_total{{outcome=\"{outcome}\"}} 1");
        self.metrics.encode().contains(&line)
    }
}

fn question(namespace: &str, annotations: Value) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": { "group": "", "version": "v1", "kind": "Pod" },
            "resource": { "group": "", "version": "v1", "resource": "pods" },
            "namespace": namespace,
            "operation": "CREATE",
            "userInfo": { "username": "someone" },
            "object": {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": { "generateName": "p-", "annotations": annotations },
                "spec": { "containers": [{ "name": "main" }] },
            },
            "oldObject": null,
            "dryRun": true,
            "field-of-tomorrow": {},
        },
    })
}

fn model() -> Value {
    json!({ "weightd.io/model": "hf://org/model" })
}

#[tokio::test]
async fn a_pod_with_a_model_is_answered_with_a_patch_that_applies() {
    let served = served().await;
    let question = question("team-a", model());

    let answer = served.review(&question).await;

    assert_eq!(answer["apiVersion"], "admission.k8s.io/v1");
    let response = &answer["response"];
    assert_eq!(response["uid"], question["request"]["uid"]);
    assert_eq!(response["allowed"], true);
    assert_eq!(response["patchType"], "JSONPatch");
    let patch: k8s_openapi::ByteString = serde_json::from_value(response["patch"].clone()).unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch.0).unwrap();
    let mut pod = question["request"]["object"].clone();
    json_patch::patch(&mut pod, &patch).unwrap();
    assert_eq!(pod["spec"]["volumes"][0]["csi"]["driver"], "csi.weightd.io");
    assert!(served.counted("injected"));
}

#[tokio::test]
async fn other_pods_are_admitted_as_they_are() {
    let served = served().await;
    let mut updated = question("team-a", model());
    updated["request"]["operation"] = "UPDATE".into();
    let mut binding = question("team-a", model());
    binding["request"]["subResource"] = "binding".into();
    let mut job = question("team-a", model());
    job["request"]["resource"] = json!({ "group": "batch", "version": "v1", "resource": "jobs" });
    for question in [
        question("team-a", json!({})),
        question("weightd", model()),
        question("kube-system", model()),
        updated,
        binding,
        job,
    ] {
        let answer = served.review(&question).await;
        assert_eq!(answer["response"]["allowed"], true);
        assert_eq!(answer["response"].get("patch"), None, "{question}");
    }
}

#[tokio::test]
async fn a_typo_comes_back_as_a_warning() {
    let served = served().await;
    let answer = served
        .review(&question(
            "team-a",
            json!({ "weightd.io/model": "org/model" }),
        ))
        .await;
    let warning = answer["response"]["warnings"][0].as_str().unwrap();
    assert!(warning.contains("hf://org/model"), "{warning}");
    assert_eq!(answer["response"]["allowed"], true);
    assert!(served.counted("warned"));
}

#[tokio::test]
async fn what_is_no_question_is_refused_and_the_next_one_answered() {
    let served = served().await;
    let huge = "x".repeat(QUESTION_MAX + 1);
    let deep = "[".repeat(100_000);
    let old = question("a", model())
        .to_string()
        .replace("k8s.io/v1", "k8s.io/v1beta1");
    let mut odd = question("a", model());
    odd["request"]["object"]["spec"]["volumes"] = json!("none");
    for body in [
        "",
        "{",
        "[]",
        "{\"kind\":1}",
        &deep,
        &huge,
        &old,
        &odd.to_string(),
    ] {
        let answer = served.ask(body.to_owned()).await;
        assert_eq!(answer.status(), 400, "{}", &body[..body.len().min(80)]);
    }
    served.review(&question("team-a", model())).await;
}

#[tokio::test]
async fn slow_clients_and_strangers_do_not_keep_others_out() {
    let served = served().await;
    let mut strangers = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        strangers.push(stream);
    }
    let mut silent = TcpStream::connect(served.address).await.unwrap();

    served.review(&question("team-a", model())).await;

    let mut nothing = Vec::new();
    let closed = silent.read_to_end(&mut nothing);
    tokio::time::timeout(Duration::from_secs(10), closed)
        .await
        .expect("it was closed")
        .ok();
}

#[tokio::test]
async fn a_new_certificate_is_served_without_a_restart() {
    let served = served().await;
    let authority = certify(&served.current);
    let url = format!("https://{HOST}:{}/mutate", served.address.port());

    let old = served.client(&served.authority).post(&url).send().await;
    old.expect_err("the old authority did not sign the new certificate");
    let new = served.client(&authority).post(&url).send().await.unwrap();
    assert_eq!(new.status(), 400);
    let both = format!("{authority}{}", served.authority);
    let roots = reqwest::Certificate::from_pem_bundle(both.as_bytes()).unwrap();
    assert_eq!(roots.len(), 2);
}
