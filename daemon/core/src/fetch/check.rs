//! Whether safetensors files are what a loader can read. A model that holds a broken one is never
//! published: better an error now than a crash in a hundred pods.
//!
//! A model may be made to fill the memory. So one is checked at a time, one header of it is held at a
//! time, and both headers and indexes have limits.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use memmap2::MmapMut;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::manifest::FileEntry;
use crate::model::RelPath;
use crate::store::StoreError;

/// What the indexes of a model may have together: 32 MiB. That of one with 100,000 tensors has 10 MiB.
const INDEX_BYTES: u64 = 32 << 20;

/// The longest header of one shard that is read: 32 MiB, which is 250,000 tensors in one file.
///
/// The format allows 100 MB, which take 1 GiB to read.
const HEADER_BYTES: u64 = 32 << 20;

/// The longest reason that is given, in characters: a file may have names of many MiB.
const REASON_CHARS: usize = 500;

/// Held by the one check under way: the limits are those of one, and there may be many fetches.
static TURN: Mutex<()> = Mutex::new(());

/// A safetensors file, or an index of them, that no loader could read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path} is broken: {reason}")]
pub struct CheckError {
    /// The file.
    pub path: RelPath,
    /// What is wrong with it.
    pub reason: String,
}

/// Why a model did not pass.
#[derive(Debug, thiserror::Error)]
pub(super) enum ModelError {
    /// What the origin holds is broken.
    #[error(transparent)]
    Broken(#[from] CheckError),
    /// The disk does not give its files back.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Checks the headers of all safetensors files below `tree`, and the indexes that name them. Waits until
/// no other model is being checked.
///
/// `whole` says that the default patterns chose the files, so that an index must find all its shards.
/// Only the headers are read, whatever the size of the files.
///
/// # Errors
///
/// [`ModelError`] for the first file that is broken or cannot be read.
pub(super) fn model(tree: &Path, files: &[FileEntry], whole: bool) -> Result<(), ModelError> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let ending = |end: &'static str| {
        let files = files.iter();
        files.filter(move |file| file.path.as_str().ends_with(end))
    };
    let mut indexes = Vec::new();
    let mut index_bytes = 0_u64;
    for file in ending(".safetensors.index.json") {
        index_bytes = index_bytes.saturating_add(file.size);
        if index_bytes > INDEX_BYTES {
            let reason = "with it the model's indexes have more than the 32 MiB that are read";
            return Err(broken(&file.path, reason).into());
        }
        indexes.push(Index::read(tree, &file.path)?);
    }
    if whole {
        let present: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
        for index in &indexes {
            index.finds_all(&present)?;
        }
    }
    for file in ending(".safetensors") {
        let tensors = header(tree, &file.path)?;
        for index in &indexes {
            index.agrees(&file.path, &tensors)?;
        }
    }
    Ok(())
}

fn broken(path: &RelPath, reason: impl fmt::Display) -> CheckError {
    CheckError {
        path: path.clone(),
        reason: reason.to_string().chars().take(REASON_CHARS).collect(),
    }
}

/// A file of the model, open.
struct Opened {
    file: File,
    bytes: u64,
    path: PathBuf,
}

impl Opened {
    fn new(path: PathBuf) -> Result<Self, StoreError> {
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        match opened {
            Ok((bytes, file)) => Ok(Self { file, bytes, path }),
            Err(error) => Err(unread(&path, error)),
        }
    }

    /// Reads `length` bytes that begin at `offset`.
    fn read(&self, offset: u64, length: u64) -> Result<MmapMut, StoreError> {
        let length = usize::try_from(length).expect("its limit is far below");
        let read = || {
            // Not a map of the file: a sector that cannot be read would end the process with SIGBUS.
            // A map of memory is given back as a whole, which a large block on the heap may not be.
            let mut bytes = MmapMut::map_anon(length)?;
            self.file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        };
        read().map_err(|error| unread(&self.path, error))
    }
}

fn unread(path: &Path, source: io::Error) -> StoreError {
    StoreError::Io {
        op: "read",
        path: path.to_owned(),
        source,
    }
}

