//! Rows to token ids.

// The sealed trait names types that no other crate can.
#![allow(private_interfaces)]

mod encoder;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use rayon::prelude::*;
use rlhf_core::{Preference, Sequence};
use serde::{Deserialize, Serialize};

use super::{Example, Row};
use crate::{Error, Result, Tokenizer};
pub(super) use encoder::{Encoder, Joined};

/// Rows that are encoded at once.
const CHUNK_ROWS: usize = 4096;
/// Bytes of text that are in memory at once, about.
const CHUNK_BYTES: usize = 32 << 20;

/// How rows become token ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncodeOptions {
    /// Most tokens of a prompt and its answer together.
    pub max_tokens: Option<usize>,
    /// What becomes of rows that are longer.
    pub overlong: Overlong,
    /// Whether a plain answer gets the EOS token, unless it ends with one already. Conversations
    /// end as their template ends them.
    pub append_eos: bool,
}

impl Default for EncodeOptions {
    /// Any length; EOS is appended, as TRL does.
    fn default() -> Self {
        Self {
            max_tokens: None,
            overlong: Overlong::Drop,
            append_eos: true,
        }
    }
}

/// What becomes of a row that is too long. Dropped rows and cut rows are counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// It is left out (TRL's reward trainer).
    #[default]
    Drop,
    /// The end is cut off (`keep_start`). A row of whose answer nothing is left is dropped.
    KeepStart,
    /// The prompt loses its start (`keep_end`), so far that the longest answer fits; both
    /// answers of a pair keep the same prompt. A row whose answer alone is too long is dropped,
    /// where TRL would cut into the answer.
    KeepEnd,
}

/// How many rows there were, and what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct EncodeCounts {
    /// Rows read.
    pub rows: usize,
    /// Rows left out because they are too long.
    pub dropped_too_long: usize,
    /// Rows left out because there is no token to learn, or none to begin with.
    pub dropped_empty: usize,
    /// Rows that lost tokens.
    pub cut: usize,
}

impl fmt::Display for EncodeCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows: {} dropped as too long, {} as empty, {} cut",
            self.rows, self.dropped_too_long, self.dropped_empty, self.cut
        )
    }
}

/// A dataset as the trainers take it.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded<T> {
    /// In the order of the rows.
    pub examples: Vec<T>,
    /// The number of each example's row, counted from 0 over all rows, dropped ones included.
    pub rows: Vec<usize>,
    /// What became of the rows.
    pub counts: EncodeCounts,
}

/// An answer that somebody found good, or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpairedSequence {
    /// Prompt and answer.
    pub sequence: Sequence,
    /// Whether it is good.
    pub desirable: bool,
}

/// A text, as the prompt of an empty response, and its label.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledSequence {
    /// The text.
    pub sequence: Sequence,
    /// A class (0, 1, …) or a rating.
    pub label: f64,
}

/// What [`encode`] can make of rows: [`Sequence`] (language modelling, prompt-completion),
/// [`Preference`], [`UnpairedSequence`], [`LabelledSequence`], and `Arc<[i64]>` for the prompts of
/// all formats that have them.
pub trait FromRow: Sized + Send + sealed::Encode {}

impl<T: Send + sealed::Encode> FromRow for T {}

/// What became of a row.
pub(super) enum Outcome<T> {
    Whole(T),
    Cut(T),
    TooLong,
    Empty,
}

pub(super) mod sealed {
    use super::{Arc, Encoder, Outcome, Result, Row};

    /// Not for other crates to implement.
    pub trait Encode: Sized {
        /// The formats that can be taken, for messages.
        const TAKES: &'static str;

