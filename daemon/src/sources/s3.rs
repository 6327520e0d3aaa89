//! Models below a prefix of an S3 bucket.
//!
//! The listing is the revision: keys, sizes and ETags. Reads name the ETag (and the version, where the
//! bucket keeps them), so an object that changes under a fetch is an error and never a mixture.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_s3::Client;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::types::ChecksumMode;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use weightd_core::model::{ModelRef, Patterns, RelPath, Revision};
use weightd_core::source::{ByteStream, Listing, RemoteFile, Source, SourceError, select};

mod checksums;
mod client;
mod errors;
#[cfg(test)]
mod tests;

pub use client::{S3Clients, S3Config};

use errors::{Ask, of_sdk};

/// Objects that are asked for their metadata at once.
const HEADS: usize = 16;

/// One model in S3, for one fetch.
pub struct S3Source {
    clients: Arc<S3Clients>,
    model: ModelRef,
    bucket: String,
    prefix: String,
    /// What was listed, until [`Source::list`] takes it.
    listed: Mutex<Option<(Revision, Vec<Object>)>>,
    /// How to ask for each file's very bytes.
    pinned: Mutex<HashMap<RelPath, Pinned>>,
}

#[derive(Debug, Clone)]
struct Object {
    key: String,
    relative: String,
    size: u64,
    etag: Option<String>,
}

#[derive(Debug, Clone)]
struct Pinned {
    key: String,
    etag: Option<String>,
    version: Option<String>,
}

impl S3Source {
    /// Reads `model`, whose scheme is `s3`.
    #[must_use]
    pub fn new(clients: Arc<S3Clients>, model: ModelRef) -> Self {
        let (bucket, prefix) = model.name().split_once('/').unwrap_or((model.name(), ""));
        let (bucket, prefix) = (bucket.to_owned(), prefix.to_owned());
        Self {
            clients,
            model,
            bucket,
            prefix,
            listed: Mutex::default(),
            pinned: Mutex::default(),
        }
    }

    async fn client(&self) -> Result<Client, SourceError> {
        self.clients.client(&self.bucket).await
    }

    /// Lists the prefix. A bucket of another region says so once; then that one is asked.
    async fn list_all(&self) -> Result<Vec<Object>, SourceError> {
        match self.list_pages().await {
            Err(Ask::Region(region)) => {
                self.clients.remember_region(&self.bucket, &region);
                self.list_pages().await.map_err(Ask::into_error)
            }
            result => result.map_err(Ask::into_error),
        }
    }

