//! Writing responses to prompts.

use std::sync::Arc;

use rand::Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::rng::{ChaCha8Rng, RngStreams};
use crate::sampling::{Drawn, SamplingConfig, ban_tokens, repetition_penalty};
use crate::{Completions, Error, FinishReason, Policy, Result, Sequence, SequenceBatch};

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
    /// Responses to each prompt.
    pub samples_per_prompt: usize,
    /// Responses written side by side. Changes speed and memory, not what is written.
    pub batch_size: usize,
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
            samples_per_prompt: 1,
            batch_size: 64,
        }
    }
}

impl GenerationConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for the first field that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let at_least_one = [
            ("generation.max_new_tokens", self.max_new_tokens),
            ("generation.samples_per_prompt", self.samples_per_prompt),
            ("generation.batch_size", self.batch_size),
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
        self.sampling.validate()
    }
}

/// Samples responses to `prompts`, without gradients.
///
/// The completions are in the order of the prompts; samples of one prompt are adjacent and share
/// its `Arc`. Neighbouring prompts that are the same `Arc` are also computed once. A response
/// holds its stop token if it wrote one ([`FinishReason::Stop`]); one that reaches
/// `max_new_tokens` or the end of the model's context window ends there
/// ([`FinishReason::Length`]).
///
/// Completion `k` draws one number a token from the stream `("generate", first_index + k)` of
/// `rng`: it depends neither on `batch_size` nor on the other prompts, as far as the model's
/// own arithmetic does not. A trainer that counts the completions it has asked for and passes
/// the count as `first_index` never uses a number twice.
///
/// # Errors
/// Before anything is computed: [`GenerationConfig::validate`], [`Error::Empty`] without
/// prompts, [`Error::EmptyPrompt`], and [`Error::TooLong`] for a prompt that leaves no room for a
/// token, which its length includes (rows count prompts). Later: [`Error::NonFinite`] where a model's logits are not finite
/// (rows count completions), and the model's own.
pub fn generate(
    policy: &(impl Policy + ?Sized),
    prompts: &[Arc<[i64]>],
    config: &GenerationConfig,
    rng: &RngStreams,
    first_index: u64,
) -> Result<Completions> {
    config.validate()?;
    check_prompts(prompts, policy.max_length())?;
    let _no_grad = tch::no_grad_guard();
    let mut rows: Vec<Row> = prompts
        .iter()
        .flat_map(|prompt| std::iter::repeat_n(prompt, config.samples_per_prompt))
        .enumerate()
        .map(|(k, prompt)| Row {
            index: k,
            rng: rng.stream("generate", first_index + k as u64),
            limit: config.max_new_tokens.min(
                policy
                    .max_length()
                    .map_or(usize::MAX, |max| max - prompt.len()),
            ),
            prompt: prompt.clone(),
            response: Vec::new(),
            logprobs: Vec::new(),
            finish: FinishReason::Length,
        })
        .collect();
    for chunk in rows.chunks_mut(config.batch_size) {
        write_chunk(policy, chunk, config)?;
    }
    completions(rows)
}

/// A response being written.
struct Row {
    index: usize,
    prompt: Arc<[i64]>,
    rng: ChaCha8Rng,
    /// Tokens that it may have.
    limit: usize,
    response: Vec<i64>,
    logprobs: Vec<f32>,
    finish: FinishReason,
}

