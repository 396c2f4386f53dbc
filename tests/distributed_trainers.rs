//! Trainers on several processes: the numbers of one process, checkpoints written once, and what
//! happens when a process is killed.
#![cfg(feature = "distributed")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::print_stdout, clippy::print_stderr)] // ranks talk to the test

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rlhf::core::{
    CheckpointConfig, CheckpointStore, EpochConfig, Event, JsonlObserver, Observer, Parameters,
    Preference, Replicas, Sequence, Stats, Tensor,
};
use rlhf::dpo::{DpoConfig, DpoTrainer, OnlineDpoConfig, OnlineDpoTrainer};
use rlhf::models::{
    CausalLm, CheckpointPolicy, LoadOptions, LoraConfig, SequenceClassifier, ValueHeadModel,
};
use rlhf::ppo::{GrpoConfig, GrpoTrainer, KlControl, PpoConfig, PpoTrainer};
use rlhf::reward::{RewardConfig, RewardTrainer};
use rlhf::scale::UpdateConfig;
use rlhf::scale::distributed::{DataParallel, GroupOptions, ProcessGroup, Sharding, Spawn, World};
use rlhf::sft::{SftConfig, SftTrainer};
use rlhf::tch::Kind;

const STEPS: u64 = 5;
const SHARDINGS: [Sharding; 3] = [Sharding::Nothing, Sharding::Optimizer, Sharding::Gradients];

fn options(seconds: u64) -> DataParallel {
    DataParallel {
        group: GroupOptions {
            limit: Duration::from_secs(seconds),
            ..GroupOptions::default()
        },
        bucket_bytes: 64 << 10, // several
        ..DataParallel::default()
    }
}

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

fn epochs() -> EpochConfig {
    EpochConfig {
        epochs: 20,
        batch_size: 7, // neither two nor four divide it
        max_steps: Some(STEPS),
        seed: 4,
        ..EpochConfig::default()
    }
}

/// AdamW divides gradients by their size. One that is nothing but rounding, as that of the biases of
/// attention keys, would move its weight by a whole learning rate in a direction of its own: a larger
/// epsilon keeps rounding small.
fn learn(update: &mut UpdateConfig, lr: f64) {
    update.optimizer.lr = lr;
    update.optimizer.eps = 1e-4;
}

fn model(name: &str, checkpointing: CheckpointPolicy) -> CausalLm {
    let options = LoadOptions {
        gradient_checkpointing: checkpointing.into(),
        ..LoadOptions::default()
    };
    CausalLm::from_pretrained(model_dir(name), &options).unwrap()
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

/// Ragged: from one to six response tokens.
fn texts() -> Vec<Sequence> {
    let text = |i: i64| Sequence::new([5 + i, 9, 2], vec![(i * 5) % 40; 1 + i as usize % 6]);
    (0..16).map(text).collect()
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

fn model_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens/models")
        .join(name)
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
    trainers_are_one(2, "trainers_on_two_processes_are_one");
}

#[test]
fn trainers_on_four_processes_are_one() {
    trainers_are_one(4, "trainers_on_four_processes_are_one");
}

/// Trains with checkpoints and metrics in `dir`, from what is there; `pace` is slept each step.
fn resumable(dir: &Path, pace: Duration) -> rlhf::Result<Vec<(String, Tensor)>> {
    let mut config = SftConfig::default();
    learn(&mut config.update, 1e-3);
    let mut trainer = SftTrainer::new(model("gpt2", CheckpointPolicy::None), config)?;
    let epochs = EpochConfig {
        max_steps: Some(40),
        checkpoints: Some(CheckpointConfig {
            dir: dir.join("checkpoints"),
            every: 2,
            keep: 2,
        }),
        ..epochs()
    };
    let metrics = JsonlObserver::resume(dir.join("metrics.jsonl"), epochs.resumed_step()?)?;
    let slow = move |_: &Event<'_>| {
        std::thread::sleep(pace);
        Ok(ControlFlow::Continue(()))
    };
    trainer.train(&texts(), &epochs, &mut [Box::new(metrics), Box::new(slow)])?;
    Ok(trainer.into_model().named_parameters())
}

