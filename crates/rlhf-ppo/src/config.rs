//! Options of PPO.

mod profiles;
mod validate;

use rlhf_core::GenerationConfig;
use rlhf_scale::{Schedule, UpdateConfig};
use serde::{Deserialize, Serialize};

use crate::microbatching::Microbatching;
use crate::{
    Clip, KlControl, KlEstimator, LengthPenalty, MissingEos, PtxConfig, PtxStep, RolloutCorrection,
    ScorePosition, ScoreScaling, UpdateGuards, Whitening,
};

/// Where the log-probabilities that ratios are taken against come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OldLogprobs {
    /// From a forward pass over the finished responses, as all known implementations do: the
    /// same arithmetic as in the update, so that the first ratios are 1.
    Recomputed,
    /// Those that the tokens were sampled with: spares a forward pass of the policy. Completions
    /// that bring none are recomputed.
    Sampled,
}

/// Where the penalty for diverging from the reference is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlPlacement {
    /// Off the reward of each token: a return holds the divergence that is still to come
    /// (Ziegler et al. 2019, and every PPO since).
    #[default]
    Reward,
    /// On the loss: `kl_coef` times the token mean of the estimate between the policy being
    /// trained and the reference (Shao et al. 2024, arXiv 2402.03300). The gradient is the
    /// estimator's: see [`KlEstimator`].
    Loss,
}

/// What divides the logits before log-probabilities are taken of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogprobTemperature {
    /// The temperature of sampling: what is trained is what is sampled from (lm-human-preferences,
    /// Huang et al. 2024, TRL, OpenRLHF).
    #[default]
    OfSampling,
    /// 1 (DeepSpeed-Chat, Safe RLHF). At another temperature of sampling the ratios are then not
    /// those of the distribution that was sampled from.
    One,
}

/// What minibatches are cut by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MinibatchUnit {
    /// Numbers of samples that differ by at most one.
    #[default]
    Samples,
    /// Nearly equal numbers of response tokens, so that a step's mean is over as many tokens as
    /// the next one's. Samples stay whole.
    Tokens,
}

