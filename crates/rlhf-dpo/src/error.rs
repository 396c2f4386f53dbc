//! What can go wrong in preference optimisation.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of `rlhf-dpo`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A batch, a model or a file is not as it should be.
    #[error(transparent)]
    Core(#[from] rlhf_core::Error),
    /// The update of the weights failed.
    #[error(transparent)]
    Scale(#[from] rlhf_scale::Error),
    /// A loss was given an option that it cannot use.
    #[error("{loss} cannot use this {option}: {reason}")]
    Unusable {
        /// The loss.
        loss: String,
        /// The option.
        option: &'static str,
        /// Why not, and what to do.
        reason: &'static str,
    },
    /// The trainer has no reference model, and these pairs come without its log-probabilities.
    #[error(
        "the trainer was made with Reference::Scored, which has no model to score pairs with; \
         call {instead} with pairs that are scored"
    )]
    NotScored {
        /// The method that takes scored pairs.
        instead: &'static str,
    },
    /// A file of reference log-probabilities belongs to something else.
    #[error(
        "{}: the reference log-probabilities are of another {what} ({found}, not {expected}); \
         name another file, or delete this one",
        path.display()
    )]
    CacheMismatch {
        /// The file.
        path: PathBuf,
        /// What differs: `"model"`, `"dataset"`, ….
        what: &'static str,
        /// Fingerprint or value in the file.
        found: String,
        /// Fingerprint or value that was expected.
        expected: String,
    },
    /// A file of reference log-probabilities ends early, and there is no model to complete it.
    #[error(
        "{}: {found} of {expected} pairs are scored; give it the reference model to complete it",
        path.display()
    )]
    CacheIncomplete {
        /// The file.
        path: PathBuf,
        /// Pairs that are scored.
        found: usize,
        /// Pairs of the dataset.
        expected: usize,
    },
    /// The reference cannot follow the policy.
    #[error(
        "the reference cannot be synchronised: {reason}; give the trainer a copy of the policy \
         with weights of its own, trainable, such as CausalLm::try_clone makes"
    )]
    NotSynchronisable {
        /// What is wrong with it.
        reason: String,
    },
}
