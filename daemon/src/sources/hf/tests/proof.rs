//! What the Hub and its CDN say, and what it does not prove.

use super::*;

#[tokio::test]
async fn a_file_that_all_may_see_is_no_proof_that_one_may_read() {
    let gate: Fault = Box::new(|seen| {
        let card = ["README.md", ".gitattributes"];
        let public = card.iter().any(|name| seen.path.contains(name));
        if seen.path.contains("/resolve/") && !public && seen.authorization.is_none() {
            return Some(answer(401, &[("x-error-code", "GatedRepo")], ""));
        }
        let first = seen.path.contains("/tree/") && !seen.path.contains("cursor");
        let link = format!("<{}&cursor=2>; rel=\"next\"", seen.path);
        let page = format!(
            r#"[{{"type": "file", "oid": "{OTHER}", "size": 1, "path": ".gitattributes"}},
                {{"type": "file", "oid": "{OTHER}", "size": 1, "path": "README.md"}}]"#
        );
        first.then(|| answer(200, &[("link", &link)], page))
    });
    let world = World::new(gate, no_fault()).await;
    let nobody = world.source("hf://org/model", None);
    let error = nobody.authorise(&sha()).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
    let reader = world.source("hf://org/model", Some(TOKEN));
    reader.authorise(&sha()).await.unwrap();
}

#[tokio::test]
async fn a_foreign_hash_is_shown_short_and_on_one_line() {
    let reply = || {
        let oid = "x\\u001b[31m".repeat(1000);
        let page = format!(r#"[{{"type": "file", "oid": "{oid}", "size": 1, "path": "a.json"}}]"#);
        answer(200, &[], page)
    };
    let world = World::new(always("/tree/", reply), no_fault()).await;
    let error = list(&world.source("hf://org/model", None))
        .await
        .unwrap_err();
    let said = error.to_string();
    assert!(said.len() < 400 && !said.contains('\u{1b}'), "{said:?}");
}

#[tokio::test]
async fn an_address_that_a_cdn_calls_a_bad_request_is_renewed() {
    let reply = || answer(400, &[], "<Error><Code>ExpiredToken</Code></Error>");
    let world = World::new(no_fault(), first(1, "/blob", reply)).await;
    let (source, listing) = world.listed().await;
    read(&source, &listing.files[1], 0..10).await.unwrap();
    assert_eq!(world.hub.count("HEAD", "/resolve/"), 2);
}

#[tokio::test]
async fn a_read_does_not_sit_a_rate_limit_out() {
    let reply = || answer(429, &[("ratelimit", r#""resolvers";r=0;t=4"#)], "");
    let world = World::new(first(1, "/resolve/", reply), no_fault()).await;
    let (source, listing) = world.listed().await;
    for file in &listing.files {
        let reading = read(&source, file, 0..10);
        let reading = tokio::time::timeout(Duration::from_secs(10), reading).await;
        let error = reading
            .expect("it holds a connection meanwhile")
            .unwrap_err();
        let SourceError::Unavailable { retry_after, .. } = &error else {
            panic!("{error}")
        };
        assert!(retry_after.unwrap() > Duration::from_secs(2), "{error:?}");
    }
    assert_eq!(
        world.hub.count("GET", "/resolve/") + world.hub.count("HEAD", "/resolve/"),
        1
    );
}

#[tokio::test]
async fn a_gated_model_is_listed_to_all_and_read_by_some() {
    let gate: Fault = Box::new(|seen| {
        let gated = seen.path.contains("/resolve/") && seen.authorization.is_none();
        gated.then(|| answer(401, &[("x-error-code", "GatedRepo")], ""))
    });
    let world = World::new(gate, no_fault()).await;
    let nobody = world.source("hf://org/model", None);
    list(&nobody).await.unwrap();
    let error = nobody.authorise(&sha()).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
    world
        .source("hf://org/model", Some(TOKEN))
        .authorise(&sha())
        .await
        .unwrap();
    assert_eq!(world.cdn.seen().len(), 0);
}

#[tokio::test]
async fn a_login_page_is_no_proof_that_one_may_read() {
    let login: Fault = Box::new(|seen| match &seen.path {
        path if path.contains("/resolve/") => Some(answer(302, &[("location", "/login")], "")),
        path if path == "/login" => Some(answer(200, &[], "<html>")),
        _ => None,
    });
    let world = World::new(login, no_fault()).await;
    let source = world.source("hf://org/model", None);
    let error = source.authorise(&sha()).await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid { .. }), "{error}");
}
