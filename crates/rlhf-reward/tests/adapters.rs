//! Reward models from language models, trained through adapters: what learns, what stays, and
//! what is left when the adapters are merged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/training_case.rs"]
#[allow(dead_code)]
mod training_case;

use rlhf_models::{CausalLm, LoadOptions, LoraConfig, SequenceClassifier};
use rlhf_reward::core::{Completions, Parameters, Preference, PreferenceBatch, RewardModel};
use rlhf_reward::tch::{Kind, Tensor};
use rlhf_reward::{Heads, RewardConfig, RewardTrainer};
use training_case::model_dir;

fn pairs() -> PreferenceBatch {
    let pairs = (0..6i64).map(|i| Preference::new([i, 1, 7], [i, 3, 2], [5, i]));
    PreferenceBatch::new(pairs.collect()).unwrap()
}

fn completions() -> Completions {
    Completions::written(pairs().interleaved().unwrap())
}

fn trained_through_adapters(heads: i64, steps: usize) -> (SequenceClassifier, f64, f64) {
    let base = CausalLm::from_pretrained(model_dir("gpt2"), &LoadOptions::default()).unwrap();
    let mut model = SequenceClassifier::from_causal_lm(&base, heads, 3).unwrap();
    let lora = LoraConfig {
        rank: 4,
        ..LoraConfig::default()
    };
    model.add_adapter(&lora, 5).unwrap();
    let mut config = RewardConfig::default();
    config.update.optimizer.lr = 0.01;
    let mut trainer = RewardTrainer::new(model, config).unwrap();
    if heads > 1 {
        let heads = Heads {
            count: heads as usize,
            bootstrap: None,
        };
        trainer = trainer.with_heads(heads).unwrap();
    }
    let mut losses = Vec::new();
    for _ in 0..steps {
        let stats = trainer.step(&pairs()).unwrap();
        losses.push(stats.get("reward/loss").unwrap());
    }
    (trainer.into_model(), losses[0], *losses.last().unwrap())
}

/// Weights of the frozen trunk by their checkpoint names.
fn trunk(model: &mut SequenceClassifier) -> Vec<(String, Tensor)> {
    let base = CausalLm::from_pretrained(model_dir("gpt2"), &LoadOptions::default()).unwrap();
    let names: Vec<String> = base
        .named_parameters()
        .into_iter()
        .map(|(n, _)| n)
        .collect();
    let mut all = model.named_parameters();
    all.retain(|(name, _)| names.contains(name));
    all
}

#[test]
fn adapters_and_head_learn_and_the_trunk_stays() {
    let (mut model, first, last) = trained_through_adapters(1, 30);
    assert!(last < 0.5 * first, "{first} {last}");
    assert!(
        trunk(&mut model).is_empty(),
        "a weight of the trunk is trained"
    );
    let trained: Vec<String> = model
        .named_parameters()
        .into_iter()
        .map(|(n, _)| n)
        .collect();
    assert!(
        trained.iter().any(|name| name.contains("lora_B")),
        "{trained:?}"
    );
    assert!(
        trained.iter().any(|name| name.contains("score")),
        "{trained:?}"
    );

    let adapted = model.score(&completions()).unwrap();
    model.merge().unwrap();
    model.set_trainable(true);
    let merged = model.score(&completions()).unwrap();
    assert!(
        adapted.allclose(&merged, 1e-5, 1e-6, false),
        "{adapted} {merged}"
    );
    let base = CausalLm::from_pretrained(model_dir("gpt2"), &LoadOptions::default()).unwrap();
    let original = base.named_parameters();
    for (name, weight) in trunk(&mut model) {
        let (_, before) = original.iter().find(|(n, _)| *n == name).unwrap();
        // Norms and embeddings have no adapter; matrices of the blocks have one.
        let has_adapter = before.dim() == 2 && name.contains("h.");
        assert_eq!(weight.equal(before), !has_adapter, "{name}");
    }
}

#[test]
fn a_merged_reward_model_is_read_back_with_its_scores() {
    let (mut model, ..) = trained_through_adapters(1, 5);
    model.merge().unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save_pretrained(dir.path()).unwrap();
    let read = SequenceClassifier::from_pretrained(dir.path(), &LoadOptions::default()).unwrap();
    let (ours, theirs) = (model.score(&completions()), read.score(&completions()));
    assert_eq!(
        Vec::<f32>::try_from(ours.unwrap()).unwrap(),
        Vec::<f32>::try_from(theirs.unwrap()).unwrap()
    );
}

#[test]
fn several_heads_share_one_adapted_trunk() {
    let (model, first, last) = trained_through_adapters(3, 30);
    assert!(last < 0.5 * first, "{first} {last}");
    let _no_grad = rlhf_reward::tch::no_grad_guard();
    let scores = model.logits(&pairs().interleaved().unwrap()).unwrap();
    assert_eq!(scores.size(), [12, 3]);
    let margins: Tensor = scores.view([6, 2, 3]).select(1, 0) - scores.view([6, 2, 3]).select(1, 1);
    assert!(bool::try_from(margins.gt(0.0).all()).unwrap(), "{margins}");
}

#[test]
fn bf16_weights_learn_too() {
    let load = LoadOptions {
        kind: Some(Kind::BFloat16),
        ..LoadOptions::default()
    };
    let base = CausalLm::from_pretrained(model_dir("gpt2"), &load).unwrap();
    let model = SequenceClassifier::from_causal_lm(&base, 1, 3).unwrap();
    let mut config = RewardConfig::default();
    config.update.optimizer.lr = 1e-3;
    let mut trainer = RewardTrainer::new(model, config).unwrap();
    let loss = |trainer: &mut RewardTrainer<_>| {
        let stats = trainer.step(&pairs()).unwrap();
        stats.get("reward/loss").unwrap()
    };
    let first = loss(&mut trainer);
    for _ in 0..20 {
        loss(&mut trainer);
    }
    let last = loss(&mut trainer);
    assert!(last < 0.5 * first, "{first} {last}");
}
