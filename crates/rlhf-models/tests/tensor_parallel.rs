//! Models whose layers lie on several ranks compute what they compute on one. Ranks are threads here;
//! the workspace's tests have them as processes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ranks.rs"]
#[allow(dead_code, unreachable_pub)]
mod ranks;

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{adapter_dir, model_dir};
use ranks::{ThreadRank, on_ranks};
use rlhf_core::{
    ActorCritic, GenerationConfig, KeptSet, KeptTokens, LogprobOptions, PaddedBatch, Parameters,
    Policy, RngStreams, Scorer, Sequence, SequenceBatch, ValueModel, generate,
};
use rlhf_models::{
    CausalLm, CausalLmWithValueHead, CheckpointPolicy, Error, LoadOptions, LoraConfig, Modules,
    SequenceClassifier, TensorParallel, ValueHeadInit, ValueHeadModel,
};
use rlhf_scale::{AdamWConfig, UpdateConfig, Updater, io::read_tensors};
use tch::{Device, Kind, Tensor};

const ARCHITECTURES: [&str; 7] = [
    "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3",
];

/// Sums of f32 in another order.
const TOLERANCE: f64 = 1e-5;

/// Ragged, with a prompt that two sequences share.
fn batch() -> SequenceBatch {
    let shared: Arc<[i64]> = [7, 700, 4].into();
    SequenceBatch::new(vec![
        Sequence::new([5, 9, 2, 14], [3, 767]),
        Sequence::new(Arc::clone(&shared), [1, 1, 400, 20, 6]),
        Sequence::new(shared, [384, 383]),
        Sequence::new([11], [9]),
    ])
    .unwrap()
}

fn parallel(rank: &Arc<ThreadRank>) -> TensorParallel {
    TensorParallel::new(Arc::clone(rank) as _)
}

fn load(architecture: &str, rank: Option<&Arc<ThreadRank>>) -> CausalLm {
    let (dir, options) = (model_dir(architecture), LoadOptions::default());
    match rank {
        None => CausalLm::from_pretrained(dir, &options).unwrap(),
        Some(rank) => CausalLm::from_pretrained_parallel(dir, &options, &parallel(rank)).unwrap(),
    }
}

/// The largest difference, relative to the largest element.
fn difference(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.size(), want.size());
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let scale = want.abs().max().double_value(&[]).max(1e-3);
    (got - want).abs().max().double_value(&[]) / scale
}

fn assert_same(what: &str, got: &Tensor, want: &Tensor) {
    let difference = difference(got, want);
    assert!(difference < TOLERANCE, "{what}: off by {difference:e}");
}

fn assert_same_files(what: &str, got: &Path, want: &Path) {
    let (got, want) = (read_tensors(got).unwrap(), read_tensors(want).unwrap());
    assert_eq!(got.len(), want.len(), "{what}");
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        assert_same(&format!("{what}: {name}"), got, want);
    }
}

/// Puts every gradient in the place of its weight, so that a saved model holds gradients.
fn gradients_into_weights(model: &dyn Parameters) {
    let _guard = tch::no_grad_guard();
    for (name, mut parameter) in model.named_parameters() {
        let grad = parameter.grad();
        assert!(grad.defined(), "{name} has no gradient");
        parameter.copy_(&grad);
    }
}

fn scores(model: &CausalLm) -> Tensor {
    let options = LogprobOptions {
        temperature: 0.9,
        entropy: true,
    };
    let scores = model.logprobs(&batch(), &options).unwrap();
    let entropy = scores.entropy.unwrap();
    // Sums that no symmetry makes vanish.
    let weights = Tensor::arange(entropy.numel() as i64, (Kind::Float, Device::Cpu));
    let weights = (weights.view(entropy.size().as_slice()) * 1.3).sin() + 1.5;
    (scores.logprobs * weights).sum(Kind::Float) + entropy.square().sum(Kind::Float)
}

#[test]
fn every_architecture_computes_the_same_with_the_same_gradients() {
    for architecture in ARCHITECTURES {
        let dir = tempfile::tempdir().unwrap();
        let whole = load(architecture, None);
        let want = scores(&whole);
        want.backward();
        gradients_into_weights(&whole);
        whole.save_pretrained(dir.path().join("whole")).unwrap();
        // Key and value heads are two: with four ranks they are repeated.
        for size in [2, 4] {
            let folder = dir.path().join(size.to_string());
            let got = on_ranks(size, |rank| {
                let model = load(architecture, Some(&rank));
                let got = scores(&model);
                got.backward();
                gradients_into_weights(&model);
                model.save_pretrained(&folder).unwrap();
                got.double_value(&[])
            });
            let want = want.double_value(&[]);
            assert!(got.iter().all(|value| *value == got[0]), "{got:?}");
            let off = (got[0] / want - 1.0).abs();
            assert!(off < TOLERANCE, "{architecture} on {size}: {off:e}");
            let file = |folder: &Path| folder.join("model.safetensors");
            assert_same_files(
                &format!("{architecture} on {size}"),
                &file(&folder),
                &file(&dir.path().join("whole")),
            );
        }
    }
}

