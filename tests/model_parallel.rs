//! Models on several processes are trained by the trainers as they are on one: tensor parallel, pipeline
//! parallel, and both.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rlhf_core::{
    CheckpointConfig, Completions, EpochConfig, GenerationConfig, JsonlObserver, LogprobOptions,
    Policy, Preference, PreferenceBatch, RewardModel, Sequence, SequenceBatch, Stats,
};
use rlhf_dpo::{DpoConfig, DpoTrainer};
use rlhf_models::{
    CausalLm, CheckpointPolicy, LoadOptions, LoraConfig, Modules, PipelineParallel, Placement,
    TensorParallel, ValueHeadModel,
};
use rlhf_ppo::{GrpoConfig, GrpoTrainer, MissingEos, PpoConfig, PpoTrainer};
use rlhf_scale::distributed::{
    DataParallel, GroupOptions, Mesh, MeshShape, Operation, ProcessGroup, Sharding, Spawn, World,
};
use rlhf_scale::io::read_tensors;
use rlhf_scale::{AdamWConfig, UpdateConfig, tch};
use rlhf_sft::{SftConfig, SftTrainer};
use tch::Tensor;

const TOLERANCE: f64 = 1e-5;
const STEPS: usize = 5;

/// Runs `work` on each of so many processes.
fn on_ranks(processes: usize, name: &str, work: impl FnOnce(&ProcessGroup)) {
    if !Spawn::is_rank() {
        Spawn::test(processes, name).run().unwrap().check().unwrap();
        return;
    }
    let options = GroupOptions {
        limit: Duration::from_secs(200),
        ..GroupOptions::default()
    };
    work(&ProcessGroup::from_env(&options).unwrap());
}

