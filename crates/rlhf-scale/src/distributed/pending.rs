//! Operations under way.

use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::ProcessGroup;
use super::liveness::Failure;
use super::traffic::Operation;
use crate::Result;
use crate::ffi::c10d::Work;

/// How often who waits looks for trouble.
const WATCH: Duration = Duration::from_millis(250);

/// An operation that other work may go on beside. Its tensors must not be touched until
/// [`wait`](Self::wait) returns.
#[derive(Debug)]
#[must_use = "the operation has ended only when this was waited for"]
pub struct Pending {
    group: ProcessGroup,
    operation: Operation,
    /// `None` in a group of one.
    work: Option<Work>,
    started: Instant,
}

impl Pending {
    pub(super) fn new(group: &ProcessGroup, operation: Operation, work: Option<Work>) -> Self {
        Self {
            group: group.clone(),
            operation,
            work,
            started: Instant::now(),
        }
    }

    /// Waits for the end of the operation.
    ///
    /// # Errors
    /// [`Error::RanksLost`](crate::Error::RanksLost) or
    /// [`Error::OperationTimeout`](crate::Error::OperationTimeout), naming ranks;
    /// [`Error::Communication`](crate::Error::Communication) where all seem well.
    pub fn wait(self) -> Result<()> {
        let Some(work) = &self.work else {
            return Ok(());
        };
        let failure = match self.operation {
            Operation::Send | Operation::Receive => self.wait_whole(work),
            _ => self.wait_in_slices(work),
        };
        match failure {
            None => Ok(()),
            Some(failure) => Err(self.group.diagnose(&failure)),
        }
    }

    fn wait_in_slices(&self, work: &Work) -> Option<Failure> {
        let limit = self.group.limit();
        loop {
            match work.wait(WATCH.min(limit)) {
                Ok(true) => return None,
                Ok(false) => {}
                Err(error) => return Some(self.failure(error.to_string())),
            }
            if self.started.elapsed() > limit {
                return Some(self.failure("the time limit has passed".into()));
            }
            if let Some(trouble) = self.group.trouble() {
                return Some(self.failure(trouble));
            }
        }
    }

    fn wait_whole(&self, work: &Work) -> Option<Failure> {
        let error = work.wait_whole().err()?;
        Some(self.failure(error.to_string()))
    }

    fn failure(&self, reason: String) -> Failure {
        Failure {
            operation: self.operation.name(),
            reason,
            timed_out: self.started.elapsed() >= self.group.limit(),
        }
    }
}

/// A [`reduce_scatter`](ProcessGroup::reduce_scatter) under way.
#[derive(Debug)]
#[must_use = "the operation has ended only when this was waited for"]
pub struct PendingShard {
    pub(super) pending: Pending,
    pub(super) shard: Shard,
}

/// Where the own part of the sum is, or is to be made from.
#[derive(Debug)]
pub(super) enum Shard {
    Summed(Tensor),
    /// `[n, ...]`: what each rank has for this one.
    Parts(Tensor),
}

impl PendingShard {
    /// Waits, and returns this rank's part of the sum.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn wait(self) -> Result<Tensor> {
        self.pending.wait()?;
        match self.shard {
            Shard::Summed(shard) => Ok(shard),
            Shard::Parts(parts) => {
                let kind: Kind = parts.kind();
                Ok(parts.f_sum_dim_intlist([0i64].as_slice(), false, kind)?)
            }
        }
    }
}