/// The tensors of the shard at `path`, if its header is sound and fits the file.
fn header(tree: &Path, path: &RelPath) -> Result<Metadata, ModelError> {
    let invalid =
        |reason: &dyn fmt::Display| broken(path, format!("not valid safetensors: {reason}"));
    let file = Opened::new(tree.join(path))?;
    // Source: the safetensors format: 8 bytes of header length, the JSON header, the data.
    let Some(rest) = file.bytes.checked_sub(8) else {
        return Err(invalid(&"it has not even a header's length").into());
    };
    let length = file.read(0, 8)?;
    let length = u64::from_le_bytes(length[..].try_into().expect("8 bytes were read"));
    let Some(data) = rest.checked_sub(length) else {
        return Err(invalid(&"its header is longer than the file").into());
    };
    if length > HEADER_BYTES {
        let reason = format!("its header has {length} bytes: at most 32 MiB are read");
        return Err(broken(path, reason).into());
    }
    let bytes = file.read(8, length)?;
    let header: Header = serde_json::from_slice(&bytes).map_err(|error| invalid(&error))?;
    let mut tensors = header.tensors;
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);
    // It checks the shapes, and that the offsets leave no hole or overlap; not where they end.
    let tensors = Metadata::new(None, tensors).map_err(|error| invalid(&error))?;
    if tensors.data_len() as u64 != data {
        return Err(invalid(&"its tensors do not end where the file does").into());
    }
    Ok(tensors)
}

/// The header of a shard. The `safetensors` crate reads it by way of a tree of JSON values, which takes
/// twelve times its size.
struct Header {
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<Option<BTreeMap<Text, Text>>>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(Header { tensors })
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// A string that is passed over. All are equal, so a map of them holds but one.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Text;

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl Visitor<'_> for Any {
            type Value = Text;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string")
            }

            fn visit_str<E>(self, _: &str) -> Result<Text, E> {
                Ok(Text)
            }
        }

        deserializer.deserialize_str(Any)
    }
}

/// What `model.safetensors.index.json` says.
struct Index<'a> {
    path: &'a RelPath,
    weight_map: WeightMap,
}

impl<'a> Index<'a> {
    fn read(tree: &Path, path: &'a RelPath) -> Result<Self, ModelError> {
        #[derive(Deserialize)]
        struct Document {
            weight_map: WeightMap,
        }
        let file = Opened::new(tree.join(path))?;
        let bytes = file.read(0, file.bytes.min(INDEX_BYTES))?;
        let document: Document = serde_json::from_slice(&bytes)
            .map_err(|error| broken(path, format!("not a valid shard index: {error}")))?;
        let weight_map = document.weight_map;
        Ok(Self { path, weight_map })
    }

    /// With its slash.
    fn folder(&self) -> &'a str {
        let path = self.path.as_str();
        path.rfind('/').map_or("", |slash| &path[..=slash])
    }

    /// Whether all shards that it names are among the `present` ones.
    fn finds_all(&self, present: &BTreeSet<&str>) -> Result<(), CheckError> {
        for shard in self.weight_map.shards() {
            if !present.contains(format!("{}{shard}", self.folder()).as_str()) {
                let reason = format!("it names the shard {shard}, which the model does not hold");
                return Err(broken(self.path, reason));
            }
        }
        Ok(())
    }

    /// Whether the shard at `path` holds the `tensors` that the index places there.
    fn agrees(&self, path: &RelPath, tensors: &Metadata) -> Result<(), CheckError> {
        let Some(shard) = path.as_str().strip_prefix(self.folder()) else {
            return Ok(());
        };
        let mut placed = self.weight_map.tensors(shard);
        match placed.find(|tensor| tensors.info(tensor).is_none()) {
            None => Ok(()),
            Some(tensor) => Err(broken(
                self.path,
                format!("it places the tensor `{tensor}` in {shard}, which does not hold it"),
            )),
        }
    }
}

/// Which tensor is in which shard. In one piece: as strings of their own the names in an index of 32 MiB
/// would take ten times that.
#[derive(Default)]
struct WeightMap {
    text: String,
    /// Sorted by shard.
    entries: Vec<Placement>,
}

/// A tensor's name in the text, and the shard's that follows it.
struct Placement {
    tensor: u32,
    shard: u32,
    end: u32,
}

impl WeightMap {
    fn part(&self, from: u32, to: u32) -> &str {
        &self.text[from as usize..to as usize]
    }

    fn shard(&self, entry: &Placement) -> &str {
        self.part(entry.shard, entry.end)
    }

    /// Each shard that is named.
    fn shards(&self) -> impl Iterator<Item = &str> {
        let same = |one: &Placement, other: &Placement| self.shard(one) == self.shard(other);
        self.entries
            .chunk_by(same)
            .map(|chunk| self.shard(&chunk[0]))
    }

