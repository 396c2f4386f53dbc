//! Time and memory of gradient checkpointing and of chunked log-probs, side by side with what they
//! replace.
//!
//! `cargo bench --bench scaling -- checkpointing --python PYTHON` runs the same stack of transformer
//! blocks here and, by turns, under `torch.utils.checkpoint` in a Python that has torch.
//! `cargo bench --bench scaling -- logprobs` compares `linear_logprobs` and `linear_token_loss` with
//! the plain computation, and `-- depth` shows how activations grow with the number of blocks under
//! each policy. `-- bf16 --model DIR --pairs FILE` trains a model in f32 and in bf16. Every figure
//! is taken in a process of its own, by turns; tables show medians and the least and the greatest.
//! Beside the time on the clock stands the processor's; with `--threads 1` that is what a step costs on
//! a machine that has other work, too.

#![allow(clippy::print_stdout)]

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use rlhf::core::tch;
use rlhf::scale::Precision;
use serde::{Deserialize, Serialize};

#[path = "scaling/head.rs"]
mod head;
#[path = "scaling/process.rs"]
mod process;
#[path = "scaling/stack.rs"]
mod stack;
#[path = "scaling/training.rs"]
mod training;

use head::{OUTPUT_LAYER, gradient_mib, logprobs_step};
use process::{cpu_seconds, status_bytes};
use stack::{Stack, policy, stack_step};
use training::{Outcome, Training};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[derive(Parser)]
struct Options {
    task: Task,
    /// A Python with torch, for `checkpointing`.
    #[arg(long)]
    python: Option<PathBuf>,
    /// The folder of a model, for `bf16`.
    #[arg(long)]
    model: Option<PathBuf>,
    /// JSONL of `{"prompt": [ids], "chosen": [ids]}`, for `bf16`.
    #[arg(long)]
    pairs: Option<PathBuf>,
    /// Updates of each training, for `bf16`.
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Sequences of an update, for `bf16`.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Contestants, for `checkpointing` and `logprobs`; all by default.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Tokens that are scored, for `logprobs`.
    #[arg(long, default_value_t = OUTPUT_LAYER[0])]
    tokens: i64,
    /// Processes of each kind.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Threads of libtorch.
    #[arg(long, default_value_t = 2)]
    threads: i32,
    /// What this process measures; set by the one that compares.
    #[arg(long, hide = true)]
    worker: Option<String>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Task {
    Checkpointing,
    Logprobs,
    Depth,
    Bf16,
}

#[derive(Serialize, Deserialize)]
struct Work {
    stack: Option<Stack>,
    training: Option<Training>,
    /// Of the stack: `none`, `every_block`, ...; of the log-probs: `plain`, `chunked`, `token_loss`, ...
    how: String,
    /// Tokens that are scored.
    tokens: i64,
    /// Bytes instead of seconds.
    memory: bool,
    threads: i32,
    steps: usize,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(work) = &options.worker {
        let work: Work = serde_json::from_str(work)?;
        tch::set_num_threads(work.threads);
        if let Some(training) = &work.training {
            println!("{}", serde_json::to_string(&training.run()?)?);
            return Ok(());
        }
        println!("{}", serde_json::to_string(&measure(&work)?)?);
        return Ok(());
    }
    match options.task {
        Task::Checkpointing => checkpointing(&options),
        Task::Logprobs => logprobs(&options),
        Task::Depth => depth(&options),
        Task::Bf16 => bf16(&options),
    }
}

fn checkpointing(options: &Options) -> Result<()> {
    let stack = Stack {
        blocks: 8,
        width: 512,
        heads: 8,
        rows: 4,
        length: 256,
    };
    let mut contestants = vec![
        ("ours", "none"),
        ("ours", "every_block"),
        ("ours", "square_root"),
    ];
    if options.python.is_some() {
        contestants.extend([
            ("torch", "none"),
            ("torch", "non_reentrant"),
            ("torch", "reentrant"),
            ("torch", "square_root"),
        ]);
    }
    println!("8 blocks of width 512, 4 x 256 tokens, f32, forward and backward\n");
    compare(options, Some(stack), &contestants)
}

fn logprobs(options: &Options) -> Result<()> {
    println!(
        "{} tokens, hidden size 768, vocabulary 50,000; forward and backward of a loss",
        options.tokens
    );
    println!(
        "Peak memory beyond hidden states and weight, and of it what is beyond the gradients of"
    );
    println!("both, which every contestant must return\n");
    let mut contestants = vec![
        "plain",
        "chunked",
        "token_loss",
        "plain_entropy",
        "chunked_entropy",
        "token_loss_entropy",
    ];
    if multiplies_bf16() || !options.only.is_empty() {
        contestants.extend(["plain_bf16", "chunked_bf16", "token_loss_bf16"]);
    } else {
        println!(
            "bf16 is left out: without instructions for it libtorch takes minutes a step here"
        );
        println!("(--only plain_bf16,chunked_bf16,token_loss_bf16 measures it all the same)\n");
    }
    let contestants: Vec<_> = contestants.into_iter().map(|how| ("ours", how)).collect();
    compare(options, None, &contestants)
}

/// Whether the processor has instructions for products of bf16.
fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    true
}

