use serde_json::{Value, json};

use super::super::testing::Api as Server;
use super::*;

const SECRET_PATH: &str = "/api/v1/namespaces/weightd/secrets/weightd-webhook-certificate";
const WEBHOOK_PATH: &str =
    "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/weightd-injection";

/// A cluster with the objects that the chart makes.
async fn cluster() -> (Server, Renewal) {
    let server = Server::start().await;
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": SECRET }, "type": "Opaque" });
    server.put(SECRET_PATH, secret);
    let webhook = json!({
        "name": "injection.weightd.io", "sideEffects": "None", "admissionReviewVersions": ["v1"],
        "clientConfig": { "service": { "name": "weightd-webhook", "namespace": "weightd" } },
    });
    let configuration = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": CONFIGURATION }, "webhooks": [webhook],
    });
    server.put(WEBHOOK_PATH, configuration);
    let renewal = Renewal::new(server.client(), "weightd", names());
    (server, renewal)
}

fn names() -> Vec<String> {
    vec![
        "weightd-webhook.weightd.svc".to_owned(),
        "127.0.0.1".to_owned(),
    ]
}

fn made(server: &Server) -> Made {
    let secret = server.get(SECRET_PATH).expect("the Secret");
    let secret: Secret = serde_json::from_value(secret).expect("a Secret");
    Made::read(&secret).expect("a certificate")
}

fn bundle(server: &Server) -> String {
    let found = server.get(WEBHOOK_PATH).expect("the configuration");
    let bundle = found["webhooks"][0]["clientConfig"]["caBundle"].clone();
    let bundle: ByteString = serde_json::from_value(bundle).expect("a bundle");
    String::from_utf8(bundle.0).expect("PEM")
}

fn count(pem: &str) -> usize {
    pem.matches("BEGIN CERTIFICATE").count()
}

#[tokio::test]
async fn the_first_leader_makes_a_certificate_and_tells_the_api_server() {
    let (server, renewal) = cluster().await;
    renewal.look().await.unwrap();

    let first = made(&server);
    assert_eq!(bundle(&server), first.authorities);
    assert_eq!(count(&first.authorities), 1);
    let secret = server.get(SECRET_PATH).unwrap();
    let keys: Vec<_> = secret["data"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["ca.crt", "tls.crt", "tls.key", "weightd.json"]);

    let version =
        |server: &Server| server.get(WEBHOOK_PATH).unwrap()["metadata"]["resourceVersion"].clone();
    let before = version(&server);
    renewal.look().await.unwrap();
    assert_eq!(version(&server), before, "a second look writes nothing");
    assert_eq!(made(&server).authorities, first.authorities);
}

#[tokio::test]
async fn a_bundle_that_an_upgrade_emptied_is_filled_again() {
    let (server, renewal) = cluster().await;
    renewal.look().await.unwrap();
    let mut found = server.get(WEBHOOK_PATH).unwrap();
    found["webhooks"][0]["clientConfig"]
        .as_object_mut()
        .unwrap()
        .remove("caBundle");
    server.put(WEBHOOK_PATH, found);

    renewal.look().await.unwrap();
    assert_eq!(bundle(&server), made(&server).authorities);
}

#[tokio::test(start_paused = true)]
async fn an_old_certificate_is_replaced_when_the_api_server_knows_both() {
    let (server, renewal) = cluster().await;
    renewal.look().await.unwrap();
    let first = made(&server).authorities;
    age(&server);

    let asked = server.held.lock().unwrap().asked.len();
    renewal.look().await.unwrap();

    let second = made(&server);
    assert_eq!(count(&second.authorities), 2);
    assert!(
        second.authorities.contains(first.trim_end()),
        "the last authority stays"
    );
    assert_eq!(bundle(&server), second.authorities);
    let asked = server.held.lock().unwrap().asked.split_off(asked);
    let at = |text: &str| {
        asked
            .iter()
            .position(|one| one.starts_with(text))
            .expect(text)
    };
    assert!(at("PATCH") < at("PUT"), "{asked:?}");

    age(&server);
    renewal.look().await.unwrap();
    assert_eq!(
        count(&made(&server).authorities),
        2,
        "no more than the last one stays"
    );
    assert!(!made(&server).authorities.contains(first.trim_end()));
}

/// Has the certificate's time come.
fn age(server: &Server) {
    let mut secret = server.get(SECRET_PATH).unwrap();
    let about = json!({ "names": names(), "renew_after": "2020-01-01T00:00:00Z" });
    let about = ByteString(about.to_string().into_bytes());
    secret["data"]["weightd.json"] = serde_json::to_value(about).unwrap();
    server.put(SECRET_PATH, secret);
}

#[tokio::test]
async fn another_name_or_a_damaged_secret_brings_a_new_certificate() {
    let (server, renewal) = cluster().await;
    renewal.look().await.unwrap();
    let first = made(&server);
    assert!(!first.is_for(&["other.weightd.svc".to_owned()]));

    let mut secret = server.get(SECRET_PATH).unwrap();
    secret["data"]["tls.key"] = Value::String("AAAA".to_owned());
    server.put(SECRET_PATH, secret);
    renewal.look().await.unwrap();
    assert_ne!(made(&server).authorities, first.authorities);
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let (server, renewal) = cluster().await;
    server.held.lock().unwrap().objects.remove(SECRET_PATH);
    let error = renewal.look().await.expect_err("there is no Secret");
    let text = Chain(&error).to_string();
    assert!(
        text.contains("cannot read the Secret `weightd-webhook-certificate`"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn files_are_read_again_when_they_change() {
    let dir = tempfile::tempdir().unwrap();
    let write = |made: &Made| {
        let data = made.data();
        std::fs::write(dir.path().join("tls.key"), &data["tls.key"].0).unwrap();
        std::fs::write(dir.path().join("tls.crt"), &data["tls.crt"].0).unwrap();
    };
    let current = Arc::new(Current::default());
    let origin = Origin::Files(dir.path().to_owned());
    let metrics = Arc::new(Metrics::default());
    let following = tokio::spawn(origin.follow(Arc::clone(&current), Arc::clone(&metrics)));
    sleep(LOOK_FIRST * 2).await;
    assert!(!current.is_there());

    write(&Made::make(&names(), None).unwrap());
    sleep(LOOK_FIRST * 2).await;
    let first = current.get().expect("it is served").cert.clone();
    let days = (current.ends() - jiff::Timestamp::now().as_second()) / (24 * 3600);
    assert!((89..=90).contains(&days), "{days}");
    let line = format!("weightd_certificate_end_seconds {}", current.ends());
    assert!(metrics.encode().contains(&line), "{}", metrics.encode());

    write(&Made::make(&names(), None).unwrap());
    sleep(LOOK * 2).await;
    assert_ne!(current.get().expect("one is served").cert, first);

    std::fs::write(dir.path().join("tls.crt"), "nonsense").unwrap();
    sleep(LOOK * 2).await;
    assert!(current.is_there(), "the last good one is served");
    following.abort();
}
