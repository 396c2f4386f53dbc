//! The pass that values a rollout is the first of its update, where both take all samples at once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::bigram::{Bigram, STOP, TokenValue, letters};
use rlhf_ppo::core::{
    ActorCritic, KeptTokens, LogprobOptions, PaddedBatch, Parameters, Policy, Result,
    SequenceBatch, TokenLogprobs, ValueModel, reward_fn,
};
use rlhf_ppo::tch::Tensor;
use rlhf_ppo::{OldLogprobs, OnPolicy, PpoConfig, PpoTrainer};

/// A critic that counts its passes: with gradients, and without.
struct Counting {
    critic: TokenValue,
    passes: Arc<[AtomicUsize; 2]>,
}

impl Parameters for Counting {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.critic.named_parameters()
    }
}

impl ValueModel for Counting {
    fn values(&self, batch: &SequenceBatch) -> Result<Tensor> {
        let values = self.critic.values(batch)?;
        let kind = usize::from(!values.requires_grad());
        self.passes[kind].fetch_add(1, Ordering::Relaxed);
        Ok(values)
    }
}

/// Both tables in one model, which counts its passes: of both with gradients, and of any other kind.
struct OneTrunk {
    policy: Bigram,
    critic: TokenValue,
    passes: Arc<[AtomicUsize; 2]>,
}

impl Parameters for OneTrunk {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        vec![
            ("policy".to_string(), self.policy.0.shallow_clone()),
            ("values".to_string(), self.critic.0.shallow_clone()),
        ]
    }
}

impl Policy for OneTrunk {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        self.policy.logits(batch)
    }

    fn logprobs(&self, batch: &SequenceBatch, options: &LogprobOptions) -> Result<TokenLogprobs> {
        self.passes[1].fetch_add(1, Ordering::Relaxed);
        self.policy.logprobs(batch, options)
    }
}

impl ActorCritic for OneTrunk {
    fn logprobs_and_values(
        &self,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> Result<(TokenLogprobs, Tensor)> {
        assert!(kept.is_none());
        let scores = self.policy.logprobs(batch, options)?;
        let kind = usize::from(!scores.logprobs.requires_grad());
        self.passes[kind].fetch_add(1, Ordering::Relaxed);
        Ok((scores, self.critic.values(batch)?))
    }

    fn state_values(&self, batch: &SequenceBatch) -> Result<Tensor> {
        self.passes[1].fetch_add(1, Ordering::Relaxed);
        self.critic.values(batch)
    }
}

struct Run {
    trainer: PpoTrainer<Bigram, Counting>,
    passes: Passes,
}

/// With gradients, and without.
struct Passes(Arc<[AtomicUsize; 2]>);

impl Passes {
    fn new() -> Self {
        Self(Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]))
    }

    /// Since it was asked last.
    fn count(&self) -> [usize; 2] {
        [0, 1].map(|kind| self.0[kind].swap(0, Ordering::Relaxed))
    }
}

fn config(microbatch_size: usize, epochs: usize) -> PpoConfig {
    let mut config = PpoConfig {
        seed: 3,
        batch_size: 4,
        ppo_epochs: epochs,
        minibatches: 1,
        microbatch_size,
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.update.optimizer.lr = 0.05;
    config
}

fn count_of_c(_: &str, response: &str) -> f64 {
    response.matches('c').count() as f64
}

impl Run {
    fn new(microbatch_size: usize, epochs: usize) -> Self {
        let passes = Passes::new();
        let critic = Counting {
            critic: TokenValue::new(),
            passes: Arc::clone(&passes.0),
        };
        let (config, reward) = (config(microbatch_size, epochs), reward_fn(count_of_c));
        let (policy, reference) = (Bigram::new(), Bigram::frozen());
        let trainer = PpoTrainer::new(config, policy, critic, reference, reward).unwrap();
        Self {
            trainer: trainer.with_detokenizer(letters),
            passes,
        }
    }

    fn passes(&self) -> [usize; 2] {
        self.passes.count()
    }

    fn critic(&self) -> Tensor {
        self.trainer.value_model().critic.0.copy()
    }
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..4).map(|i| Arc::from([1 + i % 4, 1])).collect()
}

