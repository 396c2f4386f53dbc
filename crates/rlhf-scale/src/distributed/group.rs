//! Process groups and what they do together.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tch::{Device, Tensor};

use super::liveness::{Failure, Link};
use super::rendezvous::{Backend, GroupOptions, Rendezvous, StoreHost};
use super::traffic::{Counters, Operation, Traffic};
use crate::ffi::c10d::{Group, Work};
use crate::ffi::reducer::Reducer;
use crate::{Error, Result};

mod operations;

/// Processes that work together. A handle: clones are the same group.
///
/// All members call the same operations in the same order, with tensors of the same shape and
/// kind. Ranks are counted within the group, in errors within the whole run. In a group of one
/// every operation is the identity and costs nothing.
///
/// Tensors are f32, f64, f16, bf16, i64, i32, i8 or u8, contiguous, on the CPU with Gloo and on a
/// CUDA device with NCCL.
///
/// ```
/// use rlhf_scale::distributed::{GroupOptions, ProcessGroup, ReduceOp};
/// use tch::Tensor;
///
/// # fn main() -> Result<(), rlhf_scale::Error> {
/// // One of many if torchrun started it, else alone.
/// let group = ProcessGroup::from_env(&GroupOptions::default())?;
/// let losses = Tensor::from_slice(&[1.0f32, 2.0]);
/// group.all_reduce(&losses, ReduceOp::Sum)?;
/// if group.rank() == 0 {
///     println!("{} of {} ranks", losses, group.size());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ProcessGroup(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    /// Members by their rank in the run.
    ranks: Vec<usize>,
    /// This process's place among them.
    rank: usize,
    /// `None` in a group of one.
    backend: Option<Group>,
    link: Arc<Link>,
    traffic: Counters,
    /// How often a subgroup of these members was made.
    children: Mutex<HashMap<Vec<usize>, usize>>,
    /// Messages that may still be on their way.
    sent: Mutex<VecDeque<Work>>,
}

/// How numbers of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// Their product.
    Product,
    /// The least.
    Min,
    /// The greatest.
    Max,
}

impl ProcessGroup {
    /// All processes that the launcher started, or this one alone where none did: see
    /// [`Rendezvous::from_env`].
    ///
    /// # Errors
    /// Those of [`Rendezvous::from_env`] and [`connect`](Self::connect).
    pub fn from_env(options: &GroupOptions) -> Result<Self> {
        match Rendezvous::from_env()? {
            Some(rendezvous) => Self::connect(rendezvous, options),
            None => Ok(Self::alone()),
        }
    }

    /// All processes of a run. Returns when all are there.
    ///
    /// # Errors
    /// [`Error::Rendezvous`], naming who did not come within the time limit; options or a place
    /// that make no sense.
    pub fn connect(rendezvous: Rendezvous, options: &GroupOptions) -> Result<Self> {
        let link = Arc::new(Link::connect(rendezvous, options.clone())?);
        let (rank, size) = (link.rendezvous.rank, link.rendezvous.size);
        Self::meet(link, "0".into(), (0..size).collect(), rank)
    }

    /// A group of this process alone.
    pub fn alone() -> Self {
        let rendezvous = Rendezvous {
            rank: 0,
            size: 1,
            local_rank: 0,
            host: String::new(),
            port: 0,
            store: StoreHost::FirstRank,
        };
        let link = Link::alone(rendezvous, GroupOptions::default());
        Self(Arc::new(Inner {
            name: "0".into(),
            ranks: vec![0],
            rank: 0,
            backend: None,
            link: Arc::new(link),
            traffic: Counters::default(),
            children: Mutex::default(),
            sent: Mutex::default(),
        }))
    }

    fn meet(link: Arc<Link>, name: String, ranks: Vec<usize>, rank: usize) -> Result<Self> {
        let nccl = link.options.backend == Backend::Nccl;
        let backend = match &link.store {
            Some(store) if ranks.len() > 1 => {
                // Longer than ours, which ends first and says more.
                let limit = link.options.limit + Duration::from_secs(5);
                let size = ranks.len();
                let met = Group::connect(store, &name, nccl, rank, size, limit);
                Some(met.map_err(|error| link.not_met(&error.to_string()))?)
            }
            _ => None,
        };
        Ok(Self(Arc::new(Inner {
            name,
            ranks,
            rank,
            backend,
            link,
            traffic: Counters::default(),
            children: Mutex::default(),
            sent: Mutex::default(),
        })))
    }

