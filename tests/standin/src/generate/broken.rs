//! Shards and indexes that a loader must refuse.

use bytes::Bytes;
use serde_json::{Value, json};

use super::model;
use super::shard::{entry, head};

/// A shard with two F32 tensors of four elements at these offsets, and `length` bytes of data.
fn two_tensors(first: (u64, u64), second: (u64, u64), length: usize) -> Bytes {
    let mut shard = head(&json!({
        "a.weight": entry("F32", &[4], first.0, first.1),
        "b.weight": entry("F32", &[4], second.0, second.1),
    }));
    shard.resize(shard.len() + length, 0x5a);
    shard.into()
}

/// A shard whose header claims to be so long, 2^63 for one, with next to nothing after it.
pub fn header_of_length(length: u64) -> Bytes {
    let mut shard = length.to_le_bytes().to_vec();
    shard.extend_from_slice(b"{}");
    shard.into()
}

/// A shard with two tensors that share bytes.
pub fn overlapping() -> Bytes {
    two_tensors((0, 16), (8, 24), 24)
}

/// A shard with bytes between its tensors that belong to none.
pub fn with_hole() -> Bytes {
    two_tensors((0, 16), (24, 40), 40)
}

/// A shard that ends before its last tensor does.
pub fn truncated() -> Bytes {
    two_tensors((0, 16), (16, 32), 24)
}

/// A model of two shards without the second one.
pub fn index_naming_absent_shard(seed: u64) -> Vec<(String, Bytes)> {
    let mut files = model(seed, 2, 20_000);
    files.retain(|(path, _)| path != "model-00002-of-00002.safetensors");
    files
}

/// A model of two shards whose index names a tensor, `absent.weight`, that is in neither.
pub fn index_naming_absent_tensor(seed: u64) -> Vec<(String, Bytes)> {
    let mut files = model(seed, 2, 20_000);
    for (path, bytes) in &mut files {
        if path.ends_with(".index.json") {
            let mut index: Value = serde_json::from_slice(bytes).expect("the index is JSON");
            index["weight_map"]["absent.weight"] = json!("model-00002-of-00002.safetensors");
            *bytes = format!("{index:#}\n").into();
        }
    }
    files
}
