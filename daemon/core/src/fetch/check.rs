//! Whether safetensors files are what a loader can read. A model that holds a broken one is never
//! published: better an error now than a crash in a hundred pods.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::SafeTensors;
use serde::Deserialize;

use crate::manifest::FileEntry;
use crate::model::RelPath;

/// The largest index of shards that is read: 64 MiB. That of a model with 100,000 tensors has 10 MiB.
const INDEX_BYTES: u64 = 64 << 20;

/// What the headers of all shards may have together: 1 GiB, as all of it is held in memory.
const HEADER_BYTES: u64 = 1 << 30;

/// A safetensors file, or an index of them, that no loader could read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path} is broken: {reason}")]
pub struct CheckError {
    /// The file.
    pub path: RelPath,
    /// What is wrong with it.
    pub reason: String,
}

/// The part of `model.safetensors.index.json` that names shards.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Checks the headers of all safetensors files below `tree`, and the indexes that name them.
///
/// `whole` says that the default patterns chose the files, so that an index must find all its shards.
/// Only the headers are read, whatever the size of the files.
///
/// # Errors
///
/// [`CheckError`] for the first broken file.
pub(crate) fn model(tree: &Path, files: &[FileEntry], whole: bool) -> Result<(), CheckError> {
    let ending = |end: &'static str| {
        let files = files.iter();
        files.filter(move |file| file.path.as_str().ends_with(end))
    };
    let broken = |file: &FileEntry| {
        let path = file.path.clone();
        |reason| CheckError { path, reason }
    };
    let mut headers = 0_u64;
    for file in ending(".safetensors") {
        let length = header_bytes(&tree.join(&file.path)).map_err(broken(file))?;
        headers = headers.saturating_add(length.min(file.size));
        if headers > HEADER_BYTES {
            let reason = "with it the headers of all shards take more than 1 GiB".to_owned();
            return Err(broken(file)(reason));
        }
    }
    let mut tensors: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for file in ending(".safetensors") {
        let names = shard(&tree.join(&file.path)).map_err(broken(file))?;
        tensors.insert(file.path.as_str(), names);
    }
    for file in ending(".safetensors.index.json") {
        if file.size > INDEX_BYTES {
            let size = file.size;
            let reason = format!("an index of {size} bytes is refused: at most 64 MiB are read");
            return Err(broken(file)(reason));
        }
        index(tree, &file.path, &tensors, whole).map_err(broken(file))?;
    }
    Ok(())
}

/// What a shard says of its header's length; 0 if it is too short even for that, which [`shard`] tells.
fn header_bytes(path: &Path) -> Result<u64, String> {
    let mut length = [0; 8];
    let file = File::open(path).map_err(|error| error.to_string())?;
    match file.read_exact_at(&mut length, 0) {
        Ok(()) => Ok(u64::from_le_bytes(length)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        Err(error) => Err(error.to_string()),
    }
}

/// The names of a shard's tensors, if its header is sound and fits the file.
#[allow(unsafe_code, reason = "memmap2's map is unsafe by signature")]
fn shard(path: &Path) -> Result<BTreeSet<String>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    // SAFETY: a sealed blob is never written to again, and the map is gone before this returns.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(|error| error.to_string())?;
    // Source: the safetensors format: 8 bytes of header length, the JSON header, the data; `deserialize`
    // checks the length, the JSON, dtypes and shapes, and that the offsets leave no hole or overlap.
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|error| format!("not valid safetensors: {error}"))?;
    Ok(tensors.names().into_iter().map(str::to_owned).collect())
}

