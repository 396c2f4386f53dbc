//! Supervised fine-tuning, the stage before every other: a policy learns to write given responses.
//!
//! [`SftTrainer`] trains any [`Policy`](core::Policy) on prompts and responses, with the loss on
//! the responses. Here is a bigram model, which is to learn that 1 follows 0:
//!
//! ```
//! use rlhf_sft::core::{EpochConfig, PaddedBatch, Parameters, Policy, Result, Sequence};
//! use rlhf_sft::tch::{Device, Kind, Tensor};
//! use rlhf_sft::{SftConfig, SftTrainer};
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
//! let table = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
//! let mut config = SftConfig::default();
//! config.update.optimizer.lr = 0.1;
//! let mut trainer = SftTrainer::new(Bigram { table }, config)?;
//!
//! let data: Vec<_> = (0..64).map(|_| Sequence::new([2, 0], [1])).collect();
//! assert_eq!(trainer.evaluate(&data)?.perplexity.round(), 4.0); // it knows nothing yet
//! trainer.train(&data, &EpochConfig { epochs: 4, ..EpochConfig::default() }, &mut [])?;
//! assert!(trainer.evaluate(&data)?.perplexity < 1.2);
//! # Ok::<(), rlhf_sft::Error>(())
//! ```
//!
//! # Which crate do I need?
//!
//! This one where somebody has written the responses; `rlhf-dpo` where somebody compared them;
//! `rlhf-reward` and `rlhf-ppo` where they are to be judged while the policy writes them.
//! `rlhf-models` has policies made from Hugging Face checkpoints.

mod error;
mod loss;
mod trainer;
mod weighted;

pub use error::{Error, Result};
pub use loss::{SftInputs, sft_loss};
pub use trainer::{SftConfig, SftEvaluation, SftTrainer};

pub use rlhf_core as core;
pub use rlhf_scale as scale;
pub use tch;
