//! The Hub's endpoints and errors.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use weightd_standin::{File, Files, Gated, Hub, HubConfig, Quota, Repo};

use crate::client::{ask, get, head};

pub(crate) const WEIGHTS: &str = "model.safetensors";

pub(crate) fn weights() -> Bytes {
    (0..100_000_u32).flat_map(u32::to_le_bytes).collect()
}

fn files() -> Files {
    Files::new()
        .file("config.json", "{}")
        .file("sub/a b.txt", "spaces")
        .lfs(WEIGHTS, weights())
}

pub(crate) async fn hub_with(config: HubConfig) -> Hub {
    let hub = Hub::start(config).await.expect("start");
    let repo = Repo::new("org/model").commit("main", files()).tag("v1");
    let repo = repo
        .commit("main", files().file("config.json", "{\"new\":1}"))
        .commit("refs/pr/1", files().file("pr.json", "{}"));
    hub.add_repo(repo);
    hub
}

pub(crate) async fn hub() -> Hub {
    hub_with(HubConfig::default()).await
}

pub(crate) async fn signed_url(hub: &Hub) -> String {
    let url = format!("{}/org/model/resolve/main/{WEIGHTS}", hub.endpoint());
    head(&url).await.header("location").to_owned()
}

#[tokio::test]
async fn a_model_is_described_at_each_revision() {
    let hub = hub().await;
    let api = format!("{}/api/models/org/model", hub.endpoint());
    for (suffix, revision) in [
        ("", "main"),
        ("/revision/main", "main"),
        ("/revision/v1", "v1"),
        ("/revision/refs%2Fpr%2F1", "refs/pr/1"),
    ] {
        let answer = get(&format!("{api}{suffix}")).await;
        let sha = hub.sha("org/model", revision).expect("committed");
        let model = answer.json();
        assert_eq!(
            (answer.status, &model["sha"]),
            (200, &sha.clone().into()),
            "{suffix}"
        );
        let by_sha = get(&format!("{api}/revision/{sha}")).await;
        assert_eq!(by_sha.json()["sha"], sha, "{suffix}");
    }
    let model = get(&format!("{api}?blobs=true")).await.json();
    for (key, value) in [("id", "org/model"), ("modelId", "org/model")] {
        assert_eq!(model[key], value);
    }
    for key in ["private", "gated", "disabled"] {
        assert_eq!(model[key], false, "{key}");
    }
    assert_eq!(model["siblings"][1]["rfilename"], WEIGHTS);
    assert_eq!(
        model["siblings"][1]["lfs"]["sha256"],
        hex::encode(Sha256::digest(weights()))
    );
}

#[tokio::test]
async fn refs_list_branches_tags_and_pulls() {
    let hub = hub().await;
    let url = format!("{}/api/models/org/model/refs?include_prs=1", hub.endpoint());
    let refs = get(&url).await.json();
    let main = hub.sha("org/model", "main").expect("committed");
    assert_eq!(refs["branches"][0]["name"], "main");
    assert_eq!(refs["branches"][0]["ref"], "refs/heads/main");
    assert_eq!(refs["branches"][0]["targetCommit"], main);
    assert_eq!(refs["tags"][0]["ref"], "refs/tags/v1");
    assert_eq!(refs["pullRequests"][0]["ref"], "refs/pr/1");
    assert_eq!(refs["converts"], serde_json::json!([]));
}

