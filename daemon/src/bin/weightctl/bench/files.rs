//! The files that are measured, and where their tensors are.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

/// The longest header that is read: 32 MiB, as when a model is checked before it is published.
const HEADER_BYTES: u64 = 32 << 20;

/// A file, or all files of a directory.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) path: PathBuf,
    is_dir: bool,
    /// By their paths.
    pub(super) files: Vec<BenchFile>,
}

#[derive(Debug)]
pub(super) struct BenchFile {
    pub(super) path: PathBuf,
    /// Below the tree.
    name: PathBuf,
    pub(super) bytes: u64,
    pub(super) is_safetensors: bool,
}

impl Tree {
    /// What is at `path`. Links to files are followed, as a Hugging Face cache needs; links to directories are not.
    pub(super) fn find(path: &Path) -> anyhow::Result<Self> {
        let is_dir = look(path)?.is_dir();
        let mut tree = Self {
            path: path.to_owned(),
            is_dir,
            files: Vec::new(),
        };
        if is_dir {
            tree.walk(path)?;
        } else {
            tree.add(path, look(path)?)?;
        }
        tree.files.sort_by(|a, b| a.name.cmp(&b.name));
        ensure!(
            tree.bytes() > 0,
            "there is nothing to read at {}: {}",
            path.display(),
            if tree.files.is_empty() {
                "no file"
            } else {
                "only empty files"
            }
        );
        Ok(tree)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    fn walk(&mut self, dir: &Path) -> anyhow::Result<()> {
        let entries =
            fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", dir.display()))?;
            let path = entry.path();
            let found = look(&path)?;
            let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            match found.is_dir() {
                // It may lead back to where we come from.
                true if is_link => {}
                true => self.walk(&path)?,
                false => self.add(&path, found)?,
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, found: Metadata) -> anyhow::Result<()> {
        // To open a pipe would wait for its other end.
        ensure!(
            found.is_file(),
            "cannot measure {}: it is neither a file nor a directory",
            path.display()
        );
        let file = BenchFile {
            name: path.strip_prefix(&self.path).unwrap_or(path).to_owned(),
            path: path.to_owned(),
            bytes: found.len(),
            is_safetensors: path
                .extension()
                .is_some_and(|ending| ending == "safetensors"),
        };
        // Both show now whether it can be read, and not in the middle of the rounds.
        let opened = file.open()?;
        if file.is_safetensors {
            file.tensors(&opened)?;
        }
        self.files.push(file);
        Ok(())
    }

    /// Fails unless the other place has the same files.
    pub(super) fn must_equal(&self, other: &Self) -> anyhow::Result<()> {
        let (here, there) = (self.path.display(), other.path.display());
        let differ = |how: String| format!("cannot compare {here} with {there}: {how}");
        ensure!(
            self.is_dir == other.is_dir,
            differ("one is a file, the other a directory".to_owned())
        );
        // Two files may have two names: one is a model's, the other that of its digest.
        let key = |file: &BenchFile| {
            (
                if self.is_dir {
                    file.name.clone()
                } else {
                    PathBuf::new()
                },
                file.bytes,
            )
        };
        let (ours, theirs) = (self.files.iter().map(key), other.files.iter().map(key));
        let (ours, theirs): (BTreeMap<_, _>, BTreeMap<_, _>) = (ours.collect(), theirs.collect());
        let names = || ours.keys().chain(theirs.keys());
        if let Some(name) = names().find(|name| ours.get(*name) != theirs.get(*name)) {
            let size = |found: Option<&u64>| {
                found.map_or("not there".to_owned(), |bytes| format!("{bytes} bytes"))
            };
            let what = if self.is_dir {
                name.display().to_string()
            } else {
                "the file".to_owned()
            };
            let (ours, theirs) = (size(ours.get(name)), size(theirs.get(name)));
            bail!(differ(format!(
                "{what} is {ours} in the first, {theirs} in the second"
            )));
        }
        Ok(())
    }
}

fn look(path: &Path) -> anyhow::Result<Metadata> {
    fs::metadata(path).with_context(|| format!("cannot measure {}", path.display()))
}

impl BenchFile {
    pub(super) fn open(&self) -> anyhow::Result<File> {
        File::open(&self.path).with_context(|| format!("cannot open {}", self.path.display()))
    }

    /// Where its tensors are, by their names: a loader asks for them in that order.
    pub(super) fn tensors(&self, file: &File) -> anyhow::Result<Vec<Range<u64>>> {
        let path = self.path.display();
        let broken = |why: &str| {
            format!(
                "{path} is not valid safetensors: {why}\nhint: measure another path, or weightctl verify"
            )
        };
        let read = |at: u64, buffer: &mut [u8]| {
            let read = file.read_exact_at(buffer, at);
            read.with_context(|| format!("cannot read the header of {path}"))
        };
        // Source: the safetensors format: 8 bytes of header length, the JSON header, the data.
        let Some(rest) = self.bytes.checked_sub(8) else {
            bail!(broken("it has not even a header's length"));
        };
        let mut length = [0; 8];
        read(0, &mut length)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= rest, broken("its header is longer than the file"));
        ensure!(
            length <= HEADER_BYTES,
            broken("its header has more than 32 MiB")
        );
        let mut header = vec![0; usize::try_from(length).expect("its limit is far below")];
        read(8, &mut header)?;
        let header: BTreeMap<String, Tensor> = serde_json::from_slice(&header)
            .map_err(|error| anyhow::anyhow!(broken(&error.to_string())))?;
        let (start, data) = (8 + length, rest - length);
        let mut tensors = Vec::new();
        for (name, tensor) in header {
            match tensor.data_offsets {
                Some((from, to)) if from <= to && to <= data => {
                    tensors.push(start + from..start + to)
                }
                Some(_) => bail!(broken(&format!(
                    "the tensor `{name}` does not lie in the file"
                ))),
                None if name == "__metadata__" => {}
                None => bail!(broken(&format!("the tensor `{name}` has no data_offsets"))),
            }
        }
        Ok(tensors)
    }
}

/// A tensor of a header, or what else stands there.
#[derive(Deserialize)]
struct Tensor {
    data_offsets: Option<(u64, u64)>,
}
