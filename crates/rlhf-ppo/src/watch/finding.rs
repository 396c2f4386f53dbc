//! What the watch says.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a [`HackingWatch`](crate::HackingWatch) can find. The first seven are said only while the
/// reward rises, the others whatever it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FindingKind {
    /// The reward rises while the divergence from the reference is beyond what rewards are to
    /// be believed at.
    KlDrift,
    /// The reward rises while answers become much longer or much shorter.
    LengthDrift,
    /// The reward rises while answers repeat themselves.
    Repetition,
    /// The reward rises while different prompts get the same answer.
    LostVariety,
    /// The reward rises while the judges of an ensemble come to disagree: the answers are unlike
    /// those that they were trained on.
    Disagreement,
    /// The reward rises while a second, gold reward falls from where it has been.
    GoldDecline,
    /// The reward rises and a gold reward has not moved.
    GoldStalled,
    /// Answers are no longer finished.
    EosCollapse,
    /// Answers end almost at once.
    ShortAnswers,
    /// The distribution of the next token has lost its entropy: nothing new is tried.
    EntropyCollapse,
    /// The critic explains nothing of the returns, step after step.
    DeadCritic,
    /// The KL controller's target has another unit than what is measured.
    KlUnits,
    /// Almost all prompts have answers that all score the same, and teach nothing.
    IdleGroups,
}

/// A number before and now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The metric.
    pub metric: String,
    /// Its mean over the first window, or over its best one.
    pub before: f64,
    /// Its mean over the last window.
    pub now: f64,
}

/// Something that the watch found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// The part of the run, `"ppo"` or `"grpo"`.
    pub phase: String,
    /// The step at which it was found.
    pub step: u64,
    /// What is seen, with its numbers.
    pub what: String,
    /// What to change.
    pub advice: String,
    /// The numbers.
    pub evidence: Vec<Evidence>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            phase,
            step,
            what,
            advice,
            ..
        } = self;
        write!(f, "{phase} step {step}: {what}. {advice}")
    }
}
