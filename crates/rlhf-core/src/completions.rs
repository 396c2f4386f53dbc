//! What generation returns and what reward models read.

use serde::{Deserialize, Serialize};

use crate::{Error, KeptTokens, Result, SequenceBatch};

/// Why a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model wrote a stop token, which is the response's last token, or a stop string, which
    /// its last token completed.
    Stop,
    /// The limit on new tokens was reached.
    Length,
}

/// A prompt and its response as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// The prompt.
    pub prompt: String,
    /// The response, without special tokens.
    pub response: String,
}

/// Responses to prompts, with all that is known about how they were made.
#[derive(Debug, Clone)]
pub struct Completions {
    /// The token ids.
    pub batch: SequenceBatch,
    /// The decoded texts, one per sequence, where a tokenizer was attached.
    pub texts: Option<Vec<Text>>,
    /// One per sequence.
    pub finish_reasons: Vec<FinishReason>,
    /// Log-probabilities (nats) that the responses were sampled with, under the distribution
    /// *after* temperature and filters: one list per sequence, one number per response token.
    /// `None` for responses that were not sampled here.
    pub sampling_logprobs: Option<Vec<Vec<f32>>>,
    /// Log-probabilities (nats) of the same tokens under the policy's own distribution: before
    /// penalties, temperature and filters. The same numbers where there are none of these.
    pub policy_logprobs: Option<Vec<Vec<f32>>>,
    /// The tokens that could be drawn at each step, one list per sequence, where a filter was at
    /// work and [`Generator::with_kept_tokens`](crate::Generator::with_kept_tokens) asked for
    /// them.
    pub kept: Option<Vec<KeptTokens>>,
}

impl Completions {
    /// Completions that somebody else wrote: they count as finished, and have no log-probs.
    pub fn written(batch: SequenceBatch) -> Self {
        let finish_reasons = vec![FinishReason::Stop; batch.len()];
        Self {
            batch,
            texts: None,
            finish_reasons,
            sampling_logprobs: None,
            policy_logprobs: None,
            kept: None,
        }
    }

    /// Attaches texts.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] unless there is one text per sequence.
    pub fn with_texts(mut self, texts: Vec<Text>) -> Result<Self> {
        if texts.len() != self.batch.len() {
            return Err(Error::LengthMismatch {
                left: "texts",
                left_len: texts.len(),
                right: "the batch",
                right_len: self.batch.len(),
            });
        }
        self.texts = Some(texts);
        Ok(self)
    }

    /// The texts.
    ///
    /// # Errors
    /// [`Error::Empty`] if none are attached.
    pub fn texts(&self) -> Result<&[Text]> {
        self.texts.as_deref().ok_or(Error::Empty {
            what: "Completions::texts",
            help: "attach a tokenizer (or call with_texts) before a model that reads text",
        })
    }

    /// The rows of `indices`, in that order.
    ///
    /// # Errors
    /// [`Error::Empty`] if `indices` is.
    ///
    /// # Panics
    /// If an index is not below the number of sequences.
    pub fn select(&self, indices: &[usize]) -> Result<Self> {
        fn pick<T: Clone>(from: &[T], indices: &[usize]) -> Vec<T> {
            indices.iter().map(|&i| from[i].clone()).collect()
        }
        Ok(Self {
            batch: self.batch.select(indices)?,
            texts: self.texts.as_ref().map(|t| pick(t, indices)),
            finish_reasons: pick(&self.finish_reasons, indices),
            sampling_logprobs: self.sampling_logprobs.as_ref().map(|l| pick(l, indices)),
            policy_logprobs: self.policy_logprobs.as_ref().map(|l| pick(l, indices)),
            kept: self.kept.as_ref().map(|k| pick(k, indices)),
        })
    }
}

/// Turns token ids into text. Tokenizers implement it; a closure does too.
pub trait Detokenize: Send + Sync {
    /// The text of `ids`, without special tokens.
    ///
    /// # Errors
    /// If an id has no text.
    fn detokenize(&self, ids: &[i64]) -> Result<String>;
}

impl<F: Fn(&[i64]) -> Result<String> + Send + Sync> Detokenize for F {
    fn detokenize(&self, ids: &[i64]) -> Result<String> {
        self(ids)
    }
}

impl Completions {
    /// Decodes prompts and responses and attaches the texts.
    ///
    /// # Errors
    /// Those of [`Detokenize::detokenize`].
    pub fn decoded(self, detokenizer: &dyn Detokenize) -> Result<Self> {
        let texts = self
            .batch
            .sequences()
            .iter()
            .map(|s| {
                Ok(Text {
                    prompt: detokenizer.detokenize(&s.prompt)?,
                    response: detokenizer.detokenize(&s.response)?,
                })
            })
            .collect::<Result<_>>()?;
        self.with_texts(texts)
    }
}
