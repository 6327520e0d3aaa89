//! The innermost loop for x86-64 with SHA extensions.
//!
//! Source: FIPS 180-4, section 6.2.2; Intel's and AMD's manuals for `SHA256RNDS2`, `SHA256MSG1` and `SHA256MSG2`.

use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_set_epi64x,
    _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8,
    _mm_shuffle_epi32, _mm_storeu_si128,
};

use super::BLOCK;

/// The constants of the 64 rounds: FIPS 180-4, section 4.2.2.
#[rustfmt::skip]
const ROUNDS: [[[u32; 4]; 4]; 4] = [
    [[0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5], [0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5],
     [0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3], [0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174]],
    [[0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc], [0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da],
     [0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7], [0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967]],
    [[0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13], [0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85],
     [0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3], [0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070]],
    [[0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5], [0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3],
     [0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208], [0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2]],
];

/// Whether this processor has what [`compress_two`] asks for.
pub(super) fn is_here() -> bool {
    is_x86_feature_detected!("sha") && is_x86_feature_detected!("sse4.1")
}

/// Hashes as many blocks of one file as of the other.
///
/// # Panics
///
/// If the processor has no SHA extensions.
#[allow(unsafe_code, reason = "instructions that not every processor has")]
pub(super) fn compress_two(states: [&mut [u32; 8]; 2], blocks: [&[[u8; BLOCK]]; 2]) {
    assert!(is_here(), "SHA extensions");
    // SAFETY: the processor has them.
    unsafe { compress(states, blocks) }
}

/// The eight words of a file's hash, in the order in which the instructions want them.
#[derive(Clone, Copy)]
struct State {
    abef: __m128i,
    cdgh: __m128i,
}

#[target_feature(enable = "sha,sse4.1")]
fn compress(states: [&mut [u32; 8]; 2], blocks: [&[[u8; BLOCK]]; 2]) {
    let mut hashes = [load_state(states[0]), load_state(states[1])];
    for (one, other) in blocks[0].iter().zip(blocks[1]) {
        let before = hashes;
        let mut words = [load_block(one), load_block(other)];
        // What is done for the two is alternated: neither waits for the other.
        for (four, constants) in ROUNDS[0].iter().enumerate() {
            let constants = load(constants);
            for (hash, words) in hashes.iter_mut().zip(&words) {
                rounds(hash, words[four], constants);
            }
        }
        for sixteen in &ROUNDS[1..] {
            for (four, constants) in sixteen.iter().enumerate() {
                let constants = load(constants);
                for (hash, words) in hashes.iter_mut().zip(&mut words) {
                    schedule(words, four);
                    rounds(hash, words[four], constants);
                }
            }
        }
        for (hash, before) in hashes.iter_mut().zip(before) {
            hash.abef = _mm_add_epi32(hash.abef, before.abef);
            hash.cdgh = _mm_add_epi32(hash.cdgh, before.cdgh);
        }
    }
    for (state, hash) in states.into_iter().zip(hashes) {
        store_state(state, hash);
    }
}

/// Four rounds.
#[inline]
#[target_feature(enable = "sha")]
fn rounds(hash: &mut State, words: __m128i, constants: __m128i) {
    let sum = _mm_add_epi32(words, constants);
    hash.cdgh = _mm_sha256rnds2_epu32(hash.cdgh, hash.abef, sum);
    hash.abef = _mm_sha256rnds2_epu32(hash.abef, hash.cdgh, _mm_shuffle_epi32(sum, 0x0e));
}

/// Replaces the four words that were used sixteen rounds ago by those of the next four rounds.
#[inline]
#[target_feature(enable = "sha,ssse3")]
fn schedule(words: &mut [__m128i; 4], four: usize) {
    let [now, next, after, last] = std::array::from_fn(|ahead| words[(four + ahead) % 4]);
    let sum = _mm_add_epi32(
        _mm_sha256msg1_epu32(now, next),
        _mm_alignr_epi8(last, after, 4),
    );
    words[four] = _mm_sha256msg2_epu32(sum, last);
}

#[inline]
#[target_feature(enable = "ssse3")]
fn load_block(block: &[u8; BLOCK]) -> [__m128i; 4] {
    // The words of a block have their first byte first.
    let first_last = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
    let (words, _) = block.as_chunks::<16>();
    std::array::from_fn(|four| _mm_shuffle_epi8(load(&words[four]), first_last))
}

#[inline]
#[target_feature(enable = "sse4.1")]
fn load_state(state: &[u32; 8]) -> State {
    let (words, _) = state.as_chunks::<4>();
    let cdab = _mm_shuffle_epi32(load(&words[0]), 0xb1);
    let efgh = _mm_shuffle_epi32(load(&words[1]), 0x1b);
    State {
        abef: _mm_alignr_epi8(cdab, efgh, 8),
        cdgh: _mm_blend_epi16(efgh, cdab, 0xf0),
    }
}

#[inline]
#[target_feature(enable = "sse4.1")]
fn store_state(state: &mut [u32; 8], hash: State) {
    let feba = _mm_shuffle_epi32(hash.abef, 0x1b);
    let dchg = _mm_shuffle_epi32(hash.cdgh, 0xb1);
    let (words, _) = state.as_chunks_mut::<4>();
    store(&mut words[0], _mm_blend_epi16(feba, dchg, 0xf0));
    store(&mut words[1], _mm_alignr_epi8(dchg, feba, 8));
}

#[inline]
#[target_feature(enable = "sse2")]
#[allow(
    unsafe_code,
    reason = "arrays and vectors are not the same to the compiler"
)]
fn load<T: Copy, const N: usize>(array: &[T; N]) -> __m128i {
    const { assert!(size_of::<[T; N]>() == size_of::<__m128i>()) };
    // SAFETY: so many bytes are there to read; they need not be aligned, and any bytes make a vector.
    unsafe { _mm_loadu_si128(array.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
#[allow(
    unsafe_code,
    reason = "arrays and vectors are not the same to the compiler"
)]
fn store(words: &mut [u32; 4], vector: __m128i) {
    // SAFETY: there is room for so many bytes, which need not be aligned; any bytes make words.
    unsafe { _mm_storeu_si128(words.as_mut_ptr().cast(), vector) }
}
