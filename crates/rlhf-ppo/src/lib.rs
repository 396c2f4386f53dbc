//! Proximal policy optimisation for language models: a policy writes responses, a reward model
//! scores them, and clipped gradient steps make good ones likelier, while a KL penalty holds the
//! policy to its reference.
//!
//! This crate knows no model. It trains anything that implements
//! [`Policy`](rlhf_core::Policy) and [`ValueModel`](rlhf_core::ValueModel), of which `rlhf-models`
//! has transformers in Hugging Face's format; below is one of one's own.
//!
//! ```
//! use std::sync::Arc;
//! use rlhf_ppo::core::{PaddedBatch, Parameters, Policy, Result, SequenceBatch, ValueModel, reward_fn};
//! use rlhf_ppo::tch::{Device, Kind, Tensor};
//! use rlhf_ppo::{MissingEos, PpoConfig, PpoTrainer};
//!
//! /// Logits of the next token that depend on the last one: a table `[V, V]`.
//! struct Bigram(Tensor);
//!
//! impl Parameters for Bigram {
//!     fn named_parameters(&self) -> Vec<(String, Tensor)> {
//!         vec![("table".into(), self.0.shallow_clone())]
//!     }
//! }
//!
//! impl Policy for Bigram {
//!     fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
//!         let size = batch.input_ids.size();
//!         let logits = self.0.f_index_select(0, &batch.input_ids.view(-1))?;
//!         Ok(logits.view([size[0], size[1], -1]))
//!     }
//! }
//!
//! /// One learnt number as the value of every state.
//! struct Baseline(Tensor);
//!
//! impl Parameters for Baseline {
//!     fn named_parameters(&self) -> Vec<(String, Tensor)> {
//!         vec![("value".into(), self.0.shallow_clone())]
//!     }
//! }
//!
//! impl ValueModel for Baseline {
//!     fn values(&self, batch: &SequenceBatch) -> Result<Tensor> {
//!         let size = [batch.len() as i64, batch.max_response_len() as i64 + 1];
//!         Ok(self.0.f_expand(size, false)?)
//!     }
//! }
//!
//! # fn main() -> Result<(), rlhf_ppo::Error> {
//! let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
//! let mut config = PpoConfig {
//!     batch_size: 16,
//!     missing_eos: MissingEos::Keep, // this model has no stop token
//!     ..PpoConfig::default()
//! };
//! config.generation.max_new_tokens = 8;
//! config.update.optimizer.lr = 0.05;
//!
//! let mut trainer = PpoTrainer::new(
//!     config,
//!     Bigram(zeros(&[4, 4]).set_requires_grad(true)),
//!     Baseline(zeros(&[1]).set_requires_grad(true)),
//!     Bigram(zeros(&[4, 4])), // the reference
//!     reward_fn(|_prompt, response| response.matches('d').count() as f64),
//! )?
//! .with_detokenizer(|ids: &[i64]| Ok(ids.iter().map(|&id| char::from(b'a' + id as u8)).collect()));
//!
//! let prompts: Vec<Arc<[i64]>> = (0..16).map(|i| Arc::from([i % 4])).collect();
//! let first = trainer.step(&prompts)?;
//! trainer.train(&prompts, 20, &mut [])?;
//! let last = trainer.step(&prompts)?;
//! assert!(last.get("ppo/score/mean") > first.get("ppo/score/mean"));
//! # Ok(())
//! # }
//! ```
//!
//! # Where to look
//!
//! - [`PpoTrainer`]: `train`, `step`, or `rollout` and `update`; its source is the algorithm from
//!   top to bottom.
//! - [`PpoConfig`]: the options, with the values of the N+ details paper and of TRL.
//! - [`GrpoTrainer`] and [`GrpoConfig`]: the same without a critic, several answers to a prompt being
//!   each other's baseline: GRPO, RLOO, DAPO, Dr. GRPO, BNPO, GSPO, CISPO.
//! - [`HackingWatch`]: an observer that sees a reward rise while everything else tells another
//!   story.
//! - [`Constraint`]: costs with a limit, and what happens above it; [`PpoTrainer::safety_test`]
//!   says with which confidence a policy keeps them.
//! - [`OnPolicy`]: a critic on the policy's own trunk.
//! - The pieces, for an algorithm of one's own: [`KlEstimator`], [`shaped_rewards`], [`gae`],
//!   [`Whitening`], [`policy_loss`], [`value_loss`], [`KlController`], [`MissingEos`],
//!   [`RunningMoments`], [`Multiplier`], [`SamplerMismatch`], [`truncate_after_stop`].
//!
//! # What a step reports
//!
//! | metric | meaning |
//! |---|---|
//! | `ppo/score/mean`, `ppo/score/std` | what the reward model said |
//! | `ppo/judge/…` | what it reports of itself ([`take_report`](core::RewardModel::take_report)): components of a sum, disagreement of an ensemble |
//! | `ppo/reward/mean` | score, clipped and after the missing-EOS rule, less the KL penalty |
//! | `ppo/kl` | estimated KL from the reference, nats **per sequence**: the unit of [`KlControl`] |
//! | `ppo/kl_per_token` | the same, nats per token |
//! | `ppo/kl_coef`, `ppo/kl_target` | coefficient of the penalty in this step; what an adaptive controller aims at, nats **per sequence** |
//! | `ppo/length`, `ppo/finished` | mean response length; share that wrote a stop token |
//! | `ppo/distinct_1`, `ppo/distinct_2` | share of a response's tokens, and of its pairs of tokens, that repeat no other in it; mean over the responses |
//! | `ppo/distinct_2_across` | distinct pairs of tokens of all responses over all pairs: low where all prompts get the same answer |
//! | `ppo/score/length_correlation` | correlation of score and length over the responses |
//! | `ppo/samples`, `ppo/samples_used` | responses; those that keep all constraints |
//! | `ppo/constraint/NAME/violation_rate`, `…/mean_cost` | share above the threshold; mean cost |
//! | `ppo/constraint/NAME/multiplier`, `…/batch_skipped` | price of a Lagrangian; whether it kept the batch out |
//! | `ppo/mismatch/mean`, `…/max`, `…/kl`, `…/weight` | how far the sampler was from the trainer ([`SamplerMismatch`]); mean factor of a token's loss |
//! | `ppo/policy/loss`, `…/approx_kl`, `…/clipfrac`, `…/entropy`, `…/ratio`, `…/ratio_var` | see [`MinibatchStats`]; means over the step's minibatches |
//! | `ppo/policy/dual_clipfrac`, `…/kl_loss`, `ppo/value/cost_loss`, `ppo/ptx/loss` | where there is such a part |
//! | `ppo/value/loss`, `…/clipfrac` | the same |
//! | `ppo/guard/kl`, `…/ratio`, `…/ended` | with [`UpdateGuards`]: share of steps not taken; whether the update ended early |
//! | `ppo/value/explained_variance` | `1 − Var(returns − values) / Var(returns)` before the update |
//! | `ppo/loss`, `ppo/grad_norm`, `ppo/lr` | joined loss, norm before clipping, last learning rate |
//! | `ppo/loss_scale`, `ppo/skipped` | with loss scaling: mean scale, share of steps skipped because a gradient overflowed |
//! | `ppo/update_skipped` | 1 where no sample was left to learn from: the losses are missing then |
//! | `ppo/time/rollout_s`, `ppo/time/update_s` | seconds, the only numbers that differ from run to run |
//!
//! [`GrpoTrainer`] reports the same under `grpo/`, without values, and:
//!
//! | metric | meaning |
//! |---|---|
//! | `grpo/score/NAME` | mean of each reward, where there are several |
//! | `grpo/reward/mean`, `…/group_std` | weighted sum with all penalties; deviation among the answers to a prompt |
//! | `grpo/groups/zero_std` | share of the prompts whose answers all have the same reward, and teach nothing |
//! | `grpo/groups/sampled`, `…/dropped`, `…/rounds` | what dynamic sampling did |
//! | `grpo/policy/kl_in_loss` | penalised divergence, nats **per token** |
//! | `grpo/policy/clipfrac_low`, `…/clipfrac_high` | share of the ratios below their range where the advantage is negative, above it where it is positive |
//! | `grpo/mismatch/mean`, `…/max` | difference of the log-probabilities that tokens were sampled with from the trainer's, nats |
//! | `grpo/mismatch/weight` | mean of the importance weights that correct for it |

