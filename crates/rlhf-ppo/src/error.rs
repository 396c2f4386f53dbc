//! What can go wrong in PPO.

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of `rlhf-ppo`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A batch, a model, a configuration or a file is at fault.
    #[error(transparent)]
    Core(#[from] rlhf_core::Error),
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
}
