//! What a directory holds.

use std::fs::{self, DirEntry, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use weightd_core::source::SourceError;

use super::Place;

/// More files than any model has: somebody named a home directory by mistake.
const MOST_FILES: usize = 100_000;

/// What is nobody's model: version control, the Hub's download records, our own records.
const LEFT_OUT: [&str; 3] = [".git", ".cache", ".weightd"];

/// What tells that a file's bytes are still those that were listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) modified_ns: i128,
    /// The time of modification can be set back; this one cannot.
    pub(super) changed_ns: i128,
}

impl Mark {
    pub(super) fn of(metadata: &Metadata) -> Self {
        let ns = |seconds, ns| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// One file of the directory.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// Below the directory, with `/` between the parts.
    pub(super) path: String,
    /// Where to open it.
    pub(super) place: PathBuf,
    pub(super) mark: Mark,
}

/// What could be mistaken for the borders of an identity's parts.
const ODD: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/');

impl Found {
    pub(super) fn identity(&self) -> String {
        let path = self.place.to_string_lossy();
        let path = utf8_percent_encode(&path, ODD);
        let Mark {
            device,
            inode,
            size,
            modified_ns,
            changed_ns,
        } = self.mark;
        format!("file:{path}:{device}:{inode}:{size}:{modified_ns}:{changed_ns}")
    }
}

/// All files below the model's directory. Links to files are followed, as the Hub's cache is made of
/// them; links to directories are not, so that there is no way round in a circle.
pub(super) fn walk(place: &Place) -> Result<Vec<Found>, SourceError> {
    place.allow_name()?;
    let root = real(place, &place.root)?;
    place.allow(&root)?;
    if !root.is_dir() {
        let hint = "name the directory that holds it, and the file with --include";
        return Err(place.invalid("it is not a directory".to_owned(), Some(hint)));
    }
    let mut found = Vec::new();
    let mut left = vec![(root, String::new())];
    while let Some((directory, prefix)) = left.pop() {
        let failed = |error: &io::Error| place.failed("list", &directory, error);
        for entry in fs::read_dir(&directory).map_err(|error| failed(&error))? {
            let entry = entry.map_err(|error| failed(&error))?;
            let Some(path) = path_of(place, &entry, &prefix)? else {
                continue;
            };
            match look(place, &entry)? {
                None => left.push((entry.path(), format!("{path}/"))),
                Some(mark) => found.push(Found {
                    path,
                    place: entry.path(),
                    mark,
                }),
            }
        }
        if found.len() > MOST_FILES {
            let detail = format!("it holds more than {MOST_FILES} files");
            return Err(place.invalid(detail, Some("name the directory of one model")));
        }
    }
    if found.is_empty() {
        return Err(SourceError::NotFound {
            what: place.model.to_string(),
            detail: "the directory holds no files".to_owned(),
            hint: None,
        });
    }
    Ok(found)
}

fn real(place: &Place, path: &Path) -> Result<PathBuf, SourceError> {
    let real = path.canonicalize();
    real.map_err(|error| place.failed("find", path, &error))
}

/// The entry's path below the root, unless it is left out.
fn path_of(place: &Place, entry: &DirEntry, prefix: &str) -> Result<Option<String>, SourceError> {
    let name = entry.file_name();
    let Some(name) = name.to_str() else {
        let detail = format!("`{prefix}{}` is not UTF-8", name.to_string_lossy());
        return Err(place.invalid(detail, Some("rename it")));
    };
    let lock = name.ends_with(".lock");
    Ok((!LEFT_OUT.contains(&name) && !lock).then(|| format!("{prefix}{name}")))
}

/// The mark of a file, or `None` for a directory.
fn look(place: &Place, entry: &DirEntry) -> Result<Option<Mark>, SourceError> {
    let path = entry.path();
    let failed = |error: io::Error| place.failed("look at", &path, &error);
    let kind = entry.file_type().map_err(failed)?;
    if kind.is_dir() {
        return Ok(None);
    }
    let shown = path.display();
    if kind.is_symlink() {
        let target = path.canonicalize().map_err(|error| {
            let hint = "mend or remove the link; a download into that cache may have broken off";
            place.invalid(
                format!("the link `{shown}` leads nowhere: {error}"),
                Some(hint),
            )
        })?;
        place.allow(&target)?;
    }
    let metadata = fs::metadata(&path).map_err(failed)?;
    if metadata.is_dir() {
        let detail = format!("`{shown}` is a link to a directory, which is not followed");
        let hint = "put the directory itself there, or name it as the model";
        return Err(place.invalid(detail, Some(hint)));
    }
    if !metadata.is_file() {
        let detail = format!("`{shown}` is a socket, a device or a pipe");
        return Err(place.invalid(detail, Some("remove it, or name another directory")));
    }
    Ok(Some(Mark::of(&metadata)))
}