#[tokio::test]
async fn the_tree_comes_in_pages_and_says_what_each_file_is() {
    let hub = hub_with(HubConfig::default().page_size(1)).await;
    let tree = format!("{}/api/models/org/model/tree/main", hub.endpoint());
    let mut url = format!("{tree}?recursive=true&expand=false");
    let mut entries = Vec::new();
    let mut pages = 0;
    loop {
        let answer = get(&url).await;
        entries.extend(answer.json().as_array().expect("a list").clone());
        pages += 1;
        let Some(link) = answer.headers.get("link") else {
            break;
        };
        let (next, rel) = link.split_once(">; ").expect("a link");
        assert_eq!(rel, "rel=\"next\"");
        url = next.trim_start_matches('<').to_owned();
    }
    assert_eq!(pages, 4);
    let paths: Vec<_> = entries
        .iter()
        .map(|entry| entry["path"].as_str().unwrap())
        .collect();
    assert_eq!(paths, ["config.json", WEIGHTS, "sub", "sub/a b.txt"]);
    let lfs = &entries[1]["lfs"];
    assert_eq!(lfs["oid"], hex::encode(Sha256::digest(weights())));
    assert_eq!(
        (&lfs["size"], &entries[1]["size"]),
        (&400_000.into(), &400_000.into())
    );
    assert!(lfs["pointerSize"].is_u64(), "{lfs}");
    assert_eq!(entries[2]["type"], "directory");
    // `printf spaces | git hash-object --stdin`
    assert_eq!(
        entries[3]["oid"],
        "d60664593d1bdbed190b576afe9a672d7d6a50a5"
    );

    let folder = get(&format!("{tree}/sub")).await.json();
    assert_eq!(folder[0]["path"], "sub/a b.txt");
}

#[tokio::test]
async fn paths_info_takes_a_form_and_json() {
    let hub = hub().await;
    let url = format!("{}/api/models/org/model/paths-info/main", hub.endpoint());
    let form = "paths=sub%2Fa+b.txt&paths=absent&expand=False";
    let json = r#"{"paths":["sub/a b.txt","absent"]}"#;
    for (kind, body) in [
        ("application/x-www-form-urlencoded", form),
        ("application/json", json),
    ] {
        let answer = ask("POST", &url).body(kind, body).send().await;
        let entries = answer.json();
        assert_eq!(entries.as_array().map(Vec::len), Some(1), "{kind}");
        assert_eq!(entries[0]["path"], "sub/a b.txt", "{kind}");
    }
}

#[tokio::test]
async fn small_files_stay_at_the_hub() {
    let hub = hub().await;
    let sha = hub.sha("org/model", "main").expect("committed");
    let url = format!("{}/org/model/resolve/main/sub/a%20b.txt", hub.endpoint());
    for method in ["HEAD", "GET"] {
        let redirect = ask(method, &url).send().await;
        assert_eq!(redirect.status, 307);
        assert_eq!(redirect.header("x-repo-commit"), sha);
        let location = redirect.header("location");
        let cache = format!("/api/resolve-cache/models/org/model/{sha}/sub/a%20b.txt?");
        assert!(location.starts_with(&cache), "{location}");
        let answer = ask(method, &format!("{}{location}", hub.endpoint()))
            .send()
            .await;
        assert_eq!(answer.status, 200);
        assert_eq!(
            answer.header("etag"),
            "\"d60664593d1bdbed190b576afe9a672d7d6a50a5\""
        );
        assert_eq!(answer.header("x-repo-commit"), sha);
        assert_eq!(answer.header("content-length"), "6");
        assert_eq!(
            answer.body,
            if method == "GET" { &b"spaces"[..] } else { b"" }
        );
    }
}

/// Path, token, status and `X-Error-Code`; `-` where there is none.
const REFUSALS: &str = "
    /api/models/org/absent                     -       401  RepoNotFound
    /api/models/org/absent                     hf_ok   404  RepoNotFound
    /org/absent/resolve/main/x                 -       401  RepoNotFound
    /api/models/org/private                    -       401  RepoNotFound
    /api/models/org/private                    hf_ok   404  RepoNotFound
    /api/models/org/private                    hf_in   200  -
    /api/models/org/private                    hf_bad  401  -
    /api/models/org/gated                      -       200  -
    /api/models/org/gated/tree/main            -       200  -
    /org/gated/resolve/main/config.json        -       401  GatedRepo
    /org/gated/resolve/main/config.json        hf_ok   403  GatedRepo
    /org/gated/resolve/main/config.json        hf_in   307  -
    /api/models/org/disabled                   -       403  -
    /org/disabled/resolve/main/config.json     hf_ok   403  -
    /api/models/org/model/revision/absent      -       404  RevisionNotFound
    /org/model/resolve/absent/config.json      -       404  RevisionNotFound
    /org/model/resolve/main/absent             -       404  EntryNotFound
    /api/models/org/model/tree/main/absent     -       404  EntryNotFound
    /api/models/ownerless                      -       200  -
    /ownerless/resolve/main/config.json        -       307  -";