fn index(
    tree: &Path,
    path: &RelPath,
    tensors: &BTreeMap<&str, BTreeSet<String>>,
    whole: bool,
) -> Result<(), String> {
    let bytes = std::fs::read(tree.join(path)).map_err(|error| error.to_string())?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| format!("not a valid shard index: {error}"))?;
    let folder = path
        .as_str()
        .rsplit_once('/')
        .map_or(String::new(), |(folder, _)| format!("{folder}/"));
    for (tensor, shard) in &index.weight_map {
        match tensors.get(format!("{folder}{shard}").as_str()) {
            Some(names) if names.contains(tensor) => {}
            Some(_) => {
                return Err(format!(
                    "it places the tensor `{tensor}` in {shard}, which does not hold it"
                ));
            }
            None if whole => {
                return Err(format!(
                    "it names the shard {shard}, which the model does not hold"
                ));
            }
            None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn shard_bytes(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    fn check(files: &[(&str, Vec<u8>)], whole: bool) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let mut entries = Vec::new();
        for (path, bytes) in files {
            std::fs::write(dir.path().join(path), bytes).unwrap();
            let path = RelPath::new(path).unwrap();
            let size = bytes.len() as u64;
            entries.push(FileEntry {
                path,
                size,
                sha256: Digest::of(bytes),
                git_oid: None,
                xet_hash: None,
                believed: false,
            });
        }
        model(dir.path(), &entries, whole).map_err(|error| error.to_string())
    }

    fn good() -> Vec<u8> {
        shard_bytes(
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            8,
        )
    }

    #[test]
    fn broken_shards_are_found() {
        let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        let hole = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#;
        let mut huge = good();
        huge[..8].copy_from_slice(&(1_u64 << 63).to_le_bytes());
        let mut long = good();
        long.push(0);
        let cases = [
            ("huge header", huge),
            ("too long", long),
            ("too short", good()[..60].to_vec()),
            ("empty", Vec::new()),
            ("overlap", shard_bytes(overlap, 12)),
            ("hole", shard_bytes(hole, 12)),
            ("no JSON", shard_bytes("{", 0)),
            (
                "dtype",
                shard_bytes(
                    r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#,
                    8,
                ),
            ),
            (
                "shape",
                shard_bytes(
                    r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
                    8,
                ),
            ),
        ];
        for (name, bytes) in cases {
            let error = check(&[("model.safetensors", bytes)], true).expect_err(name);
            assert!(
                error.starts_with("model.safetensors is broken"),
                "{name}: {error}"
            );
        }
        assert_eq!(check(&[("model.safetensors", good())], true), Ok(()));
    }

    #[test]
    fn an_index_names_only_what_is_there() {
        let map = |text: &str| format!(r#"{{"weight_map":{text}}}"#).into_bytes();
        let with = |index: Vec<u8>| {
            [
                ("m.safetensors", good()),
                ("m.safetensors.index.json", index),
            ]
        };
        assert_eq!(check(&with(map(r#"{"a":"m.safetensors"}"#)), true), Ok(()));
        let missing = check(&with(map(r#"{"a":"n.safetensors"}"#)), true).unwrap_err();
        assert!(
            missing.contains("n.safetensors, which the model does not hold"),
            "{missing}"
        );
        assert_eq!(check(&with(map(r#"{"a":"n.safetensors"}"#)), false), Ok(()));
        let lacks = check(&with(map(r#"{"b":"m.safetensors"}"#)), false).unwrap_err();
        assert!(lacks.contains("does not hold it"), "{lacks}");
        assert!(check(&with(b"[]".to_vec()), true).is_err());
    }

    #[test]
    fn what_would_fill_the_memory_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let entry = |name: &str, start: &[u8], size: u64| {
            let file = File::create(dir.path().join(name)).unwrap();
            file.write_all_at(start, 0).unwrap();
            file.set_len(size).unwrap();
            FileEntry {
                path: RelPath::new(name).unwrap(),
                size,
                sha256: Digest::of(start),
                git_oid: None,
                xet_hash: None,
                believed: false,
            }
        };
        let index = entry("m.safetensors.index.json", b"{", (64 << 20) + 1);
        let error = model(dir.path(), &[index], true).unwrap_err().to_string();
        assert!(error.contains("at most 64 MiB"), "{error}");

        let header = 90_u64 << 20;
        let shards = (0..12).map(|n| {
            let name = format!("{n}.safetensors");
            entry(&name, &header.to_le_bytes(), header + 8)
        });
        let shards: Vec<_> = shards.collect();
        let error = model(dir.path(), &shards, true).unwrap_err().to_string();
        assert!(error.contains("more than 1 GiB"), "{error}");
    }
}
