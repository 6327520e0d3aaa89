//! Reading a directory in the layout of the Hugging Face cache. All paths are walked from an open directory,
//! name by name, and no link is ever followed: one that a snapshot holds says only which blob is meant.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};
use serde::Deserialize;

use super::{ImportError, Left};
use crate::digest::{Claims, Digest, GitOid};
use crate::model::{ModelRef, Revision};

/// The most that is read of a note: `trees/<commit>.json` of a model with 100,000 files.
const NOTE_BYTES: u64 = 64 << 20;

/// The longest path below a snapshot.
const PATH_BYTES: usize = 2048;

/// One `models--<org>--<name>`.
pub(super) struct CachedModel {
    pub(super) model: ModelRef,
    pub(super) dir: OwnedFd,
    pub(super) path: PathBuf,
    pub(super) revisions: Vec<CachedRevision>,
    /// Branches and tags, each with its commit.
    pub(super) refs: Vec<(ModelRef, String)>,
}

/// One `snapshots/<commit>`.
pub(super) struct CachedRevision {
    pub(super) revision: Revision,
    pub(super) files: Vec<CachedFile>,
}

/// One file of a snapshot.
pub(super) struct CachedFile {
    /// Below the snapshot.
    pub(super) path: String,
    pub(super) size: u64,
    /// Where its bytes lie below the model's directory; `None` if they are not there.
    pub(super) bytes: Option<String>,
    /// What the cache says they are.
    pub(super) claims: Claims,
}

/// What is found in the cache, but cannot be used.
#[derive(Default)]
pub(super) struct Findings {
    pub(super) refused: Vec<Left>,
    pub(super) skipped: Vec<Left>,
}

impl Findings {
    fn refuse(&mut self, path: PathBuf, why: impl ToString) {
        let why = why.to_string();
        self.refused.push(Left { path, why });
    }

    fn skip(&mut self, path: PathBuf, why: impl ToString) {
        let why = why.to_string();
        self.skipped.push(Left { path, why });
    }
}

/// The models in `dir`: an `HF_HOME`, a hub cache in it, or one model of that.
pub(super) fn models(dir: &Path, findings: &mut Findings) -> Result<Vec<CachedModel>, ImportError> {
    let fail = |op: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| ImportError::Cache { op, path, source }
    };
    let dir = fs::canonicalize(dir).map_err(fail("find", dir))?;
    let mut found = Vec::new();
    if is_model(&dir) {
        found.push(dir.clone());
    } else {
        let hub = dir.join("hub");
        let hub = if hub.is_dir() && folders_of_models(&dir).is_ok_and(|found| found.is_empty()) {
            fs::canonicalize(&hub).map_err(fail("find", &hub))?
        } else {
            dir.clone()
        };
        found.extend(folders_of_models(&hub).map_err(fail("list", &hub))?);
    }
    if found.is_empty() {
        return Err(ImportError::NotACache { path: dir });
    }
    found.sort();
    let mut models = Vec::new();
    for path in found {
        let read = read_model(&path, findings).map_err(fail("read", &path))?;
        models.extend(read);
    }
    Ok(models)
}

fn is_model(dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("models--") && dir.join("snapshots").is_dir()
}

