//! Listings of objects and of their versions.

use std::collections::BTreeSet;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use s3s::dto::*;
use s3s::{S3Result, s3_error};

use super::object::{self, Store};

/// What S3 leaves as it is under `encoding-type=url`.
const URL: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'*')
    .remove(b'/');

/// A key, or what several keys have in common up to a delimiter.
enum Item<'a> {
    Object(&'a str, &'a object::Object),
    Prefix(String),
}

impl Item<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Object(key, _) => key,
            Self::Prefix(prefix) => prefix,
        }
    }
}

/// One page of `ListObjectsV2`.
pub(super) fn objects(
    store: &Store,
    page_size: usize,
    input: ListObjectsV2Input,
) -> S3Result<ListObjectsV2Output> {
    let buckets = store.buckets();
    let bucket = buckets
        .get(&input.bucket)
        .ok_or_else(|| s3_error!(NoSuchBucket))?;
    let prefix = input.prefix.as_deref().unwrap_or_default();
    let after = match &input.continuation_token {
        Some(token) => Some(decode_token(token)?),
        None => input.start_after.clone(),
    };
    let asked = input.max_keys.and_then(|keys| usize::try_from(keys).ok());
    let limit = asked.unwrap_or(page_size).min(page_size);
    let mut page = items(bucket, prefix, input.delimiter.as_deref())
        .filter(|item| {
            after
                .as_ref()
                .is_none_or(|after| item.name() > after.as_str())
        })
        .take(limit + 1)
        .collect::<Vec<_>>();
    let more = page.len() > limit && limit > 0;
    page.truncate(limit);
    let next = page
        .last()
        .filter(|_| more)
        .map(|item| hex::encode(item.name()));

    let is_url = input.encoding_type.as_ref();
    let is_url = is_url.is_some_and(|kind| kind.as_str() == EncodingType::URL);
    let encode = |text: &str| match is_url {
        true => utf8_percent_encode(text, URL).to_string(),
        false => text.to_owned(),
    };
    let mut contents = Vec::new();
    let mut prefixes = Vec::new();
    for item in &page {
        match item {
            Item::Object(key, object) => contents.push(entry(encode(key), object)),
            Item::Prefix(prefix) => prefixes.push(CommonPrefix {
                prefix: Some(encode(prefix)),
            }),
        }
    }
    Ok(ListObjectsV2Output {
        key_count: Some(page.len() as i32),
        max_keys: Some(limit as i32),
        is_truncated: Some(more),
        next_continuation_token: next,
        contents: Some(contents),
        common_prefixes: Some(prefixes),
        prefix: Some(encode(prefix)),
        delimiter: input.delimiter.as_deref().map(encode),
        start_after: input.start_after.as_deref().map(encode),
        name: Some(input.bucket),
        continuation_token: input.continuation_token,
        encoding_type: input.encoding_type,
        ..ListObjectsV2Output::default()
    })
}

/// Keys below `prefix` in order, those with the delimiter after it rolled up into one.
fn items<'a>(
    bucket: &'a object::Bucket,
    prefix: &'a str,
    delimiter: Option<&'a str>,
) -> impl Iterator<Item = Item<'a>> {
    let mut seen = BTreeSet::new();
    let keys = bucket.objects.range(prefix.to_owned()..);
    keys.take_while(move |(key, _)| key.starts_with(prefix))
        .filter_map(move |(key, _)| {
            let object = bucket.newest(key)?;
            let rest = &key[prefix.len()..];
            let cut = delimiter.and_then(|delimiter| {
                let at = rest.find(delimiter)?;
                Some(prefix.len() + at + delimiter.len())
            });
            match cut {
                None => Some(Item::Object(key, object)),
                Some(end) => {
                    let common = key[..end].to_owned();
                    seen.insert(common.clone()).then_some(Item::Prefix(common))
                }
            }
        })
}

fn entry(key: String, object: &object::Object) -> Object {
    let algorithm = object.algorithm.map(ChecksumAlgorithm::from_static);
    Object {
        key: Some(key),
        size: Some(object.content.size() as i64),
        e_tag: Some(ETag::Strong(object.etag.clone())),
        last_modified: Some(object.modified.into()),
        checksum_algorithm: algorithm.map(|algorithm| vec![algorithm]),
        checksum_type: object.checksum.checksum_type.clone(),
        storage_class: Some(ObjectStorageClass::from_static(
            ObjectStorageClass::STANDARD,
        )),
        ..Object::default()
    }
}

fn decode_token(token: &str) -> S3Result<String> {
    let bytes = hex::decode(token).map_err(|error| s3_error!(error, InvalidArgument))?;
    String::from_utf8(bytes).map_err(|error| s3_error!(error, InvalidArgument))
}

/// All versions below a prefix, newest first for each key, in one page.
pub(super) fn versions(
    store: &Store,
    input: ListObjectVersionsInput,
) -> S3Result<ListObjectVersionsOutput> {
    let buckets = store.buckets();
    let bucket = buckets
        .get(&input.bucket)
        .ok_or_else(|| s3_error!(NoSuchBucket))?;
    let prefix = input.prefix.as_deref().unwrap_or_default();
    let mut versions = Vec::new();
    let mut markers = Vec::new();
    for (key, objects) in &bucket.objects {
        for (age, object) in objects.iter().rev().enumerate() {
            if !key.starts_with(prefix) {
                continue;
            }
            let version_id = object.version_id.as_deref().unwrap_or("null").to_owned();
            if object.deleted {
                markers.push(DeleteMarkerEntry {
                    key: Some(key.clone()),
                    is_latest: Some(age == 0),
                    last_modified: Some(object.modified.into()),
                    version_id: Some(version_id),
                    ..DeleteMarkerEntry::default()
                });
                continue;
            }
            versions.push(ObjectVersion {
                key: Some(key.clone()),
                is_latest: Some(age == 0),
                e_tag: Some(ETag::Strong(object.etag.clone())),
                size: Some(object.content.size() as i64),
                last_modified: Some(object.modified.into()),
                version_id: Some(version_id),
                ..ObjectVersion::default()
            });
        }
    }
    Ok(ListObjectVersionsOutput {
        is_truncated: Some(false),
        versions: Some(versions),
        delete_markers: Some(markers),
        name: Some(input.bucket),
        prefix: input.prefix,
        ..ListObjectVersionsOutput::default()
    })
}
