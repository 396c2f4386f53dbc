//! The task of the examples: a one-line summary of a short text.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use rlhf::core::Sequence;
use rlhf::models::Tokenizer;
use rlhf::models::data::read_jsonl;
use serde::Deserialize;

/// What stands before the text.
pub const INSTRUCTION: &str = "Summarize the following text:\n";
/// What stands between the text and its summary.
pub const CUE: &str = "\n\nSummary:";

/// A text and the summary that a person wrote for it.
#[derive(Debug, Clone, Deserialize)]
pub struct Pair {
    pub text: String,
    pub summary: String,
}

/// Reads pairs from a JSONL file with the fields `text` and `summary`.
pub fn read_pairs(path: &Path) -> Result<Vec<Pair>, Box<dyn Error>> {
    let pairs: Vec<Pair> = read_jsonl(path)?;
    if pairs.is_empty() {
        return Err(format!("{}: the file has no line", path.display()).into());
    }
    Ok(pairs)
}

/// Turns pairs into tokens.
pub struct SummaryTask {
    tokenizer: Tokenizer,
    instruction: Vec<i64>,
    cue: Vec<i64>,
    stop: i64,
    max_text_tokens: usize,
}

impl SummaryTask {
    /// `max_text_tokens`: longer texts are cut, so that all fit the model's context window.
    pub fn new(tokenizer: Tokenizer, max_text_tokens: usize) -> Result<Self, Box<dyn Error>> {
        let stop = tokenizer
            .eos_token_id()
            .ok_or("the tokenizer names no eos_token, so no summary could end")?;
        Ok(Self {
            instruction: tokenizer.encode(INSTRUCTION)?,
            cue: tokenizer.encode(CUE)?,
            tokenizer,
            stop,
            max_text_tokens,
        })
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The token that ends a summary.
    pub fn stop(&self) -> i64 {
        self.stop
    }

    /// The tokens of `text`, cut to the limit.
    pub fn text(&self, text: &str) -> Result<Vec<i64>, Box<dyn Error>> {
        let mut tokens = self.tokenizer.encode(text)?;
        tokens.truncate(self.max_text_tokens);
        Ok(tokens)
    }

    /// The prompt that asks for a summary of these tokens of a text.
    pub fn prompt_of(&self, text: &[i64]) -> Arc<[i64]> {
        [&self.instruction, text, &self.cue].concat().into()
    }

    /// The prompt that asks for a summary of `text`.
    pub fn prompt(&self, text: &str) -> Result<Arc<[i64]>, Box<dyn Error>> {
        Ok(self.prompt_of(&self.text(text)?))
    }

    /// The prompts that ask for summaries of these texts.
    pub fn prompts(&self, pairs: &[Pair]) -> Result<Vec<Arc<[i64]>>, Box<dyn Error>> {
        pairs.iter().map(|pair| self.prompt(&pair.text)).collect()
    }

    /// A summary as the model should write it: a space, the words, the stop token.
    pub fn response(&self, summary: &str) -> Result<Vec<i64>, Box<dyn Error>> {
        let mut tokens = self.tokenizer.encode(&format!(" {summary}"))?;
        tokens.push(self.stop);
        Ok(tokens)
    }

    /// Prompt and human summary.
    pub fn sequence(&self, pair: &Pair) -> Result<Sequence, Box<dyn Error>> {
        Ok(Sequence {
            prompt: self.prompt(&pair.text)?,
            response: self.response(&pair.summary)?,
        })
    }

    /// Tokens of the instruction, which every prompt starts with.
    pub fn instruction_len(&self) -> usize {
        self.instruction.len()
    }

    /// Tokens of the cue, which every prompt ends with.
    pub fn cue_len(&self) -> usize {
        self.cue.len()
    }
}