fn folders_of_models(hub: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(hub)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("models--") {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn read_model(path: &Path, findings: &mut Findings) -> io::Result<Option<CachedModel>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // No name on the Hub holds `--`.
    let name = name.trim_start_matches("models--").replace("--", "/");
    let model = match format!("hf://{name}").parse::<ModelRef>() {
        Ok(model) if model.revision().is_none() => model,
        Ok(_) => {
            findings.skip(path.to_owned(), "its name is no name on the Hub");
            return Ok(None);
        }
        Err(error) => {
            findings.skip(path.to_owned(), error);
            return Ok(None);
        }
    };
    let dir = match nix::fcntl::open(path, DIRECTORY, Mode::empty()) {
        Ok(dir) => dir,
        Err(nix::Error::ELOOP | nix::Error::ENOTDIR) => {
            findings.refuse(path.to_owned(), "it is a link, or no directory");
            return Ok(None);
        }
        Err(errno) => return Err(errno.into()),
    };
    let mut read = CachedModel {
        refs: refs(&dir, &model)?,
        model,
        dir,
        path: path.to_owned(),
        revisions: Vec::new(),
    };
    let Some(snapshots) = beneath(&read.dir, "snapshots", DIRECTORY)? else {
        findings.skip(path.to_owned(), "it holds no snapshots");
        return Ok(Some(read));
    };
    let mut commits = names(&snapshots)?;
    commits.sort();
    for commit in commits {
        let at = path.join("snapshots").join(&commit);
        match Revision::new(&commit) {
            Ok(revision) if commit.len() == 40 => {
                let refused = findings.refused.len();
                let files = read.files(&commit, findings)?;
                // Whoever put such a link there is not to be trusted with the rest.
                if findings.refused.len() == refused {
                    read.revisions.push(CachedRevision { revision, files });
                }
            }
            _ => findings.skip(at, "its name is no commit"),
        }
    }
    Ok(Some(read))
}

impl CachedModel {
    /// The files of one snapshot.
    fn files(&self, commit: &str, findings: &mut Findings) -> io::Result<Vec<CachedFile>> {
        let tree = self.tree(commit)?;
        let mut files = Vec::new();
        let mut folders = vec![String::new()];
        while let Some(folder) = folders.pop() {
            let at = join("snapshots", &join(commit, &folder));
            let Some(dir) = beneath(&self.dir, &at, DIRECTORY)? else {
                findings.refuse(self.path.join(&at), "it is a link, or no directory");
                continue;
            };
            for name in names(&dir)? {
                let path = join(&folder, &name);
                let at = join("snapshots", &join(commit, &path));
                let Some(found) = look(&dir, &name)? else {
                    continue;
                };
                let refused = match kind(&found) {
                    _ if path.len() > PATH_BYTES => Some("its name is too long"),
                    SFlag::S_IFDIR => {
                        folders.push(path);
                        None
                    }
                    SFlag::S_IFREG => {
                        let claims = tree.claims(&path);
                        files.push(CachedFile {
                            size: size(&found),
                            bytes: Some(at.clone()),
                            claims: claims.unwrap_or_default(),
                            path,
                        });
                        None
                    }
                    SFlag::S_IFLNK => match self.blob(&dir, &name, &at)? {
                        Ok(blob) => {
                            files.push(CachedFile { path, ..blob });
                            None
                        }
                        Err(why) => Some(why),
                    },
                    _ => Some("it is no file"),
                };
                if let Some(why) = refused {
                    findings.refuse(self.path.join(&at), why);
                }
            }
        }
        Ok(files)
    }

    /// The blob that a snapshot's link `at` stands for, or why it must not be used.
    fn blob(
        &self,
        dir: &OwnedFd,
        name: &str,
        at: &str,
    ) -> io::Result<Result<CachedFile, &'static str>> {
        let target = readlinkat(dir, name)?;
        let Some(target) = target.to_str().and_then(|to| self.inside(at, to)) else {
            return Ok(Err("it leads out of the model's own directory"));
        };
        let blob = target.strip_prefix("blobs/").unwrap_or_default();
        let (digest, oid) = (blob.parse::<Digest>().ok(), blob.parse::<GitOid>().ok());
        if digest.is_none() && oid.is_none() {
            return Ok(Err("it leads to no blob that is named by its hash"));
        }
        let found = match beneath(&self.dir, "blobs", DIRECTORY)? {
            Some(blobs) => look(&blobs, blob)?,
            None => None,
        };
        if found.is_some_and(|found| kind(&found) != SFlag::S_IFREG) {
            return Ok(Err("it leads to what is no file"));
        }
        Ok(Ok(CachedFile {
            path: String::new(),
            size: found.as_ref().map_or(0, size),
            bytes: found.map(|_| target),
            claims: Claims {
                sha256: digest,
                git_oid: oid,
                ..Claims::default()
            },
        }))
    }

    /// Where a link leads, below the model's directory; `None` if it leads out of it.
    fn inside(&self, at: &str, target: &str) -> Option<String> {
        let (mut parts, target): (Vec<&str>, &str) = match target.starts_with('/') {
            true => (
                Vec::new(),
                target
                    .strip_prefix(self.path.to_str()?)?
                    .strip_prefix('/')?,
            ),
            false => (at.split('/').collect(), target),
        };
        // The link's own name.
        parts.pop();
        for part in target.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop()?;
                }
                part => parts.push(part),
            }
        }
        Some(parts.join("/"))
    }

    fn tree(&self, commit: &str) -> io::Result<Tree> {
        let text = self.note(&format!("trees/{commit}.json"))?;
        // Without it, plain files have no hash to be checked against.
        let tree = text.and_then(|text| serde_json::from_str(&text).ok());
        Ok(tree.unwrap_or_default())
    }

    fn note(&self, path: &str) -> io::Result<Option<String>> {
        read_note(&self.dir, path)
    }
}

