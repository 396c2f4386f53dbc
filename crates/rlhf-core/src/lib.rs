//! The vocabulary of the `rlhf` crates: the traits that models implement, batches of sequences,
//! sampling and generation, random streams, checkpoints and observers.
//!
//! A model joins in by implementing [`Policy`], which takes one method. Here is a bigram model,
//! with one row of logits for each token that may come before, and what follows from the trait:
//!
//! ```
//! use rlhf_core::{
//!     GenerationConfig, LogprobOptions, PaddedBatch, Parameters, Policy, Result, RngStreams,
//!     Tensor, generate,
//! };
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
//! let table = Tensor::from_slice2(&[[0.0f32, 4.0, 1.0], [1.0, 0.0, 4.0], [4.0, 1.0, 0.0]]);
//! let policy = Bigram { table: table.set_requires_grad(true) };
//!
//! // Four samples of five tokens for each of two prompts.
//! let prompts = [vec![0, 1].into(), vec![2].into()];
//! let config = GenerationConfig {
//!     max_new_tokens: 5,
//!     samples_per_prompt: 4,
//!     ..GenerationConfig::default()
//! };
//! let completions = generate(&policy, &prompts, &config, &RngStreams::new(1), 0)?;
//! assert_eq!(completions.batch.len(), 8);
//!
//! // Their log-probabilities, with gradients.
//! let scored = policy.logprobs(&completions.batch, &LogprobOptions::default())?;
//! assert_eq!(scored.logprobs.size(), [8, 5]);
//! scored.logprobs.mean(None).backward();
//! assert_eq!(policy.table.grad().size(), [3, 3]);
//! # Ok::<(), rlhf_core::Error>(())
//! ```
//!
//! # What is here
//!
//! | for | see |
//! |---|---|
//! | models | [`Policy`], [`ValueModel`], [`RewardModel`], [`ConstraintModel`], [`Decoder`]; [`reward_fn`] and [`constraint_fn`] make closures into models |
//! | batches | [`Sequence`], [`SequenceBatch`] (ragged), [`PaddedBatch`] (`[B, T]`), [`PackedBatch`] (`[N]`, shared prompts once), [`PreferenceBatch`], [`Completions`] |
//! | writing responses | [`generate()`], [`Generator`] (streams, best of n), [`GenerationConfig`], [`sampling`], [`RngStreams`] |
//! | arithmetic | [`gather_logprobs`], [`masked_mean`], [`masked_whiten`] and their neighbours |
//! | runs | [`train_epochs`], [`DataCursor`], [`CheckpointStore`], [`Observer`], [`Stats`] |
//!
//! In every shape `B` is sequences, `P` prompt tokens, `R` response tokens, `T = P + R`, `V` the
//! vocabulary, `N` packed tokens and `H` hidden units. Masks are bool and `true` takes part.
//! Log-probabilities are f32 and in nats, whatever the model's kind.
//!
//! # Which crate do I need?
//!
//! | to | use |
//! |---|---|
//! | run the whole chain on a Hugging Face checkpoint | `rlhf` |
//! | train a model of your own with PPO | `rlhf-ppo` |
//! | train one on preferences, without a reward model | `rlhf-dpo` |
//! | train a reward model | `rlhf-reward` |
//! | fine-tune on written answers | `rlhf-sft` |
//! | load GPT-2 or Llama, tokenizers, datasets | `rlhf-models` |
//! | write a trainer of your own: optimisers, schedules, the update path | `rlhf-scale` |
//! | implement the traits in a crate that trains nothing | `rlhf-core` |
//!
//! Each of the training crates re-exports this one as `core`, and [`tch`], so that one line of
//! dependencies is enough.

mod checkpoint;
mod collective;
mod completions;
mod cursor;
mod cut;
mod decoder;
mod epochs;
mod error;
mod gather;
mod generate;
mod judge;
mod kept;
mod logprobs;
mod masked;
mod observer;
mod packed;
mod padded;
mod parameter_shards;
mod parameters;
mod policy;
mod preference;
mod ranks;
mod replicas;
pub mod rng;
pub mod sampling;
mod sequence;
mod stage;
mod stats;

pub use checkpoint::{Checkpoint, CheckpointStore};
pub use collective::{Collective, Reduction};
pub use completions::{Completions, Detokenize, FinishReason, Text};
pub use cursor::{DataCursor, DataOrder};
pub use cut::Cut;
pub use decoder::{Decoder, RecomputeDecoder};
pub use epochs::{CheckpointConfig, EpochConfig, EpochTrainer, train_epochs};
pub use error::{Error, Result, check_same_shape};
pub use gather::{gather_parts, gather_stages};
pub use generate::{BestOfN, GenerationConfig, Generator, TextPiece, TextStream, generate};
pub use judge::{
    ActorCritic, ConstraintFn, ConstraintModel, RewardFn, RewardModel, Scorer, ValueModel,
    constraint_fn, reward_fn,
};
pub use kept::{KeptSet, KeptTokens, check_kept, dropped_mask};
pub use logprobs::{
    DROPPED_LOGIT, TokenLogprobs, entropy, gather_logprobs, response_logprobs,
    response_logprobs_within,
};
pub use masked::{
    Shift, Variance, WHITEN_EPSILON, masked_mean, masked_sum, masked_var, masked_whiten,
};
pub use observer::{Event, JsonlObserver, Observer, ProgressObserver, notify};
pub use packed::{PackedBatch, Segment};
pub use padded::PaddedBatch;
pub use parameter_shards::{Cuts, ParameterShards};
pub use parameters::{Parameters, joined_parameters, joined_shards};
pub use policy::{LogprobOptions, Policy};
pub use preference::{Preference, PreferenceBatch};
pub use ranks::Ranks;
pub use replicas::{Exchange, Replicas};
pub use rng::RngStreams;
pub use sampling::SamplingConfig;
pub use sequence::{PaddingSide, Sequence, SequenceBatch};
pub use stage::PipelineStage;
pub use stats::Stats;

pub use tch;
pub use tch::{Device, Kind, Tensor};
