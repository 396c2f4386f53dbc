//! Options of the critic-free trainer.

mod methods;
mod validate;

use rlhf_core::GenerationConfig;
use rlhf_scale::{Schedule, UpdateConfig};
use serde::{Deserialize, Serialize};

use super::aggregation::Aggregation;
use super::choices::{AdvantageScale, Baseline, KlPenalty, Objective, RatioLevel, RewardMix};
use super::off_policy::{Excess, OffPolicy};
use crate::microbatching::Microbatching;
use crate::{LengthPenalty, MissingEos, OldLogprobs};

/// What becomes of answers that were cut at the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncated {
    /// They are learnt from like any other.
    #[default]
    Learn,
    /// They count in their group's baseline, but no token of theirs in the loss: whether an
    /// unfinished answer was on the right way is not known (DAPO's overlong filtering).
    Mask,
}

/// Sampling until there are enough prompts whose answers differ in score (DAPO, section 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DynamicSampling {
    /// Rounds of sampling, the first included, after which a step makes do with what it has.
    pub max_rounds: usize,
}

/// Options of a [`GrpoTrainer`](crate::GrpoTrainer): a field for each choice, and a constructor
/// for each set of choices that has a name.
///
/// | | baseline | scale | ratio | objective | aggregation | KL |
/// |---|---|---|---|---|---|---|
/// | [`grpo`](Self::grpo) | group's mean | group | token | 0.2 | sequence mean | in the loss, k3, 0.04 |
/// | [`trl`](Self::trl), the default | group's mean | group | token | 0.2 | global tokens | none |
/// | [`rloo`](Self::rloo) | leave one out | none | product | 0.2 | sequence mean | in the reward, k1, 0.05 |
/// | [`dapo`](Self::dapo) | group's mean | group | token | 0.2, 0.28 | global tokens | none |
/// | [`dr_grpo`](Self::dr_grpo) | group's mean | none | token | 0.2 | constant | none |
/// | [`bnpo`](Self::bnpo) | group's mean | group | token | 0.2 | local tokens | none |
/// | [`gspo`](Self::gspo) | group's mean | group | geometric mean | 3e-4, 4e-4 | sequence mean | none |
/// | [`cispo`](Self::cispo) | group's mean | group | token | detached weight up to 5 | global tokens | none |
/// | [`reinforce_plus_plus_baseline`](Self::reinforce_plus_plus_baseline) | group's mean | whitened | token | 0.2 | global tokens | in the loss, k2, 0.01 |
///
/// The constructors choose the method; sizes, learning rate and sampling are those of
/// [`trl`](Self::trl) everywhere, to be set for the task. `generation.stop_token_ids` must be set:
/// without it no answer ever counts as finished.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GrpoConfig {
    /// Everything random follows from it: sampling, the order of prompts and of minibatches.
    pub seed: u64,
    /// Prompts of a step of [`train`](crate::GrpoTrainer::train), each with
    /// `generation.samples_per_prompt` answers.
    pub batch_size: usize,
    /// Passes over a rollout.
    pub num_iterations: usize,
    /// Optimiser steps in a pass. Answers to one prompt are in one minibatch.
    pub minibatches: usize,
    /// Answers in one forward pass; those to one prompt share its computation. Changes memory and
    /// speed, not what is computed.
    pub microbatch_size: usize,
    /// Most tokens of a forward pass, a shared prompt counted once; `None` for no bound but
    /// `microbatch_size`.
    pub microbatch_tokens: Option<usize>,
    /// What a reward is compared with.
    pub baseline: Baseline,
    /// What advantages are divided by.
    pub scale: AdvantageScale,
    /// How several rewards become advantages.
    pub mix: RewardMix,
    /// What has one ratio.
    pub ratio: RatioLevel,
    /// What of an answer is made likelier, and what keeps the policy close to the one that wrote
    /// it.
    pub objective: Objective,
    /// What the sum over tokens is divided by.
    pub aggregation: Aggregation,
    /// The price of moving away from the reference.
    pub kl: KlPenalty,
    /// Correction for answers sampled with other arithmetic than they are trained with.
    pub off_policy: OffPolicy,
    /// What becomes of answers that were cut at the limit.
    pub truncated: Truncated,
    /// What becomes of the reward of an answer without a stop token.
    pub missing_eos: MissingEos,
    /// What an answer's length costs.
    pub length_penalty: Option<LengthPenalty>,
    /// Prompts whose answers all score the same are dropped, and others sampled in their place.
    pub dynamic_sampling: Option<DynamicSampling>,
    /// Rewards count within these bounds, before any KL is taken off.
    pub reward_clip: Option<(f64, f64)>,
    /// Whether a reward model may leave an answer without a score, by saying NaN: that reward then
    /// counts as nothing, and an answer without any is left out. Otherwise NaN is an error.
    pub unscored: Unscored,
    /// Where old log-probabilities come from. Where a rollout is used for one optimiser step,
    /// `Recomputed` costs nothing: they are the new ones.
    pub old_logprobs: OldLogprobs,
    /// How answers are written. **Its temperature is that of all log-probabilities.** Top-k, top-p,
    /// min-p and `min_new_tokens` are replayed: which tokens they left at each step is kept, and
    /// all log-probabilities are those within these sets, so that ratios are exact.
    pub generation: GenerationConfig,
    /// Optimiser, schedule and clipping of gradients.
    pub update: UpdateConfig,
}

/// What a NaN of a reward model means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unscored {
    /// A mistake.
    #[default]
    Error,
    /// That the model does not judge such answers: a verifier of programs asked about a poem.
    LeaveOut,
}

impl Default for GrpoConfig {
    /// [`GrpoConfig::trl`].
    fn default() -> Self {
        Self::trl()
    }
}

impl GrpoConfig {
    /// The same with truncated importance weights for every answer, capped at 3: for rollouts in
    /// 16 bits, or of another engine.
    pub fn corrected(mut self) -> Self {
        self.off_policy = OffPolicy::Sequences {
            cap: 3.0,
            excess: Excess::Truncate,
        };
        self
    }

    /// The same with a learning rate that falls to 0, in a straight line, over `steps` steps of
    /// [`train`](crate::GrpoTrainer::train).
    pub fn annealed(mut self, steps: u64) -> Self {
        self.update.schedule = Schedule::linear(0, self.optimizer_steps(steps));
        self
    }

    /// Optimiser steps in `steps` steps of training: the unit of `update.schedule`.
    pub fn optimizer_steps(&self, steps: u64) -> u64 {
        steps * (self.num_iterations * self.minibatches) as u64
    }

    /// Answers to each prompt, `G`.
    pub fn group_size(&self) -> usize {
        self.generation.samples_per_prompt
    }

    /// The temperature of sampling and of all log-probabilities.
    pub fn temperature(&self) -> f64 {
        self.generation.sampling.temperature
    }

    pub(crate) fn microbatching(&self) -> Microbatching {
        Microbatching {
            sequences: self.microbatch_size,
            tokens: self.microbatch_tokens,
        }
    }

    /// Whether a rollout is used for one optimiser step only, so that the policy that is trained
    /// is the one that wrote the answers.
    pub(crate) fn one_step(&self) -> bool {
        self.num_iterations == 1 && self.minibatches == 1
    }
}