    async fn list_pages(&self) -> Result<Vec<Object>, Ask> {
        let client = self.client().await.map_err(Ask::Error)?;
        // With the slash, so that `models/x` does not take in `models/xy`.
        let prefix = if self.prefix.is_empty() {
            String::new()
        } else {
            format!("{}/", self.prefix)
        };
        let mut pages = client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(&prefix)
            .into_paginator()
            .send();
        let mut objects = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| {
                of_sdk(&format!("s3://{}", self.bucket), "s3:ListBucket", &error)
            })?;
            for object in page.contents.unwrap_or_default() {
                let key = object.key.unwrap_or_default();
                let Some(relative) = key.strip_prefix(&prefix) else {
                    continue;
                };
                let size = u64::try_from(object.size.unwrap_or(0)).unwrap_or(0);
                // Consoles make an empty object to show a folder.
                if (relative.is_empty() || relative.ends_with('/')) && size == 0 {
                    continue;
                }
                objects.push(Object {
                    relative: relative.to_owned(),
                    size,
                    etag: object.e_tag,
                    key,
                });
            }
        }
        Ok(objects)
    }

    async fn resolve_now(&self) -> Result<Revision, SourceError> {
        let objects = self.list_all().await?;
        if objects.is_empty() {
            return Err(self.nothing_there().await);
        }
        let line = |object: &Object| {
            format!(
                "{}\0{}\0{}",
                object.relative,
                object.size,
                object.etag.as_deref().unwrap_or("")
            )
        };
        let revision = Revision::of_listing(objects.iter().map(line));
        if let Some(asked) = self.model.pinned().filter(|asked| *asked != revision) {
            return Err(SourceError::NotFound {
                what: self.model.to_string(),
                detail: format!("the bucket now holds revision {revision}, no longer {asked}"),
                hint: Some("leave the revision away to take what is there now".to_owned()),
            });
        }
        *self.listed.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((revision.clone(), objects));
        Ok(revision)
    }

    /// Why the prefix is empty, as well as we can tell.
    async fn nothing_there(&self) -> SourceError {
        let mut hint = format!(
            "`aws s3 ls s3://{}/` shows what the bucket holds",
            self.model.name()
        );
        if let (Ok(client), false) = (self.client().await, self.prefix.is_empty()) {
            let head = client
                .head_object()
                .bucket(&self.bucket)
                .key(&self.prefix)
                .send()
                .await;
            if head.is_ok() {
                hint = "that is a single object: name the folder that holds it".to_owned();
            }
        }
        SourceError::NotFound {
            what: self.model.to_string(),
            detail: "no object lies below that prefix".to_owned(),
            hint: Some(hint),
        }
    }

    async fn list_at(
        &self,
        revision: &Revision,
        patterns: &Patterns,
    ) -> Result<Listing, SourceError> {
        let listed = self
            .listed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let listed = match listed {
            Some(listed) => listed,
            None => {
                self.resolve_now().await?;
                let again = self
                    .listed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                again.expect("resolve_now has just put it there")
            }
        };
        if listed.0 != *revision {
            let detail = "other objects lie there now".to_owned();
            return Err(SourceError::Changed {
                what: self.model.to_string(),
                detail,
            });
        }
        let objects = listed
            .1
            .into_iter()
            .map(|object| (object.relative.clone(), object.size, object));
        let (chosen, left_out) = select(&self.model, objects.collect(), patterns)?;
        let heads = chosen
            .into_iter()
            .map(|(path, _, object)| self.look_at(path, object));
        let mut files: Vec<RemoteFile> = stream::iter(heads)
            .buffer_unordered(HEADS)
            .try_collect()
            .await?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Listing { files, left_out })
    }

    /// Asks for an object's version and checksums.
    async fn look_at(&self, path: RelPath, object: Object) -> Result<RemoteFile, SourceError> {
        let what = format!("s3://{}/{}", self.bucket, object.key);
        let head = self.client().await?.head_object();
        let head = head
            .bucket(&self.bucket)
            .key(&object.key)
            .checksum_mode(ChecksumMode::Enabled)
            .send()
            .await;
        let head =
            head.map_err(
                |error| match of_sdk(&what, "s3:GetObject", &error).into_error() {
                    // It was listed a moment ago.
                    SourceError::NotFound { what, .. } => SourceError::Changed {
                        what,
                        detail: "it is gone".to_owned(),
                    },
                    error => error,
                },
            )?;
        let size = head
            .content_length()
            .and_then(|size| u64::try_from(size).ok());
        let same_etag = match (&object.etag, head.e_tag()) {
            (Some(listed), Some(now)) => listed == now,
            _ => true,
        };
        if !same_etag || size != Some(object.size) {
            return Err(SourceError::Changed {
                what,
                detail: "its size or ETag is another now".to_owned(),
            });
        }
        let claims = checksums::claims(&what, &head)?;
        let etag = head.e_tag().or(object.etag.as_deref()).map(str::to_owned);
        // An unversioned object has the version "null".
        let version = head
            .version_id()
            .filter(|version| *version != "null")
            .map(str::to_owned);
        let identity = etag
            .as_ref()
            .map(|etag| self.identity(&object, etag, version.as_deref()));
        let pinned = Pinned {
            key: object.key,
            etag,
            version,
        };
        self.pinned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(path.clone(), pinned);
        Ok(RemoteFile {
            path,
            size: object.size,
            claims,
            identity,
            xet_hash: None,
        })
    }

    fn identity(&self, object: &Object, etag: &str, version: Option<&str>) -> String {
        let endpoint = self.clients.endpoint().unwrap_or("aws");
        let version = version.unwrap_or("");
        format!(
            "s3\0{endpoint}\0{}\0{}\0{etag}\0{version}\0{}",
            self.bucket, object.key, object.size
        )
    }

    async fn read_range(
        &self,
        file: &RemoteFile,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let pinned = self
            .pinned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&file.path)
            .cloned();
        let pinned = pinned.expect("read is asked for files that list returned");
        let what = format!("s3://{}/{}", self.bucket, pinned.key);
        let whole = range == (0..file.size);
        let asked = (!whole).then(|| format!("bytes={}-{}", range.start, range.end - 1));
        let request = self
            .client()
            .await?
            .get_object()
            .bucket(&self.bucket)
            .key(&pinned.key);
        let request = request
            .set_if_match(pinned.etag.clone())
            .set_version_id(pinned.version);
        let answer = request.set_range(asked).send().await;
        let answer =
            answer.map_err(
                |error| match of_sdk(&what, "s3:GetObject", &error).into_error() {
                    SourceError::NotFound { what, .. } => SourceError::Changed {
                        what,
                        detail: "it is gone".to_owned(),
                    },
                    error => error,
                },
            )?;
        // Not every server knows If-Match.
        if pinned.etag.is_some()
            && answer.e_tag().is_some()
            && answer.e_tag() != pinned.etag.as_deref()
        {
            return Err(SourceError::Changed {
                what,
                detail: "it has another ETag now".to_owned(),
            });
        }
        check_range(&what, &answer, file.size, &range)?;
        Ok(body(what, answer, range.end - range.start))
    }
}

