//! Reward models: Bradley-Terry comparisons and labelled texts.

mod error;
mod labelled;
mod normalize;
mod pairwise;

pub use error::{Error, Result};
pub use labelled::{classification_loss, regression_loss};
pub use normalize::{Normalized, ScoreNormalizer};
pub use pairwise::{
    PairwiseInputs, PairwiseLoss, PairwiseMetrics, pairwise_loss, pairwise_metrics,
};

pub use rlhf_core as core;
pub use rlhf_scale as scale;
pub use tch;
