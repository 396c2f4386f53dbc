//! AdamW, in one pass over each weight.

use std::collections::HashSet;
use std::path::Path;

use rlhf_core::Error as CoreError;
use tch::{Device, Kind, Tensor};

use crate::ffi::{self, FusedAdamW};
use crate::gradients::grad_of;
use crate::{AdamWConfig, Error, Result, io, param_group};

/// AdamW with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2). On an x86 CPU running
/// Linux f32 weights and masters are stepped by a kernel of our own, which clips gradients on the way
/// and gives the same bits with every instruction set; all else by the same fused kernel as PyTorch's
/// `torch.optim.AdamW(fused=True)`.
///
/// With the gradient `g` of step `t` each weight `p` becomes
///
/// ```text
/// p ← p (1 - lr λ);   m ← β₁ m + (1 - β₁) g;   v ← β₂ v + (1 - β₂) g²
/// p ← p - lr · m / (1 - β₁ᵗ) / (√v / √(1 - β₂ᵗ) + ε)
/// ```
///
/// 16-bit parameters have an f32 master copy and f32 moments: the step runs in f32 and its rounded
/// result is copied back, so that steps smaller than the parameter's resolution add up.
///
/// A bf16 parameter has 8 bits, and a usual step is a small part of their last one. Rounded to the
/// nearest, weights that begin as bf16 would all stay where they are for the first steps, then move
/// together. On the CPU each element therefore has a threshold of its own, spread evenly from its index:
/// that share of the distance between two bf16 numbers from which on it is rounded up. So a step moves as many weights as it should,
/// each once; what is a bf16 number stays; and no random number is drawn, so that a resumed run does
/// the same. On other devices, and for f16, rounding is to the nearest.
///
/// A parameter changed by other hands is therefore overwritten at the next step; load its new value
/// through [`AdamW::refresh_masters`].
///
/// Parameters may have a learning rate and weight decay of their own
/// ([`ParamGroup`](crate::ParamGroup)). One without a gradient is skipped, its step count too, as in PyTorch.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    groups: Vec<Group>,
}

/// One parameter and its state.
#[derive(Debug)]
struct Slot {
    name: String,
    param: Tensor,
    /// What the kernel updates: the parameter itself, or its f32 master copy.
    weight: Tensor,
    has_master: bool,
    /// Where `weight` begins in the parameter.
    place: i64,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    group: usize,
}

/// How much of a parameter an optimiser steps.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stretch {
    /// All of it.
    Whole,
    /// So many numbers from a place on, in the order of its storage.
    #[cfg_attr(not(feature = "distributed"), allow(dead_code))]
    Part { from: i64, length: i64 },
}

/// The state of a stretch.
#[cfg(feature = "distributed")]
pub(crate) struct SlotState {
    pub(crate) exp_avg: Tensor,
    pub(crate) exp_avg_sq: Tensor,
    pub(crate) step: Tensor,
    /// What is stepped.
    pub(crate) weight: Tensor,
}

/// What the parameters of one kernel call have in common.
#[derive(Debug, PartialEq)]
struct Group {
    device: Device,
    kind: Kind,
    lr: f64,
    weight_decay: f64,
}

impl AdamW {
    /// An optimiser of `params` with zero moments.
    ///
    /// # Errors
    /// If the config is invalid, a name comes twice, or a parameter cannot be trained: not a leaf
    /// that requires gradients, not a floating-point kind, or a view with gaps. A group that no
    /// parameter is in, too.
    pub fn new(params: Vec<(String, Tensor)>, config: &AdamWConfig) -> Result<Self> {
        Self::of_stretches(params, config, |_| Some(Stretch::Whole))
    }

    /// An optimiser of a part of each of `params`, or of nothing of it.
    pub(crate) fn of_stretches(
        params: Vec<(String, Tensor)>,
        config: &AdamWConfig,
        stretch: impl Fn(usize) -> Option<Stretch>,
    ) -> Result<Self> {
        config.validate()?;
        let names: Vec<&str> = params.iter().map(|(name, _)| name.as_str()).collect();
        let assigned = param_group::assign(&config.groups, &names)?;
        let mut names = HashSet::new();
        let mut optimizer = Self {
            config: config.clone(),
            slots: Vec::with_capacity(params.len()),
            groups: Vec::new(),
        };
        for (index, ((name, param), group)) in params.into_iter().zip(assigned).enumerate() {
            if !names.insert(name.clone()) {
                return Err(Error::DuplicateName { name });
            }
            optimizer.add(name, param, group, stretch(index))?;
        }
        Ok(optimizer)
    }

