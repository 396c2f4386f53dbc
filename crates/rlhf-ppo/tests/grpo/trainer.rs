//! The trainer on tables of bigrams.

mod methods;
mod options;
mod refusals;
mod same_bytes;

use std::ops::ControlFlow;
use std::sync::Arc;

use rlhf_ppo::core::{
    CheckpointConfig, Completions, Error as CoreError, Event, FinishReason, Observer, Result,
    RewardModel, Sequence, SequenceBatch, Stats, reward_fn,
};
use rlhf_ppo::tch::Tensor;
use rlhf_ppo::{
    DynamicSampling, Error, Excess, GrpoConfig, GrpoTrainer, KlPenalty, LengthPenalty, Objective,
    OffPolicy, OldLogprobs, RewardMix, Truncated, Unscored,
};
use serde_json::Value;

use crate::common::bigram::{Bigram, STOP};
use crate::common::{Golden, assert_close};

type Trainer = GrpoTrainer<Bigram>;

const SOFT_OVERLONG: LengthPenalty = LengthPenalty::SoftOverlong {
    buffer: 2,
    max: 0.5,
};

/// A method, at sizes for these tests.
fn sized(mut config: GrpoConfig) -> GrpoConfig {
    config.seed = 11;
    config.batch_size = 6;
    config.num_iterations = 2;
    config.minibatches = 2;
    config.microbatch_size = 4;
    config.generation.samples_per_prompt = 4;
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.length_penalty = config.length_penalty.map(|_| SOFT_OVERLONG);
    config.update.optimizer.lr = 0.05;
    config
}

fn letters(ids: &[i64]) -> Result<String> {
    Ok(ids.iter().map(|&id| char::from(b'a' + id as u8)).collect())
}

fn trainer_with(config: GrpoConfig, reward: impl RewardModel + 'static) -> Trainer {
    GrpoTrainer::with_reference(config, Bigram::new(), Bigram::frozen(), reward)
        .unwrap()
        .with_detokenizer(letters)
}

/// Tokens are letters: `a` is 0, which stops; the reward counts the `c`s.
fn trainer(config: GrpoConfig) -> Trainer {
    trainer_with(
        config,
        reward_fn(|_, answer| answer.matches('c').count() as f64),
    )
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..15).map(|i| Arc::from([1 + i % 4, 1 + i / 7])).collect()
}

fn weights(trainer: &Trainer) -> Vec<f32> {
    Vec::try_from(trainer.policy().0.detach().view(-1)).unwrap()
}

/// Two prompts with four answers each, the last one cut.
fn written() -> Completions {
    let answers: [&[i64]; 8] = [
        &[2, 3, STOP],
        &[4, 4, STOP],
        &[2, 2, STOP],
        &[STOP],
        &[1, STOP],
        &[2, STOP],
        &[3, 2, 2, STOP],
        &[2, 1, 2, 1, 2, 1],
    ];
    let sequence = |(i, answer): (usize, &&[i64])| Sequence::new([1 + i as i64 / 4], *answer);
    let batch = SequenceBatch::new(answers.iter().enumerate().map(sequence).collect()).unwrap();
    let mut completions = Completions::written(batch);
    completions.finish_reasons[7] = FinishReason::Length;
    completions
}

fn methods() -> [(&'static str, GrpoConfig); 9] {
    [
        ("trl", GrpoConfig::trl()),
        ("grpo", GrpoConfig::grpo()),
        ("rloo", GrpoConfig::rloo()),
        ("dapo", GrpoConfig::dapo(6)),
        ("dr_grpo", GrpoConfig::dr_grpo()),
        ("bnpo", GrpoConfig::bnpo()),
        // Its own ranges hold almost every ratio.
        (
            "gspo",
            GrpoConfig {
                objective: Objective::symmetric(0.2),
                ..GrpoConfig::gspo()
            },
        ),
        ("cispo", GrpoConfig::cispo()),
        ("reinforce++", GrpoConfig::reinforce_plus_plus_baseline()),
    ]
    .map(|(name, config)| (name, sized(config)))
}

fn assert_all_finite(stats: &Stats) {
    for (name, value) in stats.iter() {
        assert!(value.is_finite(), "{name} is {value}");
    }
}
