//! One object: what S3 claims of its bytes, and the bytes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::OnceLock;

use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::primitives::ByteStream as Body;
use aws_sdk_s3::types::{ChecksumMode, ChecksumType, StorageClass};
use aws_smithy_types::base64;
use futures::stream::{self, StreamExt};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use weightd_core::digest::{Claims, Digest};
use weightd_core::source::{ByteStream, SourceError};

use super::bucket::{Bucket, Question};
use super::failure::cause;
use super::listing::{Listed, bare_etag};
use super::refusal::archived;

/// These very bytes at S3.
#[derive(Debug)]
pub(super) struct Object {
    key: String,
    size: u64,
    etag: String,
    version: Option<String>,
    pub(super) claims: Claims,
    /// The SHA-256 among the claims is one that S3 computed, not what an uploader wrote.
    pub(super) checked_by_s3: bool,
    pub(super) identity: Option<String>,
    /// It was not looked at: what is claimed of it comes with its bytes.
    pub(super) unseen: bool,
}

fn question(bucket: &Bucket, key: &str) -> Question {
    Question {
        permission: "s3:GetObject",
        what: bucket.address(key),
        listed: true,
    }
}

/// Asks what S3 knows of an object that was listed.
pub(super) async fn look(bucket: &Bucket, listed: &Listed) -> Result<Object, SourceError> {
    let key = format!("{}{}", bucket.prefix, listed.path);
    let question = question(bucket, &key);
    let head = bucket
        .ask(&question, async |connection| {
            let request = connection.questions.head_object().bucket(&bucket.name);
            let request = request.key(&key).checksum_mode(ChecksumMode::Enabled);
            request.send().await
        })
        .await?;
    let etag = bare_etag(head.e_tag());
    let size = head
        .content_length()
        .and_then(|size| u64::try_from(size).ok());
    if (!listed.etag.is_empty() && etag != listed.etag) || size != Some(listed.size) {
        return Err(SourceError::Changed {
            what: question.what,
            detail: "it has another size or ETag than in the listing".to_owned(),
        });
    }
    if etag.is_empty() {
        return Err(SourceError::Invalid {
            what: question.what,
            detail: "the server gives it no ETag, so that a change could not be seen".to_owned(),
            hint: None,
        });
    }
    if let Some(class) = archive(&head) {
        return Err(archived(question.what, &class));
    }
    let version = head.version_id().filter(|version| *version != "null");
    let said = Said::from(&head);
    Ok(Object {
        claims: said.claims(&question.what)?,
        checked_by_s3: said.whole_sha256().is_some(),
        identity: identity(bucket, &key, &etag, version, listed.size).await?,
        size: listed.size,
        version: version.map(str::to_owned),
        etag,
        key,
        unseen: false,
    })
}

/// Takes an object as it was listed: what S3 knows of it besides comes with its bytes. `None` if its listing does not say
/// which bytes it means.
pub(super) async fn unseen(
    bucket: &Bucket,
    listed: &Listed,
) -> Result<Option<Object>, SourceError> {
    if listed.etag.is_empty() || is_weak(&listed.etag) || listed.size == 0 {
        return Ok(None);
    }
    let key = format!("{}{}", bucket.prefix, listed.path);
    Ok(Some(Object {
        claims: Claims::default(),
        checked_by_s3: false,
        identity: identity(bucket, &key, &listed.etag, None, listed.size).await?,
        size: listed.size,
        version: None,
        etag: listed.etag.clone(),
        key,
        unseen: true,
    }))
}

/// What names these very bytes at S3. `None` if their ETag stands for more than these.
async fn identity(
    bucket: &Bucket,
    key: &str,
    etag: &str,
    version: Option<&str>,
    size: u64,
) -> Result<Option<String>, SourceError> {
    let endpoint = bucket.connection().await?.endpoint.clone();
    let endpoint = endpoint.map_or_else(|| "aws".to_owned(), |url| url.to_string());
    let place = [
        endpoint.trim_end_matches('/'),
        &format!("{}/{key}", bucket.name),
    ];
    let texts = place.into_iter().chain([etag, version.unwrap_or_default()]);
    let texts = texts.map(|text| utf8_percent_encode(text, ODD).to_string());
    let texts = texts.collect::<Vec<_>>().join(":");
    Ok((!is_weak(etag)).then(|| format!("s3:{texts}:{size}")))
}

