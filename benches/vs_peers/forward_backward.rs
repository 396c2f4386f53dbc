//! Log-probabilities of both answers to every prompt and their gradients: the core of every
//! preference method, and of GRPO with two answers.

use rlhf::core::tch::Kind;
use rlhf::core::{LogprobOptions, Parameters, Policy};
use rlhf::scale::clear_grads;

use crate::data::{Tokens, pairs};
use crate::roofline::Sizes;
use crate::worker::Prepared;
use crate::{Result, Work, models};

pub(crate) fn prepare(work: &Work) -> Result<Prepared> {
    let model = models::language_model(work)?;
    let batches = pairs(work)?
        .iter()
        .map(|pairs| Ok(pairs.interleaved()?))
        .collect::<Result<Vec<_>>>()?;
    let sizes = Sizes::of(&model, model.config().hidden_size());
    let vocabulary = model.config().vocab_size();
    let costs = batches
        .iter()
        .map(|batch| {
            let forward = sizes.forward(batch, batch.response_tokens(), vocabulary);
            forward.trained()
        })
        .collect();
    Ok(Prepared {
        tokens: batches.iter().map(Tokens::of).collect(),
        costs,
        step: Box::new(move |step| {
            let weights: Vec<_> = model
                .named_parameters()
                .into_iter()
                .map(|(_, w)| w)
                .collect();
            clear_grads(&weights)?;
            let scored = model.logprobs(&batches[step], &LogprobOptions::default())?;
            scored.logprobs.sum(Kind::Float).f_neg()?.f_backward()?;
            Ok(())
        }),
    })
}
