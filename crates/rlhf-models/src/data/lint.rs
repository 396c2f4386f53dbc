//! What is wrong with a dataset, before it is trained on.

use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use rayon::prelude::*;
use serde::Serialize;

use super::encode::{EncodeOptions, Encoder, Joined, for_chunks};
use super::{Example, Format, Row, Text};
use crate::{Result, Tokenizer};

/// Rows that a finding shows.
const EXAMPLES: usize = 3;

/// What can be wrong with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LintKind {
    /// The text begins with the BOS token, and the tokenizer adds another.
    DoubleBos,
    /// An answer, or a text that is learned, does not end with a token that stops generation: a
    /// model learns to go on for ever.
    MissingEos,
    /// The prompt has other tokens alone than before its answer: the model is asked something
    /// else than what it learns to answer.
    Boundary,
    /// Nothing to answer.
    EmptyPrompt,
    /// Nothing to learn.
    EmptyCompletion,
    /// Both answers are the same.
    ChosenIsRejected,
    /// The same as an earlier row.
    Duplicate,
    /// Longer than the most tokens that are taken.
    TooLong,
}

impl fmt::Display for LintKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DoubleBos => "two BOS tokens",
            Self::MissingEos => "no EOS token at the end",
            Self::Boundary => "prompt tokenises differently before its answer",
            Self::EmptyPrompt => "empty prompt",
            Self::EmptyCompletion => "empty answer",
            Self::ChosenIsRejected => "chosen and rejected are the same",
            Self::Duplicate => "same as an earlier row",
            Self::TooLong => "too long",
        })
    }
}

/// A row that a finding shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LintExample {
    /// Number of the row, from 1; the line of a file, where there is one.
    pub line: usize,
    /// The place: `file:line`, or `row N`.
    pub place: String,
    /// What was seen.
    pub note: String,
}

/// One kind of fault, and how often it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is wrong.
    pub kind: LintKind,
    /// In how many rows.
    pub count: usize,
    /// The first of them.
    pub examples: Vec<LintExample>,
}

/// Lengths in tokens. Percentiles are the nearest rank's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Lengths {
    /// Half are no longer.
    pub p50: usize,
    /// Nine in ten are no longer.
    pub p90: usize,
    /// 99 in a hundred are no longer.
    pub p99: usize,
    /// The longest.
    pub max: usize,
    /// Sum of all.
    pub total: usize,
}

impl Lengths {
    fn of(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        let rank = |percent: usize| {
            let rank = (lengths.len() * percent).div_ceil(100).max(1);
            lengths.get(rank - 1).copied().unwrap_or(0)
        };
        Self {
            p50: rank(50),
            p90: rank(90),
            p99: rank(99),
            max: rank(100),
            total: lengths.iter().sum(),
        }
    }
}

/// What [`lint`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LintReport {
    /// The format of the rows; `None` without rows.
    pub format: Option<Format>,
    /// How many rows there are.
    pub rows: usize,
    /// Tokens of the prompts (of the texts, where there is no prompt).
    pub prompts: Lengths,
    /// Tokens of the answers; both of a pair count.
    pub responses: Lengths,
    /// Tokens of prompt and longest answer together.
    pub sequences: Lengths,
    /// What is wrong, by kind. Empty if nothing is.
    pub findings: Vec<Finding>,
}

impl LintReport {
    /// How many rows have a fault of a kind.
    pub fn count(&self, kind: LintKind) -> usize {
        let finding = self.findings.iter().find(|finding| finding.kind == kind);
        finding.map_or(0, |finding| finding.count)
    }
}

impl fmt::Display for LintReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.format {
            Some(format) => writeln!(f, "{} rows, {format} ({})", self.rows, format.columns())?,
            None => writeln!(f, "no rows")?,
        }
        writeln!(
            f,
            "tokens          p50      p90      p99      max        total"
        )?;
        for (name, l) in [
            ("prompt", self.prompts),
            ("answer", self.responses),
            ("together", self.sequences),
        ] {
            let Lengths {
                p50,
                p90,
                p99,
                max,
                total,
            } = l;
            writeln!(
                f,
                "{name:10} {p50:>8} {p90:>8} {p99:>8} {max:>8} {total:>12}"
            )?;
        }
        if self.findings.is_empty() {
            return write!(f, "nothing found");
        }
        for (i, finding) in self.findings.iter().enumerate() {
            let line = if i > 0 { "\n" } else { "" };
            write!(f, "{line}{}: {} rows", finding.kind, finding.count)?;
            for example in &finding.examples {
                write!(f, "\n  {}: {}", example.place, example.note)?;
            }
        }
        Ok(())
    }
}