    /// Whether a step takes the gradients of bf16 parameters on this device as they are, without a copy
    /// in f32.
    pub fn reads_bf16_gradients(device: Device) -> bool {
        device == Device::Cpu && ffi::adamw_reads_bf16()
    }

    /// The options this optimiser was made with.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// One step from the parameters' gradients, with the learning rate `config.lr * lr_factor`, or
    /// that of a parameter's group in place of `config.lr`.
    ///
    /// # Errors
    /// [`Error::NoGradients`] if no parameter has one, in which case nothing changes.
    pub fn step(&mut self, lr_factor: f64) -> Result<()> {
        let grads = self
            .slots
            .iter()
            .map(|slot| grad_of(&slot.param))
            .collect::<Result<Vec<_>>>()?;
        self.step_with(&grads, 1.0, lr_factor)
    }

    /// [`AdamW::step`] from `scale` times `grads`, one for each parameter in order. What they hold
    /// afterwards has no meaning unless the scale is 1.
    pub(crate) fn step_with(
        &mut self,
        grads: &[Option<Tensor>],
        scale: f64,
        lr_factor: f64,
    ) -> Result<()> {
        // All that allocates, and so may fail, comes before the first weight changes.
        let grads = self
            .slots
            .iter()
            .zip(grads)
            .map(|(slot, grad)| grad.as_ref().map(|grad| slot.aligned(grad)).transpose())
            .collect::<Result<Vec<_>>>()?;
        if grads.iter().all(Option::is_none) {
            return Err(Error::NoGradients {
                parameters: self.slots.len(),
            });
        }
        let mut calls: Vec<FusedAdamW<'_>> = Vec::new();
        calls.resize_with(self.groups.len(), FusedAdamW::default);
        let (mut params, mut masters, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (slot, grad) in self.slots.iter().zip(&grads) {
            let Some(grad) = grad else { continue };
            let call = &mut calls[slot.group];
            call.params.push(&slot.weight);
            call.grads.push(grad);
            call.exp_avgs.push(&slot.exp_avg);
            call.exp_avg_sqs.push(&slot.exp_avg_sq);
            call.steps.push(&slot.step);
            if slot.has_master {
                params.push(&slot.param);
                masters.push(&slot.weight);
                places.push(slot.place);
            }
        }
        for (call, group) in calls.iter().zip(&self.groups) {
            if !call.params.is_empty() {
                let lr = group.lr * lr_factor;
                call.step(scale, lr, &self.config, group.weight_decay)?;
            }
        }
        if !params.is_empty() {
            ffi::round_all(&params, &masters, &places)?;
        }
        Ok(())
    }

    /// Makes the f32 master copies anew from the 16-bit parameters, after something other than this
    /// optimiser has written to them. Moments and step counts stay.
    ///
    /// # Errors
    /// Only if libtorch fails.
    pub fn refresh_masters(&mut self) -> Result<()> {
        let with_master = || self.slots.iter().filter(|slot| slot.has_master);
        let masters: Vec<&Tensor> = with_master().map(|slot| &slot.weight).collect();
        let params: Vec<&Tensor> = with_master().map(|slot| &slot.param).collect();
        if masters.is_empty() {
            return Ok(());
        }
        ffi::copy_all(&masters, &params)
    }

    /// The state by name, aliasing the live tensors: `exp_avg.NAME`, `exp_avg_sq.NAME`,
    /// `step.NAME`, and `master.NAME` for 16-bit parameters.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = Vec::with_capacity(4 * self.slots.len());
        for slot in &self.slots {
            let mut add = |part: &str, tensor: &Tensor| {
                state.push((format!("{part}.{}", slot.name), tensor.shallow_clone()));
            };
            add("exp_avg", &slot.exp_avg);
            add("exp_avg_sq", &slot.exp_avg_sq);
            add("step", &slot.step);
            if slot.has_master {
                add("master", &slot.weight);
            }
        }
        state
    }