/// Reads one byte of an object that was listed: who may do that may read the rest. To look at its header
/// proves less, for that needs no right to the key that its bytes are encrypted with.
pub(super) async fn taste(bucket: &Bucket, listed: &Listed) -> Result<(), SourceError> {
    let key = format!("{}{}", bucket.prefix, listed.path);
    let question = question(bucket, &key);
    let etag = exact(&listed.etag).filter(|_| !listed.etag.is_empty());
    let answer = bucket
        .ask(&question, async |connection| {
            let request = connection.questions.get_object().bucket(&bucket.name);
            let request = request.key(&key).set_if_match(etag.clone());
            // No byte of an empty object can be asked for.
            let range = (listed.size > 0).then(|| "bytes=0-0".to_owned());
            request.set_range(range).send().await
        })
        .await?;
    // A server that ignores If-Match lets in to another object than the one that was listed.
    match listed.etag.is_empty() || bare_etag(answer.e_tag()) == listed.etag {
        true => Ok(()),
        false => Err(SourceError::Changed {
            what: question.what,
            detail: "it has another ETag than in the listing".to_owned(),
        }),
    }
}

/// What could be mistaken for the borders of an identity's parts.
const ODD: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/');

/// The archive that the object's bytes must be restored from.
fn archive(head: &HeadObjectOutput) -> Option<String> {
    let restored = |text: &str| text.contains("ongoing-request=\"false\"");
    if head.restore().is_some_and(restored) {
        return None;
    }
    let class = head
        .storage_class()
        .filter(|class| matches!(class, StorageClass::Glacier | StorageClass::DeepArchive));
    let class = class.map(|class| class.as_str().to_owned());
    class.or_else(|| Some(head.archive_status()?.as_str().to_owned()))
}

/// What the header of an answer says of the object's bytes.
struct Said<'a> {
    sha256: Option<&'a str>,
    crc64nvme: Option<&'a str>,
    crc32c: Option<&'a str>,
    kind: Option<&'a ChecksumType>,
    metadata: Option<&'a HashMap<String, String>>,
}

impl<'a> From<&'a HeadObjectOutput> for Said<'a> {
    fn from(head: &'a HeadObjectOutput) -> Self {
        Self {
            sha256: head.checksum_sha256(),
            crc64nvme: head.checksum_crc64_nvme(),
            crc32c: head.checksum_crc32_c(),
            kind: head.checksum_type(),
            metadata: head.metadata(),
        }
    }
}

impl<'a> From<&'a GetObjectOutput> for Said<'a> {
    fn from(answer: &'a GetObjectOutput) -> Self {
        Self {
            sha256: answer.checksum_sha256(),
            crc64nvme: answer.checksum_crc64_nvme(),
            crc32c: answer.checksum_crc32_c(),
            kind: answer.checksum_type(),
            metadata: answer.metadata(),
        }
    }
}

impl Said<'_> {
    fn claims(&self, what: &str) -> Result<Claims, SourceError> {
        let whole = |text: &&str| self.is_whole(text);
        let sha256 = self.whole_sha256();
        let metadata = self.metadata.and_then(|all| all.get("sha256"));
        let metadata = metadata.and_then(|text| text.trim().to_lowercase().parse::<Digest>().ok());
        if let (Some(checksum), Some(metadata)) = (sha256, metadata)
            && checksum != metadata
        {
            return Err(SourceError::Invalid {
                what: what.to_owned(),
                detail: format!("its SHA-256 is {checksum}, its x-amz-meta-sha256 is {metadata}"),
                hint: Some("upload it anew, or mend its metadata".to_owned()),
            });
        }
        Ok(Claims {
            sha256: sha256.or(metadata),
            git_oid: None,
            crc64nvme: bytes(self.crc64nvme.filter(whole)).map(u64::from_be_bytes),
            crc32c: bytes(self.crc32c.filter(whole)).map(u32::from_be_bytes),
        })
    }

    fn whole_sha256(&self) -> Option<Digest> {
        let text = self.sha256.filter(|text| self.is_whole(text));
        bytes(text).map(Digest::from_bytes)
    }

    /// A checksum of the parts' checksums is of no use to us: its text ends in `-<parts>`.
    fn is_whole(&self, text: &str) -> bool {
        match self.kind {
            Some(kind) => *kind == ChecksumType::FullObject,
            None => !text.contains('-'),
        }
    }
}

fn bytes<const N: usize>(text: Option<&str>) -> Option<[u8; N]> {
    base64::decode(text?).ok()?.try_into().ok()
}

