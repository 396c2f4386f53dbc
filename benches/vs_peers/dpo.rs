//! A step of DPO. The reference scores the step's pairs in the step, as it does in TRL by default, or
//! has scored them before the first step.

use rlhf::core::PreferenceBatch;
use rlhf::dpo::{DpoConfig, DpoTrainer, Reference, score_preferences};
use rlhf::models::CausalLm;

use crate::data::{Tokens, pairs};
use crate::roofline::{Cost, Sizes};
use crate::worker::Prepared;
use crate::{Result, Work, models};

pub(crate) fn prepare(work: &Work) -> Result<Prepared> {
    let model = models::language_model(work)?;
    let pairs = pairs(work)?;
    // Forward and backward of the policy, forward of the reference.
    let (tokens, costs) = measured(&model, &pairs, 4.0)?;
    let mut reference = model.try_clone()?;
    reference.set_trainable(false);
    let mut trainer = DpoTrainer::new(model, reference, config(work))?;
    Ok(Prepared {
        tokens,
        costs,
        step: Box::new(move |step| {
            trainer.step(&pairs[step])?;
            Ok(())
        }),
    })
}

pub(crate) fn prepare_cached(work: &Work) -> Result<Prepared> {
    let model = models::language_model(work)?;
    let pairs = pairs(work)?;
    let (tokens, costs) = measured(&model, &pairs, 3.0)?;
    let config = config(work);
    let scored = pairs
        .iter()
        .map(|batch| score_preferences(&model, batch.pairs(), &config.score_options()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut trainer = DpoTrainer::new(model, Reference::Scored, config)?;
    Ok(Prepared {
        tokens,
        costs,
        step: Box::new(move |step| {
            trainer.step_scored(&scored[step])?;
            Ok(())
        }),
    })
}

fn config(work: &Work) -> DpoConfig {
    DpoConfig {
        update: models::update(),
        microbatch_size: work.microbatch(),
        ..DpoConfig::default()
    }
}

/// What each step reads, and its arithmetic: so many forward passes.
fn measured(
    model: &CausalLm,
    pairs: &[PreferenceBatch],
    passes: f64,
) -> Result<(Vec<Tokens>, Vec<Cost>)> {
    let sizes = Sizes::of(model, model.config().hidden_size());
    let vocabulary = model.config().vocab_size();
    let (mut tokens, mut costs) = (Vec::new(), Vec::new());
    for pairs in pairs {
        let batch = pairs.interleaved()?;
        tokens.push(Tokens::of(&batch));
        let forward = sizes.forward(&batch, batch.response_tokens(), vocabulary);
        costs.push(forward.times(passes));
    }
    Ok((tokens, costs))
}
