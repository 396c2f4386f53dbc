//! Gradients summed over the processes of a run, and weights handed back.

use rlhf_core::Replicas;
use tch::{Kind, Tensor};

use super::layout::{Layout, Piece, flat, shaped, stepped_kind};
use super::liveness::Failure;
use super::traffic::Operation;
use super::world::Membership;
use super::{Pending, PendingShard, ProcessGroup, ReduceOp, Sharding};
use crate::ffi::reducer::{self, Reducer};
use crate::{Error, Result, ffi};

/// The processes' part in an [`Updater`](crate::Updater).
#[derive(Debug)]
pub(crate) struct Reduction {
    group: ProcessGroup,
    replicas: Replicas,
    sharding: Sharding,
    /// The trainable parameters, in the updater's order.
    params: Vec<Tensor>,
    layout: Layout,
    /// Sums while backward goes on; `None` where nothing is summed so.
    reducer: Option<Reducer>,
    /// Which parameters the reducer sums.
    overlapped: Vec<bool>,
    /// When backward of the last microbatch began and ended here.
    backward: (i64, i64),
}

/// When the gradients of the last update travelled.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OverlapTrace {
    /// Seconds that forward and backward of this process's last microbatch took, the wait for the
    /// last buckets not included.
    pub backward_s: f64,
    /// Buckets that were summed while backward went on, in the order in which they were ready.
    pub buckets: Vec<BucketTrace>,
}

/// One bucket's journey, in seconds since the last microbatch began.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BucketTrace {
    /// Bytes of gradients.
    pub bytes: u64,
    /// When it left.
    pub started_s: f64,
    /// When its sum was there.
    pub ended_s: f64,
}

impl Reduction {
    /// That of the world this process is in; `None` where it is alone. Rank 0's weights become
    /// everybody's.
    pub(crate) fn of_run(params: &[(String, Tensor)]) -> Result<Option<Self>> {
        let Some(membership) = Membership::current() else {
            return Ok(None);
        };
        let Membership {
            group,
            options,
            replicas,
        } = membership;
        let params: Vec<Tensor> = params.iter().map(|(_, p)| p.shallow_clone()).collect();
        let shapes: Vec<u8> =
            format!("{:?}", params.iter().map(Tensor::size).collect::<Vec<_>>()).into_bytes();
        let others = replicas.exchange::<Error>(Ok(shapes.clone()))?;
        if let Some(rank) = others.iter().position(|other| *other != shapes) {
            let message = "its model has other parameters than this process's".to_string();
            return Err(Error::PeerFailed { rank, message });
        }
        for param in &params {
            let mut own = param.f_detach()?;
            let row = flat(&own, &own)?.f_contiguous()?;
            group.broadcast(&row, 0)?;
            own.f_copy_(&shaped(&row, &own)?)?;
        }
        let sizes: Vec<(i64, Kind)> = params
            .iter()
            .map(|p| (p.numel() as i64, p.kind()))
            .collect();
        let layout = Layout::new(&sizes, group.rank(), group.size(), options.bucket_bytes);
        let overlapped: Vec<bool> = params
            .iter()
            .map(|p| options.sharding != Sharding::Gradients && stepped_kind(p.kind()) == p.kind())
            .collect();
        let summed: Vec<&Tensor> = params
            .iter()
            .zip(&overlapped)
            .filter_map(|(param, overlapped)| overlapped.then_some(param))
            .collect();
        let reducer = match summed.is_empty() {
            true => None,
            false => Some(group.reducer(&summed, options.bucket_bytes)?),
        };
        Ok(Some(Self {
            group,
            replicas,
            sharding: options.sharding,
            params,
            layout,
            reducer,
            overlapped,
            backward: (0, 0),
        }))
    }

    pub(crate) fn replicas(&self) -> &Replicas {
        &self.replicas
    }

    pub(super) fn group(&self) -> &ProcessGroup {
        &self.group
    }

    pub(super) fn params(&self) -> &[Tensor] {
        &self.params
    }

    /// What is stepped here, where that is not everything.
    pub(super) fn shards(&self) -> Option<&Layout> {
        (self.sharding != Sharding::Nothing).then_some(&self.layout)
    }

    /// Comes before the backward of this process's last microbatch.
    pub(crate) fn arm(&mut self) -> Result<()> {
        self.backward = (reducer::now(), 0);
        let Some(reducer) = &mut self.reducer else {
            return Ok(());
        };
        let armed = reducer.arm();
        armed.map_err(|error| self.explain(error))
    }

