//! Responses with everything that an update needs to know about them.

use rlhf_core::{Completions, SequenceBatch};
use tch::{Kind, Tensor};

/// A batch of responses, judged, scored and turned into advantages.
///
/// All tensors are on the CPU, detached; `R` is the longest response. What is outside
/// [`mask`](Self::mask) or [`value_mask`](Self::value_mask) is 0.
#[derive(Debug)]
pub struct Rollout {
    /// Prompts and responses.
    pub completions: Completions,
    /// The response tokens that exist. `[B, R]` bool.
    pub mask: Tensor,
    /// The steps of each episode, whose values are learnt: the tokens, and one more where the
    /// score comes [after the last token](crate::ScorePosition::AfterLastToken).
    /// `[B, R + 1]` bool.
    pub value_mask: Tensor,
    /// Which samples take part in the update: those that keep all constraints. One per sample.
    pub used: Vec<bool>,
    /// Log-probabilities under the policy, nats. `[B, R]` f32.
    pub logprobs: Tensor,
    /// Log-probabilities under the reference, nats. `[B, R]` f32.
    pub ref_logprobs: Tensor,
    /// Estimated divergence from the reference, nats. `[B, R]` f32.
    pub kl: Tensor,
    /// The coefficient that the rewards were computed with.
    pub kl_coef: f64,
    /// Values of the states before each token and after the last. `[B, R + 1]` f32.
    pub values: Tensor,
    /// What the reward model said. `[B]` f32.
    pub scores: Tensor,
    /// The scores after clipping and the rule for a missing EOS. `[B]` f32.
    pub final_scores: Tensor,
    /// What each constraint's model said, in the order of the trainer's constraints.
    /// `[B]` f32 each.
    pub costs: Vec<Tensor>,
    /// KL penalty and score of each step, whitened if that is configured. `[B, R + 1]` f32.
    pub rewards: Tensor,
    /// Advantages of the tokens, whitened if that is configured; 0 for samples that are not
    /// used. `[B, R]` f32.
    pub advantages: Tensor,
    /// What the values should have been. `[B, R + 1]` f32.
    pub returns: Tensor,
}

impl Rollout {
    /// Number of samples, `B`.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.used.len()
    }

    /// The samples that take part in the update.
    pub fn used_rows(&self) -> Vec<usize> {
        (0..self.len()).filter(|&row| self.used[row]).collect()
    }

    /// KL from the reference in nats **per sequence**: summed over each response, averaged over
    /// all of them, used or not.
    pub fn kl_per_sequence(&self) -> f64 {
        self.kl.sum(Kind::Double).double_value(&[]) / self.len() as f64
    }

    /// The part of the rollout that one forward pass trains on, cut to its longest response.
    pub(crate) fn microbatch(&self, rows: &[usize]) -> rlhf_core::Result<Microbatch> {
        let batch = self.completions.batch.select(rows)?;
        let width = batch.max_response_len() as i64;
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let index = Tensor::from_slice(&index);
        let cut = |t: &Tensor, width| t.narrow(1, 0, width).index_select(0, &index);
        Ok(Microbatch {
            mask: cut(&self.mask, width),
            old_logprobs: cut(&self.logprobs, width),
            advantages: cut(&self.advantages, width),
            value_mask: cut(&self.value_mask, width + 1),
            old_values: cut(&self.values, width + 1),
            returns: cut(&self.returns, width + 1),
            batch,
        })
    }
}

/// Rows of a [`Rollout`]: shapes as there.
pub(crate) struct Microbatch {
    pub(crate) batch: SequenceBatch,
    pub(crate) mask: Tensor,
    pub(crate) old_logprobs: Tensor,
    pub(crate) advantages: Tensor,
    pub(crate) value_mask: Tensor,
    pub(crate) old_values: Tensor,
    pub(crate) returns: Tensor,
}

impl Microbatch {
    pub(crate) fn tokens(&self) -> i64 {
        self.mask.sum(Kind::Int64).int64_value(&[])
    }

    pub(crate) fn states(&self) -> i64 {
        self.value_mask.sum(Kind::Int64).int64_value(&[])
    }
}
