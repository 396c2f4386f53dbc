//! Models on several processes are trained by the trainers as they are on one: tensor parallel, pipeline
//! parallel, and both.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod resuming;
mod trainers;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rlhf_core::{LogprobOptions, Policy, Stats};
use rlhf_models::{PipelineParallel, Placement, TensorParallel};
use rlhf_scale::distributed::{
    DataParallel, GroupOptions, Mesh, MeshShape, Operation, ProcessGroup, Sharding, Spawn, World,
};
use rlhf_scale::io::read_tensors;
use rlhf_scale::tch;

use trainers::{TRAINERS, Train, Variant, sequences};

const TOLERANCE: f64 = 1e-5;

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
    trained_on("four_parts_of_layers", [1, 1, 4], ["qwen3", "llama"]);
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
