//! Radians per position of each pair of dimensions.
//!
//! Computed in f32 with the operations of transformers in their order: at position 100,000 a
//! difference in a frequency's last bit is one of a hundredth of a radian.

use std::f64::consts::TAU;

use rlhf_core::Result;
use tch::{Device, Kind, Tensor};

use super::{RopeConfig, RopeScaling};

/// Those of a run whose longest sequence has `length` tokens, `[width / 2]` f32.
pub(super) fn frequencies(config: &RopeConfig, width: i64, length: i64) -> Result<Tensor> {
    let theta = match config.scaling {
        RopeScaling::Dynamic {
            factor,
            original_max_position_embeddings: original,
        } => {
            let length = (length as f64).max(original) as f32;
            let growth = factor as f32 * length / original as f32 - (factor - 1.0) as f32;
            let exponent = width as f64 / (width - 2) as f64;
            f64::from(config.theta as f32 * growth.powf(exponent as f32))
        }
        _ => config.theta,
    };
    let powers = powers(theta, width)?;
    let plain = powers.iter().map(|power| 1.0 / power);
    let scaled: Vec<f32> = match config.scaling {
        RopeScaling::Default | RopeScaling::Dynamic { .. } => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor as f32).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        } => plain
            .map(|frequency| {
                let wavelength = TAU as f32 / frequency;
                if wavelength < (original / high) as f32 {
                    frequency
                } else if wavelength > (original / low) as f32 {
                    frequency / factor as f32
                } else {
                    let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            })
            .collect(),
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            truncate,
            original_max_position_embeddings: original,
            attention_factor: _,
        } => {
            // The pair that turns so often over the original context.
            let pair = |turns: f64| {
                width as f64 * (original / (turns * TAU)).ln() / (2.0 * config.theta.ln())
            };
            let (mut first, mut last) = (pair(beta_fast), pair(beta_slow));
            if truncate {
                (first, last) = (first.floor(), last.ceil());
            }
            let (first, mut last) = (first.max(0.0), last.min((width - 1) as f64));
            if first == last {
                last += 0.001; // the ramp has a slope
            }
            powers
                .iter()
                .enumerate()
                .map(|(pair, power)| {
                    let ramp = (pair as f32 - first as f32) / (last - first) as f32;
                    let kept = 1.0 - ramp.clamp(0.0, 1.0);
                    let (divided, plain) = (1.0 / (factor as f32 * power), 1.0 / power);
                    divided * (1.0 - kept) + plain * kept
                })
                .collect()
        }
    };
    Ok(Tensor::from_slice(&scaled))
}

/// `theta^(2 i / width)` by libtorch, whose last bits are those of transformers.
fn powers(theta: f64, width: i64) -> Result<Vec<f32>> {
    let pairs = Tensor::f_arange_start_step(0, width, 2, (Kind::Float, Device::Cpu))?;
    let exponents = pairs.f_div_scalar(width)?;
    Ok(Vec::<f32>::try_from(&Tensor::f_pow_scalar(
        theta, &exponents,
    )?)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Fields;

    #[derive(serde::Deserialize)]
    struct Goldens {
        head_dim: i64,
        length: i64,
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        fields: serde_json::Value,
        frequencies: Vec<f32>,
        attention_factor: f64,
    }

    /// Values made by running transformers (scripts/make_rope_goldens.py).
    #[test]
    fn frequencies_of_every_type() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/rope.json");
        let goldens: Goldens = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for case in goldens.cases {
            let text = case.fields.to_string();
            let fields = Fields::parse(Path::new("config.json"), text.as_bytes()).unwrap();
            let context: Option<i64> = fields.get("max_position_embeddings").unwrap();
            let config = RopeConfig::from_fields(&fields, context.unwrap_or(128)).unwrap();
            // GPT-NeoX turns a part of a head.
            let width = 2 * case.frequencies.len() as i64;
            assert!(width <= goldens.head_dim);
            let got = frequencies(&config, width, goldens.length).unwrap();
            let got = Vec::<f32>::try_from(&got).unwrap();
            assert_eq!(got.len(), case.frequencies.len(), "{}", case.name);
            for (got, want) in got.iter().zip(&case.frequencies) {
                let error = (got / want - 1.0).abs();
                assert!(error < 5e-7, "{}: {got} is not {want}", case.name);
            }
            let factor = match config.scaling {
                RopeScaling::Yarn {
                    attention_factor, ..
                } => attention_factor,
                _ => 1.0,
            };
            assert!(
                (factor - case.attention_factor).abs() < 1e-12,
                "{}",
                case.name
            );
        }
    }
}
