//! What can go wrong in supervised fine-tuning.

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of `rlhf-sft`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A batch, a model or a file is not as it should be.
    #[error(transparent)]
    Core(#[from] rlhf_core::Error),
    /// The update of the weights failed.
    #[error(transparent)]
    Scale(#[from] rlhf_scale::Error),
}
