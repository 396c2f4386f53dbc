//! Rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

use rlhf_core::Result;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::Error;
use crate::config::Fields;

/// How fast the pairs of a head's dimensions turn with the position.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// How a longer context than the one of pre-training is reached.
    pub scaling: RopeScaling,
}

/// Change of the frequencies for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low frequencies divided by a factor, high ones kept, those between interpolated
    /// (Llama 3.1).
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Wavelengths above the original context over this are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below the original context over this are high frequencies.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
}

impl RopeConfig {
    /// Reads `rope_parameters`, the layout of transformers 5, or else `rope_theta` with
    /// `rope_scaling`, that of transformers 4.
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let theta: Option<f64> = fields.get("rope_theta")?;
        let (name, map) = match fields.get::<Map<String, Value>>("rope_parameters")? {
            Some(map) => ("rope_parameters", map),
            None => (
                "rope_scaling",
                fields.get("rope_scaling")?.unwrap_or_default(),
            ),
        };
        let number = |key: &str| map.get(key).and_then(Value::as_f64);
        let need = |key: &str| {
            number(key).ok_or_else(|| Error::MissingField {
                path: fields.path.clone(),
                field: format!("{name}.{key}"),
            })
        };
        let kind = map.get("rope_type").or_else(|| map.get("type"));
        let scaling = match kind.map_or(Some("default"), Value::as_str) {
            Some("default") => RopeScaling::Default,
            Some("linear") => RopeScaling::Linear {
                factor: need("factor")?,
            },
            Some("llama3") => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: need("original_max_position_embeddings")?,
            },
            _ => return Err(fields.invalid(name, "supported types: default, linear, llama3")),
        };
        // 10000 is what transformers takes where a config says nothing.
        let theta = number("rope_theta").or(theta).unwrap_or(10_000.0);
        Ok(Self { theta, scaling })
    }

    /// The fields of transformers 4, which 5 reads too.
    pub(crate) fn write(&self, map: &mut Map<String, Value>) {
        map.insert("rope_theta".into(), json!(self.theta));
        let scaling = match self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original as i64,
            }),
        };
        map.insert("rope_scaling".into(), scaling);
    }

    /// Radians per position of each pair of dimensions.
    fn frequencies(&self, head_dim: i64) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f64 / head_dim as f64;
                self.scaling.apply(1.0 / self.theta.powf(exponent)) as f32
            })
            .collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => {
                let wavelength = std::f64::consts::TAU / frequency;
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// The frequencies, on the model's device.
pub(crate) struct Rope(Tensor);

/// Cosines and sines for the tokens of a run, `[N, 1, d]` each.
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig, head_dim: i64, device: tch::Device) -> Self {
        Self(Tensor::from_slice(&config.frequencies(head_dim)).to_device(device))
    }

    /// Angles are computed in f32, then rounded to the model's kind, as transformers does.
    pub(crate) fn rotation(&self, positions: &Tensor, kind: Kind) -> Result<Rotation> {
        let half = positions
            .f_to_kind(Kind::Float)?
            .unsqueeze(-1)
            .f_mul(&self.0)?;
        let angles = Tensor::f_cat(&[&half, &half], -1)?.unsqueeze(1);
        Ok(Rotation {
            cos: angles.f_cos()?.f_to_kind(kind)?,
            sin: angles.f_sin()?.f_to_kind(kind)?,
        })
    }
}

impl Rotation {
    /// The same tensors under another handle.
    pub(crate) fn share(&self) -> Self {
        Self {
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
        }
    }

    /// Turns `[N, heads, d]`; dimension `i` is paired with `i + d/2`.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let half = x.size()[2] / 2;
        let (first, second) = (x.narrow(2, 0, half), x.narrow(2, half, half));
        let turned = Tensor::f_cat(&[second.f_neg()?, first], -1)?;
        Ok(x.f_mul(&self.cos)?.f_add(&turned.f_mul(&self.sin)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values made by running transformers 5.23; the fourth lies between the two bands.
    #[test]
    fn llama3_frequencies() {
        let config = RopeConfig {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 1024.0,
            },
        };
        let expected: [f32; 8] = [
            1.0,
            1.939_227_6e-1,
            3.760_603e-2,
            1.312_569_5e-3,
            1.767_766_8e-4,
            3.428_102_4e-5,
            6.647_869_7e-6,
            1.289_173_2e-6,
        ];
        for (got, want) in config.frequencies(16).iter().zip(expected) {
            assert!((got / want - 1.0).abs() < 1e-6, "{got} is not {want}");
        }
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let scaled = RopeScaling::Linear { factor: 4.0 };
        assert_eq!(scaled.apply(0.5), 0.125);
    }
}
