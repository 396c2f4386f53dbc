//! Where the values come from: a model of its own, or a head on the policy's trunk.

use rlhf_core::{
    ActorCritic, KeptTokens, LogprobOptions, Parameters, Policy, SequenceBatch, TokenLogprobs,
    ValueModel,
};
use tch::Tensor;

/// The critic of a policy of type `P`. Every [`ValueModel`] is one; [`OnPolicy`] stands for a
/// policy that is its own critic.
pub trait Critic<P: ?Sized>: Parameters + Send {
    /// Values of the states along each response: see [`ValueModel::values`]. `[B, R + 1]` f32.
    ///
    /// # Errors
    /// Those of [`ValueModel::values`].
    fn values_with(&self, policy: &P, batch: &SequenceBatch) -> rlhf_core::Result<Tensor>;

    /// Log-probabilities, within kept sets where there are any, and values: in one forward pass
    /// where the two share a trunk.
    ///
    /// # Errors
    /// Those of [`Policy::logprobs_within`] and [`ValueModel::values`].
    fn scores_with(
        &self,
        policy: &P,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<(TokenLogprobs, Tensor)>;

    /// As [`Policy::disable_dropout`].
    fn disable_dropout(&mut self) {}

    /// Whether log-probabilities and values come from one forward pass.
    fn shares_trunk(&self) -> bool {
        false
    }
}

/// Log-probabilities, within kept sets where there are any.
pub(crate) fn logprobs<P: Policy + ?Sized>(
    policy: &P,
    batch: &SequenceBatch,
    kept: Option<&[KeptTokens]>,
    options: &LogprobOptions,
) -> rlhf_core::Result<TokenLogprobs> {
    match kept {
        Some(kept) => policy.logprobs_within(batch, kept, options),
        None => policy.logprobs(batch, options),
    }
}

impl<P: Policy + ?Sized, V: ValueModel> Critic<P> for V {
    fn values_with(&self, _: &P, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        ValueModel::values(self, batch)
    }

    fn scores_with(
        &self,
        policy: &P,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<(TokenLogprobs, Tensor)> {
        let scores = logprobs(policy, batch, kept, options)?;
        Ok((scores, ValueModel::values(self, batch)?))
    }

    fn disable_dropout(&mut self) {
        ValueModel::disable_dropout(self);
    }
}

/// The critic of a policy that values states itself ([`ActorCritic`]): give it to
/// [`PpoTrainer::new`](crate::PpoTrainer::new) in the place of a value model.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnPolicy;

/// None of its own: they are the policy's.
impl Parameters for OnPolicy {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }
}

impl<P: ActorCritic> Critic<P> for OnPolicy {
    fn values_with(&self, policy: &P, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        policy.state_values(batch)
    }

    fn scores_with(
        &self,
        policy: &P,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<(TokenLogprobs, Tensor)> {
        policy.logprobs_and_values(batch, kept, options)
    }

    fn shares_trunk(&self) -> bool {
        true
    }
}
