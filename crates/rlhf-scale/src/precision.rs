//! What a training run computes in.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
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

    /// The precision whose weights have this kind, if there is one.
    pub fn of_kind(kind: Kind) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16]
            .into_iter()
            .find(|precision| precision.kind() == kind)
    }

    /// The bytes of `values` rounded to this format (to nearest, ties to even, as libtorch does), in
    /// the little-endian order of safetensors files.
    ///
    /// It is for numbers that are in host memory anyway. `half::bf16` must not be handed to tch,
    /// which takes it for f16: make the tensor from bytes, with [`Tensor::from_data_size`].
    ///
    /// ```
    /// use rlhf_scale::Precision;
    /// use tch::{Kind, Tensor};
    ///
    /// let bytes = Precision::Bf16.encode(&[1.0, -2.5]);
    /// let tensor = Tensor::from_data_size(&bytes, &[2], Kind::BFloat16);
    /// assert_eq!(tensor.double_value(&[1]), -2.5);
    /// assert_eq!(Precision::Bf16.decode(&bytes), [1.0, -2.5]);
    /// ```
    ///
    /// [`Tensor::from_data_size`]: tch::Tensor::from_data_size
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::Bf16 => {
                let mut rounded = vec![bf16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                rounded.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            Self::F16 => {
                let mut rounded = vec![f16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                rounded.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
        }
    }

    /// The numbers that little-endian bytes of this format stand for, exactly. Bytes at the end that
    /// make no whole number are left out.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        fn numbers<const N: usize>(bytes: &[u8], number: fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks().0.iter().map(|&b| number(b)).collect()
        }
        match self {
            Self::F32 => numbers(bytes, f32::from_le_bytes),
            Self::Bf16 => numbers(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Self::F16 => numbers(bytes, |b| f16::from_le_bytes(b).to_f32()),
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
            assert_eq!(Precision::of_kind(kind), Some(precision));
        }
        assert_eq!(Precision::of_kind(Kind::Double), None);
    }

    /// Halves, numbers out of f16's range, subnormal ones, and the ties between two neighbours.
    #[test]
    fn the_host_rounds_as_libtorch_does() {
        let mut values: Vec<f32> = vec![0.0, -0.0, 1.0, 65504.0, 65520.0, 1e5, -1e39_f64 as f32];
        values.extend([6e-8, 2.9e-8, 1e-40, f32::MIN_POSITIVE, f32::MAX]);
        // Every exponent, with mantissas around what either format drops.
        for exponent in 0..255u32 {
            for mantissa in [
                0, 1, 0xfff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0x18000,
            ] {
                values.push(f32::from_bits(exponent << 23 | mantissa));
                values.push(-f32::from_bits(exponent << 23 | mantissa | 0x40_0000));
            }
        }
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            let bytes = precision.encode(&values);
            let tensor = tch::Tensor::from_slice(&values).to_kind(precision.kind());
            let mut expected = vec![0; bytes.len()];
            tensor.copy_data_u8(&mut expected, values.len());
            assert_eq!(bytes, expected, "{precision:?}");
            let back = Vec::<f32>::try_from(tensor.to_kind(Kind::Float)).unwrap();
            assert_eq!(precision.decode(&bytes), back, "{precision:?}");
        }
    }
}
