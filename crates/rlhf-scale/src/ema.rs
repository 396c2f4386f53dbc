//! Averages of weights over the course of a run.

use std::cell::Cell;
use std::path::Path;

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result, ffi, io};

/// Options of an [`Ema`].
///
/// The default decay is that of PyTorch's `torch.optim.swa_utils.get_ema_multi_avg_fn`; start and
/// warm-up are those of diffusers' `EMAModel`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmaConfig {
    /// What is kept of the average at each update.
    pub decay: f64,
    /// Updates during which the average is simply the current weights.
    pub start_step: u64,
    /// Whether the decay rises to `decay`, as `(1 + k) / (10 + k)`, so that a young average does
    /// not cling to the weights it began with.
    pub warmup: bool,
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self {
            decay: 0.999,
            start_step: 0,
            warmup: true,
        }
    }
}

impl EmaConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the field and the values that are allowed.
    pub fn validate(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.decay) {
            return Ok(());
        }
        Err(CoreError::config("ema.decay", self.decay, "must lie in [0, 1]").into())
    }

    /// The decay of update number `update`, counted from 1.
    ///
    /// With `k = update - start_step - 1` it is 0 while `k ≤ 0`: the first average is a copy of the
    /// weights. After that it is `decay`, or `min(decay, (1 + k) / (10 + k))` with the warm-up.
    ///
    /// ```
    /// let config = rlhf_scale::EmaConfig { decay: 0.99, start_step: 5, warmup: true };
    /// assert_eq!([1, 6, 7, 900].map(|update| config.decay_at(update)), [0.0, 0.0, 2.0 / 11.0, 0.99]);
    /// ```
    pub fn decay_at(&self, update: u64) -> f64 {
        let k = update.saturating_sub(self.start_step.saturating_add(1)) as f64;
        match (k > 0.0, self.warmup) {
            (false, _) => 0.0,
            (true, false) => self.decay,
            (true, true) => self.decay.min((1.0 + k) / (10.0 + k)),
        }
    }
}

/// Exponential moving averages of a model's parameters (Polyak & Juditsky 1992), in f32 whatever
/// the parameters are.
///
/// With the decay `d` of [`EmaConfig::decay_at`] each update makes every average
///
/// ```text
/// e ← e + (1 - d) (p - e)
/// ```
///
/// No bias correction is needed, since the first update copies the weights. An
/// [`Updater`](crate::Updater) whose config asks for it keeps one, of the f32 master weights where
/// the model is 16-bit. Evaluate with the averages through [`Ema::apply`].
///
/// ```
/// use rlhf_scale::{Ema, EmaConfig, Error};
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Error> {
/// let mut weight = Tensor::zeros([1], (Kind::Float, Device::Cpu));
/// let config = EmaConfig { decay: 0.75, warmup: false, ..EmaConfig::default() };
/// let mut ema = Ema::new(vec![("weight".to_string(), weight.shallow_clone())], &config)?;
/// for value in [1.0, 2.0] {
///     let _ = weight.fill_(value); // training
///     ema.update()?;
/// }
/// let averaged = ema.apply()?;
/// assert_eq!(weight.double_value(&[0]), 1.25);
/// averaged.restore()?;
/// assert_eq!(weight.double_value(&[0]), 2.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Ema {
    config: EmaConfig,
    /// Where [`Ema::apply`] writes.
    params: Vec<Tensor>,
    /// What is averaged: the parameters, or master copies of them.
    sources: Vec<Tensor>,
    averages: Vec<(String, Tensor)>,
    updates: u64,
    /// Set while an [`AppliedEma`] is alive.
    applied: Cell<bool>,
}

/// The averages stand in for a model's weights until this is dropped.
#[derive(Debug)]
#[must_use = "dropping this puts the weights back"]
pub struct AppliedEma<'a> {
    ema: &'a Ema,
    weights: Vec<Tensor>,
    restored: bool,
}

impl Ema {
    /// Averages of `params`, which alias the live weights.
    ///
    /// # Errors
    /// If the config is invalid or a parameter is not of a floating-point kind.
    pub fn new(params: Vec<(String, Tensor)>, config: &EmaConfig) -> Result<Self> {
        let sources = params.iter().map(|(_, p)| p.shallow_clone()).collect();
        Self::of_sources(params, sources, config)
    }

    /// Averages of `sources`, of which `params` are copies of lower precision or aliases.
    pub(crate) fn of_sources(
        params: Vec<(String, Tensor)>,
        sources: Vec<Tensor>,
        config: &EmaConfig,
    ) -> Result<Self> {
        config.validate()?;
        let mut averages = Vec::with_capacity(params.len());
        for ((name, param), source) in params.iter().zip(&sources) {
            let kind = match param.kind() {
                Kind::Float | Kind::Half | Kind::BFloat16 => Kind::Float,
                Kind::Double => Kind::Double,
                kind => {
                    let name = name.clone();
                    return Err(Error::UnsupportedParameter { name, kind });
                }
            };
            let average = source.f_detach()?.f_to_dtype(kind, false, true)?;
            averages.push((name.clone(), average));
        }
        Ok(Self {
            config: *config,
            params: detached(params.into_iter().map(|(_, param)| param))?,
            sources: detached(sources)?,
            averages,
            updates: 0,
            applied: Cell::new(false),
        })
    }

