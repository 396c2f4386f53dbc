//! Which tokens a sampling filter left to draw from.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::{Error, Result, SequenceBatch};

/// The tokens that could be drawn at one step, in whichever form is the smallest: after top-k the
/// few that were kept, after a ban the few that were not, else a bit for each token of the
/// vocabulary.
///
/// A filter that is computed again from another policy's logits keeps other tokens, and
/// probabilities within the two sets cannot be compared. What is stored can be replayed: see
/// [`Policy::logprobs_within`](crate::Policy::logprobs_within).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeptSet {
    /// No filter took a token away.
    All,
    /// These ids, ascending.
    Only(Box<[u32]>),
    /// All but these ids, ascending.
    AllBut(Box<[u32]>),
    /// Bit `id % 64` of word `id / 64` is set for a token that was kept.
    Bits(Box<[u64]>),
}

/// The kept sets of a response: one a token.
pub type KeptTokens = Arc<[KeptSet]>;

impl KeptSet {
    /// From one flag for each token of the vocabulary, `true` for those that were kept.
    pub fn of(flags: &[bool]) -> Self {
        let kept = flags.iter().filter(|&&kept| kept).count();
        let dropped = flags.len() - kept;
        let ids = |wanted: bool| -> Box<[u32]> {
            let ids = (0u32..).zip(flags).filter(|(_, kept)| **kept == wanted);
            ids.map(|(id, _)| id).collect()
        };
        // An id is 32 bits.
        let words = flags.len().div_ceil(64);
        if dropped == 0 {
            Self::All
        } else if kept.min(dropped) > 2 * words {
            let mut bits = vec![0u64; words];
            for id in (0..flags.len()).filter(|&id| flags[id]) {
                bits[id / 64] |= 1 << (id % 64);
            }
            Self::Bits(bits.into())
        } else if kept <= dropped {
            Self::Only(ids(true))
        } else {
            Self::AllBut(ids(false))
        }
    }

    /// Whether the token could be drawn.
    pub fn contains(&self, id: i64) -> bool {
        let Ok(id) = u32::try_from(id) else {
            return false;
        };
        match self {
            Self::All => true,
            Self::Only(ids) => ids.binary_search(&id).is_ok(),
            Self::AllBut(ids) => ids.binary_search(&id).is_err(),
            Self::Bits(bits) => bits
                .get(id as usize / 64)
                .is_some_and(|word| word >> (id % 64) & 1 == 1),
        }
    }

    /// Sets `flags`, one for each token of the vocabulary, where a token was *dropped*.
    fn mark_dropped(&self, flags: &mut [bool]) {
        match self {
            Self::All => flags.fill(false),
            Self::Only(ids) => {
                flags.fill(true);
                for &id in ids {
                    if let Some(flag) = flags.get_mut(id as usize) {
                        *flag = false;
                    }
                }
            }
            Self::AllBut(ids) => {
                flags.fill(false);
                for &id in ids {
                    if let Some(flag) = flags.get_mut(id as usize) {
                        *flag = true;
                    }
                }
            }
            Self::Bits(bits) => {
                for (id, flag) in flags.iter_mut().enumerate() {
                    *flag = bits
                        .get(id / 64)
                        .is_none_or(|word| word >> (id % 64) & 1 == 0);
                }
            }
        }
    }
}

/// `true` at the tokens that were dropped at each of some steps.
///
/// # Shapes
/// `[steps, V]` bool.
///
/// # Errors
/// libtorch's (out of memory).
pub fn dropped_mask(sets: &[&KeptSet], vocab_size: i64, device: Device) -> Result<Tensor> {
    let vocab = vocab_size.max(0) as usize;
    let mut flags = vec![false; sets.len() * vocab];
    for (flags, set) in flags.chunks_exact_mut(vocab.max(1)).zip(sets) {
        set.mark_dropped(flags);
    }
    let mask = Tensor::from_slice(&flags).f_view([sets.len() as i64, vocab_size])?;
    Ok(mask.f_to_device(device)?)
}

/// Fails unless there is one set for each response token, which it holds.
///
/// # Errors
/// [`Error::LengthMismatch`], [`Error::TokenNotKept`].
pub fn check_kept(batch: &SequenceBatch, kept: &[KeptTokens]) -> Result<()> {
    let mismatch = |left, left_len, right, right_len| Error::LengthMismatch {
        left,
        left_len,
        right,
        right_len,
    };
    if kept.len() != batch.len() {
        return Err(mismatch("kept", kept.len(), "the batch", batch.len()));
    }
    for (row, (sequence, sets)) in batch.sequences().iter().zip(kept).enumerate() {
        let tokens = sequence.response.len();
        if sets.len() != tokens {
            let (left, right) = ("the kept sets of a response", "its tokens");
            return Err(mismatch(left, sets.len(), right, tokens));
        }
        let outside = |(id, set): (&i64, &KeptSet)| !set.contains(*id);
        let mut steps = sequence.response.iter().zip(sets.iter());
        if let Some(position) = steps.position(outside) {
            return Err(Error::TokenNotKept {
                row,
                position,
                id: sequence.response[position],
            });
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Sequence;

    #[test]
    fn the_smallest_form_holds_the_same_tokens() {
        let vocab = 200i64;
        type Keeps = fn(i64) -> bool;
        let forms: [(&str, Keeps); 4] = [
            ("all", |_| true),
            ("only", |id| id == 3 || id == 199),
            ("but", |id| id != 64),
            ("bits", |id| id % 3 == 0),
        ];
        for (name, keeps) in forms {
            let flags: Vec<bool> = (0..vocab).map(keeps).collect();
            let set = KeptSet::of(&flags);
            let form = match &set {
                KeptSet::All => "all",
                KeptSet::Only(_) => "only",
                KeptSet::AllBut(_) => "but",
                KeptSet::Bits(_) => "bits",
            };
            assert_eq!(form, name);
            let mask = dropped_mask(&[&KeptSet::All, &set], vocab, Device::Cpu).unwrap();
            let dropped = Vec::<bool>::try_from(mask.get(1)).unwrap();
            assert!(!bool::try_from(mask.get(0).any()).unwrap());
            for id in 0..vocab {
                assert_eq!(set.contains(id), keeps(id), "{name} {id}");
                assert_eq!(dropped[id as usize], !keeps(id), "{name} {id}");
            }
            assert!(!set.contains(-1));
        }
    }

    #[test]
    fn sets_belong_to_their_tokens() {
        let batch = SequenceBatch::new(vec![Sequence::new([1], [2, 3])]).unwrap();
        let set = |ids: &[u32]| KeptSet::Only(ids.into());
        let kept = |sets: Vec<KeptSet>| check_kept(&batch, &[sets.into()]);
        kept(vec![set(&[2]), KeptSet::All]).unwrap();
        let error = kept(vec![set(&[2]), set(&[4])]).unwrap_err();
        assert!(matches!(
            error,
            Error::TokenNotKept {
                position: 1,
                id: 3,
                ..
            }
        ));
        assert!(kept(vec![set(&[2])]).is_err());
        assert!(check_kept(&batch, &[]).is_err());
    }
}
