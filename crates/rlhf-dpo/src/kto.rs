//! Learning from answers without pairs: KTO, APO-zero and BCO.

mod examples;
mod loss;
mod summary;
mod trainer;

pub use examples::{LabelledAnswer, ScoredAnswer, mismatched_answers};
pub use loss::{KtoInputs, KtoLoss, KtoObjective, KtoOutput, kto_loss};
pub use summary::KtoEvaluation;
pub use trainer::{KtoConfig, KtoTrainer};
