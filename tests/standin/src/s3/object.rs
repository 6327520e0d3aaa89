//! Buckets, their objects and the objects' versions.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Md5};
use s3s::dto;

use super::{Checksum, PutOptions, Stored};
use crate::content::Content;
use crate::log::lock;

/// One version of an object. Cloning is cheap.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) content: Content,
    pub(super) etag: String,
    pub(super) modified: SystemTime,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) checksum: dto::Checksum,
    pub(super) algorithm: Option<&'static str>,
    /// `None` in a bucket that was not versioned when it came.
    pub(super) version_id: Option<String>,
    /// A delete marker, which has no content.
    pub(super) deleted: bool,
}

#[derive(Debug, Default)]
pub(super) struct Bucket {
    pub(super) versioned: bool,
    pub(super) anonymous: bool,
    /// The versions of each key, newest last.
    pub(super) objects: BTreeMap<String, Vec<Object>>,
    versions_made: u64,
}

impl Bucket {
    fn add(&mut self, key: &str, mut object: Object) -> Stored {
        let versions = self.objects.entry(key.to_owned()).or_default();
        if self.versioned {
            self.versions_made += 1;
            object.version_id = Some(format!("version-{:08}", self.versions_made));
        } else {
            versions.clear();
        }
        let stored = Stored {
            etag: object.etag.clone(),
            version_id: object.version_id.clone(),
        };
        versions.push(object);
        stored
    }

    /// The newest version of a key, unless that is a delete marker.
    pub(super) fn newest(&self, key: &str) -> Option<&Object> {
        let newest = self.objects.get(key)?.last()?;
        (!newest.deleted).then_some(newest)
    }

    pub(super) fn version(&self, key: &str, version_id: &str) -> Option<&Object> {
        let mut versions = self.objects.get(key)?.iter();
        versions.find(|object| object.version_id.as_deref().unwrap_or("null") == version_id)
    }
}

/// All buckets.
#[derive(Debug, Default)]
pub(super) struct Store(Mutex<BTreeMap<String, Bucket>>);

impl Store {
    pub(super) fn buckets(&self) -> MutexGuard<'_, BTreeMap<String, Bucket>> {
        lock(&self.0)
    }

    /// Changes a bucket, made now if there is none of that name.
    pub(super) fn change<T>(&self, bucket: &str, change: impl FnOnce(&mut Bucket) -> T) -> T {
        change(self.buckets().entry(bucket.to_owned()).or_default())
    }

    pub(super) fn put(
        &self,
        bucket: &str,
        key: &str,
        content: Content,
        options: PutOptions,
    ) -> io::Result<Stored> {
        let (checksum, algorithm) = checksum(&content, &options)?;
        let object = Object {
            etag: etag(&content, &options)?,
            modified: SystemTime::now(),
            metadata: options.metadata,
            checksum,
            algorithm,
            version_id: None,
            deleted: false,
            content,
        };
        Ok(self.change(bucket, |bucket| bucket.add(key, object)))
    }

    pub(super) fn delete(&self, bucket: &str, key: &str) -> Option<Stored> {
        self.change(bucket, |bucket| {
            if !bucket.versioned {
                bucket.objects.remove(key);
                return None;
            }
            let marker = Object {
                content: Content::Memory(bytes::Bytes::new()),
                etag: String::new(),
                modified: SystemTime::now(),
                metadata: BTreeMap::new(),
                checksum: dto::Checksum::default(),
                algorithm: None,
                version_id: None,
                deleted: true,
            };
            Some(bucket.add(key, marker))
        })
    }
}

/// The MD5 of what is in memory. Files and patterns, which may be huge, are known by where they
/// are and how long: S3's ETags are not all MD5s either.
fn etag(content: &Content, options: &PutOptions) -> io::Result<String> {
    if let Some(etag) = &options.etag {
        return Ok(etag.clone());
    }
    let md5 = match content {
        Content::Memory(bytes) => Md5::checksum(bytes),
        Content::Tile { tile, size } => {
            let mut md5 = Md5::new();
            md5.update(tile);
            md5.update(&size.to_be_bytes());
            md5.finalize()
        }
        Content::Disk { path, size } => {
            let modified = std::fs::metadata(path)?.modified()?;
            Md5::checksum(format!("{} {size} {modified:?}", path.display()).as_bytes())
        }
    };
    let md5 = hex::encode(md5);
    let parts = match content {
        Content::Memory(_) => options.parts,
        _ => options.parts.or(Some(1)),
    };
    Ok(match parts {
        None => md5,
        // The MD5 of something else, so that no client can take it for the content's.
        Some(parts) => format!("{}-{parts}", hex::encode(Md5::checksum(md5.as_bytes()))),
    })
}

fn hasher(checksum: Checksum) -> (ChecksumHasher, &'static str) {
    let mut hasher = ChecksumHasher::default();
    let name = match checksum {
        Checksum::None => "",
        Checksum::Crc64Nvme => {
            hasher.crc64nvme = Some(Default::default());
            "CRC64NVME"
        }
        Checksum::Crc32c => {
            hasher.crc32c = Some(Default::default());
            "CRC32C"
        }
        Checksum::Crc32 => {
            hasher.crc32 = Some(Default::default());
            "CRC32"
        }
        Checksum::Sha1 => {
            hasher.sha1 = Some(Default::default());
            "SHA1"
        }
        Checksum::Sha256 => {
            hasher.sha256 = Some(Default::default());
            "SHA256"
        }
    };
    (hasher, name)
}

/// The checksum, and the name of its algorithm.
fn checksum(
    content: &Content,
    options: &PutOptions,
) -> io::Result<(dto::Checksum, Option<&'static str>)> {
    if options.checksum == Checksum::None {
        return Ok((dto::Checksum::default(), None));
    }
    let (mut hasher, name) = hasher(options.checksum);
    // S3 has no composite CRC-64/NVME.
    let parts = options
        .parts
        .filter(|_| options.checksum != Checksum::Crc64Nvme);
    match parts {
        _ if options.claimed_checksum.is_some() => {}
        Some(parts) => hasher.update(format!("composite {parts} {}", content.size()).as_bytes()),
        None => content.read_in_chunks(|chunk| hasher.update(chunk))?,
    }
    let mut checksum = hasher.finalize();
    let fields = [
        &mut checksum.checksum_crc64nvme,
        &mut checksum.checksum_crc32c,
        &mut checksum.checksum_crc32,
        &mut checksum.checksum_sha1,
        &mut checksum.checksum_sha256,
    ];
    for value in fields.into_iter().flatten() {
        if let Some(claimed) = &options.claimed_checksum {
            value.clone_from(claimed);
        }
        if let Some(parts) = parts {
            *value += &format!("-{parts}");
        }
    }
    let kind = match parts {
        Some(_) => dto::ChecksumType::COMPOSITE,
        None => dto::ChecksumType::FULL_OBJECT,
    };
    checksum.checksum_type = Some(dto::ChecksumType::from_static(kind));
    Ok((checksum, Some(name)))
}