mod advantages;
mod answers;
mod completions;
mod config;
mod constraint;
mod constraints;
mod critic;
mod error;
mod first_pass;
mod grpo;
mod guards;
mod kl_control;
mod kl_estimator;
mod lagrangian;
mod learners;
mod length_penalty;
mod measure;
mod microbatching;
mod minibatch;
mod mismatch;
mod missing_eos;
mod named_sums;
mod order;
mod policy_loss;
mod pretraining;
mod rewards;
mod rollout;
mod running_moments;
mod safety;
mod safety_test;
mod state;
mod stats;
mod train;
mod trainer;
mod truncate;
mod value_loss;
mod watch;
mod whitening;

pub use advantages::{Gae, GaeInput, gae};
pub use config::{KlPlacement, LogprobTemperature, MinibatchUnit, OldLogprobs, PpoConfig};
pub use constraint::{Constraint, ConstraintRule};
pub use critic::{Critic, OnPolicy};
pub use error::{Error, Result};
pub use grpo::{
    AdvantageScale, Aggregation, Baseline, DynamicSampling, Excess, GroupAdvantages,
    GroupAdvantagesInput, GroupLoss, GroupLossInput, GroupMinibatchStats, GroupRollout, GrpoConfig,
    GrpoTrainer, KlPenalty, KlWeight, Mismatch, MixedRewards, Objective, OffPolicy, RatioLevel,
    RewardMix, STD_EPSILON, SampledPrompts, TokenWeightsInput, Truncated, Unscored,
    group_advantages, group_loss, importance_weights, mixed_rewards, token_weights,
};
pub use guards::{Guarded, KlGuard, OnKl, UpdateGuards};
pub use kl_control::{KlControl, KlController};
pub use kl_estimator::KlEstimator;
pub use lagrangian::{LagrangianConfig, LagrangianInput, Multiplier, lagrangian_advantages};
pub use length_penalty::LengthPenalty;
pub use minibatch::MinibatchStats;
pub use mismatch::{RolloutCorrection, SamplerMismatch};
pub use missing_eos::MissingEos;
pub use policy_loss::{
    Clip, LOG_RATIO_LIMIT, PolicyLoss, PolicyLossInput, Surrogate, log_ratios, policy_loss,
    surrogate,
};
pub use pretraining::{PtxConfig, PtxStep};
pub use rewards::{ScorePosition, ShapedRewards, ShapedRewardsInput, shaped_rewards};
pub use rollout::{CostEstimate, Rollout};
pub use running_moments::{RunningMoments, ScoreScaling};
pub use safety::{ConstraintSafety, SafetyReport, clopper_pearson_upper};
pub use trainer::PpoTrainer;
pub use truncate::truncate_after_stop;
pub use value_loss::{ValueLoss, ValueLossInput, value_loss};
pub use watch::{Evidence, Finding, FindingKind, HackingWatch, StopRule, WatchConfig};
pub use whitening::Whitening;

pub use rlhf_core as core;
pub use rlhf_scale as scale;
pub use tch;
