//! The files of one commit, honest or lying.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use bytes::Bytes;
use sha1::{Digest, Sha1};

use crate::content::{Content, Pattern};

/// One file: what it holds, and what the Hub claims about it.
#[derive(Debug, Clone)]
pub struct File {
    pub(super) content: Content,
    pub(super) lfs: Option<Lfs>,
    /// The git blob: of the content, or of the LFS pointer.
    pub(super) oid: String,
    pub(super) size: u64,
    pub(super) xet_hash: Option<String>,
}

/// What the Hub says of an LFS file beside its git blob.
#[derive(Debug, Clone)]
pub(super) struct Lfs {
    pub(super) sha256: String,
    pub(super) pointer_size: u64,
}

fn git_oid(content: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0", content.len()));
    hash.update(content);
    hex::encode(hash.finalize())
}

impl File {
    /// A file in git itself, served by the Hub.
    pub fn small(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self {
            oid: git_oid(&bytes),
            size: bytes.len() as u64,
            content: Content::Memory(bytes),
            lfs: None,
            xet_hash: None,
        }
    }

    /// An LFS file in memory, served by the CDN.
    pub fn lfs(bytes: impl Into<Bytes>) -> Self {
        let content = Content::Memory(bytes.into());
        let sha256 = content.sha256().expect("memory can be read");
        Self::with_sha256(content, sha256)
    }

    /// An LFS file on disk, hashed now unless `sha256` is given.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn lfs_path(path: &Path, sha256: Option<&str>) -> io::Result<Self> {
        let content = Content::disk(path)?;
        let sha256 = sha256.map_or_else(|| content.sha256(), |sha256| Ok(sha256.to_owned()))?;
        Ok(Self::with_sha256(content, sha256))
    }

    /// An LFS file of any size that takes no room, hashed now unless `sha256` is given.
    pub fn lfs_pattern(pattern: Pattern, size: u64, sha256: Option<&str>) -> Self {
        let content = Content::pattern(pattern, size);
        let sha256 = sha256.map_or_else(|| pattern.sha256(size), str::to_owned);
        Self::with_sha256(content, sha256)
    }

    fn with_sha256(content: Content, sha256: String) -> Self {
        Self {
            size: content.size(),
            oid: String::new(),
            content,
            lfs: Some(Lfs {
                sha256,
                pointer_size: 0,
            }),
            xet_hash: None,
        }
        .with_pointer()
    }

    /// Makes the LFS pointer's blob from the claims, as `git lfs` would.
    fn with_pointer(mut self) -> Self {
        let size = self.size;
        if let Some(lfs) = &mut self.lfs {
            let pointer = format!(
                "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {size}\n",
                lfs.sha256
            );
            lfs.pointer_size = pointer.len() as u64;
            self.oid = git_oid(pointer.as_bytes());
        }
        self
    }

    /// Lies about the sha256 of an LFS file.
    pub fn claim_sha256(mut self, sha256: &str) -> Self {
        if let Some(lfs) = &mut self.lfs {
            sha256.clone_into(&mut lfs.sha256);
        }
        self.with_pointer()
    }

    /// Lies about the git oid, which is a small file's `ETag`.
    pub fn claim_oid(mut self, oid: &str) -> Self {
        oid.clone_into(&mut self.oid);
        self
    }

    /// Lies about the size, in the tree and in `X-Linked-Size`.
    pub fn claim_size(mut self, size: u64) -> Self {
        self.size = size;
        self.with_pointer()
    }

    /// Advertises a Xet hash (64 hex); there is no Xet server behind it.
    pub fn xet_hash(mut self, hash: &str) -> Self {
        self.xet_hash = Some(hash.to_owned());
        self
    }

    /// The sha256 that an LFS file is said to have.
    pub fn sha256(&self) -> Option<&str> {
        self.lfs.as_ref().map(|lfs| lfs.sha256.as_str())
    }

    /// The `ETag` of a small file, the sha256 of an LFS file.
    pub(super) fn etag(&self) -> &str {
        self.sha256().unwrap_or(&self.oid)
    }
}

/// The files of one commit by their paths, which may be hostile.
#[derive(Debug, Clone, Default)]
pub struct Files(pub(super) BTreeMap<String, File>);

impl Files {
    /// No files.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file under any path, in place of an earlier one.
    pub fn add(mut self, path: &str, file: File) -> Self {
        self.0.insert(path.to_owned(), file);
        self
    }

    /// Adds a file that is in git itself.
    pub fn file(self, path: &str, bytes: impl Into<Bytes>) -> Self {
        self.add(path, File::small(bytes))
    }

    /// Adds an LFS file.
    pub fn lfs(self, path: &str, bytes: impl Into<Bytes>) -> Self {
        self.add(path, File::lfs(bytes))
    }

    /// Adds an LFS file on disk, which is read and hashed.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn lfs_path(self, path: &str, disk: &Path) -> io::Result<Self> {
        Ok(self.add(path, File::lfs_path(disk, None)?))
    }

    /// Adds an LFS file that takes no room; see [`File::lfs_pattern`].
    pub fn lfs_pattern(
        self,
        path: &str,
        pattern: Pattern,
        size: u64,
        sha256: Option<&str>,
    ) -> Self {
        self.add(path, File::lfs_pattern(pattern, size, sha256))
    }

    /// Adds a generated model: `.safetensors` and `.bin` files as LFS, the others in git.
    pub fn model(self, files: impl IntoIterator<Item = (String, Bytes)>) -> Self {
        files.into_iter().fold(self, |all, (path, bytes)| {
            if is_lfs(&path, bytes.len() as u64) {
                all.lfs(&path, bytes)
            } else {
                all.file(&path, bytes)
            }
        })
    }

    /// Adds all files under a directory, those of 10 MB or more and weights as LFS.
    ///
    /// # Errors
    ///
    /// If a file cannot be read.
    pub fn directory(mut self, root: &Path) -> io::Result<Self> {
        for (path, disk) in walk(root)? {
            let size = std::fs::metadata(&disk)?.len();
            self = if is_lfs(&path, size) {
                self.lfs_path(&path, &disk)?
            } else {
                self.file(&path, std::fs::read(&disk)?)
            };
        }
        Ok(self)
    }

    /// Takes a file away.
    pub fn without(mut self, path: &str) -> Self {
        self.0.remove(path);
        self
    }

    /// A file by its path.
    pub fn find(&self, path: &str) -> Option<&File> {
        self.0.get(path)
    }
}

/// The Hub keeps files of 10 MB or more, and the types listed in `.gitattributes`, out of git.
fn is_lfs(path: &str, size: u64) -> bool {
    size >= 10_000_000 || path.ends_with(".safetensors") || path.ends_with(".bin")
}

/// All files under `root` with their paths relative to it, in order.
pub(crate) fn walk(root: &Path) -> io::Result<Vec<(String, std::path::PathBuf)>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(name) = path.strip_prefix(root) {
                found.push((name.to_string_lossy().into_owned(), path.clone()));
            }
        }
    }
    found.sort();
    Ok(found)
}
