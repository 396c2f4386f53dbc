//! A step of GRPO: [`SAMPLES`] answers of [`NEW_TOKENS`] tokens to each prompt are written, scored,
//! and learnt from, at a price for leaving a reference. `--batch` is the number of *answers*.
//!
//! The peer is TRL's GRPOTrainer at its defaults with a KL coefficient of [`KL_COEF`].

use std::sync::Arc;

use rlhf::core::{Completions, RewardModel, Sequence, SequenceBatch, tch::Tensor};
use rlhf::models::CausalLm;
use rlhf::ppo::{GrpoConfig, GrpoTrainer, KlEstimator, KlPenalty, KlWeight};

use crate::data::{Tokens, pairs};
use crate::roofline::{Cost, Decoding, Sizes};
use crate::worker::Prepared;
use crate::{Result, Work, models};

const SAMPLES: usize = 4;
/// Tokens of each answer; no token ends one early.
const NEW_TOKENS: usize = 48;
const KL_COEF: f64 = 0.04;

/// The share of even token ids: costs nothing to compute, and differs from answer to answer.
struct Even;

impl RewardModel for Even {
    fn score(&self, completions: &Completions) -> rlhf::core::Result<Tensor> {
        let share = |s: &Sequence| {
            let even = s.response.iter().filter(|id| *id % 2 == 0).count();
            even as f64 / s.response.len() as f64
        };
        let scores: Vec<f64> = completions.batch.sequences().iter().map(share).collect();
        Ok(Tensor::from_slice(&scores))
    }
}

pub(crate) fn prepare(work: &Work) -> Result<Prepared> {
    if !work.batch.is_multiple_of(SAMPLES) {
        return Err(
            format!("--batch must be a multiple of {SAMPLES}, the answers to a prompt").into(),
        );
    }
    let mut policy = models::language_model(work)?;
    let mut reference = policy.try_clone()?;
    reference.set_trainable(false);
    policy.set_trainable(true);
    let per_step = work.batch / SAMPLES;
    let rows = Work {
        batch: per_step,
        ..work.clone()
    };
    let prompts: Vec<Vec<Arc<[i64]>>> = pairs(&rows)?
        .iter()
        .map(|step| step.pairs().iter().map(|p| Arc::clone(&p.prompt)).collect())
        .collect();
    let batches = prompts
        .iter()
        .map(|prompts| answered(prompts))
        .collect::<Result<Vec<_>>>()?;
    let tokens = batches.iter().map(|batch| {
        // The answers are drawn: what both sides read alike is the prompts.
        let prompts = batch.sequences().iter().flat_map(|s| s.prompt.iter());
        Tokens {
            tokens: Tokens::of(batch).tokens,
            id_sum: prompts.sum(),
        }
    });
    let (tokens, costs) = (
        tokens.collect(),
        batches.iter().map(|batch| cost(&policy, batch)).collect(),
    );
    let mut config = GrpoConfig {
        batch_size: per_step,
        microbatch_size: work.microbatch(),
        kl: KlPenalty::InLoss {
            kl_coef: KL_COEF,
            estimator: KlEstimator::K3,
            weight: KlWeight::Ratio,
        },
        update: models::update(),
        ..GrpoConfig::trl()
    };
    config.generation.max_new_tokens = NEW_TOKENS;
    config.generation.samples_per_prompt = SAMPLES;
    config.generation.batch_size = work.batch;
    let mut trainer = GrpoTrainer::with_reference(config, policy, reference, Even)?;
    Ok(Prepared {
        tokens,
        costs,
        step: Box::new(move |step| {
            let stats = trainer.step(&prompts[step])?;
            match stats.get("grpo/length") == Some(NEW_TOKENS as f64) {
                true => Ok(()),
                false => Err(format!("answers of {:?} tokens", stats.get("grpo/length")).into()),
            }
        }),
    })
}

/// Every prompt with as many answers, of as many tokens, as it will have.
fn answered(prompts: &[Arc<[i64]>]) -> Result<SequenceBatch> {
    let answer = |prompt: &Arc<[i64]>| Sequence::new(Arc::clone(prompt), vec![0; NEW_TOKENS]);
    let answers = prompts
        .iter()
        .flat_map(|prompt| (0..SAMPLES).map(move |_| answer(prompt)));
    Ok(SequenceBatch::new(answers.collect())?)
}

/// Prompts once, decoding, a forward pass of the reference, and three of the policy's size for its
/// forward and backward.
fn cost(model: &CausalLm, batch: &SequenceBatch) -> Cost {
    let config = model.config();
    let sizes = Sizes::of(model, config.hidden_size());
    let head = (config.hidden_size() * config.vocab_size()) as f64;
    let (steps, weights) = ((NEW_TOKENS - 1) as f64, sizes.matrices() + head);
    let alone = |s: &Sequence| Sequence::new(Arc::clone(&s.prompt), []);
    let prompts = batch
        .sequences()
        .iter()
        .step_by(SAMPLES)
        .map(alone)
        .collect();
    let passes = sizes.forward(batch, batch.response_tokens(), config.vocab_size());
    let passes = passes.times(4.0).then(Decoding {
        bytes: steps * weights * model.kind().elt_size_in_bytes() as f64,
        flops: steps * weights * 2.0 * batch.len() as f64,
    });
    match SequenceBatch::new(prompts) {
        Ok(prompts) => passes.plus(sizes.forward(&prompts, prompts.len(), config.vocab_size())),
        Err(_) => passes,
    }
}
