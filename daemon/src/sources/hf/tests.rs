//! The source against a small Hub and CDN on loopback, which misbehave on request.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use futures::{StreamExt, TryStreamExt};
use http::Response;
use secrecy::SecretString;
use url::Url;
use weightd_core::digest::{Digest, GitOid};
use weightd_core::model::{ModelRef, Patterns, Revision};
use weightd_core::source::{Listing, RemoteFile, Source, SourceError};

use super::client::Timing;
use super::limit::Waits;
use super::{HfClients, HfConfig, HfSource};

const SHA: &str = "0e9e39f249a16976918f6564b8830bc894c89659";
const OTHER: &str = "1111111111111111111111111111111111111111";
const CONFIG: &[u8] = b"{\"model_type\": \"x\"}\n";
const TOKEN: &str = "hf_secret";
const WEIGHTS: usize = 300_000;

fn weights() -> Vec<u8> {
    (0..WEIGHTS).map(|at| (at * 7 + at / 251) as u8).collect()
}

/// A request that a server got.
#[derive(Debug, Clone)]
struct Seen {
    method: String,
    path: String,
    authorization: Option<String>,
    range: Option<(usize, usize)>,
}

impl Seen {
    fn of(request: &Request) -> Self {
        let header = |name: &str| {
            let value = request.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        let range = header("range").map(|text| {
            let (first, last) = text["bytes=".len()..].split_once('-').unwrap();
            (first.parse().unwrap(), last.parse().unwrap())
        });
        Self {
            method: request.method().to_string(),
            path: request.uri().to_string(),
            authorization: header("authorization"),
            range,
        }
    }
}

/// A server that remembers what it was asked.
struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
}

impl Server {
    async fn start(answer: impl Fn(&Seen) -> Response<Body> + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let connections: Arc<AtomicUsize> = Arc::default();
        let (log, answer) = (Arc::clone(&seen), Arc::new(answer));
        let router = axum::Router::new().fallback(move |request: Request| {
            let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
            async move {
                let seen = Seen::of(&request);
                log.lock().unwrap().push(seen.clone());
                answer(&seen)
            }
        });
        let opened = Arc::clone(&connections);
        let listener = axum::serve::ListenerExt::tap_io(listener, move |_| {
            opened.fetch_add(1, Ordering::SeqCst);
        });
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            url,
            seen,
            connections,
        }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn count(&self, method: &str, part: &str) -> usize {
        let wanted = |seen: &&Seen| seen.method == method && seen.path.contains(part);
        self.seen().iter().filter(wanted).count()
    }
}

fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(body.into()).unwrap()
}

/// Answers for some requests instead of the server, by itself or by the count of its calls.
type Fault = Box<dyn Fn(&Seen) -> Option<Response<Body>> + Send + Sync>;

fn no_fault() -> Fault {
    Box::new(|_| None)
}

/// The first `times` requests whose path holds `part` are answered so.
fn first(times: u32, part: &'static str, reply: fn() -> Response<Body>) -> Fault {
    let count = AtomicU32::new(0);
    Box::new(move |seen| {
        let hit = seen.path.contains(part) && count.fetch_add(1, Ordering::SeqCst) < times;
        hit.then(reply)
    })
}

fn always(part: &'static str, reply: fn() -> Response<Body>) -> Fault {
    first(u32::MAX, part, reply)
}

/// A Hub with `hf://org/model` and `hf://model`, its CDN, and a client of both.
struct World {
    hub: Server,
    cdn: Server,
    /// The lowest signature that the CDN still takes.
    valid: Arc<AtomicU32>,
    clients: Arc<HfClients>,
}

impl World {
    async fn new(hub_fault: Fault, cdn_fault: Fault) -> Self {
        let valid: Arc<AtomicU32> = Arc::default();
        let least = Arc::clone(&valid);
        let cdn = Server::start(move |seen| {
            cdn_fault(seen).unwrap_or_else(|| cdn(seen, least.load(Ordering::SeqCst)))
        });
        let cdn = cdn.await;
        let (address, signature) = (cdn.url.clone(), AtomicU32::new(0));
        let hub = Server::start(move |seen| {
            hub_fault(seen).unwrap_or_else(|| {
                let next = || signature.fetch_add(1, Ordering::SeqCst);
                hub(seen, || format!("{address}/blob?sig={}", next()))
            })
        });
        Self {
            hub: hub.await,
            cdn,
            valid,
            clients: clients(),
        }
    }

    fn source(&self, model: &str, token: Option<&str>) -> HfSource {
        source_at(&self.hub.url, &self.clients, model, token)
    }

    async fn listed(&self) -> (HfSource, Listing) {
        let source = self.source("hf://org/model", Some(TOKEN));
        let listing = list(&source).await.unwrap();
        (source, listing)
    }
}

