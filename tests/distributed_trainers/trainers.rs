//! Every trainer gives on several processes what it gives on one.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use rlhf::core::{EpochConfig, Event, Observer, Parameters, Preference, Stats, Tensor};
use rlhf::dpo::{DpoConfig, DpoTrainer, OnlineDpoConfig, OnlineDpoTrainer};
use rlhf::models::{
    CausalLm, CheckpointPolicy, LoadOptions, LoraConfig, SequenceClassifier, ValueHeadModel,
};
use rlhf::ppo::{GrpoConfig, GrpoTrainer, KlControl, PpoConfig, PpoTrainer};
use rlhf::reward::{RewardConfig, RewardTrainer};
use rlhf::scale::distributed::{DataParallel, ProcessGroup, Sharding, Spawn, World};
use rlhf::sft::{SftConfig, SftTrainer};
use rlhf::tch::Kind;

use super::{STEPS, epochs, learn, model, model_dir, options, texts};

const SHARDINGS: [Sharding; 3] = [Sharding::Nothing, Sharding::Optimizer, Sharding::Gradients];

/// What a run did: the stats of each step, and the weights at its end.
struct Run {
    stats: Vec<Stats>,
    weights: Vec<(String, Tensor)>,
}

/// Notes the stats of each step. Called on the first process alone.
fn noting(stats: &mut Vec<Stats>) -> Vec<Box<dyn Observer + '_>> {
    vec![Box::new(|event: &Event<'_>| {
        stats.push(event.stats.clone());
        Ok(ControlFlow::Continue(()))
    })]
}

fn adapter() -> LoraConfig {
    LoraConfig {
        rank: 4,
        alpha: 16.0,
        ..LoraConfig::default()
    }
}

fn with_adapter(mut model: CausalLm) -> CausalLm {
    model.add_adapter(&adapter(), 9).unwrap();
    model
}

fn pairs() -> Vec<Preference> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/goldens/preference_pairs.json"
    );
    let pairs: Vec<serde_json::Value> =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let ids = |pair: &serde_json::Value, key: &str| -> Vec<i64> {
        serde_json::from_value(pair[key].clone()).unwrap()
    };
    let pair = |p| {
        Preference::new(
            ids(p, "prompt_ids"),
            ids(p, "chosen_ids"),
            ids(p, "rejected_ids"),
        )
    };
    pairs.iter().map(pair).collect()
}

fn sft(checkpointing: CheckpointPolicy, lora: bool) -> Run {
    let mut model = model("gpt2", checkpointing);
    if lora {
        model = with_adapter(model);
    }
    let mut config = SftConfig {
        prompt_weight: 0.5,
        ..SftConfig::default()
    };
    learn(&mut config.update, 1e-3);
    let mut trainer = SftTrainer::new(model, config).unwrap();
    let mut stats = Vec::new();
    trainer
        .train(&texts(), &epochs(), &mut noting(&mut stats))
        .unwrap();
    let weights = trainer.into_model().named_parameters();
    Run { stats, weights }
}

fn reward() -> Run {
    let model = SequenceClassifier::from_pretrained(model_dir("gpt2_rm"), &LoadOptions::default());
    let mut config = RewardConfig::default();
    learn(&mut config.update, 1e-3);
    let mut trainer = RewardTrainer::new(model.unwrap(), config).unwrap();
    let mut stats = Vec::new();
    trainer
        .train(&pairs(), &epochs(), &mut noting(&mut stats))
        .unwrap();
    let weights = trainer.into_model().named_parameters();
    Run { stats, weights }
}