    /// Comes after this process's last backward, or where it had none or failed: the sums of the
    /// other processes need it all the same.
    pub(crate) fn complete(&mut self) -> Result<()> {
        self.backward.1 = reducer::now();
        let Some(reducer) = &mut self.reducer else {
            return Ok(());
        };
        let completed = reducer.complete();
        completed.map_err(|error| self.explain(error))?;
        if let Some(reducer) = &self.reducer {
            for event in reducer.trace() {
                self.group.count(Operation::AllReduce, event.bytes as u64);
            }
        }
        Ok(())
    }

    /// An error of backward may be that of a process that is gone.
    pub(crate) fn explain(&self, error: Error) -> Error {
        let text = error.to_string();
        let of_the_net = ["gloo", "NCCL", "onnection", "imed out", "socket", "peer"];
        if !of_the_net.iter().any(|part| text.contains(part)) {
            return error;
        }
        self.group.diagnose(&Failure {
            operation: Operation::AllReduce.name(),
            timed_out: text.contains("imed out"),
            reason: text,
        })
    }

    /// The sums, one for each parameter or piece that is stepped here. `grads` has this process's
    /// gradients, and the sums of those that the reducer has summed already; `present` says which parameters
    /// have one anywhere.
    pub(crate) fn sum(
        &self,
        mut grads: Vec<Option<Tensor>>,
        present: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        for (grad, present) in grads.iter_mut().zip(present) {
            if !present {
                *grad = None; // zeros that completed a bucket
            }
        }
        match self.sharding {
            Sharding::Nothing => self.sum_everywhere(grads, present),
            Sharding::Optimizer => {
                let grads = self.sum_everywhere(grads, present)?;
                let cut = |piece: &Piece| -> Result<Option<Tensor>> {
                    let Some(grad) = &grads[piece.param] else {
                        return Ok(None);
                    };
                    let row = flat(grad, &self.params[piece.param])?;
                    Ok(Some(row.f_narrow(0, piece.from, piece.length)?))
                };
                self.layout.pieces.iter().map(cut).collect()
            }
            Sharding::Gradients => self.sum_in_parts(grads, present),
        }
    }

    /// All-reduces the gradients that the reducer has not, a bucket on its way while the next is
    /// filled.
    fn sum_everywhere(
        &self,
        mut grads: Vec<Option<Tensor>>,
        present: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut under_way: Option<(usize, Tensor, Pending)> = None;
        for bucket in 0..=self.layout.buckets.len() {
            let next = match self.layout.buckets.get(bucket) {
                Some(b) if b.members.iter().any(|m| !self.overlapped[m.param]) => {
                    let row = self.fill(bucket, &mut grads)?;
                    let pending = self.group.all_reduce_start(&row, ReduceOp::Sum)?;
                    Some((bucket, row, pending))
                }
                _ => None,
            };
            if let Some((bucket, row, pending)) = std::mem::replace(&mut under_way, next) {
                pending.wait()?;
                for member in &self.layout.buckets[bucket].members {
                    if present[member.param] && !self.overlapped[member.param] {
                        let part = row.f_narrow(0, member.start, member.length)?;
                        grads[member.param] = Some(shaped(&part, &self.params[member.param])?);
                    }
                }
            }
        }
        Ok(grads)
    }

    /// Reduce-scatters all gradients, freeing them on the way.
    fn sum_in_parts(
        &self,
        mut grads: Vec<Option<Tensor>>,
        present: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut pieces: Vec<Option<Tensor>> = self.layout.pieces.iter().map(|_| None).collect();
        let mut under_way: Option<(usize, PendingShard)> = None;
        for bucket in 0..=self.layout.buckets.len() {
            let next = match self.layout.buckets.get(bucket) {
                Some(b) => {
                    let row = self.fill(bucket, &mut grads)?;
                    let rows = row.f_view([self.group.size() as i64, b.part])?;
                    Some((bucket, self.group.reduce_scatter_start(&rows)?))
                }
                None => None,
            };
            if let Some((bucket, pending)) = std::mem::replace(&mut under_way, next) {
                let part = pending.wait()?;
                for (index, piece) in self.layout.pieces_of(bucket) {
                    if present[piece.param] {
                        pieces[index] = Some(part.f_narrow(0, piece.at, piece.length)?);
                    }
                }
            }
        }
        Ok(pieces)
    }

