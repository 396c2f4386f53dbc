//! Our side: a process that does a step when it is told to.
//!
//! Both sides speak lines. In comes `step`, `gemm` (ours only), or the end of the input; out go lines
//! that begin with [`MARK`], the first of them when all is loaded.

use std::io::{BufRead, Write};
use std::time::Instant;

use rlhf::core::{SamplingConfig, tch};
use serde::{Deserialize, Serialize};

use crate::data::Tokens;
use crate::roofline::{self, Cost, Decoding};
use crate::{Result, Task, Work, dpo, forward_backward, generate, grpo, ppo, reward, sft};

/// What the other process's lines begin with; libraries print lines of their own.
pub(crate) const MARK: &str = "VS_PEERS ";

/// A task, ready to run.
pub(crate) struct Prepared {
    /// Does the step of this number.
    pub(crate) step: Box<dyn FnMut(usize) -> Result<()>>,
    /// What each step reads.
    pub(crate) tokens: Vec<Tokens>,
    /// What each step must compute.
    pub(crate) costs: Vec<Cost>,
}

/// A line of either side. Our side alone gives `flops` and `decoding`, and the rates when asked for them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    Ready {
        versions: String,
    },
    Step {
        seconds: f64,
        tokens: i64,
        id_sum: i64,
        #[serde(default)]
        flops: f64,
        #[serde(default)]
        decoding: Decoding,
    },
    Gemm {
        flops_per_s: f64,
        bytes_per_s: f64,
    },
    Done {
        peak_mb: f64,
    },
}

pub(crate) fn serve(work: &Work) -> Result<()> {
    tch::set_num_threads(work.threads);
    let mut prepared = match work.task {
        Task::ForwardBackward => forward_backward::prepare(work)?,
        Task::Generate => generate::prepare(work, SamplingConfig::default())?,
        Task::Greedy => generate::prepare(work, SamplingConfig::greedy())?,
        Task::Sft => sft::prepare(work)?,
        Task::Dpo => dpo::prepare(work)?,
        Task::DpoCached => dpo::prepare_cached(work)?,
        Task::Reward => reward::prepare(work)?,
        Task::Grpo => grpo::prepare(work)?,
        Task::Ppo => ppo::separate(work)?,
        Task::PpoShared => ppo::shared(work)?,
    };
    say(&Line::Ready {
        versions: format!("rlhf {}", env!("CARGO_PKG_VERSION")),
    })?;
    let mut step = 0;
    // Of the steps and of what came before them, not of what measures rates in between.
    let mut peak = 0f64;
    for line in std::io::stdin().lock().lines() {
        match line?.as_str() {
            "gemm" => {
                say(&Line::Gemm {
                    flops_per_s: roofline::gemm_rate(
                        prepared.costs[step.max(1) - 1],
                        work.dtype.kind(),
                    ),
                    bytes_per_s: roofline::bandwidth(),
                })?;
                forget_peak()?;
            }
            "step" => {
                let start = Instant::now();
                (prepared.step)(step)?;
                peak = peak.max(peak_mb()?);
                let Tokens { tokens, id_sum } = prepared.tokens[step];
                say(&Line::Step {
                    seconds: start.elapsed().as_secs_f64(),
                    tokens,
                    id_sum,
                    flops: prepared.costs[step].flops,
                    decoding: prepared.costs[step].decoding,
                })?;
                step += 1;
            }
            line => return Err(format!("no such command: {line}").into()),
        }
    }
    say(&Line::Done { peak_mb: peak })
}

fn say(line: &Line) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{MARK}{}", serde_json::to_string(line)?)?;
    Ok(out.flush()?)
}

/// Makes what is resident now the most so far.
fn forget_peak() -> Result<()> {
    Ok(std::fs::write("/proc/self/clear_refs", "5")?)
}

/// Most resident memory so far.
fn peak_mb() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.ok_or("no VmHWM in /proc/self/status")?.parse::<f64>()? / 1024.0)
}
