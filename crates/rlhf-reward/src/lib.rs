//! Reward and cost models: comparisons, rankings, labelled texts, programs, ensembles.
//!
//! A reward model is a [`Scorer`](core::Scorer) trained on what people said of a language model's
//! answers.
//!
//! | to | use |
//! |---|---|
//! | learn from comparisons of two answers | [`RewardTrainer`] |
//! | learn from rankings of several | [`RankingTrainer`] |
//! | learn from texts with classes or scores | [`LabelTrainer`] |
//! | learn which answers are harmful, and whether they are at all | [`CostTrainer`] |
//! | put the scores on the scale that PPO wants | [`Normalized`] |
//! | know how sure they are | [`Ensemble`], [`HeadEnsemble`] |
//! | reward by program: format, length, the right answer, a process | [`programs`] |
//! | add rewards up | [`RewardSum`] |
//! | see how far to trust one | [`PairReport`], [`agreement`] |
//! | ask people, and know what to ask them | [`feedback`] |
//! | make constraints of all that | [`CostModel`], [`LabelProbability`], [`CostOf`] |
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

mod access;
mod constraint;
mod cost;
mod cost_trainer;
mod ensemble;
mod error;
mod evaluation;
pub mod feedback;
mod label;
mod label_loss;
mod label_trainer;
mod normalize;
mod notes;
mod pair_scores;
mod pairwise;
pub mod programs;
mod ranking;
mod ranking_trainer;
pub mod rouge;
mod screen;
mod sum;
mod trainer;

pub use constraint::{CostModel, CostOf, LabelProbability};
pub use cost::{CostInputs, CostLoss, SafetyBatch, SafetyPair, cost_loss};
pub use cost_trainer::{CostConfig, CostEvaluation, CostTrainer};
pub use ensemble::{Combination, Ensemble, EnsembleScores, HeadEnsemble};
pub use error::{Error, Result};
pub use evaluation::{
    Agreement, Bucket, Histogram, LengthBias, PairReport, ScoredPair, agreement, score_pairs,
};
pub use label::{Label, Labelled, LabelledBatch};
pub use label_loss::{classification_loss, regression_loss};
pub use label_trainer::{LabelConfig, LabelEvaluation, LabelTrainer};
pub use normalize::{Normalized, ScoreNormalizer};
pub use pair_scores::Heads;
pub use pairwise::{
    PairwiseInputs, PairwiseLoss, PairwiseMetrics, PairwiseTerms, pairwise_loss, pairwise_metrics,
};
pub use programs::{ProgramReward, program};
pub use ranking::{RankedRows, Ranking, RankingBatch};
pub use ranking_trainer::{RankingConfig, RankingEvaluation, RankingTrainer, ranking_loss};
pub use screen::{Overlong, Skipped, screen_pairs};
pub use sum::{Component, RewardSum};
pub use trainer::{RewardConfig, RewardEvaluation, RewardTrainer};

pub use rlhf_core as core;
pub use rlhf_scale as scale;
pub use tch;
