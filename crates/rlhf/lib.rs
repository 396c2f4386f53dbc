//! Reinforcement learning from human feedback for language models, on libtorch.

pub use rlhf_core as core;
pub use rlhf_models as models;
pub use rlhf_ppo as ppo;
pub use rlhf_reward as reward;
pub use rlhf_scale as scale;
