//! The rows of a decoder: who is in, who waits, who is done.

use std::collections::VecDeque;
use std::sync::Arc;

use rand::Rng;
use tch::{Device, Kind, Tensor};

use super::GenerationConfig;
use super::text::GrowingText;
use super::told::chosen_by_last;
use crate::rng::ChaCha8Rng;
use crate::sampling::{ban_tokens, repetition_penalty};
use crate::{Decoder, Detokenize, Error, FinishReason, KeptSet, Result, gather_logprobs};

/// A response that waits, is being written, or is done.
pub(super) struct Row {
    /// Its place among the completions.
    pub(super) index: usize,
    pub(super) prompt: Arc<[i64]>,
    pub(super) response: Vec<i64>,
    pub(super) sampling_logprobs: Vec<f32>,
    pub(super) policy_logprobs: Vec<f32>,
    /// What each token was drawn from, where that is noted.
    pub(super) kept: Option<Vec<KeptSet>>,
    pub(super) finish: FinishReason,
    pub(super) text: GrowingText,
    /// Tokens that it may have.
    limit: usize,
    rng: ChaCha8Rng,
    done: bool,
}

impl Row {
    pub(super) fn new(index: usize, prompt: Arc<[i64]>, limit: usize, rng: ChaCha8Rng) -> Self {
        Self {
            index,
            prompt,
            response: Vec::new(),
            sampling_logprobs: Vec::new(),
            policy_logprobs: Vec::new(),
            kept: None,
            finish: FinishReason::Length,
            text: GrowingText::default(),
            limit,
            rng,
            done: false,
        }
    }

    /// Most tokens that it can have, prompt included.
    fn most_tokens(&self) -> usize {
        self.prompt.len() + self.limit
    }

    fn push(
        &mut self,
        token: Chosen,
        config: &GenerationConfig,
        detokenizer: Option<&dyn Detokenize>,
    ) -> Result<()> {
        self.response.push(token.id);
        self.sampling_logprobs.push(token.sampling_logprob);
        self.policy_logprobs.push(token.policy_logprob);
        if let (Some(kept), Some(set)) = (&mut self.kept, token.kept) {
            kept.push(set);
        }
        let at_stop_token = config.stop_token_ids.contains(&token.id);
        self.done = at_stop_token || self.response.len() >= self.limit;
        if let Some(detokenizer) = detokenizer {
            let stops: &[String] = match self.response.len() < config.min_new_tokens {
                true => &[],
                false => &config.stop_strings,
            };
            self.text.grow(&self.response, self.done, detokenizer)?;
            self.text.look_for(stops);
        }
        if at_stop_token || self.text.stopped_at().is_some() {
            self.finish = FinishReason::Stop;
            self.done = true;
        }
        Ok(())
    }
}

/// One token of one row.
pub(super) struct Chosen {
    pub(super) id: i64,
    pub(super) sampling_logprob: f32,
    pub(super) policy_logprob: f32,
    pub(super) kept: Option<KeptSet>,
}

