//! Reward models: Bradley-Terry comparisons and labelled texts.
//!
//! A reward model is a [`Scorer`](core::Scorer) trained on what people said of a language model's
//! answers. [`RewardTrainer`] learns from comparisons, [`LabelTrainer`] from texts with classes or
//! scores; [`Normalized`] puts the result on the scale that PPO wants.
//!
//! Here is a scorer of our own, which is to learn that token 1 is better than token 0:
//!
//! ```
//! use rlhf_reward::core::{EpochConfig, Parameters, Preference, Result, Scorer, SequenceBatch};
//! use rlhf_reward::{RewardConfig, RewardTrainer};
//! use rlhf_reward::tch::{Device, Kind, Tensor};
//!
//! /// A reward for each token of the vocabulary; a response has the reward of its last.
//! struct LastToken {
//!     rewards: Tensor, // [V, 1]
//! }
//!
//! impl Parameters for LastToken {
//!     fn named_parameters(&self) -> Vec<(String, Tensor)> {
//!         vec![("rewards".into(), self.rewards.shallow_clone())]
//!     }
//! }
//!
//! impl Scorer for LastToken {
//!     fn scores(&self, batch: &SequenceBatch) -> Result<Tensor> {
//!         let packed = batch.packed(Device::Cpu);
//!         let last = packed.input_ids.index_select(0, &packed.last_rows());
//!         Ok(self.rewards.f_index_select(0, &last)?)
//!     }
//! }
//!
//! let rewards = Tensor::zeros([2, 1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
//! let mut config = RewardConfig::default();
//! config.update.optimizer.lr = 0.1;
//! let mut trainer = RewardTrainer::new(LastToken { rewards }, config)?;
//!
//! let pairs: Vec<_> = (0..64).map(|_| Preference::new([0], [1], [0])).collect();
//! let steps = trainer.train(&pairs, &EpochConfig::default(), &mut [])?;
//! let report = trainer.evaluate(&pairs)?;
//! assert_eq!((steps, report.accuracy), (8, 1.0));
//! # Ok::<(), rlhf_reward::Error>(())
//! ```
//!
//! # Which crate do I need?
//!
//! This one to train the judge; `rlhf-ppo` to train a policy against it; `rlhf-dpo` to learn from
//! comparisons without a judge. `rlhf-models` has scorers made from Hugging Face checkpoints.

mod error;
mod label;
mod label_loss;
mod label_trainer;
mod normalize;
mod pairwise;
pub mod rouge;
mod trainer;

pub use error::{Error, Result};
pub use label::{Label, Labelled, LabelledBatch};
pub use label_loss::{classification_loss, regression_loss};
pub use label_trainer::{LabelConfig, LabelEvaluation, LabelTrainer};
pub use normalize::{Normalized, ScoreNormalizer};
pub use pairwise::{
    PairwiseInputs, PairwiseLoss, PairwiseMetrics, pairwise_loss, pairwise_metrics,
};
pub use trainer::{RewardConfig, RewardEvaluation, RewardTrainer};

pub use rlhf_core as core;
pub use rlhf_scale as scale;
pub use tch;
