//! A process that judges answers.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rlhf_core::Error as CoreError;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::{TextReward, last_number};
use crate::Result;

/// What the process reads on its standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The answer, byte for byte.
    Answer,
    /// One line of JSON: `{"prompt": …, "answer": …}`.
    Json,
}

/// What is made of a process that ended in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// 1 for exit status 0; the reward of failure for any other.
    ExitStatus,
    /// The last number of what it wrote to its standard output; the reward of failure where the
    /// status is not 0, there is no number, or there was more output than is read.
    LastNumber,
}

/// Runs a program on each answer: a compiler, unit tests, a checker.
///
/// The program is started directly, by no shell, with the arguments given here; what is judged
/// comes on its standard input ([`Input`]) and nowhere else. Its environment holds `PATH` alone.
/// It leads a process group of its own, and the whole group is killed when the program ends or
/// its time is up. What it writes is read up to a bound, the rest thrown away. As many run at once
/// as the rayon pool has threads.
///
/// This bounds time and output. It is **not a sandbox**: the program can read files, use the
/// network, and leave its process group. To run what a model has written, let the program be one
/// that confines it (a container, `bwrap`, `nsjail`).
///
/// ```
/// use std::time::Duration;
/// use rlhf_reward::programs::{ProcessReward, TextReward, Verdict};
///
/// let reward = ProcessReward::new("wc", ["-w"], Duration::from_secs(10))?
///     .with_verdict(Verdict::LastNumber);
/// assert_eq!(reward.reward("", "two words")?, 2.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct ProcessReward {
    program: PathBuf,
    args: Vec<String>,
    time_limit: Duration,
    max_output: usize,
    input: Input,
    verdict: Verdict,
    failure: f64,
}

impl ProcessReward {
    /// A program that is given `time_limit` for each answer. It reads the answer and is judged by
    /// its exit status; failure is worth 0; 64 KiB of output are read.
    ///
    /// # Errors
    /// An invalid configuration: no time at all.
    pub fn new<A: Into<String>>(
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = A>,
        time_limit: Duration,
    ) -> Result<Self> {
        if time_limit.is_zero() {
            let reason = "must be longer than nothing";
            return Err(CoreError::config("time_limit", "0", reason).into());
        }
        Ok(Self {
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
            time_limit,
            max_output: 64 << 10,
            input: Input::Answer,
            verdict: Verdict::ExitStatus,
            failure: 0.0,
        })
    }

    /// Changes what it reads.
    pub fn with_input(mut self, input: Input) -> Self {
        self.input = input;
        self
    }

    /// Changes how it is judged.
    pub fn with_verdict(mut self, verdict: Verdict) -> Self {
        self.verdict = verdict;
        self
    }

    /// Changes what failure is worth.
    pub fn with_failure(mut self, reward: f64) -> Self {
        self.failure = reward;
        self
    }

    /// Changes how many bytes of its standard output are kept.
    pub fn with_max_output(mut self, bytes: usize) -> Self {
        self.max_output = bytes;
        self
    }

    fn spawn(&self) -> rlhf_core::Result<Child> {
        Command::new(&self.program)
            .args(&self.args)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(CoreError::io("starting", &self.program))
    }

    /// The exit status, if the program ended in time, and its output.
    fn run(&self, input: Vec<u8>) -> rlhf_core::Result<(Option<ExitStatus>, Output)> {
        let mut group = Group {
            child: self.spawn()?,
            reaped: false,
        };
        let (stdin, stdout) = (group.child.stdin.take(), group.child.stdout.take());
        // Threads of their own, since the program may write before it has read, and never do
        // either. They end with the pipes, which a process that left the group can hold open:
        // nobody waits for them longer than `GRACE`.
        thread::spawn(move || {
            // A program that does not read all of its input closes the pipe: no failure of ours.
            let _ = stdin.map(|mut pipe| pipe.write_all(&input));
        });
        let (sender, receiver) = mpsc::channel();
        let limit = self.max_output;
        thread::spawn(move || {
            let output = stdout.map_or_else(Output::default, |pipe| read_bounded(pipe, limit));
            let _ = sender.send(output);
        });
        let status = group.wait(self.time_limit)?;
        Ok((status, receiver.recv_timeout(GRACE).unwrap_or_default()))
    }
}

/// How long the output of a group that was killed is waited for.
const GRACE: Duration = Duration::from_secs(1);

impl TextReward for ProcessReward {
    fn reward(&self, prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        let input = match self.input {
            Input::Answer => answer.as_bytes().to_vec(),
            Input::Json => {
                let line = serde_json::json!({"prompt": prompt, "answer": answer});
                format!("{line}\n").into_bytes()
            }
        };
        let (status, output) = self.run(input)?;
        if !status.is_some_and(|status| status.success()) {
            return Ok(self.failure);
        }
        Ok(match self.verdict {
            Verdict::ExitStatus => 1.0,
            Verdict::LastNumber if output.cut => self.failure,
            Verdict::LastNumber => {
                last_number(&String::from_utf8_lossy(&output.bytes)).unwrap_or(self.failure)
            }
        })
    }
}

/// What a program wrote.
#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    /// Whether there was more.
    cut: bool,
}

/// Keeps the first `limit` bytes and throws the rest away, so that the writer is not blocked.
fn read_bounded(mut pipe: impl Read, limit: usize) -> Output {
    let mut output = Output::default();
    let mut buffer = [0; 8192];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return output,
            Ok(count) => {
                let kept = count.min(limit - output.bytes.len());
                output.bytes.extend_from_slice(&buffer[..kept]);
                output.cut |= kept < count;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return output,
        }
    }
}

/// A process and those that it started. Killed and reaped when dropped.
struct Group {
    child: Child,
    reaped: bool,
}

impl Group {
    /// Waits for the leader, and kills the group when it has ended or its time is up.
    fn wait(&mut self, limit: Duration) -> rlhf_core::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_micros(200);
        let in_time = loop {
            if self.has_ended()? {
                break true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        let status = self.kill()?;
        Ok(in_time.then_some(status))
    }

    /// Whether the leader has ended. It is not reaped: as long as it is not, its number belongs
    /// to no other process, and the group can be killed safely.
    fn has_ended(&self) -> rlhf_core::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(self.pid()), options);
        Ok(status.map_err(CoreError::model)?.is_some())
    }

    fn kill(&mut self) -> rlhf_core::Result<ExitStatus> {
        // Fails where nothing is left to be killed, which is what is wanted.
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let status = self.child.wait().map_err(CoreError::model)?;
        self.reaped = true;
        Ok(status)
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.kill();
        }
    }
}