    /// The gradients of a bucket in a row, zeros for those that there are not. They are freed.
    fn fill(&self, bucket: usize, grads: &mut [Option<Tensor>]) -> Result<Tensor> {
        let bucket = &self.layout.buckets[bucket];
        let device = self.params[bucket.members[0].param].device();
        let length = bucket.part * self.group.size() as i64;
        let row = Tensor::f_zeros([length], (stepped_kind(bucket.kind), device))?;
        for member in &bucket.members {
            if self.overlapped[member.param] {
                continue;
            }
            if let Some(grad) = grads[member.param].take() {
                let param = &self.params[member.param];
                let mut place = row.f_narrow(0, member.start, member.length)?;
                place.f_copy_(&flat(&grad, param)?)?;
                ffi::clear_grads(&[param])?;
            }
        }
        Ok(row)
    }

    /// When buckets travelled in the last update, and backward went on.
    pub(crate) fn trace(&self) -> OverlapTrace {
        let (start, end) = self.backward;
        let seconds = |at: i64| (at - start) as f64 / 1e9;
        let events = self.reducer.as_ref().map(Reducer::trace);
        let buckets = events.unwrap_or_default().into_iter();
        OverlapTrace {
            backward_s: seconds(end),
            buckets: buckets
                .map(|event| BucketTrace {
                    bytes: event.bytes as u64,
                    started_s: seconds(event.started),
                    ended_s: seconds(event.ended),
                })
                .collect(),
        }
    }

    /// The norm of all gradients from the norm of those that are stepped here.
    pub(crate) fn norm(&self, own: f64) -> Result<f64> {
        if self.sharding == Sharding::Nothing {
            return Ok(own);
        }
        Ok(self.replicas.sum::<Error>(Ok(vec![own * own]))?[0].sqrt())
    }

    /// The least of what the processes say.
    pub(crate) fn least(&self, own: usize) -> Result<usize> {
        let all = self
            .replicas
            .exchange::<Error>(Ok(own.to_le_bytes().to_vec()))?;
        let numbers = all
            .iter()
            .filter_map(|bytes| bytes.as_slice().try_into().ok());
        Ok(numbers.map(usize::from_le_bytes).min().unwrap_or(own))
    }

    /// Hands the weights that were stepped here to the others, and takes theirs.
    pub(crate) fn share_weights(&self) -> Result<()> {
        if self.sharding == Sharding::Nothing {
            return Ok(());
        }
        let rows: Vec<Tensor> = self
            .params
            .iter()
            .map(|p| flat(p, p))
            .collect::<Result<_>>()?;
        let own = |piece: &Piece| -> Result<Tensor> {
            Ok(rows[piece.param].f_narrow(0, piece.from, piece.length)?)
        };
        let pieces: Vec<Tensor> = self.layout.pieces.iter().map(own).collect::<Result<_>>()?;
        self.gather(
            &pieces,
            |kind| kind,
            |param, row| {
                let mut target = rows[param].shallow_clone();
                Ok(target.f_copy_(row)?)
            },
        )
    }

    /// Puts together what each process has of each parameter, given as one tensor for each of its
    /// pieces, whose kind is `kind` of the parameter's.
    pub(super) fn gather(
        &self,
        pieces: &[Tensor],
        kind: fn(Kind) -> Kind,
        mut take: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let size = self.group.size() as i64;
        let mut under_way: Option<(usize, Tensor, Pending)> = None;
        for index in 0..=self.layout.buckets.len() {
            let next = match self.layout.buckets.get(index) {
                Some(bucket) => {
                    let device = self.params[bucket.members[0].param].device();
                    let place = (kind(bucket.kind), device);
                    let part = Tensor::f_zeros([bucket.part], place)?;
                    for (at, piece) in self.layout.pieces_of(index) {
                        let mut target = part.f_narrow(0, piece.at, piece.length)?;
                        target.f_copy_(&pieces[at])?;
                    }
                    let row = Tensor::f_empty([size * bucket.part], place)?;
                    let pending = self.group.all_gather_start(&row, &part)?;
                    Some((index, row, pending))
                }
                None => None,
            };
            if let Some((index, row, pending)) = std::mem::replace(&mut under_way, next) {
                pending.wait()?;
                for member in &self.layout.buckets[index].members {
                    take(member.param, &row.f_narrow(0, member.start, member.length)?)?;
                }
            }
        }
        Ok(())
    }
}
