//! SHA-256 of bytes in memory: what the hash alone allows.

use std::hint::black_box;
use std::time::Instant;

use serde_json::{Value, json};
use sha2::Digest;
use weightd_sha256::Sha256;

/// Of one call, as a part that has arrived is hashed: fits the second-level cache.
const BLOCK_BYTES: usize = 256 << 10;

/// Hashes one block so many times over.
type Hash = fn(&[u8], u64) -> Vec<u8>;

const IMPLEMENTATIONS: [(&str, Hash); 4] = [
    ("sha2", sha2),
    ("ring", ring),
    ("aws-lc-rs", aws_lc_rs),
    ("weightd, two files", two_files),
];

fn sha2(block: &[u8], times: u64) -> Vec<u8> {
    let mut hasher = sha2::Sha256::new();
    (0..times).for_each(|_| hasher.update(black_box(block)));
    hasher.finalize().to_vec()
}

fn ring(block: &[u8], times: u64) -> Vec<u8> {
    let mut hasher = ring::digest::Context::new(&ring::digest::SHA256);
    (0..times).for_each(|_| hasher.update(black_box(block)));
    hasher.finish().as_ref().to_vec()
}

fn aws_lc_rs(block: &[u8], times: u64) -> Vec<u8> {
    let mut hasher = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    (0..times).for_each(|_| hasher.update(black_box(block)));
    hasher.finish().as_ref().to_vec()
}

/// Half as often for each of two files.
fn two_files(block: &[u8], times: u64) -> Vec<u8> {
    let mut hashes = [Sha256::default(), Sha256::default()];
    (0..times / 2).for_each(|_| Sha256::update_two(hashes.each_mut(), black_box([block; 2])));
    black_box(hashes.map(Sha256::finish))[0].to_vec()
}

/// GB/s of each implementation.
pub(crate) fn measure(bytes: u64) -> Value {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let rates = IMPLEMENTATIONS.map(|(name, hash)| {
        let rates =
            json!({ "one_core": rate(hash, bytes, 1), "all_cores": rate(hash, bytes, cores) });
        (name.to_owned(), rates)
    });
    json!({
        "cores": cores,
        "gigabytes_per_second": serde_json::Map::from_iter(rates),
    })
}

fn rate(hash: Hash, bytes: u64, threads: usize) -> f64 {
    let times = bytes.div_ceil(BLOCK_BYTES as u64);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..threads {
            scope.spawn(move || black_box(hash(&vec![number as u8; BLOCK_BYTES], times)));
        }
    });
    let hashed = times * BLOCK_BYTES as u64 * threads as u64;
    hashed as f64 / 1e9 / begun.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_hash_the_same_bytes() {
        for (name, hash) in IMPLEMENTATIONS {
            // Two files have half of them each.
            let times = if name.ends_with("two files") { 6 } else { 3 };
            let expected = sha2::Sha256::digest(b"weights".repeat(3)).to_vec();
            assert_eq!(hash(b"weights", times), expected, "{name}");
        }
    }
}