fn steps_in(dir: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let step = |line: &str| -> u64 {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["step"].as_u64().unwrap()
    };
    text.lines().map(step).collect()
}

/// The folder of a test, for its ranks too.
fn shared_folder() -> PathBuf {
    std::env::var_os("RLHF_TEST_DIR").unwrap().into()
}

#[test]
fn a_killed_run_goes_on_with_fewer_processes() {
    let name = "a_killed_run_goes_on_with_fewer_processes";
    killed_and_resumed(name, Sharding::Nothing, Sharding::Gradients);
}

#[test]
fn a_killed_sharded_run_goes_on_unsharded() {
    let name = "a_killed_sharded_run_goes_on_unsharded";
    killed_and_resumed(name, Sharding::Gradients, Sharding::Nothing);
}

fn killed_and_resumed(name: &str, first: Sharding, second: Sharding) {
    if Spawn::is_rank() {
        let dir = shared_folder();
        let sharding = match dir.join("resuming").exists() {
            true => second,
            false => first,
        };
        let sharing = DataParallel {
            sharding,
            ..options(8)
        };
        let world = World::join(&sharing).unwrap();
        let pace = Duration::from_millis(if world.group().size() == 3 { 60 } else { 0 });
        match resumable(&dir, pace) {
            Ok(weights) => {
                if world.is_first() {
                    Tensor::write_safetensors(
                        &weights.iter().map(|(n, w)| (n, w)).collect::<Vec<_>>(),
                        dir.join("end.safetensors"),
                    )
                    .unwrap();
                }
            }
            Err(error) => println!("ENDED: {error}"),
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let ranks = |processes| {
        Spawn::test(processes, name)
            .env("RLHF_TEST_DIR", dir)
            .grace(Duration::from_secs(20))
    };
    let mut running = ranks(3).start().unwrap();
    let start = Instant::now();
    let store = CheckpointStore::open(dir.join("checkpoints"), 2).unwrap();
    while store
        .latest()
        .unwrap()
        .is_none_or(|checkpoint| checkpoint.step < 6)
    {
        std::thread::sleep(Duration::from_millis(20));
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    running.kill(1).unwrap();
    let killed = Instant::now();
    let report = running.wait().unwrap();
    assert!(
        killed.elapsed() < Duration::from_secs(16),
        "{:?}",
        killed.elapsed()
    );
    for end in report.ends.iter().filter(|end| end.rank != 1) {
        assert!(
            end.stdout.contains("rank 1 is gone"),
            "{}{}",
            end.stdout,
            end.stderr
        );
    }
    // Whole, or this would fail.
    let step = store.latest().unwrap().unwrap().step;
    assert!((6..40).contains(&step), "{step}");

    let report = ranks(2).run().unwrap();
    report.check().unwrap();
    assert!(
        !report.ends[0].stdout.contains("ENDED"),
        "{}",
        report.ends[0].stdout
    );
    // Written once, by one: each step has one line.
    assert_eq!(steps_in(dir), (1..=40).collect::<Vec<_>>());

    let whole = tempfile::tempdir().unwrap();
    assert_eq!(Replicas::current().size(), 1);
    let alone = resumable(whole.path(), Duration::ZERO).unwrap();
    let shared = Tensor::read_safetensors(dir.join("end.safetensors")).unwrap();
    assert_eq!(shared.len(), alone.len());
    for (name, weight) in shared {
        let (_, other) = alone.iter().find(|(n, _)| *n == name).unwrap();
        let off = (weight - other).abs().max().double_value(&[]);
        assert!(off < 1e-4, "{name} is off by {off:e}"); // forty steps of rounding
    }
}
