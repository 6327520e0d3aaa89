//! What every source promises the fetcher, whatever vendor is behind it.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use weightd_core::digest::Verifier;
use weightd_core::model::{ModelRef, Patterns, Revision};
use weightd_core::source::{RemoteFile, Source, SourceError};
use weightd_standin::s3::{PutOptions, S3Config as ServerConfig, S3Server};
use weightd_standin::{Files, Hub, HubConfig, Repo, generate};

use super::directory::DirectorySource;
use super::hf::{HfClients, HfConfig, HfSource};
use super::s3::{S3Clients, S3Config, S3Identity, S3Keys, S3Source};

type Model = Vec<(String, Bytes)>;

/// Opens a model anew, as each fetch does.
type Open = Box<dyn Fn(Option<&Revision>) -> Arc<dyn Source>>;

/// The same model at a Hub, in a bucket and in a directory.
async fn origins(dir: &Path, model: &Model) -> (Hub, S3Server) {
    let hub = Hub::start(HubConfig::default().page_size(2)).await.unwrap();
    hub.add_repo(Repo::new("org/model").commit("main", Files::new().model(model.clone())));
    let s3 = S3Server::start(ServerConfig::default().page_size(3))
        .await
        .unwrap();
    for (path, bytes) in model {
        std::fs::write(dir.join(path), bytes).unwrap();
        s3.put(
            "bucket",
            &format!("m/{path}"),
            bytes.clone(),
            PutOptions::default(),
        );
    }
    (hub, s3)
}

fn named(text: &str, revision: Option<&Revision>) -> ModelRef {
    let model: ModelRef = text.parse().unwrap();
    revision.map_or(model.clone(), |revision| model.at(revision))
}

fn sources(dir: &Path, hub: &Hub, s3: &S3Server) -> Vec<(&'static str, Open)> {
    let hf_clients = HfClients::new().unwrap();
    let hf_config = HfConfig::new(hub.endpoint().parse().unwrap(), None).unwrap();
    let open_hf: Open = Box::new(move |revision| {
        let model = named("hf://org/model", revision);
        Arc::new(HfSource::new(
            Arc::clone(&hf_clients),
            hf_config.clone(),
            model,
        ))
    });
    let keys = S3Keys {
        access_key_id: s3.access_key().to_owned(),
        secret_access_key: s3.secret_key().to_owned().into(),
        session_token: None,
    };
    let s3_config = S3Config {
        endpoint: Some(s3.endpoint().parse().unwrap()),
        region: Some("us-east-1".to_owned()),
        identity: S3Identity::Keys(keys),
        ..S3Config::default()
    };
    let s3_clients = S3Clients::new().unwrap();
    let open_s3: Open = Box::new(move |revision| {
        let model = named("s3://bucket/m", revision);
        Arc::new(S3Source::new(
            Arc::clone(&s3_clients),
            s3_config.clone(),
            model,
        ))
    });
    let directory = format!("file://{}", dir.display());
    let open_file: Open =
        Box::new(move |revision| Arc::new(DirectorySource::new(named(&directory, revision), None)));
    vec![("hf", open_hf), ("s3", open_s3), ("file", open_file)]
}

async fn read(source: &Arc<dyn Source>, file: &RemoteFile, range: std::ops::Range<u64>) -> Bytes {
    let pieces: Result<Vec<Bytes>, SourceError> =
        source.read(file, range).await.unwrap().try_collect().await;
    pieces.unwrap().concat().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_source_keeps_the_promises_of_the_trait() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = generate::model(4, 2, 200_000);
    model.push(("empty.txt".to_owned(), Bytes::new()));
    model.sort();
    let (hub, s3) = origins(dir.path(), &model).await;
    for (name, open) in sources(dir.path(), &hub, &s3) {
        let source = open(None);
        let revision = source.resolve().await.unwrap();
        assert_eq!(
            open(None).resolve().await.unwrap(),
            revision,
            "{name}: the revision moves by itself"
        );
        let pinned = open(Some(&revision));
        assert_eq!(
            pinned.resolve().await.unwrap(),
            revision,
            "{name}: a pinned revision moves"
        );

        let listing = source.list(&revision, &Patterns::default()).await.unwrap();

        let listed: Vec<(&str, u64)> = listing
            .files
            .iter()
            .map(|file| (file.path.as_str(), file.size))
            .collect();
        let expected: Vec<(&str, u64)> = model
            .iter()
            .map(|(path, bytes)| (path.as_str(), bytes.len() as u64))
            .collect();
        assert_eq!(listed, expected, "{name}: not sorted, or not whole");
        for (file, (path, bytes)) in listing.files.iter().zip(&model) {
            assert!(
                file.claims.sha256.is_some() || file.identity.is_some(),
                "{name}: {path} has no name"
            );
            let mut verifier = Verifier::new(file.size, file.claims);
            verifier.update(bytes);
            verifier
                .finish()
                .unwrap_or_else(|error| panic!("{name}: {path}: {error}"));
            if file.size == 0 {
                continue;
            }
            let (size, third) = (file.size, file.size / 3);
            for range in [0..size, 0..1, third..size - third, size - 1..size] {
                let got = read(&source, file, range.clone()).await;
                let wanted = &bytes
                    [usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
                assert!(got == wanted, "{name}: {path} {range:?} differs");
            }
        }
        let gone = Revision::new(&"0".repeat(revision.as_str().len())).unwrap();
        let error = open(Some(&gone)).resolve().await.expect_err(name);
        assert!(
            matches!(error, SourceError::NotFound { .. }),
            "{name}: {error}"
        );
    }
}