#[test]
fn a_saved_model_has_the_bytes_of_an_unsplit_one() {
    for architecture in ["gpt2", "gpt_neox", "qwen3", "qwen2_bf16", "llama_sharded"] {
        let dir = tempfile::tempdir().unwrap();
        load(architecture, None)
            .save_pretrained(dir.path().join("whole"))
            .unwrap();
        on_ranks(2, |rank| {
            let model = load(architecture, Some(&rank));
            model.save_pretrained(dir.path().join("parts")).unwrap();
        });
        for file in ["model.safetensors", "config.json"] {
            let bytes = |folder: &str| std::fs::read(dir.path().join(folder).join(file)).unwrap();
            assert_eq!(bytes("parts"), bytes("whole"), "{architecture}: {file}");
        }
    }
}

/// The parts of a sum over ranks are rounded before they are added.
#[test]
fn models_of_16_bits() {
    let want = scores(&load("qwen2_bf16", None)).double_value(&[]);
    for got in on_ranks(2, |rank| {
        let model = load("qwen2_bf16", Some(&rank));
        let scores = scores(&model);
        scores.backward();
        assert!(
            model
                .named_parameters()
                .iter()
                .all(|(_, p)| p.grad().defined())
        );
        scores.double_value(&[])
    }) {
        assert!((got / want - 1.0).abs() < 5e-3, "{got} {want}");
    }
}

#[test]
fn a_rank_has_its_part_of_the_weights() {
    let elements = |model: &CausalLm| -> usize {
        let parameters = model.named_parameters();
        parameters.iter().map(|(_, weight)| weight.numel()).sum()
    };
    let whole = elements(&load("llama", None));
    for count in on_ranks(2, |rank| elements(&load("llama", Some(&rank)))) {
        // But for the norms, half.
        assert!(count < whole / 2 + 32 * 5 + 1, "{count} of {whole}");
    }
}

#[test]
fn fresh_weights_are_those_of_one_rank() {
    let config = load("gpt2", None).config().clone();
    let (cpu, kind) = (Device::Cpu, Kind::Float);
    let whole = CausalLm::new(config.clone(), 3, cpu, kind).unwrap();
    let want = scores(&whole).double_value(&[]);
    for got in on_ranks(2, |rank| {
        let model = CausalLm::new_parallel(config.clone(), 3, (cpu, kind), &parallel(&rank));
        scores(&model.unwrap()).double_value(&[])
    }) {
        assert!((got / want - 1.0).abs() < TOLERANCE, "{got} {want}");
    }
}

#[test]
fn a_vocabulary_that_the_ranks_do_not_divide() {
    let mut config = load("llama", None).config().clone();
    let rlhf_models::ModelConfig::Llama(llama) = &mut config else {
        panic!()
    };
    llama.transformer.vocab_size = 769;
    let whole = CausalLm::new(config.clone(), 3, Device::Cpu, Kind::Float).unwrap();
    let want = scores(&whole).double_value(&[]);
    let padded = padded();
    let want_logits = whole.logits(&padded).unwrap();
    for (got, logits) in on_ranks(4, |rank| {
        let at = (Device::Cpu, Kind::Float);
        let model = CausalLm::new_parallel(config.clone(), 3, at, &parallel(&rank)).unwrap();
        let value = scores(&model);
        value.backward();
        let logits = model.logits(&self::padded()).unwrap();
        (value.double_value(&[]), logits.detach())
    }) {
        assert!((got / want - 1.0).abs() < TOLERANCE, "{got} {want}");
        assert_same("logits", &logits, &want_logits);
    }
}

fn padded() -> PaddedBatch {
    batch().padded(0, rlhf_core::PaddingSide::Right, Device::Cpu)
}

#[test]
fn ranks_that_do_not_divide_the_model_are_refused() {
    let errors = on_ranks(3, |rank| {
        let (dir, options) = (model_dir("llama"), LoadOptions::default());
        CausalLm::from_pretrained_parallel(dir, &options, &parallel(&rank)).err()
    });
    for error in errors {
        let error = error.unwrap();
        assert!(
            matches!(
                error,
                Error::CannotSplit {
                    field: "num_attention_heads",
                    size: 4,
                    ranks: 3,
                    ..
                }
            ),
            "{error}"
        );
    }
}

