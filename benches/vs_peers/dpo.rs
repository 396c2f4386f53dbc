//! A step of DPO. The reference scores the step's pairs in the step, as it does in TRL by default;
//! `DpoTrainer::train` scores a dataset once instead.

use rlhf::dpo::{DpoConfig, DpoTrainer};

use crate::data::{Tokens, pairs};
use crate::roofline::Sizes;
use crate::worker::Prepared;
use crate::{Result, Work, models};

pub(crate) fn prepare(work: &Work) -> Result<Prepared> {
    let model = models::language_model(work)?;
    let pairs = pairs(work)?;
    let sizes = Sizes::of(&model, model.config().hidden_size());
    let vocabulary = model.config().vocab_size();
    let (mut tokens, mut costs) = (Vec::new(), Vec::new());
    for pairs in &pairs {
        let batch = pairs.interleaved()?;
        tokens.push(Tokens::of(&batch));
        // Forward and backward of the policy, forward of the reference.
        let forward = sizes.forward(&batch, batch.response_tokens(), vocabulary);
        costs.push(forward.times(4.0));
    }
    let mut reference = model.try_clone()?;
    reference.set_trainable(false);
    let config = DpoConfig {
        update: models::update(),
        microbatch_size: work.batch,
        ..DpoConfig::default()
    };
    let mut trainer = DpoTrainer::new(model, Box::new(reference), config)?;
    Ok(Prepared {
        tokens,
        costs,
        step: Box::new(move |step| {
            trainer.step(&pairs[step])?;
            Ok(())
        }),
    })
}