/// Reads `range` of these very bytes, and tells what is claimed of them if it is all of them.
pub(super) async fn read(
    bucket: &Bucket,
    object: &Object,
    range: Range<u64>,
    told: Option<&OnceLock<Claims>>,
) -> Result<ByteStream, SourceError> {
    if range.is_empty() {
        return Ok(stream::empty().boxed());
    }
    let question = question(bucket, &object.key);
    let whole = range == (0..object.size);
    // S3 tells the checksums of an object with the whole of it, not with a range.
    let tells = told.filter(|_| whole);
    let answer = bucket
        .ask(&question, async |connection| {
            let request = connection.ranges.get_object().bucket(&bucket.name);
            let request = request
                .key(&object.key)
                .set_version_id(object.version.clone())
                .set_if_match(exact(&object.etag));
            let request = match tells {
                Some(_) => request.checksum_mode(ChecksumMode::Enabled),
                None => request.range(format!("bytes={}-{}", range.start, range.end - 1)),
            };
            request.send().await
        })
        .await?;
    check(&answer, object, &range, &question.what)?;
    if let Some(told) = tells {
        let claims = Said::from(&answer).claims(&question.what)?;
        if *told.get_or_init(|| claims) != claims {
            return Err(SourceError::Changed {
                what: question.what,
                detail: "it has other checksums than a moment ago".to_owned(),
            });
        }
    }
    let rest = Rest {
        body: answer.body,
        bytes: range.end - range.start,
        what: question.what,
    };
    Ok(rest.stream())
}

/// The precondition that names these very bytes. A weak ETag never meets it: [`check`] alone compares it.
///
/// Source: RFC 9110, section 13.1.1.
fn exact(etag: &str) -> Option<String> {
    (!is_weak(etag)).then(|| format!("\"{etag}\""))
}

/// A weak ETag stands for bytes that are alike, not for the same ones.
fn is_weak(etag: &str) -> bool {
    etag.starts_with("W/")
}

/// Is the body that of the object we mean, from the byte that we asked for?
fn check(
    answer: &GetObjectOutput,
    object: &Object,
    range: &Range<u64>,
    what: &str,
) -> Result<(), SourceError> {
    let changed = |detail: String| SourceError::Changed {
        what: what.to_owned(),
        detail,
    };
    let invalid = |detail: String| SourceError::Invalid {
        what: what.to_owned(),
        detail,
        hint: None,
    };
    // A server that ignores If-Match sends the new object's bytes.
    if bare_etag(answer.e_tag()) != object.etag {
        return Err(changed(
            "it has another ETag than when it was listed".to_owned(),
        ));
    }
    let length = answer
        .content_length()
        .and_then(|length| u64::try_from(length).ok());
    let Some(sent) = answer.content_range() else {
        return match (length, range.start) {
            (Some(length), _) if length != object.size => Err(changed(format!(
                "it has {length} bytes, not {}",
                object.size
            ))),
            (_, 0) => Ok(()),
            _ => Err(SourceError::NoRanges {
                what: what.to_owned(),
            }),
        };
    };
    let asked = format!("bytes {}-{}/", range.start, range.end - 1);
    match sent.strip_prefix(&asked).map(str::parse::<u64>) {
        Some(Ok(size)) if size != object.size => {
            Err(changed(format!("it has {size} bytes, not {}", object.size)))
        }
        Some(Ok(_)) if length.is_none_or(|length| length == range.end - range.start) => Ok(()),
        _ => Err(invalid(format!(
            "the server sent `{}` where bytes {}-{} were asked for",
            sent.escape_debug(),
            range.start,
            range.end - 1
        ))),
    }
}

struct Rest {
    body: Body,
    bytes: u64,
    what: String,
}

impl Rest {
    /// The bytes that are left, as they come from the connection. Fewer are an error, more are not
    /// read.
    fn stream(self) -> ByteStream {
        // After an error there is no state, and the stream ends.
        stream::unfold(Some(self), |rest| async {
            let mut rest = rest.filter(|rest| rest.bytes > 0)?;
            let detail = match rest.body.next().await {
                Some(Ok(mut chunk)) => {
                    chunk.truncate(usize::try_from(rest.bytes).unwrap_or(usize::MAX));
                    rest.bytes -= chunk.len() as u64;
                    return Some((Ok(chunk), Some(rest)));
                }
                Some(Err(error)) => cause(&error),
                None => format!("the body ended {} bytes early", rest.bytes),
            };
            let error = SourceError::Unavailable {
                what: rest.what,
                detail,
                retry_after: None,
            };
            Some((Err(error), None))
        })
        .boxed()
    }
}