fn lora() -> LoraConfig {
    LoraConfig {
        rank: 4,
        target_modules: Modules::AllLinear,
        ..LoraConfig::default()
    }
}

fn updater(model: &CausalLm, clip: f64) -> Updater {
    let config = UpdateConfig {
        optimizer: AdamWConfig {
            lr: 1e-2,
            // Gradients that are 0 but for rounding must not make steps of full length.
            eps: 1e-3,
            weight_decay: 0.01,
            ..AdamWConfig::default()
        },
        max_grad_norm: Some(clip),
        ..UpdateConfig::default()
    };
    Updater::of(model, &config).unwrap()
}

/// Losses and gradient norms of five steps.
fn train(model: &CausalLm) -> Vec<f64> {
    let mut updater = updater(model, 0.5);
    let parts = batch().split(2).unwrap();
    let mut numbers = Vec::new();
    for _ in 0..5 {
        let stats = updater.update::<rlhf_scale::Error>(parts.len(), |i| {
            Ok(model.weighted_nll(&parts[i], None)? / 10.0)
        });
        let stats = stats.unwrap();
        numbers.extend([stats.loss, stats.grad_norm]);
    }
    numbers
}

fn assert_numbers(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (got / want - 1.0).abs();
        assert!(off < TOLERANCE, "{what}, number {i}: {got} {want}");
    }
}

#[test]
fn training_is_the_same_with_clipping_and_checkpoints() {
    for (architecture, size) in [("gpt2", 2), ("qwen3", 4), ("gemma2", 2)] {
        let dir = tempfile::tempdir().unwrap();
        let whole = load(architecture, None);
        let want = train(&whole);
        assert!(want[1] > 0.5, "clipping has something to do: {want:?}");
        whole.save_pretrained(dir.path().join("whole")).unwrap();
        for policy in [CheckpointPolicy::None, CheckpointPolicy::SquareRoot] {
            let got = on_ranks(size, |rank| {
                let mut model = load(architecture, Some(&rank));
                model.set_gradient_checkpointing(policy.into()).unwrap();
                let numbers = train(&model);
                model.save_pretrained(dir.path().join("parts")).unwrap();
                numbers
            });
            for got in &got {
                assert_numbers(architecture, got, &want);
            }
            let file = |folder: &str| dir.path().join(folder).join("model.safetensors");
            assert_same_files(architecture, &file("parts"), &file("whole"));
        }
    }
}

#[test]
fn adapters_on_split_layers_are_trained_the_same() {
    for (architecture, size) in [("gpt2", 2), ("llama", 4), ("gpt_neox", 4)] {
        let dir = tempfile::tempdir().unwrap();
        let mut whole = load(architecture, None);
        whole.add_adapter(&lora(), 5).unwrap();
        let want = train(&whole);
        whole.save_adapter(dir.path().join("whole")).unwrap();
        whole
            .save_pretrained(dir.path().join("whole_merged"))
            .unwrap();
        let got = on_ranks(size, |rank| {
            let mut model = load(architecture, Some(&rank));
            model.add_adapter(&lora(), 5).unwrap();
            model
                .set_gradient_checkpointing(CheckpointPolicy::EveryBlock.into())
                .unwrap();
            let numbers = train(&model);
            model.save_adapter(dir.path().join("parts")).unwrap();
            model
                .save_pretrained(dir.path().join("parts_merged"))
                .unwrap();
            // A copy has the same parts, and a reference the same base.
            let copy = model.try_clone().unwrap();
            let same = scores(&copy).double_value(&[]) == scores(&model).double_value(&[]);
            assert!(same);
            model.reference().unwrap();
            model.merge().unwrap();
            numbers
        });
        for got in &got {
            assert_numbers(architecture, got, &want);
        }
        let file = |folder: &str, file: &str| dir.path().join(folder).join(file);
        let (adapter, model) = ("adapter_model.safetensors", "model.safetensors");
        assert_same_files(
            architecture,
            &file("parts", adapter),
            &file("whole", adapter),
        );
        assert_same_files(
            architecture,
            &file("parts_merged", model),
            &file("whole_merged", model),
        );
    }
}

#[test]
fn adapters_of_a_folder_are_split_when_they_are_loaded() {
    for (architecture, adapter) in [("gpt2", "gpt2_attn_mlp"), ("llama", "llama_all_rslora")] {
        let mut whole = load(architecture, None);
        whole.load_adapter(adapter_dir(adapter)).unwrap();
        let want = scores(&whole).double_value(&[]);
        for got in on_ranks(2, |rank| {
            let mut model = load(architecture, Some(&rank));
            model.load_adapter(adapter_dir(adapter)).unwrap();
            scores(&model).double_value(&[])
        }) {
            assert!((got / want - 1.0).abs() < TOLERANCE, "{got} {want}");
        }
    }
}

