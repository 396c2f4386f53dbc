//! Time and memory of gradient checkpointing and of chunked log-probs, side by side with what they
//! replace.
//!
//! `cargo bench --bench scaling -- checkpointing --python PYTHON` runs the same stack of transformer
//! blocks here and, by turns, under `torch.utils.checkpoint` in a Python that has torch.
//! `cargo bench --bench scaling -- logprobs` compares `linear_logprobs` and `linear_token_loss` with
//! the plain computation, and `-- depth` shows how activations grow with the number of blocks under
//! each policy. `-- bf16 --model DIR --pairs FILE` trains a model in f32 and in bf16. Every figure
//! is taken in a process of its own, by turns; tables show medians and the least and the greatest.

#![allow(clippy::print_stdout)]

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use rlhf::core::LogprobOptions;
use rlhf::core::tch::{self, Device, Kind, Tensor};
use rlhf::scale::{
    CheckpointPolicy, GradientCheckpointing, LinearLogprobs, LinearLogprobsInput, Precision,
    clear_grads, linear_logprobs, linear_token_loss,
};
use serde::{Deserialize, Serialize};

#[path = "scaling/training.rs"]
mod training;

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

/// A stack of blocks and its input.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Stack {
    blocks: i64,
    width: i64,
    heads: i64,
    rows: i64,
    length: i64,
}

#[derive(Serialize, Deserialize)]
struct Work {
    stack: Option<Stack>,
    training: Option<Training>,
    /// Of the stack: `none`, `every_block`, ...; of the log-probs: `plain`, `chunked`, `token_loss`, ...
    how: String,
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
        println!("{}", measure(&work)?);
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
        ]);
    }
    println!("8 blocks of width 512, 4 x 256 tokens, f32, forward and backward\n");
    compare(options, Some(stack), &contestants)
}

fn logprobs(options: &Options) -> Result<()> {
    println!("1,024 tokens, hidden size 768, vocabulary 50,000; forward and backward of a loss");
    println!(
        "Peak memory beyond hidden states and weight, and of it what is beyond the gradients of"
    );
    println!("both, which every contestant must return\n");
    let contestants = [
        "plain",
        "chunked",
        "token_loss",
        "plain_entropy",
        "chunked_entropy",
        "token_loss_entropy",
        "plain_bf16",
        "chunked_bf16",
        "token_loss_bf16",
    ];
    compare(options, None, &contestants.map(|how| ("ours", how)))
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
                memory: false,
                threads: options.threads,
                steps,
            };
            let outcome: Outcome = serde_json::from_str(&spawn(options, "ours", &work)?)?;
            outcomes[i].push(outcome);
        }
    }
    println!("| | loss before | loss after | seconds a step |\n|---|---|---|---|");
    for (name, outcomes) in ["f32", "bf16"].iter().zip(&outcomes) {
        let seconds: Vec<f64> = outcomes.iter().map(|o| o.step_seconds).collect();
        let (before, after) = (outcomes[0].loss_before, outcomes[0].loss);
        println!(
            "| {name} | {before:.4} | {after:.4} | {} |",
            spread(&seconds)
        );
    }
    let rounds = || outcomes[0].iter().zip(&outcomes[1]);
    let speedups: Vec<f64> = rounds()
        .map(|(f32, bf16)| f32.step_seconds / bf16.step_seconds)
        .collect();
    let (wide, narrow) = (outcomes[0][0].loss, outcomes[1][0].loss);
    println!("\nbf16 is {} times as fast", spread(&speedups));
    println!("its loss differs by {:+.2}%", (narrow / wide - 1.0) * 100.0);
    Ok(())
}