fn bf16(options: &Options) -> Result<()> {
    let (Some(model), Some(pairs)) = (&options.model, &options.pairs) else {
        return Err("bf16 needs --model DIR and --pairs FILE".into());
    };
    let (steps, batch) = (options.steps, options.batch);
    println!("SFT, {steps} steps of {batch} sequences; loss of 64 held-out responses\n");
    let mut outcomes = [Vec::new(), Vec::new()];
    for _ in 0..options.rounds {
        for (i, precision) in [Precision::F32, Precision::Bf16].into_iter().enumerate() {
            let training = Training {
                precision,
                model: std::path::absolute(model)?,
                pairs: std::path::absolute(pairs)?,
                steps,
                batch,
            };
            let work = Work {
                stack: None,
                training: Some(training),
                how: String::new(),
                tokens: 0,
                memory: false,
                threads: options.threads,
                steps,
            };
            let outcome: Outcome = serde_json::from_str(&spawn(options, "ours", &work)?)?;
            outcomes[i].push(outcome);
        }
    }
    println!("| | loss before | loss after | seconds a step | of the processor |");
    println!("|---|---|---|---|---|");
    for (name, outcomes) in ["f32", "bf16"].iter().zip(&outcomes) {
        let column = |of: fn(&Outcome) -> f64| spread(&outcomes.iter().map(of).collect::<Vec<_>>());
        let (before, after) = (outcomes[0].loss_before, outcomes[0].loss);
        println!(
            "| {name} | {before:.4} | {after:.4} | {} | {} |",
            column(|o| o.step_seconds),
            column(|o| o.cpu_seconds)
        );
    }
    let rounds = || outcomes[0].iter().zip(&outcomes[1]);
    let speedups = |of: fn(&Outcome) -> f64| -> Vec<f64> {
        rounds().map(|(f32, bf16)| of(f32) / of(bf16)).collect()
    };
    let (wide, narrow) = (outcomes[0][0].loss, outcomes[1][0].loss);
    println!(
        "\nbf16 is {} times as fast, by the processor's time {}",
        spread(&speedups(|o| o.step_seconds)),
        spread(&speedups(|o| o.cpu_seconds))
    );
    println!("its loss differs by {:+.2}%", (narrow / wide - 1.0) * 100.0);
    Ok(())
}