#[test]
fn ranks_write_the_same_tokens() {
    let prompts: Vec<Arc<[i64]>> = vec![[5, 6, 7].into(), [400, 3].into()];
    let config = GenerationConfig {
        max_new_tokens: 12,
        samples_per_prompt: 2,
        ..GenerationConfig::default()
    };
    for (architecture, size) in [("gpt2", 2), ("qwen2", 4), ("gemma2", 4), ("mistral", 2)] {
        let written = |model: &CausalLm| -> Vec<Vec<i64>> {
            let completions = generate(model, &prompts, &config, &RngStreams::new(1), 0).unwrap();
            let sequences = completions.batch.sequences();
            sequences.iter().map(|s| s.response.clone()).collect()
        };
        let want = written(&load(architecture, None));
        for got in on_ranks(size, |rank| written(&load(architecture, Some(&rank)))) {
            assert_eq!(got, want, "{architecture}");
        }
    }
}

#[test]
fn heads_for_scores_and_values_are_on_every_rank() {
    for (architecture, size) in [("gpt2", 2), ("llama", 4)] {
        let numbers = |model: CausalLm| -> Vec<f64> {
            let sum = |t: Tensor| t.square().sum(Kind::Double).double_value(&[]);
            let classifier = SequenceClassifier::from_causal_lm(&model, 2, 1).unwrap();
            let critic = ValueHeadModel::from_causal_lm(&model, 1).unwrap();
            let scored = sum(classifier.scores(&batch()).unwrap());
            let valued = sum(critic.values(&batch()).unwrap());
            let joint = CausalLmWithValueHead::new(model, ValueHeadInit::InverseSqrt, 2).unwrap();
            let options = LogprobOptions::default();
            let (logprobs, values) = joint.logprobs_and_values(&batch(), None, &options).unwrap();
            vec![scored, valued, sum(logprobs.logprobs), sum(values)]
        };
        let want = numbers(load(architecture, None));
        for got in on_ranks(size, |rank| numbers(load(architecture, Some(&rank)))) {
            assert_numbers(architecture, &got, &want);
        }
    }
}

#[test]
fn log_probabilities_within_what_a_filter_kept() {
    let kept: Vec<KeptTokens> = batch()
        .sequences()
        .iter()
        .map(|s| vec![KeptSet::AllBut([2, 500].into()); s.response.len()].into())
        .collect();
    let numbers = |model: CausalLm| -> Vec<f64> {
        let options = LogprobOptions {
            temperature: 0.7,
            entropy: true,
        };
        let scores = model.logprobs_within(&batch(), &kept, &options).unwrap();
        let sum = scores.logprobs.sum(Kind::Float) + scores.entropy.unwrap().sum(Kind::Float);
        sum.backward();
        // The trunk's last norm is the same on all ranks, its gradient too.
        let parameters = model.named_parameters();
        let norm = parameters
            .iter()
            .find(|(name, _)| name == "model.norm.weight");
        let grad = norm.unwrap().1.grad().square().sum(Kind::Double);
        vec![sum.double_value(&[]), grad.double_value(&[])]
    };
    let want = numbers(load("gemma2", None));
    for got in on_ranks(2, |rank| numbers(load("gemma2", Some(&rank)))) {
        assert_numbers("gemma2", &got, &want);
    }
}

/// What the documentation of `TensorParallel` says is sent.
#[test]
fn bytes_are_those_of_the_formula() {
    let (hidden, layers, kind) = (32u64, 2u64, 4u64);
    let batch = batch();
    let packed = batch.packed(Device::Cpu);
    let (n, m) = (packed.tokens() as u64, batch.response_tokens() as u64);
    let forward = n * hidden + (layers - 1) * 2 * n * hidden + 2 * m * hidden + 3 * m;
    let backward = (layers - 1) * 2 * n * hidden + (n + m) * hidden + m * hidden;
    for (policy, again) in [
        (CheckpointPolicy::None, 0),
        (
            CheckpointPolicy::EveryBlock,
            (layers - 1) * n * hidden + m * hidden,
        ),
    ] {
        let counts = on_ranks(2, |rank| {
            let mut model = load("llama", Some(&rank));
            model.set_gradient_checkpointing(policy.into()).unwrap();
            let scores = model.logprobs(&batch, &LogprobOptions::default()).unwrap();
            let forward = rank.reduced.load(Ordering::Relaxed);
            scores.logprobs.sum(Kind::Float).backward();
            (forward, rank.reduced.load(Ordering::Relaxed) - forward)
        });
        for (got_forward, got_backward) in counts {
            assert_eq!(got_forward, kind * forward, "{policy:?}");
            assert_eq!(got_backward, kind * (backward + again), "{policy:?}");
        }
    }
}
