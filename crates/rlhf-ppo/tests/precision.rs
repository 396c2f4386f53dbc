//! Sampler and trainer on real models: what they agree on in f32, what is measured and corrected in
//! bf16, with filters, adapters with dropout, and a critic on the policy's trunk.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::model_dir;
use rlhf_models::{
    CausalLm, CausalLmWithValueHead, LoadOptions, LoraConfig, SequenceClassifier, ValueHeadInit,
    ValueHeadModel,
};
use rlhf_ppo::core::Parameters;
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{MissingEos, OnPolicy, PpoConfig, PpoTrainer, Rollout, RolloutCorrection};

/// Nats: what the issue of this crate promises of f32.
const AGREEMENT: f64 = 1e-4;

fn load(kind: Kind) -> LoadOptions {
    LoadOptions {
        kind: Some(kind),
        ..LoadOptions::default()
    }
}

fn config() -> PpoConfig {
    let mut config = PpoConfig {
        seed: 3,
        batch_size: 6,
        ppo_epochs: 1,
        minibatches: 2,
        microbatch_size: 4,
        missing_eos: MissingEos::Keep,
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 12;
    config.generation.samples_per_prompt = 2;
    config.generation.stop_token_ids = vec![0];
    config.update.optimizer.lr = 1e-3;
    config
}

/// Prompts of several lengths.
fn prompts() -> Vec<Arc<[i64]>> {
    let prompt = |i: i64| (0..=2 * i).map(|t| 10 + 7 * i + t).collect();
    (0..6).map(prompt).collect()
}

fn reward() -> SequenceClassifier {
    SequenceClassifier::from_pretrained(model_dir("models/gpt2_rm"), &load(Kind::Float)).unwrap()
}

fn policy(name: &str, kind: Kind) -> CausalLm {
    CausalLm::from_pretrained(model_dir(&format!("models/{name}")), &load(kind)).unwrap()
}

fn separate(config: PpoConfig, name: &str, kind: Kind) -> PpoTrainer<CausalLm, ValueHeadModel> {
    let policy = policy(name, kind);
    let reference = policy.try_clone().unwrap();
    let critic = ValueHeadModel::from_causal_lm(&policy, 1).unwrap();
    PpoTrainer::new(config, policy, critic, reference, reward()).unwrap()
}

fn shared(config: PpoConfig, name: &str) -> PpoTrainer<CausalLmWithValueHead, OnPolicy> {
    let policy = policy(name, Kind::Float);
    let reference = policy.try_clone().unwrap();
    let policy = CausalLmWithValueHead::new(policy, ValueHeadInit::default(), 1).unwrap();
    PpoTrainer::new(config, policy, OnPolicy, reference, reward()).unwrap()
}

fn filtered() -> PpoConfig {
    let mut config = config();
    config.generation.sampling.top_k = Some(20);
    config.generation.sampling.top_p = Some(0.9);
    config.generation.min_new_tokens = 3;
    config
}

fn assert_agree(rollout: &Rollout) {
    let mismatch = rollout.mismatch.unwrap();
    assert!(mismatch.max < AGREEMENT, "{mismatch:?}");
}

#[test]
fn f32_sampler_and_trainer_agree_and_the_first_ratios_are_one() {
    for name in ["gpt2", "llama", "qwen2"] {
        for config in [config(), filtered()] {
            let mut trainer = separate(config, name, Kind::Float);
            let rollout = trainer.rollout(&prompts()).unwrap();
            assert_agree(&rollout);
            let rows: Vec<usize> = (0..rollout.len()).collect();
            let first = trainer.update_minibatch(&rollout, &rows).unwrap().unwrap();
            assert!(
                (first.ratio - 1.0).abs() < AGREEMENT,
                "{name}: {}",
                first.ratio
            );
            // All of them, not their mean alone.
            assert!(
                first.ratio_var < AGREEMENT.powi(2),
                "{name}: {}",
                first.ratio_var
            );
            assert!(first.approx_kl < AGREEMENT.powi(2));
        }
    }
}

#[test]
fn bf16_is_measured_and_corrected() {
    let corrected = PpoConfig {
        rollout_correction: RolloutCorrection::TruncatedImportance { cap: 1.005 },
        ..config()
    };
    let mut trainer = separate(corrected, "llama", Kind::BFloat16);
    let rollout = trainer.rollout(&prompts()).unwrap();
    let mismatch = rollout.mismatch.unwrap();
    assert!(mismatch.mean > 1e-4 && mismatch.mean < 0.1, "{mismatch:?}");
    let sampled = rollout.completions.sampling_logprobs.clone().unwrap();
    let weights = rollout.weights.as_ref().unwrap();
    let mut off = 0;
    for (row, sampled) in sampled.iter().enumerate() {
        for (t, sampled) in sampled.iter().enumerate() {
            let at = [row as i64, t as i64];
            let gap = rollout.logprobs.double_value(&at) - f64::from(*sampled);
            let want = gap.exp().min(1.005);
            assert!((weights.double_value(&at) - want).abs() < 1e-6);
            off += usize::from((want - 1.0).abs() > 1e-3);
        }
    }
    assert!(off > 5, "bf16 rounds nothing here");
    // Recomputed: the ratios begin at 1 all the same.
    let stats = trainer.update(&rollout).unwrap();
    assert!(stats.get("ppo/mismatch/mean").unwrap() > 1e-4);
    assert!(stats.get("ppo/mismatch/weight").is_some());
    assert!(stats.get("ppo/mismatch/kl").unwrap() > 0.0);
    let mut trainer = separate(config(), "llama", Kind::BFloat16);
    let rollout = trainer.rollout(&prompts()).unwrap();
    let rows: Vec<usize> = (0..rollout.len()).collect();
    let first = trainer.update_minibatch(&rollout, &rows).unwrap().unwrap();
    assert!((first.ratio - 1.0).abs() < 1e-2, "{}", first.ratio);
}

/// Adapters with dropout: it is off, or the first ratios would be anything.
#[test]
fn dropout_is_off() {
    let mut policy = policy("gpt2", Kind::Float);
    let lora = LoraConfig {
        dropout: 0.5,
        ..LoraConfig::default()
    };
    policy.add_adapter(&lora, 1).unwrap();
    // Fresh adapters add nothing, so dropout would drop nothing.
    for (_, weight) in policy.named_parameters() {
        let _no_grad = rlhf_ppo::tch::no_grad_guard();
        let noise = Tensor::arange(weight.numel() as i64, (Kind::Float, weight.device())).sin();
        let mut weight = weight;
        weight += noise.view_as(&weight) * 0.2;
    }
    let reference = policy.reference().unwrap();
    let critic = ValueHeadModel::on_base_of(&policy, &lora, 2).unwrap();
    let mut trainer = PpoTrainer::new(config(), policy, critic, reference, reward()).unwrap();
    assert!(!trainer.policy().is_dropout_active());
    assert!(!trainer.value_model().is_dropout_active());
    let rollout = trainer.rollout(&prompts()).unwrap();
    let rows: Vec<usize> = (0..rollout.len()).collect();
    let first = trainer.update_minibatch(&rollout, &rows).unwrap().unwrap();
    assert!(first.ratio_var < AGREEMENT.powi(2), "{}", first.ratio_var);
}

/// The shared trunk computes what the two models do: the same log-probabilities, the values of its
/// head; and both losses reach it.
#[test]
fn a_critic_on_the_policys_trunk() {
    let mut trainer = shared(filtered(), "llama");
    let rollout = trainer.rollout(&prompts()).unwrap();
    assert_agree(&rollout);
    let alone = separate(filtered(), "llama", Kind::Float)
        .rollout(&prompts())
        .unwrap();
    let gap = (&rollout.logprobs - &alone.logprobs).abs().max();
    assert!(f64::try_from(gap).unwrap() < AGREEMENT);
    let rows: Vec<usize> = (0..rollout.len()).collect();
    let first = trainer.update_minibatch(&rollout, &rows).unwrap().unwrap();
    assert!(first.ratio_var < AGREEMENT.powi(2) && first.value_loss > 0.0);
    let names: Vec<String> = trainer
        .policy()
        .named_parameters()
        .into_iter()
        .map(|p| p.0)
        .collect();
    assert!(names.contains(&"v_head.summary.weight".to_string()));
    assert_eq!(trainer.updater().parameters().len(), names.len());

    // With the value loss alone, the trunk moves.
    let mut values_only = shared(
        PpoConfig {
            vf_coef: 1.0,
            ..config()
        },
        "llama",
    );
    let mut rollout = values_only.rollout(&prompts()).unwrap();
    rollout.advantages = rollout.advantages.zeros_like();
    let before = policy("llama", Kind::Float).named_parameters();
    values_only.update(&rollout).unwrap();
    let after = values_only.policy().language_model().named_parameters();
    let moved = before.iter().zip(&after).filter(|((name, a), (other, b))| {
        assert_eq!(name, other);
        !a.equal(b)
    });
    assert!(moved.count() > 10);

    // It goes on from a checkpoint.
    let dir = tempfile::tempdir().unwrap();
    let mut whole = shared(config(), "llama");
    whole.step(&prompts()).unwrap();
    whole.save(dir.path()).unwrap();
    let mut resumed = shared(config(), "llama");
    resumed.load(dir.path()).unwrap();
    let (a, b) = (
        whole.step(&prompts()).unwrap(),
        resumed.step(&prompts()).unwrap(),
    );
    assert_eq!(a.get("ppo/loss"), b.get("ppo/loss"));
    let critic_lr = PpoConfig {
        critic_lr: Some(1e-5),
        ..config()
    };
    let policy =
        CausalLmWithValueHead::new(policy("llama", Kind::Float), ValueHeadInit::Zeros, 0).unwrap();
    let reference = self::policy("llama", Kind::Float);
    let error = PpoTrainer::new(critic_lr, policy, OnPolicy, reference, reward());
    assert!(
        error
            .map(|_| ())
            .unwrap_err()
            .to_string()
            .contains("critic_lr")
    );
}
