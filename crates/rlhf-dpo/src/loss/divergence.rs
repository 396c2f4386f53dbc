//! What the reward is derived from.

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::Result;

/// Which divergence from the reference the reward is derived from (f-DPO, Wang et al. 2023, arXiv
/// 2309.16240): a function applied to each log-ratio before the loss sees it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Divergence {
    /// `x`: DPO's own.
    #[default]
    ReverseKl,
    /// `1 − e^{−x}`.
    ForwardKl,
    /// `log 2 + log σ(x)`.
    JensenShannon,
    /// `(e^{(α−1)x} − 1) / (α − 1)`, the exponent at most 80.
    Alpha {
        /// `α`, not 1.
        alpha: f64,
    },
}

/// `e^80` is finite in f32.
pub(super) const MAX_EXPONENT: f64 = 80.0;

impl Divergence {
    /// Fails for an `α` of 1.
    ///
    /// # Errors
    /// An invalid configuration.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::Alpha { alpha } if !alpha.is_finite() || alpha == 1.0 => Err(CoreError::config(
                "divergence.alpha",
                alpha,
                "a finite number other than 1 is needed; use reverse_kl for the limit at 1",
            )
            .into()),
            _ => Ok(()),
        }
    }

    pub(super) fn of(self, logratio: Tensor) -> Tensor {
        match self {
            Self::ReverseKl => logratio,
            Self::ForwardKl => 1.0 - (-logratio).clamp_max(MAX_EXPONENT).exp(),
            Self::JensenShannon => logratio.log_sigmoid() + std::f64::consts::LN_2,
            Self::Alpha { alpha } => {
                let exponent = (logratio * (alpha - 1.0)).clamp_max(MAX_EXPONENT);
                (exponent.exp() - 1.0) / (alpha - 1.0)
            }
        }
    }
}
