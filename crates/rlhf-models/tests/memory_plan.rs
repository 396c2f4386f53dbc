//! The memory plan against what libtorch allocates, counted to the byte: no timing, no resident
//! memory. `kernels_memory.rs` has what libtorch's own operations keep where there are kernels of ours.
//! `benches/memory_plan.rs` compares the plan with a process's peak.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::model_dir;
use rlhf_core::{
    Error as CoreError, LogprobOptions, Parameters, Policy, Sequence, SequenceBatch, ValueModel,
};
use rlhf_models::{
    BatchShape, CausalLm, CheckpointPolicy, Error, Gemma2Config, GenerationShape, Gpt2Config,
    GptNeoxConfig, LlamaConfig, LoadOptions, LoraConfig, MemoryHead, MemoryOptions, MistralConfig,
    ModelConfig, Qwen2Config, Qwen3Config, SequenceClassifier, TransformerConfig, ValueHeadModel,
};
use rlhf_scale::{EmaConfig, MemoryPlan, Precision, UpdateConfig, Updater, measure_memory};
use tch::{Device, Kind, Tensor};

const POLICIES: [CheckpointPolicy; 4] = [
    CheckpointPolicy::None,
    CheckpointPolicy::EveryBlock,
    CheckpointPolicy::EveryKth(2),
    CheckpointPolicy::SquareRoot,
];

/// What the plan may be wrong by: the buffers that 16-bit kernels make, single numbers a token, the
/// order in which autograd frees.
const TOLERANCE: f64 = 0.15;

/// Every architecture, small.
fn configs() -> Vec<(&'static str, ModelConfig)> {
    let gpt2 = Gpt2Config {
        vocab_size: 600,
        n_positions: 128,
        n_embd: 64,
        n_layer: 4,
        n_head: 4,
        ..Gpt2Config::default()
    };
    let gpt_neox = GptNeoxConfig {
        vocab_size: 600,
        max_position_embeddings: 128,
        hidden_size: 64,
        intermediate_size: 256,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        ..GptNeoxConfig::default()
    };
    let transformer = TransformerConfig {
        vocab_size: 600,
        max_position_embeddings: 128,
        hidden_size: 64,
        intermediate_size: 176,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        ..TransformerConfig::default()
    };
    let llama = LlamaConfig {
        transformer: transformer.clone(),
        ..LlamaConfig::default()
    };
    let mistral = MistralConfig {
        transformer: transformer.clone(),
        sliding_window: None,
    };
    let qwen2 = Qwen2Config {
        transformer: transformer.clone(),
        sliding_window: None,
    };
    let qwen3 = Qwen3Config {
        transformer: transformer.clone(),
        sliding_window: None,
        ..Qwen3Config::default()
    };
    let gemma2 = Gemma2Config {
        transformer: TransformerConfig {
            tie_word_embeddings: true,
            ..transformer
        },
        sliding_window: None,
        ..Gemma2Config::default()
    };
    vec![
        ("gpt2", ModelConfig::Gpt2(gpt2)),
        ("gpt_neox", ModelConfig::GptNeox(gpt_neox)),
        ("llama", ModelConfig::Llama(llama)),
        ("mistral", ModelConfig::Mistral(mistral)),
        ("qwen2", ModelConfig::Qwen2(qwen2)),
        ("qwen3", ModelConfig::Qwen3(qwen3)),
        ("gemma2", ModelConfig::Gemma2(gemma2)),
    ]
}

fn llama() -> ModelConfig {
    configs().swap_remove(2).1
}

fn batch(lengths: &[(usize, usize)]) -> SequenceBatch {
    let sequence = |&(p, r): &(usize, usize)| Sequence::new(vec![1; p], vec![2; r]);
    SequenceBatch::new(lengths.iter().map(sequence).collect()).unwrap()
}

fn batches() -> [SequenceBatch; 2] {
    [
        batch(&[(40, 40); 8]),
        batch(&[
            (30, 60),
            (60, 64),
            (10, 40),
            (50, 8),
            (9, 20),
            (40, 70),
            (3, 30),
            (70, 30),
        ]),
    ]
}

