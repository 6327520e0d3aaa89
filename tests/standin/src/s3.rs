//! An S3 server: path-style, signed requests, ETags, versions and checksums.
//!
//! `s3s` does the protocol, the signatures and the XML. The objects are our own rather than
//! `s3s-fs` 0.14's, which lacks most of what weightd relies on:
//!
//! - `If-Match` on GET and HEAD is ignored instead of answered with 412;
//! - listings have no `ETag`, no checksum algorithm and no checksum type;
//! - there are no versions: no `versionId`, no `x-amz-version-id`;
//! - checksums come without `x-amz-checksum-type`, and whether or not they were asked for;
//! - an object without a stored ETag is hashed whole on every HEAD and GET;
//! - bodies are read 4 KiB at a time, and objects can only be files.

mod backend;
mod list;
mod object;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use http_body_util::BodyExt;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::task::AbortHandle;

use crate::content::{Body, Content, Pattern};
use crate::fault::{Fault, Origin};
use crate::hub::walk;
use crate::log::Request;
use crate::server::{self, Owner};
use crate::watch::{Watch, empty};

use backend::{Access, Backend};
use object::Store;

/// A checksum that an object was uploaded with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Checksum {
    /// As objects uploaded before 2025 have it.
    None,
    /// What S3 adds by itself.
    #[default]
    Crc64Nvme,
    /// CRC-32C.
    Crc32c,
    /// CRC-32.
    Crc32,
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
}

/// How an object is stored.
#[derive(Debug, Clone, Default)]
pub struct PutOptions {
    /// `x-amz-meta-*`, names without that prefix.
    pub metadata: BTreeMap<String, String>,
    /// Computed at once, over the whole content.
    pub checksum: Checksum,
    /// As a multipart upload leaves it: the ETag ends in `-parts` and is not the MD5, and the
    /// checksum, unless CRC-64/NVME, is composite and not that of the content.
    pub parts: Option<u32>,
    /// In place of the real ETag, without quotes.
    pub etag: Option<String>,
    /// In place of the real checksum, in base64.
    pub claimed_checksum: Option<String>,
}

impl PutOptions {
    /// With this checksum in place of the default one.
    pub fn checksum(checksum: Checksum) -> Self {
        Self {
            checksum,
            ..Self::default()
        }
    }

    /// Adds a piece of `x-amz-meta-*`.
    pub fn meta(mut self, name: &str, value: &str) -> Self {
        self.metadata.insert(name.to_owned(), value.to_owned());
        self
    }

    /// As a multipart upload of so many parts leaves it.
    pub fn parts(mut self, parts: u32) -> Self {
        self.parts = Some(parts);
        self
    }
}

/// What S3 says of an object once stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Without quotes.
    pub etag: String,
    /// Only in a versioned bucket.
    pub version_id: Option<String>,
}

/// How an [`S3Server`] behaves.
#[derive(Debug, Clone)]
pub struct S3Config {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The id of the key that may do everything.
    pub access_key: String,
    /// The key itself.
    pub secret_key: String,
    /// Keys per page of a listing, if a client does not ask for fewer; the real S3's is 1000.
    pub page_size: usize,
}

impl Default for S3Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            access_key: "AKIASTANDIN".to_owned(),
            secret_key: "stand-in-secret".to_owned(),
            page_size: 1000,
        }
    }
}

impl S3Config {
    /// Keys per page of a listing.
    pub fn page_size(mut self, keys: usize) -> Self {
        self.page_size = keys.max(1);
        self
    }
}

#[derive(Debug)]
struct State {
    config: S3Config,
    endpoint: String,
    store: Arc<Store>,
    watch: Arc<Watch>,
}

impl State {
    fn start(config: S3Config) -> io::Result<(Arc<Self>, Vec<AbortHandle>)> {
        let (listener, address) = server::bind(config.listen)?;
        let store = Arc::new(Store::default());
        let backend = Backend::new(store.clone(), config.page_size);
        let mut builder = S3ServiceBuilder::new(backend);
        let key = config.secret_key.as_str();
        builder.set_auth(SimpleAuth::from_single(config.access_key.clone(), key));
        builder.set_access(Access::new(store.clone()));
        let service = Arc::new(builder.build());
        let state = Arc::new(Self {
            endpoint: format!("http://{address}"),
            store,
            watch: Watch::new(),
            config,
        });
        let watch = state.watch.clone();
        let task = server::serve(listener, move |request| {
            let service = service.clone();
            let answer = |request| async move { call(&service, request).await };
            watch.clone().answer(Origin::S3, request, answer)
        })?;
        Ok((state, vec![task]))
    }
}

async fn call(
    service: &S3Service,
    request: http::Request<hyper::body::Incoming>,
) -> Response<Body> {
    match service.call(request.map(s3s::Body::from)).await {
        Ok(response) => response.map(|body| body.map_err(io::Error::other).boxed()),
        Err(_) => empty(http::StatusCode::INTERNAL_SERVER_ERROR),
    }
}

