//! Random numbers that depend on a seed, a purpose and an index, and on nothing else.

use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

pub use rand_chacha::ChaCha8Rng;

/// Independent streams of random numbers, all derived from one seed.
///
/// A stream is named by what it is for and by an index (the row of a batch, the number of an
/// epoch). Asking for the same stream again gives the same numbers, on every platform and in
/// every version of this crate, so a run that is resumed needs no generator state: the seed and
/// the counters it already keeps are enough. Neither the order in which streams are asked for nor
/// how many numbers another stream gave away changes anything, which is why a sample does not
/// depend on its neighbours in a batch.
///
/// ```
/// use rlhf_core::rng::RngStreams;
/// use rand::Rng;
///
/// let streams = RngStreams::new(17);
/// let first: f64 = streams.stream("generate", 3).random();
/// let again: f64 = streams.stream("generate", 3).random();
/// assert_eq!(first, again);
/// let other: f64 = streams.stream("shuffle", 3).random();
/// assert_ne!(first, other);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngStreams {
    seed: u64,
}

impl RngStreams {
    /// The streams of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The stream called `name` with number `index`, from its beginning.
    pub fn stream(&self, name: &str, index: u64) -> ChaCha8Rng {
        // ChaCha's key has room for all three, so distinct streams have distinct keys.
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..24].copy_from_slice(&fnv1a(name.as_bytes()).to_le_bytes());
        key[24..].copy_from_slice(&index.to_le_bytes());
        ChaCha8Rng::from_seed(key)
    }
}

/// FNV-1a with 128 bits: a hash that is the same everywhere, unlike the standard library's.
fn fnv1a(bytes: &[u8]) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(OFFSET, |hash, &byte| {
        (hash ^ u128::from(byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn the_numbers_never_change() {
        // Also computed by hand from the cipher's definition. Another value here breaks the resumption of every run in progress.
        let mut rng = RngStreams::new(42).stream("generate", 7);
        let first: [u64; 2] = [rng.random(), rng.random()];
        assert_eq!(
            first,
            [11_359_176_702_841_149_358, 17_553_661_721_358_104_949]
        );
    }

    #[test]
    fn the_hash_is_fnv1a() {
        // From the reference vectors of the algorithm's authors.
        assert_eq!(fnv1a(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn seed_name_and_index_each_make_another_stream() {
        let first = |seed, name, index| RngStreams::new(seed).stream(name, index).random::<u64>();
        let base = first(1, "a", 1);
        assert_eq!(base, first(1, "a", 1));
        for other in [first(2, "a", 1), first(1, "b", 1), first(1, "a", 2)] {
            assert_ne!(base, other);
        }
    }
}
