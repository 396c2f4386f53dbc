//! A step of reward training on comparisons.

use rlhf::models::SequenceClassifier;
use rlhf::reward::{RewardConfig, RewardTrainer};

use crate::data::{Tokens, pairs};
use crate::roofline::Sizes;
use crate::worker::Prepared;
use crate::{Result, Work, models};

pub(crate) fn prepare(work: &Work) -> Result<Prepared> {
    let model = SequenceClassifier::from_causal_lm(&models::language_model(work)?, 1, 0)?;
    let pairs = pairs(work)?;
    let sizes = Sizes::of(&model, model.config().hidden_size());
    let (mut tokens, mut costs) = (Vec::new(), Vec::new());
    for pairs in &pairs {
        let batch = pairs.interleaved()?;
        tokens.push(Tokens::of(&batch));
        costs.push(sizes.forward(&batch, batch.len(), 1).trained());
    }
    let config = RewardConfig {
        update: models::update(),
        microbatch_size: work.microbatch(),
        ..RewardConfig::default()
    };
    let mut trainer = RewardTrainer::new(model, config)?;
    Ok(Prepared {
        tokens,
        costs,
        step: Box::new(move |step| {
            trainer.step(&pairs[step])?;
            Ok(())
        }),
    })
}
