//! Process groups as models on several ranks see them.

use rlhf_core::{Collective, Reduction};
use tch::Tensor;

use super::{ProcessGroup, ReduceOp};

/// Messages between stages, which come in order.
const TAG: i32 = 1;

impl Collective for ProcessGroup {
    fn rank(&self) -> usize {
        ProcessGroup::rank(self)
    }

    fn size(&self) -> usize {
        ProcessGroup::size(self)
    }

    fn all_reduce(&self, tensor: &Tensor, reduction: Reduction) -> rlhf_core::Result<()> {
        let op = match reduction {
            Reduction::Sum => ReduceOp::Sum,
            Reduction::Max => ReduceOp::Max,
        };
        Ok(ProcessGroup::all_reduce(self, tensor, op)?)
    }

    fn all_gather(&self, tensor: &Tensor) -> rlhf_core::Result<Vec<Tensor>> {
        let all = ProcessGroup::all_gather(self, &tensor.f_detach()?.f_contiguous()?)?;
        Ok(all.f_unbind(0)?)
    }

    fn broadcast(&self, tensor: &Tensor, from: usize) -> rlhf_core::Result<()> {
        Ok(ProcessGroup::broadcast(self, tensor, from)?)
    }

    fn send(&self, tensor: &Tensor, to: usize) -> rlhf_core::Result<()> {
        // A copy, since it may be on its way when the caller goes on.
        let copy = tensor.f_detach()?.f_contiguous()?;
        let copy = copy.f_to_dtype(copy.kind(), false, true)?;
        Ok(self.send_and_go_on(&copy, to, TAG)?)
    }

    fn receive(&self, tensor: &Tensor, from: usize) -> rlhf_core::Result<()> {
        Ok(self.recv(tensor, from, TAG)?)
    }
}
