//! Adapters in training: a reference in the policy's memory, and resumption with dropout. The file
//! has one test, as libtorch's generator is one for the process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/training_case.rs"]
#[allow(dead_code)]
mod training_case;

use rlhf_dpo::core::{Parameters, PreferenceBatch};
use rlhf_dpo::scale::{CheckpointPolicy, clear_grads};
use rlhf_dpo::tch::{self, Tensor};
use rlhf_dpo::{DpoConfig, DpoTrainer};
use rlhf_models::{CausalLm, LoadOptions, LoraConfig};
use training_case::{model_dir, preference_pairs};

const STEPS: usize = 4;

fn trainer(checkpointing: CheckpointPolicy) -> DpoTrainer<CausalLm> {
    let options = LoadOptions {
        gradient_checkpointing: checkpointing.into(),
        ..LoadOptions::default()
    };
    let mut model = CausalLm::from_pretrained(model_dir("llama"), &options).unwrap();
    let config = LoraConfig {
        rank: 4,
        alpha: 16.0,
        dropout: 0.2,
        ..LoraConfig::default()
    };
    model.add_adapter(&config, 9).unwrap();
    let reference = model.reference().unwrap();
    let mut config = DpoConfig {
        microbatch_size: 2,
        ..DpoConfig::default()
    };
    config.update.optimizer.lr = 1e-2;
    DpoTrainer::new(model, Box::new(reference), config).unwrap()
}

/// Steps `from..to`, and the losses before each.
fn run(trainer: &mut DpoTrainer<CausalLm>, from: usize, to: usize) -> Vec<f64> {
    let pairs = preference_pairs();
    let steps = (from..to).map(|step| {
        let pairs = (0..4).map(|i| pairs[(4 * step + i) % pairs.len()].clone());
        let batch = PreferenceBatch::new(pairs.collect()).unwrap();
        trainer.step(&batch).unwrap().get("dpo/loss").unwrap()
    });
    steps.collect()
}

fn weights(trainer: &DpoTrainer<CausalLm>) -> Vec<(String, Tensor)> {
    trainer.model().named_parameters()
}

fn assert_same(a: &DpoTrainer<CausalLm>, b: &DpoTrainer<CausalLm>) {
    for ((name, a), (_, b)) in weights(a).iter().zip(weights(b)) {
        assert!(a.equal(&b), "{name} differs");
    }
}

#[test]
fn a_resumed_run_with_dropout_equals_an_uninterrupted_one() {
    let mut whole = trainer(CheckpointPolicy::None);
    let pairs = preference_pairs();
    let before = whole.evaluate(&pairs).unwrap();
    // The policy begins as its reference, to the last bit.
    assert_eq!((before.accuracy, before.margin), (0.0, 0.0));
    let losses = run(&mut whole, 0, STEPS);
    assert!(weights(&whole).iter().all(|(n, _)| n.contains(".lora_")));
    let after = whole.evaluate(&pairs).unwrap();
    assert!(after.margin > 0.05, "{after:?}");

    // Whatever others draw from the generator in between.
    tch::manual_seed(77);
    let dir = tempfile::tempdir().unwrap();
    let mut first = trainer(CheckpointPolicy::None);
    let first_losses = run(&mut first, 0, 2);
    first.save(dir.path()).unwrap();
    let mut second = trainer(CheckpointPolicy::None);
    second.load(dir.path()).unwrap();
    let _ = Tensor::rand([5], (tch::Kind::Float, tch::Device::Cpu));
    let second_losses = run(&mut second, 2, STEPS);
    assert_eq!([first_losses, second_losses].concat(), losses);
    assert_same(&second, &whole);
    assert_eq!(second.evaluate(&pairs).unwrap(), after);

    // The steps differ in what they drop, and what is computed again drops the same.
    let mut checkpointed = trainer(CheckpointPolicy::EveryBlock);
    assert_eq!(run(&mut checkpointed, 0, STEPS), losses);
    assert_same(&checkpointed, &whole);
    let leaves: Vec<_> = weights(&whole).into_iter().map(|(_, w)| w).collect();
    clear_grads(&leaves).unwrap();

    let mut config = whole.config().clone();
    config.update.seed = 1;
    let fresh = trainer(CheckpointPolicy::None).into_model();
    let reference = fresh.reference().unwrap();
    let mut other = DpoTrainer::new(fresh, Box::new(reference), config).unwrap();
    let others = run(&mut other, 0, STEPS);
    assert_ne!(others, losses);
}
