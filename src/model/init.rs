//! Initial weights from a counter-based generator: the value of an element depends on the seed, the parameter's name
//! and the element's index alone, so it is the same on every machine and for every cut.

use super::{Init, Parameter};

/// Philox4x32-10 (Salmon et al. 2011): four random words for a 128-bit counter and a 64-bit key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xD251_1F53u64 * counter[0] as u64;
        let b = 0xCD9E_8D57u64 * counter[2] as u64;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// FNV-1a, 64 bits: a stream number for a parameter's name.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3))
}

/// Uniform in (0, 1): the logarithm of it is finite.
fn unit(word: u32) -> f64 {
    (word as f64 + 0.5) / 4_294_967_296.0
}

/// Two independent uniform numbers for element pair `pair` of stream `name`.
fn units(seed: u64, name: u64, pair: u64) -> [f64; 2] {
    let counter = [pair as u32, (pair >> 32) as u32, name as u32, (name >> 32) as u32];
    let words = philox(counter, [seed as u32, (seed >> 32) as u32]);
    [unit(words[0]), unit(words[1])]
}

/// Two independent standard normals (Box and Muller) for an element pair.
fn normals(seed: u64, name: u64, pair: u64) -> [f64; 2] {
    let [first, second] = units(seed, name, pair);
    let radius = (-2.0 * first.ln()).sqrt();
    let angle = std::f64::consts::TAU * second;
    [radius * angle.cos(), radius * angle.sin()]
}

/// The initial value of a parameter.
pub fn initial(parameter: &Parameter, seed: u64) -> Vec<f32> {
    let n = parameter.len();
    match parameter.init {
        Init::Zeros => vec![0.0; n],
        Init::Ones => vec![1.0; n],
        Init::Uniform(bound) => {
            let name = name_hash(&parameter.name);
            let pairs = (0..n.div_ceil(2) as u64).flat_map(|pair| units(seed, name, pair));
            pairs.take(n).map(|u| (bound * (2.0 * u - 1.0)) as f32).collect()
        }
        Init::Normal(std) => {
            let name = name_hash(parameter.tied_to.as_ref().unwrap_or(&parameter.name));
            let pairs = (0..n.div_ceil(2) as u64).flat_map(|pair| normals(seed, name, pair));
            pairs.take(n).map(|z| (std * z) as f32).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::philox;

    #[test]
    fn philox_gives_the_published_known_answers() {
        // Random123's kat_vectors for philox4x32-10.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    }
}
