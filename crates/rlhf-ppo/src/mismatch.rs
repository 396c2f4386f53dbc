//! Samplers whose log-probabilities are not the trainer's.

use rlhf_core::masked_mean;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{KlEstimator, log_ratios};

/// What is done about tokens that were sampled from a distribution that differs from the trainer's
/// by rounding: decoding and training multiply matrices of other shapes, which in bf16 moves a
/// log-probability by hundredths of a nat.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RolloutCorrection {
    /// Nothing but what recomputing the old log-probabilities does: ratios begin at 1, and the
    /// samples count as the trainer's.
    #[default]
    Off,
    /// Each token's loss is multiplied by `min(exp(old_logprob − sampling_logprob), cap)`, its
    /// truncated importance (Ionides 2008; Yao et al. 2025, "Your Efficient RL Framework Secretly
    /// Brings You Off-Policy RL Training").
    TruncatedImportance {
        /// The most that a token may count; 2 in the source.
        cap: f64,
    },
}

/// How far the sampler was from the trainer, over the tokens of a rollout.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerMismatch {
    /// Mean of `|logprob − sampling_logprob|`, nats.
    pub mean: f64,
    /// The greatest of them, nats.
    pub max: f64,
    /// KL of the trainer's policy from the sampler's, nats a token: the `K3` estimate from the
    /// sampler's tokens, `ρ − 1 − log ρ`.
    pub kl: f64,
}

impl SamplerMismatch {
    /// Compares log-probabilities of the same tokens. `None` where there is no token.
    ///
    /// # Shapes
    /// All `[B, R]`.
    ///
    /// # Errors
    /// [`ShapeMismatch`](rlhf_core::Error::ShapeMismatch).
    pub fn between(
        logprobs: &Tensor,
        sampling_logprobs: &Tensor,
        mask: &Tensor,
    ) -> rlhf_core::Result<Option<Self>> {
        if !bool::try_from(mask.any())? {
            return Ok(None);
        }
        let gap = log_ratios(logprobs, sampling_logprobs, mask).to_kind(Kind::Double);
        let kl = KlEstimator::K3.estimate(&-&gap, &gap.zeros_like());
        Ok(Some(Self {
            mean: f64::try_from(masked_mean(&gap.abs(), mask)?)?,
            max: f64::try_from(gap.abs().max())?,
            kl: f64::try_from(masked_mean(&kl, mask)?)?,
        }))
    }
}

impl RolloutCorrection {
    /// The factor of each token's loss; `None` for 1.
    pub(crate) fn weights(
        self,
        logprobs: &Tensor,
        sampling_logprobs: &Tensor,
        mask: &Tensor,
    ) -> Option<Tensor> {
        match self {
            Self::Off => None,
            Self::TruncatedImportance { cap } => {
                let ratio = log_ratios(logprobs, sampling_logprobs, mask).exp();
                Some(ratio.clamp_max(cap))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let (two, quarter) = (2f64.ln(), 0.25f64.ln());
        let logprobs = Tensor::from_slice2(&[[-1.0, -1.0, 0.0]]);
        let sampled = Tensor::from_slice2(&[[-1.0 - two, -1.0 - quarter, f64::NAN]]);
        let mask = Tensor::from_slice2(&[[true, true, false]]);
        let gap = SamplerMismatch::between(&logprobs, &sampled, &mask)
            .unwrap()
            .unwrap();
        assert!((gap.mean - 1.5 * two).abs() < 1e-6 && (gap.max - 2.0 * two).abs() < 1e-12);
        // ρ − 1 − log ρ of 2 and of ¼, which is another number than that of ½ and of 4.
        let want = ((2.0 - 1.0 - two) + (0.25 - 1.0 - quarter)) / 2.0;
        assert!((gap.kl - want).abs() < 1e-6, "{} is not {want}", gap.kl);
        let none = mask.zeros_like();
        assert_eq!(
            SamplerMismatch::between(&logprobs, &sampled, &none).unwrap(),
            None
        );

        assert!(
            RolloutCorrection::Off
                .weights(&logprobs, &sampled, &mask)
                .is_none()
        );
        let capped = RolloutCorrection::TruncatedImportance { cap: 1.5 };
        let weights = capped.weights(&logprobs, &sampled, &mask).unwrap();
        let weights = Vec::<f64>::try_from(weights.view(-1)).unwrap();
        assert!((weights[0] - 1.5).abs() < 1e-12 && (weights[1] - 0.25).abs() < 1e-12);
    }
}
