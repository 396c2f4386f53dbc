//! Checkpoints of models that lie on several ranks hold whole tensors: a run goes on wherever the parts
//! are. Ranks are threads here; the workspace's tests have them as processes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ranks.rs"]
#[allow(dead_code, unreachable_pub)]
mod ranks;

mod common;

use std::path::Path;

use common::model_dir;
use ranks::on_mesh;
use rlhf_core::{Policy, Sequence, SequenceBatch};
use rlhf_models::{
    CausalLm, LoadOptions, LoraConfig, Modules, PipelineParallel, Placement, TensorParallel,
};
use rlhf_scale::io::read_tensors;
use rlhf_scale::{AdamWConfig, EmaConfig, UpdateConfig, Updater};
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-5;

/// Stages, and parts of layers.
type Shape = [usize; 2];

fn batch() -> SequenceBatch {
    SequenceBatch::new(vec![
        Sequence::new([5, 9, 2, 14], [3, 767]),
        Sequence::new([7, 700, 4], [1, 1, 400, 20, 6]),
        Sequence::new([11], [9]),
    ])
    .unwrap()
}

fn config() -> UpdateConfig {
    UpdateConfig {
        optimizer: AdamWConfig {
            lr: 1e-2,
            // Gradients that are 0 but for rounding must not make steps of full length.
            eps: 1e-4,
            ..AdamWConfig::default()
        },
        max_grad_norm: Some(0.5),
        ema: Some(EmaConfig::default()),
        ..UpdateConfig::default()
    }
}

fn load(architecture: &str, adapters: bool, placement: &Placement) -> CausalLm {
    let options = LoadOptions {
        kind: Some(Kind::Float),
        ..LoadOptions::default()
    };
    let dir = model_dir(architecture);
    let mut model = CausalLm::from_pretrained_parallel(dir, &options, placement).unwrap();
    if adapters {
        let lora = LoraConfig {
            rank: 4,
            target_modules: Modules::AllLinear,
            ..LoraConfig::default()
        };
        model.add_adapter(&lora, 5).unwrap();
    }
    model
}

/// Goes on from a folder, if there is one, makes steps, and writes another.
fn run(case: (&str, bool), shape: Shape, [from, to]: [Option<&Path>; 2], steps: usize) {
    on_mesh(shape, |[stage, part]| {
        let placement = Placement {
            tensor: (shape[1] > 1).then(|| TensorParallel::new(part)),
            pipeline: (shape[0] > 1).then(|| PipelineParallel::new(stage)),
        };
        let model = load(case.0, case.1, &placement);
        let mut updater = Updater::of(&model, &config()).unwrap();
        if let Some(from) = from {
            updater.load(from).unwrap();
        }
        let parts = batch().split(1).unwrap();
        for _ in 0..steps {
            let stats = updater.update::<rlhf_scale::Error>(parts.len(), |i| {
                Ok(model.weighted_nll(&parts[i], None)? / 8.0)
            });
            stats.unwrap();
        }
        if let Some(to) = to {
            updater.save(to).unwrap();
        }
    });
}

fn assert_same(what: &str, got: &Path, want: &Path) {
    for file in ["parameters", "optimizer", "ema"] {
        let read = |dir: &Path| read_tensors(&dir.join(format!("{file}.safetensors"))).unwrap();
        let (got, want) = (read(got), read(want));
        let names = |of: &[(String, Tensor)]| -> Vec<String> {
            of.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(names(&got), names(&want), "{what}");
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            assert_eq!(
                (got.size(), got.kind()),
                (want.size(), want.kind()),
                "{name}"
            );
            let [got, want] = [got, want].map(|t| t.to_kind(Kind::Double));
            // Second moments are squares of small numbers. An adapter's second factor begins with zeros and is
            // all steps, each a gradient over its own size, whose rounding differs from one split to another.
            let scale = want.abs().max().double_value(&[]).max(1e-8);
            let off = (got - want).abs().max().double_value(&[]) / scale;
            let tolerance = match file {
                "optimizer" => 20.0 * TOLERANCE,
                _ if name.contains("lora_B") => 2.0 * TOLERANCE,
                _ => TOLERANCE,
            };
            assert!(off < tolerance, "{what}: {file} {name}: off by {off:e}");
        }
    }
}

#[test]
fn a_run_goes_on_wherever_the_parts_are() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Tied and not; three matrices in one; fewer key and value heads than ranks.
    let cases: [((&str, bool), &[Shape]); 4] = [
        (("gpt2", false), &[[1, 1], [2, 1], [1, 2], [2, 2], [1, 1]]),
        (("llama", false), &[[1, 4], [2, 2], [1, 1], [2, 1]]),
        (("gpt_neox", true), &[[2, 1], [1, 2], [1, 1]]),
        (("qwen3", true), &[[2, 2], [1, 4], [2, 1]]),
    ];
    for (case, shapes) in cases {
        let steps = 2 * shapes.len();
        run(case, [1, 1], [None, Some(&at("whole"))], steps);
        let mut from = None;
        for (i, &shape) in shapes.iter().enumerate() {
            let to = at(&format!("{}-{}", case.0, i));
            run(case, shape, [from.as_deref(), Some(&to)], 2);
            from = Some(to);
        }
        assert_same(&format!("{case:?}"), &from.unwrap(), &at("whole"));
    }
}

/// Loading is undone everywhere if one rank cannot.
#[test]
fn what_one_rank_cannot_read_is_everybodys_error() {
    let dir = tempfile::tempdir().unwrap();
    run(("gpt2", false), [2, 1], [None, Some(dir.path())], 1);
    let path = dir.path().join("parameters.safetensors");
    let mut tensors = read_tensors(&path).unwrap();
    // Of the last stage alone.
    tensors.retain(|(name, _)| name != "transformer.ln_f.weight");
    rlhf_scale::io::save_tensors(&path, &tensors).unwrap();
    let errors = on_mesh([2, 1], |[stage, _]| {
        let placement = (&PipelineParallel::new(stage)).into();
        let model = load("gpt2", false, &placement);
        let mut updater = Updater::of(&model, &config()).unwrap();
        let error = updater.load(dir.path()).unwrap_err();
        assert_eq!(updater.step(), 0);
        error.to_string()
    });
    assert!(
        errors[1].contains("transformer.ln_f.weight: missing"),
        "{}",
        errors[1]
    );
    assert!(errors[0].contains("another rank"), "{}", errors[0]);
}
