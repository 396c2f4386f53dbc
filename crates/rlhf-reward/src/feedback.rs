//! Asking people: which of two answers is better?
//!
//! [`ask`] shows [`Question`]s in a terminal and takes choices; [`FeedbackLog`] keeps them in a
//! file of `{"prompt", "chosen", "rejected"}` lines, which is what the trainers read.
//! [`most_informative`] says which questions are worth a person's time.

mod acquisition;
mod log;
mod session;

use serde::{Deserialize, Serialize};

pub use acquisition::{information, most_informative};
pub use log::{FeedbackLog, Recovery};
pub use session::{AskOptions, End, SessionReport, ask};

/// Two answers to a prompt, not yet compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What both answer.
    pub prompt: String,
    /// The answers.
    pub answers: [String; 2],
}

impl Question {
    /// A number that depends on the texts alone, and not on the order of the answers.
    pub fn id(&self) -> u64 {
        question_id(&self.prompt, &self.answers[0], &self.answers[1])
    }
}

/// What a person made of a [`Question`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// `answers[0]` is better.
    First,
    /// `answers[1]` is better.
    Second,
    /// Neither is better.
    Tie,
    /// No opinion.
    Skip,
}

/// FNV-1a over the lengths and bytes of the texts.
fn question_id(prompt: &str, one: &str, other: &str) -> u64 {
    let (one, other) = if one <= other {
        (one, other)
    } else {
        (other, one)
    };
    [prompt, one, other]
        .into_iter()
        .flat_map(|text| {
            (text.len() as u64)
                .to_le_bytes()
                .into_iter()
                .chain(text.bytes())
        })
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}
