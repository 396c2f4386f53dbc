//! Telling models and datasets apart.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use rlhf_core::{Error as CoreError, Parameters, Preference};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::Result;

/// A hash of what a model or a dataset consists of: 128 bits against accidents, not against people.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(u128);

impl Fingerprint {
    /// Of every weight that a model shows: names, shapes, kinds and bytes.
    ///
    /// # Errors
    /// [`Empty`](CoreError::Empty) for a model that shows none, such as one that is frozen: use
    /// [`of_files`](Self::of_files), or take it before freezing. libtorch's.
    pub fn of_weights(model: &(impl Parameters + ?Sized)) -> Result<Self> {
        let weights = model.named_parameters();
        if weights.is_empty() {
            return Err(CoreError::Empty {
                what: "the list of the model's weights",
                help: "a frozen model shows none; take the fingerprint before, or of its files",
            }
            .into());
        }
        let mut hash = Hasher::new();
        for (name, weight) in weights {
            let shape = format!("{name} {:?} {:?}", weight.kind(), weight.size());
            hash.part(shape.as_bytes());
            let host = weight
                .detach()
                .f_to_device(Device::Cpu)
                .and_then(|w| w.f_contiguous())
                .map_err(CoreError::from)?;
            let mut bytes = vec![0; host.numel() * host.kind().elt_size_in_bytes()];
            host.f_copy_data_u8(&mut bytes, host.numel())
                .map_err(CoreError::from)?;
            hash.part(&bytes);
        }
        Ok(hash.finish())
    }

    /// Of files, in the order given: those of a checkpoint folder, say.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn of_files(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self> {
        let mut hash = Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        for path in paths {
            let path = path.as_ref();
            let mut file = File::open(path).map_err(CoreError::io("reading", path))?;
            let mut whole = 0;
            loop {
                let read = file
                    .read(&mut buffer)
                    .map_err(CoreError::io("reading", path))?;
                if read == 0 {
                    break;
                }
                hash.bytes(&buffer[..read]);
                whole += read as u64;
            }
            hash.word(whole);
        }
        Ok(hash.finish())
    }

    /// Of the token ids of comparisons, in their order. Weights and margins do not count.
    pub fn of_pairs(pairs: &[Preference]) -> Self {
        let mut hash = Hasher::new();
        for pair in pairs {
            for ids in [&*pair.prompt, &pair.chosen, &pair.rejected] {
                hash.word(ids.len() as u64);
                ids.iter().for_each(|id| hash.word(*id as u64));
            }
        }
        hash.finish()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = u128::from_str_radix(&text, 16).map_err(serde::de::Error::custom)?;
        Ok(Self(number))
    }
}

/// FNV-1a with 128 bits over words of eight bytes.
struct Hasher {
    state: u128,
    /// Bytes that wait for their word to be full.
    rest: Vec<u8>,
}

impl Hasher {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;

    fn new() -> Self {
        Self {
            state: 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d,
            rest: Vec::with_capacity(8),
        }
    }

    fn word(&mut self, word: u64) {
        let mixed = (self.state ^ u128::from(word)).wrapping_mul(Self::PRIME);
        // High bits reach the low ones, which the product alone never lets them do.
        self.state = mixed ^ (mixed >> 67);
    }

    fn bytes(&mut self, mut bytes: &[u8]) {
        if !self.rest.is_empty() {
            let taken = bytes.len().min(8 - self.rest.len());
            self.rest.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.rest.len() < 8 {
                return;
            }
            self.flush();
        }
        let words = bytes.chunks_exact(8);
        self.rest.extend_from_slice(words.remainder());
        for word in words {
            let mut eight = [0; 8];
            eight.copy_from_slice(word);
            self.word(u64::from_le_bytes(eight));
        }
    }

    fn flush(&mut self) {
        if !self.rest.is_empty() {
            let mut eight = [0; 8];
            eight[..self.rest.len()].copy_from_slice(&self.rest);
            self.rest.clear();
            self.word(u64::from_le_bytes(eight));
        }
    }

    /// Bytes with an end.
    fn part(&mut self, bytes: &[u8]) {
        self.bytes(bytes);
        self.flush();
        self.word(bytes.len() as u64);
    }

    fn finish(mut self) -> Fingerprint {
        self.flush();
        Fingerprint(self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(parts: &[&[u8]]) -> Fingerprint {
        let mut hash = Hasher::new();
        parts.iter().for_each(|bytes| hash.bytes(bytes));
        hash.finish()
    }

    #[test]
    fn how_bytes_arrive_does_not_matter_and_every_byte_does() {
        let bytes: Vec<u8> = (0..100).collect();
        let whole = of(&[&bytes]);
        assert_eq!(
            whole,
            of(&[&bytes[..3], &bytes[3..4], &bytes[4..50], &bytes[50..]])
        );
        for i in 0..bytes.len() {
            let mut other = bytes.clone();
            other[i] ^= 0x80;
            assert_ne!(whole, of(&[&other]), "byte {i}");
        }
    }

    #[test]
    fn where_an_answer_ends_matters() {
        let a = Preference::new([1], [2, 3], [4]);
        let b = Preference::new([1], [2], [3, 4]);
        let print = |p: &Preference| Fingerprint::of_pairs(std::slice::from_ref(p));
        assert_ne!(print(&a), print(&b));
        assert_eq!(print(&a), print(&a.clone()));
    }
}