    /// The tensors that it places in `shard`.
    fn tensors<'a>(&'a self, shard: &str) -> impl Iterator<Item = &'a str> {
        let order = |entry: &Placement| self.shard(entry).cmp(shard);
        let start = self
            .entries
            .partition_point(|entry| order(entry) == Ordering::Less);
        let rest = &self.entries[start..];
        let count = rest.partition_point(|entry| order(entry) == Ordering::Equal);
        rest[..count]
            .iter()
            .map(|entry| self.part(entry.tensor, entry.shard))
    }

    fn push<E: serde::de::Error>(&mut self, text: &str) -> Result<u32, E> {
        self.text.push_str(text);
        u32::try_from(self.text.len()).map_err(|_| E::custom("it is too long"))
    }
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map of tensors to shards")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut all = WeightMap::default();
                let mut tensor = 0;
                while let Some((name, file)) = map.next_entry::<String, String>()? {
                    let shard = all.push(&name)?;
                    let end = all.push(&file)?;
                    all.entries.push(Placement { tensor, shard, end });
                    tensor = end;
                }
                let WeightMap { text, entries } = &mut all;
                let shard = |entry: &Placement| &text[entry.shard as usize..entry.end as usize];
                entries.sort_unstable_by(|one, other| shard(one).cmp(shard(other)));
                Ok(all)
            }
        }

        deserializer.deserialize_map(Entries)
    }
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
        let map = br#"{"weight_map":{}}"#;
        let small = entry("a.safetensors.index.json", map, map.len() as u64);
        let index = entry("m.safetensors.index.json", b"{", 32 << 20);
        let error = model(dir.path(), &[small, index], true).unwrap_err();
        assert!(
            error.to_string().contains("the 32 MiB that are read"),
            "{error}"
        );

        let header = (32_u64 << 20) + 1;
        let shard = entry("m.safetensors", &header.to_le_bytes(), header + 8);
        let error = model(dir.path(), &[shard], true).unwrap_err();
        assert!(error.to_string().contains("at most 32 MiB"), "{error}");

        let name = "n".repeat(1 << 20);
        let map = format!(r#"{{"weight_map":{{"{name}":"m.safetensors"}}}}"#);
        let files = [
            ("m.safetensors", good()),
            ("m.safetensors.index.json", map.into_bytes()),
        ];
        let error = check(&files, true).unwrap_err();
        assert!(error.len() < 1000, "a reason of {} bytes", error.len());
    }

    #[test]
    fn what_the_disk_does_not_give_is_not_taken_for_broken() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["m.safetensors", "m.safetensors.index.json"] {
            // It opens, but a read of it fails, as one of a bad sector does.
            std::fs::create_dir(dir.path().join(name)).unwrap();
            let entry = FileEntry {
                path: RelPath::new(name).unwrap(),
                size: 64,
                sha256: Digest::of(b""),
                git_oid: None,
                xet_hash: None,
                believed: false,
            };

            let error = model(dir.path(), &[entry], true).expect_err("it was read");

            let io = matches!(error, ModelError::Store(StoreError::Io { .. }));
            assert!(io, "{name}: {error}");
        }
    }

    #[test]
    fn one_model_is_checked_at_a_time() {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let other = std::thread::spawn(|| check(&[("m.safetensors", good())], true));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!other.is_finished(), "it did not wait for its turn");
        drop(turn);
        assert_eq!(other.join().unwrap(), Ok(()));
    }

    #[test]
    fn metadata_is_a_map_of_strings_or_nothing() {
        let with = |metadata: &str| {
            let tensor = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
            let header = format!(r#"{{"__metadata__":{metadata},{tensor}}}"#);
            check(&[("m.safetensors", shard_bytes(&header, 8))], true)
        };
        for sound in [r#"{"format":"pt","by":"\u00e9"}"#, "{}", "null"] {
            assert_eq!(with(sound), Ok(()), "{sound}");
        }
        for broken in [r#"{"format":1}"#, r#"{"format":{}}"#, "[]", "1"] {
            with(broken).expect_err(broken);
        }
    }

    #[test]
    fn indexes_in_folders_find_their_own_shards() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, bytes: Vec<u8>| {
            let at = dir.path().join(path);
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::fs::write(at, &bytes).unwrap();
            FileEntry {
                path: RelPath::new(path).unwrap(),
                size: bytes.len() as u64,
                sha256: Digest::of(&bytes),
                git_oid: None,
                xet_hash: None,
                believed: false,
            }
        };
        let map = |map: &str| format!(r#"{{"metadata":{{"n":[1]}},"weight_map":{map}}}"#);
        let files = |nested: &str| {
            [
                put("1.safetensors", good()),
                put("unet/1.safetensors", good()),
                put("unet/2.safetensors", shard_bytes("{}", 0)),
                put(
                    "1.safetensors.index.json",
                    map(r#"{"a":"1.safetensors"}"#).into(),
                ),
                put("unet/1.safetensors.index.json", map(nested).into()),
            ]
        };
        model(dir.path(), &files(r#"{"a":"1.safetensors"}"#), true).unwrap();
        let wrong = files(r#"{"a":"1.safetensors","b":"2.safetensors","a":"2.safetensors"}"#);
        let error = model(dir.path(), &wrong, true).expect_err("2 holds nothing");
        assert!(
            error
                .to_string()
                .starts_with("unet/1.safetensors.index.json"),
            "{error}"
        );
    }
}
