//! The update path that every trainer uses.

use std::path::Path;

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::gradients::{self, Norm, grad_of};
use crate::{AdamW, Error, Result, UpdateConfig, ffi, io};

const PARAMETERS_FILE: &str = "parameters.safetensors";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const STATE_FILE: &str = "updater.json";

/// Turns microbatch losses into one optimiser step: backward after each loss, finite check,
/// clipping, AdamW, schedule.
///
/// A step that fails changes nothing: the weights, the moments and the schedule are what they were,
/// and no gradient is left behind. Gradients of 16-bit parameters are accumulated in f32.
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
}

/// What one update did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct UpdateStats {
    /// Sum of the microbatch losses.
    pub loss: f64,
    /// Euclidean norm of all gradients before clipping, computed in f32.
    pub grad_norm: f64,
    /// Learning rate that was used.
    pub lr: f64,
    /// Updates done so far, this one included.
    pub step: u64,
}

/// `updater.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    step: u64,
    config: serde_json::Value,
}

impl Updater {
    /// An updater of `params`, which alias the weights that the losses are computed with
    /// ([`Parameters::named_parameters`](rlhf_core::Parameters::named_parameters)).
    ///
    /// # Errors
    /// If the config is invalid or a parameter cannot be trained: see [`AdamW::new`].
    pub fn new(mut params: Vec<(String, Tensor)>, config: &UpdateConfig) -> Result<Self> {
        config.validate()?;
        // By name, so that neither sums nor files depend on the order of the caller's list.
        params.sort_by(|a, b| a.0.cmp(&b.0));
        let aliases = params
            .iter()
            .map(|(name, param)| (name.clone(), param.shallow_clone()))
            .collect();
        Ok(Self {
            optimizer: AdamW::new(aliases, &config.optimizer)?,
            params,
            config: config.clone(),
            step: 0,
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

    /// Updates done so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The learning rate of the next update.
    pub fn lr(&self) -> f64 {
        self.config.optimizer.lr * self.config.schedule.factor(self.step)
    }

    /// One optimiser step on the sum of the losses that `loss(0)`, …, `loss(microbatches - 1)`
    /// return.
    ///
    /// Each is a scalar that depends on the parameters; backward follows before the next is asked
    /// for, so only one graph is alive at a time. For a mean, divide each microbatch's sum by the
    /// count of the whole batch: then the split does not change the result. Gradients that were
    /// there before are dropped. Parameters that get no gradient are skipped.
    ///
    /// The host waits for the device once, to read losses and norm.
    ///
    /// # Errors
    /// What `loss` returns; [`Error::NonFiniteLoss`], [`Error::NonFiniteGradient`] or
    /// [`Error::NormOverflow`] when the numbers are unusable; [`Error::NoGradients`],
    /// [`Error::LossShape`] or [`Error::LossWithoutGraph`] when the losses are wrong; libtorch's
    /// error when backward fails. Nothing is updated then.
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

    /// Writes the parameters, the optimiser's state, and the step with the configuration, to
    /// `parameters.safetensors`, `optimizer.safetensors` and `updater.json` in `dir`, which is made
    /// if need be.
    ///
    /// Each file is replaced atomically; for the three together use a
    /// [`CheckpointStore`](rlhf_core::CheckpointStore), which moves a whole folder into place.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(CoreError::io("creating", dir))?;
        io::save_tensors(&dir.join(PARAMETERS_FILE), &self.params)?;
        self.optimizer.save(&dir.join(OPTIMIZER_FILE))?;
        let path = dir.join(STATE_FILE);
        let state = State {
            step: self.step,
            config: self.config_json(&path)?,
        };
        let text = serde_json::to_string_pretty(&state).map_err(|error| corrupt(&path, error))?;
        io::write_atomically(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
                .map_err(|error| CoreError::io("writing", &path)(error).into())
        })
    }

    /// Restores bit for bit what [`Updater::save`] wrote: parameters, moments, master copies, step.
    ///
    /// # Errors
    /// [`Error::ConfigMismatch`] if the state was saved under another configuration,
    /// [`Error::TensorFile`] if its tensors are not those of this updater, and the usual errors of
    /// files that are missing or damaged. Nothing is changed then.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(CoreError::io("reading", &path))?;
        let state: State = serde_json::from_str(&text).map_err(|error| corrupt(&path, error))?;
        let current = self.config_json(&path)?;
        if let Some((field, saved, current)) = first_difference("", &state.config, &current) {
            return Err(Error::ConfigMismatch {
                path,
                field,
                saved,
                current,
            });
        }
        let optimizer_state = self.optimizer.state();
        let params = io::read_matching(&dir.join(PARAMETERS_FILE), &self.params)?;
        let moments = io::read_matching(&dir.join(OPTIMIZER_FILE), &optimizer_state)?;
        io::copy_into(&self.params, &params)?;
        io::copy_into(&optimizer_state, &moments)?;
        self.step = state.step;
        Ok(())
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
        self.clear_grads()?;
        let mut losses = Vec::with_capacity(microbatches);
        let mut sums: Vec<Option<Tensor>> = self.params.iter().map(|_| None).collect();
        for microbatch in 0..microbatches {
            let loss = loss(microbatch)?;
            losses.push(backward_one(microbatch, &loss)?);
            if microbatches > 1 {
                self.drain_half_grads(&mut sums)?;
            }
        }
        let grads = self.collect_grads(sums)?;
        Ok(self.apply(&losses, &grads)?)
    }