/// What an update allocates beside what stays: the plan's counterpart.
fn measured(model: &mut CausalLm, batch: &SequenceBatch, options: &MemoryOptions) -> u64 {
    model
        .set_gradient_checkpointing(options.gradient_checkpointing)
        .unwrap();
    model
        .set_logprob_chunk_rows(options.logprob_chunk_rows)
        .unwrap();
    let config = UpdateConfig {
        ema: options.averages.then(EmaConfig::default),
        ..UpdateConfig::default().for_precision(options.precision)
    };
    let mut updater = Updater::new(model.named_parameters(), &config).unwrap();
    let parts = batch.split(options.microbatch_size).unwrap();
    let scoring = LogprobOptions {
        entropy: options.entropy,
        ..LogprobOptions::default()
    };
    let (stats, memory) = measure_memory(|| {
        updater.update::<rlhf_scale::Error>(parts.len(), |i| {
            let scores = model.logprobs(&parts[i], &scoring)?;
            let mut loss = scores.logprobs.sum(Kind::Float);
            if let Some(entropy) = scores.entropy {
                loss += entropy.sum(Kind::Float);
            }
            Ok(loss / -1000.0)
        })
    })
    .unwrap();
    stats.unwrap();
    memory.peak
}

fn beside(plan: &MemoryPlan) -> u64 {
    plan.peak() - plan.resident()
}

/// Says so where a prediction is off.
fn off(predicted: u64, measured: u64, what: &str) -> Option<String> {
    let ratio = predicted as f64 / measured as f64;
    println!("{what}: {predicted} / {measured} = {ratio:.3}");
    let wrong = (ratio - 1.0).abs() > TOLERANCE;
    wrong.then(|| format!("{what}: {predicted} for {measured}"))
}

