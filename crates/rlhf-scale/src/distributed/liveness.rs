//! Signs of life, and finding out who shows none.

use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::rendezvous::{GroupOptions, Rendezvous, StoreHost};
use crate::ffi::c10d::Store;
use crate::{Error, Result};

/// Between two signs of life, and between two looks for trouble.
const BEAT: Duration = Duration::from_millis(500);
/// Who shows no sign of life for this long, while others wait for it, is gone.
const SILENCE: Duration = Duration::from_millis(3000);

const TROUBLE: &str = "rlhf/trouble";
/// Who is gone, as the first process to find out says.
const VERDICT: &str = "rlhf/verdict";

/// What all groups of a process share: the store, and whether the run is still whole.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) rendezvous: Rendezvous,
    pub(super) options: GroupOptions,
    /// `None` for a process alone.
    pub(super) store: Option<Arc<Store>>,
    broken: Mutex<Option<String>>,
    pulse: Option<Pulse>,
}

/// The thread that shows this process's signs of life, and looks for trouble.
#[derive(Debug)]
struct Pulse {
    shared: Arc<(Mutex<Seen>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Seen {
    stop: bool,
    trouble: Option<String>,
    /// Who is gone, as another process found.
    verdict: Option<Vec<usize>>,
    /// When the store answered last.
    answered: Instant,
}

/// Why an operation failed, before it is known who is to blame.
pub(super) struct Failure {
    pub(super) operation: &'static str,
    pub(super) reason: String,
    /// Whether the time limit was what ended it.
    pub(super) timed_out: bool,
}

/// What a look at the store says about the others.
struct Verdict {
    silent: Vec<usize>,
    /// Who is not waiting for the operation.
    absent: Vec<usize>,
}

impl Link {
    /// That of a process without others.
    pub(super) fn alone(rendezvous: Rendezvous, options: GroupOptions) -> Self {
        Self {
            rendezvous,
            options,
            store: None,
            broken: Mutex::new(None),
            pulse: None,
        }
    }

    /// Meets at the store and begins to show signs of life.
    pub(super) fn connect(rendezvous: Rendezvous, options: GroupOptions) -> Result<Self> {
        rendezvous.validate()?;
        options.validate()?;
        let mut link = Self::alone(rendezvous, options);
        if link.rendezvous.size == 1 {
            return Ok(link);
        }
        let place = &link.rendezvous;
        let connected = Store::connect(
            &place.host,
            place.port,
            &place.prefix(),
            place.serves(),
            link.options.limit,
        )
        .and_then(|store| {
            let pulse = Pulse::start(store.again()?, place.rank)?;
            Ok((store, pulse))
        });
        let (store, pulse) = connected.map_err(|error| link.not_met(&error.to_string()))?;
        link.store = Some(Arc::new(store));
        link.pulse = Some(pulse);
        Ok(link)
    }

    /// The error of a rendezvous that failed, naming who was never heard of, or no longer is.
    pub(super) fn not_met(&self, reason: &str) -> Error {
        let place = &self.rendezvous;
        let size = place.size;
        let own = place.rank;
        let absent = self.ask(move |store| -> Vec<usize> {
            let others: Vec<usize> = (0..size).filter(|rank| *rank != own).collect();
            let unheard = |rank: &&usize| matches!(store.get(&pulse_key(**rank)), Ok(None));
            let mut absent: Vec<usize> = others.iter().filter(unheard).copied().collect();
            if absent.is_empty() {
                absent = silent(store, &others).unwrap_or_default();
            }
            absent
        });
        Error::Rendezvous {
            rank: place.rank,
            size: place.size,
            address: format!("{}:{}", place.host, place.port),
            seconds: self.options.limit.as_secs_f64(),
            ranks: absent.unwrap_or_default(),
            reason: first_line(reason),
        }
    }

    /// Fails if an operation of this process has failed before.
    pub(super) fn check_whole(&self, operation: &'static str) -> Result<()> {
        match &*lock(&self.broken) {
            Some(reason) => Err(Error::GroupBroken {
                operation,
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        lock(&self.broken).is_some()
    }

    /// What is wrong with the run, as far as others have noticed.
    pub(super) fn trouble(&self) -> Option<String> {
        let seen = lock(&self.pulse.as_ref()?.shared.0);
        match &seen.trouble {
            Some(trouble) => Some(format!("trouble at {trouble}")),
            None if seen.answered.elapsed() > BEAT + SILENCE => {
                Some("the store does not answer".into())
            }
            None => None,
        }
    }

    /// Who is gone, as another process has found.
    fn verdict(&self) -> Option<Vec<usize>> {
        lock(&self.pulse.as_ref()?.shared.0).verdict.clone()
    }

    /// Tells the others that something is wrong, and finds out who of `ranks` is to blame. From
    /// then on the run counts as broken.
    pub(super) fn diagnose(&self, ranks: &[usize], failure: &Failure) -> Error {
        let error = self.blame(ranks, failure);
        lock(&self.broken).get_or_insert_with(|| error.to_string());
        error
    }

    fn blame(&self, ranks: &[usize], failure: &Failure) -> Error {
        let operation = failure.operation;
        let cause = first_line(&failure.reason);
        let own = self.rendezvous.rank;
        let others: Vec<usize> = ranks.iter().copied().filter(|rank| *rank != own).collect();
        let (size, serves) = (self.rendezvous.size, self.rendezvous.serves());
        let verdict = self.ask(move |store| -> Result<Verdict> {
            store.set(TROUBLE, &format!("rank {own} ({operation})"))?;
            store.set(&roll_call_key(own), operation)?;
            let silent = silent(store, &others)?;
            if !silent.is_empty() {
                let ranks: Vec<String> = silent.iter().map(usize::to_string).collect();
                store.set(VERDICT, &ranks.join(","))?;
            }
            if serves {
                let left = |rank: &usize| *rank != own && !silent.contains(rank);
                wait_until_diagnosed(store, (0..size).filter(left).collect())?;
            }
            let absent = |rank: &usize| !matches!(store.get(&roll_call_key(*rank)), Ok(Some(_)));
            let absent = others.into_iter().filter(absent).collect();
            // The last question: from here on the store may end.
            store.set(&diagnosed_key(own), operation)?;
            Ok(Verdict { silent, absent })
        });
        match verdict {
            Some(Ok(Verdict { silent, .. })) if !silent.is_empty() => Error::RanksLost {
                operation,
                ranks: silent,
                reason: format!("no sign of life for {} s ({cause})", SILENCE.as_secs()),
            },
            Some(Ok(Verdict { absent, .. })) if failure.timed_out => Error::OperationTimeout {
                operation,
                seconds: self.options.limit.as_secs_f64(),
                ranks: absent,
            },
            Some(Ok(_)) => Error::Communication {
                operation,
                reason: cause,
            },
            // The store ended before this process asked it, but it has heard what it said.
            Some(Err(_)) | None if self.verdict().is_some() => Error::RanksLost {
                operation,
                ranks: self.verdict().unwrap_or_default(),
                reason: format!("as another rank found ({cause})"),
            },
            // Rank 0 keeps the store, and that is gone.
            Some(Err(_)) | None if self.rendezvous.store == StoreHost::FirstRank && own != 0 => {
                Error::RanksLost {
                    operation,
                    ranks: vec![0],
                    reason: format!("the store that it keeps does not answer ({cause})"),
                }
            }
            _ => Error::Communication {
                operation,
                reason: format!("{cause}; the launcher's store does not answer either"),
            },
        }
    }

    /// Asks the store, in a thread, since one that hangs would hang this one. `None` without an
    /// answer.
    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Option<T> {
        let store = Arc::clone(self.store.as_ref()?);
        let (sender, receiver) = mpsc::channel();
        let asking = move || {
            let _ = sender.send(question(&store)); // nobody listens any more: too late
        };
        thread::Builder::new()
            .name("rlhf-diagnosis".into())
            .spawn(asking)
            .ok()?;
        receiver
            .recv_timeout(2 * SILENCE + Duration::from_secs(2))
            .ok()
    }
}

/// Which of `ranks` show no sign of life. A rank that never showed one, as those written in Python
/// do not, is not accused.
fn silent(store: &Store, ranks: &[usize]) -> Result<Vec<usize>> {
    let mut first = Vec::with_capacity(ranks.len());
    for rank in ranks {
        if let Some(beat) = store.get(&pulse_key(*rank))? {
            first.push((*rank, beat));
        }
    }
    let start = Instant::now();
    while !first.is_empty() && start.elapsed() < SILENCE {
        thread::sleep(BEAT / 5);
        if let Some(verdict) = verdict_in(store)? {
            return Ok(verdict);
        }
        let mut still = Vec::with_capacity(first.len());
        for (rank, beat) in first {
            if store.get(&pulse_key(rank))?.as_ref() == Some(&beat) {
                still.push((rank, beat));
            }
        }
        first = still;
    }
    Ok(first.into_iter().map(|(rank, _)| rank).collect())
}

/// Who is gone, if a process has found that out.
fn verdict_in(store: &Store) -> Result<Option<Vec<usize>>> {
    let ranks = |verdict: String| {
        verdict
            .split(',')
            .filter_map(|rank| rank.parse().ok())
            .collect()
    };
    Ok(store.get(VERDICT)?.map(ranks))
}

/// The process that keeps the store must not end before the others have asked it; but it does not wait
/// for long.
fn wait_until_diagnosed(store: &Store, mut ranks: Vec<usize>) -> Result<()> {
    let start = Instant::now();
    while !ranks.is_empty() && start.elapsed() < SILENCE {
        thread::sleep(BEAT / 5);
        let mut left = Vec::with_capacity(ranks.len());
        for rank in ranks {
            if store.get(&diagnosed_key(rank))?.is_none() {
                left.push(rank);
            }
        }
        ranks = left;
    }
    Ok(())
}

impl Pulse {
    fn start(store: Store, rank: usize) -> Result<Self> {
        let key = pulse_key(rank);
        store.set(&key, "0")?;
        let seen = Seen {
            stop: false,
            trouble: None,
            verdict: None,
            answered: Instant::now(),
        };
        let shared = Arc::new((Mutex::new(seen), Condvar::new()));
        let own = Arc::clone(&shared);
        let beating = move || {
            let (seen, condition) = &*own;
            for count in 1u64.. {
                let waited = condition.wait_timeout_while(lock(seen), BEAT, |seen| !seen.stop);
                if waited.unwrap_or_else(PoisonError::into_inner).0.stop {
                    return;
                }
                let beat = store.set(&key, &count.to_string());
                let Ok(trouble) = beat.and_then(|()| store.get(TROUBLE)) else {
                    return; // the store is gone: `answered` grows old
                };
                // The store may be gone by the time that this process asks it.
                let verdict = trouble.as_ref().and_then(|_| verdict_in(&store).ok()?);
                let mut seen = lock(seen);
                seen.trouble = trouble;
                seen.verdict = verdict.or(seen.verdict.take());
                seen.answered = Instant::now();
            }
        };
        let thread = thread::Builder::new()
            .name("rlhf-pulse".into())
            .spawn(beating)
            .map_err(|error| Error::Communication {
                operation: "rendezvous",
                reason: format!("starting a thread: {error}"),
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        let (seen, condition) = &*self.shared;
        let answers = {
            let mut seen = lock(seen);
            seen.stop = true;
            seen.answered.elapsed() < 2 * BEAT
        };
        condition.notify_all();
        // A store that hangs must not hang the end of the program.
        if let Some(thread) = self.thread.take()
            && (answers || thread.is_finished())
        {
            let _ = thread.join(); // it does not panic, and nobody could be told
        }
    }
}

fn pulse_key(rank: usize) -> String {
    format!("rlhf/pulse/{rank}")
}

fn diagnosed_key(rank: usize) -> String {
    format!("rlhf/diagnosed/{rank}")
}

fn roll_call_key(rank: usize) -> String {
    format!("rlhf/roll_call/{rank}")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// c10d's messages have frames of C++ after them.
pub(super) fn first_line(message: &str) -> String {
    let end = message.find("\nException raised from");
    let end = end.unwrap_or(message.len());
    let line = message[..end].lines().next().unwrap_or("");
    line.trim().to_string()
}
