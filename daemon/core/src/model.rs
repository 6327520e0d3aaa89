//! What a user asks for and what it resolves to: [`ModelRef`], [`Revision`], [`Patterns`],
//! [`SnapshotId`], [`RelPath`].

use std::fmt;
use std::str::FromStr;

use globset::GlobSet;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

mod globs;

/// The kind of place a model comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// A Hugging Face Hub repository, `hf://org/name`.
    Hf,
    /// An S3 bucket and prefix, `s3://bucket/prefix`.
    S3,
    /// A directory of this machine, `file:///path`.
    File,
}

impl Scheme {
    /// As it stands before `://`, in paths and in metric labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hf => "hf",
            Self::S3 => "s3",
            Self::File => "file",
        }
    }
}

/// A model as a user named it. It may stand for other bytes tomorrow.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelRef {
    scheme: Scheme,
    name: String,
    revision: Option<String>,
}

/// A text does not name a model. The message says how to write it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` does not name a model: {reason}")]
pub struct ParseModelError {
    text: String,
    reason: String,
}

impl ModelRef {
    /// Where it comes from.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// `org/name`, `bucket/prefix` (no slash at the end) or an absolute path.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The revision asked for: a branch, tag, PR ref or commit for `hf`, 64 hex digits else.
    #[must_use]
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// What the revision asked for is called in the store: `main` or `latest` if none was asked for.
    #[must_use]
    pub fn revision_or_default(&self) -> &str {
        match self.scheme {
            Scheme::Hf => self.revision().unwrap_or("main"),
            Scheme::S3 | Scheme::File => self.revision().unwrap_or("latest"),
        }
    }

    /// The revision, if the one asked for can never move: no origin need be asked.
    #[must_use]
    pub fn pinned(&self) -> Option<Revision> {
        let revision = self.revision()?;
        let digits = if self.scheme == Scheme::Hf { 40 } else { 64 };
        (revision.len() == digits)
            .then(|| Revision::new(revision).ok())
            .flatten()
    }

    /// The same model at a resolved revision.
    #[must_use]
    pub fn at(&self, revision: &Revision) -> Self {
        Self {
            revision: Some(revision.to_string()),
            ..self.clone()
        }
    }

    /// The same model, at no revision in particular.
    #[must_use]
    pub fn without_revision(&self) -> Self {
        Self {
            revision: None,
            ..self.clone()
        }
    }
}

impl FromStr for ModelRef {
    type Err = ParseModelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |reason: String| ParseModelError {
            text: text.to_owned(),
            reason,
        };
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(fail(format!(
                "it starts with hf://, s3:// or file://, such as hf://{text}"
            )));
        };
        let parsed = match scheme {
            "hf" => parse_hf(rest),
            "s3" => parse_s3(rest),
            "file" => parse_file(rest),
            "https" | "http" => {
                Err("write hf://org/name or s3://bucket/prefix, not a web address".to_owned())
            }
            _ => Err(format!("`{scheme}` is none of hf, s3, file")),
        };
        let (scheme, name, revision) = parsed.map_err(fail)?;
        Ok(Self {
            scheme,
            name,
            revision,
        })
    }
}

type Parsed = Result<(Scheme, String, Option<String>), String>;

fn parse_hf(rest: &str) -> Parsed {
    let (name, revision) = match rest.split_once('@') {
        Some((name, revision)) => (name, Some(revision)),
        None => (rest, None),
    };
    let parts: Vec<&str> = name.split('/').collect();
    if parts.len() > 2 {
        return Err("a Hub repository is org/name; a revision follows an @".to_owned());
    }
    for part in &parts {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let edge = part.starts_with(['-', '.']) || part.ends_with(['-', '.']);
        // Source: huggingface_hub's `validate_repo_id`.
        if part.is_empty() || part.len() > 96 || edge || !part.bytes().all(allowed) {
            return Err(format!(
                "`{part}` is no name on the Hub: letters, digits, `-`, `_`, `.`"
            ));
        }
        if part.contains("--") || part.contains("..") {
            return Err(format!(
                "`{part}` holds `--` or `..`, which the Hub forbids"
            ));
        }
    }
    let revision = revision.map(check_git_ref).transpose()?;
    Ok((Scheme::Hf, name.to_owned(), revision))
}

fn check_git_ref(revision: &str) -> Result<String, String> {
    // Source: git check-ref-format(1).
    let bad = |c: char| c.is_control() || " ~^:?*[\\@".contains(c);
    let misplaced = revision.starts_with(['/', '-', '.'])
        || revision.ends_with(['/', '.'])
        || revision.contains("..")
        || revision.contains("//");
    if revision.is_empty() || revision.len() > 200 || misplaced || revision.contains(bad) {
        return Err(format!("`{revision}` is no branch, tag, PR ref or commit"));
    }
    Ok(revision.to_owned())
}

