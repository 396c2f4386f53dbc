//! What most programs need: `use rlhf::prelude::*;`.

pub use rlhf_core::{
    Completions, ConstraintModel, Detokenize, Device, Event, GenerationConfig, JsonlObserver, Kind,
    Observer, Parameters, Policy, Preference, PreferenceBatch, ProgressObserver, RewardModel,
    RngStreams, SamplingConfig, Scorer, Sequence, SequenceBatch, Stats, Tensor, ValueModel,
    constraint_fn, generate, reward_fn,
};
pub use rlhf_models::{CausalLm, LoadOptions, SequenceClassifier, Tokenizer, ValueHeadModel};
pub use rlhf_ppo::{Constraint, KlControl, PpoConfig, PpoTrainer};

pub use crate::RlhfSystem;