#[test]
fn all_samples_at_once_are_gone_through_once_for_values_and_first_loss() {
    let (mut whole, mut split) = (Run::new(4, 3), Run::new(2, 3));
    for _ in 0..3 {
        whole.trainer.step(&prompts()).unwrap();
        assert_eq!(whole.passes(), [3, 0]);
        split.trainer.step(&prompts()).unwrap();
        assert_eq!(split.passes(), [6, 2]);
    }
    assert!(whole.critic().allclose(&split.critic(), 1e-5, 1e-6, false));
    let policies = [&whole, &split].map(|run| run.trainer.policy().0.copy());
    assert!(policies[0].allclose(&policies[1], 1e-5, 1e-6, false));
}

#[test]
fn on_one_trunk_it_gives_the_old_logprobs_too() {
    let run = |microbatch_size: usize, old_logprobs: OldLogprobs| {
        let passes = Passes::new();
        let policy = OneTrunk {
            policy: Bigram::new(),
            critic: TokenValue::new(),
            passes: Arc::clone(&passes.0),
        };
        let config = PpoConfig {
            old_logprobs,
            ..config(microbatch_size, 3)
        };
        let reward = reward_fn(count_of_c);
        let trainer = PpoTrainer::new(config, policy, OnPolicy, Bigram::frozen(), reward).unwrap();
        let mut trainer = trainer.with_detokenizer(letters);
        let counts = [0, 1, 2].map(|_| {
            trainer.step(&prompts()).unwrap();
            passes.count()
        });
        assert!(counts.iter().all(|count| *count == counts[0]));
        let model = trainer.policy();
        let tables = [&model.policy.0, &model.critic.0].map(Tensor::copy);
        (counts[0], tables)
    };
    let same = |a: &[Tensor; 2], b: &[Tensor; 2]| {
        a.iter()
            .zip(b)
            .all(|(a, b)| a.allclose(b, 1e-5, 1e-6, false))
    };
    for old_logprobs in [OldLogprobs::Sampled, OldLogprobs::Recomputed] {
        let (whole, tables) = run(4, old_logprobs);
        assert_eq!(whole, [3, 0]);
        let (split, others) = run(2, old_logprobs);
        let evaluated = 2 + 2 * usize::from(old_logprobs == OldLogprobs::Recomputed);
        assert_eq!(split, [6, evaluated]);
        assert!(same(&tables, &others));
    }
}

#[test]
fn a_pass_from_before_the_weights_moved_is_not_gone_on_from() {
    let mut run = Run::new(4, 1);
    let (first, second) = {
        let mut rollout = || run.trainer.rollout(&prompts()).unwrap();
        (rollout(), rollout())
    };
    assert_eq!(run.passes(), [2, 0]);
    run.trainer.update(&first).unwrap();
    assert_eq!(run.passes(), [0, 0]);
    run.trainer.update(&second).unwrap();
    assert_eq!(run.passes(), [1, 0]);
    // Nor is it used twice.
    run.trainer.update(&second).unwrap();
    assert_eq!(run.passes(), [1, 0]);
}

#[test]
fn nor_one_from_before_weights_were_loaded() {
    let mut run = Run::new(4, 1);
    run.trainer.step(&prompts()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    run.trainer.save(dir.path()).unwrap();
    let rollout = run.trainer.rollout(&prompts()).unwrap();
    run.passes();
    run.trainer.load(dir.path()).unwrap();
    run.trainer.update(&rollout).unwrap();
    assert_eq!(run.passes(), [1, 0]);
}

#[test]
fn nor_one_whose_weights_somebody_has_written_to() {
    let mut run = Run::new(4, 1);
    let rollout = run.trainer.rollout(&prompts()).unwrap();
    run.passes();
    let mut table = run.trainer.policy().0.detach();
    let _ = table.g_mul_scalar_(1.5);
    run.trainer.update(&rollout).unwrap();
    assert_eq!(run.passes(), [1, 0]);
}
