//! Forward and backward of a process's own microbatches.

use std::collections::VecDeque;
use std::ops::Range;

use rand_chacha::rand_core::RngCore;
use rlhf_core::{ParameterShards, PipelineStage, RngStreams};
use tch::{Kind, Tensor};

use super::{Updater, is_half, shards};
use crate::gradients::grad_of;
use crate::{Error, Result, ffi};

impl Updater {
    /// Forward and backward of this process's microbatches.
    pub(super) fn backward_all<E: From<Error>>(
        &mut self,
        share: Range<usize>,
        mut loss: impl FnMut(usize) -> Result<Tensor, E>,
        sums: &mut [Option<Tensor>],
    ) -> Result<Vec<Tensor>, E> {
        let mut losses = Vec::with_capacity(share.len());
        let mut seeds = RngStreams::new(self.config.seed).stream("update/losses", self.step);
        // One forward, one backward, by turns; a stage of a pipeline is some forwards ahead, so that the
        // later ones have what to do (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
        let ahead = self.stage().map_or(0, PipelineStage::ahead);
        let mut waiting = VecDeque::with_capacity(ahead + 1);
        let end = share.end;
        for microbatch in 0..end {
            let seed = seeds.next_u64() as i64;
            if microbatch < share.start {
                continue;
            }
            tch::manual_seed(seed);
            waiting.push_back((microbatch, loss(microbatch)?));
            if waiting.len() > ahead
                && let Some((earlier, loss)) = waiting.pop_front()
            {
                losses.push(self.backward_next(earlier, &loss, earlier + 1 == end, sums)?);
            }
        }
        for (microbatch, loss) in waiting {
            losses.push(self.backward_next(microbatch, &loss, microbatch + 1 == end, sums)?);
        }
        Ok(losses)
    }

    fn backward_next(
        &mut self,
        microbatch: usize,
        loss: &Tensor,
        last: bool,
        sums: &mut [Option<Tensor>],
    ) -> Result<Tensor> {
        if let (true, Some(reduction)) = (last, &mut self.reduction) {
            reduction.arm()?;
        }
        let loss = self.backward_one(microbatch, loss)?;
        self.drain_half_grads(sums)?;
        Ok(loss)
    }

    /// The stage of a pipeline that this rank has.
    pub(super) fn stage(&self) -> Option<&PipelineStage> {
        self.shards.as_ref().and_then(ParameterShards::stage)
    }

    /// Checks and backpropagates one loss; returns it detached, as f32, still on its device.
    fn backward_one(&self, microbatch: usize, loss: &Tensor) -> Result<Tensor> {
        if loss.numel() != 1 {
            return Err(Error::LossShape {
                microbatch,
                shape: loss.size(),
            });
        }
        if !loss.requires_grad() {
            return Err(Error::LossWithoutGraph { microbatch });
        }
        match &self.scaler {
            Some(scaler) => scaler.backward(loss),
            None => loss.f_backward().map_err(Error::from),
        }
        .map_err(|error| match &self.reduction {
            Some(reduction) => reduction.explain(error),
            None => error,
        })?;
        Ok(loss.f_detach()?.f_to_kind(Kind::Float)?.f_reshape([])?)
    }

    /// Moves the gradients of 16-bit parameters into f32 sums, where small ones are not lost. Each is
    /// freed as soon as it is added, so that there is never a whole set of both.
    fn drain_half_grads(&self, sums: &mut [Option<Tensor>]) -> Result<()> {
        for ((_, param), sum) in self.params.iter().zip(sums) {
            if !is_half(param) {
                continue;
            }
            let Some(grad) = grad_of(param)? else {
                continue;
            };
            ffi::clear_grads(&[param])?;
            let grad = grad.f_to_kind(Kind::Float)?;
            match sum {
                Some(sum) => {
                    let _ = sum.f_add_(&grad)?;
                }
                None => *sum = Some(grad),
            }
        }
        Ok(())
    }

    /// One gradient for each parameter that has one: the f32 sum of a 16-bit parameter, the
    /// gradient itself of another; with the other stage's, where a stage has the weight too.
    pub(super) fn collect_grads(&self, sums: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        let grads = self.params.iter().zip(sums);
        let mut grads = grads
            .map(|((_, param), sum)| match sum {
                Some(sum) => Ok(Some(sum)),
                None => grad_of(param),
            })
            .collect::<Result<Vec<_>>>()?;
        if let Some(stage) = self.stage() {
            shards::sum_tied(stage, &self.params, &mut grads)?;
        }
        Ok(grads)
    }
}