        /// `None` for a row of a format that cannot be taken.
        fn encode(row: &Row, encoder: &Encoder<'_>) -> Result<Option<Outcome<Self>>>;

        fn prompt_mut(&mut self) -> &mut Arc<[i64]>;
    }
}

/// Tokenises rows on all cores. Only a piece of the dataset is in memory as text at any time;
/// prompts that are equal share their memory, and with it the forward pass.
///
/// ```
/// use rlhf_models::Tokenizer;
/// use rlhf_models::core::Sequence;
/// use rlhf_models::data::{EncodeOptions, Encoded, Example, Row, encode};
///
/// # fn main() -> rlhf_models::Result<()> {
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/tokenizers/chatml");
/// let tokenizer = Tokenizer::from_dir(folder)?;
/// let row = Row::new(Example::PromptCompletion {
///     prompt: "2 + 2 =".into(),
///     completion: " 4".into(),
/// });
/// let data: Encoded<Sequence> = encode([Ok(row)], &tokenizer, &EncodeOptions::default())?;
/// assert_eq!(data.examples[0].response.last().copied(), tokenizer.eos_token_id());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of the rows; [`Error::WrongFormat`] for rows that `T` cannot be made of; the
/// tokenizer's and the chat template's, as [`Error::Row`] with file and line.
pub fn encode<T: FromRow>(
    rows: impl IntoIterator<Item = Result<Row>>,
    tokenizer: &Tokenizer,
    options: &EncodeOptions,
) -> Result<Encoded<T>> {
    let encoder = Encoder::new(tokenizer, options);
    let mut data = Encoded {
        examples: Vec::new(),
        rows: Vec::new(),
        counts: EncodeCounts::default(),
    };
    let mut prompts: HashSet<Arc<[i64]>> = HashSet::new();
    for_chunks(rows, |chunk| {
        let encoded: Vec<Result<Outcome<T>>> = chunk
            .par_iter()
            .map(|row| {
                match T::encode(row, &encoder) {
                    Ok(Some(outcome)) => Ok(outcome),
                    Ok(None) => Err(Error::WrongFormat {
                        found: row.example.format(),
                        needed: T::TAKES,
                    }),
                    Err(error) => Err(error),
                }
                .map_err(|error| error.of_row(row))
            })
            .collect();
        for outcome in encoded {
            let row = data.counts.rows;
            data.counts.rows += 1;
            let mut example = match outcome? {
                Outcome::Whole(example) => example,
                Outcome::Cut(example) => {
                    data.counts.cut += 1;
                    example
                }
                Outcome::TooLong => {
                    data.counts.dropped_too_long += 1;
                    continue;
                }
                Outcome::Empty => {
                    data.counts.dropped_empty += 1;
                    continue;
                }
            };
            let prompt = example.prompt_mut();
            match prompts.get(&*prompt) {
                Some(known) => *prompt = Arc::clone(known),
                None => {
                    prompts.insert(Arc::clone(prompt));
                }
            }
            data.examples.push(example);
            data.rows.push(row);
        }
        Ok(())
    })?;
    Ok(data)
}

/// Gives rows to `work` a chunk at a time.
pub(super) fn for_chunks(
    rows: impl IntoIterator<Item = Result<Row>>,
    mut work: impl FnMut(&[Row]) -> Result<()>,
) -> Result<()> {
    let mut chunk = Vec::new();
    let mut bytes = 0;
    for row in rows {
        let row = row?;
        bytes += row.bytes();
        chunk.push(row);
        if chunk.len() == CHUNK_ROWS || bytes > CHUNK_BYTES {
            work(&chunk)?;
            chunk.clear();
            bytes = 0;
        }
    }
    match chunk.is_empty() {
        true => Ok(()),
        false => work(&chunk),
    }
}

impl sealed::Encode for Sequence {
    const TAKES: &'static str = "language modelling or prompt-completion";

    fn encode(row: &Row, encoder: &Encoder<'_>) -> Result<Option<Outcome<Self>>> {
        Ok(Some(match &row.example {
            Example::LanguageModelling(text) => encoder.whole(text, &row.tools)?,
            Example::PromptCompletion { prompt, completion } => {
                let joined = encoder.join(prompt, &[completion], &row.tools)?;
                encoder.fit(joined, |prompt, [response]| Sequence::new(prompt, response))
            }
            _ => return Ok(None),
        }))
    }

    fn prompt_mut(&mut self) -> &mut Arc<[i64]> {
        &mut self.prompt
    }
}

impl sealed::Encode for UnpairedSequence {
    const TAKES: &'static str = "unpaired preference";

    fn encode(row: &Row, encoder: &Encoder<'_>) -> Result<Option<Outcome<Self>>> {
        let Example::Unpaired {
            prompt,
            completion,
            label,
        } = &row.example
        else {
            return Ok(None);
        };
        let joined = encoder.join(prompt, &[completion], &row.tools)?;
        Ok(Some(encoder.fit(joined, |prompt, [response]| Self {
            sequence: Sequence::new(prompt, response),
            desirable: *label,
        })))
    }

    fn prompt_mut(&mut self) -> &mut Arc<[i64]> {
        &mut self.sequence.prompt
    }
}

impl sealed::Encode for Preference {
    const TAKES: &'static str = "preference";

    fn encode(row: &Row, encoder: &Encoder<'_>) -> Result<Option<Outcome<Self>>> {
        let Example::Preference {
            prompt,
            chosen,
            rejected,
            margin,
        } = &row.example
        else {
            return Ok(None);
        };
        let joined = encoder.join(prompt, &[chosen, rejected], &row.tools)?;
        Ok(Some(encoder.fit(joined, |prompt, [chosen, rejected]| {
            Preference {
                margin: *margin,
                ..Preference::new(prompt, chosen, rejected)
            }
        })))
    }

    fn prompt_mut(&mut self) -> &mut Arc<[i64]> {
        &mut self.prompt
    }
}

impl sealed::Encode for LabelledSequence {
    const TAKES: &'static str = "labelled text";

    fn encode(row: &Row, encoder: &Encoder<'_>) -> Result<Option<Outcome<Self>>> {
        let Example::Labelled { text, label } = &row.example else {
            return Ok(None);
        };
        let ids = encoder.text(text, &row.tools)?;
        Ok(Some(encoder.fit_ids(ids, |ids| Self {
            sequence: Sequence::new(ids, []),
            label: *label,
        })))
    }

    fn prompt_mut(&mut self) -> &mut Arc<[i64]> {
        &mut self.sequence.prompt
    }
}

impl sealed::Encode for Arc<[i64]> {
    const TAKES: &'static str = "prompt-only, or another with prompts";

    fn encode(row: &Row, encoder: &Encoder<'_>) -> Result<Option<Outcome<Self>>> {
        let prompt = match &row.example {
            Example::PromptOnly(prompt)
            | Example::PromptCompletion { prompt, .. }
            | Example::Preference { prompt, .. }
            | Example::Unpaired { prompt, .. } => prompt,
            _ => return Ok(None),
        };
        let ids = encoder.prompt(prompt, &row.tools)?;
        Ok(Some(encoder.fit_ids(ids, Into::into)))
    }

    fn prompt_mut(&mut self) -> &mut Arc<[i64]> {
        self
    }
}
