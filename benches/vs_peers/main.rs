//! A task here and in the library that people do it with today, by turns on the same token ids.
//!
//! `cargo bench --bench vs_peers -- TASK --model DIR --python PYTHON` starts a process of ours and one of
//! the peer's, lets them do one step after the other until both have done `--steps`, and so for
//! `--rounds` pairs of processes; a busy machine slows both down alike. A step counts only if both
//! sides report the same tokens. `--make-python DIR` makes the peer's environment first.
//!
//! It prints a table and writes `target/vs_peers/TASK.json`. A new task is a file beside this one, a
//! line in [`Task`], and a branch in `benches/peers/vs_peers.py`.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

mod contest;
mod data;
mod dpo;
mod forward_backward;
mod generate;
mod grpo;
mod models;
mod ppo;
mod report;
mod reward;
mod roofline;
mod sft;
mod worker;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[derive(Parser)]
struct Options {
    task: Task,
    /// Folder of the model that both sides load, as on the Hugging Face hub.
    #[arg(long)]
    model: PathBuf,
    /// Kind that ours computes in; the peer trains f32 weights under bf16 autocast for the latter.
    #[arg(long, default_value = "float32")]
    dtype: Dtype,
    /// Prompts a step, comparisons where a task learns from those, and of `grpo` answers.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Items that ours computes at a time, its update being that of the whole batch; the batch if not
    /// given. Fewer take less memory.
    #[arg(long)]
    microbatch: Option<usize>,
    /// Steps of each process; the first is a warm-up and does not count.
    #[arg(long, default_value_t = 6)]
    steps: usize,
    /// Pairs of processes.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Threads of libtorch, on both sides.
    #[arg(long, default_value_t = 2)]
    threads: i32,
    /// A Python with torch, transformers and TRL.
    #[arg(long, default_value = "target/peers/bin/python")]
    python: PathBuf,
    /// Makes that Python in this folder first, unless it is there.
    #[arg(long, conflicts_with = "python")]
    make_python: Option<PathBuf>,
    /// Runs our side only.
    #[arg(long)]
    alone: bool,
    /// Where the summary goes; `target/vs_peers/TASK.json` if not given.
    #[arg(long)]
    output: Option<PathBuf>,
    /// What this process does; set by the one that compares.
    #[arg(long, hide = true)]
    worker: Option<String>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
enum Task {
    /// Log-probs of both answers to each prompt, and backward; the peer is transformers, padded.
    ForwardBackward,
    /// Sampled responses of 48 tokens; the peer is transformers' generate, in the same kind.
    Generate,
    /// The likeliest 48 tokens, which must be the same on both sides.
    Greedy,
    /// A step of supervised fine-tuning on the right answers; the peer is TRL's SFTTrainer.
    Sft,
    /// A step of DPO, the reference's forward pass included; the peer is TRL's DPOTrainer.
    Dpo,
    /// A step of DPO on pairs that the reference has scored before, on both sides.
    DpoCached,
    /// A step of reward training; the peer is TRL's RewardTrainer.
    Reward,
    /// A step of GRPO, sampling included: 4 answers of 48 tokens a prompt, `--batch` answers in all; the
    /// peer is TRL's GRPOTrainer.
    Grpo,
    /// A step of PPO, sampling included: 48 tokens to each prompt, 4 passes, and a critic of its own; the
    /// peer is TRL's PPOTrainer.
    Ppo,
    /// The same with the critic on the policy's trunk, which the peer cannot.
    PpoShared,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    Float32,
    Bfloat16,
}

/// What a process of either side is told.
#[derive(Clone, Serialize, Deserialize)]
struct Work {
    task: Task,
    dtype: Dtype,
    batch: usize,
    microbatch: Option<usize>,
    steps: usize,
    threads: i32,
    model: PathBuf,
    pairs: PathBuf,
}

impl Task {
    /// What `--batch` counts.
    fn items(self) -> &'static str {
        match self {
            Self::Grpo => "answers",
            Self::Dpo | Self::DpoCached | Self::Reward => "comparisons",
            _ => "prompts",
        }
    }
}

impl Work {
    /// Items that ours computes at a time.
    fn microbatch(&self) -> usize {
        self.microbatch.unwrap_or(self.batch)
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(work) = &options.worker {
        return worker::serve(&serde_json::from_str(work)?);
    }
    if options.steps < 2 || options.rounds == 0 {
        return Err(
            "--steps must be at least 2 (the first is a warm-up), --rounds at least 1".into(),
        );
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let work = Work {
        task: options.task,
        dtype: options.dtype,
        batch: options.batch,
        microbatch: options.microbatch,
        steps: options.steps,
        threads: options.threads,
        model: options
            .model
            .canonicalize()
            .map_err(|error| format!("--model {}: {error}", options.model.display()))?,
        pairs: root.join("benches/data/pairs.jsonl"),
    };
    let python = match options.alone {
        true => None,
        false => Some(peer_python(&options, root)?),
    };
    let figures = contest::run(&work, python.as_deref(), root, options.rounds)?;
    let name = serde_json::to_value(options.task)?;
    let name = name.as_str().ok_or("a task is a string")?.to_string();
    let output = options
        .output
        .unwrap_or_else(|| root.join(format!("target/vs_peers/{name}.json")));
    report::print(&work, &figures)?;
    report::write(&work, &figures, &output)
}

/// The Python to run the peer in, made if that was asked for.
fn peer_python(options: &Options, root: &Path) -> Result<PathBuf> {
    let python = match &options.make_python {
        Some(dir) => {
            let script = root.join("benches/peers/make_python.py");
            let status = Command::new("python3").arg(script).arg(dir).status()?;
            if !status.success() {
                return Err(format!("making the Python in {} failed", dir.display()).into());
            }
            dir.join("bin/python")
        }
        None => options.python.clone(),
    };
    let probe = Command::new(&python)
        .env_remove("LD_LIBRARY_PATH")
        .args(["-c", "import importlib.util as u; print([m for m in ('torch', 'transformers', 'trl') if not u.find_spec(m)])"])
        .output();
    let missing = match probe {
        Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_string(),
        Err(error) => error.to_string(),
    };
    match missing.as_str() {
        "[]" => Ok(python),
        _ => Err(format!(
            "{}: no Python with torch, transformers and trl ({missing}). Make one with --make-python DIR, name one with \
             --python, or leave the peer out with --alone",
            python.display()
        )
        .into()),
    }
}
