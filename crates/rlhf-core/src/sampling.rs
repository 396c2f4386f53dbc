//! From next-token logits to tokens.
//!
//! The filters are those of `transformers`, with the same edge cases, and [`SamplingConfig`]
//! applies them in the same order: repetition penalty, banned tokens, temperature, top-k, top-p,
//! min-p. Each is a pure function on `[B, V]` f32 logits that writes `-inf` where a token may not
//! be drawn.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{Error, Result};

mod draw;
mod filters;

pub use draw::{Drawn, draw, greedy};
pub use filters::{ban_tokens, min_p, repetition_penalty, top_k, top_p};

/// How a token is chosen from the model's distribution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingConfig {
    /// Logits are divided by this. 0 takes the likeliest token every time.
    pub temperature: f64,
    /// Only the `k` likeliest tokens may be drawn; all that tie with the last of them may too.
    pub top_k: Option<usize>,
    /// Only the fewest tokens whose probabilities together reach this may be drawn
    /// (nucleus sampling, <https://arxiv.org/abs/1904.09751>).
    pub top_p: Option<f64>,
    /// Only tokens at least this fraction as likely as the likeliest may be drawn
    /// (<https://arxiv.org/abs/2407.01082>).
    pub min_p: Option<f64>,
    /// Positive logits of tokens that the sequence already holds, prompt included, are divided
    /// by this and negative ones multiplied (<https://arxiv.org/abs/1909.05858>). 1 changes
    /// nothing.
    pub repetition_penalty: f64,
}

impl Default for SamplingConfig {
    /// The model's own distribution: temperature 1 and no filter, the only setting under which
    /// sampled log-probs are the policy's own.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: 1.0,
        }
    }
}

impl SamplingConfig {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Whether the likeliest token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for the first field that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let fail = |field, value: f64, reason| Err(Error::config(field, value, reason));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let reason = "a positive number is needed, or 0 for the likeliest token";
            return fail("sampling.temperature", self.temperature, reason);
        }
        if self.top_k == Some(0) {
            let reason = "at least one token must remain; leave it out for no filter";
            return fail("sampling.top_k", 0.0, reason);
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return fail("sampling.top_p", p, "a number in (0, 1] is needed");
        }
        if let Some(p) = self.min_p.filter(|p| !(0.0..=1.0).contains(p)) {
            return fail("sampling.min_p", p, "a number in [0, 1] is needed");
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let reason = "a positive number is needed; 1 changes nothing";
            return fail(
                "sampling.repetition_penalty",
                self.repetition_penalty,
                reason,
            );
        }
        Ok(())
    }

    /// Temperature, top-k, top-p and min-p, in that order. With temperature 0 the logits are
    /// returned as they are: no filter removes the likeliest token.
    ///
    /// # Shapes
    /// `[B, V]` f32 to `[B, V]` f32.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn warp(&self, logits: &Tensor) -> Result<Tensor> {
        if self.is_greedy() {
            return Ok(logits.shallow_clone());
        }
        let mut logits = if self.temperature == 1.0 {
            logits.shallow_clone()
        } else {
            logits.f_div_scalar(self.temperature)?
        };
        if let Some(k) = self.top_k {
            logits = top_k(&logits, k)?;
        }
        if let Some(p) = self.top_p.filter(|&p| p < 1.0) {
            logits = top_p(&logits, p)?;
        }
        if let Some(p) = self.min_p.filter(|&p| p > 0.0) {
            logits = min_p(&logits, p)?;
        }
        Ok(logits)
    }

    /// Chooses one token a row from logits that [`warp`](Self::warp) returned.
    ///
    /// # Shapes
    /// `logits`: `[B, V]` f32; `uniforms`: one number in `[0, 1)` per row, not looked at when
    /// greedy.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] unless there is one number per row, and libtorch's own.
    pub fn choose(&self, logits: &Tensor, uniforms: &[f64]) -> Result<Drawn> {
        if self.is_greedy() {
            greedy(logits)
        } else {
            draw(logits, uniforms)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_config_names_the_field_that_is_wrong() {
        let base = SamplingConfig::default;
        let cases = [
            (
                SamplingConfig {
                    temperature: -1.0,
                    ..base()
                },
                "sampling.temperature",
            ),
            (
                SamplingConfig {
                    top_k: Some(0),
                    ..base()
                },
                "sampling.top_k",
            ),
            (
                SamplingConfig {
                    top_p: Some(0.0),
                    ..base()
                },
                "sampling.top_p",
            ),
            (
                SamplingConfig {
                    min_p: Some(1.5),
                    ..base()
                },
                "sampling.min_p",
            ),
            (
                SamplingConfig {
                    repetition_penalty: 0.0,
                    ..base()
                },
                "sampling.repetition_penalty",
            ),
        ];
        base().validate().unwrap();
        for (config, expected) in cases {
            let Err(Error::InvalidConfig { field, .. }) = config.validate() else {
                unreachable!("{config:?} passes")
            };
            assert_eq!(field, expected);
        }
    }
}