fn split_content_revision(rest: &str) -> Result<(String, Option<String>), String> {
    let Some((name, revision)) = rest.rsplit_once('@') else {
        return Ok((unescape(rest), None));
    };
    if Revision::new(revision).is_err() || revision.len() != 64 {
        return Err(
            "after an @ stand the 64 hex digits that an earlier prefetch printed; \
                    write an @ of the name itself as %40"
                .to_owned(),
        );
    }
    Ok((unescape(name), Some(revision.to_owned())))
}

fn unescape(text: &str) -> String {
    text.replace("%40", "@").replace("%25", "%")
}

fn escape(text: &str) -> String {
    text.replace('%', "%25").replace('@', "%40")
}

fn parse_s3(rest: &str) -> Parsed {
    let (name, revision) = split_content_revision(rest)?;
    let name = name.trim_end_matches('/');
    let (bucket, prefix) = name.split_once('/').unwrap_or((name, ""));
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    // Source: Amazon S3 user guide, "General purpose bucket naming rules".
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(allowed) {
        return Err(format!(
            "`{bucket}` is no bucket name: 3 to 63 lower-case letters, digits, `-`, `.`"
        ));
    }
    if prefix.len() > 1024 || prefix.starts_with('/') || prefix.contains(char::is_control) {
        return Err(format!(
            "`{prefix}` is no prefix: at most 1024 bytes, no slash at its start"
        ));
    }
    Ok((Scheme::S3, name.to_owned(), revision))
}

