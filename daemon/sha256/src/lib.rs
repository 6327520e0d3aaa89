//! SHA-256 of files, two of them side by side.
//!
//! Each step of SHA-256 waits for the one before, so one file leaves a core's SHA unit idle for half of the time. Two files at
//! once fill it: on an EPYC of the third generation 2.6 GB/s instead of 1.55; four were no faster. `sha2`, which all else here
//! rests on, takes one at a time, and so do `ring` and `aws-lc-rs`; libraries for several take whole messages only. Linux does
//! the same for dm-verity and fs-verity (`sha256_finup_2x`).
//!
//! Only the innermost loop is our own, for x86-64 with SHA extensions (`x86.rs`). Elsewhere two files are hashed one after the
//! other.

use sha2::block_api::compress256;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Bytes of a block, the unit that SHA-256 works in.
const BLOCK: usize = 64;

/// Bytes of a block in which the last one ends that has room for the length.
const LENGTH_AT: usize = BLOCK - 8;

/// The hash of no bytes yet: FIPS 180-4, section 5.3.3.
const START: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// Whether two files side by side take less time than one after the other.
#[must_use]
pub fn two_are_faster() -> bool {
    #[cfg(target_arch = "x86_64")]
    return x86::is_here();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// The hash of a file's bytes so far.
#[derive(Debug, Clone)]
pub struct Sha256 {
    state: [u32; 8],
    /// Bytes of the file so far.
    length: u64,
    /// The last of them, which do not fill a block yet.
    rest: [u8; BLOCK],
}

impl Default for Sha256 {
    fn default() -> Self {
        Self {
            state: START,
            length: 0,
            rest: [0; BLOCK],
        }
    }
}

impl Sha256 {
    /// Takes the next bytes of the file.
    pub fn update(&mut self, bytes: &[u8]) {
        let bytes = self.fill(bytes);
        let (blocks, rest) = bytes.as_chunks();
        compress256(&mut self.state, blocks);
        self.keep(blocks.len(), rest);
    }

    /// Takes the next bytes of two files.
    pub fn update_two(files: [&mut Self; 2], bytes: [&[u8]; 2]) {
        let [one, other] = files;
        let [bytes, other_bytes] = [one.fill(bytes[0]), other.fill(bytes[1])];
        let both = bytes.len().min(other_bytes.len()) / BLOCK;
        let blocks = [bytes, other_bytes].map(|bytes| &bytes.as_chunks().0[..both]);
        compress_two([&mut one.state, &mut other.state], blocks);
        for (hash, bytes) in [(one, bytes), (other, other_bytes)] {
            hash.length += (both * BLOCK) as u64;
            hash.update(&bytes[both * BLOCK..]);
        }
    }

    /// The hash of all bytes.
    #[must_use]
    pub fn finish(mut self) -> [u8; 32] {
        let bits = self.length.wrapping_mul(8);
        let used = self.used();
        let mut last = [[0; BLOCK]; 2];
        last[0][..used].copy_from_slice(&self.rest[..used]);
        last[0][used] = 0x80;
        // Where no room is left for the length, it has a block of its own.
        let blocks = if used < LENGTH_AT { 1 } else { 2 };
        last[blocks - 1][LENGTH_AT..].copy_from_slice(&bits.to_be_bytes());
        compress256(&mut self.state, &last[..blocks]);
        let mut hash = [0; 32];
        for (bytes, word) in hash.chunks_exact_mut(4).zip(self.state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        hash
    }

    /// Bytes that wait for others to fill a block with.
    fn used(&self) -> usize {
        (self.length % BLOCK as u64) as usize
    }

    /// Fills the block that was begun, and returns what goes on after it: if that block is not full, no bytes at all.
    fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let used = self.used();
        if used == 0 {
            return bytes;
        }
        let (fit, after) = bytes.split_at(bytes.len().min(BLOCK - used));
        self.rest[used..][..fit.len()].copy_from_slice(fit);
        self.length += fit.len() as u64;
        if self.used() == 0 {
            compress256(&mut self.state, &[self.rest]);
        }
        after
    }

    /// Counts so many blocks that were hashed, and keeps the bytes after them.
    fn keep(&mut self, blocks: usize, rest: &[u8]) {
        self.length += (blocks * BLOCK) as u64;
        let used = self.used();
        self.rest[used..][..rest.len()].copy_from_slice(rest);
        self.length += rest.len() as u64;
    }
}

/// Hashes as many blocks of one file as of the other.
fn compress_two(states: [&mut [u32; 8]; 2], blocks: [&[[u8; BLOCK]]; 2]) {
    #[cfg(target_arch = "x86_64")]
    if x86::is_here() {
        return x86::compress_two(states, blocks);
    }
    for (state, blocks) in states.into_iter().zip(blocks) {
        compress256(state, blocks);
    }
}

#[cfg(test)]
mod tests {
    use sha2::Digest;

    use super::*;

    fn sha2(bytes: &[u8]) -> [u8; 32] {
        sha2::Sha256::digest(bytes).into()
    }

    fn random(length: usize) -> Vec<u8> {
        std::iter::repeat_with(|| fastrand::u8(..))
            .take(length)
            .collect()
    }

    /// Pieces of random length, some of them empty.
    fn pieces(mut bytes: &[u8], longest: usize) -> Vec<&[u8]> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let (piece, after) = bytes.split_at(fastrand::usize(..=bytes.len().min(longest)));
            pieces.push(piece);
            bytes = after;
        }
        pieces
    }

    #[test]
    fn the_hash_is_that_of_every_other_implementation() {
        for length in 0..4 * BLOCK + 2 {
            let bytes = random(length);
            let mut hash = Sha256::default();
            pieces(&bytes, 100)
                .into_iter()
                .for_each(|piece| hash.update(piece));
            assert_eq!(hash.finish(), sha2(&bytes), "of {length} bytes");
        }
    }

    #[test]
    fn two_side_by_side_have_the_hashes_that_each_has_alone() {
        for _ in 0..500 {
            let files = [(); 2].map(|()| random(fastrand::usize(..3_000)));
            let mut left = files.each_ref().map(|file| pieces(file, 700).into_iter());
            let mut hashes = [Sha256::default(), Sha256::default()];
            while left.iter().any(|pieces| pieces.len() > 0) {
                let next = left
                    .each_mut()
                    .map(|pieces| pieces.next().unwrap_or_default());
                Sha256::update_two(hashes.each_mut(), next);
            }
            assert_eq!(hashes.map(Sha256::finish), files.map(|file| sha2(&file)));
        }
    }

    /// FIPS 180-4's own example of a million letters, and of none.
    #[test]
    fn published_hashes() {
        let mut letters = Sha256::default();
        let mut none = Sha256::default();
        let bytes: [&[u8]; 2] = [&[b'a'; 1_000_000], &[]];
        Sha256::update_two([&mut letters, &mut none], bytes);
        let hex = |hash: Sha256| hash.finish().map(|byte| format!("{byte:02x}")).concat();
        assert_eq!(
            hex(letters),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
        );
        assert_eq!(
            hex(none),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
