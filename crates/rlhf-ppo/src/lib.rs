//! Proximal policy optimisation with constraints.

mod advantages;
mod config;
mod constraint;
mod error;
mod kl_control;
mod kl_estimator;
mod measure;
mod minibatch;
mod missing_eos;
mod order;
mod policy_loss;
mod rewards;
mod rollout;
mod state;
mod stats;
mod train;
mod trainer;
mod truncate;
mod value_loss;
mod whitening;

pub use advantages::{Gae, GaeInput, gae};
pub use config::{OldLogprobs, PpoConfig};
pub use constraint::Constraint;
pub use error::{Error, Result};
pub use kl_control::{KlControl, KlController};
pub use kl_estimator::KlEstimator;
pub use minibatch::MinibatchStats;
pub use missing_eos::MissingEos;
pub use policy_loss::{LOG_RATIO_LIMIT, PolicyLoss, PolicyLossInput, policy_loss};
pub use rewards::{ScorePosition, ShapedRewards, ShapedRewardsInput, shaped_rewards};
pub use rollout::Rollout;
pub use trainer::PpoTrainer;
pub use truncate::truncate_after_stop;
pub use value_loss::{ValueLoss, ValueLossInput, value_loss};
pub use whitening::Whitening;

pub use rlhf_core as core;
pub use rlhf_scale as scale;
pub use tch;
