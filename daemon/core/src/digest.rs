//! Content hashes: the names of blobs, and what sources claim about their files.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use weightd_sha256::Sha256;

use self::side_by_side::Seat;
pub(crate) use self::side_by_side::SideBySide;
use crate::buffers::Buffer;

mod side_by_side;

/// SHA-256 of a file's bytes: its name in the store. Written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Hashes `bytes` in one go.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Hashes several texts as one, each with its length before it, so that no two lists of texts are alike.
    /// They are never joined: secrets leave no copy.
    #[must_use]
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = sha2::Sha256::new();
        for part in parts {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self(hasher.finalize().into())
    }

    /// Takes the 32 bytes of a SHA-256 that something else computed.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Git's object id of a small file: SHA-1 of `"blob {size}\0"` and the content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GitOid([u8; 20]);

impl GitOid {
    /// The object id that git gives to a blob of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = git_hasher(bytes.len() as u64);
        sha1_checked::Digest::update(&mut hasher, bytes);
        Self(sha1_checked::Digest::finalize(hasher).into())
    }
}

/// A text is not the hex form of the hash it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {digits} lower-case hex digits")]
pub struct ParseDigestError {
    text: String,
    digits: usize,
}

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], ParseDigestError> {
    let mut bytes = [0; N];
    // One spelling only: a name on disk must not have two.
    let lower = text
        .bytes()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    match hex::decode_to_slice(text, &mut bytes) {
        Ok(()) if lower => Ok(bytes),
        _ => Err(ParseDigestError {
            text: text.to_owned(),
            digits: 2 * N,
        }),
    }
}