    /// The group of these members of this one, by their ranks here and in the order given. All of
    /// them call it, with the same list; the others need not. Members of several lists call it for
    /// those in the same order.
    ///
    /// # Errors
    /// [`Error::InvalidOperation`] for a list that lacks this process, names one twice, or one that
    /// there is not; [`Error::Rendezvous`] if the others do not come.
    pub fn subgroup(&self, members: &[usize]) -> Result<Self> {
        let invalid = |reason: String| Error::InvalidOperation {
            operation: "subgroup",
            reason,
        };
        let mut ranks = Vec::with_capacity(members.len());
        for &member in members {
            let rank = self.0.ranks.get(member).copied();
            let rank = rank
                .ok_or_else(|| invalid(format!("rank {member} of a group of {}", self.size())))?;
            if ranks.contains(&rank) {
                return Err(invalid(format!("rank {member} twice in {members:?}")));
            }
            ranks.push(rank);
        }
        let own = members.iter().position(|member| *member == self.rank());
        let own =
            own.ok_or_else(|| invalid(format!("rank {} is not among {members:?}", self.rank())))?;
        self.0.link.check_whole("subgroup")?;
        // Equal on all members, and on no other group of the run.
        let mut children = self
            .0
            .children
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let count = children.entry(members.to_vec()).or_default();
        *count += 1;
        let list: Vec<String> = members.iter().map(usize::to_string).collect();
        let name = format!("{}[{}]#{count}", self.0.name, list.join(","));
        drop(children);
        Self::meet(Arc::clone(&self.0.link), name, ranks, own)
    }

    /// This process among the members, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Number of members.
    pub fn size(&self) -> usize {
        self.0.ranks.len()
    }

    /// The members' ranks in the whole run, in the order of this group.
    pub fn ranks(&self) -> &[usize] {
        &self.0.ranks
    }

    /// This process in the whole run.
    pub fn global_rank(&self) -> usize {
        self.0.link.rendezvous.rank
    }

    /// This process among those of its machine.
    pub fn local_rank(&self) -> usize {
        self.0.link.rendezvous.local_rank
    }

    /// How long an operation may take.
    pub fn limit(&self) -> Duration {
        self.0.link.options.limit
    }

    /// What moves the numbers.
    pub fn backend(&self) -> Backend {
        self.0.link.options.backend
    }

    /// Where tensors must be: the CPU, or the CUDA device of this process's local rank.
    pub fn device(&self) -> Device {
        match self.backend() {
            Backend::Gloo => Device::Cpu,
            Backend::Nccl => Device::Cuda(self.local_rank()),
        }
    }

    /// What this group has done so far.
    pub fn traffic(&self) -> Traffic {
        self.0.traffic.read()
    }

    /// Finds out why an operation failed, and who is to blame.
    pub(super) fn diagnose(&self, failure: &Failure) -> Error {
        self.0.link.diagnose(&self.0.ranks, failure)
    }

    /// What others have noticed.
    pub(super) fn trouble(&self) -> Option<String> {
        self.0.link.trouble()
    }

    /// Whether this is the same group.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// A reducer of the gradients of `params`.
    pub(super) fn reducer(&self, params: &[&Tensor], bucket_bytes: usize) -> Result<Reducer> {
        let operation = "making a reducer";
        self.0.link.check_whole(operation)?;
        let Some(group) = &self.0.backend else {
            let reason = "a group of one has nothing to reduce".to_string();
            return Err(Error::InvalidOperation { operation, reason });
        };
        Reducer::new(group, params, bucket_bytes).map_err(|error| {
            self.diagnose(&Failure {
                operation,
                reason: error.to_string(),
                timed_out: false,
            })
        })
    }

    pub(super) fn count(&self, operation: Operation, bytes: u64) {
        let sent = operation.bytes_sent(bytes, self.size());
        self.0.traffic.add(operation, sent);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let sent = std::mem::take(&mut self.sent).into_inner();
        let sent = sent.unwrap_or_else(PoisonError::into_inner);
        if self.link.is_broken() {
            // Their threads may wait for the others until their own, longer limit.
            std::mem::forget((sent, self.backend.take()));
            return;
        }
        for work in sent {
            let _ = work.wait_whole(); // who was to receive it says what is wrong
        }
    }
}
