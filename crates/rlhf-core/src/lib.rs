//! The vocabulary of the `rlhf` crates: traits for models, batches of sequences, sampling and
//! generation, checkpoints and observers.

mod completions;
mod cursor;
mod decoder;
mod error;
mod judge;
mod logprobs;
mod masked;
mod packed;
mod padded;
mod parameters;
mod policy;
mod preference;
mod sequence;

pub use completions::{Completions, Detokenize, FinishReason, Text};
pub use cursor::{DataCursor, DataOrder};
pub use decoder::{Decoder, RecomputeDecoder};
pub use error::{Error, Result, check_same_shape};
pub use judge::{
    ConstraintFn, ConstraintModel, RewardFn, RewardModel, Scorer, ValueModel, constraint_fn,
    reward_fn,
};
pub use logprobs::{TokenLogprobs, entropy, gather_logprobs, response_logprobs};
pub use masked::{
    Shift, Variance, WHITEN_EPSILON, masked_mean, masked_sum, masked_var, masked_whiten,
};
pub use packed::PackedBatch;
pub use padded::PaddedBatch;
pub use parameters::{Parameters, joined_parameters};
pub use policy::{LogprobOptions, Policy};
pub use preference::{Preference, PreferenceBatch};
pub use sequence::{PaddingSide, Sequence, SequenceBatch};

pub use tch;
pub use tch::{Device, Kind, Tensor};
