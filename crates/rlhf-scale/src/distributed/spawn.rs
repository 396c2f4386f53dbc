//! Several processes of this program on this machine.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rlhf_core::Error as CoreError;

use crate::{Error, Result};

/// Kept of what a process writes.
const TAIL: usize = 64 << 10;

/// Starts this program again, N times, as the ranks of one run: a launcher for one machine.
///
/// Each process has `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` (a free
/// port) and `OMP_NUM_THREADS=1` in its environment, and the arguments of this one. What rank 0
/// writes appears here. When a process fails the others get some time to notice, and are then
/// killed.
///
/// ```no_run
/// use rlhf_scale::distributed::{GroupOptions, ProcessGroup, Spawn};
///
/// # fn main() -> Result<(), rlhf_scale::Error> {
/// if !Spawn::is_rank() {
///     return Spawn::new(4).run()?.check(); // this process only starts the others
/// }
/// let group = ProcessGroup::from_env(&GroupOptions::default())?;
/// group.barrier()
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Spawn {
    processes: usize,
    args: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    grace: Duration,
    quiet: bool,
}

/// Processes that run.
#[derive(Debug)]
pub struct Running {
    processes: Vec<Process>,
    grace: Duration,
}

#[derive(Debug)]
struct Process {
    child: Child,
    status: Option<ExitStatus>,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

/// How a process ended.
#[derive(Debug, Clone)]
pub struct ProcessEnd {
    /// Its rank.
    pub rank: usize,
    /// Its exit status.
    pub status: ExitStatus,
    /// The end of its standard output.
    pub stdout: String,
    /// The end of its standard error.
    pub stderr: String,
}

/// How the processes ended, by rank.
#[derive(Debug, Clone)]
pub struct SpawnReport {
    /// One for each rank.
    pub ends: Vec<ProcessEnd>,
}

impl Spawn {
    /// `processes` of them, with the arguments of this program.
    pub fn new(processes: usize) -> Self {
        Self {
            processes,
            args: env::args_os().skip(1).collect(),
            variables: Vec::new(),
            grace: Duration::from_secs(10),
            quiet: false,
        }
    }

    /// Processes of a test program, each of which runs the one test `name`, by its full path. The
    /// test calls this where it is no rank ([`is_rank`](Self::is_rank)), and does its work where
    /// it is one.
    pub fn test(processes: usize, name: &str) -> Self {
        let only = [
            "--exact",
            name,
            "--nocapture",
            "--test-threads=1",
            "--include-ignored",
        ];
        Self {
            args: only.map(OsString::from).into(),
            quiet: true,
            ..Self::new(processes)
        }
    }

    /// Whether this process is a rank of a run, whoever started it.
    pub fn is_rank() -> bool {
        env::var_os("RANK").is_some()
    }

    /// Other arguments than those of this program.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// An environment variable more.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// How long the others may go on when one has failed; 10 s unless set.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Keeps what rank 0 writes in the report, and relays nothing.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Starts them and waits for their ends.
    ///
    /// # Errors
    /// If they cannot be started. How they ended is in the report: see [`SpawnReport::check`].
    pub fn run(&self) -> Result<SpawnReport> {
        self.start()?.wait()
    }

    /// Starts them.
    ///
    /// # Errors
    /// No process asked for; a program or port that cannot be had.
    pub fn start(&self) -> Result<Running> {
        if self.processes == 0 {
            return Err(CoreError::config("processes", 0, "must be at least 1").into());
        }
        let program = env::current_exe().map_err(CoreError::io("finding", "this program"))?;
        let port = free_port()?;
        let mut running = Running {
            processes: Vec::with_capacity(self.processes),
            grace: self.grace,
        };
        for rank in 0..self.processes {
            let mut child = Command::new(&program)
                .args(&self.args)
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("WORLD_SIZE", self.processes.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .env("OMP_NUM_THREADS", "1")
                .envs(self.variables.iter().map(|(name, value)| (name, value)))
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .map_err(CoreError::io("starting", &program))?;
            let relayed = rank == 0 && !self.quiet;
            let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
            running.processes.push(Process {
                child,
                status: None,
                stdout: stdout.map(|from| tail(from, relayed.then(io::stdout))),
                stderr: stderr.map(|from| tail(from, relayed.then(io::stderr))),
            });
        }
        Ok(running)
    }
}

impl Running {
    /// Kills one (SIGKILL), as a machine that fails would.
    ///
    /// # Errors
    /// If the system does not let it.
    pub fn kill(&mut self, rank: usize) -> Result<()> {
        match self.processes.get_mut(rank) {
            Some(process) => Ok(process
                .child
                .kill()
                .map_err(CoreError::io("killing", format!("rank {rank}")))?),
            None => Ok(()),
        }
    }