/// A running S3 server; stops when dropped. A bucket comes to be with its first object.
#[derive(Debug)]
pub struct S3Server {
    state: Arc<State>,
    _owner: Owner,
}

impl S3Server {
    /// Starts on the current tokio runtime.
    ///
    /// # Errors
    ///
    /// If the port cannot be bound.
    pub async fn start(config: S3Config) -> io::Result<Self> {
        let (state, tasks) = State::start(config)?;
        Ok(Self {
            state,
            _owner: Owner::Tasks(tasks),
        })
    }

    /// Starts on a runtime in a thread of its own, for callers without one.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started or the port cannot be bound.
    pub fn spawn_thread(config: S3Config) -> io::Result<Self> {
        let (state, owner) = server::spawn_thread(|| State::start(config))?;
        Ok(Self {
            state,
            _owner: owner,
        })
    }

    /// For `AWS_ENDPOINT_URL_S3`.
    pub fn endpoint(&self) -> String {
        self.state.endpoint.clone()
    }

    /// For `AWS_ACCESS_KEY_ID`.
    pub fn access_key(&self) -> &str {
        &self.state.config.access_key
    }

    /// For `AWS_SECRET_ACCESS_KEY`.
    pub fn secret_key(&self) -> &str {
        &self.state.config.secret_key
    }

    /// Makes an empty bucket, unless there is one of that name.
    pub fn create_bucket(&self, bucket: &str) {
        self.state.store.change(bucket, |_| ());
    }

    /// Keeps the older versions of a bucket's objects from now on.
    pub fn set_versioned(&self, bucket: &str) {
        let store = &self.state.store;
        store.change(bucket, |bucket| bucket.versioned = true);
    }

    /// Lets requests without a signature read and list a bucket.
    pub fn allow_anonymous(&self, bucket: &str) {
        let store = &self.state.store;
        store.change(bucket, |bucket| bucket.anonymous = true);
    }

    /// Stores an object in memory.
    pub fn put(
        &self,
        bucket: &str,
        key: &str,
        bytes: impl Into<Bytes>,
        options: PutOptions,
    ) -> Stored {
        let content = Content::Memory(bytes.into());
        self.state
            .store
            .put(bucket, key, content, options)
            .expect("memory can be read")
    }

    /// Stores an object of any size that takes no room. It is read for its checksum, if any.
    pub fn put_pattern(
        &self,
        bucket: &str,
        key: &str,
        pattern: Pattern,
        size: u64,
        options: PutOptions,
    ) -> Stored {
        let content = Content::pattern(pattern, size);
        self.state
            .store
            .put(bucket, key, content, options)
            .expect("a pattern can be read")
    }

    /// Serves a file as an object. It is read for its checksum, if any; its ETag is not its MD5.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn put_path(
        &self,
        bucket: &str,
        key: &str,
        disk: &Path,
        options: PutOptions,
    ) -> io::Result<Stored> {
        let content = Content::disk(disk)?;
        self.state.store.put(bucket, key, content, options)
    }

    /// Serves each directory under `root` as a bucket, without checksums. Returns their names.
    ///
    /// # Errors
    ///
    /// If a directory cannot be read.
    pub fn put_directory(&self, root: &Path) -> io::Result<Vec<String>> {
        let mut buckets = Vec::new();
        for entry in std::fs::read_dir(root)? {
            let path = entry?.path();
            let Some(bucket) = path.file_name().filter(|_| path.is_dir()) else {
                continue;
            };
            let bucket = bucket.to_string_lossy().into_owned();
            self.create_bucket(&bucket);
            for (key, disk) in walk(&path)? {
                let options = PutOptions::checksum(Checksum::None);
                self.put_path(&bucket, &key, &disk, options)?;
            }
            buckets.push(bucket);
        }
        Ok(buckets)
    }

    /// Deletes an object; in a versioned bucket its versions stay.
    pub fn delete(&self, bucket: &str, key: &str) {
        self.state.store.delete(bucket, key);
    }

    /// Arms a fault.
    pub fn fault(&self, fault: Fault) {
        self.state.watch.faults.add(fault);
    }

    /// Disarms all faults.
    pub fn clear_faults(&self) {
        self.state.watch.faults.clear();
    }

    /// How many times a fault has happened.
    pub fn faults_fired(&self) -> usize {
        self.state.watch.faults.fired()
    }

    /// All requests so far, in order.
    pub fn requests(&self) -> Vec<Request> {
        self.state.watch.log.requests()
    }

    /// Forgets all requests, and with them the counts taken from them.
    pub fn clear_requests(&self) {
        self.state.watch.log.clear();
    }

    /// Bytes of body sent with 200 or 206 for paths that contain `path`.
    pub fn bytes_sent(&self, path: &str) -> u64 {
        self.state.watch.log.bytes_sent(None, path)
    }

    /// The most requests that were answered at the same time.
    pub fn max_concurrent_requests(&self) -> usize {
        self.state.watch.log.most_in_flight(Origin::S3)
    }
}
