//! The policy's activations are gone before the critic's are made.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::{Arc, Mutex};

use common::bigram::{Bigram, STOP, TokenValue, letters};
use rlhf_ppo::core::{
    PaddedBatch, Parameters, Policy, Result, SequenceBatch, ValueModel, reward_fn,
};
use rlhf_ppo::tch::Tensor;
use rlhf_ppo::{PpoConfig, PpoTrainer};

fn config() -> PpoConfig {
    let mut config = PpoConfig {
        seed: 3,
        batch_size: 4,
        ppo_epochs: 1,
        minibatches: 1,
        microbatch_size: 2,
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.update.optimizer.lr = 0.05;
    config
}

fn step<P: Policy, V: ValueModel + Send>(policy: P, critic: V) -> PpoTrainer<P, V> {
    let reward = reward_fn(|_: &str, response: &str| response.matches('c').count() as f64);
    let trainer = PpoTrainer::new(config(), policy, critic, Bigram::frozen(), reward).unwrap();
    let mut trainer = trainer.with_detokenizer(letters);
    let prompts: Vec<Arc<[i64]>> = (0..4).map(|i| Arc::from([1 + i % 4, 1])).collect();
    trainer.step(&prompts).unwrap();
    trainer
}

/// Notes, at every pass that is recorded, the gradient that the policy has by then.
struct Watching {
    critic: TokenValue,
    policy: Tensor,
    seen: Arc<Mutex<Vec<Option<Tensor>>>>,
}

impl Parameters for Watching {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.critic.named_parameters()
    }
}

impl ValueModel for Watching {
    fn values(&self, batch: &SequenceBatch) -> Result<Tensor> {
        let values = self.critic.values(batch)?;
        if values.requires_grad() {
            let grad = self.policy.grad();
            let grad = grad.defined().then(|| grad.copy());
            self.seen.lock().unwrap().push(grad);
        }
        Ok(values)
    }
}

#[test]
fn backward_of_the_policy_comes_before_forward_of_the_critic() {
    let policy = Bigram::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let critic = Watching {
        critic: TokenValue::new(),
        policy: policy.0.shallow_clone(),
        seen: Arc::clone(&seen),
    };
    step(policy, critic);
    // Two microbatches: each adds to the policy's gradient before the critic reads it.
    let seen = seen.lock().unwrap();
    let [Some(first), Some(second)] = &seen[..] else {
        panic!("{seen:?}")
    };
    assert!(!first.equal(second));
}

/// A policy that is not trained.
struct Still(Bigram);

impl Parameters for Still {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }
}

impl Policy for Still {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        self.0.logits(batch)
    }
}

#[test]
fn a_critic_is_trained_beside_a_policy_that_is_not() {
    let before = TokenValue::new().0;
    let trainer = step(Still(Bigram::frozen()), TokenValue::new());
    assert!(!trainer.value_model().0.equal(&before));
    assert!(trainer.policy().0.0.equal(&Bigram::frozen().0));
}