/// Checks that the answer holds just the bytes that were asked for, or all of them from the first on.
fn check_range(
    what: &str,
    answer: &GetObjectOutput,
    size: u64,
    range: &Range<u64>,
) -> Result<(), SourceError> {
    let Some(got) = answer.content_range() else {
        let length = answer
            .content_length()
            .and_then(|length| u64::try_from(length).ok());
        return match (range.start, length) {
            (0, Some(length)) if length == size => Ok(()),
            (0, _) => Err(SourceError::Changed {
                what: what.to_owned(),
                detail: "it has another size now".to_owned(),
            }),
            _ => Err(SourceError::NoRanges {
                what: what.to_owned(),
            }),
        };
    };
    let expected = format!("bytes {}-{}/{size}", range.start, range.end - 1);
    if got == expected {
        return Ok(());
    }
    let detail = format!("asked for {expected}, it sent {got}");
    Err(SourceError::Unavailable {
        what: what.to_owned(),
        detail,
        retry_after: None,
    })
}

/// The body as it comes off the connection, cut where the range ends.
fn body(what: String, answer: GetObjectOutput, length: u64) -> ByteStream {
    let pieces = stream::unfold((answer.body, length), move |(mut body, left)| {
        let what = what.clone();
        async move {
            if left == 0 {
                return None;
            }
            let mut piece: Bytes = match body.next().await? {
                Ok(piece) => piece,
                Err(error) => {
                    let detail = weightd_core::errors::Chain(&error).to_string();
                    let error = SourceError::Unavailable {
                        what,
                        detail,
                        retry_after: None,
                    };
                    return Some((Err(error), (body, 0)));
                }
            };
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            let left = left - piece.len() as u64;
            Some((Ok(piece), (body, left)))
        }
    });
    pieces.boxed()
}

impl Source for S3Source {
    fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>> {
        self.resolve_now().boxed()
    }

    fn list<'a>(
        &'a self,
        revision: &'a Revision,
        patterns: &'a Patterns,
    ) -> BoxFuture<'a, Result<Listing, SourceError>> {
        self.list_at(revision, patterns).boxed()
    }

    fn read<'a>(
        &'a self,
        file: &'a RemoteFile,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        self.read_range(file, range).boxed()
    }
}

/// The output of HEAD that [`checksums`] reads.
type Head = HeadObjectOutput;