#[test]
fn the_peak_of_an_update_is_as_predicted() {
    let mut wrong = Vec::new();
    for (name, config) in configs() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut model =
                CausalLm::new(config.clone(), 1, Device::Cpu, precision.kind()).unwrap();
            for (policy, batch) in POLICIES.iter().flat_map(|p| batches().map(|b| (p, b))) {
                let several = match policy {
                    CheckpointPolicy::None | CheckpointPolicy::SquareRoot => 3,
                    _ => 1,
                };
                let ways = [(8, None, false), (2, None, false), (8, Some(64), true)];
                for (microbatch_size, chunk, entropy) in ways.into_iter().take(several) {
                    let options = MemoryOptions {
                        gradient_checkpointing: (*policy).into(),
                        microbatch_size,
                        logprob_chunk_rows: chunk,
                        entropy,
                        averages: entropy,
                        ..MemoryOptions::of(&model)
                    };
                    let plan = model
                        .memory_plan(&BatchShape::from(&batch), &options)
                        .unwrap();
                    let what = format!(
                        "{name} {precision:?} {policy:?} {microbatch_size} at once, entropy {entropy}, ragged {}",
                        batch.sequences()[0].len() != 80,
                    );
                    let bytes = measured(&mut model, &batch, &options);
                    wrong.extend(off(beside(&plan), bytes, &what));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What an update allocates whose microbatches have the losses of `loss`.
fn measured_by(
    parameters: Vec<(String, Tensor)>,
    batch: &SequenceBatch,
    options: &MemoryOptions,
    loss: impl Fn(&SequenceBatch) -> Tensor,
) -> u64 {
    let config = UpdateConfig::default().for_precision(options.precision);
    let mut updater = Updater::new(parameters, &config).unwrap();
    let parts = batch.split(options.microbatch_size).unwrap();
    let (stats, memory) = measure_memory(|| {
        updater.update::<rlhf_scale::Error>(parts.len(), |i| Ok(loss(&parts[i]) / 1000.0))
    })
    .unwrap();
    stats.unwrap();
    memory.peak
}

/// SFT, a critic, a reward model, and adapters.
#[test]
fn other_losses_and_adapters_are_as_predicted() {
    let mut wrong = Vec::new();
    for (name, config) in configs() {
        for precision in [Precision::F32, Precision::Bf16] {
            let model = || {
                let model = CausalLm::new(config.clone(), 1, Device::Cpu, precision.kind());
                model.unwrap()
            };
            let ways = [
                (CheckpointPolicy::None, 8, 0),
                (CheckpointPolicy::EveryBlock, 2, 1),
            ];
            for (policy, microbatch_size, ragged) in ways {
                let batch = &batches()[ragged];
                let with = |options: MemoryOptions| MemoryOptions {
                    gradient_checkpointing: policy.into(),
                    microbatch_size,
                    ..options
                };
                let mut compare = |what: &str, options: &MemoryOptions, bytes: u64| {
                    let plan = config
                        .memory_plan(&BatchShape::from(batch), options)
                        .unwrap();
                    let what = format!("{what} of {name} {precision:?} {policy:?}");
                    wrong.extend(off(beside(&plan), bytes, &what));
                };

                let mut tuned = model();
                tuned.set_gradient_checkpointing(policy.into()).unwrap();
                let nll = |part: &SequenceBatch| tuned.weighted_nll(part, None).unwrap();
                let options = with(MemoryOptions {
                    head: MemoryHead::Likelihood,
                    ..MemoryOptions::of(&tuned)
                });
                let bytes = measured_by(tuned.named_parameters(), batch, &options, nll);
                compare("likelihood", &options, bytes);

                let critic = ValueHeadModel::from_causal_lm(&tuned, 1).unwrap();
                let options = with(MemoryOptions::of_value_model(&critic));
                let values =
                    |part: &SequenceBatch| critic.values(part).unwrap().square().sum(Kind::Float);
                let bytes = measured_by(critic.named_parameters(), batch, &options, values);
                compare("values", &options, bytes);

                let judge = SequenceClassifier::from_causal_lm(&tuned, 2, 1).unwrap();
                let options = with(MemoryOptions::of_classifier(&judge));
                let scores =
                    |part: &SequenceBatch| judge.logits(part).unwrap().square().sum(Kind::Float);
                let bytes = measured_by(judge.named_parameters(), batch, &options, scores);
                compare("labels", &options, bytes);

                let mut adapted = model();
                adapted.add_adapter(&LoraConfig::default(), 1).unwrap();
                adapted.set_gradient_checkpointing(policy.into()).unwrap();
                let options = with(MemoryOptions::of(&adapted));
                let logprobs = |part: &SequenceBatch| {
                    let scores = adapted.logprobs(part, &LogprobOptions::default());
                    scores.unwrap().logprobs.sum(Kind::Float)
                };
                let bytes = measured_by(adapted.named_parameters(), batch, &options, logprobs);
                compare("adapters", &options, bytes);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Every tensor that autograd keeps is in the table: what is predicted of it is right to a hundredth.
#[test]
fn what_is_kept_for_backward_is_as_predicted() {
    let mut wrong = Vec::new();
    for (name, config) in configs() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut model =
                CausalLm::new(config.clone(), 1, Device::Cpu, precision.kind()).unwrap();
            for (policy, batch) in POLICIES.iter().flat_map(|p| batches().map(|b| (p, b))) {
                model.set_gradient_checkpointing((*policy).into()).unwrap();
                let options = MemoryOptions::of(&model);
                let plan = model
                    .memory_plan(&BatchShape::from(&batch), &options)
                    .unwrap();
                let (loss, memory) = measure_memory(|| {
                    let scores = model.logprobs(&batch, &LogprobOptions::default()).unwrap();
                    scores.logprobs.sum(Kind::Float)
                })
                .unwrap();
                drop(loss);
                // Beside activations there are ids, masks and states of random generators.
                let (predicted, kept) = (plan.activations as f64, memory.kept as f64);
                println!(
                    "{name} {precision:?} {policy:?}: kept {predicted} / {kept} = {:.4}",
                    predicted / kept
                );
                if predicted < 0.98 * kept - 100.0 * 1024.0 || predicted > 1.02 * kept {
                    wrong.push(format!(
                        "{name} {precision:?} {policy:?}: {predicted} of {kept}"
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn weights_are_counted_as_the_model_has_them() {
    for architecture in [
        "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2",
    ] {
        let dir = model_dir(architecture);
        let model = CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap();
        let options = MemoryOptions {
            trainable: None,
            averages: true,
            ..MemoryOptions::of(&model)
        };
        let plan = model
            .memory_plan(&BatchShape::uniform(1, 2, 2), &options)
            .unwrap();
        let sizes = model
            .named_parameters()
            .into_iter()
            .map(|(_, p)| p.numel() as u64);
        let weights: u64 = sizes.sum();
        assert_eq!(plan.weights, 4 * weights, "{architecture}");
        let config = UpdateConfig {
            ema: Some(EmaConfig::default()),
            ..UpdateConfig::default()
        };
        let ((), memory) = measure_memory(|| {
            let updater = Updater::new(model.named_parameters(), &config).unwrap();
            std::mem::forget(updater);
        })
        .unwrap();
        // A step count for each weight beside.
        let predicted = plan.optimizer + plan.averages;
        let counts = 4 * model.named_parameters().len() as u64;
        assert_eq!(memory.kept, predicted + counts, "{architecture}");
    }
}

#[test]
fn generation_holds_its_keys_and_values() {
    for (name, config) in configs() {
        let model = CausalLm::new(config, 1, Device::Cpu, Kind::Float).unwrap();
        let options = MemoryOptions {
            generation: Some(GenerationShape {
                rows: 6,
                prompt: 20,
                max_new_tokens: 30,
            }),
            ..MemoryOptions::of(&model)
        };
        let plan = model
            .memory_plan(&BatchShape::uniform(1, 1, 1), &options)
            .unwrap();
        // Prompts of their own: a shared one is computed once.
        let prompts: Vec<std::sync::Arc<[i64]>> = (0..6).map(|_| vec![1; 20].into()).collect();
        let (decoder, memory) = measure_memory(|| {
            let mut decoder = model.decoder(30).unwrap();
            let _ = decoder.prefill(&prompts).unwrap();
            for _ in 0..29 {
                let _ = decoder.step(&[3; 6]).unwrap();
            }
            decoder
        })
        .unwrap();
        drop(decoder);
        assert_eq!(memory.kept, plan.kv_cache);
        let wrong = off(plan.generation - plan.resident(), memory.peak, name);
        assert_eq!(wrong, None);
    }
}

#[test]
fn what_cannot_fit_is_refused_with_what_would() {
    let mut model = CausalLm::new(llama(), 1, Device::Cpu, Kind::Float).unwrap();
    let batch = &batches()[0];
    let shape = BatchShape::from(batch);
    let options = MemoryOptions::of(&model);
    let plan = model.memory_plan(&shape, &options).unwrap();
    assert_eq!(
        model.check_memory(&shape, &options, plan.peak()).unwrap(),
        plan
    );

    let budget = plan.peak() - 1;
    let Error::OverBudget { source, changes } =
        model.check_memory(&shape, &options, budget).unwrap_err()
    else {
        panic!("another error")
    };
    assert!(matches!(*source, rlhf_scale::Error::OverBudget { budget: b, .. } if b == budget));
    // The cheapest comes first: as before but for a smaller chunk, or else a smaller microbatch.
    let cheapest = &changes[0].options;
    assert_eq!(
        cheapest.gradient_checkpointing,
        options.gradient_checkpointing
    );
    let passes = |policy| match policy {
        CheckpointPolicy::None => 0,
        CheckpointPolicy::SquareRoot => 2,
        _ => 1,
    };
    let costs: Vec<_> = changes
        .iter()
        .map(|c| passes(c.options.gradient_checkpointing.policy))
        .collect();
    assert_eq!(costs, [0, 1, 2]);
    for change in &changes {
        assert!(change.plan.peak() <= budget);
        // It is no promise on paper: the step really stays below.
        let bytes = measured(&mut model, batch, &change.options) + change.plan.resident();
        assert!(
            bytes as f64 <= budget as f64 * (1.0 + TOLERANCE),
            "{change}: {bytes}"
        );
    }

    let nothing = model.check_memory(&shape, &options, 1000).unwrap_err();
    assert!(matches!(&nothing, Error::OverBudget { changes, .. } if changes.is_empty()));
    assert!(
        nothing.to_string().contains("no smaller microbatch"),
        "{nothing}"
    );
}

#[test]
fn impossible_options_are_named() {
    let config = configs().swap_remove(0).1;
    let shape = BatchShape::uniform(2, 3, 3);
    let refused = |shape: &BatchShape, options: MemoryOptions| {
        config.memory_plan(shape, &options).unwrap_err().to_string()
    };
    let default = MemoryOptions::default();
    let none = MemoryOptions {
        microbatch_size: 0,
        ..default
    };
    assert!(refused(&shape, none).starts_with("microbatch_size = 0"));
    let none = MemoryOptions {
        logprob_chunk_rows: Some(0),
        ..default
    };
    assert!(refused(&shape, none).starts_with("logprob_chunk_rows = 0"));
    let none = MemoryOptions {
        gradient_checkpointing: CheckpointPolicy::EveryKth(0).into(),
        ..default
    };
    assert!(refused(&shape, none).contains("every_kth = 0"));
    assert!(matches!(
        config.memory_plan(&BatchShape::uniform(2, 100, 29), &default),
        Err(Error::Core(CoreError::TooLong {
            row: 0,
            length: 129,
            ..
        }))
    ));
    assert!(matches!(
        config.memory_plan(
            &BatchShape {
                lengths: Vec::new()
            },
            &default
        ),
        Err(Error::Core(CoreError::Empty { .. }))
    ));
}
