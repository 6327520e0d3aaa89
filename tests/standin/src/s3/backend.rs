//! The S3 operations that weightd and its tests use, on the objects of a [`Store`].

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use futures::StreamExt;
use s3s::access::{S3Access, S3AccessContext};
use s3s::dto::*;
use s3s::path::S3Path;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};

use super::list;
use super::object::{Object, Store};
use super::{Checksum as Algorithm, PutOptions};
use crate::content::Content;

type Answer<'a, T> = Pin<Box<dyn Future<Output = S3Result<T>> + Send + 'a>>;

#[derive(Debug)]
pub(super) struct Backend {
    store: Arc<Store>,
    page_size: usize,
}

impl Backend {
    pub(super) fn new(store: Arc<Store>, page_size: usize) -> Self {
        Self { store, page_size }
    }

    fn find(&self, bucket: &str, key: &str, version_id: Option<&str>) -> S3Result<Object> {
        let buckets = self.store.buckets();
        let bucket = buckets.get(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        let Some(version_id) = version_id else {
            let newest = bucket.newest(key);
            return newest.cloned().ok_or_else(|| s3_error!(NoSuchKey));
        };
        let object = bucket
            .version(key, version_id)
            .ok_or_else(|| s3_error!(NoSuchVersion))?;
        if object.deleted {
            return Err(s3_error!(MethodNotAllowed));
        }
        Ok(object.clone())
    }

    fn has_bucket(&self, bucket: &str) -> S3Result<()> {
        let known = self.store.buckets().contains_key(bucket);
        known.then_some(()).ok_or_else(|| s3_error!(NoSuchBucket))
    }

    fn get(&self, input: &GetObjectInput) -> S3Result<GetObjectOutput> {
        let object = self.find(&input.bucket, &input.key, input.version_id.as_deref())?;
        check_etag(&object, input.if_match.as_ref())?;
        let size = object.content.size();
        let range = input.range.map(|range| range.check(size)).transpose()?;
        let bytes = range.clone().unwrap_or(0..size);
        let length = bytes.end - bytes.start;
        let body = object.content.body(bytes.start, length);
        let body = body.map_err(|error| s3_error!(error, InternalError))?;
        // As S3 has it: the checksum is of the whole, so it comes only with the whole.
        let asked = is_asked(input.checksum_mode.as_ref()) && length == size;
        let checksum = given_if(asked, &object);
        Ok(GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            body: Some(StreamingBlob::from(s3s::Body::http_body(body))),
            checksum_crc32: checksum.checksum_crc32,
            checksum_crc32c: checksum.checksum_crc32c,
            checksum_crc64nvme: checksum.checksum_crc64nvme,
            checksum_sha1: checksum.checksum_sha1,
            checksum_sha256: checksum.checksum_sha256,
            checksum_type: checksum.checksum_type,
            content_length: Some(length as i64),
            content_range: range
                .map(|range| format!("bytes {}-{}/{size}", range.start, range.end - 1)),
            e_tag: Some(ETag::Strong(object.etag)),
            last_modified: Some(object.modified.into()),
            metadata: Some(object.metadata.into_iter().collect()),
            version_id: object.version_id,
            ..GetObjectOutput::default()
        })
    }

    fn head(&self, input: &HeadObjectInput) -> S3Result<HeadObjectOutput> {
        let object = self.find(&input.bucket, &input.key, input.version_id.as_deref())?;
        check_etag(&object, input.if_match.as_ref())?;
        let checksum = given_if(is_asked(input.checksum_mode.as_ref()), &object);
        Ok(HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            checksum_crc32: checksum.checksum_crc32,
            checksum_crc32c: checksum.checksum_crc32c,
            checksum_crc64nvme: checksum.checksum_crc64nvme,
            checksum_sha1: checksum.checksum_sha1,
            checksum_sha256: checksum.checksum_sha256,
            checksum_type: checksum.checksum_type,
            content_length: Some(object.content.size() as i64),
            e_tag: Some(ETag::Strong(object.etag)),
            last_modified: Some(object.modified.into()),
            metadata: Some(object.metadata.into_iter().collect()),
            version_id: object.version_id,
            ..HeadObjectOutput::default()
        })
    }

    async fn put(&self, input: PutObjectInput) -> S3Result<PutObjectOutput> {
        self.has_bucket(&input.bucket)?;
        let mut bytes = Vec::new();
        if let Some(mut body) = input.body {
            while let Some(chunk) = body.next().await {
                let chunk = chunk.map_err(|_| s3_error!(IncompleteBody))?;
                bytes.extend_from_slice(&chunk);
            }
        }
        let checksum = match () {
            () if input.checksum_crc32.is_some() => Algorithm::Crc32,
            () if input.checksum_crc32c.is_some() => Algorithm::Crc32c,
            () if input.checksum_sha1.is_some() => Algorithm::Sha1,
            () if input.checksum_sha256.is_some() => Algorithm::Sha256,
            () => Algorithm::Crc64Nvme,
        };
        let options = PutOptions {
            metadata: input.metadata.into_iter().flatten().collect(),
            checksum,
            ..PutOptions::default()
        };
        let content = Content::Memory(bytes.into());
        let stored = self.store.put(&input.bucket, &input.key, content, options);
        let stored = stored.map_err(|error| s3_error!(error, InternalError))?;
        Ok(PutObjectOutput {
            e_tag: Some(ETag::Strong(stored.etag)),
            version_id: stored.version_id,
            ..PutObjectOutput::default()
        })
    }

    fn delete(&self, input: &DeleteObjectInput) -> S3Result<DeleteObjectOutput> {
        self.has_bucket(&input.bucket)?;
        let marker = self.store.delete(&input.bucket, &input.key);
        Ok(DeleteObjectOutput {
            delete_marker: marker.as_ref().map(|_| true),
            version_id: marker.and_then(|marker| marker.version_id),
            ..DeleteObjectOutput::default()
        })
    }

    fn versioning(&self, bucket: &str) -> S3Result<GetBucketVersioningOutput> {
        self.has_bucket(bucket)?;
        let versioned = self.store.change(bucket, |bucket| bucket.versioned);
        let enabled = || BucketVersioningStatus::from_static(BucketVersioningStatus::ENABLED);
        Ok(GetBucketVersioningOutput {
            status: versioned.then(enabled),
            ..GetBucketVersioningOutput::default()
        })
    }

    fn buckets(&self) -> ListBucketsOutput {
        let buckets = self.store.buckets();
        let buckets = buckets.keys().map(|name| Bucket {
            name: Some(name.clone()),
            ..Bucket::default()
        });
        ListBucketsOutput {
            buckets: Some(buckets.collect()),
            ..ListBucketsOutput::default()
        }
    }
}

