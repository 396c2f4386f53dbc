//! Each option on models that are small enough to see through.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod kl;
mod pretraining;
mod sampling;
mod scores;
mod updates;

use std::sync::Arc;

use common::bigram::{Bigram, STOP, TokenValue, VOCABULARY, letters};
use proptest::prelude::*;
use rlhf_ppo::core::{
    Completions, FinishReason, LogprobOptions, Policy, Sequence, SequenceBatch, Stats, reward_fn,
};
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{
    Error, Guarded, KlControl, KlEstimator, KlGuard, KlPlacement, LengthPenalty, MinibatchUnit,
    MissingEos, OldLogprobs, OnKl, PpoConfig, PpoTrainer, PtxConfig, PtxStep, RolloutCorrection,
    ScoreScaling,
};

type Trainer = PpoTrainer<Bigram, TokenValue>;

fn config() -> PpoConfig {
    let mut config = PpoConfig {
        seed: 11,
        batch_size: 16,
        ppo_epochs: 2,
        minibatches: 2,
        microbatch_size: 3,
        missing_eos: MissingEos::Keep,
        kl_control: KlControl::Fixed { kl_coef: 0.1 },
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.update.optimizer.lr = 0.05;
    config
}

fn trainer_of(config: PpoConfig, policy: Bigram) -> Trainer {
    let count = |text: &str| text.matches('c').count() as f64;
    let reward = reward_fn(move |_, response| count(response));
    PpoTrainer::new(config, policy, TokenValue::new(), Bigram::frozen(), reward)
        .unwrap()
        .with_detokenizer(letters)
}

fn trainer(config: PpoConfig) -> Trainer {
    trainer_of(config, Bigram::new())
}

/// A policy that has moved away from the reference already.
fn moved() -> Bigram {
    let table = Bigram::new().0.detach();
    let away = Tensor::arange(VOCABULARY * VOCABULARY, (Kind::Float, table.device()));
    Bigram((table + away.cos().view([VOCABULARY, VOCABULARY]) * 0.5).set_requires_grad(true))
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..16).map(|i| Arc::from([1 + i % 4, 1 + i / 7])).collect()
}

/// `c` is 2; responses of three, two, two and three tokens, the last unfinished.
fn written() -> Completions {
    let batch = SequenceBatch::new(vec![
        Sequence::new([1], [2, 3, STOP]),
        Sequence::new([2], [4, STOP]),
        Sequence::new([3], [2, STOP]),
        Sequence::new([4], [2, 2, 1]),
    ])
    .unwrap();
    let mut completions = Completions::written(batch);
    completions.finish_reasons[3] = FinishReason::Length;
    completions
}

fn weights(trainer: &Trainer) -> Vec<f32> {
    let flat = |t: &Tensor| Vec::<f32>::try_from(t.detach().view(-1)).unwrap();
    [flat(&trainer.policy().0), flat(&trainer.value_model().0)].concat()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

#[track_caller]
fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (a, b) in got.iter().zip(want) {
        assert!((a - b).abs() <= tolerance, "{got:?} is not {want:?}");
    }
}

fn stat(stats: &Stats, name: &str) -> f64 {
    stats
        .get(name)
        .unwrap_or_else(|| panic!("{name} is missing"))
}
