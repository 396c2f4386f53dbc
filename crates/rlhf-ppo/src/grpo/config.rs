//! Options of the critic-free trainer, and the methods that have names.

use rlhf_core::{Error, GenerationConfig};
use rlhf_scale::{AdamWConfig, Schedule, UpdateConfig};
use serde::{Deserialize, Serialize};

use super::aggregation::Aggregation;
use super::choices::{
    AdvantageScale, Baseline, KlPenalty, KlWeight, Objective, RatioLevel, RewardMix,
};
use super::off_policy::{Excess, OffPolicy};
use crate::microbatching::Microbatching;
use crate::{KlEstimator, LengthPenalty, MissingEos, OldLogprobs, Result};

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
    /// `GRPOTrainer` of TRL 1.16 at its defaults: eight answers a prompt at temperature 1, at most
    /// 256 tokens each; tokens weigh the same over the whole batch; no KL penalty; AdamW at 1e-6,
    /// gradients clipped to norm 1. This crate's tests hold it to TRL's numbers.
    pub fn trl() -> Self {
        Self {
            seed: 1,
            batch_size: 8,
            num_iterations: 1,
            minibatches: 1,
            microbatch_size: 8,
            microbatch_tokens: None,
            baseline: Baseline::GroupMean,
            scale: AdvantageScale::Group,
            mix: RewardMix::Sum,
            ratio: RatioLevel::Token,
            objective: Objective::symmetric(0.2),
            aggregation: Aggregation::GlobalTokens,
            kl: KlPenalty::None,
            off_policy: OffPolicy::Ignore,
            truncated: Truncated::Learn,
            missing_eos: MissingEos::Keep,
            length_penalty: None,
            dynamic_sampling: None,
            reward_clip: None,
            unscored: Unscored::Error,
            old_logprobs: OldLogprobs::Recomputed,
            generation: GenerationConfig {
                max_new_tokens: 256,
                samples_per_prompt: 8,
                ..GenerationConfig::default()
            },
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: 1e-6,
                    ..AdamWConfig::default()
                },
                schedule: Schedule::constant(),
                ..UpdateConfig::default()
            },
        }
    }

    /// Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300, equation 3): needs
    /// a reference.
    pub fn grpo() -> Self {
        Self {
            aggregation: Aggregation::SequenceMean,
            kl: KlPenalty::InLoss {
                kl_coef: 0.04,
                estimator: KlEstimator::K3,
                weight: KlWeight::Plain,
            },
            ..Self::trl()
        }
    }

    /// REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740) with the clipping and the
    /// coefficient of TRL's `RLOOTrainer`: needs a reference.
    pub fn rloo() -> Self {
        Self {
            baseline: Baseline::LeaveOneOut,
            scale: AdvantageScale::None,
            ratio: RatioLevel::SequenceProduct,
            aggregation: Aggregation::SequenceMean,
            kl: KlPenalty::InReward {
                kl_coef: 0.05,
                estimator: KlEstimator::K1,
            },
            ..Self::trl()
        }
    }

    /// Yu et al. 2025, arXiv 2503.14476, for answers of at most `max_new_tokens`: more room above
    /// than below, a soft penalty over the last fifth of the length, answers cut at the limit
    /// masked, and up to ten rounds of sampling for prompts whose answers differ.
    pub fn dapo(max_new_tokens: usize) -> Self {
        let mut config = Self {
            objective: Objective::asymmetric(0.2, 0.28),
            truncated: Truncated::Mask,
            length_penalty: Some(LengthPenalty::SoftOverlong {
                buffer: (max_new_tokens / 5).max(1),
                max: 1.0,
            }),
            dynamic_sampling: Some(DynamicSampling { max_rounds: 10 }),
            ..Self::trl()
        };
        config.generation.max_new_tokens = max_new_tokens;
        config
    }

    /// Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): neither a deviation nor a length divides
    /// anything.
    pub fn dr_grpo() -> Self {
        Self {
            scale: AdvantageScale::None,
            aggregation: Aggregation::Constant,
            ..Self::trl()
        }
    }

    /// A mean over the tokens of each optimiser step (TRL's `bnpo`).
    pub fn bnpo() -> Self {
        Self {
            aggregation: Aggregation::LocalTokens,
            ..Self::trl()
        }
    }

    /// Group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071, equation 5, and
    /// the ranges of section 5.1).
    pub fn gspo() -> Self {
        Self {
            ratio: RatioLevel::SequenceMean,
            objective: Objective::asymmetric(3e-4, 4e-4),
            aggregation: Aggregation::SequenceMean,
            ..Self::trl()
        }
    }

    /// CISPO (MiniMax 2025, arXiv 2506.13585, equation 4) without a lower bound, as there, and
    /// weights of at most 5, as TRL recommends after ScaleRL (arXiv 2510.13786).
    pub fn cispo() -> Self {
        Self {
            objective: Objective::DetachedWeight {
                low: 1.0,
                high: 4.0,
            },
            ..Self::trl()
        }
    }

    /// REINFORCE++ with the group's mean as its baseline (Hu et al. 2025, arXiv 2501.03262,
    /// section 3.2): needs a reference.
    pub fn reinforce_plus_plus_baseline() -> Self {
        Self {
            scale: AdvantageScale::Whitened,
            kl: KlPenalty::InLoss {
                kl_coef: 0.01,
                estimator: KlEstimator::K2,
                weight: KlWeight::Plain,
            },
            ..Self::trl()
        }
    }

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

    /// Checks every field.
    ///
    /// # Errors
    /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig) for the first field that makes no
    /// sense, alone or beside another.
    pub fn validate(&self) -> Result<()> {
        let check = |valid: bool, field, value: &dyn ToString, reason| match valid {
            true => Ok(()),
            false => Err(Error::config(field, value.to_string(), reason)),
        };
        for (field, value) in [
            ("batch_size", self.batch_size),
            ("num_iterations", self.num_iterations),
            ("minibatches", self.minibatches),
            ("microbatch_size", self.microbatch_size),
            ("microbatch_tokens", self.microbatch_tokens.unwrap_or(1)),
        ] {
            check(value > 0, field, &value, "at least 1 is needed")?;
        }
        self.generation.validate()?;
        let reason = "answers are each other's baseline: at least 2 are needed";
        let (field, size) = ("generation.samples_per_prompt", self.group_size());
        check(size >= 2, field, &size, reason)?;
        self.objective.validate()?;
        self.kl.validate()?;
        self.off_policy.validate()?;
        self.validate_rewards()?;
        if let Some(DynamicSampling { max_rounds }) = self.dynamic_sampling {
            let field = "dynamic_sampling.max_rounds";
            check(max_rounds > 0, field, &max_rounds, "at least 1 is needed")?;
        }
        let temperature = self.temperature();
        let reason = "answers must differ: a positive temperature is needed";
        let field = "generation.sampling.temperature";
        check(temperature > 0.0, field, &temperature, reason)?;
        let penalty = self.generation.sampling.repetition_penalty;
        let (field, reason) = (
            "generation.sampling.repetition_penalty",
            "must be 1: a penalty depends on what a sequence holds, and is not replayed",
        );
        check(penalty == 1.0, field, &penalty, reason)?;
        if self.old_logprobs == OldLogprobs::Sampled {
            let reason = "there is nothing to correct where old log-probabilities are the sampled";
            let corrected = self.off_policy != OffPolicy::Ignore;
            check(
                !corrected,
                "off_policy",
                &format!("{:?}", self.off_policy),
                reason,
            )?;
        }
        Ok(self.update.validate()?)
    }

    fn validate_rewards(&self) -> Result<()> {
        let fail = |field, value: &dyn ToString, reason| {
            Err(Error::config(field, value.to_string(), reason).into())
        };
        if let MissingEos::Replace(value) | MissingEos::Subtract(value) = self.missing_eos {
            if !value.is_finite() {
                return fail("missing_eos", &value, "a finite number");
            }
            if self.generation.stop_token_ids.is_empty() && self.generation.stop_strings.is_empty()
            {
                let reason = "needs generation.stop_token_ids, or no answer ever finishes; \
                              use MissingEos::Keep for a model without a stop token";
                return fail("missing_eos", &value, reason);
            }
        }
        if let Some(penalty) = &self.length_penalty {
            penalty.validate(self.generation.max_new_tokens)?;
        }
        if let Some((low, high)) = self.reward_clip
            && low.partial_cmp(&high) != Some(std::cmp::Ordering::Less)
        {
            return fail(
                "reward_clip",
                &format!("{low}, {high}"),
                "low must be below high",
            );
        }
        let on_the_sum = self.missing_eos != MissingEos::Keep
            || self.length_penalty.is_some()
            || self.reward_clip.is_some()
            || matches!(self.kl, KlPenalty::InReward { .. });
        if self.mix == RewardMix::NormalizeThenSum && on_the_sum {
            let reason = "has no summed reward for missing_eos, length_penalty, reward_clip or a KL \
                          penalty in the reward to act on: make each a reward of its own";
            return fail("mix", &"normalize_then_sum", reason);
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn all_methods_are_valid_and_survive_json() {
        for config in [
            GrpoConfig::default(),
            GrpoConfig::grpo(),
            GrpoConfig::rloo(),
            GrpoConfig::dapo(100).corrected(),
            GrpoConfig::dr_grpo(),
            GrpoConfig::bnpo(),
            GrpoConfig::gspo(),
            GrpoConfig::cispo(),
            GrpoConfig::reinforce_plus_plus_baseline(),
        ] {
            config.validate().unwrap();
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<GrpoConfig>(&text).unwrap(), config);
        }
        assert!(serde_json::from_str::<GrpoConfig>(r#"{"epsilon": 0.1}"#).is_err());
    }

    #[test]
    fn errors_name_the_field() {
        type BreakIt = fn(&mut GrpoConfig);
        let broken: [(&str, BreakIt); 12] = [
            ("num_iterations", |c| c.num_iterations = 0),
            ("samples_per_prompt", |c| {
                c.generation.samples_per_prompt = 1
            }),
            ("objective.low", |c| c.objective = Objective::symmetric(0.0)),
            ("objective.dual", |c| {
                c.objective = Objective::Surrogate(crate::Clip {
                    dual: Some(1.2),
                    ..crate::Clip::symmetric(0.2)
                });
            }),
            ("kl.kl_coef", |c| {
                c.kl = KlPenalty::InReward {
                    kl_coef: f64::NAN,
                    estimator: KlEstimator::K1,
                };
            }),
            ("off_policy.cap", |c| {
                c.off_policy = OffPolicy::Tokens {
                    cap: 0.5,
                    excess: Excess::Drop,
                };
            }),
            ("missing_eos", |c| c.missing_eos = MissingEos::Replace(-1.0)),
            ("length_penalty.buffer", |c| {
                c.length_penalty = Some(LengthPenalty::SoftOverlong {
                    buffer: 0,
                    max: 1.0,
                });
            }),
            ("max_rounds", |c| {
                c.dynamic_sampling = Some(DynamicSampling { max_rounds: 0 });
            }),
            ("reward_clip", |c| c.reward_clip = Some((1.0, -1.0))),
            ("mix", |c| {
                c.mix = RewardMix::NormalizeThenSum;
                c.reward_clip = Some((-1.0, 1.0));
            }),
            ("repetition_penalty", |c| {
                c.generation.sampling.repetition_penalty = 1.1;
            }),
        ];
        for (field, break_it) in broken {
            let mut config = GrpoConfig::default();
            break_it(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(field), "{message} does not name {field}");
        }
    }
}
