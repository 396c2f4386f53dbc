//! What a response's length costs.

use rlhf_core::{Error, SequenceBatch};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// A penalty on long responses, taken off their scores.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LengthPenalty {
    /// `coef` for every response token past the first `free`.
    PerToken {
        /// Score a token.
        coef: f64,
        /// Tokens that cost nothing.
        free: usize,
    },
    /// DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, equation 13): nothing up
    /// to `max_new_tokens − buffer` tokens, from there in a straight line to `max` at
    /// `max_new_tokens`.
    SoftOverlong {
        /// Length of the last stretch, tokens.
        buffer: usize,
        /// The penalty at the end of it; 1 in the paper.
        max: f64,
    },
}

impl LengthPenalty {
    /// Fails for numbers that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], naming the field.
    pub fn validate(&self, max_new_tokens: usize) -> rlhf_core::Result<()> {
        let (field, value) = match *self {
            Self::PerToken { coef, .. } => ("length_penalty.coef", coef),
            Self::SoftOverlong { max, buffer } => {
                if buffer == 0 || buffer > max_new_tokens {
                    let reason = "between 1 and generation.max_new_tokens";
                    return Err(Error::config("length_penalty.buffer", buffer, reason));
                }
                ("length_penalty.max", max)
            }
        };
        match value.is_finite() && value >= 0.0 {
            true => Ok(()),
            false => Err(Error::config(field, value, "a number that is not negative")),
        }
    }

    /// The penalty of a response of `tokens` tokens, 0 or more.
    pub fn of(&self, tokens: usize, max_new_tokens: usize) -> f64 {
        match *self {
            Self::PerToken { coef, free } => coef * tokens.saturating_sub(free) as f64,
            Self::SoftOverlong { buffer, max } => {
                let over = tokens.saturating_sub(max_new_tokens.saturating_sub(buffer));
                max * (over.min(buffer) as f64 / buffer.max(1) as f64)
            }
        }
    }

    /// The penalty of each response. `[B]` f32 on the CPU.
    pub fn of_batch(&self, batch: &SequenceBatch, max_new_tokens: usize) -> Tensor {
        let lengths = batch.sequences().iter().map(|s| s.response.len());
        let penalties: Vec<f64> = lengths.map(|n| self.of(n, max_new_tokens)).collect();
        Tensor::from_slice(&penalties).to_kind(Kind::Float)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let per_token = LengthPenalty::PerToken { coef: 0.5, free: 2 };
        assert_eq!(
            [0, 2, 3, 6].map(|n| per_token.of(n, 6)),
            [0.0, 0.0, 0.5, 2.0]
        );
        let soft = LengthPenalty::SoftOverlong {
            buffer: 4,
            max: 1.0,
        };
        // Texts from elsewhere may be longer than the policy's own.
        let got = [6, 7, 8, 10, 13].map(|n| soft.of(n, 10));
        assert_eq!(got, [0.0, 0.25, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn a_buffer_longer_than_a_response_is_refused() {
        let soft = LengthPenalty::SoftOverlong {
            buffer: 11,
            max: 1.0,
        };
        let message = soft.validate(10).unwrap_err().to_string();
        assert!(message.contains("length_penalty.buffer"), "{message}");
        let negative = LengthPenalty::PerToken {
            coef: -0.1,
            free: 0,
        };
        assert!(negative.validate(10).is_err());
    }
}
