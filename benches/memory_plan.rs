//! The memory plan against the memory that a process really takes.
//!
//! `cargo bench --bench memory_plan` trains small GPT-2s and Llamas for two updates, each case in a
//! process of its own, and prints the predicted peak, the growth of the process's peak resident
//! memory (`VmHWM`, Linux), and their ratio. Memory that is freed goes back to the system there: what the
//! allocator of `reuse_memory` keeps besides is not in the plan. `-- --models gpt2 --precisions f32 --tasks values` and so
//! on choose.

#![allow(clippy::print_stdout)]

use std::process::Command;

use clap::{Parser, ValueEnum};
use rlhf::core::tch::{self, Device, Kind, Tensor};
use rlhf::core::{LogprobOptions, Parameters, Policy, Sequence, SequenceBatch, ValueModel};
use rlhf::models::{
    BatchShape, CausalLm, CheckpointPolicy, Gpt2Config, LlamaConfig, LoraConfig, MemoryHead,
    MemoryOptions, ModelConfig, SequenceClassifier, TransformerConfig, ValueHeadModel,
};
use rlhf::scale::{Precision, UpdateConfig, Updater};
use serde::{Deserialize, Serialize};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[derive(Parser)]
struct Options {
    /// Of gpt2, llama.
    #[arg(long, value_delimiter = ',', default_value = "gpt2,llama")]
    models: Vec<String>,
    /// Of f32, bf16, f16.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    precisions: Vec<String>,
    /// Of none, every_block, square_root.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "none,every_block,square_root"
    )]
    policies: Vec<String>,
    /// Of logprobs, likelihood, values, labels, adapters.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "logprobs,likelihood,values,labels,adapters"
    )]
    tasks: Vec<Task>,
    /// Threads of libtorch.
    #[arg(long, default_value_t = 1)]
    threads: i32,
    /// The case of this process; set by the one that prints.
    #[arg(long, hide = true)]
    worker: Option<String>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is trained.
#[derive(Clone, Copy, PartialEq, Debug, ValueEnum, Serialize, Deserialize)]
enum Task {
    /// A language model through its log-probabilities.
    Logprobs,
    /// As SFT does it.
    Likelihood,
    /// A critic.
    Values,
    /// A reward model.
    Labels,
    /// A language model's adapters.
    Adapters,
}

#[derive(Serialize, Deserialize)]
struct Case {
    task: Task,
    model: String,
    precision: Precision,
    policy: CheckpointPolicy,
    ragged: bool,
    microbatch_size: usize,
    threads: i32,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(case) = &options.worker {
        let (predicted, measured) = measure(&serde_json::from_str(case)?)?;
        println!("{predicted} {measured}");
        return Ok(());
    }
    println!("8 blocks of width 256, vocabulary 8,000, 8 sequences, two updates\n");
    println!(
        "| trained | model | precision | checkpointing | batch | at once | predicted MiB | measured MiB | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut worst: f64 = 1.0;
    for case in cases(&options)? {
        let (predicted, measured) = spawn(&case)?;
        let ratio = predicted / measured;
        worst = if (ratio - 1.0).abs() > (worst - 1.0).abs() {
            ratio
        } else {
            worst
        };
        let name = |value| -> Result<String> {
            let name: serde_json::Value = value;
            Ok(name.as_str().ok_or("not a name")?.to_lowercase())
        };
        println!(
            "| {} | {} | {} | {} | {} | {} | {:.0} | {:.0} | {ratio:.2} |",
            name(serde_json::to_value(case.task)?)?,
            case.model,
            name(serde_json::to_value(case.precision)?)?,
            name(serde_json::to_value(case.policy)?)?,
            if case.ragged { "ragged" } else { "even" },
            case.microbatch_size,
            predicted / MIB,
            measured / MIB
        );
    }
    println!("\nthe worst ratio: {worst:.2}");
    Ok(())
}

/// Every combination for log-probabilities; of the other tasks those without checkpoints.
fn cases(options: &Options) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (&task, model) in options
        .tasks
        .iter()
        .flat_map(|task| options.models.iter().map(move |model| (task, model)))
    {
        for (precision, policy) in options.precisions.iter().flat_map(|precision| {
            options
                .policies
                .iter()
                .map(move |policy| (precision, policy))
        }) {
            let policy: CheckpointPolicy = serde_json::from_value(policy.as_str().into())?;
            if task != Task::Logprobs && policy != CheckpointPolicy::None {
                continue;
            }
            for (ragged, microbatch_size) in [(false, 8), (true, 8), (true, 2)] {
                cases.push(Case {
                    task,
                    model: model.clone(),
                    precision: serde_json::from_value(precision.as_str().into())?,
                    policy,
                    ragged,
                    microbatch_size,
                    threads: options.threads,
                });
            }
        }
    }
    Ok(cases)
}

const MIB: f64 = (1 << 20) as f64;

