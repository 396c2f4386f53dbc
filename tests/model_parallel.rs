//! Models on several processes are trained by the trainers as they are on one: tensor parallel, pipeline
//! parallel, and both.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rlhf_core::{
    Completions, LogprobOptions, Policy, Preference, PreferenceBatch, RewardModel, Sequence,
    SequenceBatch, Stats,
};
use rlhf_dpo::{DpoConfig, DpoTrainer};
use rlhf_models::{
    CausalLm, CheckpointPolicy, LoadOptions, LoraConfig, Modules, PipelineParallel, Placement,
    TensorParallel, ValueHeadModel,
};
use rlhf_ppo::{MissingEos, PpoConfig, PpoTrainer};
use rlhf_scale::distributed::{
    DataParallel, GroupOptions, Mesh, MeshShape, Operation, ProcessGroup, Sharding, Spawn, World,
};
use rlhf_scale::io::read_tensors;
use rlhf_scale::{AdamWConfig, UpdateConfig, tch};
use rlhf_sft::{SftConfig, SftTrainer};
use tch::Tensor;

const TOLERANCE: f64 = 1e-5;

/// Runs `work` on each of so many processes.
fn on_ranks(processes: usize, name: &str, work: impl FnOnce(&ProcessGroup)) {
    if !Spawn::is_rank() {
        Spawn::test(processes, name).run().unwrap().check().unwrap();
        return;
    }
    let options = GroupOptions {
        limit: Duration::from_secs(60),
        ..GroupOptions::default()
    };
    work(&ProcessGroup::from_env(&options).unwrap());
}

fn tensor(group: &ProcessGroup) -> Placement {
    (&TensorParallel::new(Arc::new(group.clone()))).into()
}

fn pipeline(group: &ProcessGroup) -> Placement {
    (&PipelineParallel::new(Arc::new(group.clone()))).into()
}

fn update() -> UpdateConfig {
    UpdateConfig {
        optimizer: AdamWConfig {
            lr: 1e-3,
            // Gradients that are 0 but for rounding must not make steps of full length.
            eps: 1e-4,
            ..AdamWConfig::default()
        },
        max_grad_norm: Some(1.0),
        ..UpdateConfig::default()
    }
}

/// All linear layers.
fn lora(dropout: f64) -> LoraConfig {
    LoraConfig {
        rank: 4,
        dropout,
        target_modules: Modules::AllLinear,
        ..LoraConfig::default()
    }
}

fn model_dir(architecture: &str) -> PathBuf {
    Path::new("tests/goldens/models").join(architecture)
}

fn load(architecture: &str, placement: &Placement, (adapters, staged): (bool, bool)) -> CausalLm {
    let options = LoadOptions {
        gradient_checkpointing: CheckpointPolicy::EveryBlock.into(),
        ..LoadOptions::default()
    };
    let dir = model_dir(architecture);
    let mut model = CausalLm::from_pretrained_parallel(dir, &options, placement).unwrap();
    if adapters {
        // What a stage drops does not depend on those before it, as it does on one rank; and
        // copies of a model make smaller microbatches.
        let dropout = if staged { 0.0 } else { 0.2 };
        model.add_adapter(&lora(dropout), 5).unwrap();
    }
    model
}

/// Ragged.
fn sequences() -> SequenceBatch {
    SequenceBatch::new(vec![
        Sequence::new([5, 9, 2, 14], [3, 767]),
        Sequence::new([7, 700, 4], [1, 1, 400, 20, 6]),
        Sequence::new([7, 700, 4], [384, 383]),
        Sequence::new([11], [9]),
        Sequence::new([12, 13], [9, 4, 5, 3, 3, 3]),
    ])
    .unwrap()
}

fn fine_tuned(model: CausalLm) -> (Vec<f64>, CausalLm) {
    let config = SftConfig {
        update: update(),
        microbatch_size: 2,
        ..SftConfig::default()
    };
    let mut trainer = SftTrainer::new(model, config).unwrap();
    let mut numbers = Vec::new();
    for _ in 0..5 {
        let stats = trainer.step(&sequences()).unwrap();
        numbers.extend(["sft/loss", "sft/grad_norm"].map(|key| stats.get(key).unwrap()));
    }
    (numbers, trainer.into_model())
}

