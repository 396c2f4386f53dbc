//! The model that is trained: a distribution over the next token.

use tch::{Kind, Tensor};

use crate::logprobs::{TokenLogprobs, response_logprobs, response_logprobs_within};
use crate::{
    Decoder, Device, Error, KeptTokens, PaddedBatch, PaddingSide, Parameters, RecomputeDecoder,
    Result, SequenceBatch, check_same_shape, masked_sum,
};

/// What [`Policy::logprobs`] computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogprobOptions {
    /// Logits are divided by this before the softmax. 1 is the model's own distribution.
    pub temperature: f64,
    /// Whether the entropy of each token's distribution is wanted too.
    pub entropy: bool,
}

impl Default for LogprobOptions {
    /// The model's own distribution, no entropy.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            entropy: false,
        }
    }
}

impl LogprobOptions {
    /// Fails for a temperature that is not a positive number.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        if self.temperature.is_finite() && self.temperature > 0.0 {
            return Ok(());
        }
        Err(Error::config(
            "logprobs.temperature",
            self.temperature,
            "a positive number is needed",
        ))
    }
}

/// A language model that can be sampled from and trained.
///
/// [`logits`](Self::logits) is the one method that a model of one's own must write; the others
/// have defaults that are correct for any causal model, and that models override to be fast.
///
/// Gradients flow through [`logits`](Self::logits) and [`logprobs`](Self::logprobs) wherever the
/// caller has not switched them off (`tch::no_grad_guard`).
pub trait Policy: Parameters + Send {
    /// Next-token logits at every position of a padded batch. Positions whose
    /// `attention_mask` is `false` may hold anything finite.
    ///
    /// # Shapes
    /// `[B, T, V]`, any floating kind.
    ///
    /// # Errors
    /// Whatever the model finds wrong, wrapped by [`Error::model`] if it is not an [`Error`].
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor>;

    /// The device that batches are to be made on.
    fn device(&self) -> Device {
        self.named_parameters()
            .first()
            .map_or(Device::Cpu, |(_, t)| t.device())
    }

    /// Id that fills padded rows; any id of the vocabulary will do, since padding is masked.
    fn pad_token_id(&self) -> i64 {
        0
    }

    /// Most tokens of a sequence, prompt and response together; `None` if there is no limit.
    fn max_length(&self) -> Option<usize> {
        None
    }

    /// Log-probability (nats, f32) of every response token given all tokens before it.
    ///
    /// # Shapes
    /// `[B, R]`, see [`TokenLogprobs`].
    ///
    /// # Errors
    /// Those of [`logits`](Self::logits), [`LogprobOptions::validate`] and
    /// [`SequenceBatch::check_length`].
    fn logprobs(&self, batch: &SequenceBatch, options: &LogprobOptions) -> Result<TokenLogprobs> {
        options.validate()?;
        if let Some(max_length) = self.max_length() {
            batch.check_length(max_length)?;
        }
        let device = self.device();
        let padded = batch.padded(self.pad_token_id(), PaddingSide::Right, device);
        let logits = self.logits(&padded)?.f_to_kind(Kind::Float)?;
        response_logprobs(&logits, batch, options)
    }

    /// [`logprobs`](Self::logprobs) under the distribution over the tokens that a sampling filter
    /// kept at each step, which is what the response was drawn from: the same set for the policy
    /// of the rollout, the one being trained and the reference, so that their ratios are those of
    /// distributions over the same tokens.
    ///
    /// The default computes all logits; models override it with the fast path.
    ///
    /// # Errors
    /// Those of [`logprobs`](Self::logprobs) and [`check_kept`](crate::check_kept).
    fn logprobs_within(
        &self,
        batch: &SequenceBatch,
        kept: &[KeptTokens],
        options: &LogprobOptions,
    ) -> Result<TokenLogprobs> {
        options.validate()?;
        if let Some(max_length) = self.max_length() {
            batch.check_length(max_length)?;
        }
        let device = self.device();
        let padded = batch.padded(self.pad_token_id(), PaddingSide::Right, device);
        let logits = self.logits(&padded)?.f_to_kind(Kind::Float)?;
        response_logprobs_within(&logits, batch, kept, options)
    }

    /// Switches off whatever makes two forward passes differ, dropout above all. Trainers that
    /// compare the log-probabilities of two passes call it; a model without dropout has nothing
    /// to do.
    fn disable_dropout(&mut self) {}

    /// Negative log-likelihood of the responses, each token times its weight: `−Σ w log p`, a f32
    /// scalar in nats. What SFT minimises, and every sum of known multiples of log-probabilities.
    ///
    /// The default is a sum over [`logprobs`](Self::logprobs); models override it where gradients
    /// cost less when their factors are known in advance.
    ///
    /// # Shapes
    /// `weights`: `[B, R]` f32, without gradient; 1 if absent. What they are where there is no token
    /// does not matter.
    ///
    /// # Errors
    /// Those of [`logprobs`](Self::logprobs); weights of another shape.
    fn weighted_nll(&self, batch: &SequenceBatch, weights: Option<&Tensor>) -> Result<Tensor> {
        let scored = self.logprobs(batch, &LogprobOptions::default())?;
        let logprobs = match weights {
            Some(weights) => {
                check_same_shape(("weights", weights), ("logprobs", &scored.logprobs))?;
                scored.logprobs.f_mul(weights)?
            }
            None => scored.logprobs,
        };
        Ok(-masked_sum(&logprobs, &scored.mask))
    }

    /// A decoder for prompts and at most `max_new_tokens` tokens after each.
    ///
    /// The default computes the whole sequence again for every token; models override it with a
    /// KV cache.
    ///
    /// # Errors
    /// Whatever the model finds wrong.
    fn decoder(&self, max_new_tokens: usize) -> Result<Box<dyn Decoder + '_>> {
        let _ = max_new_tokens; // a cache would be sized by it
        Ok(Box::new(RecomputeDecoder::new(self)))
    }
}

impl<P: Policy + ?Sized> Policy for Box<P> {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        (**self).logits(batch)
    }
    fn device(&self) -> Device {
        (**self).device()
    }
    fn pad_token_id(&self) -> i64 {
        (**self).pad_token_id()
    }
    fn max_length(&self) -> Option<usize> {
        (**self).max_length()
    }
    fn logprobs(&self, batch: &SequenceBatch, options: &LogprobOptions) -> Result<TokenLogprobs> {
        (**self).logprobs(batch, options)
    }
    fn logprobs_within(
        &self,
        batch: &SequenceBatch,
        kept: &[KeptTokens],
        options: &LogprobOptions,
    ) -> Result<TokenLogprobs> {
        (**self).logprobs_within(batch, kept, options)
    }
    fn disable_dropout(&mut self) {
        (**self).disable_dropout();
    }
    fn weighted_nll(&self, batch: &SequenceBatch, weights: Option<&Tensor>) -> Result<Tensor> {
        (**self).weighted_nll(batch, weights)
    }
    fn decoder(&self, max_new_tokens: usize) -> Result<Box<dyn Decoder + '_>> {
        (**self).decoder(max_new_tokens)
    }
}
