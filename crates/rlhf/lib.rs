//! Reinforcement learning from human feedback for language models, on libtorch.
pub use rlhf_core as core;