/// All rows of a call, and the decoder that some of them are in.
pub(super) struct Rows<'a> {
    decoder: Box<dyn Decoder + 'a>,
    config: GenerationConfig,
    detokenizer: Option<&'a dyn Detokenize>,
    waiting: VecDeque<Row>,
    /// Those in the decoder, in its order. All have written a token that the decoder does not
    /// know yet.
    pub(super) active: Vec<Row>,
    /// Those that ended since somebody took them out of here.
    pub(super) done: Vec<Row>,
    /// The prompt that the next rows share with rows of the decoder, and its logits `[1, V]`.
    shared: Option<(Arc<[i64]>, Tensor)>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(
        mut decoder: Box<dyn Decoder + 'a>,
        config: GenerationConfig,
        detokenizer: Option<&'a dyn Detokenize>,
        waiting: VecDeque<Row>,
    ) -> Result<Self> {
        let longest = waiting.iter().map(Row::most_tokens).max().unwrap_or(0);
        let side_by_side = match config.max_cached_tokens {
            Some(most) => config.batch_size.min((most / longest.max(1)).max(1)),
            None => config.batch_size,
        };
        decoder.reserve(side_by_side.min(waiting.len()), longest)?;
        Ok(Self {
            decoder,
            config,
            detokenizer,
            waiting,
            active: Vec::new(),
            done: Vec::new(),
            shared: None,
        })
    }

    /// Notes what each token is drawn from.
    pub(super) fn with_kept_tokens(mut self) -> Self {
        for row in &mut self.waiting {
            row.kept = Some(Vec::new());
        }
        self
    }

    /// Writes one token of every row in the decoder, and the first of those that join. Returns
    /// whether there was anything to write.
    pub(super) fn advance(&mut self) -> Result<bool> {
        let _no_grad = tch::no_grad_guard();
        let going_on = self.active.len();
        if going_on > 0 {
            let last: Vec<i64> = self
                .active
                .iter()
                .filter_map(|row| row.response.last().copied())
                .collect();
            let logits = self.decoder.step(&last)?;
            check_logits(&logits, going_on, &self.config.stop_token_ids)?;
            self.write(0, &logits)?;
        }
        let mut joined = false;
        loop {
            self.replace_done()?;
            // Rows join even if their first token ends them, so others may join in turn.
            if !self.join()? {
                return Ok(going_on > 0 || joined);
            }
            joined = true;
        }
    }

    /// Lets the rows that are done leave. Where the next prompt is one that the decoder holds,
    /// its row takes the place at once and writes its first token.
    fn replace_done(&mut self) -> Result<()> {
        while self.active.iter().any(|row| row.done) {
            // Which of the decoder's rows each active row goes on from.
            let mut kept: Vec<usize> = (0..self.active.len()).collect();
            let mut rewound = Vec::new();
            for place in (0..self.active.len()).rev() {
                if !self.active[place].done {
                    continue;
                }
                if let Some(from) = self.holder_of_next(place) {
                    let Some(next) = self.waiting.pop_front() else {
                        continue;
                    };
                    kept[place] = kept[from];
                    rewound.push(place);
                    self.done
                        .push(std::mem::replace(&mut self.active[place], next));
                } else {
                    kept.swap_remove(place);
                    self.done.push(self.active.swap_remove(place));
                    // The last row has moved into the gap.
                    for moved in &mut rewound {
                        if *moved == self.active.len() {
                            *moved = place;
                        }
                    }
                }
            }
            if !kept.iter().copied().eq(0..kept.len()) || kept.len() < self.decoder.rows() {
                self.decoder.select(&kept)?;
            }
            let Some(logits) = self
                .shared
                .as_ref()
                .map(|(_, logits)| logits.shallow_clone())
            else {
                continue;
            };
            for &place in &rewound {
                let tokens = self.active[place].prompt.len();
                self.decoder.rewind(place, tokens)?;
            }
            for place in rewound {
                self.write(place, &logits)?;
            }
        }
        Ok(())
    }

    /// A row whose prompt is that of the next row to come, `place` itself if it will do; one that
    /// is about to leave will, too.
    fn holder_of_next(&self, place: usize) -> Option<usize> {
        let next = self.waiting.front()?;
        let (prompt, _) = self.shared.as_ref()?;
        if !Arc::ptr_eq(prompt, &next.prompt) {
            return None;
        }
        let holds = |&place: &usize| Arc::ptr_eq(&self.active[place].prompt, prompt);
        if holds(&place) {
            return Some(place);
        }
        (0..self.active.len()).find(holds)
    }

    /// Takes in as many waiting rows as there is room for. Returns whether there were any.
    fn join(&mut self) -> Result<bool> {
        let before = self.active.len();
        let mut longest = self.active.iter().map(Row::most_tokens).max().unwrap_or(0);
        let mut joiners: Vec<Row> = Vec::new();
        while let Some(next) = self.waiting.front() {
            let rows = before + joiners.len() + 1;
            let tokens = longest.max(next.most_tokens());
            let most = self.config.max_cached_tokens.unwrap_or(usize::MAX);
            if rows > self.config.batch_size || (rows > 1 && rows.saturating_mul(tokens) > most) {
                break;
            }
            longest = tokens;
            joiners.extend(self.waiting.pop_front());
        }
        if joiners.is_empty() {
            return Ok(false);
        }
        let (unique, prompt_of) = shared_prompts(&mut joiners);
        let mut logits = self.decoder.prefill(&unique)?;
        check_logits(&logits, unique.len(), &self.config.stop_token_ids)?;
        self.shared = match (unique.last(), self.waiting.front()) {
            (Some(last), Some(next)) if Arc::ptr_eq(last, &next.prompt) => {
                let own = logits.f_narrow(0, unique.len() as i64 - 1, 1)?;
                Some((last.clone(), own))
            }
            _ => None,
        };
        if unique.len() < joiners.len() {
            let places = prompt_of.iter().map(|&prompt| before + prompt);
            let rows: Vec<usize> = (0..before).chain(places).collect();
            self.decoder.select(&rows)?;
            let prompt_of: Vec<i64> = prompt_of.iter().map(|&prompt| prompt as i64).collect();
            let prompt_of = Tensor::from_slice(&prompt_of).to_device(logits.device());
            logits = logits.f_index_select(0, &prompt_of)?;
        }
        self.active.append(&mut joiners);
        self.write(before, &logits)?;
        Ok(true)
    }

    /// Chooses a token from each row of `logits`, for the rows from `first` on.
    fn write(&mut self, first: usize, logits: &Tensor) -> Result<()> {
        let config = &self.config;
        let rows = &mut self.active[first..][..logits.size()[0] as usize];
        let chosen = match self.decoder.stage() {
            None => choose(rows, logits, config)?,
            Some(stage) => {
                let own = stage.has_loss().then(|| choose(rows, logits, config));
                chosen_by_last(stage, rows.len(), own)?
            }
        };
        for (row, chosen) in rows.iter_mut().zip(chosen) {
            if !(chosen.sampling_logprob.is_finite() && chosen.policy_logprob.is_finite()) {
                return Err(Error::NonFinite {
                    what: "the log-probability of a sampled token",
                    row: row.index,
                    value: chosen.sampling_logprob.into(),
                });
            }
            row.push(chosen, config, self.detokenizer)?;
        }
        Ok(())
    }
}

