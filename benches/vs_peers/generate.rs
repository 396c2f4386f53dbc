//! Responses of [`NEW_TOKENS`] tokens to every prompt, sampled or the likeliest; the peer is transformers'
//! `generate`. The likeliest must be the same tokens on both sides: a step of `greedy` reports those that it
//! has written.
//!
//! Start-up is from the start of the process to the first token of the first prompt.

use std::sync::Arc;

use rlhf::core::{GenerationConfig, RngStreams, SamplingConfig, Sequence, SequenceBatch, generate};
use rlhf::models::CausalLm;

use crate::data::{Tokens, pairs};
use crate::roofline::{Cost, Decoding, Sizes};
use crate::worker::Prepared;
use crate::{Result, Work, models};

/// Tokens of each response; no token ends one early.
const NEW_TOKENS: usize = 48;

pub(crate) fn prepare(work: &Work, sampling: SamplingConfig) -> Result<Prepared> {
    let model = models::language_model(work)?;
    let prompts: Vec<Vec<Arc<[i64]>>> = pairs(work)?
        .iter()
        .map(|batch| {
            batch
                .pairs()
                .iter()
                .map(|p| Arc::clone(&p.prompt))
                .collect()
        })
        .collect();
    let (batch_size, greedy) = (work.batch, sampling.is_greedy());
    // The token that ends a text is not written, as the peer has it.
    let end = model.config().special_tokens().eos.clone();
    let config = move |new_tokens| GenerationConfig {
        max_new_tokens: new_tokens,
        min_new_tokens: new_tokens,
        stop_token_ids: end.clone(),
        sampling: sampling.clone(),
        batch_size,
        ..GenerationConfig::default()
    };
    let streams = RngStreams::new(0);
    generate(&model, &prompts[0][..1], &config(1), &streams, 0)?;
    let alone = |prompts: &Vec<Arc<[i64]>>| {
        let alone = prompts.iter().map(|p| Sequence::new(Arc::clone(p), []));
        SequenceBatch::new(alone.collect())
    };
    let batches = prompts.iter().map(alone).collect::<Result<Vec<_>, _>>()?;
    let tokens = |(step, batch): (usize, &SequenceBatch)| -> Result<Tokens> {
        let id_sum = match greedy {
            true => {
                let config = config(NEW_TOKENS);
                let written = generate(&model, &prompts[step], &config, &streams, step as u64)?;
                place_sum(&written.batch)
            }
            false => Tokens::of(batch).id_sum,
        };
        let tokens = (work.batch * NEW_TOKENS) as i64;
        Ok(Tokens { tokens, id_sum })
    };
    let tokens = batches.iter().enumerate().map(tokens);
    Ok(Prepared {
        tokens: tokens.collect::<Result<_>>()?,
        costs: batches.iter().map(|batch| cost(&model, batch)).collect(),
        step: Box::new(move |step| {
            let config = config(NEW_TOKENS);
            let written = generate(&model, &prompts[step], &config, &streams, step as u64)?;
            let tokens = written.batch.response_tokens();
            match tokens == prompts[step].len() * NEW_TOKENS {
                true => Ok(()),
                false => Err(format!("{tokens} tokens were written").into()),
            }
        }),
    })
}

/// Of what was written, every id times its place, counted from 1: two that differ in a token, or in the order
/// of two, differ in it.
fn place_sum(batch: &SequenceBatch) -> i64 {
    let written = batch.sequences().iter().map(|s| &s.response);
    written
        .flat_map(|ids| (1..).zip(ids))
        .map(|(place, id)| place * id)
        .sum()
}

/// The prompts once; then every step reads every weight, and multiplies it with a row a prompt.
fn cost(model: &CausalLm, batch: &SequenceBatch) -> Cost {
    let config = model.config();
    let sizes = Sizes::of(model, config.hidden_size());
    let prefill = sizes.forward(batch, batch.len(), config.vocab_size());
    let head = (config.hidden_size() * config.vocab_size()) as f64;
    let (steps, weights) = ((NEW_TOKENS - 1) as f64, sizes.matrices() + head);
    prefill.then(Decoding {
        bytes: steps * weights * model.kind().elt_size_in_bytes() as f64,
        flops: steps * weights * 2.0 * batch.len() as f64,
    })
}
