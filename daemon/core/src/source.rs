//! Where models come from. A vendor's client implements [`Source`]; the fetcher knows no vendor.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

use crate::digest::{Claims, GitOid};
use crate::model::{ModelRef, Patterns, RelPath, Revision};

/// The bytes of one ranged read, in order.
pub type ByteStream = BoxStream<'static, Result<Bytes, SourceError>>;

/// One model at its origin, asked for with one requester's credentials.
///
/// An implementation may keep what it learns (signed URLs, object versions) for as long as it
/// lives, which is one fetch.
pub trait Source: Send + Sync {
    /// The revision that the model's name stands for now.
    ///
    /// # Errors
    ///
    /// Any [`SourceError`]; only [`SourceError::Unavailable`] is worth a retry.
    fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>>;

    /// The files of the model at `revision` that `patterns` select, see [`select`].
    ///
    /// # Errors
    ///
    /// As [`Source::resolve`]; [`SourceError::Changed`] if the origin no longer is at `revision`.
    fn list<'a>(
        &'a self,
        revision: &'a Revision,
        patterns: &'a Patterns,
    ) -> BoxFuture<'a, Result<Listing, SourceError>>;

    /// The bytes `range` of `file`, which [`Source::list`] returned. The stream must not go on past
    /// `range.end`; if it ends early the caller reads on from where it ended.
    ///
    /// # Errors
    ///
    /// As [`Source::resolve`], here or in the stream; [`SourceError::NoRanges`] if the origin serves
    /// this file only from its first byte on.
    fn read<'a>(
        &'a self,
        file: &'a RemoteFile,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>>;

    /// For how long the origin's rate limit keeps this requester from asking for anything more; `None` if it
    /// does not.
    fn limited_for(&self) -> Option<Duration> {
        None
    }
}

/// Opens the [`Source`] that a model's scheme names.
pub trait Sources: Send + Sync {
    /// # Errors
    ///
    /// [`SourceError::Denied`] if this process may not use that kind of source.
    fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError>;
}

/// The files of one model at one revision, as its source claims them.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The files to fetch, sorted by path.
    pub files: Vec<RemoteFile>,
    /// What the patterns left out.
    pub left_out: LeftOut,
}

/// Who says that a claimed SHA-256 is that of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vouched {
    /// The source itself has seen to it.
    BySource,
    /// Somebody wrote it beside the bytes, and the user takes that word: bytes that are here for another reason
    /// are reused. No pod gets what was brought so ([`crate::manifest::FileEntry::believed`]).
    ByUploader,
    /// Somebody wrote it beside the bytes: it gives nobody bytes that are here for another reason.
    ByNobody,
}

/// One file as its source claims it.
#[derive(Debug, Clone)]
pub struct RemoteFile {
    /// Path within the model.
    pub path: RelPath,
    /// Size in bytes.
    pub size: u64,
    /// What the source says of the bytes.
    pub claims: Claims,
    /// Who vouches for the claimed SHA-256. It is checked in any case.
    pub vouched: Vouched,
    /// A text that names these very bytes at their origin, for sources that give no SHA-256: the
    /// store remembers which digest it stood for. Never a secret.
    pub identity: Option<String>,
    /// The Hub's Xet hash, recorded in the manifest.
    pub xet_hash: Option<String>,
    /// For a file that claims come with, and not before: [`Source::read`] from the first byte on puts them here before
    /// it returns. `None` for all others.
    pub told: Option<Arc<OnceLock<Claims>>>,
}

impl RemoteFile {
    /// All that the source says of the bytes; `None` while that has not come.
    #[must_use]
    pub fn all_claims(&self) -> Option<Claims> {
        match &self.told {
            Some(told) => told.get().copied(),
            None => Some(self.claims),
        }
    }
}

/// What the patterns left out of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// How many files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The first few paths.
    pub examples: Vec<String>,
}

/// Why a source cannot serve. The variant says what the caller does next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// There is no such thing; asking again is no use.
    #[error("{what} not found{}", dash(.detail))]
    NotFound {
        /// The thing asked for, for example `hf://org/model@main`.
        what: String,
        /// What the origin said.
        detail: String,
        /// What the user can do.
        hint: Option<String>,
    },
    /// The requester may not read it.
    #[error("access to {what} denied{}", dash(.detail))]
    Denied {
        /// The thing asked for.
        what: String,
        /// What the origin said.
        detail: String,
        /// What the user can do.
        hint: Option<String>,
    },
    /// It is no longer what the listing said: list again.
    #[error("{what} changed at its origin while it was fetched{}", dash(.detail))]
    Changed {
        /// The thing that changed.
        what: String,
        /// In which way.
        detail: String,
    },
    /// It may work later: retry.
    #[error("{what} is unavailable{}", dash(.detail))]
    Unavailable {
        /// The thing asked for, or the host.
        what: String,
        /// What went wrong.
        detail: String,
        /// When the origin wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The origin serves the file only whole: read it from its first byte.
    #[error("{what} is served without byte ranges")]
    NoRanges {
        /// The file.
        what: String,
    },
    /// The origin sent something that cannot be right, or that we refuse.
    #[error("{what} cannot be used{}", dash(.detail))]
    Invalid {
        /// The thing asked for.
        what: String,
        /// What is wrong with it.
        detail: String,
        /// What the user can do.
        hint: Option<String>,
    },
}

