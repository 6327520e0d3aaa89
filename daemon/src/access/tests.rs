//! Decisions against a Hub on loopback.

use futures::future::join_all;
use weightd_core::store::StoreLimits;
use weightd_standin::{Fault, FaultKind, Files, Hub, HubConfig, Origin, Repo};

use super::*;
use crate::sources::hf::HfConfig;
use crate::sources::s3::S3Config;

const TOKEN: &str = "hf_mayread";
const OTHER: &str = "hf_another";

struct Fixture {
    hub: Hub,
    access: Access,
    _dir: tempfile::TempDir,
}

fn limits() -> AccessLimits {
    AccessLimits {
        remember: Duration::from_secs(600),
        when_unreachable: WhenUnreachable::Remembered,
        unreachable_window: Duration::from_secs(3600),
        patience: PATIENCE,
    }
}

/// A Hub with `org/model` for all and `org/private` for one token.
async fn fixture(limits: AccessLimits, policy: Policy) -> Fixture {
    let config = HubConfig::default().token(TOKEN).token(OTHER);
    let hub = Hub::start(config).await.unwrap();
    let files = || Files::new().file("config.json", b"{}".to_vec());
    hub.add_repo(Repo::new("org/model").commit("main", files()));
    let private = Repo::new("org/private").private().grant(TOKEN);
    hub.add_repo(private.commit("main", files()));
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
    let hf = HfConfig::new(hub.endpoint().parse().unwrap(), None).unwrap();
    let origins = Arc::new(Origins::new(hf, S3Config::default(), Some(Vec::new())).unwrap());
    Fixture {
        hub,
        access: Access::new(origins, store, policy, limits),
        _dir: dir,
    }
}

impl Fixture {
    async fn ask(&self, model: &str, token: Option<&str>) -> Result<Grant, AccessError> {
        let requester = Requester {
            namespace: "team-a".to_owned(),
            credentials: Credentials {
                hf_token: token.map(SecretString::from),
                s3: None,
            },
        };
        let (model, patterns) = (model.parse().unwrap(), Patterns::default());
        self.access.grant(&model, &patterns, &requester).await
    }

    async fn refuses(&self, model: &str, token: Option<&str>) -> SourceError {
        match self.ask(model, token).await {
            Err(AccessError::Source { source, .. }) => source,
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("let in"),
        }
    }

    fn pinned(&self, repo: &str) -> String {
        format!("hf://{repo}@{}", self.hub.sha(repo, "main").unwrap())
    }
}

#[tokio::test]
async fn many_who_ask_at_once_cost_the_hub_one_answer() {
    let fixture = fixture(limits(), Policy::default()).await;

    let all = (0..100).map(|_| fixture.ask("hf://org/model", None));
    let granted = join_all(all).await;

    assert!(granted.iter().all(Result::is_ok));
    let asked = fixture.hub.requests().len();
    assert!(asked <= 4, "{asked} requests");
    fixture.hub.clear_requests();
    let pinned = fixture.pinned("org/model");
    fixture.ask(&pinned, None).await.unwrap();
    assert_eq!(fixture.hub.requests().len(), 0, "its commit was not known");
}

#[tokio::test]
async fn whoever_asks_again_and_again_without_a_right_costs_the_hub_one_answer() {
    let fixture = fixture(limits(), Policy::default()).await;
    for _ in 0..20 {
        fixture.refuses("hf://org/private", None).await;
    }
    let asked = fixture.hub.requests().len();
    assert!(asked <= 3, "{asked} requests");
    // A no to one is none to another.
    fixture.ask("hf://org/private", Some(TOKEN)).await.unwrap();
}

#[tokio::test]
async fn who_leaves_takes_the_answer_from_nobody() {
    let fixture = fixture(limits(), Policy::default()).await;
    let slow = FaultKind::Slow {
        bytes_per_second: 500,
    };
    fixture.hub.fault(Fault::new(slow).on(Origin::Hub));
    let impatient = async {
        let asked = fixture.ask("hf://org/model", None);
        let _ = tokio::time::timeout(Duration::from_millis(50), asked).await;
    };

    let ((), granted) = tokio::join!(impatient, fixture.ask("hf://org/model", None));

    granted.unwrap();
    assert!(fixture.hub.requests().len() <= 4);
}

