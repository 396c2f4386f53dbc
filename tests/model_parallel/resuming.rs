//! Runs that stop on one mesh and go on on another.

use std::path::{Path, PathBuf};

use rlhf_core::{CheckpointConfig, EpochConfig, JsonlObserver};
use rlhf_scale::distributed::{DataParallel, Mesh, MeshShape, ProcessGroup, Spawn, World};
use rlhf_sft::{SftConfig, SftTrainer};

use crate::trainers::{Variant, sequences, update};
use crate::{assert_same_weights, on_ranks, placement};

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
    let name = "resuming::a_run_goes_on_on_another_mesh";
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
