//! Weights for the difference between the policy that sampled and the one that trains.

use rlhf_core::{Error, Result, check_same_shape};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::LOG_RATIO_LIMIT;

/// What becomes of an importance weight above the cap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Excess {
    /// It counts as the cap: truncated importance sampling.
    Truncate,
    /// It counts as 0: what it belongs to is not learnt from.
    Drop,
}

/// Correction of answers that were sampled with other arithmetic than they are trained with: in
/// 16 bits, by another engine, or by a policy of some steps ago.
///
/// The loss of a token is multiplied by `w = exp(old_logprob − sampling_logprob)`, capped, where
/// `old_logprob` is the trainer's own for the tokens as they were sampled. The KL penalty is not.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum OffPolicy {
    /// None. The mismatch is measured all the same where the sampler said its log-probabilities.
    Ignore,
    /// A weight for every token.
    Tokens {
        /// The greatest weight.
        cap: f64,
        /// What becomes of a greater one.
        excess: Excess,
    },
    /// A weight for every answer, the product of its tokens'.
    Sequences {
        /// The greatest weight.
        cap: f64,
        /// What becomes of a greater one.
        excess: Excess,
    },
}

impl OffPolicy {
    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Self::Tokens { cap, .. } | Self::Sequences { cap, .. }
                if !(cap.is_finite() && cap >= 1.0) =>
            {
                let reason = "must be at least 1, the weight of what was sampled by the policy";
                Err(Error::config("off_policy.cap", cap, reason))
            }
            _ => Ok(()),
        }
    }
}

/// The weights of `correction`; `None` where nothing is corrected. Detached.
///
/// # Shapes
/// Three times `[B, R]`; returns `[B, R]`, or `[B, 1]` for weights of sequences.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn importance_weights(
    correction: OffPolicy,
    old_logprobs: &Tensor,
    sampling_logprobs: &Tensor,
    mask: &Tensor,
) -> Result<Option<Tensor>> {
    let old = ("old_logprobs", old_logprobs);
    check_same_shape(old, ("sampling_logprobs", sampling_logprobs))?;
    check_same_shape(old, ("mask", mask))?;
    let log_ratio = (old_logprobs - sampling_logprobs)
        .detach()
        .masked_fill(&mask.logical_not(), 0.0);
    let (log_ratio, cap, excess) = match correction {
        OffPolicy::Ignore => return Ok(None),
        OffPolicy::Tokens { cap, excess } => (log_ratio, cap, excess),
        OffPolicy::Sequences { cap, excess } => {
            let sum = log_ratio.sum_dim_intlist([1i64].as_slice(), true, None::<Kind>);
            (sum, cap, excess)
        }
    };
    let weights = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp();
    Ok(Some(match excess {
        Excess::Truncate => weights.clamp_max(cap),
        Excess::Drop => {
            let over = weights.gt(cap);
            weights.masked_fill(&over, 0.0)
        }
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let (two, half) = (2f64.ln(), 0.5f64.ln());
        let sampling = Tensor::from_slice2(&[[-1.0, -1.0], [-1.0, f64::NAN]]);
        let old = Tensor::from_slice2(&[[-1.0 + two, -1.0 + two], [-1.0 + half, 0.0]]);
        let mask = Tensor::from_slice2(&[[true, true], [true, false]]);
        let weights = |correction| {
            let weights = importance_weights(correction, &old, &sampling, &mask).unwrap();
            weights.map(|w| Vec::<f64>::try_from(w.reshape([-1])).unwrap())
        };
        let close = |got: Option<Vec<f64>>, want: &[f64]| {
            let got = got.unwrap();
            assert_eq!(got.len(), want.len());
            assert!(
                got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-12),
                "{got:?}"
            );
        };
        assert_eq!(weights(OffPolicy::Ignore), None);
        let tokens = |excess| OffPolicy::Tokens { cap: 1.5, excess };
        close(weights(tokens(Excess::Truncate)), &[1.5, 1.5, 0.5, 1.0]);
        close(weights(tokens(Excess::Drop)), &[0.0, 0.0, 0.5, 1.0]);
        let sequences = |cap, excess| OffPolicy::Sequences { cap, excess };
        close(weights(sequences(5.0, Excess::Truncate)), &[4.0, 0.5]);
        close(weights(sequences(3.0, Excess::Truncate)), &[3.0, 0.5]);
        close(weights(sequences(3.0, Excess::Drop)), &[0.0, 0.5]);
    }
}
