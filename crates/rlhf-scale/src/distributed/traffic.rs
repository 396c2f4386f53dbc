//! How many bytes operations move.

use std::fmt;
use std::ops::{Index, Sub};
use std::sync::atomic::{AtomicU64, Ordering};

/// A kind of operation between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Every rank gets the sum (or maximum, …) of all.
    AllReduce,
    /// Every rank gets what one has.
    Broadcast,
    /// Every rank gets what all have.
    AllGather,
    /// Every rank gets its part of the sum of all.
    ReduceScatter,
    /// Every rank gets a part of what each has.
    AllToAll,
    /// To one rank.
    Send,
    /// From one rank.
    Receive,
    /// Nothing but waiting.
    Barrier,
}

impl Operation {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::AllReduce,
        Self::Broadcast,
        Self::AllGather,
        Self::ReduceScatter,
        Self::AllToAll,
        Self::Send,
        Self::Receive,
        Self::Barrier,
    ];

    /// As it is called in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::Broadcast => "broadcast",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::Send => "send",
            Self::Receive => "receive",
            Self::Barrier => "barrier",
        }
    }

    /// Bytes that a rank sends in this operation on `bytes` bytes among `size` ranks.
    ///
    /// | | `bytes` | sent by each rank |
    /// |---|---|---|
    /// | all-reduce | the tensor | `2 (n − 1)/n` of them (a ring) |
    /// | all-gather | what every rank ends up with | `(n − 1)/n` |
    /// | reduce-scatter | what every rank puts in | `(n − 1)/n` |
    /// | all-to-all, equal parts | what every rank puts in | `(n − 1)/n` |
    /// | broadcast | the tensor | `n − 1` times, in all, counted at the root |
    /// | send | the tensor | once |
    ///
    /// ```
    /// use rlhf_scale::distributed::Operation;
    /// assert_eq!(Operation::AllReduce.bytes_sent(1000, 4), 1500);
    /// assert_eq!(Operation::ReduceScatter.bytes_sent(1000, 4), 750);
    /// ```
    pub fn bytes_sent(self, bytes: u64, size: usize) -> u64 {
        let size = size.max(1) as u64;
        let others = size - 1;
        match self {
            Self::AllReduce => 2 * others * bytes / size,
            Self::AllGather | Self::ReduceScatter | Self::AllToAll => others * bytes / size,
            Self::Broadcast => others * bytes,
            Self::Send => bytes,
            Self::Receive | Self::Barrier => 0,
        }
    }
}

/// What one kind of operation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OperationTraffic {
    /// How often it was done.
    pub calls: u64,
    /// Bytes that this rank sent, by the formulas of [`Operation::bytes_sent`].
    pub bytes_sent: u64,
}

/// What a group did so far: `traffic[Operation::AllReduce].bytes_sent`. The difference of two is
/// what was done in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic([OperationTraffic; 8]);

impl Traffic {
    /// Bytes that this rank sent in all.
    pub fn bytes_sent(&self) -> u64 {
        self.0.iter().map(|kind| kind.bytes_sent).sum()
    }
}

impl Index<Operation> for Traffic {
    type Output = OperationTraffic;

    fn index(&self, operation: Operation) -> &OperationTraffic {
        &self.0[operation as usize]
    }
}

impl Sub for Traffic {
    type Output = Self;

    fn sub(mut self, earlier: Self) -> Self {
        for (now, then) in self.0.iter_mut().zip(earlier.0) {
            now.calls = now.calls.saturating_sub(then.calls);
            now.bytes_sent = now.bytes_sent.saturating_sub(then.bytes_sent);
        }
        self
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = Operation::ALL.into_iter().filter(|o| self[*o].calls > 0);
        for (i, operation) in done.enumerate() {
            let OperationTraffic { calls, bytes_sent } = self[operation];
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{} {calls}x {bytes_sent} B", operation.name())?;
        }
        Ok(())
    }
}

/// [`Traffic`] that several threads may add to.
#[derive(Debug, Default)]
pub(super) struct Counters([(AtomicU64, AtomicU64); 8]);

impl Counters {
    pub(super) fn add(&self, operation: Operation, bytes_sent: u64) {
        let (calls, bytes) = &self.0[operation as usize];
        calls.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(bytes_sent, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Traffic {
        let mut traffic = Traffic::default();
        for (kind, (calls, bytes)) in traffic.0.iter_mut().zip(&self.0) {
            kind.calls = calls.load(Ordering::Relaxed);
            kind.bytes_sent = bytes.load(Ordering::Relaxed);
        }
        traffic
    }
}
