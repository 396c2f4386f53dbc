//! Scores of both sides of comparisons, by one head or several.

use rand::Rng;
use rlhf_core::{Error as CoreError, PreferenceBatch, Ranks, RngStreams, Scorer};
use tch::{Device, Kind, Tensor};

use crate::{Error, PairwiseInputs, PairwiseLoss, PairwiseTerms, Result, pairwise_loss};

/// The heads of a scorer that learn the same comparisons: one, or an ensemble on a shared trunk.
///
/// Heads differ by where they start and, with `bootstrap`, by how much each pair counts for
/// them: weights drawn from the exponential distribution with mean 1, the Bayesian bootstrap of
/// Rubin 1981. They are a function of seed, head and pair, so a pair has the same in every epoch
/// and in a resumed run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Columns of the scores.
    pub count: usize,
    /// Seed of the pairs' weights; `None`: every pair counts the same for all.
    pub bootstrap: Option<u64>,
}

impl Heads {
    /// A reward model with one score.
    pub const ONE: Self = Self {
        count: 1,
        bootstrap: None,
    };

    /// How much each pair counts for each head, `[B, H]` by rows.
    pub(crate) fn weights(&self, batch: &PreferenceBatch) -> Vec<f64> {
        let mut weights = Vec::with_capacity(batch.len() * self.count);
        for pair in batch.pairs() {
            match self.bootstrap {
                None => weights.extend(std::iter::repeat_n(pair.weight, self.count)),
                Some(seed) => {
                    let sides = [&pair.prompt, pair.chosen.as_slice(), &pair.rejected];
                    let index = fingerprint(&sides);
                    let mut rng = RngStreams::new(seed).stream("reward/bootstrap", index);
                    weights.extend((0..self.count).map(|_| {
                        let uniform: f64 = rng.random(); // in [0, 1)
                        -pair.weight * (-uniform).ln_1p()
                    }));
                }
            }
        }
        weights
    }
}

/// No process has scored anything.
pub(crate) fn nothing_scored() -> Error {
    CoreError::Empty {
        what: "the batch",
        help: "give it at least one item",
    }
    .into()
}

