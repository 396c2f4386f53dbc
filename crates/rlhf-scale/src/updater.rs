//! The update path that every trainer uses.

mod files;
mod shards;
mod stats;

use std::collections::VecDeque;

use rand_chacha::rand_core::RngCore;
use rlhf_core::{Error as CoreError, ParameterShards, Parameters, PipelineStage, RngStreams};
use tch::{Device, Kind, Tensor};

use crate::gradients::{self, Norm, grad_of};
use crate::{AdamW, Ema, Error, LossScaler, Result, UpdateConfig, ffi};

pub use stats::UpdateStats;

/// Turns microbatch losses into one optimiser step: backward after each loss, finite check,
/// clipping, AdamW, schedule, averaged weights.
///
/// A step that fails changes nothing: the weights, the moments and the schedule are what they were,
/// and no gradient is left behind. Gradients of 16-bit parameters are accumulated in f32.
///
/// With loss scaling ([`UpdateConfig::loss_scale`]) backward starts from the scale, and the f32
/// sums of the gradients are divided by it before anything looks at them. Gradients that are not
/// finite are then expected now and then: the step is skipped, which is no error. A skipped step
/// changes the loss scale and the count of skipped steps, and nothing else; like transformers' it
/// does not count as a step of the schedule. A *loss* that is not finite is an error in any case,
/// since no scale would mend it.
///
/// ```
/// use rlhf_scale::{Error, UpdateConfig, Updater};
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Error> {
/// let weight = Tensor::ones([3, 1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let mut updater = Updater::new(
///     vec![("weight".to_string(), weight.shallow_clone())],
///     &UpdateConfig::default(),
/// )?;
///
/// // Eight rows in two microbatches: each loss is a sum over its rows, divided by all eight.
/// let inputs = Tensor::ones([8, 3], (Kind::Float, Device::Cpu));
/// let stats = updater.update::<Error>(2, |i| {
///     let rows = inputs.narrow(0, 4 * i as i64, 4);
///     Ok(rows.matmul(&weight).square().sum(Kind::Float) / 8)
/// })?;
/// assert_eq!((stats.loss, stats.step), (9.0, 1));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Updater {
    params: Vec<(String, Tensor)>,
    optimizer: AdamW,
    config: UpdateConfig,
    step: u64,
    scaler: Option<LossScaler>,
    ema: Option<Ema>,
    shards: Option<ParameterShards>,
}

impl Updater {
    /// [`Updater::new`] of a model's parameters, which may lie on several ranks: the gradient norm is
    /// that of all ranks' then, each weight counted once, and a gradient that is not finite on one rank
    /// stops all of them.
    ///
    /// # Errors
    /// Those of [`Updater::new`].
    pub fn of(model: &(impl Parameters + ?Sized), config: &UpdateConfig) -> Result<Self> {
        let mut updater = Self::new(model.named_parameters(), config)?;
        updater.set_shards(model.parameter_shards());
        Ok(updater)
    }

    /// How the parameters lie on several ranks, where a rank has only a part of them: see
    /// [`Updater::of`].
    pub fn set_shards(&mut self, shards: Option<ParameterShards>) {
        self.shards = shards;
    }

    /// An updater of `params`, which alias the weights that the losses are computed with
    /// ([`Parameters::named_parameters`](rlhf_core::Parameters::named_parameters)).
    ///
    /// # Errors
    /// If the config is invalid or a parameter cannot be trained: see [`AdamW::new`].
    pub fn new(mut params: Vec<(String, Tensor)>, config: &UpdateConfig) -> Result<Self> {
        config.validate()?;
        // By name, so that neither sums nor files depend on the order of the caller's list.
        params.sort_by(|a, b| a.0.cmp(&b.0));
        let aliases = || {
            let alias = |(name, param): &(String, Tensor)| (name.clone(), param.shallow_clone());
            params.iter().map(alias).collect::<Vec<_>>()
        };
        let optimizer = AdamW::new(aliases(), &config.optimizer)?;
        let scaler = config.loss_scale.as_ref().map(LossScaler::new);
        let ema = config
            .ema
            .as_ref()
            .map(|ema| Ema::of_sources(aliases(), optimizer.weights(), ema));
        Ok(Self {
            scaler: scaler.transpose()?,
            ema: ema.transpose()?,
            optimizer,
            params,
            config: config.clone(),
            step: 0,
            shards: None,
        })
    }

    /// The options this updater was made with.
    pub fn config(&self) -> &UpdateConfig {
        &self.config
    }

