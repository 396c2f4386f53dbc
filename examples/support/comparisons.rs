//! The embedded data as comparisons, and comparisons of the user's own.
#![allow(dead_code, unreachable_pub)] // a module of examples, which use a part of it

use std::error::Error;
use std::path::Path;

use rlhf::core::{Completions, GenerationConfig, Preference, RngStreams, generate};
use rlhf::models::data::{PreferencePair, read_jsonl};
use rlhf::models::{CausalLm, Tokenizer};

use crate::support::task::{Pair, SummaryTask};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Who writes the worse answers: a model with its own tokenizer.
pub struct Writer<'a> {
    pub model: &'a CausalLm,
    pub tokenizer: &'a Tokenizer,
    pub max_new_tokens: usize,
}

impl Writer<'_> {
    /// The human summary of each text against one that this model samples, in the tokens of
    /// `task`, whose tokenizer may be another.
    pub fn comparisons(
        &self,
        task: &SummaryTask,
        pairs: &[Pair],
        streams: &RngStreams,
        first_index: u64,
    ) -> Result<Vec<Preference>> {
        let written = self.summaries(task, pairs, streams, first_index)?;
        pairs
            .iter()
            .zip(written)
            .map(|(pair, written)| {
                let human = task.response(&pair.summary)?;
                Ok(Preference::new(task.prompt(&pair.text)?, human, written))
            })
            .collect()
    }

    /// A summary of each text that this model samples, in the tokens of `task`.
    pub fn summaries(
        &self,
        task: &SummaryTask,
        pairs: &[Pair],
        streams: &RngStreams,
        first_index: u64,
    ) -> Result<Vec<Vec<i64>>> {
        let own = SummaryTask::new(self.tokenizer.clone(), 64)?;
        let prompts = pairs
            .iter()
            .map(|pair| own.prompt(&pair.text))
            .collect::<Result<Vec<_>>>()?;
        let generation = GenerationConfig {
            max_new_tokens: self.max_new_tokens,
            stop_token_ids: vec![own.stop()],
            ..GenerationConfig::default()
        };
        let written: Completions =
            generate(self.model, &prompts, &generation, streams, first_index)?;
        let translated = |response: &[i64]| {
            let text = self.tokenizer.decode(response, true)?;
            let mut tokens = task.tokenizer().encode(&format!(" {}", text.trim()))?;
            // A summary that was cut off has no end in the other tokens either.
            if response.last() == Some(&own.stop()) {
                tokens.push(task.stop());
            }
            Ok(tokens)
        };
        let written = written.batch.into_sequences();
        written.iter().map(|s| translated(&s.response)).collect()
    }
}

/// The human summary of each text against that of the next text: a summary must fit its text,
/// not only read well.
pub fn against_mismatches(task: &SummaryTask, pairs: &[Pair]) -> Result<Vec<Preference>> {
    let next = pairs.iter().cycle().skip(1);
    pairs
        .iter()
        .zip(next)
        .map(|(pair, other)| {
            let chosen = task.response(&pair.summary)?;
            let rejected = task.response(&other.summary)?;
            Ok(Preference::new(task.prompt(&pair.text)?, chosen, rejected))
        })
        .collect()
}

/// `{"prompt", "chosen", "rejected"}` lines (and `margin`, where there is one) as tokens. Answers
/// end with the end-of-text token where the tokenizer has one, as they do when a model writes
/// them. A line without any token in its prompt cannot be used; how many there are is the second
/// result.
pub fn read_pairs(path: &Path, tokenizer: &Tokenizer) -> Result<(Vec<Preference>, usize)> {
    let lines: Vec<PreferencePair> = read_jsonl(path)?;
    let mut without_prompt = 0;
    let mut pairs = Vec::with_capacity(lines.len());
    for line in lines {
        let prompt = tokenizer.encode(&line.prompt)?;
        if prompt.is_empty() {
            without_prompt += 1;
            continue;
        }
        let answer = |text: &str| -> Result<Vec<i64>> {
            let mut tokens = tokenizer.encode(text)?;
            // An empty answer stays empty, so that it is seen to be.
            if !tokens.is_empty() {
                tokens.extend(tokenizer.eos_token_id());
            }
            Ok(tokens)
        };
        let mut pair = Preference::new(prompt, answer(&line.chosen)?, answer(&line.rejected)?);
        pair.margin = line.margin;
        pairs.push(pair);
    }
    Ok((pairs, without_prompt))
}