/// Options of a [`PpoTrainer`](crate::PpoTrainer).
///
/// The default is [`n_plus`](Self::n_plus); docs/numerics.md of the project compares the profiles. `generation.stop_token_ids` is the one thing that
/// must be set: without it no response ever counts as finished.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PpoConfig {
    /// Everything random follows from it: sampling, the order of prompts and of minibatches.
    pub seed: u64,
    /// Prompts of a step of [`train`](crate::PpoTrainer::train).
    pub batch_size: usize,
    /// Passes over a rollout.
    pub ppo_epochs: usize,
    /// Optimiser steps in a pass.
    pub minibatches: usize,
    /// What the minibatches of a pass have the same number of.
    pub minibatch_unit: MinibatchUnit,
    /// Most sequences in one forward pass. Changes memory and speed, not what is computed. Where one pass
    /// takes the whole batch, and `minibatches` is 1, the pass that values a rollout is the first of its
    /// update, which saves one.
    pub microbatch_size: usize,
    /// Most tokens in one forward pass, prompts included; a longer sequence goes alone. Changes
    /// memory and speed, not what is computed. `None` for no bound but `microbatch_size`.
    pub microbatch_tokens: Option<usize>,
    /// Ratios count within `1 ± cliprange`.
    pub cliprange: f64,
    /// Bounds the loss of a token with a negative advantage: see [`Clip::dual`].
    pub dual_clip: Option<f64>,
    /// Values count within `old ± cliprange_value`.
    pub cliprange_value: f64,
    /// Weight of the value loss beside the policy loss.
    pub vf_coef: f64,
    /// Weight of an entropy bonus, in loss per nat.
    pub entropy_coef: f64,
    /// Discount.
    pub gamma: f64,
    /// Decay of generalised advantage estimation.
    pub lam: f64,
    /// The KL penalty's coefficient.
    pub kl_control: KlControl,
    /// How the KL of a token is estimated, in the penalty and in the statistics.
    pub kl_estimator: KlEstimator,
    /// Estimates of the KL of a token count within plus and minus this, nats; OpenRLHF and verl
    /// have 10 for their `k3`. In a loss, what is outside has no gradient.
    pub kl_clamp: Option<f64>,
    /// Whether the KL penalty is part of the reward or of the loss.
    pub kl_placement: KlPlacement,
    /// Which step of an episode receives the score.
    pub score_position: ScorePosition,
    /// Whether scores are brought to the scale of those seen so far.
    pub score_scaling: ScoreScaling,
    /// Scores count within plus and minus this; after scaling.
    pub score_clip: Option<f64>,
    /// What becomes of the score of a response without a stop token; after clipping.
    pub missing_eos: MissingEos,
    /// What a response's length takes off its score; after the missing-EOS rule.
    pub length_penalty: Option<LengthPenalty>,
    /// The reward of a step, KL penalty included, counts within plus and minus this
    /// (Safe RLHF: 50).
    pub reward_clip: Option<f64>,
    /// Whitening of the rewards, which keeps their mean.
    pub whiten_rewards: Whitening,
    /// Whitening of the advantages, to mean 0.
    pub whiten_advantages: Whitening,
    /// Where old log-probabilities come from.
    pub old_logprobs: OldLogprobs,
    /// What is done about a sampler whose log-probabilities are not the trainer's.
    pub rollout_correction: RolloutCorrection,
    /// What divides the logits of all log-probabilities: old, new and reference.
    pub logprob_temperature: LogprobTemperature,
    /// When an optimiser step is not taken.
    pub guards: UpdateGuards,
    /// A share of language modelling in every update; needs
    /// [`with_pretraining`](crate::PpoTrainer::with_pretraining).
    pub ptx: Option<PtxConfig>,
    /// How responses are written. Top-k, top-p, min-p and `min_new_tokens` are replayed: which
    /// tokens they left at each step is kept, and all log-probabilities are those within these
    /// sets, so that ratios are exact.
    pub generation: GenerationConfig,
    /// Learning rate of the value model and of cost critics; `None` for the policy's.
    pub critic_lr: Option<f64>,
    /// Optimiser, schedule and clipping; one for policy and value model.
    pub update: UpdateConfig,
}

impl Default for PpoConfig {
    /// [`PpoConfig::n_plus`].
    fn default() -> Self {
        Self::n_plus()
    }
}

impl PpoConfig {
    /// The same with a learning rate that falls to 0, in a straight line, over `steps` steps of
    /// [`train`](crate::PpoTrainer::train).
    pub fn annealed(mut self, steps: u64) -> Self {
        self.update.schedule = Schedule::linear(0, self.optimizer_steps(steps));
        self
    }

    /// Optimiser steps in `steps` steps of training: the unit of `update.schedule`.
    pub fn optimizer_steps(&self, steps: u64) -> u64 {
        let separate = |ptx: &PtxConfig| ptx.step == PtxStep::Separate;
        let each = 1 + u64::from(self.ptx.as_ref().is_some_and(separate));
        steps * each * (self.ppo_epochs * self.minibatches) as u64
    }

    /// How far ratios count.
    pub fn clip(&self) -> Clip {
        Clip {
            dual: self.dual_clip,
            ..Clip::symmetric(self.cliprange)
        }
    }

    pub(crate) fn microbatching(&self) -> Microbatching {
        Microbatching {
            sequences: self.microbatch_size,
            tokens: self.microbatch_tokens,
        }
    }

    /// The temperature of all log-probabilities.
    pub fn temperature(&self) -> f64 {
        match self.logprob_temperature {
            LogprobTemperature::OfSampling => self.generation.sampling.temperature,
            LogprobTemperature::One => 1.0,
        }
    }
}
