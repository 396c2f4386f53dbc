//! What a training run computes in.

use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::LossScale;

/// The number format of a model's weights and of its forward and backward pass.
///
/// Whichever is chosen, what adds up many small numbers is f32: the master weights and moments of
/// [`AdamW`](crate::AdamW), the sums of gradients over microbatches, gradient norms, losses,
/// log-probabilities, and averaged weights ([`Ema`](crate::Ema)).
///
/// | | weights, activations, gradients | optimiser (weights, moments) | bytes a weight, in all |
/// |---|---|---|---|
/// | `F32` | f32 | f32, no extra copy | 4 + 4 + 8 |
/// | `Bf16` | bf16: the range of f32, 8 bits of precision | f32 | 2 + 2 + 12 |
/// | `F16` | f16: 11 bits of precision, but nothing above 65504, nothing below 6e-8 | f32 | 2 + 2 + 12 |
///
/// Gradients smaller than f16 can hold become zero, which is why f16 needs loss scaling:
/// [`UpdateConfig::for_precision`](crate::UpdateConfig::for_precision).
///
/// ```
/// use rlhf_scale::{Precision, UpdateConfig};
/// use tch::{Device, Kind, Tensor};
///
/// let precision = Precision::F16;
/// let weight = Tensor::ones([3, 2], (Kind::Float, Device::Cpu))
///     .to_kind(precision.kind())
///     .set_requires_grad(true);
/// let config = UpdateConfig::default().for_precision(precision);
/// assert_eq!(weight.kind(), Kind::Half);
/// assert_eq!(config.loss_scale.map(|scale| scale.initial), Some(65536.0));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats everywhere.
    #[default]
    F32,
    /// bfloat16 weights and compute.
    Bf16,
    /// IEEE half-precision weights and compute, with loss scaling.
    F16,
}

impl Precision {
    /// The kind of the weights.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }

    /// Whether gradients of ordinary size leave the format's range.
    pub fn needs_loss_scaling(self) -> bool {
        self == Self::F16
    }

    /// The default loss scaling where it is needed.
    pub fn loss_scale(self) -> Option<LossScale> {
        self.needs_loss_scaling().then(LossScale::default)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_and_kinds() {
        let cases = [
            (Precision::F32, r#""f32""#, Kind::Float, false),
            (Precision::Bf16, r#""bf16""#, Kind::BFloat16, false),
            (Precision::F16, r#""f16""#, Kind::Half, true),
        ];
        for (precision, name, kind, scaled) in cases {
            assert_eq!(serde_json::to_string(&precision).unwrap(), name);
            assert_eq!(serde_json::from_str::<Precision>(name).unwrap(), precision);
            assert_eq!(precision.kind(), kind);
            assert_eq!(precision.needs_loss_scaling(), scaled);
            assert_eq!(precision.loss_scale().is_some(), scaled);
        }
    }
}
