//! Hugging Face language models, tokenizers and datasets for the rlhf crates.
//!
//! A folder in the layout of the Hugging Face hub (`config.json`, `model.safetensors`,
//! `tokenizer.json`) becomes a [`CausalLm`] that the trainers take as a policy, a
//! [`SequenceClassifier`] that judges, or a [`ValueHeadModel`], and a folder again that
//! transformers reads. GPT-2, GPT-NeoX (Pythia), Llama (SmolLM), Mistral,
//! Qwen2, Qwen3 and Gemma 2 are here ([`SUPPORTED_ARCHITECTURES`]).
//!
//! ```
//! use rlhf_models::core::{GenerationConfig, RngStreams, generate};
//! use rlhf_models::{CausalLm, LoadOptions, Tokenizer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/models/gpt2");
//! let model = CausalLm::from_pretrained(folder, &LoadOptions::default())?;
//! let tokenizer = Tokenizer::from_dir(folder)?;
//! tokenizer.check_fits(model.config())?;
//!
//! let prompt = tokenizer.encode("The capital of France is")?.into();
//! let config = GenerationConfig {
//!     max_new_tokens: 8,
//!     stop_token_ids: tokenizer.stop_token_ids().to_vec(),
//!     ..GenerationConfig::default()
//! };
//! let written = generate(&model, &[prompt], &config, &RngStreams::new(0), 0)?;
//! let text = tokenizer.decode(&written.batch.sequences()[0].response, true)?;
//! # assert!(!text.is_empty());
//! # Ok(())
//! # }
//! ```
//!
//! What makes them fast: a batch runs packed, with no padding, through every layer, and only
//! attention looks at its sequences one by one; logits are computed for response tokens alone;
//! decoding keeps keys and values in a preallocated cache; weights are views of the mapped file
//! where alignment and kind allow it.
//!
//! # LoRA
//!
//! [`CausalLm::add_adapter`] freezes a model and trains low-rank adapters in its place
//! ([`LoraConfig`]). The reference of PPO or DPO is then the same model with its adapters off, in
//! the same memory:
//!
//! ```
//! use rlhf_models::core::Parameters;
//! use rlhf_models::{CausalLm, LoadOptions, LoraConfig, Modules};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/models/llama");
//! # let out = tempfile::tempdir()?;
//! let mut policy = CausalLm::from_pretrained(folder, &LoadOptions::default())?;
//! let config = LoraConfig {
//!     rank: 4,
//!     target_modules: Modules::named(["q_proj", "v_proj"]),
//!     ..LoraConfig::default()
//! };
//! policy.add_adapter(&config, 0)?;
//! let reference = policy.reference()?;
//! let trained = policy.named_parameters();
//! assert!(trained.iter().all(|(name, _)| name.contains(".lora_")));
//! assert!(reference.named_parameters().is_empty());
//!
//! // ... DpoTrainer::new(policy, Box::new(reference), ..) and so on; afterwards:
//! policy.save_adapter(out.path().join("adapter"))?; // PEFT reads it
//! policy.save_pretrained(out.path().join("merged"))?; // transformers reads it
//!
//! let mut again = CausalLm::from_pretrained(folder, &LoadOptions::default())?;
//! again.load_adapter(out.path().join("adapter"))?;
//! again.merge()?; // a plain model again
//! # Ok(())
//! # }
//! ```
//!
//! Adapters are the only place with dropout ([`LoraConfig::dropout`]): configs keep the
//! probabilities of a model's own, nothing applies them.
//!
//! [`data`] reads datasets in TRL's formats from JSONL and Parquet files. To train a model of your own, not of this
//! crate, implement `Policy` of `rlhf-core`; the training crates do not depend on this one.

mod actor_critic;
mod architecture;
mod attention;
mod attention_spec;
mod block_memory;
mod causal_lm;
mod chat_template;
mod checkpoint;
mod classifier;
mod config;
pub mod data;
mod decoder;
mod error;
mod gated_mlp;
mod gemma2;
mod gpt2;
mod gpt_neox;
mod kept_logprobs;
mod kv_cache;
mod layer_windows;
mod layers;
mod llama;
mod lora;
mod memory_plan;
mod mistral;
mod model;
mod model_shape;
mod pipeline_parallel;
mod placement;
mod pre_norm;
#[cfg(test)]
mod properties;
mod qwen2;
mod qwen3;
mod rope;
mod self_attention;
mod tensor_parallel;
mod tokenizer;
mod transformer_config;
mod trunk;
mod value_head;
mod weights;

pub use actor_critic::CausalLmWithValueHead;
pub use causal_lm::{CausalLm, LoadOptions};
pub use chat_template::{ChatEnd, ChatMessage, ChatOptions};
pub use checkpoint::SaveOptions;
pub use classifier::SequenceClassifier;
pub use config::{ModelConfig, SUPPORTED_ARCHITECTURES, SpecialTokens};
pub use error::{AdapterProblem, Error, Result, WeightProblem};
pub use gemma2::Gemma2Config;
pub use gpt_neox::GptNeoxConfig;
pub use gpt2::Gpt2Config;
pub use layer_windows::SlidingWindow;
pub use layers::Activation;
pub use llama::LlamaConfig;
pub use lora::{LoraConfig, Modules};
pub use memory_plan::{
    AdapterMemory, BatchShape, GenerationShape, MemoryChange, MemoryHead, MemoryOptions,
};
pub use mistral::MistralConfig;
pub use pipeline_parallel::PipelineParallel;
pub use placement::Placement;
pub use qwen2::Qwen2Config;
pub use qwen3::Qwen3Config;
pub use rlhf_scale::{CheckpointPolicy, GradientCheckpointing};
pub use rope::{RopeConfig, RopeScaling};
pub use tensor_parallel::TensorParallel;
pub use tokenizer::{Side, Tokenizer};
pub use transformer_config::TransformerConfig;
pub use value_head::{ValueHeadInit, ValueHeadModel};

pub use rlhf_core as core;
pub use rlhf_core::tch;
