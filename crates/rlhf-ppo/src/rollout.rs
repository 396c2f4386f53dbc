//! Responses with everything that an update needs to know about them.

use std::cell::RefCell;

use rlhf_core::{Completions, KeptTokens, SequenceBatch};
use tch::{Kind, Tensor};

use crate::first_pass::FirstPass;
use crate::{Multiplier, RunningMoments, SamplerMismatch};

/// A batch of responses, judged, scored and turned into advantages.
///
/// All tensors are on the CPU, detached; `R` is the longest response. What is outside
/// [`mask`](Self::mask) or [`value_mask`](Self::value_mask) is 0.
///
/// Where the update will begin with one microbatch of all samples, a rollout also holds the activations of
/// the pass that valued them, until the update goes on from there or the rollout is dropped.
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
    /// Which samples take part in the update: those that keep all constraints that skip. One per
    /// sample.
    pub used: Vec<bool>,
    /// The constraint that keeps the whole batch out of the update.
    pub skipped_by: Option<String>,
    /// Log-probabilities under the policy, nats. `[B, R]` f32.
    pub logprobs: Tensor,
    /// Log-probabilities under the reference, nats. `[B, R]` f32.
    pub ref_logprobs: Tensor,
    /// How far the sampler was from `logprobs`, where it noted its own.
    pub mismatch: Option<SamplerMismatch>,
    /// Factor of each token's policy loss; `None` for 1. `[B, R]` f32.
    pub weights: Option<Tensor>,
    /// Estimated divergence from the reference, nats. `[B, R]` f32.
    pub kl: Tensor,
    /// The coefficient of the KL penalty.
    pub kl_coef: f64,
    /// Whether the penalty is part of `rewards`; else it is part of the loss.
    pub kl_in_reward: bool,
    /// Values of the states before each token and after the last. `[B, R + 1]` f32.
    pub values: Tensor,
    /// What the reward model said. `[B]` f32.
    pub scores: Tensor,
    /// The scores after scaling, clipping, the rule for a missing EOS, and penalties for length
    /// and cost. `[B]` f32.
    pub final_scores: Tensor,
    /// What each constraint's model said, in the order of the trainer's constraints, one number for
    /// each sample.
    pub costs: Vec<Vec<f64>>,
    /// KL penalty and score of each step, whitened if that is configured. `[B, R + 1]` f32.
    pub rewards: Tensor,
    /// Advantages of the tokens, those of the costs taken off, whitened if that is configured; 0
    /// for samples that are not used. `[B, R]` f32.
    pub advantages: Tensor,
    /// What the values should have been. `[B, R + 1]` f32.
    pub returns: Tensor,
    /// What each Lagrangian constraint's critic said and should have said.
    pub cost_estimates: Vec<CostEstimate>,
    /// The scale of the scores with these taken in, for the trainer to go on with.
    pub(crate) moments: RunningMoments,
    /// The pass that gave the values, with its activations, where the update begins with the same.
    pub(crate) first_pass: RefCell<Option<FirstPass>>,
}

/// A Lagrangian constraint's part of a [`Rollout`].
#[derive(Debug)]
pub struct CostEstimate {
    /// Which of the trainer's constraints it is.
    pub constraint: usize,
    /// Its multiplier, these completions taken in: the one of `advantages`.
    pub multiplier: Multiplier,
    /// Costs still to come, as the critic has it. `[B, R + 1]` f32.
    pub values: Tensor,
    /// What they should have been. `[B, R + 1]` f32.
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
        let part = self.completions.batch.select(rows)?;
        let width = part.max_response_len() as i64;
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let index = Tensor::from_slice(&index);
        let cut = |t: &Tensor, width| t.narrow(1, 0, width).index_select(0, &index);
        let kept = self.completions.kept.as_ref();
        Ok(Microbatch {
            mask: cut(&self.mask, width),
            old_logprobs: cut(&self.logprobs, width),
            ref_logprobs: cut(&self.ref_logprobs, width),
            weights: self.weights.as_ref().map(|weights| cut(weights, width)),
            advantages: cut(&self.advantages, width),
            value_mask: cut(&self.value_mask, width + 1),
            values: Targets {
                old: cut(&self.values, width + 1),
                returns: cut(&self.returns, width + 1),
            },
            costs: self
                .cost_estimates
                .iter()
                .map(|estimate| Targets {
                    old: cut(&estimate.values, width + 1),
                    returns: cut(&estimate.returns, width + 1),
                })
                .collect(),
            kept: kept.map(|kept| rows.iter().map(|&row| kept[row].clone()).collect()),
            batch: part,
        })
    }
}

/// Rows of a [`Rollout`]: shapes as there.
pub(crate) struct Microbatch {
    pub(crate) batch: SequenceBatch,
    pub(crate) kept: Option<Vec<KeptTokens>>,
    pub(crate) mask: Tensor,
    pub(crate) old_logprobs: Tensor,
    pub(crate) ref_logprobs: Tensor,
    pub(crate) weights: Option<Tensor>,
    pub(crate) advantages: Tensor,
    pub(crate) value_mask: Tensor,
    pub(crate) values: Targets,
    /// One for each Lagrangian constraint.
    pub(crate) costs: Vec<Targets>,
}

/// What a critic is to learn.
pub(crate) struct Targets {
    pub(crate) old: Tensor,
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
