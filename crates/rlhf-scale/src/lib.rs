//! Optimisers, schedules and the one update path of the `rlhf` crates.
//!
//! Every trainer hands its microbatch losses to [`Updater::update`], which does backward, the
//! finite check, clipping, the fused AdamW step and the schedule, and which changes nothing when a
//! step fails. Its options bring dynamic loss scaling for f16 weights ([`LossScale`],
//! [`Precision`]), learning rates and weight decay by parameter name ([`ParamGroup`]) and averaged
//! weights ([`EmaConfig`]). The pieces stand on their own too: [`AdamW`], [`Schedule`],
//! [`LossScaler`], [`Ema`], [`clip_grad_norm`], [`backward`], and strict safetensors files in
//! [`io`].
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
mod config;
mod ema;
mod error;
mod ffi;
mod gradients;
pub mod io;
mod loss_scale;
mod param_group;
mod precision;
mod schedule;
mod updater;

pub use adamw::AdamW;
pub use config::{AdamWConfig, DecayRule, UpdateConfig};
pub use ema::{AppliedEma, Ema, EmaConfig};
pub use error::{Error, Result};
pub use ffi::tensor_from_owner;
pub use gradients::{Norm, backward, clear_grads, clip_grad_norm, clip_grad_norm_of, set_grad};
pub use io::TensorProblem;
pub use loss_scale::{LossScale, LossScaler};
pub use param_group::ParamGroup;
pub use precision::Precision;
pub use schedule::{Schedule, ScheduleKind};
pub use updater::{UpdateStats, Updater};

pub use rlhf_core as core;
pub use tch;