fn compare(options: &Options, stack: Option<Stack>, contestants: &[(&str, &str)]) -> Result<()> {
    let mut seconds = vec![Vec::new(); contestants.len()];
    let mut bytes = vec![Vec::new(); contestants.len()];
    for _ in 0..options.rounds {
        for (i, (who, how)) in contestants.iter().enumerate() {
            seconds[i].push(figure(options, who, how, stack, false)?);
            bytes[i].push(figure(options, who, how, stack, true)?);
        }
    }
    match stack {
        Some(_) => println!("| | seconds a step | peak MiB beyond weights and gradients |"),
        None => println!("| | seconds a step | peak MiB | beyond gradients |"),
    }
    println!(
        "{}",
        if stack.is_some() {
            "|---|---|---|"
        } else {
            "|---|---|---|---|"
        }
    );
    for (i, (who, how)) in contestants.iter().enumerate() {
        let mib: Vec<f64> = bytes[i].iter().map(|b| b / (1 << 20) as f64).collect();
        let extra: Vec<f64> = mib.iter().map(|m| m - gradient_mib(how)).collect();
        let (seconds, mib) = (spread(&seconds[i]), spread(&mib));
        match stack {
            Some(_) => println!("| {who} {how} | {seconds} | {mib} |"),
            None => println!("| {how} | {seconds} | {mib} | {} |", spread(&extra)),
        }
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
            let bytes = figure(options, "ours", how, Some(stack), true)?;
            Ok(format!("{:.0}", bytes / (1 << 20) as f64))
        };
        let (none, every) = (cell("none")?, cell("every_block")?);
        println!("| {blocks} | {none} | {every} | {} |", cell("square_root")?);
    }
    Ok(())
}