/// Predicted and measured bytes, from a fresh process.
fn spawn(case: &Case) -> Result<(f64, f64)> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--worker", &serde_json::to_string(case)?])
        .env("OMP_NUM_THREADS", case.threads.to_string())
        // Freed tensors go back to the system at once, so that resident memory is what is in use.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .env("RLHF_CPU_ALLOCATOR", "system")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Option<Vec<f64>> = text.split_whitespace().map(|n| n.parse().ok()).collect();
    match numbers.as_deref() {
        Some(&[predicted, measured]) if output.status.success() => Ok((predicted, measured)),
        _ => Err(format!("{text}{}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

fn measure(case: &Case) -> Result<(u64, u64)> {
    tch::set_num_threads(case.threads);
    // What kernels load and allocate once is no part of a step.
    train(case, &config(&case.model, 64, 1, 100), 1, 8)?;
    let before = status_bytes("VmRSS:")?;
    std::fs::write("/proc/self/clear_refs", "5")?;
    let plan = train(case, &config(&case.model, 256, 8, 8000), 2, 256)?;
    Ok((plan, status_bytes("VmHWM:")? - before))
}

/// Trains a fresh model; returns the bytes that were predicted.
fn train(case: &Case, config: &ModelConfig, updates: u64, length: usize) -> Result<u64> {
    let mut model = CausalLm::new(config.clone(), 1, Device::Cpu, case.precision.kind())?;
    model.set_gradient_checkpointing(case.policy.into())?;
    let lengths = (0..8).map(|row| match case.ragged {
        true => length - length / 8 * (row * 3 % 7),
        false => length,
    });
    let sequence = |n: usize| Sequence::new(vec![1; n / 2], vec![2; n - n / 2]);
    let batch = SequenceBatch::new(lengths.map(sequence).collect())?;
    let sum = |values: Tensor| values.sum(Kind::Float);
    match case.task {
        Task::Logprobs | Task::Adapters => {
            if case.task == Task::Adapters {
                model.add_adapter(&LoraConfig::default(), 1)?;
            }
            let options = MemoryOptions::of(&model);
            let scores = |part: &SequenceBatch| model.logprobs(part, &LogprobOptions::default());
            let loss = |part: &SequenceBatch| -> Result<Tensor> { Ok(sum(scores(part)?.logprobs)) };
            update(
                case,
                config,
                (&batch, updates),
                model.named_parameters(),
                options,
                loss,
            )
        }
        Task::Likelihood => {
            let options = MemoryOptions {
                head: MemoryHead::Likelihood,
                ..MemoryOptions::of(&model)
            };
            let loss = |part: &SequenceBatch| Ok(model.weighted_nll(part, None)?);
            update(
                case,
                config,
                (&batch, updates),
                model.named_parameters(),
                options,
                loss,
            )
        }
        Task::Values => {
            let critic = ValueHeadModel::from_causal_lm(&model, 1)?;
            drop(model);
            let options = MemoryOptions::of_value_model(&critic);
            let loss = |part: &SequenceBatch| Ok(sum(critic.values(part)?.square()));
            update(
                case,
                config,
                (&batch, updates),
                critic.named_parameters(),
                options,
                loss,
            )
        }
        Task::Labels => {
            let judge = SequenceClassifier::from_causal_lm(&model, 1, 1)?;
            drop(model);
            let options = MemoryOptions::of_classifier(&judge);
            let loss = |part: &SequenceBatch| Ok(sum(judge.logits(part)?.square()));
            update(
                case,
                config,
                (&batch, updates),
                judge.named_parameters(),
                options,
                loss,
            )
        }
    }
}

fn update(
    case: &Case,
    config: &ModelConfig,
    (batch, updates): (&SequenceBatch, u64),
    parameters: Vec<(String, Tensor)>,
    options: MemoryOptions,
    loss: impl Fn(&SequenceBatch) -> Result<Tensor>,
) -> Result<u64> {
    let options = MemoryOptions {
        microbatch_size: case.microbatch_size,
        ..options
    };
    let plan = config.memory_plan(&BatchShape::from(batch), &options)?;
    let mut updater = Updater::new(
        parameters,
        &UpdateConfig::default().for_precision(case.precision),
    )?;
    let parts = batch.split(case.microbatch_size)?;
    for _ in 0..updates {
        updater.update(parts.len(), |i| -> Result<Tensor, Failed> {
            Ok(loss(&parts[i]).map_err(|error| Failed(error.to_string()))? / -1024.0)
        })?;
    }
    Ok(plan.peak())
}

/// An error of a model or of the update.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failed(String);

impl From<rlhf::scale::Error> for Failed {
    fn from(error: rlhf::scale::Error) -> Self {
        Self(error.to_string())
    }
}

fn config(model: &str, width: i64, layers: i64, vocab: i64) -> ModelConfig {
    match model {
        "gpt2" => ModelConfig::Gpt2(Gpt2Config {
            vocab_size: vocab,
            n_positions: 512,
            n_embd: width,
            n_layer: layers,
            n_head: 4,
            ..Gpt2Config::default()
        }),
        _ => ModelConfig::Llama(LlamaConfig {
            transformer: TransformerConfig {
                vocab_size: vocab,
                max_position_embeddings: 512,
                hidden_size: width,
                intermediate_size: 11 * width / 4,
                num_hidden_layers: layers,
                num_attention_heads: 4,
                num_key_value_heads: 2,
                head_dim: width / 4,
                ..TransformerConfig::default()
            },
            ..LlamaConfig::default()
        }),
    }
}

fn status_bytes(field: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.ok_or("no such field")?.parse::<u64>()? * 1024)
}
