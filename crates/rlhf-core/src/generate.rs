//! Writing responses to prompts.

mod best_of_n;
mod rows;
mod shared;
mod stream;
mod text;
mod told;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::rng::RngStreams;
use crate::sampling::SamplingConfig;
use crate::{
    Completions, Detokenize, Error, KeptTokens, Policy, Result, Sequence, SequenceBatch, Text,
};

use rows::{Row, Rows};

pub use best_of_n::BestOfN;
pub use stream::{TextPiece, TextStream};

/// How responses are written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationConfig {
    /// Most tokens of a response, its stop token included.
    pub max_new_tokens: usize,
    /// Stop tokens cannot be drawn before a response has this many tokens.
    pub min_new_tokens: usize,
    /// How each token is chosen.
    pub sampling: SamplingConfig,
    /// A response ends with the first of these that it writes. Without any, every response has
    /// `max_new_tokens` tokens.
    pub stop_token_ids: Vec<i64>,
    /// A response also ends where its text comes to hold one of these. Its tokens are kept up to
    /// the one that completed the string; its text is cut before the string. A string that is
    /// complete before `min_new_tokens` is passed over. Needs a detokenizer
    /// ([`Generator::with_detokenizer`]).
    pub stop_strings: Vec<String>,
    /// Responses to each prompt.
    pub samples_per_prompt: usize,
    /// Most responses written side by side: as soon as one ends, the next prompt takes its place.
    /// Changes speed and memory, not what is written.
    pub batch_size: usize,
    /// Most tokens that a decoder keeps keys and values for: responses side by side, times the
    /// most tokens that one of them can have, prompt included. Prompts wait where more would be
    /// needed, down to one response at a time. `None` for no bound but `batch_size`.
    pub max_cached_tokens: Option<usize>,
}

impl Default for GenerationConfig {
    /// At most 53 tokens and 64 rows at a time, as TRL's `PPOConfig` (`response_length`,
    /// `local_rollout_forward_batch_size`); one sample a prompt from the model's own
    /// distribution; no stop token.
    fn default() -> Self {
        Self {
            max_new_tokens: 53,
            min_new_tokens: 0,
            sampling: SamplingConfig::default(),
            stop_token_ids: Vec::new(),
            stop_strings: Vec::new(),
            samples_per_prompt: 1,
            batch_size: 64,
            max_cached_tokens: None,
        }
    }
}

impl GenerationConfig {
    /// Whether some tokens may be out of reach at some step: by top-k, top-p or min-p, or because
    /// a response is too short to stop.
    pub fn narrows(&self) -> bool {
        let SamplingConfig {
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        top_k.is_some()
            || top_p.is_some()
            || min_p.is_some()
            || (self.min_new_tokens > 0 && !self.stop_token_ids.is_empty())
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for the first field that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let at_least_one = [
            ("generation.max_new_tokens", self.max_new_tokens),
            ("generation.samples_per_prompt", self.samples_per_prompt),
            ("generation.batch_size", self.batch_size),
            (
                "generation.max_cached_tokens",
                self.max_cached_tokens.unwrap_or(1),
            ),
        ];
        if let Some((field, value)) = at_least_one.into_iter().find(|(_, value)| *value == 0) {
            return Err(Error::config(field, value, "at least 1 is needed"));
        }
        if self.min_new_tokens > self.max_new_tokens {
            let (field, reason) = ("generation.min_new_tokens", "more than max_new_tokens");
            return Err(Error::config(field, self.min_new_tokens, reason));
        }
        if let Some(id) = self.stop_token_ids.iter().find(|id| **id < 0) {
            let reason = "token ids are not negative";
            return Err(Error::config("generation.stop_token_ids", id, reason));
        }
        if self.stop_strings.iter().any(String::is_empty) {
            let reason = "every text holds the empty string";
            return Err(Error::config("generation.stop_strings", "\"\"", reason));
        }
        self.sampling.validate()
    }
}

/// Samples responses to `prompts`, without gradients: [`Generator::generate`] without a
/// detokenizer.
///
/// # Errors
/// Those of [`Generator::new`] and [`Generator::generate`].
pub fn generate(
    policy: &(impl Policy + ?Sized),
    prompts: &[Arc<[i64]>],
    config: &GenerationConfig,
    rng: &RngStreams,
    first_index: u64,
) -> Result<Completions> {
    Generator::new(policy, config)?.generate(prompts, rng, first_index)
}

/// Writes responses with one policy and one configuration: all at once
/// ([`generate`](Self::generate)), as they come ([`stream`](Self::stream)), or the best of
/// several ([`best_of_n`](Self::best_of_n)).
///
/// Completion `k` of a call draws one number a token from the stream
/// `("generate", first_index + k)` of its random streams. What it writes depends on that and on
/// its prompt, and neither on `batch_size` nor on the other prompts, as far as the model's own
/// arithmetic does not. A trainer that counts the completions it has asked for and passes the
/// count as `first_index` never uses a number twice.
pub struct Generator<'a, P: ?Sized> {
    policy: &'a P,
    config: &'a GenerationConfig,
    detokenizer: Option<&'a dyn Detokenize>,
    kept_tokens: bool,
}

