//! Hugging Face language models, tokenizers and datasets for the rlhf crates.

mod attention;
mod causal_lm;
mod checkpoint;
mod config;
mod error;
mod gpt2;
mod layers;
mod trunk;
mod weights;

pub use causal_lm::{CausalLm, LoadOptions};
pub use config::{ModelConfig, SUPPORTED_ARCHITECTURES, SpecialTokens};
pub use error::{Error, Result, WeightProblem};
pub use gpt2::Gpt2Config;
pub use layers::Activation;

pub use rlhf_core as core;
pub use rlhf_core::tch;
