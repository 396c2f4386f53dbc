//! Answers with everything that an update needs to know about them.

use rlhf_core::{Completions, KeptTokens, SequenceBatch};
use tch::{Kind, Tensor};

use crate::Multiplier;

/// Several answers to each prompt, judged and turned into advantages. The answers to one prompt
/// are neighbours.
///
/// All tensors are on the CPU, detached, `[B, R]` with `R` the longest answer.
#[derive(Debug)]
pub struct GroupRollout {
    /// Prompts and answers.
    pub completions: Completions,
    /// Answers to each prompt, `G`.
    pub group_size: usize,
    /// Which answers take part in the update: not those without a score, not those that a
    /// constraint forbids, not those that were cut where
    /// [`Truncated::Mask`](crate::Truncated::Mask) says so.
    pub used: Vec<bool>,
    /// The tokens that take part. Bool.
    pub mask: Tensor,
    /// What each reward model said, in the order of the trainer's, one number for each answer.
    pub scores: Vec<Vec<f64>>,
    /// What each constraint's model said, in the order of the trainer's, one number for each
    /// answer.
    pub costs: Vec<Vec<f64>>,
    /// The constraint that keeps the whole batch out of the update.
    pub skipped_by: Option<String>,
    /// The price of each constraint that has one, these answers taken in.
    pub(crate) multipliers: Vec<Option<Multiplier>>,
    /// The weighted sums of the scores, clipped, with the penalties of length and of a missing
    /// EOS, less a KL penalty in the reward and the price of the costs.
    pub rewards: Vec<f64>,
    /// One for each answer.
    pub advantages: Vec<f64>,
    /// Deviation of each group's rewards.
    pub group_std: Vec<f64>,
    /// Log-probabilities under the policy that wrote the answers, nats, by the trainer's
    /// arithmetic. `None` where one optimiser step follows: they are the first that it computes.
    pub old_logprobs: Option<Tensor>,
    /// Log-probabilities under the reference, nats.
    pub ref_logprobs: Option<Tensor>,
    /// Log-probabilities that the answers were sampled with, where the sampler said them.
    pub sampling_logprobs: Option<Tensor>,
    /// Prompts that were sampled for this rollout, and how many of them were dropped because
    /// their answers all scored the same.
    pub prompts: SampledPrompts,
}

/// What dynamic sampling did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampledPrompts {
    /// Prompts that were answered.
    pub sampled: usize,
    /// Those of them that are not in the rollout.
    pub dropped: usize,
    /// Rounds of sampling.
    pub rounds: usize,
}

impl GroupRollout {
    /// Number of answers, `B`.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.used.len()
    }

    /// Number of prompts.
    pub fn groups(&self) -> usize {
        self.len() / self.group_size
    }

    /// The answers to these prompts that take part in the update, in order.
    pub fn used_rows(&self, groups: &[usize]) -> Vec<usize> {
        let mut rows: Vec<usize> = groups
            .iter()
            .flat_map(|group| group * self.group_size..(group + 1) * self.group_size)
            .filter(|&row| self.used[row])
            .collect();
        rows.sort_unstable();
        rows
    }

    /// Tokens that take part.
    pub fn tokens(&self) -> f64 {
        self.mask.sum(Kind::Double).double_value(&[])
    }

    /// The divergence from the reference in nats **per sequence**, estimated by k1, over all
    /// answers, used or not; `None` where either log-probability is not known.
    pub fn kl_per_sequence(&self) -> Option<f64> {
        let (old, reference) = (self.old_logprobs.as_ref()?, self.ref_logprobs.as_ref()?);
        let sum = (old - reference).sum(Kind::Double).double_value(&[]);
        Some(sum / self.len() as f64)
    }

    /// The part of the rollout that one forward pass trains on, cut to its longest answer.
    /// `weights` has the weights of the tokens of each of these rows.
    pub(crate) fn microbatch(
        &self,
        rows: &[usize],
        weights: &[RowWeights],
    ) -> rlhf_core::Result<Microbatch> {
        let batch = self.completions.batch.select(rows)?;
        let width = batch.max_response_len() as i64;
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let index = Tensor::from_slice(&index);
        let cut = |t: &Tensor| t.narrow(1, 0, width).index_select(0, &index);
        let kept = self.completions.kept.as_ref();
        let floats = |numbers: Vec<f64>| Tensor::from_slice(&numbers).to_kind(Kind::Float);
        Ok(Microbatch {
            kept: kept.map(|kept| rows.iter().map(|&row| kept[row].clone()).collect()),
            mask: cut(&self.mask),
            old_logprobs: self.old_logprobs.as_ref().map(cut),
            ref_logprobs: self.ref_logprobs.as_ref().map(cut),
            sampling_logprobs: self.sampling_logprobs.as_ref().map(cut),
            advantages: floats(rows.iter().map(|&row| self.advantages[row]).collect()),
            loss_weights: floats(weights.iter().map(|w| w.loss).collect()),
            stat_weights: floats(weights.iter().map(|w| w.stat).collect()),
            batch,
        })
    }
}

/// The weight of each of an answer's tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowWeights {
    /// In the loss.
    pub(crate) loss: f64,
    /// In the statistics of ratios: a mean over what has a ratio.
    pub(crate) stat: f64,
}

/// Rows of a [`GroupRollout`].
pub(crate) struct Microbatch {
    pub(crate) batch: SequenceBatch,
    /// What filters left to draw from, where there were any.
    pub(crate) kept: Option<Vec<KeptTokens>>,
    pub(crate) mask: Tensor,
    pub(crate) old_logprobs: Option<Tensor>,
    pub(crate) ref_logprobs: Option<Tensor>,
    pub(crate) sampling_logprobs: Option<Tensor>,
    pub(crate) advantages: Tensor,
    pub(crate) loss_weights: Tensor,
    pub(crate) stat_weights: Tensor,
}