async fn hub_that_refuses() -> Hub {
    let hub = hub_with(HubConfig::default().token("hf_ok")).await;
    let repo = |id| Repo::new(id).commit("main", Files::new().file("config.json", "{}"));
    hub.add_repo(repo("org/private").private().grant("hf_in"));
    hub.add_repo(repo("org/gated").gated(Gated::Manual).grant("hf_in"));
    hub.add_repo(repo("org/disabled").disabled());
    hub.add_repo(repo("ownerless"));
    hub
}

#[tokio::test]
async fn refusals_have_the_hubs_status_and_code() {
    let hub = hub_that_refuses().await;
    for line in REFUSALS.lines().skip(1) {
        let [path, token, status, code] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let request = ask("GET", &format!("{}{path}", hub.endpoint()));
        let answer = match token {
            "-" => request.send().await,
            token => request.token(token).send().await,
        };
        let got = answer
            .headers
            .get("x-error-code")
            .map_or("-", String::as_str);
        assert_eq!(
            (answer.status.to_string().as_str(), got),
            (status, code),
            "{line}"
        );
    }
}

#[tokio::test]
async fn refusals_say_what_clients_look_for() {
    let hub = hub_that_refuses().await;
    let api = format!("{}/api/models", hub.endpoint());
    let bad = ask("GET", &format!("{api}/org/model"))
        .token("hf_bad")
        .send()
        .await;
    let message = "Invalid credentials in Authorization header";
    assert_eq!(bad.header("x-error-message"), message);
    let disabled = get(&format!("{api}/org/disabled")).await;
    let message = "Access to this resource is disabled.";
    assert_eq!(disabled.header("x-error-message"), message);
    let absent = get(&format!("{}/org/model/resolve/main/absent", hub.endpoint())).await;
    let sha = hub.sha("org/model", "main").expect("committed");
    assert_eq!(absent.header("x-repo-commit"), sha);
    let gated = get(&format!("{api}/org/gated")).await;
    assert_eq!(gated.json()["gated"], "manual");
}

#[tokio::test]
async fn a_quota_is_counted_per_token_and_bucket() {
    let quota = Quota {
        api: 2,
        resolvers: 1,
        window: Duration::from_secs(300),
        retry_after: false,
    };
    let hub = hub_with(HubConfig::default().token("hf_ok").quota(quota)).await;
    let api = format!("{}/api/models/org/model", hub.endpoint());
    let resolve = format!("{}/org/model/resolve/main/config.json", hub.endpoint());
    assert_eq!(get(&api).await.header("ratelimit"), "\"api\";r=1;t=300");
    assert_eq!(get(&api).await.status, 200);
    let refused = get(&api).await;
    assert_eq!(refused.status, 429);
    assert!(
        refused.header("ratelimit").starts_with("\"api\";r=0;t="),
        "{refused:?}"
    );
    assert_eq!(
        refused.header("ratelimit-policy"),
        "\"fixed window\";\"api\";q=2;w=300"
    );
    assert_eq!(get(&resolve).await.status, 307);
    assert!(
        get(&resolve)
            .await
            .header("ratelimit")
            .starts_with("\"resolvers\";r=0")
    );
    assert_eq!(ask("GET", &api).token("hf_ok").send().await.status, 200);
}

