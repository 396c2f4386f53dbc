//! Rewards that are programs: functions of the texts of prompt and answer, run in parallel.
//!
//! A closure `Fn(&str, &str) -> f64` is a [`TextReward`], and so are the usual ones here.
//! [`program`] makes a reward model of any of them; [`RewardSum`](crate::RewardSum) adds several
//! up and reports each by name; [`CostOf`](crate::CostOf) makes constraints of them.
//!
//! | for | see |
//! |---|---|
//! | answers of a certain length | [`LengthTarget`] |
//! | a format, by regular expression | [`Format`] |
//! | overlap with a reference answer | [`RougeTo`] |
//! | the right answer, as text or as a number | [`ExactAnswer`], [`NumericAnswer`] |
//! | JSON | [`ValidJson`] |
//! | words that must not be written | [`ForbiddenTerms`] |
//! | whatever a process finds out, unit tests for one | `ProcessReward` (Unix) |

mod answer;
mod format;
mod length;
#[cfg(unix)]
mod process;
mod reference;

use rayon::prelude::*;
use rlhf_core::{Completions, Error as CoreError, RewardModel, Text};
use tch::{Kind, Tensor};

pub use answer::{ExactAnswer, NumericAnswer, last_number};
pub use format::{ForbiddenTerms, Format, ValidJson};
pub use length::{LengthTarget, LengthUnit};
#[cfg(unix)]
pub use process::{Input, ProcessReward, Verdict};
pub use reference::{References, RougeKind, RougeTo};

/// A reward computed from texts.
pub trait TextReward: Send + Sync {
    /// A finite number, the greater the better.
    ///
    /// # Errors
    /// Whatever keeps the reward from being known. An answer that is merely bad is no error.
    fn reward(&self, prompt: &str, answer: &str) -> rlhf_core::Result<f64>;
}

impl<F: Fn(&str, &str) -> f64 + Send + Sync> TextReward for F {
    fn reward(&self, prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        Ok(self(prompt, answer))
    }
}

/// A [`TextReward`] as a reward model; see [`program`].
#[derive(Debug, Clone)]
pub struct ProgramReward<T>(T);

/// A reward model of a program. The completions of a batch are judged in parallel; they need
/// texts ([`Completions::texts`]).
///
/// ```
/// use rlhf_reward::core::{Completions, RewardModel, Sequence, SequenceBatch, Text};
/// use rlhf_reward::{program, programs::ValidJson};
///
/// let batch = SequenceBatch::new(vec![Sequence::new([1], [2])])?;
/// let text = Text { prompt: "As JSON:".into(), response: r#"{"name": "Ada"}"#.into() };
/// let completions = Completions::written(batch).with_texts(vec![text])?;
/// let json = program(ValidJson::with_keys(["name"]));
/// assert_eq!(json.score(&completions)?.double_value(&[0]), 1.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn program<T: TextReward>(reward: T) -> ProgramReward<T> {
    ProgramReward(reward)
}

impl<T: TextReward> RewardModel for ProgramReward<T> {
    fn score(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        let judge = |(row, text): (usize, &Text)| {
            let value = self.0.reward(&text.prompt, &text.response)?;
            match value.is_finite() {
                true => Ok(value),
                false => Err(CoreError::NonFinite {
                    what: "reward",
                    row,
                    value,
                }),
            }
        };
        let values = completions
            .texts()?
            .par_iter()
            .enumerate()
            .map(judge)
            .collect::<rlhf_core::Result<Vec<f64>>>()?;
        Ok(Tensor::from_slice(&values).to_kind(Kind::Float))
    }

    fn is_asked_everywhere(&self) -> bool {
        false
    }
}