fn preferred(model: CausalLm) -> (Vec<f64>, CausalLm) {
    let reference = match model.adapter() {
        Some(_) => model.reference().unwrap(),
        None => model.try_clone().unwrap(),
    };
    let config = DpoConfig {
        update: update(),
        microbatch_size: 2,
        ..DpoConfig::default()
    };
    let mut trainer = DpoTrainer::new(model, Box::new(reference), config).unwrap();
    let pair = |i: usize| {
        let (prompt, more) = (vec![5 + i as i64, 9, 700], vec![3; i % 3 + 1]);
        Preference::new(prompt, [vec![8 + i as i64], more.clone()].concat(), more)
    };
    let batch = PreferenceBatch::new((0..5).map(pair).collect()).unwrap();
    let mut numbers = Vec::new();
    for _ in 0..5 {
        let stats = trainer.step(&batch).unwrap();
        numbers.extend(["dpo/loss", "dpo/grad_norm"].map(|key| stats.get(key).unwrap()));
    }
    (numbers, trainer.into_model())
}

fn assert_numbers(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (got / want - 1.0).abs();
        assert!(off < TOLERANCE, "{what}, number {i}: {got} {want}");
    }
}

/// Trains a model in parts, and whole in this process, and compares numbers and weights.
fn assert_trained_alike(
    (group, copies): (&ProcessGroup, Option<(&ProcessGroup, Sharding)>),
    (architecture, adapters): (&str, bool),
    placement: &Placement,
    train: fn(CausalLm) -> (Vec<f64>, CausalLm),
) {
    let what = format!("{architecture}, adapters: {adapters}, {placement:?}");
    let options = (adapters, placement.pipeline.is_some() || copies.is_some());
    let (want, whole) = train(load(architecture, &Placement::default(), options));
    let world = copies.map(|(group, sharding)| {
        let options = DataParallel {
            sharding,
            ..DataParallel::default()
        };
        World::of(group.clone(), &options).unwrap()
    });
    let (got, parts) = train(load(architecture, placement, options));
    drop(world);
    assert_numbers(&what, &got, &want);
    let dir = std::env::temp_dir().join(format!("rlhf-parts-{}", std::process::id()));
    parts.save_pretrained(dir.join("parts")).unwrap();
    if group.rank() == 0 {
        whole.save_pretrained(dir.join("whole")).unwrap();
        let read =
            |folder: &str| read_tensors(&dir.join(folder).join("model.safetensors")).unwrap();
        let (got, want) = (read("parts"), read("whole"));
        assert_eq!(got.len(), want.len());
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            let scale = want.abs().max().double_value(&[]).max(1e-3);
            let off = (got - want).abs().max().double_value(&[]) / scale;
            assert!(off < TOLERANCE, "{what}: {name}: off by {off:e}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
    group.barrier().unwrap();
}

#[test]
fn two_ranks_have_parts_of_the_layers() {
    on_ranks(2, "two_ranks_have_parts_of_the_layers", |group| {
        let parts = tensor(group);
        for case in [("gpt2", false), ("qwen2", true)] {
            assert_trained_alike((group, None), case, &parts, fine_tuned);
            assert_trained_alike((group, None), case, &parts, preferred);
        }
    });
}

#[test]
fn four_ranks_have_parts_of_the_layers() {
    on_ranks(4, "four_ranks_have_parts_of_the_layers", |group| {
        let parts = tensor(group);
        assert_trained_alike((group, None), ("llama", false), &parts, fine_tuned);
        assert_trained_alike((group, None), ("qwen3", true), &parts, preferred);
    });
}

#[test]
fn two_ranks_are_stages() {
    on_ranks(2, "two_ranks_are_stages", |group| {
        let stages = pipeline(group);
        for case in [("gpt2", false), ("gpt_neox", true)] {
            assert_trained_alike((group, None), case, &stages, fine_tuned);
            assert_trained_alike((group, None), case, &stages, preferred);
        }
    });
}

#[test]
fn four_ranks_are_two_stages_of_two_parts() {
    on_ranks(4, "four_ranks_are_two_stages_of_two_parts", |group| {
        let shape = MeshShape {
            data: 1,
            pipeline: 2,
            tensor: 2,
        };
        let mesh = Mesh::new(group, shape).unwrap();
        let placement = Placement {
            tensor: tensor(mesh.tensor()).tensor,
            pipeline: pipeline(mesh.pipeline()).pipeline,
        };
        assert_trained_alike((group, None), ("gemma2", false), &placement, fine_tuned);
    });
}

/// A number of the response's tokens.
struct Tokens;

impl RewardModel for Tokens {
    fn score(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        let sequences = completions.batch.sequences();
        let score = |s: &Sequence| s.response.iter().sum::<i64>() as f32 / 768.0;
        let scores: Vec<f32> = sequences.iter().map(score).collect();
        Ok(Tensor::from_slice(&scores))
    }
}

#[test]
fn copies_of_split_layers() {
    on_ranks(4, "copies_of_split_layers", |group| {
        let shape = MeshShape {
            data: 2,
            pipeline: 1,
            tensor: 2,
        };
        let mesh = Mesh::new(group, shape).unwrap();
        let parts = tensor(mesh.tensor());
        let copies = |sharding| (group, Some((mesh.data(), sharding)));
        let whole = copies(Sharding::Nothing);
        assert_trained_alike(whole, ("llama", true), &parts, preferred);
        for sharding in [Sharding::Nothing, Sharding::Optimizer, Sharding::Gradients] {
            assert_trained_alike(copies(sharding), ("qwen2", false), &parts, fine_tuned);
        }
    });
}

#[test]
fn copies_of_stages() {
    on_ranks(4, "copies_of_stages", |group| {
        let shape = MeshShape {
            data: 2,
            pipeline: 2,
            tensor: 1,
        };
        let mesh = Mesh::new(group, shape).unwrap();
        let stages = pipeline(mesh.pipeline());
        for sharding in [Sharding::Nothing, Sharding::Optimizer, Sharding::Gradients] {
            let copies = (group, Some((mesh.data(), sharding)));
            assert_trained_alike(copies, ("gpt2", false), &stages, fine_tuned);
        }
    });
}

#[test]
fn rollouts_of_split_layers() {
    on_ranks(2, "rollouts_of_split_layers", |group| {
        let run = |placement: &Placement| -> Vec<Stats> {
            let policy = load("llama", placement, (false, false));
            let value = ValueHeadModel::from_causal_lm(&policy, 3).unwrap();
            let reference = policy.try_clone().unwrap();
            let mut config = PpoConfig {
                batch_size: 4,
                minibatches: 2,
                microbatch_size: 2,
                missing_eos: MissingEos::Keep,
                update: update(),
                ..PpoConfig::default()
            };
            config.generation.max_new_tokens = 6;
            let trainer = PpoTrainer::new(config, policy, value, reference, Tokens);
            let mut trainer = trainer.unwrap();
            let prompts = [[5, 6, 7], [400, 3, 9], [1, 2, 3], [9, 9, 8]].map(Into::into);
            (0..3).map(|_| trainer.step(&prompts).unwrap()).collect()
        };
        let (want, got) = (run(&Placement::default()), run(&tensor(group)));
        for (want, got) in want.iter().zip(&got) {
            for (name, want) in want.iter().filter(|(name, _)| !name.contains("time")) {
                let got = got.get(name).unwrap();
                let off = (got - want).abs() / want.abs().max(1e-2);
                assert!(off < 1e-4, "{name}: {got} {want}");
            }
        }
    });
}

/// What the documentation of `TensorParallel` says is sent, as the group counts it.
#[test]
fn bytes_are_counted() {
    on_ranks(2, "bytes_are_counted", |group| {
        let model = load("llama", &tensor(group), (false, false));
        let batch = sequences();
        let tokens = batch.packed(tch::Device::Cpu).tokens() as u64;
        let scored = batch.response_tokens() as u64;
        let before = group.traffic();
        let scores = model.logprobs(&batch, &LogprobOptions::default()).unwrap();
        let (hidden, layers) = (32, 2);
        let forward = (1 + 2 * (layers - 1)) * tokens * hidden + 2 * scored * hidden + 3 * scored;
        let sent = (group.traffic() - before)[Operation::AllReduce].bytes_sent;
        assert_eq!(sent, Operation::AllReduce.bytes_sent(4 * forward, 2));
        let before = group.traffic();
        scores.logprobs.sum(None).backward();
        let backward = 2 * (layers - 1) * tokens * hidden + (tokens + 2 * scored) * hidden;
        // Checkpoints compute a block's first sum again.
        let again = ((layers - 1) * tokens + scored) * hidden;
        let sent = (group.traffic() - before)[Operation::AllReduce].bytes_sent;
        assert_eq!(
            sent,
            Operation::AllReduce.bytes_sent(4 * (backward + again), 2)
        );
    });
}
