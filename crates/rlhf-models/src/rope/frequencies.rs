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
            let length = (length as f64).max(original);
            let growth = factor * length / original - (factor - 1.0);
            config.theta * growth.powf(width as f64 / (width - 2) as f64)
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
        let got = Vec::<f32>::try_from(&frequencies(&config, 16, 0).unwrap()).unwrap();
        for (got, want) in got.iter().zip(expected) {
            assert!((got / want - 1.0).abs() < 1e-6, "{got} is not {want}");
        }
    }
}
