//! Comparisons with the scores of both answers.

use rlhf_core::{Completions, Error as CoreError, Preference, PreferenceBatch, RewardModel};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::screen::usable;
use crate::{Result, Skipped};

/// The scores of one comparison.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ScoredPair {
    /// Score of the answer that was preferred.
    pub chosen: f64,
    /// Score of the other one.
    pub rejected: f64,
    /// By how much the first was preferred, where the labellers said so.
    pub label_margin: Option<f64>,
    /// Tokens of the answer that was preferred.
    pub chosen_len: usize,
    /// Tokens of the other one.
    pub rejected_len: usize,
}

impl ScoredPair {
    /// Chosen minus rejected score.
    pub fn difference(&self) -> f64 {
        self.chosen - self.rejected
    }

    /// Whether the preferred answer scores strictly higher.
    pub fn is_right(&self) -> bool {
        self.chosen > self.rejected
    }

    /// Chosen minus rejected tokens.
    pub fn length_difference(&self) -> i64 {
        self.chosen_len as i64 - self.rejected_len as i64
    }

    /// The probability that Bradley and Terry give to the model's own choice, in `0.5..=1`.
    pub fn confidence(&self) -> f64 {
        1.0 / (1.0 + (-self.difference().abs()).exp())
    }
}

/// Scores comparisons, `batch_size` of them at a time; both answers of a pair are in one batch and
/// share their prompt. Pairs with equal answers or an empty one are left out and counted.
///
/// # Errors
/// No pairs, or none that can be compared; a score that is not finite; those of the model.
pub fn score_pairs(
    model: &dyn RewardModel,
    pairs: &[Preference],
    batch_size: usize,
) -> Result<(Vec<ScoredPair>, Skipped)> {
    let _no_grad = tch::no_grad_guard();
    let (batch, skipped) = usable(&PreferenceBatch::new(pairs.to_vec())?)?;
    let mut scored = Vec::with_capacity(batch.len());
    for part in batch.split(batch_size)? {
        let completions = Completions::written(part.interleaved()?);
        let scores = model.score(&completions)?;
        crate::ensemble::one_a_completion(&scores, completions.batch.len() as i64)?;
        let scores = values(&scores)?;
        for (pair, sides) in part.pairs().iter().zip(scores.chunks(2)) {
            if let Some(value) = sides.iter().find(|score| !score.is_finite()) {
                return Err(CoreError::NonFinite {
                    what: "score",
                    row: scored.len(),
                    value: *value,
                }
                .into());
            }
            scored.push(ScoredPair {
                chosen: sides[0],
                rejected: sides[1],
                label_margin: pair.margin,
                chosen_len: pair.chosen.len(),
                rejected_len: pair.rejected.len(),
            });
        }
    }
    Ok((scored, skipped))
}

fn values(scores: &Tensor) -> Result<Vec<f64>> {
    let scores = scores.to_device(Device::Cpu).to_kind(Kind::Double);
    Ok(Vec::try_from(scores.contiguous()).map_err(CoreError::from)?)
}

/// Fails without pairs, and for a score that is not finite.
pub(super) fn check(pairs: &[ScoredPair]) -> Result<()> {
    if pairs.is_empty() {
        return Err(CoreError::Empty {
            what: "the comparisons",
            help: "give at least one scored pair",
        }
        .into());
    }
    let off = |p: &ScoredPair| !p.chosen.is_finite() || !p.rejected.is_finite();
    match pairs.iter().position(off) {
        Some(row) => Err(CoreError::NonFinite {
            what: "score",
            row,
            value: match pairs[row].chosen.is_finite() {
                true => pairs[row].rejected,
                false => pairs[row].chosen,
            },
        }
        .into()),
        None => Ok(()),
    }
}