/// The places of a process's models.
fn placement(mesh: &Mesh) -> Placement {
    let shape = mesh.shape();
    let group = |group: &ProcessGroup| Arc::new(group.clone());
    Placement {
        tensor: (shape.tensor > 1).then(|| TensorParallel::new(group(mesh.tensor()))),
        pipeline: (shape.pipeline > 1).then(|| PipelineParallel::new(group(mesh.pipeline()))),
    }
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

fn model_dir(architecture: &str) -> PathBuf {
    Path::new("tests/goldens/models").join(architecture)
}

/// How a model is trained.
#[derive(Debug, Clone, Copy)]
struct Variant {
    architecture: &'static str,
    /// LoRA on all linear layers.
    adapters: bool,
    /// What a stage drops does not depend on those before it, as it does on one rank; and copies of
    /// a model make smaller microbatches.
    dropout: f64,
    checkpointed: bool,
}

impl Variant {
    fn lora(self) -> LoraConfig {
        LoraConfig {
            rank: 4,
            dropout: self.dropout,
            target_modules: Modules::AllLinear,
            ..LoraConfig::default()
        }
    }

    fn load(self, placement: &Placement) -> CausalLm {
        let policy = match self.checkpointed {
            true => CheckpointPolicy::EveryBlock,
            false => CheckpointPolicy::None,
        };
        let options = LoadOptions {
            gradient_checkpointing: policy.into(),
            ..LoadOptions::default()
        };
        let dir = model_dir(self.architecture);
        let mut model = CausalLm::from_pretrained_parallel(dir, &options, placement).unwrap();
        if self.adapters {
            model.add_adapter(&self.lora(), 5).unwrap();
        }
        model
    }

    /// A model that is not trained, and one that is.
    fn with_reference(self, placement: &Placement) -> (CausalLm, CausalLm) {
        let model = self.load(placement);
        let reference = match self.adapters {
            true => model.reference().unwrap(),
            false => model.try_clone().unwrap(),
        };
        (reference, model)
    }
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

fn fine_tuned(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let config = SftConfig {
        update: update(),
        microbatch_size: 2,
        ..SftConfig::default()
    };
    let mut trainer = SftTrainer::new(variant.load(placement), config).unwrap();
    let stats = (0..STEPS).map(|_| trainer.step(&sequences()).unwrap());
    let stats = stats.collect();
    trainer
        .into_model()
        .save_pretrained(dir.join("model"))
        .unwrap();
    stats
}

fn preferred(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let (reference, model) = variant.with_reference(placement);
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
    let stats = (0..STEPS).map(|_| trainer.step(&batch).unwrap()).collect();
    trainer
        .into_model()
        .save_pretrained(dir.join("model"))
        .unwrap();
    stats
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

/// Ragged.
fn prompts() -> Vec<Arc<[i64]>> {
    let prompts: [&[i64]; 4] = [&[5, 6, 7], &[400, 3, 9, 11], &[1], &[9, 8]];
    prompts.map(Arc::from).to_vec()
}

/// Half of the answers end early.
fn generation() -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: 6,
        stop_token_ids: (0..100).collect(),
        ..GenerationConfig::default()
    }
}

fn reinforced(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let (reference, policy) = variant.with_reference(placement);
    let value = match variant.adapters {
        true => ValueHeadModel::on_base_of(&policy, &variant.lora(), 3),
        false => ValueHeadModel::from_causal_lm(&policy, 3),
    };
    let config = PpoConfig {
        batch_size: 4,
        minibatches: 2,
        ppo_epochs: 2,
        microbatch_size: 1,
        missing_eos: MissingEos::Keep,
        generation: generation(),
        update: update(),
        ..PpoConfig::default()
    };
    let trainer = PpoTrainer::new(config, policy, value.unwrap(), reference, Tokens);
    let mut trainer = trainer.unwrap();
    let stats = (0..STEPS)
        .map(|_| trainer.step(&prompts()).unwrap())
        .collect();
    let (policy, value) = trainer.into_models();
    policy.save_pretrained(dir.join("model")).unwrap();
    value.save_pretrained(dir.join("value")).unwrap();
    stats
}

fn grouped(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let (reference, policy) = variant.with_reference(placement);
    let mut config = GrpoConfig {
        batch_size: 4,
        minibatches: 2,
        microbatch_size: 3,
        generation: generation(),
        update: update(),
        ..GrpoConfig::dr_grpo()
    };
    config.generation.samples_per_prompt = 3;
    let mut trainer = GrpoTrainer::with_reference(config, policy, reference, Tokens).unwrap();
    let stats = (0..STEPS)
        .map(|_| trainer.step(&prompts()).unwrap())
        .collect();
    trainer
        .into_policy()
        .save_pretrained(dir.join("model"))
        .unwrap();
    stats
}

type Train = fn(Variant, &Placement, &Path) -> Vec<Stats>;

const TRAINERS: [(&str, Train); 4] = [
    ("sft", fine_tuned),
    ("dpo", preferred),
    ("ppo", reinforced),
    ("grpo", grouped),
];

/// Every number of every step, and every weight, as of one process.
#[track_caller]
fn assert_same(what: &str, got: &[Stats], want: &[Stats]) {
    assert_eq!(got.len(), want.len());
    for (step, (got, want)) in got.iter().zip(want).enumerate() {
        // Before the first step policy and reference are one, and rounding says which answer is ahead.
        let tied = |name: &str| step == 0 && name == "dpo/rewards/accuracy";
        let skipped = |name: &str| name.contains("time") || tied(name);
        for (name, want) in want.iter().filter(|(name, _)| !skipped(name)) {
            let got = got.get(name).unwrap();
            // Some are sums that cancel.
            let off = (got - want).abs() / want.abs().max(0.1);
            let exact = name.ends_with("loss") || name.ends_with("grad_norm");
            let tolerance = if exact { TOLERANCE } else { 10.0 * TOLERANCE };
            let same = off <= tolerance || (got.is_nan() && want.is_nan());
            assert!(
                same,
                "{what}, step {step}: {name} is {got}, of one process {want}"
            );
        }
    }
}

fn assert_same_weights(what: &str, parts: &Path, whole: &Path) {
    for folder in std::fs::read_dir(whole).unwrap() {
        let folder = folder.unwrap().file_name();
        let read = |dir: &Path| read_tensors(&dir.join(&folder).join("model.safetensors")).unwrap();
        let (got, want) = (read(parts), read(whole));
        assert_eq!(got.len(), want.len());
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            let scale = want.abs().max().double_value(&[]).max(1e-2);
            let off = (got - want).abs().max().double_value(&[]) / scale;
            assert!(off < TOLERANCE, "{what}: {folder:?} {name}: off by {off:e}");
        }
    }
}

/// Trains a model in parts, and whole in this process, and compares numbers and weights.
fn assert_trained_alike(
    mesh: &Mesh,
    sharding: Sharding,
    variant: Variant,
    (name, train): (&str, Train),
) {
    let place = placement(mesh);
    let what = format!("{name}, {variant:?}, {:?}, {sharding:?}", mesh.shape());
    let dir = std::env::temp_dir().join(format!("rlhf-parts-{}", std::process::id()));
    let want = train(variant, &Placement::default(), &dir.join("whole"));
    let options = DataParallel {
        sharding,
        ..DataParallel::default()
    };
    let world = World::on(mesh, &options).unwrap();
    let got = train(variant, &place, &dir.join("parts"));
    assert_same(&what, &got, &want);
    if world.is_first() {
        assert_same_weights(&what, &dir.join("parts"), &dir.join("whole"));
    }
    drop(world);
    mesh.world().barrier().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
}