    /// Writes [`AdamW::state`] to a safetensors file.
    ///
    /// # Errors
    /// As [`io::save_tensors`].
    pub fn save(&self, path: &Path) -> Result<()> {
        io::save_tensors(path, &self.state())
    }

    /// Restores what [`AdamW::save`] wrote, master copies included. The parameters themselves are
    /// not in that file.
    ///
    /// # Errors
    /// As [`io::load_tensors_into`]; the state is then unchanged.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        io::load_tensors_into(path, &self.state())
    }

    /// What is stepped, in the parameters' order: the parameters, or their f32 masters.
    pub(crate) fn weights(&self) -> Vec<Tensor> {
        let weight = |slot: &Slot| slot.weight.shallow_clone();
        self.slots.iter().map(weight).collect()
    }

    /// Parts of the state, one for each stretch: see [`AdamW::state`].
    #[cfg(feature = "distributed")]
    pub(crate) fn parts(&self) -> Vec<SlotState> {
        let state = |slot: &Slot| SlotState {
            exp_avg: slot.exp_avg.shallow_clone(),
            exp_avg_sq: slot.exp_avg_sq.shallow_clone(),
            step: slot.step.shallow_clone(),
            weight: slot.weight.shallow_clone(),
        };
        self.slots.iter().map(state).collect()
    }

    fn add(
        &mut self,
        name: String,
        param: Tensor,
        group: Option<usize>,
        stretch: Option<Stretch>,
    ) -> Result<()> {
        if !param.requires_grad() || !param.f_is_leaf()? {
            return Err(Error::NotTrainable { name });
        }
        let shape = param.size();
        let has_master = match param.kind() {
            Kind::Float | Kind::Double => false,
            Kind::Half | Kind::BFloat16 => true,
            kind => return Err(Error::UnsupportedParameter { name, kind }),
        };
        // The kernel walks storage, not indices: weight and moments must be laid out alike.
        if param.f_empty_like()?.stride() != param.stride() {
            return Err(Error::NotDense {
                name,
                strides: param.stride(),
            });
        }
        let (param, detached, place) = match stretch {
            None => return Ok(()),
            Some(Stretch::Whole) => {
                let detached = param.f_detach()?;
                (param, detached, 0)
            }
            Some(Stretch::Part { from, length }) => {
                let row = param.f_detach()?;
                let row = row.f_as_strided([row.numel() as i64], [1], None)?;
                let part = row.f_narrow(0, from, length)?;
                (part.shallow_clone(), part, from)
            }
        };
        let weight = match has_master {
            true => detached.f_to_kind(Kind::Float)?,
            false => detached,
        };
        let exp_avg = weight.f_zeros_like()?;
        let own = group.map(|index| &self.config.groups[index]);
        let weight_decay = match self.config.no_decay.decays(&shape) {
            true => self.config.weight_decay,
            false => 0.0,
        };
        let group = Group {
            device: weight.device(),
            kind: weight.kind(),
            lr: own.and_then(|own| own.lr).unwrap_or(self.config.lr),
            weight_decay: own.and_then(|own| own.weight_decay).unwrap_or(weight_decay),
        };
        let index = self.groups.iter().position(|other| *other == group);
        let index = index.unwrap_or_else(|| {
            self.groups.push(group);
            self.groups.len() - 1
        });
        self.slots.push(Slot {
            name,
            exp_avg_sq: exp_avg.f_zeros_like()?,
            step: Tensor::f_zeros([], (Kind::Float, weight.device()))?,
            param,
            weight,
            has_master,
            place,
            exp_avg,
            group: index,
        });
        Ok(())
    }
}

impl Slot {
    fn reads(&self, grad: &Tensor) -> bool {
        grad.kind() == Kind::BFloat16
            && self.weight.kind() == Kind::Float
            && grad.device() == self.weight.device()
            && AdamW::reads_bf16_gradients(grad.device())
    }

