//! Estimators of the KL divergence from log-probabilities of sampled tokens.

use serde::{Deserialize, Serialize};
use tch::Tensor;

/// How the divergence of the policy from its reference is estimated at one token.
///
/// With `d = logprob − ref_logprob` of a token drawn from the policy
/// (J. Schulman, "Approximating KL divergence", 2020):
///
/// | | value | bias | sign | gradient |
/// |---|---|---|---|---|
/// | `K1` | `d` | none | either | `∇logprob`: zero on average, whatever the reference |
/// | `K2` | `d² / 2` | low | ≥ 0 | `d ∇logprob`: that of the divergence, on average |
/// | `K3` | `e^(−d) − 1 + d` | none | ≥ 0 | `(1 − e^(−d)) ∇logprob`: that of the *reverse* divergence |
/// | `K1Plus` | that of `K1` | none | either | that of `K2` |
/// | `K3Plus` | that of `K3` | none | ≥ 0 | that of `K2` |
///
/// The value is all that matters in a reward. In a loss the gradient
/// matters too, and for samples of the policy only that of `K2` is the divergence's own (verl's
/// `k1+` and `k3+`; Tang & Munos 2025, arXiv 2506.09477): the straight-through forms have it, with
/// a value that is unbiased.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// The log-ratio itself: what RLHF implementations since Ziegler et al. 2019 penalise.
    #[default]
    K1,
    /// Half the squared log-ratio.
    K2,
    /// The log-ratio with a control variate of mean zero: unbiased, low variance.
    K3,
    /// Straight-through: `K1` with the gradient of `K2`.
    K1Plus,
    /// Straight-through: `K3` with the gradient of `K2`.
    K3Plus,
}

impl KlEstimator {
    /// The estimate at each token, in nats, differentiable with respect to `logprobs`. Not reduced,
    /// not masked.
    ///
    /// # Shapes
    /// Both of any one shape, f32; returns the same.
    pub fn estimate(self, logprobs: &Tensor, ref_logprobs: &Tensor) -> Tensor {
        let d = logprobs - ref_logprobs;
        match self {
            Self::K1 => d,
            Self::K2 => d.square() * 0.5,
            Self::K3 => (-&d).expm1() + d,
            Self::K1Plus => Self::straight_through(Self::K1, logprobs, ref_logprobs),
            Self::K3Plus => Self::straight_through(Self::K3, logprobs, ref_logprobs),
        }
    }

    fn straight_through(value: Self, logprobs: &Tensor, ref_logprobs: &Tensor) -> Tensor {
        let value = value.estimate(&logprobs.detach(), ref_logprobs);
        let slope = Self::K2.estimate(logprobs, ref_logprobs);
        // x − x is exactly 0: the value is not touched by rounding.
        value + (&slope - slope.detach())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tch::Kind;

    const ALL: [KlEstimator; 5] = [
        KlEstimator::K1,
        KlEstimator::K2,
        KlEstimator::K3,
        KlEstimator::K1Plus,
        KlEstimator::K3Plus,
    ];

    #[test]
    fn by_hand() {
        let logprobs = Tensor::from_slice(&[-1f64, -2.0]).set_requires_grad(true);
        let ref_logprobs = Tensor::from_slice(&[-1f64, -2.0 - 2f64.ln()]);
        let d = 2f64.ln();
        let values = [d, d * d / 2.0, 0.5 - 1.0 + d, d, 0.5 - 1.0 + d];
        let slopes = [1.0, d, 0.5, d, d];
        for ((estimator, value), slope) in ALL.into_iter().zip(values).zip(slopes) {
            let estimate = estimator.estimate(&logprobs, &ref_logprobs);
            assert_eq!(estimate.double_value(&[0]), 0.0);
            let got = estimate.double_value(&[1]);
            assert!((got - value).abs() < 1e-12, "{estimator:?} is {got}");
            let gradient = Tensor::run_backward(&[estimate.get(1)], &[&logprobs], false, false);
            let got = gradient[0].double_value(&[1]);
            assert!((got - slope).abs() < 1e-12, "{estimator:?} slopes {got}");
        }
    }

    /// Expectations under `p` over a whole vocabulary of three tokens, of values and of gradients
    /// with respect to the logits, against those of the divergence itself.
    #[test]
    fn bias_of_values_and_gradients() {
        let logits = Tensor::from_slice(&[0.4f64, -0.3, 0.1]).set_requires_grad(true);
        let q = Tensor::from_slice(&[0.2f64, 0.5, 0.3]).log();
        let gradient = |loss: &Tensor| Tensor::run_backward(&[loss], &[&logits], false, false);
        let logp = logits.log_softmax(-1, Kind::Double);
        let kl = (logp.exp() * (&logp - &q)).sum(Kind::Double);
        let (want, want_slope) = (kl.detach(), gradient(&kl).remove(0));
        for estimator in ALL {
            let logp = logits.log_softmax(-1, Kind::Double);
            // Sampled from p, which is a constant for the estimator's gradient.
            let mean = (logp.exp().detach() * estimator.estimate(&logp, &q)).sum(Kind::Double);
            let gap = f64::try_from((mean.detach() - &want).abs()).unwrap();
            assert_eq!(gap < 1e-12, estimator != KlEstimator::K2, "{estimator:?}");
            let slope = gradient(&mean).remove(0);
            let gap = f64::try_from((&slope - &want_slope).abs().max()).unwrap();
            let own = !matches!(estimator, KlEstimator::K1 | KlEstimator::K3);
            assert_eq!(gap < 1e-12, own, "{estimator:?} is off by {gap}");
            if estimator == KlEstimator::K1 {
                assert!(f64::try_from(slope.abs().max()).unwrap() < 1e-12);
            }
        }
    }
}