fn parse_file(rest: &str) -> Parsed {
    let (name, revision) = split_content_revision(rest)?;
    let parts = name.split('/').filter(|part| !matches!(*part, "" | "."));
    // One spelling only: rules and rights go by the name.
    let path: String = parts.flat_map(|part| ["/", part]).collect();
    if !name.starts_with('/') || path.is_empty() {
        return Err("a directory is named by its absolute path, file:///path/to/model".to_owned());
    }
    if path.split('/').any(|part| part == "..") || path.contains('\0') {
        return Err("the path must not hold `..`".to_owned());
    }
    // Source: PATH_MAX of Linux.
    if path.len() > 4096 {
        return Err("the path is longer than 4096 bytes".to_owned());
    }
    Ok((Scheme::File, path, revision))
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.scheme {
            Scheme::Hf => write!(f, "hf://{}", self.name)?,
            scheme => write!(f, "{}://{}", scheme.as_str(), escape(&self.name))?,
        }
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

impl Serialize for ModelRef {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelRef {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// What a model's name resolved to. It never moves: a Hub commit (40 hex digits), or for other
/// sources the digest of the listing (64 hex digits).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Revision(String);

/// A text is not a resolved revision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a resolved revision (40 or 64 hex digits)")]
pub struct RevisionError(String);

impl Revision {
    /// # Errors
    ///
    /// [`RevisionError`] unless `text` is 40 or 64 lower-case hex digits.
    pub fn new(text: &str) -> Result<Self, RevisionError> {
        let hex = text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if hex && (text.len() == 40 || text.len() == 64) {
            return Ok(Self(text.to_owned()));
        }
        Err(RevisionError(text.to_owned()))
    }

    /// The revision of a source that has none of its own: a digest of its listing, one line a file.
    /// The order of `lines` does not matter.
    pub fn of_listing(lines: impl IntoIterator<Item = String>) -> Self {
        let mut lines: Vec<String> = lines.into_iter().collect();
        lines.sort();
        Self(Digest::of(lines.join("\n").as_bytes()).to_string())
    }

    /// The hex digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Revision {
    type Error = RevisionError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::new(&text)
    }
}

impl From<Revision> for String {
    fn from(revision: Revision) -> Self {
        revision.0
    }
}

/// What a loader of safetensors reads: weights, configuration, tokenizer, templates, model code.
const DEFAULT_INCLUDE: &[&str] = &[
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "*.vocab",
    "*.bpe",
    "*.spm",
    "*.yaml",
    "*.yml",
];

/// The indexes of weights in formats that the default leaves out.
const DEFAULT_EXCLUDE: &[&str] = &[
    "*.bin.index.json",
    "*.h5.index.json",
    "*.msgpack.index.json",
];

/// Which files of a model are wanted. Globs as the Hub's clients read them: `*` also matches `/`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "globs::Unchecked")]
pub struct Patterns {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    include: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    exclude: Vec<String>,
}

/// A text is not a glob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{glob}` is not a file pattern: {reason}")]
pub struct PatternError {
    glob: String,
    reason: String,
}

impl Patterns {
    /// `include` replaces the default set of files, `exclude` takes away from either.
    ///
    /// # Errors
    ///
    /// [`PatternError`] for a text that is not a glob.
    pub fn new(include: Vec<String>, exclude: Vec<String>) -> Result<Self, PatternError> {
        Ok(Self {
            include: globs::checked(include)?,
            exclude: globs::checked(exclude)?,
        })
    }

    /// The globs that replace the default set; empty for the default.
    #[must_use]
    pub fn include(&self) -> &[String] {
        &self.include
    }

    /// The globs that take files away.
    #[must_use]
    pub fn exclude(&self) -> &[String] {
        &self.exclude
    }

    /// Readies the patterns for a listing. The default set depends on what the listing holds.
    pub(crate) fn selector<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Selector {
        let own = |globs: &[&str]| {
            globs
                .iter()
                .map(|&glob| glob.to_owned())
                .collect::<Vec<_>>()
        };
        let default = self.include.is_empty();
        let mut left_out = if default {
            own(DEFAULT_EXCLUDE)
        } else {
            Vec::new()
        };
        // Some repositories hold the same weights a second time in the layout of their authors.
        let sharded = |path: &str| path.starts_with("model") && path.ends_with(".safetensors");
        if default && { paths }.any(sharded) {
            left_out.push("consolidated*.safetensors".to_owned());
            // It would name shards that are not there.
            left_out.push("consolidated*.safetensors.index.json".to_owned());
        }
        let include = if default {
            own(DEFAULT_INCLUDE)
        } else {
            self.include.clone()
        };
        Selector {
            include: globs::built(&include),
            left_out: globs::built(&left_out),
            exclude: globs::built(&self.exclude),
        }
    }
}

/// [`Patterns`], compiled.
pub(crate) struct Selector {
    include: GlobSet,
    left_out: GlobSet,
    exclude: GlobSet,
}

impl Selector {
    /// The user asked not to have it.
    pub(crate) fn excludes(&self, path: &str) -> bool {
        self.exclude.is_match(path)
    }

    pub(crate) fn includes(&self, path: &str) -> bool {
        self.include.is_match(path) && !self.left_out.is_match(path)
    }
}

/// One immutable set of files: a model at a revision, and the patterns that chose the files.
///
/// A directory name: a readable part for people, then 24 hex digits that tell snapshots apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(String);

/// A text is not a snapshot's id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a snapshot id")]
pub struct SnapshotIdError(String);

impl SnapshotId {
    /// The id of `model` at `revision` with the files that `patterns` choose.
    #[must_use]
    pub fn new(model: &ModelRef, revision: &Revision, patterns: &Patterns) -> Self {
        // The `1` is the version of the default file set: another set is another snapshot.
        let key = serde_json::json!([1, model.scheme, model.name, revision, patterns]);
        let hash = Digest::of(key.to_string().as_bytes()).to_string();
        let keep = |c: char| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '-'
            }
        };
        let slug: String = model
            .name
            .trim_start_matches('/')
            .chars()
            .map(keep)
            .take(80)
            .collect();
        Self(format!("{}-{slug}-{}", model.scheme.as_str(), &hash[..24]))
    }

    /// The directory name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SnapshotId {
    type Err = SnapshotIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let named = ["hf-", "s3-", "file-"]
            .iter()
            .any(|scheme| text.starts_with(scheme));
        if named && text.len() <= 128 && text.bytes().all(allowed) {
            return Ok(Self(text.to_owned()));
        }
        Err(SnapshotIdError(text.to_owned()))
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = SnapshotIdError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.0
    }
}

/// A path that cannot leave its snapshot, so that joining one to a directory needs no check.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RelPath(String);

/// A name that an origin sent is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` {reason}", .path.escape_debug())]
pub struct RelPathError {
    path: String,
    reason: &'static str,
}

