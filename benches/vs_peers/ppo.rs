//! A step of PPO: [`NEW_TOKENS`] tokens are written to each prompt, scored by a reward model, held to
//! a reference, and learnt from in [`EPOCHS`] passes; with a critic of its own, or one on the policy's
//! trunk.
//!
//! The peer is TRL 1.12's PPOTrainer, which has separate models and takes the log-probabilities that it
//! sampled with for the old ones; so does ours.

use std::sync::Arc;

use rlhf::core::{Sequence, SequenceBatch, Stats};
use rlhf::models::{
    CausalLm, CausalLmWithValueHead, SequenceClassifier, ValueHeadInit, ValueHeadModel,
};
use rlhf::ppo::{OldLogprobs, OnPolicy, PpoConfig, PpoTrainer};
use rlhf::scale::UpdateConfig;

use crate::data::{Tokens, pairs};
use crate::roofline::{Cost, Decoding, Sizes};
use crate::worker::Prepared;
use crate::{Result, Work, models};

/// Tokens of each response; no token ends one early.
const NEW_TOKENS: usize = 48;
const EPOCHS: usize = 4;

/// Policy, critic, reference and reward model, as TRL has them.
pub(crate) fn separate(work: &Work) -> Result<Prepared> {
    let (policy, reference, reward) = parts(work)?;
    let critic = ValueHeadModel::from_classifier(&reward)?;
    let costs = costs(work, &policy, 2.0)?;
    let mut trainer = PpoTrainer::new(config(work), policy, critic, reference, reward)?;
    prepared(work, costs, move |prompts| Ok(trainer.step(prompts)?))
}

/// The critic is a head on the policy.
pub(crate) fn shared(work: &Work) -> Result<Prepared> {
    let (policy, reference, reward) = parts(work)?;
    let costs = costs(work, &policy, 1.0)?;
    let policy = CausalLmWithValueHead::new(policy, ValueHeadInit::default(), 0)?;
    let mut trainer = PpoTrainer::new(config(work), policy, OnPolicy, reference, reward)?;
    prepared(work, costs, move |prompts| Ok(trainer.step(prompts)?))
}

fn parts(work: &Work) -> Result<(CausalLm, CausalLm, SequenceClassifier)> {
    let mut policy = models::language_model(work)?;
    let mut reference = policy.try_clone()?;
    reference.set_trainable(false);
    policy.set_trainable(true);
    let mut reward = SequenceClassifier::from_causal_lm(&policy, 1, 0)?;
    reward.set_trainable(false);
    Ok((policy, reference, reward))
}

fn config(work: &Work) -> PpoConfig {
    let mut config = PpoConfig {
        batch_size: work.batch,
        ppo_epochs: EPOCHS,
        microbatch_size: work.microbatch(),
        old_logprobs: OldLogprobs::Sampled,
        update: UpdateConfig {
            max_grad_norm: None,
            ..models::update()
        },
        ..PpoConfig::trl()
    };
    config.generation.max_new_tokens = NEW_TOKENS;
    config.generation.batch_size = work.batch;
    config.generation.sampling.temperature = 1.0;
    config
}

type Prompts = Vec<Arc<[i64]>>;

fn prompts(work: &Work) -> Result<Vec<Prompts>> {
    let of = |step: &rlhf::core::PreferenceBatch| {
        step.pairs().iter().map(|p| Arc::clone(&p.prompt)).collect()
    };
    Ok(pairs(work)?.iter().map(of).collect())
}

fn prepared(
    work: &Work,
    costs: Vec<Cost>,
    mut step: impl FnMut(&[Arc<[i64]>]) -> Result<Stats> + 'static,
) -> Result<Prepared> {
    let prompts = prompts(work)?;
    let tokens = prompts.iter().map(|prompts| Tokens {
        // The responses are drawn: what both sides read alike is the prompts.
        tokens: prompts.iter().map(|p| (p.len() + NEW_TOKENS) as i64).sum(),
        id_sum: prompts.iter().flat_map(|p| p.iter()).sum(),
    });
    Ok(Prepared {
        tokens: tokens.collect(),
        costs,
        step: Box::new(move |number| {
            let stats = step(&prompts[number])?;
            match stats.get("ppo/length") == Some(NEW_TOKENS as f64) {
                true => Ok(()),
                false => Err(format!("{:?} tokens were written", stats.get("ppo/length")).into()),
            }
        }),
    })
}

/// Prompts once, decoding, a forward pass each of the reward model, the reference, and the critic if it
/// is one of `trained` models; and for every epoch three of each model that is trained.
fn costs(work: &Work, model: &CausalLm, trained: f64) -> Result<Vec<Cost>> {
    let config = model.config();
    let (hidden, vocabulary) = (config.hidden_size(), config.vocab_size());
    let sizes = Sizes::of(model, hidden);
    let head = (hidden * vocabulary) as f64;
    let (steps, weights) = ((NEW_TOKENS - 1) as f64, sizes.matrices() + head);
    prompts(work)?
        .iter()
        .map(|prompts| {
            let of = |response: Vec<i64>| {
                let sequence = |p: &Arc<[i64]>| Sequence::new(Arc::clone(p), response.clone());
                SequenceBatch::new(prompts.iter().map(sequence).collect())
            };
            let (alone, whole) = (of(vec![])?, of(vec![0; NEW_TOKENS])?);
            let scored = sizes.forward(&whole, whole.response_tokens(), vocabulary);
            let unscored = sizes.forward(&whole, 0, vocabulary);
            let critics = trained - 1.0;
            let epochs = 3.0 * EPOCHS as f64;
            Ok(scored
                .times(1.0 + epochs)
                .plus(unscored.times(1.0 + critics * (1.0 + epochs)))
                .plus(sizes.forward(&alone, alone.len(), vocabulary))
                .then(Decoding {
                    bytes: steps * weights * model.kind().elt_size_in_bytes() as f64,
                    flops: steps * weights * 2.0 * alone.len() as f64,
                }))
        })
        .collect()
}
