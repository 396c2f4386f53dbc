//! Reinforcement learning without a critic: several answers to each prompt are each other's
//! baseline.
//!
//! What is called GRPO, RLOO, DAPO, Dr. GRPO, BNPO, GSPO or CISPO is one algorithm with other
//! choices; [`GrpoConfig`] has a field for each choice and a constructor for each name.

mod advantages;
mod aggregation;
mod choices;
mod collect;
mod config;
mod loss;
mod minibatch;
mod off_policy;
mod rewards;
mod rollout;
mod state;
mod stats;
mod trainer;

pub use advantages::{GroupAdvantages, GroupAdvantagesInput, STD_EPSILON, group_advantages};
pub use aggregation::{Aggregation, TokenWeightsInput, token_weights};
pub use choices::{
    AdvantageScale, Baseline, KlPenalty, KlWeight, Objective, RatioLevel, RewardMix,
};
pub use config::{DynamicSampling, GrpoConfig, Truncated, Unscored};
pub use loss::{GroupLoss, GroupLossInput, group_loss};
pub use minibatch::{GroupMinibatchStats, Mismatch};
pub use off_policy::{Excess, OffPolicy, importance_weights};
pub use rewards::{MixedRewards, mixed_rewards};
pub use rollout::{GroupRollout, SampledPrompts};
pub use trainer::GrpoTrainer;