impl Row {
    /// Appends a token and says whether the response goes on.
    fn push(&mut self, token: i64, logprob: f32, stop_token_ids: &[i64]) -> bool {
        self.response.push(token);
        self.logprobs.push(logprob);
        if stop_token_ids.contains(&token) {
            self.finish = FinishReason::Stop;
            return false;
        }
        self.response.len() < self.limit
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

fn write_chunk(
    policy: &(impl Policy + ?Sized),
    rows: &mut [Row],
    config: &GenerationConfig,
) -> Result<()> {
    let mut decoder = policy.decoder(config.max_new_tokens)?;
    let (unique, prompt_of) = shared_prompts(rows);
    let mut logits = decoder.prefill(&unique)?;
    check_logits(&logits, unique.len(), &config.stop_token_ids)?;
    if unique.len() < rows.len() {
        decoder.select(&prompt_of)?;
        logits = logits.f_index_select(0, &index(&prompt_of, logits.device()))?;
    }
    let device = logits.device();
    let stops = Tensor::from_slice(&config.stop_token_ids).to_device(device);
    let mut seen = (config.sampling.repetition_penalty != 1.0)
        .then(|| Seen::new(rows, logits.size()[1], device));
    // Positions in `rows` of the decoder's rows.
    let mut active: Vec<usize> = (0..rows.len()).collect();
    for length in 0.. {
        if let Some(seen) = &seen {
            let penalty = config.sampling.repetition_penalty;
            logits = repetition_penalty(&logits, &seen.0, penalty);
        }
        if length < config.min_new_tokens && !config.stop_token_ids.is_empty() {
            logits = ban_tokens(&logits, &stops);
        }
        let uniforms: Vec<f64> = active.iter().map(|&r| rows[r].rng.random()).collect();
        let drawn = config
            .sampling
            .choose(&config.sampling.warp(&logits), &uniforms)?;
        let mut going_on = Vec::with_capacity(active.len());
        for (place, (token, logprob)) in to_host(&drawn)?.into_iter().enumerate() {
            let row = &mut rows[active[place]];
            if !logprob.is_finite() {
                return Err(Error::NonFinite {
                    what: "the log-probability of a sampled token",
                    row: row.index,
                    value: logprob.into(),
                });
            }
            if row.push(token, logprob, &config.stop_token_ids) {
                going_on.push(place);
            }
        }
        if going_on.is_empty() {
            break;
        }
        let mut tokens = drawn.tokens;
        if let Some(seen) = &mut seen {
            seen.mark(&tokens);
        }
        if going_on.len() < active.len() {
            let kept = index(&going_on, device);
            decoder.select(&going_on)?;
            tokens = tokens.f_index_select(0, &kept)?;
            if let Some(seen) = &mut seen {
                seen.0 = seen.0.f_index_select(0, &kept)?;
            }
            active = going_on.iter().map(|&place| active[place]).collect();
        }
        logits = decoder.step(&tokens)?;
    }
    Ok(())
}

/// Which tokens each row holds: `[B, V]` bool.
struct Seen(Tensor);

impl Seen {
    fn new(rows: &[Row], vocab: i64, device: Device) -> Self {
        let seen = Tensor::zeros([rows.len() as i64, vocab], (Kind::Bool, device));
        for (i, row) in rows.iter().enumerate() {
            let ids = Tensor::from_slice(&row.prompt).to_device(device);
            let _ = seen.get(i as i64).index_fill_(0, &ids, 1);
        }
        Self(seen)
    }

    fn mark(&mut self, tokens: &Tensor) {
        let _ = self.0.scatter_value_(1, &tokens.unsqueeze(-1), 1);
    }
}

/// The distinct prompts of neighbouring rows, and which of them each row has.
fn shared_prompts(rows: &[Row]) -> (Vec<Arc<[i64]>>, Vec<usize>) {
    let mut unique: Vec<Arc<[i64]>> = Vec::new();
    let prompt_of = rows
        .iter()
        .map(|row| {
            if !unique.last().is_some_and(|p| Arc::ptr_eq(p, &row.prompt)) {
                unique.push(row.prompt.clone());
            }
            unique.len() - 1
        })
        .collect();
    (unique, prompt_of)
}

fn check_logits(logits: &Tensor, rows: usize, stop_token_ids: &[i64]) -> Result<()> {
    let size = logits.size();
    if size.len() != 2 || size[0] != rows as i64 {
        return Err(Error::ShapeMismatch {
            left: "the decoder's logits",
            left_shape: size,
            right: "its rows [B, V]",
            right_shape: vec![rows as i64, -1],
        });
    }
    match stop_token_ids.iter().find(|id| **id >= size[1]) {
        Some(id) => Err(Error::config(
            "generation.stop_token_ids",
            id,
            "the model's vocabulary has no such token",
        )),
        None => Ok(()),
    }
}

/// Tokens and log-probs in one copy: the only wait for the device a token costs. f64 holds both
/// without rounding.
fn to_host(drawn: &Drawn) -> Result<Vec<(i64, f32)>> {
    let both = Tensor::f_stack(
        &[
            drawn.tokens.to_kind(Kind::Double),
            drawn.logprobs.to_kind(Kind::Double),
        ],
        1,
    )?;
    let both = Vec::<f64>::try_from(both.f_to_device(Device::Cpu)?.view(-1))?;
    Ok(both
        .chunks_exact(2)
        .map(|pair| (pair[0] as i64, pair[1] as f32))
        .collect())
}

fn index(rows: &[usize], device: Device) -> Tensor {
    let rows: Vec<i64> = rows.iter().map(|&r| r as i64).collect();
    Tensor::from_slice(&rows).to_device(device)
}

fn completions(rows: Vec<Row>) -> Result<Completions> {
    let finish_reasons = rows.iter().map(|row| row.finish).collect();
    let (mut sequences, mut logprobs) = (Vec::new(), Vec::new());
    for row in rows {
        sequences.push(Sequence::new(row.prompt, row.response));
        logprobs.push(row.logprobs);
    }
    Ok(Completions {
        batch: SequenceBatch::new(sequences)?,
        texts: None,
        finish_reasons,
        sampling_logprobs: Some(logprobs),
    })
}