#[tokio::test]
async fn a_xet_file_comes_with_its_token() {
    let hub = hub().await;
    let hash = "c".repeat(64);
    let file = File::lfs("weights").xet_hash(&hash);
    hub.add_repo(Repo::new("org/xet").commit("main", Files::new().add("x.safetensors", file)));
    let tree = get(&format!("{}/api/models/org/xet/tree/main", hub.endpoint())).await;
    assert_eq!(tree.json()[0]["xetHash"], hash);
    let resolve = head(&format!(
        "{}/org/xet/resolve/main/x.safetensors",
        hub.endpoint()
    ))
    .await;
    assert_eq!(resolve.header("x-xet-hash"), hash);
    let token = get(&format!(
        "{}/api/models/org/xet/xet-read-token/main",
        hub.endpoint()
    ))
    .await;
    let body = token.json();
    assert_eq!(token.header("x-xet-cas-url"), body["casUrl"]);
    assert_eq!(token.header("x-xet-access-token"), body["accessToken"]);
    assert_eq!(
        token.header("x-xet-token-expiration"),
        body["exp"].to_string()
    );
}

#[tokio::test]
async fn a_repo_changes_under_its_branch() {
    let hub = hub().await;
    let before = hub.sha("org/model", "main").unwrap();
    hub.update_repo("org/model", |repo| {
        let files = repo.files("main").expect("committed");
        repo.commit("main", (*files).clone().lfs(WEIGHTS, "changed"))
    });
    assert_ne!(hub.sha("org/model", "main"), Some(before.clone()));
    assert_eq!(get(&signed_url(&hub).await).await.body, b"changed");
    let old = head(&format!(
        "{}/org/model/resolve/{before}/{WEIGHTS}",
        hub.endpoint()
    ))
    .await;
    assert!(get(old.header("location")).await.body == weights());
}

#[tokio::test]
async fn lies_are_told_as_asked() {
    let hub = hub().await;
    let wrong = "0".repeat(64);
    let lying = File::lfs("four").claim_sha256(&wrong).claim_size(5);
    let files = Files::new()
        .add("lying.bin", lying)
        .lfs("../../etc/x", "escape")
        .add("/etc/x", File::small("root").claim_oid("abc"));
    hub.add_repo(Repo::new("org/lies").commit("main", files));
    let tree = format!(
        "{}/api/models/org/lies/tree/main?recursive=true",
        hub.endpoint()
    );
    let entries = get(&tree).await.json();
    let find = |path: &str| {
        let entries = entries.as_array().unwrap().iter();
        entries.clone().find(|entry| entry["path"] == path).unwrap()
    };
    assert_eq!(find("lying.bin")["lfs"]["oid"], wrong);
    assert_eq!(find("lying.bin")["size"], 5);
    assert_eq!(find("/etc/x")["oid"], "abc");
    let resolve = format!("{}/org/lies/resolve/main", hub.endpoint());
    let redirect = head(&format!("{resolve}/lying.bin")).await;
    assert_eq!(redirect.header("x-linked-size"), "5");
    assert_eq!(get(redirect.header("location")).await.body, b"four");
    let escape = head(&format!("{resolve}/..%2F..%2Fetc%2Fx")).await;
    assert_eq!(get(escape.header("location")).await.body, b"escape");
}

#[test]
fn a_hub_runs_without_a_runtime_and_stops_when_dropped() {
    let hub = Hub::spawn_thread(HubConfig::default()).expect("start");
    let address = hub.endpoint().trim_start_matches("http://").to_owned();
    let mut open = TcpStream::connect(&address).expect("connect");
    open.write_all(b"GET /api/models/org/absent HTTP/1.1\r\nHost: x\r\n\r\n")
        .expect("write");
    let mut start = [0; 12];
    open.read_exact(&mut start).expect("read");
    assert_eq!(&start, b"HTTP/1.1 401");

    drop(hub);

    // What is left of the answer, and then the end instead of waiting for a second request.
    open.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let ended = open.read_to_end(&mut Vec::new());
    let timed_out = ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    assert!(!timed_out);
}