    /// The parameters, sorted by name.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.params
    }

    /// Updates done so far, skipped ones not included.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The learning rate of the next update, before the groups' own.
    pub fn lr(&self) -> f64 {
        self.config.optimizer.lr * self.config.schedule.factor(self.step)
    }

    /// The loss scale and how often it was too large, where [`UpdateConfig::loss_scale`] is set.
    pub fn loss_scaler(&self) -> Option<&LossScaler> {
        self.scaler.as_ref()
    }

    /// The averaged weights, where [`UpdateConfig::ema`] is set.
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_ref()
    }

    /// One optimiser step on the sum of the losses that `loss(0)`, …, `loss(microbatches - 1)`
    /// return.
    ///
    /// Each is a scalar that depends on the parameters; backward follows before the next is asked
    /// for, so only one graph is alive at a time. For a mean, divide each microbatch's sum by the
    /// count of the whole batch: then the split does not change the result. Gradients that were
    /// there before are dropped. Parameters that get no gradient are skipped.
    ///
    /// Before each loss libtorch's generators are seeded from the configuration's seed, the step
    /// and the microbatch. What a loss draws from them, dropout for one, depends on nothing else,
    /// so that a resumed run draws what an uninterrupted one does.
    ///
    /// The host waits for the device once, to read losses and norm.
    ///
    /// # Errors
    /// What `loss` returns; [`Error::NonFiniteLoss`], [`Error::NonFiniteGradient`] or
    /// [`Error::NormOverflow`] when the numbers are unusable; with loss scaling
    /// [`Error::LossScaleExhausted`] in place of the second, where skipping has come to an end;
    /// [`Error::NoGradients`], [`Error::LossShape`] or [`Error::LossWithoutGraph`] when the losses
    /// are wrong; [`Error::EmaApplied`] if averages were left in the place of the weights;
    /// libtorch's error when backward fails. Nothing is updated then.
    pub fn update<E: From<Error>>(
        &mut self,
        microbatches: usize,
        loss: impl FnMut(usize) -> Result<Tensor, E>,
    ) -> Result<UpdateStats, E> {
        let outcome = self.try_update(microbatches, loss);
        let cleared = self.clear_grads();
        let stats = outcome?;
        cleared?;
        Ok(stats)
    }

    fn try_update<E: From<Error>>(
        &mut self,
        microbatches: usize,
        mut loss: impl FnMut(usize) -> Result<Tensor, E>,
    ) -> Result<UpdateStats, E> {
        if microbatches == 0 {
            let error = CoreError::Empty {
                what: "the update",
                help: "give it at least one microbatch",
            };
            return Err(Error::from(error).into());
        }
        if let Some(ema) = &self.ema {
            ema.check_not_applied()?;
        }
        self.clear_grads()?;
        let mut losses = Vec::with_capacity(microbatches);
        let mut sums: Vec<Option<Tensor>> = self.params.iter().map(|_| None).collect();
        let mut seeds = RngStreams::new(self.config.seed).stream("update/losses", self.step);
        let stage = self.shards.as_ref().and_then(ParameterShards::stage);
        // One forward, one backward, by turns; a stage of a pipeline is some forwards ahead, so that the
        // later ones have what to do (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
        let ahead = stage.map_or(0, PipelineStage::ahead);
        let mut waiting = VecDeque::with_capacity(ahead + 1);
        for microbatch in 0..microbatches {
            tch::manual_seed(seeds.next_u64() as i64);
            waiting.push_back((microbatch, loss(microbatch)?));
            if waiting.len() > ahead
                && let Some((earlier, loss)) = waiting.pop_front()
            {
                losses.push(self.backward_one(earlier, &loss)?);
                self.drain_half_grads(&mut sums)?;
            }
        }
        for (microbatch, loss) in waiting {
            losses.push(self.backward_one(microbatch, &loss)?);
            self.drain_half_grads(&mut sums)?;
        }
        let mut grads = self.collect_grads(sums)?;
        if let Some(stage) = stage {
            shards::sum_tied(stage, &self.params, &mut grads)?;
            losses = shards::share_losses(stage, &losses)?;
        }
        Ok(self.apply(&losses, &grads)?)
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
            Some(scaler) => scaler.backward(loss)?,
            None => loss.f_backward()?,
        }
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
    /// gradient itself of another.
    fn collect_grads(&self, sums: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        self.params
            .iter()
            .zip(sums)
            .map(|((_, param), sum)| match sum {
                Some(sum) => Ok(Some(sum)),
                None => grad_of(param),
            })
            .collect()
    }

    fn apply(&mut self, losses: &[Tensor], grads: &[Option<Tensor>]) -> Result<UpdateStats> {
        let present: Vec<&Tensor> = grads.iter().flatten().collect();
        if present.is_empty() {
            return Err(Error::NoGradients {
                parameters: self.params.len(),
            });
        }
        if let Some(scaler) = &self.scaler {
            // As GradScaler has it: by the reciprocal, rounded to f32.
            ffi::scale_all(&present, f64::from((1.0 / scaler.scale()) as f32))?;
        }
        let norm = match &self.shards {
            None => gradients::grad_norm(&present, Norm::L2)?,
            Some(shards) => shards::grad_norm(shards, &self.params, grads)?,
        };
        let (losses, grad_norm) = read_once(losses, &norm)?;
        let loss: f64 = losses.iter().sum();
        if let Some(microbatch) = losses.iter().position(|loss| !loss.is_finite()) {
            return Err(Error::NonFiniteLoss { loss, microbatch });
        }
        if !grad_norm.is_finite() {
            return self.skip(grads, loss);
        }
        if let Some(max_norm) = self.config.max_grad_norm {
            gradients::scale_to_norm(&present, grad_norm, max_norm)?;
        }
        let mut stats = self.stats(loss, grad_norm);
        // What averaging allocates comes before the weights move.
        let averaged = self.ema.as_ref().map(Ema::ready).transpose()?;
        self.optimizer
            .step_with(grads, self.config.schedule.factor(self.step))?;
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
            let device = self.params.first().map_or(Device::Cpu, |p| p.1.device());
            error = shards::blame(shards, device, error, loss)?;
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
        for ((name, _), grad) in self.params.iter().zip(grads) {
            let Some(grad) = grad else { continue };
            let finite = grad
                .f_isfinite()
                .and_then(|flags| flags.f_all())
                .and_then(bool::try_from);
            match finite {
                Ok(true) => {}
                Ok(false) => {
                    return Error::NonFiniteGradient {
                        parameter: name.clone(),
                        loss,
                    };
                }
                Err(error) => return error.into(),
            }
        }
        Error::NormOverflow { loss }
    }

    fn clear_grads(&self) -> Result<()> {
        let params: Vec<&Tensor> = self.params.iter().map(|(_, param)| param).collect();
        ffi::clear_grads(&params)
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

fn is_half(param: &Tensor) -> bool {
    matches!(param.kind(), Kind::Half | Kind::BFloat16)
}