/// Clients that wait milliseconds where a user's wait seconds.
fn clients() -> Arc<HfClients> {
    let ms = Duration::from_millis;
    let timing = Timing {
        header: ms(10_000),
        backoff: ms(5),
        limit: Waits {
            margin: ms(20),
            longest: ms(5_000),
        },
        ..Timing::default()
    };
    HfClients::with_timing(timing).unwrap()
}

fn source_at(url: &str, clients: &Arc<HfClients>, model: &str, token: Option<&str>) -> HfSource {
    let endpoint = Url::parse(url).unwrap();
    let config = HfConfig::new(endpoint, token.map(SecretString::from)).unwrap();
    HfSource::new(
        Arc::clone(clients),
        config,
        model.parse::<ModelRef>().unwrap(),
    )
}

fn sha() -> Revision {
    Revision::new(SHA).unwrap()
}

async fn list(source: &HfSource) -> Result<Listing, SourceError> {
    source.list(&sha(), &Patterns::default()).await
}

async fn read(
    source: &HfSource,
    file: &RemoteFile,
    range: std::ops::Range<usize>,
) -> Result<Vec<u8>, SourceError> {
    let range = range.start as u64..range.end as u64;
    let chunks: Vec<_> = source.read(file, range).await?.try_collect().await?;
    Ok(chunks.concat())
}

/// What any user might see of it.
fn text(error: &SourceError) -> String {
    let text = format!("{error} {error:?} {:?}", error.hint());
    assert!(
        !text.contains("sig=") && !text.contains(TOKEN),
        "a secret: {text}"
    );
    text
}

fn hub(seen: &Seen, sign: impl Fn() -> String) -> Response<Body> {
    let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
    let commit = ("x-repo-commit", SHA);
    let path = path.replace("/org/model/", "/model/");
    let path = path.strip_prefix("/api/models").unwrap_or(&path);
    match path {
        "/model/revision/main" | "/model/revision/refs%2Fpr%2F1" => answer(
            200,
            &[],
            format!(r#"{{"id": "org/model", "sha": "{SHA}"}}"#),
        ),
        path if path.starts_with("/model/revision/") && path.ends_with(SHA) => answer(
            200,
            &[],
            format!(r#"{{"id": "org/model", "sha": "{SHA}"}}"#),
        ),
        path if path.starts_with("/model/revision/") => {
            answer(404, &[("x-error-code", "RevisionNotFound")], "{}")
        }
        path if path.ends_with(&format!("/tree/{SHA}")) && query.contains("cursor") => {
            let digest = Digest::of(&weights());
            let lfs = format!(r#"{{"oid": "{digest}", "size": {WEIGHTS}, "pointerSize": 134}}"#);
            let page = format!(
                r#"[{{"type": "file", "oid": "{OTHER}", "size": 134, "path": "model.safetensors",
                     "lfs": {lfs}, "xetHash": "{digest}"}}]"#
            );
            answer(200, &[], page)
        }
        path if path.ends_with(&format!("/tree/{SHA}")) => {
            let link = format!("<{}&cursor=2>; rel=\"next\"", seen.path);
            let (oid, size) = (GitOid::of(CONFIG), CONFIG.len());
            let page = format!(
                r#"[{{"type": "directory", "oid": "{OTHER}", "size": 0, "path": "sub dir"}},
                    {{"type": "file", "oid": "{oid}", "size": {size}, "path": "config.json"}},
                    {{"type": "file", "oid": "{oid}", "size": {size}, "path": "sub dir/a%b#?.json"}}]"#
            );
            answer(200, &[("link", &link)], page)
        }
        path if path.ends_with("/model.safetensors") => {
            let tag = format!("\"{}\"", Digest::of(&weights()));
            let size = WEIGHTS.to_string();
            let linked = [
                ("x-linked-etag", tag.as_str()),
                ("x-linked-size", size.as_str()),
            ];
            let signed = sign();
            let headers = [&linked[..], &[commit, ("location", &signed)]].concat();
            answer(302, &headers, "Found")
        }
        path if path.starts_with("/model/resolve/") => {
            let to = path.replace("/model/resolve", "/api/resolve-cache/models/model");
            answer(307, &[commit, ("location", &to)], "")
        }
        path if path.starts_with("/api/resolve-cache/") => answer(200, &[commit], CONFIG),
        path => panic!("nobody should ask for {path}"),
    }
}

fn cdn(seen: &Seen, least: u32) -> Response<Body> {
    let signature = seen.path.strip_prefix("/blob?sig=").unwrap();
    if signature.parse::<u32>().unwrap() < least {
        return answer(403, &[], "<Error><Code>AccessDenied</Code></Error>");
    }
    let weights = weights();
    match seen.range {
        None => answer(200, &[], weights),
        Some((first, last)) => {
            let range = format!("bytes {first}-{last}/{WEIGHTS}");
            let headers = [("content-range", range.as_str())];
            answer(206, &headers, weights[first..=last].to_vec())
        }
    }
}