    /// `grad` in the layout of the weight and in its kind, or in bf16 where the step reads that; the
    /// tensor itself where it is so already.
    fn aligned(&self, grad: &Tensor) -> Result<Tensor> {
        if grad.size() != self.weight.size() {
            return Err(CoreError::ShapeMismatch {
                left: "gradient",
                left_shape: grad.size(),
                right: "parameter",
                right_shape: self.weight.size(),
            }
            .into());
        }
        let mut grad = grad.f_detach()?;
        if !self.reads(&grad) {
            grad = grad.f_to_kind(self.weight.kind())?;
        }
        if grad.stride() == self.weight.stride() {
            return Ok(grad);
        }
        let mut laid_out = self.weight.f_empty_like()?.f_to_kind(grad.kind())?;
        laid_out.f_copy_(&grad)?;
        Ok(laid_out)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A step from bf16 gradients is that from the same numbers in f32.
    #[test]
    fn bf16_gradients_are_read_as_they_are() {
        let numbers = Tensor::arange(40_007, (Kind::Float, Device::Cpu));
        let grads = numbers.sin().to_kind(Kind::BFloat16);
        let stepped = |grads: &Tensor| {
            let param = (&numbers * 1e-4 - 2.0).to_kind(Kind::BFloat16);
            let param = param.set_requires_grad(true);
            let named = vec![("w".to_string(), param.shallow_clone())];
            let mut optimizer = AdamW::new(named, &AdamWConfig::default()).unwrap();
            for scale in [1.0, 0.3] {
                let own = Some(grads.shallow_clone());
                optimizer.step_with(&[own], scale, 1.0).unwrap();
            }
            let state = optimizer.state();
            let state = state.into_iter().map(|(_, tensor)| tensor);
            state.chain([param.detach()]).collect::<Vec<_>>()
        };
        let narrow = stepped(&grads);
        for (a, b) in narrow.iter().zip(stepped(&grads.to_kind(Kind::Float))) {
            assert_eq!(*a, b);
        }
        // Gradients that lie in another order are put in that of the weight.
        let turned = grads.narrow(0, 0, 40_000).view([200, 200]).transpose(0, 1);
        let param = Tensor::ones([200, 200], (Kind::BFloat16, Device::Cpu));
        let stepped = |grads: Tensor| {
            let param = param.copy().set_requires_grad(true);
            let named = vec![("w".to_string(), param.shallow_clone())];
            let mut optimizer = AdamW::new(named, &AdamWConfig::default()).unwrap();
            optimizer.step_with(&[Some(grads)], 1.0, 1.0).unwrap();
            param.detach()
        };
        assert_eq!(
            stepped(turned.shallow_clone()),
            stepped(turned.contiguous())
        );
    }

    /// Which neighbour a bf16 weight is rounded to depends on its place in the parameter, not on
    /// the part that is stepped.
    #[test]
    fn parts_are_rounded_as_the_whole() {
        let param = || {
            let weights = Tensor::arange(1000, (Kind::Float, Device::Cpu)) * 0.01 - 3.0;
            weights.to_kind(Kind::BFloat16).set_requires_grad(true)
        };
        let grads = Tensor::arange(1000, (Kind::Float, Device::Cpu)).sin();
        let stepped = |param: Tensor, stretches: &[Stretch]| {
            let mut optimizers: Vec<(AdamW, Tensor)> = stretches
                .iter()
                .map(|&stretch| {
                    let named = vec![("w".to_string(), param.shallow_clone())];
                    let config = AdamWConfig::default();
                    let of = |_| Some(stretch);
                    let optimizer = AdamW::of_stretches(named, &config, of).unwrap();
                    let own = match stretch {
                        Stretch::Whole => grads.shallow_clone(),
                        Stretch::Part { from, length } => grads.narrow(0, from, length),
                    };
                    (optimizer, own)
                })
                .collect();
            for _ in 0..3 {
                for (optimizer, own) in &mut optimizers {
                    optimizer
                        .step_with(&[Some(own.shallow_clone())], 1.0, 1.0)
                        .unwrap();
                }
            }
            param.detach()
        };
        let whole = stepped(param(), &[Stretch::Whole]);
        let parts = [
            Stretch::Part {
                from: 0,
                length: 333,
            },
            Stretch::Part {
                from: 333,
                length: 667,
            },
        ];
        assert!(stepped(param(), &parts).equal(&whole));
        assert!(!whole.equal(&param()));
    }
}
