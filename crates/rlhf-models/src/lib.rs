//! Hugging Face language models, tokenizers and datasets for the rlhf crates.

mod attention;
mod causal_lm;
mod chat_template;
mod checkpoint;
mod classifier;
mod config;
pub mod data;
mod decoder;
mod error;
mod gpt2;
mod kv_cache;
mod layers;
mod llama;
mod rope;
mod tokenizer;
mod trunk;
mod value_head;
mod weights;

pub use causal_lm::{CausalLm, LoadOptions};
pub use chat_template::ChatMessage;
pub use classifier::SequenceClassifier;
pub use config::{ModelConfig, SUPPORTED_ARCHITECTURES, SpecialTokens};
pub use error::{Error, Result, WeightProblem};
pub use gpt2::Gpt2Config;
pub use layers::Activation;
pub use llama::LlamaConfig;
pub use rope::{RopeConfig, RopeScaling};
pub use tokenizer::Tokenizer;
pub use value_head::ValueHeadModel;

pub use rlhf_core as core;
pub use rlhf_core::tch;