fn dpo(loss: Option<&str>, lora: bool) -> Run {
    let mut config = DpoConfig::default();
    if let Some(loss) = loss {
        let loss = rlhf::dpo::DpoLoss::named(loss).unwrap();
        config.objective = rlhf::dpo::Objective::new(loss);
    }
    learn(&mut config.update, 1e-3);
    let (model, reference): (_, Box<dyn rlhf::core::Policy>) = match lora {
        true => {
            let model = with_adapter(model("llama", CheckpointPolicy::EveryBlock));
            let reference = model.reference().unwrap();
            (model, Box::new(reference))
        }
        false => {
            let model = model("llama", CheckpointPolicy::None);
            let reference = model.try_clone().unwrap();
            (model, Box::new(reference))
        }
    };
    let mut trainer = DpoTrainer::new(model, reference, config).unwrap();
    let mut stats = Vec::new();
    trainer
        .train(&pairs(), &epochs(), &mut noting(&mut stats))
        .unwrap();
    let weights = trainer.into_model().named_parameters();
    Run { stats, weights }
}

fn prompts() -> Vec<Arc<[i64]>> {
    let prompt = |i: i64| (0..=i).map(|t| 10 + 7 * i + t).collect();
    (0..6).map(prompt).collect()
}

fn ppo(lora: bool) -> Run {
    let options = LoadOptions::default();
    let policy = model("gpt2", CheckpointPolicy::EveryBlock);
    let reward = SequenceClassifier::from_pretrained(model_dir("gpt2_rm"), &options).unwrap();
    let (policy, reference, values) = match lora {
        true => {
            let policy = with_adapter(policy);
            let reference = policy.reference().unwrap();
            let values = ValueHeadModel::on_base_of(&policy, &adapter(), 4).unwrap();
            (policy, reference, values)
        }
        false => {
            let reference = policy.try_clone().unwrap();
            let values = ValueHeadModel::from_pretrained(model_dir("gpt2_rm"), &options).unwrap();
            (policy, reference, values)
        }
    };
    let mut config = PpoConfig {
        seed: 3,
        batch_size: 5,
        ppo_epochs: 2,
        minibatches: 2,
        kl_control: KlControl::ziegler(),
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![0];
    learn(&mut config.update, 1e-4);
    let mut trainer = PpoTrainer::new(config, policy, values, reference, reward).unwrap();
    let mut stats = Vec::new();
    trainer
        .train(&prompts(), STEPS, &mut noting(&mut stats))
        .unwrap();
    let (policy, values) = trainer.into_models();
    let mut weights = policy.named_parameters();
    weights.extend(values.named_parameters());
    Run { stats, weights }
}

fn grpo() -> Run {
    let policy = model("gpt2", CheckpointPolicy::None);
    let reward = rlhf::core::reward_fn(|_: &str, answer: &str| answer.len() as f64 % 3.0);
    let mut config = GrpoConfig {
        seed: 3,
        batch_size: 3,
        ..GrpoConfig::dr_grpo()
    };
    config.generation.samples_per_prompt = 4;
    config.generation.max_new_tokens = 6;
    learn(&mut config.update, 1e-4);
    let mut trainer = GrpoTrainer::new(config, policy, reward)
        .unwrap()
        .with_detokenizer(|ids: &[i64]| Ok(format!("{ids:?}")));
    let mut stats = Vec::new();
    trainer
        .train(&prompts(), STEPS, &mut noting(&mut stats))
        .unwrap();
    let weights = trainer.into_policy().named_parameters();
    Run { stats, weights }
}

fn online_dpo() -> Run {
    let model = with_adapter(model("llama", CheckpointPolicy::None));
    let reference: Box<dyn rlhf::core::Policy> = Box::new(model.reference().unwrap());
    let reward = rlhf::core::reward_fn(|_: &str, answer: &str| answer.len() as f64 % 3.0);
    let mut config = OnlineDpoConfig::default();
    config.generation.samples_per_prompt = 3;
    config.generation.max_new_tokens = 6;
    learn(&mut config.dpo.update, 1e-3);
    let text: Box<dyn rlhf::core::Detokenize> = Box::new(|ids: &[i64]| Ok(format!("{ids:?}")));
    let trainer = OnlineDpoTrainer::new(model, reference, reward, Some(text), config);
    let mut trainer = trainer.unwrap();
    let mut stats = Vec::new();
    let epochs = EpochConfig {
        batch_size: 5,
        ..epochs()
    };
    trainer
        .train(&prompts(), &epochs, &mut noting(&mut stats))
        .unwrap();
    let weights = trainer.into_model().named_parameters();
    Run { stats, weights }
}

/// Largest difference, relative to the largest number of each tensor.
#[track_caller]
fn assert_same(what: &str, shared: &Run, alone: &Run, first: bool) {
    for ((name, a), (_, b)) in shared.weights.iter().zip(&alone.weights) {
        let [a, b] = [a, b].map(|t| t.to_kind(Kind::Double));
        let scale = b.abs().max().double_value(&[]).max(1e-2);
        let off = (&a - &b).abs().max().double_value(&[]) / scale;
        assert!(off <= 1e-5, "{what}: {name} is off by {off:e}");
    }
    // Observers of the first process alone are told.
    assert_eq!(
        shared.stats.len(),
        if first { STEPS as usize } else { 0 },
        "{what}"
    );
    for (step, (a, b)) in shared.stats.iter().zip(&alone.stats).enumerate() {
        for (metric, b) in b.iter().filter(|(metric, _)| !metric.contains("time")) {
            let a = a
                .get(metric)
                .unwrap_or_else(|| panic!("{what}: no {metric}"));
            // Some are sums that cancel, or nothing but rounding.
            let off = (a - b).abs() / b.abs().max(0.1);
            let same = off <= 1e-4 || (a.is_nan() && b.is_nan());
            assert!(same, "{what}, step {step}: {metric} is {a}, alone {b}");
            if metric.ends_with("/loss") && b.abs() > 0.1 {
                assert!(
                    off <= 1e-5,
                    "{what}, step {step}: {metric} is {a}, alone {b}"
                );
            }
        }
    }
}

type Case = (&'static str, fn() -> Run);

const CASES: [Case; 11] = [
    ("sft", || sft(CheckpointPolicy::None, false)),
    ("sft checkpointed", || {
        sft(CheckpointPolicy::EveryBlock, false)
    }),
    ("sft lora", || sft(CheckpointPolicy::SquareRoot, true)),
    ("reward", reward),
    ("dpo", || dpo(None, false)),
    ("dpo lora checkpointed", || dpo(None, true)),
    ("dpo, a loss of whole batches", || {
        dpo(Some("bco_pair"), false)
    }),
    ("ppo", || ppo(false)),
    ("ppo lora checkpointed", || ppo(true)),
    ("grpo", grpo),
    ("online dpo", online_dpo),
];

fn trainers_are_one(processes: usize, name: &str) {
    if !Spawn::is_rank() {
        Spawn::test(processes, name).run().unwrap().check().unwrap();
        return;
    }
    let group = ProcessGroup::from_env(&options(60).group).unwrap();
    for (what, run) in CASES {
        let alone = run();
        assert_eq!(alone.stats.len(), STEPS as usize, "{what}");
        for sharding in SHARDINGS {
            let start = Instant::now();
            let sharing = DataParallel {
                sharding,
                ..options(60)
            };
            let world = World::of(group.clone(), &sharing).unwrap();
            let shared = run();
            assert_same(
                &format!("{what} {sharding:?}"),
                &shared,
                &alone,
                world.is_first(),
            );
            if world.is_first() {
                eprintln!("{what} {sharding:?}: {:?}", start.elapsed());
            }
        }
    }
}

#[test]
fn trainers_on_two_processes_are_one() {
    trainers_are_one(2, "trainers::trainers_on_two_processes_are_one");
}

#[test]
fn trainers_on_four_processes_are_one() {
    trainers_are_one(4, "trainers::trainers_on_four_processes_are_one");
}
