//! The optimiser step, once the gradients are there.

use tch::Tensor;

use super::{Gradients, Losses, UpdateStats, Updater, shards};
use crate::gradients::{self, Norm};
use crate::{Ema, Error, LossScaler, Result, ffi};

impl Updater {
    pub(super) fn apply(&mut self, gradients: Gradients) -> Result<UpdateStats> {
        let Gradients { losses, grads } = gradients;
        let present: Vec<&Tensor> = grads.iter().flatten().collect();
        if present.is_empty() && self.reduction.is_none() {
            return Err(Error::NoGradients {
                parameters: self.params.len(),
            });
        }
        if let Some(scaler) = &self.scaler {
            // As GradScaler has it: by the reciprocal, rounded to f32.
            ffi::scale_all(&present, f64::from((1.0 / scaler.scale()) as f32))?;
        }
        let norm = match &self.shards {
            Some(shards) => {
                let name = |index: usize| self.params[self.param_of(index)].0.as_str();
                let named = grads.iter().enumerate();
                let named = named.filter_map(|(i, grad)| Some((name(i), grad.as_ref()?)));
                shards::grad_norm(shards, self.device(), named)?
            }
            None if present.is_empty() => Tensor::from(0f32),
            None => gradients::grad_norm(&present, Norm::L2)?,
        };
        let (losses, grad_norm) = match (losses, &self.reduction) {
            (Losses::Known(losses), Some(reduction)) => {
                (losses, reduction.norm(f64::try_from(&norm)?)?)
            }
            (Losses::Known(losses), None) => (losses, f64::try_from(&norm)?),
            (Losses::OnDevice(losses), _) => read_once(&losses, &norm)?,
        };
        let loss: f64 = losses.iter().sum();
        if let Some(microbatch) = losses.iter().position(|loss| !loss.is_finite()) {
            return Err(Error::NonFiniteLoss { loss, microbatch });
        }
        if !grad_norm.is_finite() {
            return self.skip(&grads, loss);
        }
        let clip = self.config.max_grad_norm;
        let clip = clip.map_or(1.0, |most| gradients::clip_factor(grad_norm, most));
        let mut stats = self.stats(loss, grad_norm);
        // What averaging allocates comes before the weights move.
        let averaged = self.ema.as_ref().map(Ema::ready).transpose()?;
        if !present.is_empty() {
            let lr_factor = self.config.schedule.factor(self.step);
            self.optimizer.step_with(&grads, clip, lr_factor)?;
        }
        if let Some(reduction) = &self.reduction {
            reduction.share_weights()?;
        }
        if let Some(scaler) = &mut self.scaler {
            scaler.succeeded();
        }
        if let (Some(ema), Some(sources)) = (&mut self.ema, averaged) {
            ema.advance(&sources)?;
        }
        self.step += 1;
        stats.step = self.step;
        Ok(stats)
    }

    /// Skips the update if a lower loss scale may mend what is wrong with the gradients.
    fn skip(&mut self, grads: &[Option<Tensor>], loss: f64) -> Result<UpdateStats> {
        let mut stats = self.stats(loss, f64::INFINITY);
        let mut error = self.blame(grads, loss);
        if let Some(shards) = &self.shards {
            error = shards::blame(shards, self.device(), error, loss)?;
        }
        let Some(scaler) = &mut self.scaler else {
            return Err(error);
        };
        match error {
            Error::NonFiniteGradient { .. } if scaler.overflowed() => {
                stats.skipped = true;
                stats.skipped_steps = scaler.skipped_steps();
                Ok(stats)
            }
            Error::NonFiniteGradient { parameter, loss } => Err(Error::LossScaleExhausted {
                parameter,
                loss,
                scale: scaler.scale(),
                floor: scaler.floor(),
            }),
            error => Err(error),
        }
    }

    /// The stats of an update that has not moved anything yet.
    fn stats(&self, loss: f64, grad_norm: f64) -> UpdateStats {
        let scaler = self.scaler.as_ref();
        UpdateStats {
            loss,
            grad_norm,
            lr: self.lr(),
            step: self.step,
            skipped: false,
            loss_scale: scaler.map(LossScaler::scale),
            skipped_steps: scaler.map_or(0, LossScaler::skipped_steps),
        }
    }

    /// Which gradient made the norm not finite.
    fn blame(&self, grads: &[Option<Tensor>], loss: f64) -> Error {
        match self.first_not_finite(grads) {
            Ok(Some(parameter)) => Error::NonFiniteGradient { parameter, loss },
            Ok(None) => Error::NormOverflow { loss },
            Err(error) => error,
        }
    }

    fn first_not_finite(&self, grads: &[Option<Tensor>]) -> Result<Option<String>> {
        let mut first = usize::MAX;
        for (index, grad) in grads.iter().enumerate() {
            let Some(grad) = grad else { continue };
            if !bool::try_from(grad.f_isfinite()?.f_all()?)? {
                first = self.param_of(index);
                break;
            }
        }
        if let Some(reduction) = &self.reduction {
            first = reduction.least(first)?;
        }
        Ok(self.params.get(first).map(|(name, _)| name.clone()))
    }

    /// The parameter that a stretch of the optimiser belongs to.
    fn param_of(&self, stretch: usize) -> usize {
        match &self.reduction {
            Some(reduction) => reduction.param_of(stretch),
            None => stretch,
        }
    }
}

/// Brings losses and norm to the host in one transfer.
fn read_once(losses: &[Tensor], norm: &Tensor) -> Result<(Vec<f64>, f64)> {
    let mut scalars = losses
        .iter()
        .map(|loss| loss.f_to_device(norm.device()))
        .collect::<Result<Vec<_>, _>>()?;
    scalars.push(norm.shallow_clone());
    let mut numbers = Vec::<f32>::try_from(Tensor::f_stack(&scalars, 0)?)?;
    let norm = numbers.pop().map_or(0.0, f64::from);
    Ok((numbers.into_iter().map(f64::from).collect(), norm))
}
