//! What the members of a group do together.

use std::sync::PoisonError;

use tch::{Kind, Tensor};

use super::{ProcessGroup, ReduceOp};
use crate::distributed::liveness::Failure;
use crate::distributed::pending::{Pending, PendingShard, Shard};
use crate::distributed::rendezvous::Backend;
use crate::distributed::traffic::Operation;
use crate::ffi::c10d::{Group, Op, Work};
use crate::{Error, Result};

/// Messages that are on their way at once.
const UNDER_WAY: usize = 64;

impl ProcessGroup {
    /// Replaces `tensor` by the sum (or another [`ReduceOp`]) of all members' tensors. All get the
    /// same bytes.
    ///
    /// # Errors
    /// [`Error::InvalidOperation`] for a tensor that cannot be sent; those of [`Pending::wait`].
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<()> {
        self.all_reduce_start(tensor, op)?.wait()
    }

    /// [`all_reduce`](Self::all_reduce), without waiting for its end.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_reduce_start(&self, tensor: &Tensor, op: ReduceOp) -> Result<Pending> {
        let operation = Operation::AllReduce;
        self.check(operation, tensor)?;
        let work = self.start(operation, |group| group.all_reduce(tensor, op.raw()))?;
        self.count(operation, bytes_of(tensor));
        Ok(Pending::new(self, operation, work))
    }

    /// Replaces `tensor` by that of the member `root`.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); [`Error::InvalidOperation`] for a root that there is
    /// not.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<()> {
        let operation = Operation::Broadcast;
        self.check(operation, tensor)?;
        self.check_member(operation, root)?;
        let work = self.start(operation, |group| group.broadcast(tensor, root))?;
        let bytes = if root == self.rank() {
            bytes_of(tensor)
        } else {
            0
        };
        self.count(operation, bytes);
        Pending::new(self, operation, work).wait()
    }

    /// What all members have, in order: `[n, ...]` of tensors `[...]`.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut shape = vec![self.size() as i64];
        shape.extend(tensor.size());
        let gathered = Tensor::f_empty(&shape, (tensor.kind(), tensor.device()))?;
        self.all_gather_start(&gathered, tensor)?.wait()?;
        Ok(gathered)
    }

    /// [`all_gather`](Self::all_gather) into `gathered`, which has n times as many elements, in
    /// the order of the ranks, without waiting for its end. `tensor` may be the part of `gathered`
    /// that it goes to.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); [`Error::InvalidOperation`] for tensors that do not
    /// fit.
    pub fn all_gather_start(&self, gathered: &Tensor, tensor: &Tensor) -> Result<Pending> {
        let operation = Operation::AllGather;
        self.check(operation, tensor)?;
        self.check(operation, gathered)?;
        self.check_parts(operation, gathered, tensor)?;
        if self.size() == 1 {
            let mut gathered = gathered.f_detach()?.f_view(-1)?;
            gathered.f_copy_(&tensor.f_detach()?.f_view(-1)?)?;
        }
        let work = self.start(operation, |group| {
            group.all_gather(&gathered.f_view(-1)?, &tensor.f_view(-1)?)
        })?;
        self.count(operation, bytes_of(gathered));
        Ok(Pending::new(self, operation, work))
    }

    /// This member's part of the sum of all: `[...]` of tensors `[n, ...]`.
    ///
    /// Gloo's own sums everything everywhere. Ours is an all-to-all and a sum, in the order of the
    /// ranks, with f32 in between for 16-bit kinds; it sends half of the bytes.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); [`Error::InvalidOperation`] unless the first dimension
    /// is the number of members.
    pub fn reduce_scatter(&self, tensor: &Tensor) -> Result<Tensor> {
        self.reduce_scatter_start(tensor)?.wait()
    }

    /// [`reduce_scatter`](Self::reduce_scatter), without waiting for its end.
    ///
    /// # Errors
    /// As [`reduce_scatter`](Self::reduce_scatter).
    pub fn reduce_scatter_start(&self, tensor: &Tensor) -> Result<PendingShard> {
        let operation = Operation::ReduceScatter;
        self.check(operation, tensor)?;
        let size = tensor.size();
        if size.first() != Some(&(self.size() as i64)) {
            return Err(invalid(
                operation,
                format!("{size:?} has no row for each of {} ranks", self.size()),
            ));
        }
        let place = (tensor.kind(), tensor.device());
        let (work, shard) = match (self.size(), self.backend()) {
            (1, _) => (None, Shard::Parts(tensor.f_detach()?)),
            (_, Backend::Nccl) => {
                let shard = Tensor::f_empty(&size[1..], place)?;
                let start = |group: &Group| group.reduce_scatter(&shard, tensor, Op::Sum);
                (self.start(operation, start)?, Shard::Summed(shard))
            }
            (members, Backend::Gloo) => {
                let parts = Tensor::f_empty(&size, place)?;
                let rows = vec![1; members];
                let start = |group: &Group| group.all_to_all(&parts, tensor, &rows, &rows);
                (self.start(operation, start)?, Shard::Parts(parts))
            }
        };
        self.count(operation, bytes_of(tensor));
        Ok(PendingShard {
            pending: Pending::new(self, operation, work),
            shard,
        })
    }

    /// Gives every member the rows of its part, and returns what each has for this one, in order.
    /// `rows_to[r]` rows of `tensor` go to member `r`, `rows_from[r]` come from it, which the
    /// members must agree on: `[Σ rows_from, ...]` of tensors `[Σ rows_to, ...]`.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); [`Error::InvalidOperation`] for lists that do not fit.
    pub fn all_to_all(
        &self,
        tensor: &Tensor,
        rows_to: &[usize],
        rows_from: &[usize],
    ) -> Result<Tensor> {
        let operation = Operation::AllToAll;
        self.check(operation, tensor)?;
        let mut size = tensor.size();
        let rows: usize = rows_to.iter().sum();
        let members = self.size();
        let fit = rows_to.len() == members
            && rows_from.len() == members
            && rows_to[self.rank()] == rows_from[self.rank()]
            && size.first() == Some(&(rows as i64));
        if !fit {
            return Err(invalid(
                operation,
                format!("{size:?}, rows to {rows_to:?} and from {rows_from:?}, {members} ranks"),
            ));
        }
        if members == 1 {
            return Ok(tensor.f_detach()?.f_to_dtype(tensor.kind(), false, true)?);
        }
        let own = rows_to[self.rank()];
        let sent = bytes_of(tensor) / rows.max(1) as u64 * (rows - own) as u64;
        size[0] = rows_from.iter().sum::<usize>() as i64;
        let result = Tensor::f_empty(&size, (tensor.kind(), tensor.device()))?;
        let to: Vec<i64> = rows_to.iter().map(|rows| *rows as i64).collect();
        let from: Vec<i64> = rows_from.iter().map(|rows| *rows as i64).collect();
        let work = self.start(operation, |group| {
            group.all_to_all(&result, tensor, &from, &to)
        })?;
        self.0.traffic.add(operation, sent);
        Pending::new(self, operation, work).wait()?;
        Ok(result)
    }

    /// Sends `tensor` to the member `to`, which [receives](Self::recv) it with the same `tag`, and
    /// waits until it is on its way.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); [`Error::InvalidOperation`] for a member that there is
    /// not, or this one.
    pub fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<()> {
        self.send_start(tensor, to, tag)?.wait()
    }

    /// [`send`](Self::send), without waiting.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_start(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Pending> {
        let operation = Operation::Send;
        self.check(operation, tensor)?;
        self.check_other(operation, to)?;
        let work = self.start(operation, |group| group.send(tensor, to, tag))?;
        self.count(operation, bytes_of(tensor));
        Ok(Pending::new(self, operation, work))
    }

    /// [`send`](Self::send) of a tensor that nobody changes, without waiting: the group does, when it
    /// has many under way, or ends.
    pub(in crate::distributed) fn send_and_go_on(
        &self,
        tensor: &Tensor,
        to: usize,
        tag: i32,
    ) -> Result<()> {
        let operation = Operation::Send;
        self.check(operation, tensor)?;
        self.check_other(operation, to)?;
        let work = self.start(operation, |group| group.send(tensor, to, tag))?;
        self.count(operation, bytes_of(tensor));
        let earliest = {
            let mut sent = self.0.sent.lock().unwrap_or_else(PoisonError::into_inner);
            sent.extend(work);
            if sent.len() > UNDER_WAY {
                sent.pop_front()
            } else {
                None
            }
        };
        Pending::new(self, operation, earliest).wait()
    }

    /// Overwrites `tensor` with the one that the member `from` [sends](Self::send), which has the
    /// same shape and kind.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<()> {
        self.recv_start(tensor, from, tag)?.wait()
    }

    /// [`recv`](Self::recv), without waiting for it.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn recv_start(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Pending> {
        let operation = Operation::Receive;
        self.check(operation, tensor)?;
        self.check_other(operation, from)?;
        let work = self.start(operation, |group| group.recv(tensor, from, tag))?;
        self.count(operation, 0);
        Ok(Pending::new(self, operation, work))
    }

    /// Waits until all members are here.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn barrier(&self) -> Result<()> {
        let operation = Operation::Barrier;
        let tensor = Tensor::f_zeros([1], (Kind::Float, self.device()))?;
        let work = self.start(operation, |group| group.all_reduce(&tensor, Op::Sum))?;
        self.count(operation, 0);
        Pending::new(self, operation, work).wait()
    }

    fn start(
        &self,
        operation: Operation,
        start: impl FnOnce(&Group) -> Result<Work>,
    ) -> Result<Option<Work>> {
        self.0.link.check_whole(operation.name())?;
        let Some(group) = &self.0.backend else {
            return Ok(None);
        };
        start(group).map(Some).map_err(|error| {
            self.diagnose(&Failure {
                operation: operation.name(),
                reason: error.to_string(),
                timed_out: false,
            })
        })
    }

    fn check(&self, operation: Operation, tensor: &Tensor) -> Result<()> {
        let kinds = [
            Kind::Float,
            Kind::Double,
            Kind::Half,
            Kind::BFloat16,
            Kind::Int64,
            Kind::Int,
            Kind::Int8,
            Kind::Uint8,
        ];
        let kind = tensor.kind();
        if !kinds.contains(&kind) {
            return Err(invalid(operation, format!("a tensor of kind {kind:?}")));
        }
        if !tensor.is_contiguous() {
            let (size, stride) = (tensor.size(), tensor.stride());
            let reason = format!("a tensor {size:?} with strides {stride:?}, not contiguous");
            return Err(invalid(operation, reason));
        }
        let (device, wanted) = (tensor.device(), self.device());
        if device != wanted && self.size() > 1 {
            let reason = format!("a tensor on {device:?}; this group's are on {wanted:?}");
            return Err(invalid(operation, reason));
        }
        Ok(())
    }

    fn check_parts(&self, operation: Operation, whole: &Tensor, part: &Tensor) -> Result<()> {
        let fit = whole.numel() == part.numel() * self.size() && whole.kind() == part.kind();
        if fit {
            return Ok(());
        }
        let reason = format!(
            "{:?} {:?} is not {} times {:?} {:?}",
            whole.size(),
            whole.kind(),
            self.size(),
            part.size(),
            part.kind()
        );
        Err(invalid(operation, reason))
    }

    fn check_member(&self, operation: Operation, rank: usize) -> Result<()> {
        if rank < self.size() {
            return Ok(());
        }
        let reason = format!("there is no rank {rank} in a group of {}", self.size());
        Err(invalid(operation, reason))
    }

    fn check_other(&self, operation: Operation, rank: usize) -> Result<()> {
        self.check_member(operation, rank)?;
        if rank != self.rank() {
            return Ok(());
        }
        Err(invalid(operation, format!("rank {rank} is this process")))
    }
}

impl ReduceOp {
    fn raw(self) -> Op {
        match self {
            Self::Sum => Op::Sum,
            Self::Product => Op::Product,
            Self::Min => Op::Min,
            Self::Max => Op::Max,
        }
    }
}

fn invalid(operation: Operation, reason: String) -> Error {
    Error::InvalidOperation {
        operation: operation.name(),
        reason,
    }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