fn choose(rows: &mut [Row], raw: &Tensor, config: &GenerationConfig) -> Result<Vec<Chosen>> {
    let sampling = &config.sampling;
    let mut logits = raw.shallow_clone();
    if sampling.repetition_penalty != 1.0 {
        let seen: Vec<Vec<i64>> = rows
            .iter()
            .map(|row| row.prompt.iter().chain(&row.response).copied().collect())
            .collect();
        logits = repetition_penalty(&logits, &seen, sampling.repetition_penalty)?;
    }
    let too_short: Vec<usize> = (0..rows.len())
        .filter(|&row| rows[row].response.len() < config.min_new_tokens)
        .collect();
    if !too_short.is_empty() && !config.stop_token_ids.is_empty() {
        logits = ban_tokens(&logits, &too_short, &config.stop_token_ids)?;
    }
    let warped = sampling.warp(&logits)?;
    let uniforms: Vec<f64> = rows.iter_mut().map(|row| row.rng.random()).collect();
    let drawn = sampling.choose(&warped, &uniforms)?;
    // Without filters the two distributions are one.
    let same = warped.data_ptr() == raw.data_ptr() && !sampling.is_greedy();
    let policy_logprobs = match same {
        true => drawn.logprobs.shallow_clone(),
        false => gather_logprobs(raw, &drawn.tokens),
    };
    // One copy: the only wait for the device that a token costs. f64 holds all without rounding.
    let columns = [drawn.tokens, drawn.logprobs, policy_logprobs];
    let columns = columns.map(|column| column.to_kind(Kind::Double));
    let host = Tensor::f_stack(&columns, 1)?.f_to_device(Device::Cpu)?;
    let host = Vec::<f64>::try_from(host.f_view(-1)?)?;
    let mut kept = match rows.iter().any(|row| row.kept.is_some()) {
        true => kept_sets(&warped)?,
        false => Vec::new(),
    }
    .into_iter();
    Ok(host
        .chunks_exact(3)
        .map(|row| Chosen {
            id: row[0] as i64,
            sampling_logprob: row[1] as f32,
            policy_logprob: row[2] as f32,
            kept: kept.next(),
        })
        .collect())
}

/// The tokens of each row that filters and bans have left.
fn kept_sets(warped: &Tensor) -> Result<Vec<KeptSet>> {
    let vocab = warped.size()[1] as usize;
    let kept = warped.f_isfinite()?.f_to_device(Device::Cpu)?;
    let flags = Vec::<bool>::try_from(kept.f_contiguous()?.f_view(-1)?)?;
    Ok(flags.chunks_exact(vocab).map(KeptSet::of).collect())
}

/// The distinct prompts of neighbouring rows, and which of them each row has. The rows are put
/// in an order in which the first of every prompt come first, so that a decoder need not move
/// what it has computed.
fn shared_prompts(rows: &mut Vec<Row>) -> (Vec<Arc<[i64]>>, Vec<usize>) {
    let mut unique: Vec<Arc<[i64]>> = Vec::new();
    let (mut first, mut others) = (Vec::new(), Vec::new());
    for row in rows.drain(..) {
        if unique.last().is_some_and(|p| Arc::ptr_eq(p, &row.prompt)) {
            others.push((unique.len() - 1, row));
        } else {
            unique.push(row.prompt.clone());
            first.push((unique.len() - 1, row));
        }
    }
    let (prompt_of, ordered) = first.into_iter().chain(others).unzip();
    *rows = ordered;
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