/// FNV-1a with 64 bits over lists of tokens, each with its length: the same on every machine.
fn fingerprint(lists: &[&[i64]]) -> u64 {
    let numbers = lists
        .iter()
        .flat_map(|list| std::iter::once(list.len() as i64).chain(list.iter().copied()));
    numbers
        .flat_map(i64::to_le_bytes)
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

/// Scores of both sides of some pairs, `[B, H]` each.
pub(crate) struct PairScores {
    pub(crate) chosen: Tensor,
    pub(crate) rejected: Tensor,
}

impl PairScores {
    /// One forward pass over both sides of all pairs, which share their prompts.
    pub(crate) fn of(model: &impl Scorer, batch: &PreferenceBatch, heads: Heads) -> Result<Self> {
        let sequences = batch.interleaved()?;
        let scores = model.scores(&sequences)?;
        let rows = sequences.len();
        let shape = scores.size();
        if shape != [rows as i64, heads.count as i64] {
            return Err(match heads.count {
                1 => Error::NotAReward {
                    shape,
                    sequences: rows,
                    objective: "a comparison",
                },
                heads => Error::NotHeads {
                    shape,
                    sequences: rows,
                    heads,
                },
            });
        }
        let scores = scores
            .to_kind(Kind::Float)
            .reshape([-1, 2, heads.count as i64]);
        Ok(Self {
            chosen: scores.select(1, 0),
            rejected: scores.select(1, 1),
        })
    }

    /// The mean over pairs and heads of the pairs given here; `denominator` is the sum of
    /// [`Heads::weights`] of the whole batch.
    pub(crate) fn loss(
        &self,
        batch: &PreferenceBatch,
        heads: Heads,
        terms: PairwiseTerms,
        denominator: f64,
    ) -> Result<PairwiseLoss> {
        let device = self.chosen.device();
        let margins = batch
            .pairs()
            .iter()
            .flat_map(|p| std::iter::repeat_n(p.margin.unwrap_or(0.0), heads.count));
        let inputs = PairwiseInputs {
            chosen: &self.chosen.reshape([-1]),
            rejected: &self.rejected.reshape([-1]),
            margins: Some(&floats(margins, device)),
            weights: Some(&floats(heads.weights(batch), device)),
        };
        pairwise_loss(inputs, terms, denominator)
    }

    pub(crate) fn detached(&self) -> Self {
        Self {
            chosen: self.chosen.detach(),
            rejected: self.rejected.detach(),
        }
    }

    pub(crate) fn cat(parts: &[Self]) -> Self {
        let cat = |side: fn(&Self) -> &Tensor| {
            Tensor::cat(&parts.iter().map(side).collect::<Vec<_>>(), 0)
        };
        Self {
            chosen: cat(|s| &s.chosen),
            rejected: cat(|s| &s.rejected),
        }
    }

    /// The parts of a batch that all processes have, as one.
    pub(crate) fn gathered(parts: &[Self], ranks: &Ranks) -> Result<Self> {
        let own = match parts.is_empty() {
            true => Vec::new(),
            false => {
                let Self { chosen, rejected } = Self::cat(parts);
                vec![chosen, rejected]
            }
        };
        match <[Tensor; 2]>::try_from(ranks.gather_columns::<Error>(Ok(own))?) {
            Ok([chosen, rejected]) => Ok(Self { chosen, rejected }),
            Err(_) => Err(nothing_scored()),
        }
    }

    /// Mean over the heads, `[B]` each.
    pub(crate) fn means(&self) -> (Tensor, Tensor) {
        let mean = |side: &Tensor| side.mean_dim([1i64].as_slice(), false, Kind::Float);
        (mean(&self.chosen), mean(&self.rejected))
    }

    /// Mean over the pairs of the deviation that their score differences have over the heads.
    pub(crate) fn disagreement(&self) -> Result<f64> {
        let differences = &self.chosen - &self.rejected;
        let deviations = differences.std_dim([1i64].as_slice(), false, false);
        Ok(f64::try_from(deviations.mean(Kind::Float)).map_err(CoreError::from)?)
    }

    pub(crate) fn check_finite(&self) -> Result<()> {
        let sides = Tensor::stack(&[&self.chosen, &self.rejected], 1).reshape([-1]);
        let per_pair = sides.numel() / self.chosen.size()[0] as usize;
        let scores = Vec::<f64>::try_from(sides).map_err(CoreError::from)?;
        match scores.iter().position(|s| !s.is_finite()) {
            Some(i) => Err(CoreError::NonFinite {
                what: "score",
                row: i / per_pair,
                value: scores[i],
            }
            .into()),
            None => Ok(()),
        }
    }
}

pub(crate) fn floats(values: impl IntoIterator<Item = f64>, device: Device) -> Tensor {
    let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
    Tensor::from_slice(&values).to_device(device)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rlhf_core::Preference;

    #[test]
    fn bootstrap_weights_depend_on_pair_and_head_alone_and_have_mean_1() {
        let pairs: Vec<_> = (0..500).map(|i| Preference::new([i], [1], [2])).collect();
        let heads = Heads {
            count: 4,
            bootstrap: Some(3),
        };
        let weights = heads.weights(&PreferenceBatch::new(pairs.clone()).unwrap());
        let one = heads.weights(&PreferenceBatch::new(vec![pairs[7].clone()]).unwrap());
        assert_eq!(weights[28..32], one[..]);
        assert!(one[0] != one[1] && weights.iter().all(|w| *w >= 0.0 && w.is_finite()));
        let mean = weights.iter().sum::<f64>() / weights.len() as f64;
        assert!((mean - 1.0).abs() < 0.1, "{mean}"); // four deviations of the mean of 2000
        assert_eq!(fingerprint(&[&[]]), fingerprint(&[&[]]));
        assert_ne!(fingerprint(&[&[1], &[2]]), fingerprint(&[&[1, 2], &[]]));
    }
}
