//! What can go wrong in PPO.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of `rlhf-ppo`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A batch, a model, a configuration or a file is at fault.
    #[error(transparent)]
    Core(#[from] rlhf_core::Error),
    /// The update failed.
    #[error(transparent)]
    Scale(#[from] rlhf_scale::Error),
    /// A model that judges completions returned something other than one number for each.
    #[error("{model} returned a tensor of shape {got:?} for {expected} completions")]
    WrongJudgement {
        /// Which model: `"the reward model"`, or a constraint's name.
        model: String,
        /// The shape it returned.
        got: Vec<i64>,
        /// Completions it was given.
        expected: usize,
    },
    /// A constraint's model returned a cost that is not a finite number.
    #[error("the cost of sample {row} under constraint {constraint:?} is {value}")]
    NonFiniteCost {
        /// The constraint's name.
        constraint: String,
        /// Row in the rollout.
        row: usize,
        /// The cost.
        value: f64,
    },
    /// Answers that should be several to one prompt are not.
    #[error("the answers from row {row} on are not {group_size} to one prompt")]
    BrokenGroup {
        /// The group's first row.
        row: usize,
        /// Answers to each prompt.
        group_size: usize,
    },
    /// A saved trainer was configured otherwise.
    #[error("{} was saved with {field} = {saved}, but this trainer has {current}", path.display())]
    ConfigMismatch {
        /// The file.
        path: PathBuf,
        /// The first field that differs.
        field: String,
        /// Its value in the file, as JSON.
        saved: String,
        /// Its value in this trainer, as JSON.
        current: String,
    },
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Core(error.into())
    }
}