/// All trainers on `[data, pipeline, tensor]` processes, with adapters and without, checkpointed and
/// not (of four processes in one way each); the architectures are those without adapters and with them.
fn trained_on(name: &str, [data, pipeline, tensor]: [usize; 3], architectures: [&'static str; 2]) {
    let shape = MeshShape {
        data,
        pipeline,
        tensor,
    };
    on_ranks(shape.size(), name, |group| {
        let mesh = Mesh::new(group, shape).unwrap();
        let shardings = match data {
            1 => vec![Sharding::Nothing],
            _ => vec![Sharding::Nothing, Sharding::Optimizer, Sharding::Gradients],
        };
        let mut shardings = shardings.into_iter().cycle();
        for (architecture, adapters) in architectures.into_iter().zip([false, true]) {
            let both: &[bool] = if shape.size() > 2 {
                &[!adapters]
            } else {
                &[false, true]
            };
            for &checkpointed in both {
                let variant = Variant {
                    architecture,
                    adapters,
                    dropout: if data * pipeline > 1 { 0.0 } else { 0.2 },
                    checkpointed,
                };
                for trainer in &TRAINERS {
                    let sharding = shardings.next().unwrap();
                    assert_trained_alike(&mesh, sharding, variant, *trainer);
                }
            }
        }
    });
}

#[test]
fn two_parts_of_layers() {
    trained_on("two_parts_of_layers", [1, 1, 2], ["gpt2", "qwen2"]);
}

#[test]
fn four_parts_of_layers() {
    trained_on("four_parts_of_layers", [1, 1, 4], ["llama", "qwen3"]);
}

#[test]
fn two_stages() {
    trained_on("two_stages", [1, 2, 1], ["gpt2", "gpt_neox"]);
}

#[test]
fn two_stages_of_two_parts() {
    trained_on("two_stages_of_two_parts", [1, 2, 2], ["gemma2", "llama"]);
}

#[test]
fn copies_of_split_layers() {
    trained_on("copies_of_split_layers", [2, 1, 2], ["qwen2", "llama"]);
}

#[test]
fn copies_of_stages() {
    trained_on("copies_of_stages", [2, 2, 1], ["gpt2", "llama"]);
}

/// Fine-tunes on a mesh with checkpoints in `dir`, from what is there, up to a step.
fn resumable(mesh: &Mesh, dir: &Path, steps: u64) {
    let variant = Variant {
        architecture: "gpt2",
        adapters: false,
        dropout: 0.0,
        checkpointed: false,
    };
    let config = SftConfig {
        update: update(),
        ..SftConfig::default()
    };
    let _world = World::on(mesh, &DataParallel::default()).unwrap();
    let mut trainer = SftTrainer::new(variant.load(&placement(mesh)), config).unwrap();
    let epochs = EpochConfig {
        epochs: 20,
        batch_size: 4,
        max_steps: Some(steps),
        seed: 4,
        checkpoints: Some(CheckpointConfig {
            dir: dir.join("checkpoints"),
            every: 2,
            keep: 2,
        }),
        ..EpochConfig::default()
    };
    let start = epochs.resumed_step().unwrap();
    let metrics = JsonlObserver::resume(dir.join("metrics.jsonl"), start).unwrap();
    let data = sequences().into_sequences();
    trainer
        .train(&data, &epochs, &mut [Box::new(metrics)])
        .unwrap();
    let model = trainer.into_model();
    if mesh.place().data == 0 {
        model.save_pretrained(dir.join("end/model")).unwrap();
    }
}

/// Written once, and read by other numbers of other parts.
#[test]
fn a_run_goes_on_on_another_mesh() {
    let name = "a_run_goes_on_on_another_mesh";
    let shape = |[data, pipeline, tensor]: [usize; 3]| MeshShape {
        data,
        pipeline,
        tensor,
    };
    if Spawn::is_rank() {
        let dir = PathBuf::from(std::env::var_os("RLHF_TEST_DIR").unwrap());
        on_ranks(0, name, |group| {
            let (shape, steps) = match group.size() {
                4 => (shape([1, 2, 2]), 3),
                _ => (shape([2, 1, 1]), 6),
            };
            resumable(&Mesh::new(group, shape).unwrap(), &dir, steps);
        });
        return;
    }
    let [shared, whole] = [(), ()].map(|()| tempfile::tempdir().unwrap());
    for processes in [4, 2] {
        let mut ranks = Spawn::test(processes, name);
        ranks = ranks.env("RLHF_TEST_DIR", shared.path());
        ranks.run().unwrap().check().unwrap();
    }
    let alone = Mesh::new(&ProcessGroup::alone(), shape([1, 1, 1])).unwrap();
    resumable(&alone, whole.path(), 6);
    assert_same_weights(
        "resumed",
        &shared.path().join("end"),
        &whole.path().join("end"),
    );
    // Each step was told once.
    let lines = |dir: &Path| std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    assert_eq!(lines(shared.path()).lines().count(), 6);
}

/// What the documentation of `TensorParallel` says is sent, as the group counts it.
#[test]
fn bytes_are_counted() {
    on_ranks(2, "bytes_are_counted", |group| {
        let shape = MeshShape {
            data: 1,
            pipeline: 1,
            tensor: 2,
        };
        let mesh = Mesh::new(group, shape).unwrap();
        let variant = Variant {
            architecture: "llama",
            adapters: false,
            dropout: 0.0,
            checkpointed: true,
        };
        let model = variant.load(&placement(&mesh));
        let group = mesh.tensor();
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
