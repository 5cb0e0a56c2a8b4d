//! bf16 on the host: two elements in a word, element 2i in the low half, as kernels read them. Rounding
//! is to the nearest, ties to even.

use half::bf16;

/// The bf16 next to a number, as bits.
pub fn round(value: f32) -> u16 {
    bf16::from_f32(value).to_bits()
}

/// The number that these bits are.
pub fn widen(half: u16) -> f32 {
    bf16::from_bits(half).to_f32()
}

/// The words of these elements; the last one's high half is 0 for an odd number of them.
pub fn words(halves: &[u16]) -> Vec<u32> {
    let word = |pair: &[u16]| pair[0] as u32 | (pair.get(1).copied().unwrap_or(0) as u32) << 16;
    halves.chunks(2).map(word).collect()
}

/// The elements of these words.
pub fn halves(words: &[u32]) -> Vec<u16> {
    words.iter().flat_map(|&word| [word as u16, (word >> 16) as u16]).collect()
}
