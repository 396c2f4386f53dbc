//! Reinforcement learning from human feedback for language models, on libtorch.
//!
//! From a Hugging Face folder to a Hugging Face folder, in one process and without Python:
//! supervised fine-tuning, reward models, PPO with constraints, DPO. The arithmetic runs on the
//! CPU and CUDA kernels of libtorch, through [`tch`].
//!
//! # Writing and judging
//!
//! [`RlhfSystem`] holds a language model and a reward model. (The folders here are the small
//! models with random weights of this repository's tests; any with a supported architecture
//! will do.)
//!
//! ```
//! use rlhf::prelude::*;
//!
//! let system = RlhfSystem::from_pretrained(
//!     "tests/goldens/models/gpt2",
//!     "tests/goldens/models/gpt2_rm",
//! )?
//! .with_generation(GenerationConfig {
//!     max_new_tokens: 8,
//!     ..GenerationConfig::default()
//! })?;
//! let prompt = "The quick brown fox";
//! let answer = system.generate_text(prompt)?;
//! let reward = system.get_reward_for(prompt, &answer)?;
//! println!("{prompt}{answer}: {reward:.3}");
//! # Ok::<(), rlhf::Error>(())
//! ```
//!
//! # Training
//!
//! The stages of the chain have a module each: [`sft`], [`reward`], [`ppo`], and [`dpo`], which
//! does without the two before it. Each has trainers that work on the traits of [`core`], so
//! the models of [`models`], one of your own, or a closure as a reward all fit.
//!
//! ```
//! use std::sync::Arc;
//!
//! use rlhf::prelude::*;
//!
//! let (base, judge) = ("tests/goldens/models/gpt2", "tests/goldens/models/gpt2_rm");
//! let options = LoadOptions::default();
//! let tokenizer = Tokenizer::from_dir(base)?;
//! let policy = CausalLm::from_pretrained(base, &options)?;
//! let reference = policy.try_clone()?;
//! let reward = SequenceClassifier::from_pretrained(judge, &options)?;
//! let critic = ValueHeadModel::from_classifier(&reward)?;
//!
//! let mut config = PpoConfig { batch_size: 2, ..PpoConfig::default() };
//! config.generation.max_new_tokens = 8;
//! config.generation.stop_token_ids = tokenizer.stop_token_ids().to_vec();
//!
//! let prompts = [tokenizer.encode("The fox")?.into(), tokenizer.encode("A dog")?.into()];
//! let mut trainer = PpoTrainer::new(config, policy, critic, reference, reward)?;
//! let stats = trainer.step(&prompts)?;
//! println!("{stats}");
//!
//! let (policy, _critic) = trainer.into_models();
//! # let folder = std::env::temp_dir().join(format!("rlhf-doc-{}", std::process::id()));
//! # let to = &folder;
//! policy.save_pretrained(to)?; // transformers reads it back
//! tokenizer.save(to)?;
//! # std::fs::remove_dir_all(folder).ok();
//! # Ok::<(), rlhf::Error>(())
//! ```
//!
//! `examples/summarize_rlhf.rs` is the whole chain on real texts, with the evaluation that tells
//! learning from reward hacking; `examples/custom_policy.rs` trains a recurrent network that
//! knows nothing of this library but one trait.
//!
//! # Which crate do I need?
//!
//! This one is the others under one name. A library that needs one part depends on that part:
//!
//! | module | crate | holds |
//! |---|---|---|
//! | [`core`] | `rlhf-core` | the traits that models implement, batches, sampling and generation, checkpoints, observers |
//! | [`scale`] | `rlhf-scale` | AdamW with f32 masters, schedules, the update that every trainer uses, safetensors |
//! | [`models`] | `rlhf-models` | models from Hugging Face folders, LoRA, tokenizers, datasets |
//! | [`sft`] | `rlhf-sft` | supervised fine-tuning |
//! | [`reward`] | `rlhf-reward` | Bradley-Terry and classification training of reward models |
//! | [`dpo`] | `rlhf-dpo` | losses on preferences, without a reward model |
//! | [`ppo`] | `rlhf-ppo` | PPO, constraints, GRPO and its relatives, the watch for reward hacking |
//!
//! The training crates depend on `core` and `scale` alone: a crate that brings a model of its
//! own compiles neither tokenizers nor model files.
//!
//! # libtorch
//!
//! A build needs libtorch. In a clone of the repository `scripts/with-libtorch` installs it; in a
//! crate of your own set `LIBTORCH` to its folder, as [`tch`] says. With the feature `doc-only`
//! documentation builds without it, and nothing runs.

mod error;
pub mod prelude;
mod system;

pub use error::{Error, Result};
pub use system::RlhfSystem;

pub use rlhf_core as core;
pub use rlhf_core::tch;
pub use rlhf_dpo as dpo;
pub use rlhf_models as models;
pub use rlhf_ppo as ppo;
pub use rlhf_reward as reward;
pub use rlhf_scale as scale;
pub use rlhf_sft as sft;