impl RelPath {
    /// # Errors
    ///
    /// [`RelPathError`] for a path that is empty, absolute, too long, has an empty, `.` or `..`
    /// part, holds a control character or a backslash, or begins with the reserved `.weightd`.
    pub fn new(path: &str) -> Result<Self, RelPathError> {
        let fail = |reason| {
            Err(RelPathError {
                path: path.to_owned(),
                reason,
            })
        };
        if path.is_empty() {
            return fail("is empty");
        }
        if path.starts_with('/') {
            return fail("is absolute");
        }
        // Source: NAME_MAX and, with room for the store's own path, PATH_MAX of Linux.
        if path.len() > 2048 || path.split('/').any(|part| part.len() > 255) {
            return fail("is too long for a file system");
        }
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return fail("has an empty, `.` or `..` part");
        }
        if path.contains(|c: char| c.is_control() || c == '\\') {
            return fail("holds a control character or a backslash");
        }
        if path.split('/').next() == Some(".weightd") {
            return fail("begins with `.weightd`, which is reserved");
        }
        Ok(Self(path.to_owned()))
    }

    /// The path, with `/` between its parts.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<std::path::Path> for RelPath {
    fn as_ref(&self) -> &std::path::Path {
        std::path::Path::new(&self.0)
    }
}

impl TryFrom<String> for RelPath {
    type Error = RelPathError;
    fn try_from(path: String) -> Result<Self, Self::Error> {
        Self::new(&path)
    }
}

impl From<RelPath> for String {
    fn from(path: RelPath) -> Self {
        path.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_print_as_they_were_typed() {
        let commit = "0e9e39f249a16976918f6564b8830bc894c89659";
        for text in [
            "hf://org/model",
            "hf://org/model@main",
            "hf://model",
            "hf://org/model@refs/pr/1",
            &format!("hf://org/model@{commit}"),
            "s3://bucket",
            "s3://bucket/a/b",
            "file:///models/x",
            "s3://bucket/a%40b",
        ] {
            assert_eq!(text.parse::<ModelRef>().expect(text).to_string(), text);
        }
        let slash: ModelRef = "s3://bucket/a/".parse().unwrap();
        assert_eq!(slash, "s3://bucket/a".parse().unwrap());
        for text in ["file:////a//b/", "file:///a/./b", "file:///./a/b/."] {
            let model: ModelRef = text.parse().expect(text);
            assert_eq!(model.to_string(), "file:///a/b");
        }
        let pinned: ModelRef = format!("hf://org/model@{commit}").parse().unwrap();
        assert_eq!(pinned.pinned().unwrap().as_str(), commit);
        assert_eq!(
            "hf://org/model@main".parse::<ModelRef>().unwrap().pinned(),
            None
        );
    }

    #[test]
    fn a_typo_is_refused_with_the_way_to_write_it() {
        for (text, part) in [
            ("org/model", "hf://org/model"),
            ("https://host/org/model", "hf://org/name"),
            ("gs://bucket/x", "none of hf, s3, file"),
            ("hf://", "no name on the Hub"),
            ("hf://org/", "no name on the Hub"),
            ("hf://org/model/tree", "org/name"),
            ("hf://org/mo del", "no name on the Hub"),
            ("hf://../model", "no name on the Hub"),
            ("hf://org/model@", "no branch"),
            ("hf://org/model@a..b", "no branch"),
            ("s3://B/x", "no bucket name"),
            ("s3://", "no bucket name"),
            ("s3://bucket/x@main", "64 hex digits"),
            ("file://models", "absolute path"),
            ("file:///a/../b", "`..`"),
        ] {
            let error = text.parse::<ModelRef>().expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_snapshot_id_tells_models_revisions_and_patterns_apart() {
        let commit = Revision::new(&"a".repeat(40)).unwrap();
        let id = |name: &str, include: &[&str]| {
            let include = include.iter().map(|&glob| glob.to_owned()).collect();
            let patterns = Patterns::new(include, vec![]).unwrap();
            SnapshotId::new(&name.parse().unwrap(), &commit, &patterns)
        };
        let base = id("hf://org/model", &[]);
        assert_eq!(
            base,
            id("hf://org/model@main", &[]),
            "what was typed must not matter"
        );
        assert_ne!(base, id("hf://org-model", &[]));
        assert_ne!(base, id("hf://org/model", &["*"]));
        assert_eq!(
            id("hf://org/model", &["b", "a"]),
            id("hf://org/model", &["a", "b", "a"])
        );
        assert_eq!(base.as_str().parse::<SnapshotId>().unwrap(), base);
        assert!("../hf-x".parse::<SnapshotId>().is_err());
    }

    #[test]
    fn a_listing_digest_does_not_depend_on_its_order() {
        let lines = |texts: [&str; 2]| Revision::of_listing(texts.map(str::to_owned));
        assert_eq!(lines(["a", "b"]), lines(["b", "a"]));
        assert_ne!(lines(["a", "b"]), lines(["a", "c"]));
    }
}