    /// Moves the gradients of 16-bit parameters into f32 sums, where small ones are not lost.
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

    /// One gradient for each parameter that has one; f32 for 16-bit parameters.
    fn collect_grads(&self, sums: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        self.params
            .iter()
            .zip(sums)
            .map(|((_, param), sum)| match (sum, grad_of(param)?) {
                (Some(sum), _) => Ok(Some(sum)),
                (None, Some(grad)) if is_half(param) => Ok(Some(grad.f_to_kind(Kind::Float)?)),
                (None, grad) => Ok(grad),
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
        let norm = gradients::grad_norm(&present, Norm::L2)?;
        let (losses, grad_norm) = read_once(losses, &norm)?;
        let loss: f64 = losses.iter().sum();
        if let Some(microbatch) = losses.iter().position(|loss| !loss.is_finite()) {
            return Err(Error::NonFiniteLoss { loss, microbatch });
        }
        if !grad_norm.is_finite() {
            return Err(self.blame(grads, loss));
        }
        if let Some(max_norm) = self.config.max_grad_norm {
            gradients::scale_to_norm(&present, grad_norm, max_norm)?;
        }
        let lr = self.lr();
        self.optimizer
            .step_with(grads, self.config.schedule.factor(self.step))?;
        self.step += 1;
        Ok(UpdateStats {
            loss,
            grad_norm,
            lr,
            step: self.step,
        })
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

    fn config_json(&self, path: &Path) -> Result<serde_json::Value> {
        serde_json::to_value(&self.config).map_err(|error| corrupt(path, error))
    }
}

/// Checks and backpropagates one loss; returns it detached, as f32, still on its device.
fn backward_one(microbatch: usize, loss: &Tensor) -> Result<Tensor> {
    if loss.numel() != 1 {
        return Err(Error::LossShape {
            microbatch,
            shape: loss.size(),
        });
    }
    if !loss.requires_grad() {
        return Err(Error::LossWithoutGraph { microbatch });
    }
    loss.f_backward()?;
    Ok(loss.f_detach()?.f_to_kind(Kind::Float)?.f_reshape([])?)
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

fn corrupt(path: &Path, error: serde_json::Error) -> Error {
    CoreError::Corrupt {
        path: path.to_path_buf(),
        reason: error.to_string(),
    }
    .into()
}

/// Path and values of the first field in which two JSON documents differ.
fn first_difference(
    path: &str,
    saved: &serde_json::Value,
    current: &serde_json::Value,
) -> Option<(String, String, String)> {
    let (Some(saved_fields), Some(fields)) = (saved.as_object(), current.as_object()) else {
        return (saved != current)
            .then(|| (path.to_string(), saved.to_string(), current.to_string()));
    };
    let absent = serde_json::Value::Null;
    let extra = saved_fields.keys().filter(|key| !fields.contains_key(*key));
    fields.keys().chain(extra).find_map(|key| {
        let path = match path {
            "" => key.clone(),
            prefix => format!("{prefix}.{key}"),
        };
        let saved = saved_fields.get(key).unwrap_or(&absent);
        first_difference(&path, saved, fields.get(key).unwrap_or(&absent))
    })
}
