use weightd_standin::{Files, Hub, HubConfig, Repo};

use super::*;
use crate::access::Rule;

const TOKEN: &str = "hf_controllers_own";

/// A Hub with a public and a private model, and a directory that all share.
pub(in crate::controller::pending) struct Fixture {
    pub hub: Hub,
    pub config: Config,
    pub dir: tempfile::TempDir,
}

pub(in crate::controller::pending) async fn fixture() -> Fixture {
    let hub = Hub::start(HubConfig::default().token(TOKEN)).await.unwrap();
    let files = |text: &str| Files::new().file("config.json", text.as_bytes().to_vec());
    hub.add_repo(Repo::new("org/model").commit("main", files("{\"a\": 1}")));
    let private = Repo::new("org/private").private().grant(TOKEN);
    hub.add_repo(private.commit("main", files("{\"b\": 2}")));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("token"), TOKEN).unwrap();
    let mut config = Config {
        root: dir.path().join("root"),
        ..Config::default()
    };
    config.shared.root = Some(dir.path().join("shared"));
    config.hf.endpoint = Some(hub.endpoint().clone());
    config.hf.token_file = Some(dir.path().join("token"));
    Fixture { hub, config, dir }
}

impl Fixture {
    async fn filler(&self) -> Filler {
        let tier = self.config.shared_config().unwrap();
        Filler::new(&self.config, tier, Arc::default())
            .await
            .unwrap()
    }

    async fn fill(&self, model: &str, askers: &[Asker]) -> (Ended, Now) {
        let wish = Wish {
            model: model.parse().unwrap(),
            patterns: weightd_core::model::Patterns::default(),
        };
        let (report, now) = watch::channel(Now::default());
        let stop = CancellationToken::new();
        let ended = self
            .filler()
            .await
            .fill(&wish, askers, &report, &stop)
            .await;
        let now = now.borrow().clone();
        (ended, now)
    }
}

fn asker(namespace: &str, secret: bool) -> Asker {
    Asker {
        namespace: namespace.to_owned(),
        secret,
    }
}

#[tokio::test]
async fn the_tier_is_filled_once_and_nothing_is_left_behind() {
    let fixture = fixture().await;
    let askers = [asker("team-a", false)];

    let (ended, now) = fixture.fill("hf://org/model", &askers).await;
    let Ended::Filled(text) = ended else {
        panic!("{ended:?}")
    };
    assert!(
        text.contains("hf://org/model@") && text.contains("8 B"),
        "{text}"
    );
    let begun = now.text.expect("what there is to do");
    assert!(begun.contains("8 B from the Hub"), "{begun}");
    let left = std::fs::read_dir(fixture.config.root.join("pending")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["rights"]);

    let (ended, now) = fixture.fill("hf://org/model", &askers).await;
    assert!(matches!(ended, Ended::There(_)), "{ended:?}");
    assert_eq!(now.text, None);
}

#[tokio::test]
async fn a_private_model_is_left_to_the_node_that_has_the_pods_secret() {
    let mut fixture = fixture().await;
    let with_secret = [asker("team-a", true)];

    let (ended, _) = fixture.fill("hf://org/private", &with_secret).await;
    let Ended::Denied(refusals) = ended else {
        panic!("{ended:?}")
    };
    assert!(
        refusals[0].text.contains("its node fetches it") && refusals[0].expected,
        "{refusals:?}"
    );

    // Only what the operator allowed by name, and only for pods that have a Secret of their own.
    fixture.config.controller.own_credentials = true;
    let (ended, _) = fixture.fill("hf://org/private", &with_secret).await;
    assert!(
        matches!(ended, Ended::Denied(_)),
        "no rule allows it: {ended:?}"
    );
    fixture.config.access.allow = vec![Rule {
        source: "hf://org/*".to_owned(),
        namespace: "team-a".to_owned(),
    }];
    for other in [asker("team-a", false), asker("team-b", true)] {
        let (ended, _) = fixture.fill("hf://org/private", &[other]).await;
        assert!(matches!(ended, Ended::Denied(_)), "{ended:?}");
    }
    let (ended, _) = fixture.fill("hf://org/private", &with_secret).await;
    assert!(matches!(ended, Ended::Filled(_)), "{ended:?}");
}

#[tokio::test]
async fn one_namespace_that_may_have_it_is_enough() {
    let mut fixture = fixture().await;
    fixture.config.access.deny = vec![Rule {
        source: "hf://org/model".to_owned(),
        namespace: "team-a".to_owned(),
    }];

    let (ended, _) = fixture
        .fill("hf://org/model", &[asker("team-a", false)])
        .await;
    let Ended::Denied(refusals) = ended else {
        panic!("{ended:?}")
    };
    assert!(
        refusals[0]
            .text
            .contains("`team-a` may not use hf://org/model"),
        "{refusals:?}"
    );
    let both = [asker("team-a", false), asker("team-b", false)];
    let (ended, _) = fixture.fill("hf://org/model", &both).await;
    assert!(matches!(ended, Ended::Filled(_)), "{ended:?}");
}

#[tokio::test]
async fn an_origin_that_is_away_refuses_nobody() {
    let mut fixture = fixture().await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    fixture.config.hf.endpoint = Some(format!("http://{address}").parse().unwrap());
    let askers = [asker("team-a", false), asker("team-b", true)];

    let (ended, _) = fixture.fill("hf://org/model", &askers).await;

    let Ended::Failed(text) = ended else {
        panic!("{ended:?}")
    };
    assert!(text.contains(&address.to_string()), "why: {text}");
}

#[tokio::test]
async fn a_tier_that_is_away_is_told_with_its_reason() {
    let mut fixture = fixture().await;
    fixture.config.shared.root = Some(fixture.dir.path().join("none/at/all"));
    let (ended, _) = fixture
        .fill("hf://org/model", &[asker("team-a", false)])
        .await;
    let Ended::Failed(text) = ended else {
        panic!("{ended:?}")
    };
    assert!(text.contains("the shared tier cannot be written"), "{text}");
}

#[tokio::test]
async fn a_model_of_s3_that_a_secret_opens_is_not_asked_for() {
    let fixture = fixture().await;
    let (ended, _) = fixture
        .fill("s3://bucket/x", &[asker("team-a", true)])
        .await;
    let Ended::Denied(refusals) = ended else {
        panic!("{ended:?}")
    };
    assert!(refusals[0].text.contains("does not see"), "{refusals:?}");
}