impl<'a, P: Policy + ?Sized> Generator<'a, P> {
    /// A generator without a detokenizer.
    ///
    /// # Errors
    /// Those of [`GenerationConfig::validate`].
    pub fn new(policy: &'a P, config: &'a GenerationConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            policy,
            config,
            detokenizer: None,
            kept_tokens: false,
        })
    }

    /// Attaches texts to the completions, and makes stop strings and streams possible.
    #[must_use]
    pub fn with_detokenizer(mut self, detokenizer: &'a dyn Detokenize) -> Self {
        self.detokenizer = Some(detokenizer);
        self
    }

    /// Notes which tokens could be drawn at each step ([`Completions::kept`]), where a filter or a
    /// ban takes any away: what a trainer needs to compute the probabilities that were sampled
    /// from.
    #[must_use]
    pub fn with_kept_tokens(mut self) -> Self {
        self.kept_tokens = true;
        self
    }

    /// Samples responses to `prompts`, without gradients.
    ///
    /// The completions are in the order of the prompts; samples of one prompt are adjacent and
    /// share its `Arc`. Neighbouring prompts that are the same `Arc` are also computed once. A
    /// response holds its stop token if it wrote one ([`FinishReason::Stop`]); one that reaches
    /// `max_new_tokens` or the end of the model's context window ends there
    /// ([`FinishReason::Length`]).
    ///
    /// [`FinishReason::Stop`]: crate::FinishReason::Stop
    /// [`FinishReason::Length`]: crate::FinishReason::Length
    ///
    /// # Errors
    /// Before anything is computed: [`Error::Empty`] without prompts, [`Error::EmptyPrompt`],
    /// [`Error::TooLong`] for a prompt that leaves no room for a token, which its length includes
    /// (rows count prompts), [`Error::InvalidConfig`] for stop strings without a detokenizer.
    /// Later: [`Error::NonFinite`] where a model's logits are not finite (rows count completions),
    /// the detokenizer's, and the model's own.
    pub fn generate(
        &self,
        prompts: &[Arc<[i64]>],
        rng: &RngStreams,
        first_index: u64,
    ) -> Result<Completions> {
        let samples = self.config.samples_per_prompt;
        self.write(prompts, samples, rng, first_index)
    }

    fn write(
        &self,
        prompts: &[Arc<[i64]>],
        samples: usize,
        rng: &RngStreams,
        first_index: u64,
    ) -> Result<Completions> {
        let mut rows = self.rows(prompts, samples, rng, first_index)?;
        let mut done = Vec::with_capacity(prompts.len() * samples);
        while rows.advance()? {
            done.append(&mut rows.done);
        }
        done.sort_unstable_by_key(|row| row.index);
        self.completions(done)
    }

    /// Rows that wait to be written.
    fn rows(
        &self,
        prompts: &[Arc<[i64]>],
        samples: usize,
        rng: &RngStreams,
        first_index: u64,
    ) -> Result<Rows<'a>> {
        let max_length = self.policy.max_length();
        check_prompts(prompts, max_length)?;
        if self.detokenizer.is_none() && !self.config.stop_strings.is_empty() {
            let (field, strings) = ("generation.stop_strings", &self.config.stop_strings);
            let reason = "a detokenizer is needed: see Generator::with_detokenizer";
            return Err(Error::config(field, format!("{strings:?}"), reason));
        }
        let rows = prompts
            .iter()
            .flat_map(|prompt| std::iter::repeat_n(prompt, samples))
            .enumerate()
            .map(|(k, prompt)| {
                let room = max_length.map_or(usize::MAX, |max| max - prompt.len());
                let limit = self.config.max_new_tokens.min(room);
                let rng = rng.stream("generate", first_index + k as u64);
                Row::new(k, prompt.clone(), limit, rng)
            })
            .collect();
        let decoder = self.policy.decoder(self.config.max_new_tokens)?;
        let rows = Rows::new(decoder, self.config.clone(), self.detokenizer, rows)?;
        Ok(match self.kept_tokens && self.config.narrows() {
            true => rows.with_kept_tokens(),
            false => rows,
        })
    }

    fn completions(&self, rows: Vec<Row>) -> Result<Completions> {
        let finish_reasons = rows.iter().map(|row| row.finish).collect();
        let (mut sequences, mut texts) = (Vec::new(), Vec::new());
        let (mut sampling_logprobs, mut policy_logprobs) = (Vec::new(), Vec::new());
        let mut kept: Vec<KeptTokens> = Vec::new();
        for row in rows {
            if let Some(detokenizer) = self.detokenizer {
                let response = match row.text.stopped_at() {
                    Some(cut) => row.text.so_far()[..cut].to_string(),
                    None => detokenizer.detokenize(&row.response)?,
                };
                let prompt = detokenizer.detokenize(&row.prompt)?;
                texts.push(Text { prompt, response });
            }
            sequences.push(Sequence::new(row.prompt, row.response));
            sampling_logprobs.push(row.sampling_logprobs);
            policy_logprobs.push(row.policy_logprobs);
            kept.extend(row.kept.map(KeptTokens::from));
        }
        Ok(Completions {
            batch: SequenceBatch::new(sequences)?,
            texts: self.detokenizer.map(|_| texts),
            finish_reasons,
            sampling_logprobs: Some(sampling_logprobs),
            policy_logprobs: Some(policy_logprobs),
            kept: (!kept.is_empty()).then_some(kept),
        })
    }
}

fn check_prompts(prompts: &[Arc<[i64]>], max_length: Option<usize>) -> Result<()> {
    let alone = prompts
        .iter()
        .map(|prompt| Sequence::new(prompt.clone(), []))
        .collect();
    SequenceBatch::new(alone)?;
    let Some(max_length) = max_length else {
        return Ok(());
    };
    match prompts.iter().position(|p| p.len() >= max_length) {
        Some(row) => Err(Error::TooLong {
            row,
            length: prompts[row].len() + 1,
            max_length,
        }),
        None => Ok(()),
    }
}
