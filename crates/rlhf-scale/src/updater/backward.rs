//! Gradients: of a process's microbatches, and summed over all.

use std::collections::VecDeque;
use std::fmt::Display;
use std::ops::Range;

use rand_chacha::rand_core::RngCore;
use rlhf_core::{ParameterShards, PipelineStage, RngStreams};
use tch::{Kind, Tensor};

use super::{Gradients, Losses, Updater, is_half, shards};
use crate::gradients::grad_of;
use crate::{AdamW, Error, Result, ffi};

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
        let kept = self.keeps_bf16(&share);
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
                let loss = self.backward_next(earlier, &loss, earlier + 1 == end)?;
                self.drain_half_grads(sums, kept)?;
                losses.push(loss);
            }
        }
        for (microbatch, loss) in waiting {
            let loss = self.backward_next(microbatch, &loss, microbatch + 1 == end)?;
            self.drain_half_grads(sums, kept)?;
            losses.push(loss);
        }
        Ok(losses)
    }

    fn backward_next(&mut self, microbatch: usize, loss: &Tensor, last: bool) -> Result<Tensor> {
        if let (true, Some(reduction)) = (last, &mut self.reduction) {
            reduction.arm()?;
        }
        self.backward_one(microbatch, loss)
    }

    /// Whether bf16 gradients stay as backward leaves them until the step reads them: nothing is added
    /// to them, by this process or another.
    fn keeps_bf16(&self, share: &Range<usize>) -> bool {
        let alone = self.reduction.is_none() && self.shards.is_none();
        share.len() == 1
            && alone
            && self.scaler.is_none()
            && AdamW::reads_bf16_gradients(self.device())
    }

    /// The stage of a pipeline that this rank has.
    pub(super) fn stage(&self) -> Option<&PipelineStage> {
        self.shards.as_ref().and_then(ParameterShards::stage)
    }

    /// The losses of the last stage, in all.
    pub(super) fn share_losses(&self, losses: Vec<Tensor>) -> Result<Vec<Tensor>> {
        match self.stage() {
            Some(stage) if !losses.is_empty() => shards::share_losses(stage, &losses),
            _ => Ok(losses),
        }
    }

    /// Sums over all processes. What fails here before all have been heard is kept back until then,
    /// so that none waits for another.
    pub(super) fn reduce<E: From<Error> + Display>(
        &mut self,
        losses: Result<Vec<Tensor>, E>,
        sums: Vec<Option<Tensor>>,
        go_on: impl FnOnce() -> Result<(), E>,
    ) -> Result<Gradients, E> {
        let Some(reduction) = &mut self.reduction else {
            let losses = Losses::OnDevice(losses?);
            let grads = sums;
            return Ok(Gradients { losses, grads });
        };
        let mut present = Vec::with_capacity(self.params.len());
        for ((_, param), sum) in self.params.iter().zip(&sums) {
            present.push(sum.is_some() || grad_of(param)?.is_some());
        }
        let completed = reduction.complete();
        let own = losses.and_then(|losses| {
            completed?;
            let losses = match losses.is_empty() {
                true => Vec::new(),
                false => Vec::<f32>::try_from(Tensor::f_stack(&losses, 0).map_err(Error::from)?)
                    .map_err(Error::from)?,
            };
            Ok(message(&losses, &present))
        });
        let parameters = self.params.len();
        let mut losses = Vec::new();
        present = vec![false; parameters];
        let handed_in = match &own {
            Ok(bytes) => Ok(bytes.clone()),
            Err(error) => Err(Error::LossFailed(error.to_string())),
        };
        let heard = self.replicas.exchange::<Error>(handed_in);
        own?;
        for bytes in heard? {
            let (flags, numbers) = bytes.split_at(parameters.min(bytes.len()));
            for (present, flag) in present.iter_mut().zip(flags) {
                *present |= *flag == 1;
            }
            let number = |b: &[u8]| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            losses.extend(numbers.chunks_exact(4).map(number));
        }
        go_on()?;
        let grads = self.collect_grads(sums)?;
        // NoGradients must be everybody's, whoever has which pieces.
        if !present.contains(&true) {
            return Err(Error::NoGradients { parameters }.into());
        }
        let grads = match &self.reduction {
            Some(reduction) => reduction.sum(grads, &present)?,
            None => grads,
        };
        let losses = Losses::Known(losses);
        Ok(Gradients { losses, grads })
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
    /// freed as soon as it is added, so that there is never a whole set of both. Those of bf16 stay
    /// where they are if they are `kept`.
    fn drain_half_grads(&self, sums: &mut [Option<Tensor>], kept: bool) -> Result<()> {
        for ((_, param), sum) in self.params.iter().zip(sums) {
            if !is_half(param) || (kept && param.kind() == Kind::BFloat16) {
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

    /// One gradient for each parameter that has one: the f32 sum of a 16-bit parameter, where there is
    /// one, and else the gradient itself; with the other stage's, where a stage has the weight too.
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

/// What a process tells the others: which parameters have a gradient here, and its losses.
fn message(losses: &[f32], present: &[bool]) -> Vec<u8> {
    let flags = present.iter().map(|present| u8::from(*present));
    let losses = losses.iter().flat_map(|loss| loss.to_le_bytes());
    flags.chain(losses).collect()
}