macro_rules! hex_text {
    ($name:ident) => {
        impl FromStr for $name {
            type Err = ParseDigestError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                parse_hex(text).map(Self)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
hex_text!(Digest);
hex_text!(GitOid);

/// What a source claims about a file's bytes. Every claim is checked before the file gets a name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Claims {
    /// SHA-256 of the whole file (a Git LFS object id, `x-amz-meta-sha256`, …).
    pub sha256: Option<Digest>,
    /// Git object id, for files that live in git itself.
    pub git_oid: Option<GitOid>,
    /// CRC-64/NVME of the whole file, as S3 reports it.
    pub crc64nvme: Option<u64>,
    /// CRC-32C of the whole file, as S3 reports it.
    pub crc32c: Option<u32>,
}

/// A file's bytes are not those that its source claimed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the bytes have {algorithm} {got}, the source claims {claimed}")]
pub struct ClaimMismatch {
    /// Which claim failed, for example `sha256`.
    pub algorithm: &'static str,
    /// What the source said.
    pub claimed: String,
    /// What the bytes that arrived say.
    pub got: String,
}

/// Hashes a file front to back, for its name and for each claim made about it.
pub struct Verifier {
    claims: Claims,
    sha256: Sha256,
    seat: Option<Seat>,
    git: Option<sha1_checked::Sha1>,
    crc64nvme: Option<crc_fast::Digest>,
    crc32c: Option<crc_fast::Digest>,
}

impl Verifier {
    /// A verifier for a file of `size` bytes. Computes SHA-256 and whatever else is claimed.
    #[must_use]
    pub fn new(size: u64, claims: Claims) -> Self {
        let crc = crc_fast::Digest::new;
        Self {
            claims,
            sha256: Sha256::default(),
            seat: None,
            git: claims.git_oid.map(|_| git_hasher(size)),
            crc64nvme: claims
                .crc64nvme
                .map(|_| crc(crc_fast::CrcAlgorithm::Crc64Nvme)),
            crc32c: claims
                .crc32c
                .map(|_| crc(crc_fast::CrcAlgorithm::Crc32Iscsi)),
        }
    }

    /// Hashes blocks together with those of other files.
    #[must_use]
    pub(crate) fn beside(self, others: &Arc<SideBySide>) -> Self {
        let seat = Some(Seat::new(others));
        Self { seat, ..self }
    }

    /// Takes the next bytes of the file.
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.check_also(bytes);
    }

    /// Takes the next bytes of the file, which need not stay in memory.
    pub(crate) fn update_block(&mut self, block: Buffer) {
        if self.seat.is_none() {
            return self.update(&block);
        }
        self.check_also(&block);
        if let Some(seat) = &self.seat {
            self.sha256 = seat.update(std::mem::take(&mut self.sha256), block);
        }
    }

    /// Takes the next bytes into what is computed besides SHA-256.
    fn check_also(&mut self, bytes: &[u8]) {
        if let Some(git) = &mut self.git {
            sha1_checked::Digest::update(git, bytes);
        }
        if let Some(crc) = &mut self.crc64nvme {
            crc.update(bytes);
        }
        if let Some(crc) = &mut self.crc32c {
            crc.update(bytes);
        }
    }

    /// The file's digest, if every claim holds.
    ///
    /// # Errors
    ///
    /// [`ClaimMismatch`] for the first claim that does not hold. Then the bytes must be dropped.
    pub fn finish(self) -> Result<Digest, ClaimMismatch> {
        let digest = Digest(self.sha256.finish());

        check("sha256", self.claims.sha256, || digest)?;
        if let Some(git) = self.git {
            let result = git.try_finalize();
            if result.has_collision() {
                return Err(ClaimMismatch {
                    algorithm: "git sha1",
                    claimed: self
                        .claims
                        .git_oid
                        .map(|oid| oid.to_string())
                        .unwrap_or_default(),
                    got: "the mark of a SHA-1 collision attack".to_owned(),
                });
            }
            let oid = GitOid((*result.hash()).into());
            check("git sha1", self.claims.git_oid, || oid)?;
        }
        if let Some(crc) = self.crc64nvme {
            let claimed = self.claims.crc64nvme.map(|crc| format!("{crc:016x}"));
            check("crc64nvme", claimed, || format!("{:016x}", crc.finalize()))?;
        }
        if let Some(crc) = self.crc32c {
            let claimed = self.claims.crc32c.map(|crc| format!("{crc:08x}"));
            check("crc32c", claimed, || format!("{:08x}", crc.finalize()))?;
        }
        Ok(digest)
    }
}

fn check<T: PartialEq + fmt::Display>(
    algorithm: &'static str,
    claimed: Option<T>,
    got: impl FnOnce() -> T,
) -> Result<(), ClaimMismatch> {
    let Some(claimed) = claimed else {
        return Ok(());
    };
    let got = got();
    if claimed == got {
        return Ok(());
    }
    Err(ClaimMismatch {
        algorithm,
        claimed: claimed.to_string(),
        got: got.to_string(),
    })
}

fn git_hasher(size: u64) -> sha1_checked::Sha1 {
    let mut hasher = sha1_checked::Sha1::new();
    sha1_checked::Digest::update(&mut hasher, format!("blob {size}\0"));
    hasher
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_has_one_spelling() {
        let digest = Digest::of(b"weights");
        let text = digest.to_string();
        assert_eq!(text.parse::<Digest>().unwrap(), digest);
        assert!(text.to_uppercase().parse::<Digest>().is_err());
        assert!(text[1..].parse::<Digest>().is_err());
        assert!(format!("{text}00").parse::<Digest>().is_err());
    }

    #[test]
    fn git_gives_the_empty_blob_its_well_known_id() {
        assert_eq!(
            GitOid::of(b"").to_string(),
            "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
        );
    }

    #[test]
    fn every_claim_is_checked() {
        // CRC check values of "123456789": the catalogue of parametrised CRC algorithms.
        let bytes = b"123456789";
        let good = Claims {
            sha256: Some(Digest::of(bytes)),
            git_oid: Some(GitOid::of(bytes)),
            crc64nvme: Some(0xae8b_1486_0a79_9888),
            crc32c: Some(0xe306_9283),
        };
        let finish = |claims: Claims| {
            let mut verifier = Verifier::new(bytes.len() as u64, claims);
            bytes.chunks(2).for_each(|chunk| verifier.update(chunk));
            verifier.finish()
        };
        assert_eq!(finish(good).unwrap(), Digest::of(bytes));
        let bad = [
            Claims {
                sha256: Some(Digest::of(b"x")),
                ..good
            },
            Claims {
                git_oid: Some(GitOid::of(b"x")),
                ..good
            },
            Claims {
                crc64nvme: Some(1),
                ..good
            },
            Claims {
                crc32c: Some(1),
                ..good
            },
        ];
        let algorithms = bad.map(|claims| finish(claims).unwrap_err().algorithm);
        assert_eq!(algorithms, ["sha256", "git sha1", "crc64nvme", "crc32c"]);
    }
}
