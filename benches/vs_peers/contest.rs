//! Two processes that do their steps by turns.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use crate::data::Tokens;
use crate::roofline::Decoding;
use crate::worker::{Line, MARK};
use crate::{Result, Work};

/// What one side took.
#[derive(Debug, Default)]
pub(crate) struct Side {
    pub(crate) versions: String,
    /// Of every step that counts.
    pub(crate) seconds: Vec<f64>,
    /// Tokens of those steps.
    pub(crate) tokens: i64,
    /// Flops that those steps need, where the side says so.
    pub(crate) flops: Vec<f64>,
    /// What their decoding needs, where they decode.
    pub(crate) decoding: Vec<Decoding>,
    /// The process's most resident memory; the most of all rounds.
    pub(crate) peak_mb: f64,
    /// From the start of the process until it could do a step; one a round.
    pub(crate) start_s: Vec<f64>,
}

#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) ours: Side,
    pub(crate) peer: Option<Side>,
    /// Flops a second of the GEMM, after every step that counts.
    pub(crate) gemm_rates: Vec<f64>,
    /// Bytes a second read from memory, as often.
    pub(crate) bandwidths: Vec<f64>,
}

pub(crate) fn run(
    work: &Work,
    python: Option<&Path>,
    root: &Path,
    rounds: usize,
) -> Result<Figures> {
    let mut figures = Figures {
        ours: Side::default(),
        peer: python.map(|_| Side::default()),
        gemm_rates: Vec::new(),
        bandwidths: Vec::new(),
    };
    for round in 0..rounds {
        let mut ours = Process::start("ours", ours(work)?, &mut figures.ours)?;
        let mut peer = match (python, &mut figures.peer) {
            (Some(python), Some(side)) => {
                Some(Process::start("the peer", peer(work, python, root)?, side)?)
            }
            _ => None,
        };
        for step in 0..work.steps {
            // The first step counts for neither.
            let counts = step > 0;
            let done = ours.step(counts.then_some(&mut figures.ours))?;
            if let (Some(process), Some(side)) = (&mut peer, &mut figures.peer) {
                let theirs = process.step(counts.then_some(side))?;
                if theirs != done {
                    return Err(
                        format!("step {step}: ours read {done:?}, the peer {theirs:?}").into(),
                    );
                }
            }
            if counts {
                let (gemm, bandwidth) = ours.rates()?;
                figures.gemm_rates.push(gemm);
                figures.bandwidths.push(bandwidth);
            }
            eprintln!(
                "round {} of {rounds}, step {} of {}",
                round + 1,
                step + 1,
                work.steps
            );
        }
        ours.finish(&mut figures.ours)?;
        if let (Some(process), Some(side)) = (peer, &mut figures.peer) {
            process.finish(side)?;
        }
    }
    Ok(figures)
}

fn ours(work: &Work) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    let task = serde_json::to_value(work.task)?;
    command
        .arg(task.as_str().ok_or("a task is a string")?)
        .arg("--model")
        .arg(&work.model)
        .args(["--worker", &serde_json::to_string(work)?])
        .env("OMP_NUM_THREADS", work.threads.to_string());
    Ok(command)
}

fn peer(work: &Work, python: &Path, root: &Path) -> Result<Command> {
    let mut command = Command::new(python);
    command
        .arg(root.join("benches/peers/vs_peers.py"))
        .arg(serde_json::to_string(work)?)
        .env("OMP_NUM_THREADS", work.threads.to_string())
        // It names our libtorch.
        .env_remove("LD_LIBRARY_PATH");
    Ok(command)
}

/// A side's process, waiting for its next command.
struct Process {
    name: &'static str,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(name: &'static str, mut command: Command, side: &mut Side) -> Result<Self> {
        let start = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().ok_or("a child without output")?);
        let mut process = Self {
            name,
            child,
            input,
            output,
        };
        match process.read()? {
            Line::Ready { versions } => side.versions = versions,
            line => return Err(process.unexpected(&line)),
        }
        side.start_s.push(start.elapsed().as_secs_f64());
        Ok(process)
    }

    /// A step, noted in `side` if it counts.
    fn step(&mut self, side: Option<&mut Side>) -> Result<Tokens> {
        self.say("step")?;
        match self.read()? {
            Line::Step {
                seconds,
                tokens,
                id_sum,
                flops,
                decoding,
            } => {
                if let Some(side) = side {
                    side.seconds.push(seconds);
                    side.flops.push(flops);
                    side.decoding.push(decoding);
                    side.tokens += tokens;
                }
                Ok(Tokens { tokens, id_sum })
            }
            line => Err(self.unexpected(&line)),
        }
    }

    /// Flops and bytes a second.
    fn rates(&mut self) -> Result<(f64, f64)> {
        self.say("gemm")?;
        match self.read()? {
            Line::Gemm {
                flops_per_s,
                bytes_per_s,
            } => Ok((flops_per_s, bytes_per_s)),
            line => Err(self.unexpected(&line)),
        }
    }

    fn finish(mut self, side: &mut Side) -> Result<()> {
        // The end of its input ends it.
        drop(self.input.take());
        match self.read()? {
            Line::Done { peak_mb } => side.peak_mb = side.peak_mb.max(peak_mb),
            line => return Err(self.unexpected(&line)),
        }
        self.child.wait()?;
        Ok(())
    }

    fn say(&mut self, command: &str) -> Result<()> {
        let input = self
            .input
            .as_mut()
            .ok_or("the process has been told to end")?;
        writeln!(input, "{command}")?;
        Ok(input.flush()?)
    }

    /// The next line that is meant for us.
    fn read(&mut self) -> Result<Line> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.output.read_line(&mut line)? == 0 {
                let status = self.child.wait()?;
                return Err(format!(
                    "{} ended too early ({status}); its errors are above",
                    self.name
                )
                .into());
            }
            if let Some(json) = line.strip_prefix(MARK) {
                return Ok(serde_json::from_str(json)?);
            }
        }
    }

    fn unexpected(&self, line: &Line) -> Box<dyn std::error::Error> {
        format!("{} said {line:?} out of turn", self.name).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Of no use once the process is done; after an error it must not go on.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
