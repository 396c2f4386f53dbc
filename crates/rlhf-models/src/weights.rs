//! Weights by name: where a model's tensors come from, and where they are kept.

use std::collections::BTreeMap;
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::layers::Layout;
use crate::lora::{Adapter, AdapterBuilder, Adapters};
use crate::{Error, Result, WeightProblem};

/// A model's weights by their name in the checkpoint, each once.
pub(crate) type WeightMap = BTreeMap<String, Tensor>;

/// How a weight that no checkpoint provides begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Init {
    Zeros,
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform between minus and plus this bound.
    Uniform(f64),
}

/// Gives a model under construction its weights, and notes all that do not fit.
pub(crate) struct Builder {
    source: Source,
    device: Device,
    kind: Kind,
    weights: WeightMap,
    problems: Vec<WeightProblem>,
    /// The first failure of libtorch: no memory, for one.
    failure: Option<Error>,
    adapters: Option<AdapterBuilder>,
}

enum Source {
    Checkpoint(WeightMap),
    Random {
        seed: u64,
    },
    /// Frozen handles of another model's weights.
    Shared(WeightMap),
}

impl Builder {
    /// Weights of a checkpoint: every one that the model needs, and no other.
    pub(crate) fn from_weights(weights: WeightMap, device: Device, kind: Kind) -> Self {
        Self::new(Source::Checkpoint(weights), device, kind)
    }

    /// Fresh weights. Those of one name depend on the seed and the name only.
    pub(crate) fn random(seed: u64, device: Device, kind: Kind) -> Self {
        Self::new(Source::Random { seed }, device, kind)
    }

    /// Weights that lie in another model's memory, frozen here, with the adapters that are given.
    pub(crate) fn shared(
        weights: WeightMap,
        device: Device,
        kind: Kind,
        adapters: Option<AdapterBuilder>,
    ) -> Self {
        Self {
            adapters,
            ..Self::new(Source::Shared(weights), device, kind)
        }
    }

    fn new(source: Source, device: Device, kind: Kind) -> Self {
        Self {
            source,
            device,
            kind,
            weights: WeightMap::new(),
            problems: Vec::new(),
            failure: None,
            adapters: None,
        }
    }

    /// Where the weights are put.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// The weight of that name. Where it does not fit, or cannot be made, that is noted for
    /// [`finish`](Self::finish) and a stand-in returned.
    pub(crate) fn weight(&mut self, name: &str, shape: &[i64], init: Init) -> Tensor {
        if self.failure.is_some() {
            return Tensor::new();
        }
        let tensor = match self.make(name, shape, init) {
            Ok(Some(tensor)) => tensor,
            Ok(None) => return Tensor::new(),
            Err(error) => {
                self.failure = Some(error);
                return Tensor::new();
            }
        };
        self.weights.insert(name.into(), tensor.shallow_clone());
        match &mut self.adapters {
            // A module that is trained whole stands in for the frozen one.
            Some(adapters) => adapters.saved_weight(name, &tensor).unwrap_or(tensor),
            None => tensor,
        }
    }

    /// The weight, or nothing where it does not fit.
    fn make(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Option<Tensor>> {
        let trainable = !matches!(self.source, Source::Shared(_));
        let tensor = match &mut self.source {
            Source::Random { seed } => fresh(*seed, name, shape, init)?,
            Source::Checkpoint(weights) | Source::Shared(weights) => match weights.remove(name) {
                Some(tensor) if tensor.size() == shape => tensor,
                Some(tensor) => {
                    self.problems.push(WeightProblem::Shape {
                        name: name.into(),
                        found: tensor.size(),
                        expected: shape.into(),
                    });
                    return Ok(None);
                }
                None => {
                    self.problems.push(WeightProblem::Missing {
                        name: name.into(),
                        shape: shape.into(),
                    });
                    return Ok(None);
                }
            },
        };
        let tensor = tensor.f_to_device(self.device)?.f_to_kind(self.kind)?;
        Ok(Some(tensor.f_set_requires_grad(trainable)?))
    }

    /// What is added to the linear layer of that name, if anything.
    pub(crate) fn adapter(
        &mut self,
        name: &str,
        size: (i64, i64),
        layout: Layout,
    ) -> Option<Adapter> {
        self.adapters.as_mut()?.linear(name, size, layout)
    }

    /// All weights that were asked for, and the adapters beside them.
    ///
    /// # Errors
    /// What libtorch could not do; else every problem met, in which `dir` names the checkpoint.
    pub(crate) fn finish(mut self, dir: &Path) -> Result<(WeightMap, Option<Adapters>)> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        if let Source::Checkpoint(rest) | Source::Shared(rest) = &self.source {
            self.problems
                .extend(rest.iter().map(|(name, tensor)| WeightProblem::Unexpected {
                    name: name.clone(),
                    shape: tensor.size(),
                }));
        }
        if !self.problems.is_empty() {
            return Err(Error::Weights {
                path: dir.into(),
                problems: self.problems,
            });
        }
        let adapters = self.adapters.map(AdapterBuilder::finish).transpose()?;
        Ok((self.weights, adapters))
    }
}

/// A weight as it is before training, f32 on the CPU.
///
/// # Errors
/// No memory for it.
pub(crate) fn fresh(seed: u64, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
    let options = (Kind::Float, Device::Cpu);
    let filled = |value: f64| Ok(Tensor::f_full(shape, value, options)?);
    let (mut rng, mut values) = (stream(seed, name), Vec::new());
    let count = elements(shape).filter(|&count| values.try_reserve_exact(count + 1).is_ok());
    let count = match init {
        Init::Zeros => return filled(0.0),
        Init::Ones => return filled(1.0),
        Init::Uniform(_) | Init::Normal(_) => count.ok_or_else(|| {
            let message = format!("not enough memory for {name} {shape:?}");
            Error::Core(rlhf_core::Error::Tensor { message })
        })?,
    };
    match init {
        Init::Zeros | Init::Ones => {}
        Init::Uniform(bound) => {
            let uniform = |_| ((2.0 * rng.random::<f64>() - 1.0) * bound) as f32;
            values.extend((0..count).map(uniform));
        }
        Init::Normal(std) => {
            while values.len() < count {
                // Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite.
                let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt() * std;
                let angle = std::f64::consts::TAU * rng.random::<f64>();
                values.push((radius * angle.cos()) as f32);
                values.push((radius * angle.sin()) as f32);
            }
        }
    }
    let tensor = Tensor::f_empty(shape, options)?;
    tensor
        .f_view(-1)?
        .f_copy_(&Tensor::f_from_slice(&values[..count])?)?;
    Ok(tensor)
}

fn elements(shape: &[i64]) -> Option<usize> {
    shape.iter().try_fold(1usize, |count, &size| {
        count.checked_mul(usize::try_from(size).ok()?)
    })
}

/// Random numbers of one weight.
fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(fnv1a(name));
    rng
}

/// A hash that is the same on every platform and in every version, unlike the standard one.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
