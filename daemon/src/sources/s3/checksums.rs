//! What S3 and the uploader say of an object's bytes, as claims that are checked as the bytes pass.

use aws_sdk_s3::types::ChecksumType;
use weightd_core::digest::{Claims, Digest};
use weightd_core::source::SourceError;

use super::Head;

/// The checksums of the whole object. Those of its parts, for a multipart upload, say nothing to us.
pub(super) fn claims(what: &str, head: &Head) -> Result<Claims, SourceError> {
    // Old servers name no type; a checksum of parts then ends in `-<parts>`, which is no base64.
    let whole = !matches!(head.checksum_type(), Some(ChecksumType::Composite));
    let decode = |text: Option<&str>| {
        text.filter(|_| whole)
            .and_then(|text| aws_smithy_types::base64::decode(text).ok())
    };
    let sha256 = decode(head.checksum_sha256())
        .and_then(|bytes| bytes.try_into().ok())
        .map(Digest::from_bytes);
    let crc64nvme = decode(head.checksum_crc64_nvme()).and_then(|bytes| bytes.try_into().ok());
    let crc32c = decode(head.checksum_crc32_c()).and_then(|bytes| bytes.try_into().ok());
    let uploaders = head.metadata().and_then(|metadata| metadata.get("sha256"));
    let uploaders = uploaders.and_then(|text| text.to_ascii_lowercase().parse::<Digest>().ok());
    if let (Some(s3), Some(uploader)) = (sha256, uploaders)
        && s3 != uploader
    {
        return Err(SourceError::Invalid {
            what: what.to_owned(),
            detail: format!("S3 says its SHA-256 is {s3}, its x-amz-meta-sha256 says {uploader}"),
            hint: Some("upload the object again, or mend its metadata".to_owned()),
        });
    }
    Ok(Claims {
        sha256: sha256.or(uploaders),
        git_oid: None,
        crc64nvme: crc64nvme.map(u64::from_be_bytes),
        crc32c: crc32c.map(u32::from_be_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base64(bytes: &[u8]) -> String {
        aws_smithy_types::base64::encode(bytes)
    }

    #[test]
    fn only_checksums_of_the_whole_object_are_claims() {
        let crc = base64(&0xae8b_1486_0a79_9888_u64.to_be_bytes());
        let head = Head::builder().checksum_crc64_nvme(&crc);
        let whole = head.clone().checksum_type(ChecksumType::FullObject).build();
        assert_eq!(
            claims("x", &whole).unwrap().crc64nvme,
            Some(0xae8b_1486_0a79_9888)
        );
        let parts = head.checksum_type(ChecksumType::Composite).build();
        assert_eq!(claims("x", &parts).unwrap(), Claims::default());
        let old = Head::builder()
            .checksum_crc32_c(format!("{}-3", base64(&[1, 2, 3, 4])))
            .build();
        assert_eq!(claims("x", &old).unwrap(), Claims::default());
    }

    #[test]
    fn two_digests_must_agree() {
        let digest = Digest::of(b"x");
        let bytes = sha256_bytes(&digest);
        let head = Head::builder().checksum_sha256(base64(&bytes));
        let agree = head.clone().metadata("sha256", digest.to_string()).build();
        assert_eq!(claims("x", &agree).unwrap().sha256, Some(digest));
        let differ = head
            .metadata("sha256", Digest::of(b"y").to_string())
            .build();
        assert!(matches!(
            claims("x", &differ),
            Err(SourceError::Invalid { .. })
        ));
    }

    fn sha256_bytes(digest: &Digest) -> Vec<u8> {
        hex::decode(digest.to_string()).unwrap()
    }
}
