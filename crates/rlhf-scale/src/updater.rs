//! The update path that every trainer uses.

#[cfg(not(feature = "distributed"))]
mod alone;
mod apply;
mod backward;
mod files;
mod shards;
mod stats;
mod whole;

use std::fmt::Display;

use rlhf_core::{Error as CoreError, ParameterShards, Parameters, Ranks, Replicas};
use tch::{Device, Kind, Tensor};

#[cfg(feature = "distributed")]
use crate::distributed::reduction::Reduction;
use crate::{AdamW, Ema, Error, LossScaler, Result, UpdateConfig, ffi};
#[cfg(not(feature = "distributed"))]
use alone::Reduction;

pub use stats::UpdateStats;

/// Turns microbatch losses into one optimiser step: backward after each loss, finite check,
/// clipping, AdamW, schedule, averaged weights.
///
/// A step that fails changes nothing: the weights, the moments and the schedule are what they were,
/// and no gradient is left behind. Gradients of 16-bit parameters are accumulated in f32. Those of bf16
/// parameters on the CPU whose one microbatch is all there is stay bf16, half the memory, and the step
/// from them is the same to the last bit.
///
/// With loss scaling ([`UpdateConfig::loss_scale`]) backward starts from the scale, and the f32
/// sums of the gradients are divided by it before anything looks at them. Gradients that are not
/// finite are then expected now and then: the step is skipped, which is no error. A skipped step
/// changes the loss scale and the count of skipped steps, and nothing else; like transformers' it
/// does not count as a step of the schedule. A *loss* that is not finite is an error in any case,
/// since no scale would mend it.
///
/// Made where several processes train together (`distributed::World`), it is the place where they
/// become one: each computes its [share](Replicas::share) of the microbatches, and the gradients
/// are summed over all of them before anything looks at them. Since a microbatch's loss is a share
/// of the whole batch's, that is all: the step is the same as one process's on all of the
/// microbatches, to rounding. A step that fails in one process fails in all, and none has changed
/// anything.
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
    /// `None` for one process alone.
    reduction: Option<Reduction>,
    replicas: Replicas,
    shards: Option<ParameterShards>,
}

/// What is known of an update when all backwards are done.
struct Gradients {
    /// Of every microbatch of every process, still on the device where there is one process.
    losses: Losses,
    /// One for each stretch that the optimiser steps.
    grads: Vec<Option<Tensor>>,
}

enum Losses {
    OnDevice(Vec<Tensor>),
    Known(Vec<f64>),
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
        let reduction = Reduction::of_run(&params)?;
        let optimizer = match &reduction {
            Some(reduction) => reduction.optimizer(aliases(), &config.optimizer)?,
            None => AdamW::new(aliases(), &config.optimizer)?,
        };
        let scaler = config.loss_scale.as_ref().map(LossScaler::new);
        let sources = match &reduction {
            Some(reduction) if reduction.is_sharded() => {
                if config.ema.is_some() && params.iter().any(|(_, param)| is_half(param)) {
                    let reason = "16-bit weights whose masters are spread over processes cannot be \
                                  averaged; use Sharding::Nothing";
                    return Err(CoreError::config("ema", "some", reason).into());
                }
                let detached = |(_, param): &(String, Tensor)| Ok(param.f_detach()?);
                params.iter().map(detached).collect::<Result<_>>()?
            }
            _ => optimizer.weights(),
        };
        let ema = config
            .ema
            .as_ref()
            .map(|ema| Ema::of_sources(aliases(), sources, ema));
        let replicas = reduction.as_ref().map(|r| r.replicas().clone());
        Ok(Self {
            replicas: replicas.unwrap_or_default(),
            reduction,
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

    /// The processes that share the microbatches of an update: what its closure sees are those of
    /// [`Replicas::share`] alone.
    pub fn replicas(&self) -> &Replicas {
        &self.replicas
    }

    /// All processes that statistics of an update come from: its replicas, and the stages of the
    /// model, of which the last has computed them.
    pub fn ranks(&self) -> Ranks {
        Ranks::new(self.replicas.clone(), self.shards.as_ref())
    }

    /// When the gradients of the last update travelled to other processes, where there are any.
    #[cfg(feature = "distributed")]
    pub fn overlap(&self) -> Option<crate::distributed::OverlapTrace> {
        self.reduction.as_ref().map(Reduction::trace)
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
    /// Of several processes each is asked for the losses of its [share](Replicas::share) alone.
    ///
    /// The host waits for the device once, to read losses and norm; of several processes twice.
    ///
    /// # Errors
    /// What `loss` returns; [`Error::NonFiniteLoss`], [`Error::NonFiniteGradient`] or
    /// [`Error::NormOverflow`] when the numbers are unusable; with loss scaling
    /// [`Error::LossScaleExhausted`] in place of the second, where skipping has come to an end;
    /// [`Error::NoGradients`], [`Error::LossShape`] or [`Error::LossWithoutGraph`] when the losses
    /// are wrong; [`Error::EmaApplied`] if averages were left in the place of the weights;
    /// libtorch's error when backward fails. Nothing is updated then.
    pub fn update<E: From<Error> + Display>(
        &mut self,
        microbatches: usize,
        loss: impl FnMut(usize) -> Result<Tensor, E>,
    ) -> Result<UpdateStats, E> {
        self.update_if(microbatches, loss, || Ok(()))
    }

    /// [`update`](Self::update), unless `go_on` fails: it is called when all losses have been
    /// computed and nothing has moved yet, everywhere, or nowhere if a loss failed. Several
    /// processes must come to the same answer.
    ///
    /// # Errors
    /// Those of [`update`](Self::update) and of `go_on`. Nothing is updated then.
    pub fn update_if<E: From<Error> + Display>(
        &mut self,
        microbatches: usize,
        loss: impl FnMut(usize) -> Result<Tensor, E>,
        go_on: impl FnOnce() -> Result<(), E>,
    ) -> Result<UpdateStats, E> {
        let outcome = self.try_update(microbatches, loss, go_on);
        let cleared = self.clear_grads();
        let stats = outcome?;
        cleared?;
        Ok(stats)
    }

    fn try_update<E: From<Error> + Display>(
        &mut self,
        microbatches: usize,
        loss: impl FnMut(usize) -> Result<Tensor, E>,
        go_on: impl FnOnce() -> Result<(), E>,
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
        let share = self.replicas.share(microbatches);
        let mut sums: Vec<Option<Tensor>> = self.params.iter().map(|_| None).collect();
        let losses = self.backward_all(share, loss, &mut sums);
        let losses = losses.and_then(|losses| Ok(self.share_losses(losses)?));
        let gradients = match self.reduction.is_some() {
            true => self.reduce(losses, sums, go_on)?,
            false => {
                let losses = Losses::OnDevice(losses?);
                go_on()?;
                let grads = self.collect_grads(sums)?;
                Gradients { losses, grads }
            }
        };
        Ok(self.apply(gradients)?)
    }

    fn device(&self) -> Device {
        self.params.first().map_or(Device::Cpu, |p| p.1.device())
    }

    fn clear_grads(&self) -> Result<()> {
        let params: Vec<&Tensor> = self.params.iter().map(|(_, param)| param).collect();
        ffi::clear_grads(&params)
    }
}

fn is_half(param: &Tensor) -> bool {
    matches!(param.kind(), Kind::Half | Kind::BFloat16)
}