#[tokio::test]
async fn a_branch_a_pr_and_a_commit_resolve() {
    let world = World::new(no_fault(), no_fault()).await;
    let pinned = format!("hf://org/model@{SHA}");
    for model in [
        "hf://org/model",
        "hf://model",
        "hf://org/model@refs/pr/1",
        &pinned,
    ] {
        let source = world.source(model, Some(TOKEN));
        assert_eq!(source.resolve().await.unwrap(), sha(), "{model}");
    }
    assert_eq!(
        world.hub.count("GET", "/api/models/model/revision/main?"),
        1
    );
    assert_eq!(
        world.hub.count("GET", "/revision/refs%2Fpr%2F1?expand=sha"),
        1
    );
    assert_eq!(world.hub.seen().len(), 4, "one request each");
    let bearer = format!("Bearer {TOKEN}");
    for seen in world.hub.seen() {
        assert_eq!(seen.authorization.as_deref(), Some(bearer.as_str()));
    }
}

#[tokio::test]
async fn a_hub_that_names_another_commit_than_the_one_asked_for_is_refused() {
    let world = World::new(no_fault(), no_fault()).await;
    let other = "a".repeat(40);
    let fault = format!(r#"{{"id": "org/model", "sha": "{other}"}}"#);
    let hub = Server::start(move |_| answer(200, &[], fault.clone())).await;
    let source = source_at(
        &hub.url,
        &world.clients,
        &format!("hf://org/model@{SHA}"),
        None,
    );
    let error = source.resolve().await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid { .. }), "{error}");
}

/// The other half of `the_environments_token_is_not_used_for_those_who_have_none`.
#[tokio::test]
async fn requests_without_a_token_carry_none() {
    let world = World::new(no_fault(), no_fault()).await;
    let source = world.source("hf://org/model", None);
    source.resolve().await.unwrap();
    let listing = list(&source).await.unwrap();
    read(&source, &listing.files[0], 0..CONFIG.len())
        .await
        .unwrap();
    for seen in world.hub.seen() {
        assert_eq!(seen.authorization, None, "{}", seen.path);
    }
}

#[test]
fn the_environments_token_is_not_used_for_those_who_have_none() {
    let test = "sources::hf::tests::requests_without_a_token_carry_none";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env("HF_TOKEN", TOKEN)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[tokio::test]
async fn all_pages_are_listed_with_what_the_hub_claims() {
    let world = World::new(no_fault(), no_fault()).await;
    let (_, listing) = world.listed().await;
    let paths: Vec<_> = listing
        .files
        .iter()
        .map(|file| file.path.as_str())
        .collect();
    assert_eq!(
        paths,
        ["config.json", "model.safetensors", "sub dir/a%b#?.json"]
    );
    let (config, model) = (&listing.files[0], &listing.files[1]);
    let oid = GitOid::of(CONFIG);
    assert_eq!(config.claims.git_oid, Some(oid));
    assert_eq!(
        config.identity,
        Some(format!("git-sha1:{oid}:{}", CONFIG.len()))
    );
    let digest = Digest::of(&weights());
    assert_eq!(model.claims.sha256, Some(digest));
    assert_eq!((model.claims.git_oid, &model.identity), (None, &None));
    assert_eq!(model.size, WEIGHTS as u64);
    assert_eq!(model.xet_hash, Some(digest.to_string()));
}

#[tokio::test]
async fn a_list_that_goes_on_elsewhere_or_for_ever_is_refused() {
    let link = |link: &'static str| -> Fault {
        Box::new(move |seen| {
            let tree = seen.path.contains("/tree/");
            tree.then(|| answer(200, &[("link", link)], "[]"))
        })
    };
    for (to, part) in [
        ("<http://127.0.0.1:1/x>; rel=\"next\"", "another origin"),
        ("<//example.org/x>; rel=\"next\"", "another origin"),
        (
            "</api/models/org/model/tree/x?cursor=1>; rel=\"next\"",
            "never ends",
        ),
    ] {
        let world = World::new(link(to), no_fault()).await;
        let error = list(&world.source("hf://org/model", Some(TOKEN)))
            .await
            .unwrap_err();
        assert!(matches!(error, SourceError::Invalid { .. }), "{error}");
        assert!(text(&error).contains(part), "{error}");
    }
}

