//! Online DPO: the policy answers, a judge ranks, and the policy learns from that at once.

mod judge;
mod trainer;

pub use judge::{Judge, Verdict};
pub use trainer::{OnlineDpoConfig, OnlineDpoTrainer};
