//! Models whose blocks are spread over stages are trained as on one rank. Ranks are threads here; the
//! workspace's tests have them as processes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/ranks.rs"]
#[allow(dead_code, unreachable_pub)]
mod ranks;

mod common;

use std::path::Path;
use std::sync::Arc;

use common::model_dir;
use ranks::{ThreadRank, on_mesh, on_ranks};
use rlhf_core::{
    ActorCritic, Completions, GenerationConfig, Generator, LogprobOptions, PaddingSide, Parameters,
    Policy, RewardModel, RngStreams, Sequence, SequenceBatch, ValueModel, generate,
};
use rlhf_models::{
    CausalLm, CausalLmWithValueHead, CheckpointPolicy, Error, LoadOptions, LoraConfig, ModelConfig,
    Modules, PipelineParallel, Placement, SequenceClassifier, TensorParallel, ValueHeadInit,
    ValueHeadModel,
};
use rlhf_scale::{AdamWConfig, UpdateConfig, Updater, io::read_tensors};
use tch::{Device, Kind, Tensor};

const TOLERANCE: f64 = 1e-5;

fn batch() -> SequenceBatch {
    let shared: Arc<[i64]> = [7, 700, 4].into();
    SequenceBatch::new(vec![
        Sequence::new([5, 9, 2, 14], [3, 767]),
        Sequence::new(Arc::clone(&shared), [1, 1, 400, 20, 6]),
        Sequence::new(shared, [384, 383]),
        Sequence::new([11], [9]),
        Sequence::new([12, 13], [9, 4, 5]),
    ])
    .unwrap()
}

/// Four blocks, or Gemma's two, with and without a window.
fn config(architecture: &str, tied: bool) -> ModelConfig {
    let mut config = ModelConfig::from_dir(model_dir(architecture)).unwrap();
    match &mut config {
        ModelConfig::Gpt2(config) => (config.n_layer, config.tie_word_embeddings) = (4, tied),
        ModelConfig::Llama(config) => {
            config.transformer.num_hidden_layers = 4;
            config.transformer.tie_word_embeddings = tied;
        }
        ModelConfig::Gemma2(_) => assert!(tied),
        _ => panic!("{architecture}"),
    }
    config
}

fn fresh(config: &ModelConfig, placement: &Placement) -> CausalLm {
    CausalLm::new_parallel(config.clone(), 3, (Device::Cpu, Kind::Float), placement).unwrap()
}

fn updater(model: &CausalLm) -> Updater {
    let config = UpdateConfig {
        optimizer: AdamWConfig {
            lr: 1e-2,
            // Gradients that are 0 but for rounding must not make steps of full length.
            eps: 1e-4,
            ..AdamWConfig::default()
        },
        max_grad_norm: Some(0.5),
        ..UpdateConfig::default()
    };
    Updater::of(model, &config).unwrap()
}

