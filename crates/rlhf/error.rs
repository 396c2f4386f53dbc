//! One error for the whole chain.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Anything that can go wrong from a model folder to a trained model: the errors of the crates
/// below, and those of [`RlhfSystem`](crate::RlhfSystem).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Traits, batches, generation, checkpoints, observers.
    #[error(transparent)]
    Core(#[from] rlhf_core::Error),
    /// Optimisers and updates.
    #[error(transparent)]
    Scale(#[from] rlhf_scale::Error),
    /// Model folders, tokenizers, datasets.
    #[error(transparent)]
    Models(#[from] rlhf_models::Error),
    /// Supervised fine-tuning.
    #[error(transparent)]
    Sft(#[from] rlhf_sft::Error),
    /// Training of reward models.
    #[error(transparent)]
    Reward(#[from] rlhf_reward::Error),
    /// Direct preference optimisation.
    #[error(transparent)]
    Dpo(#[from] rlhf_dpo::Error),
    /// Proximal policy optimisation.
    #[error(transparent)]
    Ppo(#[from] rlhf_ppo::Error),
    /// The tokenizer that is to serve a model does not fit it.
    #[error("{}: {source}", path.display())]
    TokenizerMismatch {
        /// Folder of the model.
        path: PathBuf,
        /// In what it does not fit.
        source: rlhf_models::Error,
    },
    /// A reward model must have one output.
    #[error("{}: a reward model has one label, this classifier has {num_labels}", path.display())]
    NotARewardModel {
        /// Folder of the model.
        path: PathBuf,
        /// Its labels.
        num_labels: i64,
    },
    /// A text has no tokens, so there is nothing to continue or to score.
    #[error("the {what} {text:?} has no tokens")]
    NoTokens {
        /// Which text: `"prompt"` or `"text"`.
        what: &'static str,
        /// The text.
        text: String,
    },
}
