//! Cross-entropy of the tokens that count.

use rlhf_core::{Error as CoreError, check_same_shape, masked_sum};
use tch::Tensor;

use crate::Result;

/// What [`sft_loss`] reads.
#[derive(Debug, Clone, Copy)]
pub struct SftInputs<'a> {
    /// `[B, R]` f32: log-probabilities of the tokens, in nats.
    pub logprobs: &'a Tensor,
    /// `[B, R]` bool, `true` where there is a token.
    pub mask: &'a Tensor,
    /// `[B, R]` f32: how much each token counts; 1 if absent.
    pub weights: Option<&'a Tensor>,
}

/// Cross-entropy of tokens: `−Σ m w log p / denominator`.
///
/// For a whole batch `denominator` is the sum of the weights of its tokens (their number,
/// without weights), which makes the loss their weighted mean; for a microbatch it is the sum
/// *of the whole batch*, so that the losses of the microbatches add up to the batch's, and long
/// and short responses count token by token however they are split.
///
/// ```
/// use rlhf_sft::{SftInputs, sft_loss, tch::Tensor};
///
/// let inputs = SftInputs {
///     logprobs: &Tensor::from_slice2(&[[-1f32, -3.0], [-2.0, 0.0]]),
///     mask: &Tensor::from_slice2(&[[true, true], [true, false]]),
///     weights: None,
/// };
/// assert_eq!(sft_loss(inputs, 3.0)?.double_value(&[]), 2.0);
/// # Ok::<(), rlhf_sft::Error>(())
/// ```
///
/// # Errors
/// A shape mismatch; a denominator that is not a positive number: no token counts.
pub fn sft_loss(inputs: SftInputs<'_>, denominator: f64) -> Result<Tensor> {
    let logprobs = ("logprobs", inputs.logprobs);
    check_same_shape(("mask", inputs.mask), logprobs)?;
    if !(denominator.is_finite() && denominator > 0.0) {
        return Err(CoreError::config(
            "denominator",
            denominator,
            "the weights of the tokens must add up to a positive number",
        )
        .into());
    }
    let sum = match inputs.weights {
        Some(weights) => {
            check_same_shape(("weights", weights), logprobs)?;
            masked_sum(&(inputs.logprobs * weights), inputs.mask)
        }
        None => masked_sum(inputs.logprobs, inputs.mask),
    };
    Ok(-sum / denominator)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn weights_scale_tokens_and_masked_ones_are_never_seen() {
        let inputs = SftInputs {
            logprobs: &Tensor::from_slice2(&[[-1f32, -4.0], [-2.0, f32::NAN]]),
            mask: &Tensor::from_slice2(&[[true, true], [true, false]]),
            weights: Some(&Tensor::from_slice2(&[[0.5f32, 1.0], [1.0, 1.0]])),
        };
        let loss = sft_loss(inputs, 2.5).unwrap();
        assert!((loss.double_value(&[]) - 6.5 / 2.5).abs() < 1e-6);
    }

    #[test]
    fn wrong_inputs_are_errors() {
        let (logprobs, mask) = (
            Tensor::from_slice(&[-1f32]),
            Tensor::from_slice(&[true, true]),
        );
        let ragged = SftInputs {
            logprobs: &logprobs,
            mask: &mask,
            weights: None,
        };
        assert!(sft_loss(ragged, 1.0).is_err());
        let inputs = SftInputs {
            mask: &mask.narrow(0, 0, 1),
            ..ragged
        };
        assert!(sft_loss(inputs, 1.0).is_ok());
        assert!(sft_loss(inputs, 0.0).is_err());
    }
}
