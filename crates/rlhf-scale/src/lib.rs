//! What libtorch's training needs beside what `tch` offers: bigger models in the memory one has, and
//! the one update path of the `rlhf` crates.
//!
//! - [`checkpoint`] and [`GradientCheckpointing`] compute activations again in backward instead of
//!   keeping them.
//! - [`linear_logprobs`] gives the log-probabilities of tokens without memory for all logits, and
//!   [`linear_token_loss`] a loss on them with its gradients.
//! - [`custom_function`] puts a Rust closure into the autograd graph.
//! - [`Updater::update`] takes microbatch losses and does backward, the finite check, clipping, the
//!   fused AdamW step and the schedule, and changes nothing when a step fails. Its options bring
//!   16-bit weights with f32 masters ([`Precision`]), dynamic loss scaling ([`LossScale`]), learning
//!   rates and weight decay by parameter name ([`ParamGroup`]) and averaged weights
//!   ([`EmaConfig`]).
//! - [`enter_parallel`], [`leave_parallel`] and [`parallel_logprobs`] are what a model whose layers lie
//!   on several ranks is made of.
//! - [`StepMemory`] tells what a training step will need before it runs, and [`MemoryPlan::check`]
//!   refuses what cannot fit; [`measure_memory`] counts what a piece of code really takes.
//! - [`distributed`] has the processes of a run work together, on libtorch's c10d.
//! - The update's parts stand on their own too: [`AdamW`], [`Schedule`], [`LossScaler`], [`Ema`],
//!   [`clip_grad_norm`], [`backward`], and strict safetensors files in [`io`].
//!
//! All of it works with plain `tch` code; nothing here knows a model.
//!
//! ```
//! use rlhf_scale::{AdamWConfig, Error, Schedule, UpdateConfig, Updater};
//! use tch::{Kind, Tensor};
//!
//! # fn main() -> Result<(), Error> {
//! let weight = Tensor::zeros([2], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
//! let mut updater = Updater::new(
//!     vec![("weight".to_string(), weight.shallow_clone())],
//!     &UpdateConfig {
//!         optimizer: AdamWConfig { lr: 0.1, ..AdamWConfig::default() },
//!         schedule: Schedule::linear(2, 20),
//!         ..UpdateConfig::default()
//!     },
//! )?;
//! for _ in 0..20 {
//!     let stats = updater.update::<Error>(1, |_| Ok((&weight - 0.5).square().sum(Kind::Float)))?;
//!     assert!(stats.loss.is_finite());
//! }
//! assert!((weight - 0.5).abs().max().double_value(&[]) < 0.2);
//! # Ok(())
//! # }
//! ```

mod adamw;
mod autograd;
mod checkpoint;
mod config;
#[cfg(feature = "distributed")]
pub mod distributed;
mod ema;
mod error;
mod ffi;
mod gradients;
pub mod io;
mod linear_logprobs;
mod loss_scale;
mod memory;
mod param_group;
mod pipeline;
mod precision;
mod schedule;
mod tensor_parallel;
mod updater;

pub use adamw::AdamW;
pub use autograd::{Saved, custom_function};
pub use checkpoint::{Checkpoint, CheckpointPolicy, GradientCheckpointing, checkpoint};
pub use config::{AdamWConfig, DecayRule, UpdateConfig};
pub use ema::{AppliedEma, Ema, EmaConfig};
pub use error::{Error, Result};
pub use ffi::allocator::{release_memory, reuse_memory};
pub use ffi::autograd::grad_enabled;
pub use ffi::tensor_from_owner;
pub use ffi::{kernels, recorded};
pub use gradients::{Norm, backward, clear_grads, clip_grad_norm, clip_grad_norm_of, set_grad};
pub use io::TensorProblem;
pub use linear_logprobs::{
    LinearLogprobs, LinearLogprobsInput, LinearTokenLoss, linear_logprobs, linear_token_loss,
    parallel_logprobs, parallel_token_loss,
};
pub use loss_scale::{LossScale, LossScaler};
pub use memory::{
    BlockMemory, GenerationMemory, HeadMemory, LogprobsMemory, MemoryPlan, MemoryUse, StepMemory,
    available_memory, measure_memory,
};
pub use param_group::ParamGroup;
pub use pipeline::StageLink;
pub use precision::Precision;
pub use schedule::{Schedule, ScheduleKind};
pub use tensor_parallel::{VocabularyShard, enter_parallel, gather_columns, leave_parallel};
pub use updater::{UpdateStats, Updater};

pub use rlhf_core as core;
pub use tch;