/// Looks for rows that would train a model on something else than was meant, with the tokens that
/// [`encode`](super::encode()) would make of them under the same options.
///
/// ```
/// use rlhf_models::Tokenizer;
/// use rlhf_models::data::{EncodeOptions, Example, LintKind, Row, lint};
///
/// # fn main() -> rlhf_models::Result<()> {
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/tokenizers/chatml");
/// let tokenizer = Tokenizer::from_dir(folder)?;
/// let row = Row::new(Example::PromptCompletion {
///     prompt: "Name a colour: ".into(), // the space belongs to the answer
///     completion: "blue".into(),
/// });
/// let report = lint([Ok(row)], &tokenizer, &EncodeOptions::default())?;
/// assert_eq!(report.count(LintKind::Boundary), 1, "{report}");
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of the rows, and the tokenizer's and the chat template's.
pub fn lint(
    rows: impl IntoIterator<Item = Result<Row>>,
    tokenizer: &Tokenizer,
    options: &EncodeOptions,
) -> Result<LintReport> {
    let encoder = Encoder::new(tokenizer, options);
    let mut found: HashMap<LintKind, Finding> = HashMap::new();
    let mut seen: HashMap<u64, usize> = HashMap::new();
    let (mut prompts, mut responses, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
    let mut format = None;
    let mut count = 0;
    for_chunks(rows, |chunk| {
        let looked: Vec<Result<Looked>> = chunk
            .par_iter()
            .map(|row| look(row, &encoder, options).map_err(|error| error.of_row(row)))
            .collect();
        for (row, looked) in chunk.iter().zip(looked) {
            let mut looked = looked?;
            count += 1;
            format.get_or_insert(row.example.format());
            let line = row.location.as_ref().map_or(count, |l| l.line);
            if let Some(first) = seen.get(&looked.hash) {
                looked
                    .faults
                    .push((LintKind::Duplicate, format!("as row {first}")));
            } else {
                seen.insert(looked.hash, line);
            }
            prompts.push(looked.prompt);
            sequences.push(looked.prompt + looked.responses.iter().max().unwrap_or(&0));
            responses.extend(looked.responses);
            for (kind, note) in looked.faults {
                let finding = found.entry(kind).or_insert_with(|| Finding {
                    kind,
                    count: 0,
                    examples: Vec::new(),
                });
                finding.count += 1;
                if finding.examples.len() < EXAMPLES {
                    let place = match &row.location {
                        Some(location) => location.to_string(),
                        None => format!("row {line}"),
                    };
                    finding.examples.push(LintExample { line, place, note });
                }
            }
        }
        Ok(())
    })?;
    let mut findings: Vec<Finding> = found.into_values().collect();
    findings.sort_by_key(|finding| finding.kind);
    Ok(LintReport {
        format,
        rows: count,
        prompts: Lengths::of(prompts),
        responses: Lengths::of(responses),
        sequences: Lengths::of(sequences),
        findings,
    })
}

/// What there is to say of one row.
struct Looked {
    /// Tokens of the prompt.
    prompt: usize,
    /// Tokens of each answer.
    responses: Vec<usize>,
    /// Of all tokens: two rows with the same are duplicates.
    hash: u64,
    faults: Vec<(LintKind, String)>,
}

fn look(row: &Row, encoder: &Encoder<'_>, options: &EncodeOptions) -> Result<Looked> {
    let tools = &row.tools;
    let mut faults = Vec::new();
    let mut fault = |kind, note: String| faults.push((kind, note));
    let (ids, whole) = match &row.example {
        Example::LanguageModelling(text) => {
            if text.is_empty() {
                fault(LintKind::EmptyCompletion, "the text is empty".into());
            }
            (alone(encoder.learned(text, tools)?), true)
        }
        Example::Labelled { text, .. } => {
            if text.is_empty() {
                fault(LintKind::EmptyPrompt, "the text is empty".into());
            }
            (alone(encoder.text(text, tools)?), false)
        }
        Example::PromptOnly(prompt) => {
            if prompt.is_empty() {
                fault(LintKind::EmptyPrompt, "the prompt is empty".into());
            }
            (alone(encoder.prompt(prompt, tools)?), false)
        }
        Example::PromptCompletion { prompt, completion }
        | Example::Unpaired {
            prompt, completion, ..
        } => (
            answered(encoder, prompt, &[completion], row, &mut fault)?,
            false,
        ),
        Example::Preference {
            prompt,
            chosen,
            rejected,
            ..
        } => {
            if chosen == rejected {
                fault(LintKind::ChosenIsRejected, excerpt(chosen));
            }
            (
                answered(encoder, prompt, &[chosen, rejected], row, &mut fault)?,
                false,
            )
        }
    };
    let start: Vec<i64> = ids
        .prompt
        .iter()
        .chain(ids.responses.iter().flatten())
        .take(2)
        .copied()
        .collect();
    if let (Some(bos), [a, b]) = (encoder.tokenizer.bos_token_id(), start.as_slice())
        && *a == bos
        && *b == bos
    {
        fault(LintKind::DoubleBos, show(encoder.tokenizer, &start));
    }
    let ends: Vec<&Vec<i64>> = match whole {
        true => vec![&ids.prompt],
        false => ids.responses.iter().collect(),
    };
    if let Some(open) = ends
        .iter()
        .find(|ids| !ends_with_stop(encoder.tokenizer, ids))
    {
        let tail = &open[open.len().saturating_sub(6)..];
        fault(
            LintKind::MissingEos,
            format!("ends with {}", show(encoder.tokenizer, tail)),
        );
    }
    let longest = ids.responses.iter().map(Vec::len).max().unwrap_or(0);
    let tokens = ids.prompt.len() + longest;
    if let Some(max) = options.max_tokens
        && tokens > max
    {
        fault(
            LintKind::TooLong,
            format!("{tokens} tokens, at most {max} are taken"),
        );
    }
    let mut hasher = DefaultHasher::new();
    (&ids.prompt, &ids.responses).hash(&mut hasher);
    if let Example::Unpaired { label, .. } = &row.example {
        label.hash(&mut hasher);
    }
    Ok(Looked {
        prompt: ids.prompt.len(),
        responses: ids.responses.iter().map(Vec::len).collect(),
        hash: hasher.finish(),
        faults,
    })
}

fn alone(prompt: Vec<i64>) -> Joined {
    Joined {
        prompt,
        responses: Vec::new(),
        changed: 0,
    }
}

fn answered(
    encoder: &Encoder<'_>,
    prompt: &Text,
    answers: &[&Text],
    row: &Row,
    fault: &mut impl FnMut(LintKind, String),
) -> Result<Joined> {
    let joined = encoder.join(prompt, answers, &row.tools)?;
    if prompt.is_empty() {
        fault(
            LintKind::EmptyPrompt,
            format!("answered by {}", excerpt(answers[0])),
        );
    }
    if answers.iter().any(|answer| answer.is_empty()) {
        fault(
            LintKind::EmptyCompletion,
            format!("after {}", excerpt(prompt)),
        );
    }
    if joined.changed > 0 {
        let kept = &joined.prompt[joined.prompt.len().saturating_sub(4)..];
        let next = joined
            .responses
            .iter()
            .map(|ids| show(encoder.tokenizer, &ids[..ids.len().min(3)]));
        fault(
            LintKind::Boundary,
            format!(
                "the prompt loses its last {} tokens: {} then {}",
                joined.changed,
                show(encoder.tokenizer, kept),
                next.collect::<Vec<_>>().join(" or ")
            ),
        );
    }
    Ok(joined)
}

/// Whether generation would stop here: the last token that is not mere space stops it.
fn ends_with_stop(tokenizer: &Tokenizer, ids: &[i64]) -> bool {
    for (i, id) in ids.iter().enumerate().rev() {
        if tokenizer.stop_token_ids().contains(id) {
            return true;
        }
        let rest = tokenizer.decode(&ids[i..], false);
        if rest.is_ok_and(|text| !text.trim().is_empty()) {
            return false;
        }
    }
    false
}

/// Tokens one by one, for people.
fn show(tokenizer: &Tokenizer, ids: &[i64]) -> String {
    let one = |id: &i64| format!("{:?}", tokenizer.decode(&[*id], false).unwrap_or_default());
    ids.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// The start of a text.
fn excerpt(text: &Text) -> String {
    let text = match text {
        Text::Plain(text) => text.as_str(),
        Text::Chat(messages) => messages.last().and_then(|m| m.text()).unwrap_or(""),
    };
    let start: String = text.chars().take(40).collect();
    match start.len() < text.len() {
        true => format!("{start:?}…"),
        false => format!("{start:?}"),
    }
}