/// One figure from a fresh process.
fn figure(
    options: &Options,
    who: &str,
    how: &str,
    stack: Option<Stack>,
    memory: bool,
) -> Result<f64> {
    let work = Work {
        stack,
        training: None,
        how: how.into(),
        memory,
        threads: options.threads,
        steps: 3,
    };
    Ok(spawn(options, who, &work)?.trim().parse()?)
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
            command.args([script, &text]);
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

/// Seconds of a step, or the bytes that it needs beyond what was there before.
fn measure(work: &Work) -> Result<f64> {
    tch::manual_seed(1);
    let mut step: Box<dyn FnMut() -> Result<()>> = match work.stack {
        Some(stack) => stack_step(stack, policy(&work.how)?),
        None => logprobs_step(&work.how),
    };
    step()?;
    if work.memory {
        let before = status_bytes("VmRSS:")?;
        std::fs::write("/proc/self/clear_refs", "5")?;
        step()?;
        return Ok(status_bytes("VmHWM:")? - before);
    }
    let mut seconds = Vec::new();
    for _ in 0..work.steps {
        let start = Instant::now();
        step()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(median(&seconds))
}

fn policy(how: &str) -> Result<GradientCheckpointing> {
    let policy: CheckpointPolicy = serde_json::from_value(how.into())?;
    Ok(policy.into())
}

/// Forward and backward through the stack; gradients add up, so none is allocated after the first.
fn stack_step(
    stack: Stack,
    checkpointing: GradientCheckpointing,
) -> Box<dyn FnMut() -> Result<()>> {
    let options = (Kind::Float, Device::Cpu);
    let (d, heads) = (stack.width, stack.heads);
    let parameter = |shape: &[i64]| (Tensor::randn(shape, options) * 0.02).set_requires_grad(true);
    let vector = |value: f64| Tensor::full([d], value, options).set_requires_grad(true);
    let weights: Vec<Vec<Tensor>> = (0..stack.blocks)
        .map(|_| {
            vec![
                vector(1.0),
                vector(0.0),
                parameter(&[3 * d, d]),
                parameter(&[d, d]),
                vector(1.0),
                vector(0.0),
                parameter(&[4 * d, d]),
                parameter(&[d, 4 * d]),
            ]
        })
        .collect();
    let input = Tensor::randn([stack.rows, stack.length, d], options);
    Box::new(move || {
        let blocks = weights.iter().map(|block| {
            let w: Vec<Tensor> = block.iter().map(Tensor::shallow_clone).collect();
            move |x: &Tensor| -> rlhf::scale::Result<Tensor> {
                let (b, t) = (x.size()[0], x.size()[1]);
                let qkv = x.layer_norm([d], Some(&w[0]), Some(&w[1]), 1e-5, true);
                let qkv = qkv.f_linear(&w[2], None::<&Tensor>)?;
                let qkv = qkv
                    .view([b, t, 3, heads, d / heads])
                    .permute([2, 0, 3, 1, 4]);
                let qkv = qkv.unbind(0);
                let attended = Tensor::f_scaled_dot_product_attention(
                    &qkv[0],
                    &qkv[1],
                    &qkv[2],
                    None::<&Tensor>,
                    0.0,
                    true,
                    None,
                    false,
                )?;
                let attended = attended.transpose(1, 2).reshape([b, t, d]);
                let x = x.f_add(&attended.f_linear(&w[3], None::<&Tensor>)?)?;
                let inner = x.layer_norm([d], Some(&w[4]), Some(&w[5]), 1e-5, true);
                let inner = inner.f_linear(&w[6], None::<&Tensor>)?.f_gelu("none")?;
                Ok(x.f_add(&inner.f_linear(&w[7], None::<&Tensor>)?)?)
            }
        });
        let output = checkpointing.run(blocks.collect(), &input)?;
        // In a statement of its own, so that the squares are not held during backward, as they are
        // not in Python.
        let loss = output.square().mean(Kind::Float);
        loss.f_backward()?;
        Ok(())
    })
}

/// Tokens, hidden size, vocabulary.
const OUTPUT_LAYER: [i64; 3] = [1024, 768, 50_000];

fn output_kind(how: &str) -> Kind {
    match how.ends_with("bf16") {
        true => Kind::BFloat16,
        false => Kind::Float,
    }
}

/// What the gradients of hidden states and weight take.
fn gradient_mib(how: &str) -> f64 {
    let [tokens, hidden, vocab] = OUTPUT_LAYER;
    let bytes = ((tokens + vocab) * hidden) as usize * output_kind(how).elt_size_in_bytes();
    bytes as f64 / (1 << 20) as f64
}

fn logprobs_step(how: &str) -> Box<dyn FnMut() -> Result<()>> {
    let [tokens, size, vocab] = OUTPUT_LAYER;
    let kind = output_kind(how);
    let normal = |shape: [i64; 2], scale: f64| {
        let values = Tensor::randn(shape, (Kind::Float, Device::Cpu)) * scale;
        values.to_kind(kind).set_requires_grad(true)
    };
    let (hidden, weight) = (normal([tokens, size], 1.0), normal([vocab, size], 0.05));
    let ids = Tensor::randint(vocab, [tokens], (Kind::Int64, Device::Cpu));
    let how = how.to_string();
    Box::new(move || {
        let options = LogprobOptions {
            temperature: 1.0,
            entropy: how.ends_with("entropy"),
        };
        let input = LinearLogprobsInput {
            hidden: &hidden,
            weight: &weight,
            bias: None,
            ids: &ids,
            softcap: None,
        };
        let loss = if how.starts_with("token_loss") {
            linear_token_loss(input, &options, None, |scores, _| token_loss(scores))?.loss
        } else if how.starts_with("chunked") {
            token_loss(&linear_logprobs(input, &options, None)?)?
        } else {
            token_loss(&plain_logprobs(input, options.entropy)?)?
        };
        loss.f_backward()?;
        clear_grads(&[hidden.shallow_clone(), weight.shallow_clone()])?;
        Ok(())
    })
}

/// A function of each token, so that the gradients differ.
fn token_loss(scores: &LinearLogprobs) -> rlhf::scale::Result<Tensor> {
    let loss = scores.logprobs.f_tanh()?.f_sum(Kind::Float)?;
    Ok(match &scores.entropy {
        Some(entropy) => loss.f_add(&entropy.f_sum(Kind::Float)?.f_mul_scalar(0.01)?)?,
        None => loss,
    })
}

fn plain_logprobs(input: LinearLogprobsInput<'_>, entropy: bool) -> Result<LinearLogprobs> {
    let logits = input.hidden.f_linear(input.weight, None::<&Tensor>)?;
    let all = logits.f_log_softmax(-1, Kind::Float)?;
    drop(logits);
    let entropy = match entropy {
        true => Some(
            all.f_exp()?
                .f_mul(&all)?
                .f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?
                .f_neg()?,
        ),
        false => None,
    };
    Ok(LinearLogprobs {
        logprobs: all
            .f_gather(1, &input.ids.f_unsqueeze(1)?, false)?
            .f_squeeze_dim(1)?,
        entropy,
    })
}

fn status_bytes(field: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.ok_or("no such field")?.parse::<f64>()? * 1024.0)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let digits = if greatest < 20.0 { 2 } else { 0 };
    let median = median(values);
    format!("{median:.digits$} ({least:.digits$} to {greatest:.digits$})")
}
