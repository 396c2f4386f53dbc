//! A step of supervised fine-tuning; prompts carry no loss.

use rlhf::sft::{SftConfig, SftTrainer};

use crate::data::{Tokens, demonstrations};
use crate::roofline::Sizes;
use crate::worker::Prepared;
use crate::{Result, Work, models};

pub(crate) fn prepare(work: &Work) -> Result<Prepared> {
    let model = models::language_model(work)?;
    let batches = demonstrations(work)?;
    let sizes = Sizes::of(&model, model.config().hidden_size());
    let vocabulary = model.config().vocab_size();
    let costs = batches
        .iter()
        .map(|batch| {
            let forward = sizes.forward(batch, batch.response_tokens(), vocabulary);
            forward.trained()
        })
        .collect();
    let config = SftConfig {
        update: models::update(),
        microbatch_size: work.microbatch(),
        ..SftConfig::default()
    };
    let mut trainer = SftTrainer::new(model, config)?;
    Ok(Prepared {
        tokens: batches.iter().map(Tokens::of).collect(),
        costs,
        step: Box::new(move |step| {
            trainer.step(&batches[step])?;
            Ok(())
        }),
    })
}
