//! Datasets in TRL's formats, from JSONL and Parquet files, to what the trainers take.
//!
//! ```
//! use rlhf_models::Tokenizer;
//! use rlhf_models::core::Preference;
//! use rlhf_models::data::{EncodeOptions, Encoded, Rows, encode};
//!
//! # fn main() -> rlhf_models::Result<()> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/tokenizers/chatml");
//! # let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/data/preference.jsonl");
//! let tokenizer = Tokenizer::from_dir(folder)?;
//! let pairs: Encoded<Preference> =
//!     encode(Rows::open(file)?, &tokenizer, &EncodeOptions::default())?;
//! println!("{} pairs; {}", pairs.examples.len(), pairs.counts);
//! # Ok(())
//! # }
//! ```
//!
//! [`Rows`] streams a file and finds out its [`Format`] by its columns; texts may be plain or
//! conversations ([`Text`]). [`encode()`] tokenises on all cores, a piece of the file at a time, so
//! that a file is never in memory as text. [`lint()`] says what is wrong with a file before it is
//! trained on. For records of a type of your own there is [`read_jsonl`].
//!
//! Where a prompt ends is decided by tokens, as TRL does it: a prompt is encoded alone and
//! together with each of its answers, and what all have in common is the prompt.

mod encode;
mod format;
mod jsonl;
mod lint;
#[cfg(feature = "parquet")]
mod parquet;
mod prompt;
mod row;
mod rows;

use serde::{Deserialize, Serialize};

pub use encode::{
    EncodeCounts, EncodeOptions, Encoded, FromRow, LabelledSequence, Overlong, UnpairedSequence,
    encode,
};
pub use format::Format;
pub use jsonl::read_jsonl;
pub use lint::{Finding, Lengths, LintExample, LintKind, LintReport, lint};
pub use prompt::split_prompt;
pub use row::{Example, Location, Row, Text};
pub use rows::Rows;

/// A prompt and the answer that a model is to learn: supervised fine-tuning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptCompletion {
    /// What the model is given.
    pub prompt: String,
    /// What it is to write.
    pub completion: String,
}

/// Two answers, one better than the other: reward models and preference optimisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreferencePair {
    /// What both answer.
    pub prompt: String,
    /// The better answer.
    pub chosen: String,
    /// The worse one.
    pub rejected: String,
    /// By how much, in reward units, where the labellers said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
}

/// A text and what it was labelled with: a class (0, 1, …) or a rating.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelledText {
    /// The text.
    pub text: String,
    /// The class, or the rating.
    pub label: f64,
}
