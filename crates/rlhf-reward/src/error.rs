//! What can go wrong when a scorer is trained.

use crate::Skipped;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of `rlhf-reward`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A batch, a model or a file is not as it should be.
    #[error(transparent)]
    Core(#[from] rlhf_core::Error),
    /// The update of the weights failed.
    #[error(transparent)]
    Scale(#[from] rlhf_scale::Error),
    /// The scorer does not give one number per sequence.
    #[error(
        "the scorer gave {shape:?} for {sequences} sequences; {objective} needs [{sequences}, 1]"
    )]
    NotAReward {
        /// Shape of the scores.
        shape: Vec<i64>,
        /// Sequences that were scored.
        sequences: usize,
        /// What was being computed.
        objective: &'static str,
    },
    /// A class label that the scorer has no logit for.
    #[error("text {row} has label {label} but the scorer knows 0..{num_labels}")]
    LabelOutOfRange {
        /// Position in the batch.
        row: usize,
        /// The label.
        label: i64,
        /// Labels of the scorer.
        num_labels: i64,
    },
    /// Classes and scores in one batch.
    #[error("text {row} has a {found} label but text 0 has a {expected} one; use one kind for all")]
    MixedLabels {
        /// Position in the batch.
        row: usize,
        /// Kind of this text's label.
        found: &'static str,
        /// Kind of the first text's label.
        expected: &'static str,
    },
    /// Scores that do not differ cannot be brought to deviation 1.
    #[error("{count} calibration scores have deviation {deviation}; they must differ")]
    Uncalibrated {
        /// How many scores there were.
        count: usize,
        /// Their standard deviation.
        deviation: f64,
    },
    /// A model with several heads gave another number of scores.
    #[error(
        "the scorer gave {shape:?} for {sequences} sequences; {heads} heads need [{sequences}, {heads}]"
    )]
    NotHeads {
        /// Shape of the scores.
        shape: Vec<i64>,
        /// Sequences that were scored.
        sequences: usize,
        /// Heads that were asked for.
        heads: usize,
    },
    /// Every comparison of a batch was skipped.
    #[error("none of {pairs} comparisons teaches anything: {skipped}")]
    NothingToLearn {
        /// Comparisons of the batch.
        pairs: usize,
        /// Why they were skipped.
        skipped: Skipped,
    },
    /// A ranking that orders nothing, or not as many answers as it has.
    #[error("ranking {row}: {reason}")]
    BadRanking {
        /// Position in the batch.
        row: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The safer answer is called unsafe, and the less safe one safe.
    #[error("comparison {row} calls the safer answer unsafe and the less safe one safe")]
    InconsistentSafety {
        /// Position in the batch.
        row: usize,
    },
}
