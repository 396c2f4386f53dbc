//! The methods that have names.

use rlhf_core::GenerationConfig;
use rlhf_scale::{AdamWConfig, Schedule, UpdateConfig};

use super::{DynamicSampling, GrpoConfig, Truncated, Unscored};
use crate::grpo::aggregation::Aggregation;
use crate::grpo::choices::{
    AdvantageScale, Baseline, KlPenalty, KlWeight, Objective, RatioLevel, RewardMix,
};
use crate::grpo::off_policy::OffPolicy;
use crate::{KlEstimator, LengthPenalty, MissingEos, OldLogprobs};

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
}
