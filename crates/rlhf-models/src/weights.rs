//! Weights by name: where a model's tensors come from, and where they are kept.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rlhf_core::{Collective, Cut, Cuts};
use rlhf_scale::VocabularyShard;
use tch::{Device, Kind, Tensor};

use crate::layers::Layout;
use crate::lora::{Adapter, AdapterBuilder, Adapters, copied};
use crate::pipeline_parallel::Stage;
use crate::placement::Placement;
use crate::tensor_parallel::{Shard, Splitting};
use crate::{Error, ModelConfig, Result, WeightProblem};

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
    /// Whether weights that need no conversion are copied all the same.
    copies: bool,
    placement: Placement,
    splitting: Option<Splitting>,
    stage: Option<Stage>,
    cuts: Cuts,
}

/// What a [`Builder`] has made.
pub(crate) struct Built {
    pub(crate) weights: WeightMap,
    pub(crate) adapters: Option<Adapters>,
    /// Where the other parts are, and the weights that are split over ranks.
    pub(crate) placement: Placement,
    pub(crate) cuts: Cuts,
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
            copies: false,
            placement: Placement::default(),
            splitting: None,
            stage: None,
            cuts: Cuts::new(),
        }
    }

    /// Leaves the memory that the weights come from. A file's pages are small, and those of memory
    /// of our own large ([`rlhf_scale::reuse_memory`]), which is quicker to decode from.
    pub(crate) fn copying(self) -> Self {
        Self {
            copies: true,
            ..self
        }
    }

    /// A model of which each rank has a part. Weights that it is made of are whole, or this rank's
    /// part.
    pub(crate) fn at(self, placement: &Placement) -> Self {
        Self {
            placement: placement.clone(),
            ..self
        }
    }

    /// Looks up how the model is split. `reads_embedding` says whether the head may be the embedding.
    /// Fails where the ranks do not divide the model.
    pub(crate) fn split(&mut self, config: &ModelConfig, reads_embedding: bool) -> Result<()> {
        let Placement { tensor, pipeline } = &self.placement;
        let split = |ranks| Splitting::new(ranks, config.architecture());
        self.splitting = tensor.as_ref().map(split).transpose()?;
        let stage = |stages| Stage::new(stages, config.architecture(), reads_embedding);
        self.stage = pipeline.as_ref().map(stage).transpose()?;
        if let (Some(stage), Source::Checkpoint(weights) | Source::Shared(weights)) =
            (&self.stage, &mut self.source)
        {
            weights.retain(|name, _| stage.has(name));
        }
        Ok(())
    }

    /// The stage that is built, of several.
    pub(crate) fn stage(&self) -> Option<Stage> {
        self.stage.clone()
    }

    /// The blocks that are built, of so many.
    pub(crate) fn layers(&self, layers: i64) -> Range<i64> {
        let stage = self.stage.as_ref();
        stage.map_or(0..layers, |stage| stage.layers.clone())
    }

    /// The weights' kind, and where they are put.
    pub(crate) fn place(&self) -> (Kind, Device) {
        (self.kind, self.device)
    }

    /// Query heads that are built, of all.
    pub(crate) fn local_heads(&self, heads: i64) -> i64 {
        self.splitting.as_ref().map_or(heads, Splitting::heads)
    }

    /// What the linear layer of that name must know of other ranks.
    pub(crate) fn shard(&self, name: &str, inputs: i64) -> Option<Shard> {
        self.splitting.as_ref()?.shard(name, inputs)
    }

    /// The ranks, where each uses the module for its own heads.
    pub(crate) fn sharing(&self, name: &str) -> Option<Arc<dyn Collective>> {
        self.splitting.as_ref()?.shared(name)
    }

    /// This rank's tokens of the vocabulary.
    pub(crate) fn vocabulary(&self, size: i64) -> Option<VocabularyShard> {
        Some(self.placement.tensor.as_ref()?.vocabulary(size))
    }

    /// Where the weights are put.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// The weight of that name. Where it does not fit, or cannot be made, that is noted for
    /// [`finish`](Self::finish) and a stand-in returned.
    pub(crate) fn weight(&mut self, name: &str, shape: &[i64], init: Init) -> Tensor {
        self.matrix(name, shape, init, Layout::OutIn)
    }

    /// The weight of a linear layer: as [`weight`](Self::weight).
    pub(crate) fn matrix(
        &mut self,
        name: &str,
        shape: &[i64],
        init: Init,
        layout: Layout,
    ) -> Tensor {
        if self.failure.is_some() {
            return Tensor::new();
        }
        // Another stage's: nothing here computes with it.
        if self.stage.as_ref().is_some_and(|stage| !stage.has(name)) {
            if let Some(adapters) = &mut self.adapters {
                adapters.is_elsewhere(name);
            }
            return Tensor::new();
        }
        let cut = self.splitting.as_ref().and_then(|splitting| {
            let cut = splitting.cut(name, shape.len(), layout == Layout::InOut)?;
            self.cuts
                .insert(name.into(), (cut, shape[cut.dim as usize]));
            Some(cut)
        });
        let tensor = match self.make(name, shape, init, cut) {
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
            Some(adapters) => {
                let part = cut.zip(self.splitting.as_ref());
                let saved = adapters.saved_weight(name, (shape, part), &tensor);
                saved.unwrap_or(tensor)
            }
            None => tensor,
        }
    }

    /// The weight, or nothing where it does not fit.
    fn make(
        &mut self,
        name: &str,
        shape: &[i64],
        init: Init,
        cut: Option<Cut>,
    ) -> Result<Option<Tensor>> {
        let trainable = !matches!(self.source, Source::Shared(_));
        let part = |whole: Tensor| match (&self.splitting, cut) {
            (Some(splitting), Some(cut)) => splitting.part(cut, &whole),
            // Files that are read in parts are mapped, and not aligned.
            _ if trainable && self.placement.is_split() => copied(&whole),
            _ => Ok(whole),
        };
        let is_part = |tensor: &Tensor| match (&self.splitting, cut) {
            (Some(splitting), Some(cut)) => tensor.size() == splitting.part_shape(cut, shape),
            _ => false,
        };
        let tensor = match &mut self.source {
            Source::Random { seed } => part(fresh(*seed, name, shape, init)?)?,
            Source::Checkpoint(weights) | Source::Shared(weights) => match weights.remove(name) {
                Some(tensor) if tensor.size() == shape => part(tensor)?,
                Some(tensor) if is_part(&tensor) => tensor,
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
        let mut weight = tensor.f_to_device(self.device)?.f_to_kind(self.kind)?;
        // Parts are copies already.
        let is_there = weight.data_ptr() == tensor.data_ptr();
        if self.copies && is_there && !self.placement.is_split() {
            weight = copied(&tensor)?;
        }
        Ok(Some(weight.f_set_requires_grad(trainable)?))
    }

    /// What is added to the linear layer of that name, if anything.
    pub(crate) fn adapter(
        &mut self,
        name: &str,
        size: (i64, i64),
        layout: Layout,
    ) -> Option<Adapter> {
        let splitting = self.splitting.as_ref();
        self.adapters
            .as_mut()?
            .linear(name, size, layout, splitting)
    }

    /// All weights that were asked for, and the adapters beside them.
    ///
    /// # Errors
    /// What libtorch could not do; else every problem met, in which `dir` names the checkpoint.
    pub(crate) fn finish(mut self, dir: &Path) -> Result<Built> {
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
        Ok(Built {
            weights: self.weights,
            adapters,
            placement: self.placement,
            cuts: self.cuts,
        })
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