fn check_etag(object: &Object, wanted: Option<&ETagCondition>) -> S3Result<()> {
    match wanted {
        Some(ETagCondition::ETag(etag)) if etag.value() != object.etag => {
            Err(s3_error!(PreconditionFailed))
        }
        _ => Ok(()),
    }
}

fn is_asked(mode: Option<&ChecksumMode>) -> bool {
    mode.is_some_and(|mode| mode.as_str() == ChecksumMode::ENABLED)
}

fn given_if(asked: bool, object: &Object) -> Checksum {
    if asked {
        object.checksum.clone()
    } else {
        Checksum::default()
    }
}

/// Writes out what the `async_trait` attribute would, for one operation after another.
macro_rules! operations {
    ($($name:ident($self:ident, $input:ident: $in:ty) -> $out:ty { $body:expr })*) => {$(
        fn $name<'life0, 'async_trait>(
            &'life0 $self,
            request: S3Request<$in>,
        ) -> Answer<'async_trait, S3Response<$out>>
        where
            'life0: 'async_trait,
            Self: 'async_trait,
        {
            Box::pin(async move {
                let $input = request.input;
                let output: S3Result<$out> = $body;
                output.map(S3Response::new)
            })
        }
    )*};
}

impl S3 for Backend {
    operations! {
        get_object(self, input: GetObjectInput) -> GetObjectOutput { self.get(&input) }
        head_object(self, input: HeadObjectInput) -> HeadObjectOutput { self.head(&input) }
        put_object(self, input: PutObjectInput) -> PutObjectOutput { self.put(input).await }
        delete_object(self, input: DeleteObjectInput) -> DeleteObjectOutput {
            self.delete(&input)
        }
        list_objects_v2(self, input: ListObjectsV2Input) -> ListObjectsV2Output {
            list::objects(&self.store, self.page_size, input)
        }
        list_object_versions(self, input: ListObjectVersionsInput) -> ListObjectVersionsOutput {
            list::versions(&self.store, input)
        }
        list_buckets(self, _input: ListBucketsInput) -> ListBucketsOutput { Ok(self.buckets()) }
        head_bucket(self, input: HeadBucketInput) -> HeadBucketOutput {
            self.has_bucket(&input.bucket).map(|()| HeadBucketOutput::default())
        }
        get_bucket_location(self, input: GetBucketLocationInput) -> GetBucketLocationOutput {
            self.has_bucket(&input.bucket).map(|()| GetBucketLocationOutput::default())
        }
        get_bucket_versioning(self, input: GetBucketVersioningInput) -> GetBucketVersioningOutput {
            self.versioning(&input.bucket)
        }
    }
}

/// Who may do what: a good signature everything, none at all only reading where that is allowed.
#[derive(Debug)]
pub(super) struct Access {
    store: Arc<Store>,
}

impl Access {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    fn decide(&self, context: &S3AccessContext<'_>) -> S3Result<()> {
        if context.credentials().is_some() {
            return Ok(());
        }
        let bucket = match context.s3_path() {
            S3Path::Bucket { bucket } | S3Path::Object { bucket, .. } => bucket,
            S3Path::Root => return Err(s3_error!(AccessDenied)),
        };
        let buckets = self.store.buckets();
        let open = buckets
            .get(&**bucket)
            .is_some_and(|bucket| bucket.anonymous);
        let reads = matches!(context.method().as_str(), "GET" | "HEAD");
        if open && reads {
            Ok(())
        } else {
            Err(s3_error!(AccessDenied))
        }
    }
}

impl S3Access for Access {
    fn check<'life0, 'life1, 'life2, 'async_trait>(
        &'life0 self,
        context: &'life1 mut S3AccessContext<'life2>,
    ) -> Answer<'async_trait, ()>
    where
        'life0: 'async_trait,
        'life1: 'async_trait,
        'life2: 'async_trait,
        Self: 'async_trait,
    {
        let decision = self.decide(context);
        Box::pin(std::future::ready(decision))
    }
}