/// Losses and gradient norms of five steps of five microbatches.
fn train(model: &CausalLm) -> Vec<f64> {
    let mut updater = updater(model);
    let parts = batch().split(1).unwrap();
    let mut numbers = Vec::new();
    for _ in 0..5 {
        let stats = updater.update::<rlhf_scale::Error>(parts.len(), |i| {
            Ok(model.weighted_nll(&parts[i], None)? / 13.0)
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

fn assert_same_files(what: &str, got: &Path, want: &Path) {
    let (got, want) = (read_tensors(got).unwrap(), read_tensors(want).unwrap());
    assert_eq!(got.len(), want.len(), "{what}");
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        assert_eq!(got.size(), want.size());
        let scale = want.abs().max().double_value(&[]).max(1e-3);
        let off = (got - want).abs().max().double_value(&[]) / scale;
        assert!(off < TOLERANCE, "{what}: {name}: off by {off:e}");
    }
}

fn stages(rank: &Arc<ThreadRank>) -> PipelineParallel {
    PipelineParallel::new(Arc::clone(rank) as _)
}

#[test]
fn training_is_the_same_on_stages() {
    for (architecture, tied, size) in [
        ("gpt2", true, 2),
        ("gpt2", false, 4),
        ("llama", true, 4),
        ("gemma2", true, 2),
    ] {
        let config = config(architecture, tied);
        let dir = tempfile::tempdir().unwrap();
        let whole = fresh(&config, &Placement::default());
        let want = train(&whole);
        assert!(want[1] > 0.5, "clipping has something to do: {want:?}");
        whole.save_pretrained(dir.path().join("whole")).unwrap();
        for policy in [CheckpointPolicy::None, CheckpointPolicy::EveryBlock] {
            let got = on_ranks(size, |rank| {
                let mut model = fresh(&config, &(&stages(&rank)).into());
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
fn stages_of_split_layers() {
    let config = config("llama", true);
    let dir = tempfile::tempdir().unwrap();
    let whole = fresh(&config, &Placement::default());
    let want = train(&whole);
    whole.save_pretrained(dir.path().join("whole")).unwrap();
    let got = on_mesh([2, 2], |[stage, part]| {
        let placement = Placement {
            tensor: Some(TensorParallel::new(part)),
            pipeline: Some(PipelineParallel::new(stage)),
        };
        let model = fresh(&config, &placement);
        let numbers = train(&model);
        model.save_pretrained(dir.path().join("parts")).unwrap();
        numbers
    });
    for got in &got {
        assert_numbers("tensor and pipeline", got, &want);
    }
    let file = |folder: &str| dir.path().join(folder).join("model.safetensors");
    assert_same_files("tensor and pipeline", &file("parts"), &file("whole"));
}

#[test]
fn a_folder_is_loaded_and_written_with_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for architecture in ["gpt2", "gpt_neox", "qwen2", "qwen2_bf16"] {
        let options = LoadOptions::default();
        let whole = CausalLm::from_pretrained(model_dir(architecture), &options).unwrap();
        whole.save_pretrained(dir.path().join("whole")).unwrap();
        let elements = on_ranks(2, |rank| {
            let folder = model_dir(architecture);
            let model = CausalLm::from_pretrained_parallel(folder, &options, &stages(&rank));
            let model = model.unwrap();
            model.save_pretrained(dir.path().join("parts")).unwrap();
            let parameters = model.named_parameters();
            parameters.iter().map(|(_, p)| p.numel()).sum::<usize>()
        });
        let all: usize = whole
            .named_parameters()
            .iter()
            .map(|(_, p)| p.numel())
            .sum();
        assert!(elements.iter().all(|count| *count < all), "{elements:?}");
        for file in ["model.safetensors", "config.json"] {
            let bytes = |folder: &str| std::fs::read(dir.path().join(folder).join(file)).unwrap();
            assert_eq!(bytes("parts"), bytes("whole"), "{architecture}: {file}");
        }
    }
}

#[test]
fn adapters_in_stages() {
    let config = config("llama", true);
    let lora = LoraConfig {
        rank: 4,
        target_modules: Modules::AllLinear,
        ..LoraConfig::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let mut whole = fresh(&config, &Placement::default());
    whole.add_adapter(&lora, 5).unwrap();
    let want = train(&whole);
    whole.save_adapter(dir.path().join("whole")).unwrap();
    let got = on_ranks(2, |rank| {
        let mut model = fresh(&config, &(&stages(&rank)).into());
        model.add_adapter(&lora, 5).unwrap();
        let numbers = train(&model);
        model.save_adapter(dir.path().join("parts")).unwrap();
        // The folder of all stages is one that each of them reads.
        model.merge().unwrap();
        model.load_adapter(dir.path().join("parts")).unwrap();
        numbers
    });
    for got in &got {
        assert_numbers("adapters", got, &want);
    }
    let file = |folder: &str| dir.path().join(folder).join("adapter_model.safetensors");
    assert_same_files("adapters", &file("parts"), &file("whole"));
}

#[test]
fn log_probabilities_are_everywhere_without_gradients() {
    let config = config("gpt2", true);
    let options = LogprobOptions {
        temperature: 0.9,
        entropy: true,
    };
    let scored = |model: &CausalLm| {
        let _guard = tch::no_grad_guard();
        model.logprobs(&batch(), &options).unwrap()
    };
    let want = scored(&fresh(&config, &Placement::default()));
    let got = on_ranks(3, |rank| {
        let blocks = stages(&rank).with_blocks(vec![1, 2, 1]);
        let model = fresh(&config, &(&blocks).into());
        let scores = scored(&model);
        let loss = tch::no_grad(|| model.weighted_nll(&batch(), None).unwrap());
        let recorded = model.logprobs(&batch(), &options).unwrap().logprobs;
        (
            scores,
            recorded.abs().sum(Kind::Float).double_value(&[]),
            loss,
        )
    });
    let entropy = want.entropy.unwrap();
    for (stage, (scores, recorded, loss)) in got.iter().enumerate() {
        assert!(scores.logprobs.allclose(&want.logprobs, 1e-5, 1e-6, false));
        assert!(scores.mask.equal(&want.mask));
        let got = scores.entropy.as_ref().unwrap();
        assert!(got.allclose(&entropy, 1e-5, 1e-6, false));
        assert!(loss.double_value(&[]) > 10.0);
        // With them, they come out in the last.
        assert_eq!(*recorded > 0.0, stage == 2);
    }
}

/// Values and scores, as log-probabilities.
#[test]
fn heads_are_in_the_last_stage() {
    let dir = model_dir("gpt2_rm");
    let options = LoadOptions::default();
    let judged = |placement: &Placement| {
        let values = ValueHeadModel::from_pretrained_parallel(&dir, &options, placement).unwrap();
        let critic = SequenceClassifier::from_pretrained_parallel(&dir, &options, placement);
        let critic = critic.unwrap();
        let policy = fresh(&config("llama", true), placement);
        let both = CausalLmWithValueHead::new(policy, ValueHeadInit::InverseSqrt, 3).unwrap();
        let completions = Completions::written(batch());
        let scores = critic.score(&completions).unwrap();
        let _guard = tch::no_grad_guard();
        let asked = LogprobOptions::default();
        let (logprobs, joint) = both.logprobs_and_values(&batch(), None, &asked).unwrap();
        assert!(joint.equal(&both.state_values(&batch()).unwrap()));
        [
            scores,
            values.values(&batch()).unwrap(),
            joint,
            logprobs.logprobs,
        ]
    };
    let want = judged(&Placement::default());
    for got in on_ranks(2, |rank| judged(&(&stages(&rank)).into())) {
        for (got, want) in got.iter().zip(&want) {
            assert!(want.abs().max().double_value(&[]) > 0.01);
            assert!(got.allclose(want, 1e-5, 1e-6, false), "{got} {want}");
        }
    }
}

/// What is written does not depend on where the blocks are: rows that come and go, prompts that are
/// shared, filters, stop tokens.
#[test]
fn responses_are_those_of_one_rank() {
    let shared: Arc<[i64]> = [7, 700, 4].into();
    let prompts: Vec<Arc<[i64]>> = vec![[5, 9].into(), Arc::clone(&shared), shared, [11].into()];
    let mut generation = GenerationConfig {
        max_new_tokens: 9,
        samples_per_prompt: 3,
        batch_size: 5,
        stop_token_ids: vec![3, 17, 200],
        ..GenerationConfig::default()
    };
    let write = |model: &CausalLm, generation: &GenerationConfig| {
        let generator = Generator::new(model, generation)
            .unwrap()
            .with_kept_tokens();
        generator
            .generate(&prompts, &RngStreams::new(5), 0)
            .unwrap()
    };
    for (architecture, top_k) in [("gpt2", None), ("gemma2", Some(40)), ("llama", Some(7))] {
        generation.sampling.top_k = top_k;
        let config = config(architecture, true);
        let want = write(&fresh(&config, &Placement::default()), &generation);
        let got = on_mesh(
            [2, 1 + usize::from(architecture == "llama")],
            |[stage, part]| {
                let placement = Placement {
                    tensor: (architecture == "llama").then(|| TensorParallel::new(part)),
                    pipeline: Some(PipelineParallel::new(stage)),
                };
                write(&fresh(&config, &placement), &generation)
            },
        );
        for got in got {
            assert_eq!(got.batch, want.batch, "{architecture}");
            assert_eq!(got.finish_reasons, want.finish_reasons);
            assert_eq!(got.kept, want.kept);
            assert_eq!(got.kept.is_some(), top_k.is_some());
            let logprobs = |c: &Completions| -> Vec<f32> {
                c.sampling_logprobs
                    .iter()
                    .flatten()
                    .flatten()
                    .copied()
                    .collect()
            };
            for (got, want) in logprobs(&got).iter().zip(logprobs(&want)) {
                assert!((got - want).abs() < 1e-5, "{got} {want}");
            }
        }
    }
}

#[test]
fn logits_that_are_not_finite_are_everybodys_error() {
    let config = config("gpt2", false);
    let errors = on_ranks(2, |rank| {
        let model = fresh(&config, &(&stages(&rank)).into());
        for (name, weight) in model.named_parameters() {
            if name == "lm_head.weight" {
                let _ = tch::no_grad(|| { weight.shallow_clone() }.fill_(f64::NAN));
            }
        }
        let generation = GenerationConfig::default();
        let written = generate(
            &model,
            &[[5, 9].into()],
            &generation,
            &RngStreams::new(5),
            0,
        );
        written.unwrap_err()
    });
    for error in errors {
        assert!(
            matches!(error, rlhf_core::Error::NonFinite { row: 0, .. }),
            "{error}"
        );
    }
}

#[test]
fn what_a_stage_cannot_do_is_an_error() {
    let config = config("gpt2", true);
    on_ranks(2, |rank| {
        let model = fresh(&config, &(&stages(&rank)).into());
        let padded = batch().padded(0, PaddingSide::Right, Device::Cpu);
        let error = model.logits(&padded).err().unwrap();
        assert!(error.to_string().contains("hidden states"), "{error}");
        let blocks = stages(&rank).with_blocks(vec![4]);
        let at = (Device::Cpu, Kind::Float);
        let error = CausalLm::new_parallel(config.clone(), 3, at, &blocks).err();
        assert!(matches!(error, Some(Error::CannotSplit { .. })));
    });
}

/// The rows of the documentation of `PipelineParallel`.
#[test]
fn bytes_are_those_of_the_formula() {
    let config = config("llama", true);
    let batch = batch();
    let tokens = batch.packed(Device::Cpu).tokens() as u64;
    let pass = 4 * 32 * tokens + 16;
    let sent = on_ranks(2, |rank| {
        let model = fresh(&config, &(&stages(&rank)).into());
        let mut updater = updater(&model);
        let before = rank.sent();
        let stats = updater
            .update::<rlhf_scale::Error>(1, |_| Ok(model.weighted_nll(&batch, None)? / 13.0));
        stats.unwrap();
        rank.sent() - before
    });
    let tied = 4 * 768 * 32;
    assert_eq!(sent, [pass + tied, pass + tied]);
}

#[test]
fn a_pass_that_one_stage_makes_alone_is_noticed() {
    let config = config("gpt2", true);
    let errors = on_ranks(2, |rank| {
        let model = fresh(&config, &(&stages(&rank)).into());
        let part = batch().split(2).unwrap().remove(0);
        let first = model.weighted_nll(&part, None).unwrap();
        let second = model.weighted_nll(&part, None).unwrap();
        // Back through them in different orders.
        let order: [&Tensor; 2] = match rlhf_core::Collective::rank(&*rank) {
            0 => [&first, &second],
            _ => [&second, &first],
        };
        let results: Vec<_> = order.iter().map(|loss| loss.f_backward()).collect();
        results
            .into_iter()
            .find_map(Result::err)
            .map(|e| e.to_string())
    });
    let error = errors.into_iter().flatten().next().unwrap();
    assert!(error.contains("pass"), "{error}");
}
