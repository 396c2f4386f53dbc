//! The memory plan against the memory that a process really takes.
//!
//! `cargo bench --bench memory_plan` trains small GPT-2s and Llamas for two updates, each case in a
//! process of its own, and prints the predicted peak, the growth of the process's peak resident
//! memory (`VmHWM`, Linux), and their ratio. `-- --models gpt2 --precisions f32` and so on choose.

#![allow(clippy::print_stdout)]

use std::process::Command;

use clap::Parser;
use rlhf::core::tch::{self, Device, Kind, Tensor};
use rlhf::core::{LogprobOptions, Parameters, Policy, Sequence, SequenceBatch};
use rlhf::models::{
    BatchShape, CausalLm, CheckpointPolicy, Gpt2Config, LlamaConfig, MemoryOptions, ModelConfig,
    TransformerConfig,
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

#[derive(Serialize, Deserialize)]
struct Case {
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
        "| model | precision | checkpointing | batch | at once | predicted MiB | measured MiB | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut worst: f64 = 1.0;
    for model in &options.models {
        for precision in &options.precisions {
            for policy in &options.policies {
                for (ragged, microbatch_size) in [(false, 8), (true, 8), (true, 2)] {
                    let case = Case {
                        model: model.clone(),
                        precision: serde_json::from_value(precision.as_str().into())?,
                        policy: serde_json::from_value(policy.as_str().into())?,
                        ragged,
                        microbatch_size,
                        threads: options.threads,
                    };
                    let (predicted, measured) = spawn(&case)?;
                    let ratio = predicted / measured;
                    worst = if (ratio - 1.0).abs() > (worst - 1.0).abs() {
                        ratio
                    } else {
                        worst
                    };
                    let batch = if ragged { "ragged" } else { "even" };
                    println!(
                        "| {model} | {precision} | {policy} | {batch} | {microbatch_size} | {:.0} | {:.0} | {ratio:.2} |",
                        predicted / MIB,
                        measured / MIB
                    );
                }
            }
        }
    }
    println!("\nthe worst ratio: {worst:.2}");
    Ok(())
}

const MIB: f64 = (1 << 20) as f64;

/// Predicted and measured bytes, from a fresh process.
fn spawn(case: &Case) -> Result<(f64, f64)> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--worker", &serde_json::to_string(case)?])
        .env("OMP_NUM_THREADS", case.threads.to_string())
        // Freed tensors go back to the system at once, so that resident memory is what is in use.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
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
    let options = MemoryOptions {
        microbatch_size: case.microbatch_size,
        ..MemoryOptions::of(&model)
    };
    let plan = model.memory_plan(&BatchShape::from(&batch), &options)?;
    let update = UpdateConfig::default().for_precision(case.precision);
    let mut updater = Updater::new(model.named_parameters(), &update)?;
    let parts = batch.split(case.microbatch_size)?;
    for _ in 0..updates {
        updater.update(parts.len(), |i| -> Result<Tensor> {
            let scores = model.logprobs(&parts[i], &LogprobOptions::default())?;
            Ok(scores.logprobs.sum(Kind::Float) / -1024.0)
        })?;
    }
    Ok(plan.peak())
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
