//! Preference optimisation without a reward model: DPO and its family.

mod error;
mod loss;

pub use error::{Error, Result};
pub use loss::{Divergence, DpoInputs, DpoLoss, DpoOutput, RewardMetrics, dpo_loss};

pub use rlhf_core as core;
pub use rlhf_scale as scale;
pub use tch;