fn dash(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(": {detail}")
    }
}

impl SourceError {
    /// What the user can do about it, if there is something.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::NotFound { hint, .. }
            | Self::Denied { hint, .. }
            | Self::Invalid { hint, .. } => hint.as_deref(),
            Self::Changed { .. } => Some("run the same command again: it lists the origin anew"),
            Self::Unavailable { .. } => Some(
                "check the network and the endpoint, then run it again: it goes on where it stopped",
            ),
            Self::NoRanges { .. } => None,
        }
    }
}

/// What names the bytes of a file that lives in git itself, for [`RemoteFile::identity`]. Nodes find each
/// other's blobs by it: it must not change.
#[must_use]
pub fn git_identity(oid: GitOid, size: u64) -> String {
    format!("git-sha1:{oid}:{size}")
}

/// No file is larger: 1 PiB.
const FILE_BYTES: u64 = 1 << 50;

/// No model is larger: 1 EiB. Else sums of sizes could overflow.
const MODEL_BYTES: u64 = 1 << 60;

/// Chooses files from all that an origin lists: `(path, anything)`, in any order.
///
/// Returns the chosen ones sorted by path, and what was left out.
///
/// # Errors
///
/// [`SourceError::Invalid`] if a path that is not excluded could leave the snapshot, if two paths
/// cannot stand in one tree, if a size is absurd, or if nothing is chosen.
#[allow(
    clippy::type_complexity,
    reason = "a pair of plain lists reads better than a type for it"
)]
pub fn select<T>(
    model: &ModelRef,
    files: Vec<(String, u64, T)>,
    patterns: &Patterns,
) -> Result<(Vec<(RelPath, u64, T)>, LeftOut), SourceError> {
    let invalid = |detail: String, hint: Option<String>| SourceError::Invalid {
        what: model.to_string(),
        detail,
        hint,
    };
    let selector = patterns.selector(files.iter().map(|(path, ..)| path.as_str()));
    let total = files.len();
    check_sizes(&files).map_err(|detail| invalid(detail, None))?;
    let mut chosen = Vec::new();
    let mut left_out = LeftOut::default();
    for (path, size, file) in files {
        if selector.excludes(&path) || !selector.includes(&path) {
            // A hostile name is refused even when no pattern wants it: whoever put it there is not
            // to be trusted with the rest. Only an explicit `--exclude` lets it pass.
            if !selector.excludes(&path) {
                RelPath::new(&path).map_err(|error| unsafe_path(&invalid, &error))?;
            }
            left_out.files += 1;
            left_out.bytes += size;
            if left_out.examples.len() < 5 {
                left_out.examples.push(path);
            }
            continue;
        }
        let path = RelPath::new(&path).map_err(|error| unsafe_path(&invalid, &error))?;
        chosen.push((path, size, file));
    }
    if chosen.is_empty() {
        let detail = match (total, left_out.examples.as_slice()) {
            (0, _) => "it holds no files".to_owned(),
            (_, examples) => {
                format!(
                    "none of its {total} files matches (it holds {})",
                    examples.join(", ")
                )
            }
        };
        let hint = (total > 0)
            .then(|| "choose files with --include, for example --include '*'".to_owned());
        return Err(invalid(detail, hint));
    }
    chosen.sort_by(|a, b| a.0.cmp(&b.0));
    let paths: BTreeSet<&str> = chosen.iter().map(|(path, ..)| path.as_str()).collect();
    if paths.len() < chosen.len() {
        return Err(invalid("it lists a path twice".to_owned(), None));
    }
    for path in &paths {
        let mut parents = path.match_indices('/').map(|(at, _)| &path[..at]);
        if let Some(parent) = parents.find(|parent| paths.contains(parent)) {
            let detail = format!("`{parent}` is both a file and the folder of `{path}`");
            return Err(invalid(
                detail,
                Some(format!("leave one out with --exclude '{parent}'")),
            ));
        }
    }
    Ok((chosen, left_out))
}