#[tokio::test]
async fn after_a_no_to_the_requester_an_outage_lets_nobody_in() {
    let limits = AccessLimits {
        when_unreachable: WhenUnreachable::Allow,
        ..limits()
    };
    let fixture = fixture(limits, Policy::default()).await;
    fixture.ask("hf://org/private", Some(TOKEN)).await.unwrap();
    // The first question is the other's, with a token of its own; the next ones are nobody's.
    let away = Fault::status(503).on(Origin::Hub).skip(1);
    fixture.hub.fault(away.forever());

    let pinned = fixture.pinned("org/private");
    let error = fixture.refuses(&pinned, Some(OTHER)).await;

    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn what_takes_us_too_long_is_no_outage() {
    let limits = AccessLimits {
        when_unreachable: WhenUnreachable::Allow,
        patience: Duration::from_millis(500),
        ..limits()
    };
    let fixture = fixture(limits, Policy::default()).await;
    let endless = FaultKind::Stall { after_bytes: 1 };
    let endless = Fault::new(endless).on(Origin::Hub).path("/tree/");
    fixture.hub.fault(endless.forever());

    let error = fixture.refuses("hf://org/private", Some(TOKEN)).await;
    let text = error.to_string();
    assert!(text.contains("listing its files"), "{text}");

    fixture.hub.clear_faults();
    fixture
        .hub
        .fault(Fault::new(FaultKind::NoAnswer).on(Origin::Hub).forever());
    let pinned = fixture.pinned("org/private");
    let granted = fixture.ask(&pinned, Some(OTHER)).await;
    granted.expect("`allow` is for a Hub that says nothing at all");
}

#[tokio::test]
async fn a_denial_holds_for_a_repository_under_its_old_name() {
    let deny = Rule {
        source: "hf://org/Model".to_owned(),
        namespace: "team-*".to_owned(),
    };
    let fixture = fixture(limits(), Policy::new(&[], &[deny]).unwrap()).await;
    let sha = fixture.hub.sha("org/model", "main").unwrap();
    let away = |from: &str, to: String| {
        let what = FaultKind::Status {
            status: 307,
            headers: vec![("location".to_owned(), to)],
            body: String::new(),
        };
        fixture.hub.fault(Fault::new(what).path(from).forever());
    };
    away(
        "/api/models/org/old/revision",
        format!("/api/models/org/model/revision/{sha}"),
    );
    away(
        "/api/models/org/old/tree",
        format!("/api/models/org/model/tree/{sha}?recursive=true"),
    );
    away(
        "/org/old/resolve",
        format!("/org/model/resolve/{sha}/config.json"),
    );

    for model in ["hf://org/old".to_owned(), format!("hf://org/old@{sha}")] {
        for _ in 0..2 {
            match fixture.ask(&model, None).await {
                Err(AccessError::Policy(refused)) => {
                    let text = refused.to_string();
                    assert!(text.contains("hf://org/model"), "{text}");
                }
                Err(error) => panic!("{}", Chain(&error)),
                Ok(_) => panic!("{model} was let in"),
            }
        }
    }
}

#[test]
fn no_two_sets_of_keys_have_one_fingerprint() {
    let print = |secret: &str, token: Option<&str>| {
        let credentials = Credentials {
            hf_token: None,
            s3: Some(S3Keys {
                access_key_id: "id".to_owned(),
                secret_access_key: SecretString::from(secret),
                session_token: token.map(SecretString::from),
            }),
        };
        credentials.fingerprint(Scheme::S3)
    };
    assert_ne!(print("a\nb", None), print("a", Some("b\n")));
    assert_ne!(print("a\n", Some("b")), print("a", Some("\nb")));
    assert_eq!(print("a", Some("b")), print("a", Some("b")));
}
