//! How the losses of tokens become one number.

use rlhf_core::{Error, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// What the sum over tokens is divided by. Answers that take no part count nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Mean over each answer's tokens, then over the answers: a token of a long answer weighs
    /// less (GRPO).
    SequenceMean,
    /// Mean over the tokens of the optimiser step, which weigh the same (BNPO).
    LocalTokens,
    /// Mean over the tokens of the whole rollout: `Σ / (tokens / minibatches)`, so that a token
    /// weighs the same whichever minibatch it is in (DAPO). With one minibatch this is
    /// [`LocalTokens`](Self::LocalTokens).
    GlobalTokens,
    /// `Σ / (answers · max_new_tokens)`: no length of any answer is in the denominator
    /// (Dr. GRPO, arXiv 2503.20783).
    Constant,
}

/// What [`token_weights`] reads.
#[derive(Debug)]
pub struct TokenWeightsInput<'a> {
    /// Tokens that take part, of the answers of a whole optimiser step. `[B, R]` bool.
    pub mask: &'a Tensor,
    /// Tokens that take part in the whole rollout.
    pub rollout_tokens: f64,
    /// Optimiser steps in a pass over the rollout.
    pub minibatches: f64,
    /// Most tokens that an answer may have.
    pub max_new_tokens: usize,
}

/// The weight of each answer's tokens in the loss of an optimiser step. The sum of
/// `weight · loss` over tokens is the loss, and may be taken in any parts: what a microbatch
/// contributes does not depend on what else is in it.
///
/// # Shapes
/// `[B]` f32, on the CPU; 0 for an answer of which no token takes part.
///
/// # Errors
/// [`Error::Empty`] if no token takes part.
pub fn token_weights(aggregation: Aggregation, input: &TokenWeightsInput<'_>) -> Result<Tensor> {
    let lengths = input
        .mask
        .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?
        .f_to_device(tch::Device::Cpu)?;
    let lengths = Vec::<f64>::try_from(lengths)?;
    let tokens: f64 = lengths.iter().sum();
    let answers = lengths.iter().filter(|n| **n > 0.0).count() as f64;
    if tokens == 0.0 {
        return Err(Error::Empty {
            what: "the minibatch",
            help: "a mean needs at least one token; leave the minibatch out",
        });
    }
    let weight = |length: f64| match aggregation {
        _ if length == 0.0 => 0.0,
        Aggregation::SequenceMean => 1.0 / (length * answers),
        Aggregation::LocalTokens => 1.0 / tokens,
        Aggregation::GlobalTokens => input.minibatches / input.rollout_tokens,
        Aggregation::Constant => 1.0 / (answers * input.max_new_tokens as f64),
    };
    let weights: Vec<f64> = lengths.into_iter().map(weight).collect();
    Ok(Tensor::from_slice(&weights).to_kind(Kind::Float))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // Answers of 3, 1 and 0 tokens; a rollout of 20 tokens in 4 minibatches.
        let mask = Tensor::from_slice2(&[
            [true, true, true],
            [true, false, false],
            [false, false, false],
        ]);
        let weights = |aggregation| {
            let input = TokenWeightsInput {
                mask: &mask,
                rollout_tokens: 20.0,
                minibatches: 4.0,
                max_new_tokens: 5,
            };
            Vec::<f64>::try_from(token_weights(aggregation, &input).unwrap()).unwrap()
        };
        for (aggregation, want) in [
            (Aggregation::SequenceMean, [1.0 / 6.0, 1.0 / 2.0, 0.0]),
            (Aggregation::LocalTokens, [0.25, 0.25, 0.0]),
            (Aggregation::GlobalTokens, [0.2, 0.2, 0.0]),
            (Aggregation::Constant, [0.1, 0.1, 0.0]),
        ] {
            for (got, want) in weights(aggregation).into_iter().zip(want) {
                assert!((got - want).abs() < 1e-7, "{aggregation:?}: {got}, {want}");
            }
        }
    }

    #[test]
    fn no_token_is_an_error() {
        let mask = Tensor::from_slice2(&[[false]]);
        let input = TokenWeightsInput {
            mask: &mask,
            rollout_tokens: 0.0,
            minibatches: 1.0,
            max_new_tokens: 1,
        };
        let weights = token_weights(Aggregation::Constant, &input);
        assert!(matches!(weights, Err(Error::Empty { .. })));
    }
}