    /// The options.
    pub fn config(&self) -> &EmaConfig {
        &self.config
    }

    /// Updates done so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The averages by name: those of f64 parameters f64, the others f32. They alias the live ones.
    pub fn averages(&self) -> &[(String, Tensor)] {
        &self.averages
    }

    /// Lets the averages follow the weights by one step.
    ///
    /// # Errors
    /// [`Error::EmaApplied`] if a forgotten [`AppliedEma`] never put the weights back; libtorch's
    /// (out of memory). Nothing is changed then.
    pub fn update(&mut self) -> Result<()> {
        let sources = self.ready()?;
        self.advance(&sources)
    }

    /// What is averaged, in the averages' kinds, for [`advance`](Self::advance): whatever an update
    /// allocates. Sources that have their average's kind come back as aliases, so that those of an
    /// [`Updater`](crate::Updater), which are f32 masters, may be readied before they are stepped.
    pub(crate) fn ready(&self) -> Result<Vec<Tensor>> {
        self.check_not_applied()?;
        let sources = self.averages.iter().zip(&self.sources);
        sources
            .map(|((_, average), source)| Ok(source.f_to_kind(average.kind())?))
            .collect()
    }

    /// Moves the averages towards `sources`, in place.
    pub(crate) fn advance(&mut self, sources: &[Tensor]) -> Result<()> {
        let weight = 1.0 - self.config.decay_at(self.updates + 1);
        for ((_, average), source) in self.averages.iter_mut().zip(sources) {
            let _ = average.f_lerp_(source, weight)?;
        }
        self.updates += 1;
        Ok(())
    }

    /// Writes the averages, rounded to their kinds, into the parameters, until what is returned is
    /// dropped. The weights proper are kept in a copy meanwhile.
    ///
    /// # Errors
    /// [`Error::EmaApplied`] if they are there already, or libtorch's; nothing is changed then.
    pub fn apply(&self) -> Result<AppliedEma<'_>> {
        self.check_not_applied()?;
        let weights = self
            .params
            .iter()
            .map(|param| param.f_to_dtype(param.kind(), false, true))
            .collect::<Result<Vec<_>, _>>()?;
        // From here on, dropping this undoes what was done.
        let applied = AppliedEma {
            ema: self,
            weights,
            restored: false,
        };
        self.applied.set(true);
        let averages: Vec<&Tensor> = self.averages.iter().map(|(_, average)| average).collect();
        copy_all(&self.params, &averages)?;
        Ok(applied)
    }

    /// Writes [`Ema::state`] to a safetensors file.
    ///
    /// # Errors
    /// As [`io::save_tensors`].
    pub fn save(&self, path: &Path) -> Result<()> {
        io::save_tensors(path, &self.state())
    }

    /// Restores bit for bit what [`Ema::save`] wrote. The options are not in that file.
    ///
    /// # Errors
    /// As [`io::load_tensors_into`]; nothing is changed then.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let state = io::read_matching(path, &self.state())?;
        self.restore(&state)
    }

    /// `ema.NAME` for every average, aliasing it, and the count `updates`.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let average =
            |(name, average): &(String, Tensor)| (format!("ema.{name}"), average.shallow_clone());
        let mut state: Vec<_> = self.averages.iter().map(average).collect();
        state.push(("updates".to_string(), Tensor::from(self.updates as i64)));
        state
    }

    /// Takes over the tensors of a file, in the order of [`state`](Self::state).
    pub(crate) fn restore(&mut self, state: &[Tensor]) -> Result<()> {
        let Some((updates, averages)) = state.split_last() else {
            return Ok(());
        };
        let updates = i64::try_from(updates)?;
        io::copy_into(&self.averages, averages)?;
        self.updates = u64::try_from(updates).unwrap_or_default();
        Ok(())
    }

    /// Whether the parameters are the weights that are trained.
    pub(crate) fn check_not_applied(&self) -> Result<()> {
        if self.applied.get() {
            return Err(Error::EmaApplied);
        }
        Ok(())
    }
}

impl AppliedEma<'_> {
    /// Puts the weights back, as dropping does, but reports a failure.
    ///
    /// # Errors
    /// Only if libtorch fails.
    pub fn restore(mut self) -> Result<()> {
        self.put_back()
    }

    fn put_back(&mut self) -> Result<()> {
        if !self.restored {
            copy_all(&self.ema.params, &self.weights.iter().collect::<Vec<_>>())?;
            self.restored = true;
            self.ema.applied.set(false);
        }
        Ok(())
    }
}

impl Drop for AppliedEma<'_> {
    fn drop(&mut self) {
        // Where it fails, the mark stays: updates and checkpoints are refused from then on.
        let _ = self.put_back();
    }
}

fn copy_all(targets: &[Tensor], sources: &[&Tensor]) -> Result<()> {
    if targets.is_empty() {
        return Ok(());
    }
    ffi::copy_all(&targets.iter().collect::<Vec<_>>(), sources)
}

/// The same tensors, invisible to autograd.
fn detached(tensors: impl IntoIterator<Item = Tensor>) -> Result<Vec<Tensor>> {
    let detach = |tensor: Tensor| Ok(tensor.f_detach()?);
    tensors.into_iter().map(detach).collect()
}