/// Refuses sizes that no file and no model has.
fn check_sizes<T>(files: &[(String, u64, T)]) -> Result<(), String> {
    let mut sum = 0_u64;
    for (path, bytes, _) in files {
        sum = sum.saturating_add(*bytes);
        if *bytes > FILE_BYTES || sum > MODEL_BYTES {
            let path = path.escape_debug();
            return Err(format!(
                "it lists `{path}` with {bytes} bytes, more than there can be"
            ));
        }
    }
    Ok(())
}

fn unsafe_path(
    invalid: &impl Fn(String, Option<String>) -> SourceError,
    error: &crate::model::RelPathError,
) -> SourceError {
    invalid(
        format!("it lists a file whose name is refused: {error}"),
        Some("if you trust the origin, leave that file out with --exclude".to_owned()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(paths: &[&str], include: &[&str], exclude: &[&str]) -> Result<Vec<String>, String> {
        let model: ModelRef = "hf://org/model".parse().unwrap();
        let own = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        let patterns = Patterns::new(own(include), own(exclude)).unwrap();
        let files = paths.iter().map(|&path| (path.to_owned(), 1, ())).collect();
        select(&model, files, &patterns)
            .map(|(files, _)| {
                files
                    .into_iter()
                    .map(|(path, ..)| path.to_string())
                    .collect()
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn what_git_names_has_one_name_in_every_version() {
        let expected = "git-sha1:3ab313fff6f41bb35969cd359e9ddfb8033b3ac2:7";
        assert_eq!(git_identity(GitOid::of(b"weights"), 7), expected);
        let key = crate::store::StageKey::of_identity(expected).to_string();
        assert_eq!(
            key,
            "af6fdec170df192ab4f8972f6792599e4fd32733ee77558f81d311657dabdc44"
        );
    }

    #[test]
    fn the_default_takes_what_a_loader_needs() {
        let all = [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "config.json",
            "tokenizer.model",
            "merges.txt",
            "chat_template.jinja",
            "modeling_x.py",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "original/consolidated.00.pth",
            "model.onnx",
            "flax_model.msgpack",
            "x.gguf",
            "README.md",
            "pytorch_model.bin.index.json",
            "scheduler.pkl",
            "tf_model.h5",
            "consolidated.safetensors.index.json",
        ];
        let mut expected = all[..8]
            .iter()
            .map(|&path| path.to_owned())
            .collect::<Vec<_>>();
        expected.sort();
        assert_eq!(run(&all, &[], &[]).unwrap(), expected);
        let alone = [
            "consolidated.safetensors",
            "consolidated.safetensors.index.json",
        ];
        assert_eq!(run(&alone, &[], &[]).unwrap(), alone);
    }

    #[test]
    fn include_and_exclude_override_the_default() {
        let all = ["a.bin", "b.safetensors", "sub/c.bin", "config.json"];
        assert_eq!(run(&all, &["*.bin"], &[]).unwrap(), ["a.bin", "sub/c.bin"]);
        assert_eq!(run(&all, &["*.bin"], &["sub/*"]).unwrap(), ["a.bin"]);
        assert_eq!(run(&all, &[], &["*.json"]).unwrap(), ["b.safetensors"]);
    }

    #[test]
    fn hostile_names_are_refused_even_when_no_pattern_wants_them() {
        for path in [
            "../../etc/x",
            "/etc/x",
            "a/../b.json",
            ".weightd/complete",
            "a//b.json",
            "a\0.json",
        ] {
            let error = run(&["config.json", path], &[], &[]).expect_err(path);
            assert!(error.contains("refused"), "{error}");
        }
        assert_eq!(
            run(&["config.json", "../x"], &[], &["../*"]).unwrap(),
            ["config.json"]
        );
    }

    #[test]
    fn an_absurd_size_is_refused() {
        let model: ModelRef = "hf://org/model".parse().unwrap();
        let sized = |size, count: u32| {
            let files = (0..count).map(|n| (format!("{n}.json"), size, ()));
            select(&model, files.collect(), &Patterns::default())
        };
        assert!(sized(1 << 50, 2).is_ok());
        for error in [sized((1 << 50) + 1, 1), sized(1 << 50, 20_000)] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("more than there can be"), "{error}");
        }
    }

    #[test]
    fn a_file_cannot_be_a_folder_too() {
        let error = run(&["a.json", "a.json/b.json"], &[], &[]).unwrap_err();
        assert!(error.contains("both a file and the folder"), "{error}");
    }

    #[test]
    fn nothing_to_fetch_is_an_error_that_names_what_is_there() {
        let error = run(&["model.gguf"], &[], &[]).unwrap_err();
        assert!(error.contains("model.gguf"), "{error}");
        assert!(run(&[], &[], &[]).unwrap_err().contains("no files"));
    }
}