/// What `trees/<commit>.json` says of the files.
#[derive(Default, Deserialize)]
struct Tree {
    files: BTreeMap<String, TreeFile>,
}

#[derive(Deserialize)]
struct TreeFile {
    #[serde(default)]
    blob_id: Option<String>,
    #[serde(default)]
    lfs_sha256: Option<String>,
}

impl Tree {
    fn claims(&self, path: &str) -> Option<Claims> {
        let file = self.files.get(path)?;
        let sha256 = file.lfs_sha256.as_ref().and_then(|hex| hex.parse().ok());
        let oid = file.blob_id.as_ref().and_then(|hex| hex.parse().ok());
        Some(Claims {
            sha256,
            // Of an LFS file that is the object id of its pointer.
            git_oid: oid.filter(|_| file.lfs_sha256.is_none()),
            ..Claims::default()
        })
    }
}

/// The branches and tags that the cache knows.
fn refs(dir: &OwnedFd, model: &ModelRef) -> io::Result<Vec<(ModelRef, String)>> {
    let mut found = Vec::new();
    let mut folders = vec!["refs".to_owned()];
    while let Some(folder) = folders.pop() {
        let Some(open) = beneath(dir, &folder, DIRECTORY)? else {
            continue;
        };
        for name in names(&open)? {
            let path = join(&folder, &name);
            match look(&open, &name)?.as_ref().map(kind) {
                Some(SFlag::S_IFDIR) if path.len() < PATH_BYTES => folders.push(path),
                Some(SFlag::S_IFREG) => {
                    let branch = path.trim_start_matches("refs/");
                    let asked = format!("{model}@{branch}").parse();
                    let commit = read_note(dir, &path)?.unwrap_or_default();
                    if let Ok(asked) = asked {
                        found.push((asked, commit.trim().to_owned()));
                    }
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// What else could be there does not make an open wait.
const FILE: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// Opens `path` below `dir`; `None` if it is not there, or there is a link on the way.
fn beneath(dir: &OwnedFd, path: &str, flags: OFlag) -> io::Result<Option<OwnedFd>> {
    let mut at = dir.try_clone()?;
    let mut parts = path.split('/').filter(|part| !part.is_empty()).peekable();
    while let Some(part) = parts.next() {
        let flags = if parts.peek().is_some() {
            DIRECTORY
        } else {
            flags
        };
        at = match openat(&at, part, flags, Mode::empty()) {
            Ok(next) => next,
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
    }
    Ok(Some(at))
}

/// Opens a file below `dir` for reading.
pub(super) fn open_file(dir: &OwnedFd, path: &str) -> io::Result<File> {
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    let file = File::from(beneath(dir, path, FILE)?.ok_or_else(gone)?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no file")),
    }
}

/// Opens the folder that holds `path`, and says what the file is called in it.
pub(super) fn open_folder<'a>(dir: &OwnedFd, path: &'a str) -> io::Result<(OwnedFd, &'a str)> {
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    let (folder, name) = path.rsplit_once('/').ok_or_else(gone)?;
    Ok((beneath(dir, folder, DIRECTORY)?.ok_or_else(gone)?, name))
}

fn read_note(dir: &OwnedFd, path: &str) -> io::Result<Option<String>> {
    let file = match open_file(dir, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    file.take(NOTE_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes).ok())
}

/// The names in a folder. One that is not text cannot be a name that the Hub knows.
fn names(dir: &OwnedFd) -> io::Result<Vec<String>> {
    // A descriptor of its own: the place in a directory is part of what is open.
    let mut open = Dir::openat(dir, ".", DIRECTORY, Mode::empty())?;
    let mut names = Vec::new();
    for entry in open.iter() {
        if let Ok(name) = entry?.file_name().to_str()
            && !matches!(name, "." | "..")
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn look(dir: &OwnedFd, name: &str) -> io::Result<Option<FileStat>> {
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(nix::Error::ENOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn kind(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits())
}

fn size(found: &FileStat) -> u64 {
    u64::try_from(found.st_size).unwrap_or(0)
}

fn join(folder: &str, name: &str) -> String {
    match folder {
        "" => name.to_owned(),
        folder => format!("{folder}/{name}"),
    }
}
