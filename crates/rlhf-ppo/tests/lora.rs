//! PPO with adapters: policy, reference and critic on one set of frozen weights.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;
use std::sync::Arc;

use rlhf_models::{CausalLm, LoadOptions, LoraConfig, SequenceClassifier, ValueHeadModel};
use rlhf_ppo::core::{Parameters, Policy};
use rlhf_ppo::tch::Tensor;
use rlhf_ppo::{PpoConfig, PpoTrainer};

type Trainer = PpoTrainer<CausalLm, ValueHeadModel>;

fn model(name: &str) -> String {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/models");
    format!("{root}/{name}")
}

fn trainer() -> Trainer {
    let options = LoadOptions::default();
    let mut policy = CausalLm::from_pretrained(model("gpt2"), &options).unwrap();
    let lora = LoraConfig::default();
    policy.add_adapter(&lora, 1).unwrap();
    let reference = policy.reference().unwrap();
    let critic = ValueHeadModel::on_base_of(&policy, &lora, 2).unwrap();
    let reward = SequenceClassifier::from_pretrained(model("gpt2_rm"), &options).unwrap();
    let mut config = PpoConfig {
        seed: 3,
        batch_size: 4,
        ppo_epochs: 2,
        minibatches: 2,
        microbatch_size: 1,
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![0];
    config.update.optimizer.lr = 1e-2;
    PpoTrainer::new(config, policy, critic, reference, reward).unwrap()
}

fn prompts() -> Vec<Arc<[i64]>> {
    let prompt = |i: i64| (0..=i).map(|t| 10 + 7 * i + t).collect();
    (0..4).map(prompt).collect()
}

fn weights(trainer: &Trainer) -> Vec<(String, Tensor)> {
    let policy = trainer.policy().named_parameters();
    let critic = trainer.value_model().named_parameters();
    policy.into_iter().chain(critic).collect()
}

#[test]
fn one_base_for_three_models() {
    let mut whole = trainer();
    let updated = whole.updater().parameters();
    let names = updated.iter().map(|(name, _)| name.as_str());
    let kinds: HashSet<_> = names
        .map(|name| match name.contains(".lora_") {
            true => "adapter",
            false => name,
        })
        .collect();
    assert_eq!(kinds, HashSet::from(["adapter", "value.score.weight"]));
    assert!(whole.reference().named_parameters().is_empty());
    assert_eq!(whole.reference().device(), whole.policy().device());

    let first = whole.step(&prompts()).unwrap();
    // Nothing was trained when the first responses were sampled.
    assert!(first.get("ppo/kl").unwrap().abs() < 1e-4, "{first}");
    let dir = tempfile::tempdir().unwrap();
    whole.save(dir.path()).unwrap();
    let second = whole.step(&prompts()).unwrap();
    assert!(second.get("ppo/kl").unwrap().abs() > 1e-3, "{second}");

    let mut resumed = trainer();
    resumed.load(dir.path()).unwrap();
    let again = resumed.step(&prompts()).unwrap();
    for key in ["ppo/kl", "ppo/policy/loss", "ppo/value/loss"] {
        assert_eq!(again.get(key).unwrap(), second.get(key).unwrap(), "{key}");
    }
    for ((name, a), (_, b)) in weights(&whole).iter().zip(weights(&resumed)) {
        assert!(a.equal(&b), "{name} differs");
    }
}
