//! Preference optimisation without a reward model: DPO and its family.
//!
//! | data | trainer | losses |
//! |---|---|---|
//! | comparisons | [`DpoTrainer`] | [`DpoLoss`], weighted sums of them and their options: [`Objective`] |
//! | answers that are good or not | [`KtoTrainer`] | [`KtoLoss`] |
//! | prompts, and a judge of answers | [`OnlineDpoTrainer`] | as for comparisons |
//!
//! Each trains any [`Policy`](core::Policy), held to a [`Reference`]: a frozen copy, the policy with
//! its adapters off, log-probabilities [kept on disk](ReferenceCache), or none. Here is a bigram
//! model, which is to learn that after 0 people prefer 1 to 2:
//!
//! ```
//! use rlhf_dpo::core::{EpochConfig, PaddedBatch, Parameters, Policy, Preference, Result};
//! use rlhf_dpo::tch::{Device, Kind, Tensor};
//! use rlhf_dpo::{DpoConfig, DpoTrainer};
//!
//! struct Bigram {
//!     table: Tensor, // [V, V]
//! }
//!
//! impl Parameters for Bigram {
//!     fn named_parameters(&self) -> Vec<(String, Tensor)> {
//!         vec![("table".into(), self.table.shallow_clone())]
//!     }
//! }
//!
//! impl Policy for Bigram {
//!     fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
//!         let size = batch.input_ids.size(); // [B, T]
//!         let rows = self.table.f_index_select(0, &batch.input_ids.view(-1))?;
//!         Ok(rows.view([size[0], size[1], -1])) // [B, T, V]
//!     }
//! }
//!
//! let table = Tensor::zeros([3, 3], (Kind::Float, Device::Cpu));
//! let reference = Bigram { table: table.copy() };
//! let policy = Bigram { table: table.set_requires_grad(true) };
//! let mut config = DpoConfig::default();
//! config.update.optimizer.lr = 0.1;
//! let mut trainer = DpoTrainer::new(policy, reference, config)?;
//!
//! let pairs: Vec<_> = (0..64).map(|_| Preference::new([0], [1], [2])).collect();
//! let before = trainer.evaluate(&pairs)?;
//! assert_eq!((before.accuracy, before.margin), (0.0, 0.0)); // the policy is the reference
//! trainer.train(&pairs, &EpochConfig::default(), &mut [])?;
//! let after = trainer.evaluate(&pairs)?;
//! assert!(after.accuracy == 1.0 && after.margin > 0.1);
//! # Ok::<(), rlhf_dpo::Error>(())
//! ```
//!
//! The losses are pure functions too ([`dpo_loss`], [`kto_loss`]). `docs/preference.md` in the
//! repository says which loss is for what, what is refused, and how a batch's split is kept out of
//! the result; `examples/dialogue_dpo.rs` compares the whole family on conversations.
//!
//! # Which crate do I need?
//!
//! This one to learn from preferences alone; `rlhf-reward` and `rlhf-ppo` to train a judge on them
//! first; `rlhf-sft` before either. `rlhf-models` has policies made from Hugging Face checkpoints.

mod cache;
mod config;
mod error;
mod evaluation;
mod fingerprint;
mod kto;
mod loss;
mod metrics;
mod objective;
mod online;
mod pair_scores;
mod reference;
mod samples;
mod screen;
mod shift;
mod state;
mod summary;
mod sync;
mod trainer;
mod watch;

pub use cache::ReferenceCache;
pub use config::DpoConfig;
pub use error::{Error, Result};
pub use evaluation::DpoEvaluation;
pub use fingerprint::Fingerprint;
pub use kto::{
    KtoConfig, KtoEvaluation, KtoInputs, KtoLoss, KtoObjective, KtoOutput, KtoTrainer,
    LabelledAnswer, ScoredAnswer, kto_loss, mismatched_answers,
};
pub use loss::{
    BatchMeans, Divergence, DpoInputs, DpoLoss, DpoOutput, PromptLogprobs, ReferenceLogprobs,
    RewardShift, dpo_loss,
};
pub use metrics::{RewardMetrics, reward_metrics};
pub use objective::{Objective, PairWeighting, WeightedLoss};
pub use online::{Judge, OnlineDpoConfig, OnlineDpoTrainer, Verdict};
pub use reference::{Reference, ScoreOptions, ScoredPreference, score_preferences};
pub use samples::{AnswerRow, AnswerTable, SampleConfig, SampledAnswers, sample_answers};
pub use screen::{Overlong, ScreenConfig, ScreenReport, screen_pairs};
pub use sync::ReferenceSync;
pub use trainer::DpoTrainer;
pub use watch::{ChosenFalls, ChosenWatch, WatchConfig};

pub use rlhf_core as core;
pub use rlhf_scale as scale;
pub use tch;
