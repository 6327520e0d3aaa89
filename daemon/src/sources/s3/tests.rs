//! The source against an S3 server on loopback.

mod chain;
mod listing;
mod reading;
mod refusals;

use aws_config::{BehaviorVersion, SdkConfig};
use futures::TryStreamExt;
use secrecy::SecretString;
use tokio::sync::OnceCell;
use weightd_standin::{PutOptions, S3Server};

use super::*;

/// Clients that look neither at the environment nor for an instance.
fn clients() -> Arc<S3Clients> {
    let base = SdkConfig::builder().behavior_version(BehaviorVersion::latest());
    S3Clients::with_base(OnceCell::new_with(Some(base.build()))).unwrap()
}

fn keys(access_key_id: &str, secret: &str) -> S3Identity {
    S3Identity::Keys(S3Keys {
        access_key_id: access_key_id.to_owned(),
        secret_access_key: SecretString::from(secret),
        session_token: None,
    })
}

fn config(s3: &S3Server) -> S3Config {
    S3Config {
        endpoint: Some(s3.endpoint().parse().unwrap()),
        identity: keys(s3.access_key(), s3.secret_key()),
        ..S3Config::default()
    }
}

async fn server() -> S3Server {
    S3Server::start(weightd_standin::S3Config::default().page_size(2))
        .await
        .unwrap()
}

fn open(s3: &S3Server, model: &str) -> S3Source {
    S3Source::new(clients(), config(s3), model.parse().unwrap())
}

/// A server with two small files and a large one under `s3://models/x`.
async fn model() -> S3Server {
    let s3 = server().await;
    for (key, bytes) in [
        ("x/config.json", b"{}".to_vec()),
        ("x/sub/vocab.txt", b"a b c".to_vec()),
        ("x/model.safetensors", large()),
    ] {
        s3.put("models", key, bytes, PutOptions::default());
    }
    s3
}

fn large() -> Vec<u8> {
    (0..1_000_000_u32).map(|at| (at % 251) as u8).collect()
}

async fn list(source: &S3Source) -> Result<Listing, SourceError> {
    let revision = source.resolve().await?;
    source.list(&revision, &Patterns::default()).await
}

async fn listed(s3: &S3Server, model: &str) -> Result<Vec<RemoteFile>, SourceError> {
    Ok(list(&open(s3, model)).await?.files)
}

fn paths(files: &[RemoteFile]) -> Vec<&str> {
    files.iter().map(|file| file.path.as_str()).collect()
}

fn file<'a>(files: &'a [RemoteFile], path: &str) -> &'a RemoteFile {
    files
        .iter()
        .find(|file| file.path.as_str() == path)
        .unwrap()
}

async fn bytes(
    source: &S3Source,
    file: &RemoteFile,
    range: Range<u64>,
) -> Result<Vec<u8>, SourceError> {
    let pieces: Vec<_> = source.read(file, range).await?.try_collect().await?;
    Ok(pieces.concat())
}