/// `status`, and one header: what the user reads is of this variant, with this part.
async fn check_refusal(
    token: Option<&str>,
    (status, header, value): (u16, &'static str, &'static str),
    (variant, part): (&str, &str),
) {
    let refuse: Fault = Box::new(move |_| Some(answer(status, &[(header, value)], "")));
    let world = World::new(refuse, no_fault()).await;
    let error = world
        .source("hf://org/model", token)
        .resolve()
        .await
        .unwrap_err();
    let text = text(&error);
    assert!(text.contains(&format!("{variant} {{")), "{part}: {text}");
    assert!(text.contains(part), "{part}: {text}");
    assert_eq!(world.hub.seen().len(), 1, "asked again: {text}");
}

#[tokio::test]
async fn refusals_without_a_token_say_what_to_do() {
    let code = "x-error-code";
    let disabled = "Access to this resource is disabled.";
    for (refusal, expected) in [
        (
            (401, code, "RepoNotFound"),
            ("NotFound", "repository not found, or private: no token"),
        ),
        ((401, code, "GatedRepo"), ("Denied", "HF_TOKEN")),
        (
            (404, code, "RevisionNotFound"),
            ("NotFound", "no such branch"),
        ),
        (
            (403, "x-error-message", disabled),
            ("Denied", "disabled the repository"),
        ),
        ((200, "server", "portal"), ("Invalid", "not the Hub's")),
        ((400, "server", "x"), ("Invalid", "400 Bad Request")),
        (
            (302, "location", "http://127.0.0.1:1/"),
            ("Invalid", "HF_ENDPOINT"),
        ),
    ] {
        check_refusal(None, refusal, expected).await;
    }
}

#[tokio::test]
async fn refusals_of_a_token_say_what_to_do() {
    let code = "x-error-code";
    for (refusal, expected) in [
        (
            (404, code, "RepoNotFound"),
            ("NotFound", "the token cannot see it"),
        ),
        (
            (403, code, "GatedRepo"),
            ("Denied", "accept its conditions at http://127.0.0.1"),
        ),
        (
            (401, "x-error-message", "Invalid credentials: hf_secret"),
            ("Denied", "the token is not valid"),
        ),
    ] {
        check_refusal(Some(TOKEN), refusal, expected).await;
    }
}

#[tokio::test]
async fn a_rate_limit_is_waited_out() {
    let told = || answer(429, &[("ratelimit", r#""api";r=0;t=0"#)], "");
    let silent = || answer(429, &[], "");
    let seconds = || answer(429, &[("retry-after", "0")], "");
    for reply in [told as fn() -> _, silent, seconds] {
        for part in ["/revision/", "/tree/"] {
            let world = World::new(first(2, part, reply), no_fault()).await;
            let source = world.source("hf://org/model", Some(TOKEN));
            assert_eq!(source.resolve().await.unwrap(), sha());
            assert_eq!(list(&source).await.unwrap().files.len(), 3);
        }
    }
}

#[tokio::test]
async fn a_rate_limit_that_lasts_is_told_with_its_end() {
    let hours = || answer(429, &[("ratelimit", r#""api";r=0;t=7200"#)], "");
    let world = World::new(always("/api/", hours), no_fault()).await;
    let source = world.source("hf://org/model", Some(TOKEN));
    let error = source.resolve().await.unwrap_err();
    let SourceError::Unavailable { retry_after, .. } = &error else {
        panic!("{error}")
    };
    assert!(
        retry_after.unwrap() > Duration::from_secs(7000),
        "{error:?}"
    );
    let before = world.hub.seen().len();
    let other = world.source("hf://org/model", Some(TOKEN));
    list(&other).await.unwrap_err();
    assert_eq!(world.hub.seen().len(), before, "the limit is not shared");
}

#[tokio::test]
async fn a_hub_that_fails_is_asked_again_and_then_told() {
    let reply = || answer(503, &[], "");
    for part in ["/revision/", "/tree/", "/resolve/"] {
        let world = World::new(first(2, part, reply), no_fault()).await;
        let source = world.source("hf://org/model", None);
        source.resolve().await.unwrap();
        let listing = list(&source).await.unwrap();
        read(&source, &listing.files[1], 0..10).await.unwrap();
    }
    let world = World::new(always("/api/", reply), no_fault()).await;
    let source = world.source("hf://org/model", None);
    for error in [
        source.resolve().await.unwrap_err(),
        list(&source).await.unwrap_err(),
    ] {
        assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
        assert!(text(&error).contains("503"), "{error}");
    }
}

#[tokio::test]
async fn a_host_that_refuses_connections_is_named_with_the_cause() {
    let world = World::new(no_fault(), no_fault()).await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let url = format!("http://{address}");
    let source = source_at(&url, &world.clients, "hf://org/model", Some(TOKEN));
    for error in [
        source.resolve().await.unwrap_err(),
        list(&source).await.unwrap_err(),
    ] {
        let text = format!("{error}");
        assert_eq!(
            text,
            format!("{address} is unavailable: connection refused")
        );
    }
}

mod proof;
mod reading;
mod standin;
