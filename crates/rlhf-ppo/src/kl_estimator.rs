//! Estimators of the KL divergence from log-probabilities of sampled tokens.

use serde::{Deserialize, Serialize};
use tch::Tensor;

/// How the divergence of the policy from its reference is estimated at one token.
///
/// With `d = logprob − ref_logprob` of a token drawn from the policy
/// (J. Schulman, "Approximating KL divergence", 2020):
///
/// | | value | bias | sign |
/// |---|---|---|---|
/// | `K1` | `d` | none | either |
/// | `K2` | `d² / 2` | low | ≥ 0 |
/// | `K3` | `e^(−d) − 1 + d` | none | ≥ 0 |
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
}

impl KlEstimator {
    /// The estimate at each token, in nats. Not reduced, not masked.
    ///
    /// # Shapes
    /// Both of any one shape, f32; returns the same.
    pub fn estimate(self, logprobs: &Tensor, ref_logprobs: &Tensor) -> Tensor {
        let d = logprobs - ref_logprobs;
        match self {
            Self::K1 => d,
            Self::K2 => d.square() * 0.5,
            Self::K3 => (-&d).expm1() + d,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let logprobs = Tensor::from_slice(&[-1f64, -2.0]);
        let ref_logprobs = Tensor::from_slice(&[-1f64, -2.0 - 2f64.ln()]);
        let at = |e: KlEstimator| {
            let estimate = e.estimate(&logprobs, &ref_logprobs);
            assert_eq!(estimate.double_value(&[0]), 0.0);
            estimate.double_value(&[1])
        };
        let d = 2f64.ln();
        assert!((at(KlEstimator::K1) - d).abs() < 1e-12);
        assert!((at(KlEstimator::K2) - d * d / 2.0).abs() < 1e-12);
        assert!((at(KlEstimator::K3) - (0.5 - 1.0 + d)).abs() < 1e-12);
    }

    #[test]
    fn k1_and_k3_are_unbiased() {
        // Expectation under p over a whole vocabulary of three tokens.
        let p = Tensor::from_slice(&[0.5f64, 0.3, 0.2]);
        let q = Tensor::from_slice(&[0.2f64, 0.5, 0.3]);
        let kl = (&p * (&p / &q).log()).sum(tch::Kind::Double);
        for estimator in [KlEstimator::K1, KlEstimator::K3] {
            let mean = (&p * estimator.estimate(&p.log(), &q.log())).sum(tch::Kind::Double);
            let gap = f64::try_from((mean - &kl).abs()).unwrap();
            assert!(gap < 1e-12, "{estimator:?} is off by {gap}");
        }
    }
}