    /// Process ids, by rank.
    pub fn ids(&self) -> Vec<u32> {
        self.processes.iter().map(|p| p.child.id()).collect()
    }

    /// Waits for all of them; from the first failure on for as long as the grace lasts, then kills
    /// the rest.
    ///
    /// # Errors
    /// If the system does not say how they are.
    pub fn wait(mut self) -> Result<SpawnReport> {
        let mut failed_at: Option<Instant> = None;
        loop {
            let mut left = 0;
            for (rank, process) in self.processes.iter_mut().enumerate() {
                if process.status.is_none() {
                    let name = || format!("rank {rank}");
                    let status = process.child.try_wait();
                    process.status = status.map_err(CoreError::io("watching", name()))?;
                }
                match process.status {
                    None => left += 1,
                    Some(status) if !status.success() => {
                        failed_at.get_or_insert_with(Instant::now);
                    }
                    Some(_) => {}
                }
            }
            if left == 0 {
                break;
            }
            if failed_at.is_some_and(|at| at.elapsed() > self.grace) {
                self.kill_all();
            }
            thread::sleep(Duration::from_millis(10));
        }
        let mut ends = Vec::with_capacity(self.processes.len());
        for (rank, process) in self.processes.iter_mut().enumerate() {
            let text = |thread: Option<JoinHandle<String>>| {
                thread
                    .and_then(|thread| thread.join().ok())
                    .unwrap_or_default()
            };
            if let Some(status) = process.status {
                ends.push(ProcessEnd {
                    rank,
                    status,
                    stdout: text(process.stdout.take()),
                    stderr: text(process.stderr.take()),
                });
            }
        }
        Ok(SpawnReport { ends })
    }

    fn kill_all(&mut self) {
        for process in &mut self.processes {
            if process.status.is_none() {
                let _ = process.child.kill(); // it may have ended meanwhile
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_all();
        for process in &mut self.processes {
            if process.status.is_none() {
                let _ = process.child.wait(); // no zombie stays
            }
        }
    }
}

impl SpawnReport {
    /// Fails unless all processes ended well.
    ///
    /// # Errors
    /// [`Error::ProcessFailed`] for the first that did not.
    pub fn check(&self) -> Result<()> {
        match self.ends.iter().find(|end| !end.status.success()) {
            None => Ok(()),
            Some(end) => Err(Error::ProcessFailed {
                rank: end.rank,
                status: end.status.to_string(),
                stderr: end.stderr.clone(),
            }),
        }
    }
}

/// A port that nobody uses at this moment.
fn free_port() -> Result<u16> {
    let found = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    Ok(found
        .map_err(CoreError::io("finding", "a free port"))?
        .port())
}

/// Reads to the end, in a thread, and keeps the end of it; passes all of it on where asked to.
fn tail(
    mut from: impl Read + Send + 'static,
    mut to: Option<impl Write + Send + 'static>,
) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut kept = VecDeque::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let new = &buffer[..count];
            if let Some(to) = &mut to {
                // Nobody reads any more: that is no reason to stop the run.
                let _ = to.write_all(new).and_then(|()| to.flush());
            }
            kept.extend(new);
            kept.drain(..kept.len().saturating_sub(TAIL));
        }
        String::from_utf8_lossy(kept.make_contiguous()).into_owned()
    })
}
