//! What becomes of the score of a response that did not finish.

use rlhf_core::FinishReason;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// The score of a response that ends without a stop token. A reward model has seen few such
/// texts, and a policy that is not told off learns to ramble.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MissingEos {
    /// The score stands.
    Keep,
    /// The score is replaced by this value (Huang et al. 2024, arXiv 2403.17031: −1).
    Replace(f64),
    /// This penalty is taken off the score (TRL's `missing_eos_penalty`).
    Subtract(f64),
}

impl MissingEos {
    /// Applies the rule to the rows that did not finish.
    ///
    /// # Shapes
    /// `scores`: `[B]` f32 on the CPU; returns the same.
    ///
    /// # Errors
    /// [`rlhf_core::Error::LengthMismatch`] unless there is one finish reason per score.
    pub fn apply(self, scores: &Tensor, finish: &[FinishReason]) -> rlhf_core::Result<Tensor> {
        let rows = scores.numel();
        if rows != finish.len() {
            return Err(rlhf_core::Error::LengthMismatch {
                left: "scores",
                left_len: rows,
                right: "finish_reasons",
                right_len: finish.len(),
            });
        }
        let cut: Vec<bool> = finish.iter().map(|&f| f != FinishReason::Stop).collect();
        let cut = Tensor::from_slice(&cut);
        Ok(match self {
            Self::Keep => scores.copy(),
            Self::Replace(value) => scores.masked_fill(&cut, value),
            Self::Subtract(penalty) => scores - cut.to_kind(Kind::Float) * penalty,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_unfinished_rows_change() {
        let scores = Tensor::from_slice(&[1f32, 2.0]);
        let finish = [FinishReason::Stop, FinishReason::Length];
        let after =
            |rule: MissingEos| Vec::<f32>::try_from(rule.apply(&scores, &finish).unwrap()).unwrap();
        assert_eq!(after(MissingEos::Keep), [1.0, 2.0]);
        assert_eq!(after(MissingEos::Replace(-1.0)), [1.0, -1.0]);
        assert_eq!(after(MissingEos::Subtract(0.5)), [1.0, 1.5]);
        assert!(MissingEos::Keep.apply(&scores, &finish[..1]).is_err());
    }
}