fn compare(options: &Options, stack: Option<Stack>, contestants: &[(&str, &str)]) -> Result<()> {
    let is_wanted = |how: &str| options.only.is_empty() || options.only.iter().any(|o| o == how);
    let contestants: Vec<(&str, &str)> = contestants
        .iter()
        .copied()
        .filter(|(_, how)| is_wanted(how))
        .collect();
    let mut peaks = Vec::new();
    for (who, how) in &contestants {
        let [bytes, _] = figure(options, who, how, stack, true)?;
        peaks.push(bytes / (1 << 20) as f64);
    }
    let mut times = vec![Vec::new(); contestants.len()];
    for _ in 0..options.rounds {
        for ((who, how), times) in contestants.iter().zip(&mut times) {
            times.push(figure(options, who, how, stack, false)?);
        }
    }
    let columns = [
        "",
        "seconds a step",
        "of the first's, round by round",
        "of the processor",
        "peak MiB",
    ];
    match stack {
        Some(_) => println!("| {} beyond weights and gradients |", columns.join(" | ")),
        None => println!("| {} | beyond gradients |", columns.join(" | ")),
    }
    println!("|{}", "---|".repeat(if stack.is_some() { 5 } else { 6 }));
    for (i, (who, how)) in contestants.iter().enumerate() {
        let column = |of: usize| times[i].iter().map(|t| t[of]).collect::<Vec<f64>>();
        let ratios = times[i]
            .iter()
            .zip(&times[0])
            .map(|(t, first)| t[0] / first[0]);
        let ratios: Vec<f64> = ratios.collect();
        let mut row = [column(0), ratios, column(1), vec![peaks[i]]]
            .map(|figures| spread(&figures))
            .to_vec();
        if stack.is_none() {
            row.push(spread(&[peaks[i] - gradient_mib(how, options.tokens)]));
        }
        println!("| {who} {how} | {} |", row.join(" | "));
    }
    Ok(())
}

fn depth(options: &Options) -> Result<()> {
    println!("peak MiB beyond weights and gradients; width 128, 8 x 256 tokens, f32\n");
    println!("| blocks | none | every_block | square_root |\n|---|---|---|---|");
    for blocks in [4, 16, 64] {
        let stack = Stack {
            blocks,
            width: 128,
            heads: 4,
            rows: 8,
            length: 256,
        };
        let cell = |how: &str| -> Result<String> {
            let [bytes, _] = figure(options, "ours", how, Some(stack), true)?;
            Ok(format!("{:.0}", bytes / (1 << 20) as f64))
        };
        let (none, every) = (cell("none")?, cell("every_block")?);
        println!("| {blocks} | {none} | {every} | {} |", cell("square_root")?);
    }
    Ok(())
}

/// Seconds of a step, those of the processor, or bytes, from a fresh process.
fn figure(
    options: &Options,
    who: &str,
    how: &str,
    stack: Option<Stack>,
    memory: bool,
) -> Result<[f64; 2]> {
    let work = Work {
        stack,
        training: None,
        how: how.into(),
        tokens: options.tokens,
        memory,
        threads: options.threads,
        steps: 3,
    };
    Ok(serde_json::from_str(&spawn(options, who, &work)?)?)
}

/// What a fresh process prints.
fn spawn(options: &Options, who: &str, work: &Work) -> Result<String> {
    let text = serde_json::to_string(work)?;
    let mut command = match (who, &options.python) {
        ("torch", Some(python)) => {
            let script = concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/benches/peers/checkpointing.py"
            );
            let mut command = Command::new(python);
            // Its torch has libraries of its own.
            command.args([script, &text]).env_remove("LD_LIBRARY_PATH");
            command
        }
        _ => {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["logprobs", "--worker", &text]);
            command
        }
    };
    command.env("OMP_NUM_THREADS", options.threads.to_string());
    if work.memory {
        // Freed tensors go back to the system at once, so that resident memory is what is in use.
        command.env("MALLOC_MMAP_THRESHOLD_", "65536");
    }
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{who} {}: {text}{error}", work.how).into());
    }
    Ok(text)
}

/// Seconds of a step and of the processor, or the bytes that it needs beyond what was there before.
fn measure(work: &Work) -> Result<[f64; 2]> {
    tch::manual_seed(1);
    let mut step: Box<dyn FnMut() -> Result<()>> = match work.stack {
        Some(stack) => stack_step(stack, policy(&work.how)?),
        None => logprobs_step(&work.how, work.tokens),
    };
    step()?;
    if work.memory {
        let before = status_bytes("VmRSS:")?;
        std::fs::write("/proc/self/clear_refs", "5")?;
        step()?;
        return Ok([status_bytes("VmHWM:")? - before, 0.0]);
    }
    let (mut seconds, before) = (Vec::new(), cpu_seconds()?);
    for _ in 0..work.steps {
        let start = Instant::now();
        step()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let cpu = (cpu_seconds()? - before) / work.steps as f64;
    Ok([median(&seconds), cpu])
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let digits = if greatest < 20.0 { 2 } else { 1 };
    let median = median(values);
    format!("{median:.digits$} ({least:.digits$} to {greatest:.digits$})")
}
