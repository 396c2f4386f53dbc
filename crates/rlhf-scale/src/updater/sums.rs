//! What several processes, or the stages of a model, make of their gradients and losses together.

use std::fmt::Display;

use tch::Tensor;

use super::{Gradients, Losses, Updater, shards};
use crate::gradients::grad_of;
use crate::{Error, Result};

impl Updater {
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
}

/// What a process tells the others: which parameters have a gradient here, and its losses.
fn message(losses: &[f32], present: &[bool]) -> Vec<u8> {
    let flags = present.iter().map(|present| u8::from(*present));
    let losses = losses.iter().flat_map(|loss| loss.to_le_bytes());
    flags.chain(losses).collect()
}
