//! Adapters of a model under construction, and those of a finished one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use rlhf_core::{Cut, Cuts};
use tch::{Device, Kind, Tensor};

use super::adapter::{Adapter, Dropout};
use super::config::{LoraConfig, Selection, is_end};
use crate::error::AdapterProblem;
use crate::layers::Layout;
use crate::tensor_parallel::Splitting;
use crate::weights::{Init, WeightMap, fresh};
use crate::{Error, Result, WeightProblem};

/// The adapters of a model, and its modules that are trained whole.
pub(crate) struct Adapters {
    pub(super) config: LoraConfig,
    /// Both factors of every adapter as `<module>.lora_A.weight` and `.lora_B.weight`, and the
    /// weights of whole modules under the names of those that they stand in for.
    weights: WeightMap,
    /// By the name of the linear layer.
    adapters: BTreeMap<String, (Adapter, Layout)>,
    pub(super) dropout: Arc<Dropout>,
    /// The weights that are split over ranks.
    pub(crate) cuts: Cuts,
}

/// Where adapters come from.
pub(super) enum Origin {
    /// `A` random, `B` zero: the model computes what it did without them.
    Fresh { seed: u64 },
    /// Weights by their names in [`Adapters::weights`], from the folder `path` if any.
    Given {
        weights: WeightMap,
        path: Option<PathBuf>,
    },
}

/// Gives a model under construction its adapters, and notes all that does not fit.
pub(crate) struct AdapterBuilder {
    selection: Selection,
    origin: Origin,
    device: Device,
    kind: Kind,
    trainable: bool,
    built: Adapters,
    linears: Vec<String>,
    modules: BTreeSet<String>,
    problems: Vec<AdapterProblem>,
    /// The first failure of libtorch: no memory, for one.
    failure: Option<Error>,
}

/// How this rank's part of a weight is cut out.
type PartOf<'a> = (Cut, &'a Splitting);

impl AdapterBuilder {
    /// Adapters of a model whose weights are of the kind `base`.
    pub(super) fn new(
        config: &LoraConfig,
        origin: Origin,
        device: Device,
        base: Kind,
    ) -> Result<Self> {
        Ok(Self {
            selection: Selection::new(config)?,
            origin,
            device,
            // Small steps of small numbers: 16 bits would lose them.
            kind: match base {
                Kind::Double => Kind::Double,
                _ => Kind::Float,
            },
            trainable: true,
            built: Adapters {
                config: config.clone(),
                weights: WeightMap::new(),
                adapters: BTreeMap::new(),
                dropout: Arc::new(Dropout::new(config.dropout)),
                cuts: Cuts::new(),
            },
            linears: Vec::new(),
            modules: BTreeSet::new(),
            problems: Vec::new(),
            failure: None,
        })
    }

    /// Adapters that are never trained.
    pub(super) fn frozen(mut self) -> Self {
        self.trainable = false;
        self
    }

    /// The adapter of a linear layer, if it has one.
    pub(crate) fn linear(
        &mut self,
        name: &str,
        (inputs, outputs): (i64, i64),
        layout: Layout,
        splitting: Option<&Splitting>,
    ) -> Option<Adapter> {
        if !self.selection.is_saved(name) {
            self.linears.push(name.into());
        }
        if !self.selection.adapts(name) {
            return None;
        }
        let (rank, alpha) = self.selection.size(name);
        // Kaiming's uniform with a = √5, as PEFT and PyTorch's linear layers have it.
        let init = Init::Uniform(1.0 / (inputs as f64).sqrt());
        let (of_a, of_b) = splitting.map_or((None, None), |splitting| {
            let (a, b) = splitting.adapter_cuts(name);
            (a.map(|cut| (cut, splitting)), b.map(|cut| (cut, splitting)))
        });
        let (a, b) = (
            format!("{name}.lora_A.weight"),
            format!("{name}.lora_B.weight"),
        );
        let adapter = Adapter {
            a: self.factor(&a, ([rank, inputs], of_a), init),
            b: self.factor(&b, ([outputs, rank], of_b), Init::Zeros),
            scaling: self.built.config.scaling(rank, alpha),
            dropout: Arc::clone(&self.built.dropout),
            shard: splitting.and_then(|splitting| splitting.shard(name, inputs)),
        };
        let kept = (adapter.share(), layout);
        self.built.adapters.insert(name.into(), kept);
        Some(adapter)
    }

    fn factor(
        &mut self,
        name: &str,
        (shape, part): ([i64; 2], Option<PartOf<'_>>),
        init: Init,
    ) -> Tensor {
        let made = match &self.origin {
            Origin::Fresh { seed } => {
                let whole = fresh(*seed, name, &shape, init);
                let own = |whole: Tensor| match part {
                    Some((cut, splitting)) => splitting.part(cut, &whole),
                    None => Ok(whole),
                };
                whole.and_then(own).map(Some)
            }
            Origin::Given { .. } => self.given(name, (&shape, part)),
        };
        self.note_cut(name, &shape, part);
        self.kept(name, made, self.kind).unwrap_or_default()
    }

    /// Keeps what was made; a failure is noted for [`finish`](Self::finish).
    fn kept(&mut self, name: &str, made: Result<Option<Tensor>>, kind: Kind) -> Option<Tensor> {
        let kept = made.and_then(|made| {
            made.map(|tensor| self.keep(name, &tensor, kind))
                .transpose()
        });
        kept.unwrap_or_else(|error| {
            self.failure.get_or_insert(error);
            None
        })
    }

    /// Notes that a weight is split.
    fn note_cut(&mut self, name: &str, shape: &[i64], part: Option<PartOf<'_>>) {
        if let Some((cut, _)) = part {
            let size = shape[cut.dim as usize];
            self.built.cuts.insert(name.into(), (cut, size));
        }
    }

    /// Notes a weight that another stage has.
    pub(crate) fn is_elsewhere(&mut self, name: &str) {
        self.modules.insert(module_of(name).into());
    }

    /// The weight that stands in for `base` if its module is trained whole; `base` may be a part of
    /// a weight of the shape given.
    pub(crate) fn saved_weight(
        &mut self,
        name: &str,
        (shape, part): (&[i64], Option<PartOf<'_>>),
        base: &Tensor,
    ) -> Option<Tensor> {
        let module = module_of(name);
        self.modules.insert(module.into());
        if !self.selection.is_saved(module) {
            return None;
        }
        let made = match &self.origin {
            Origin::Fresh { .. } => copied(base).map(Some),
            Origin::Given { .. } => self.given(name, (shape, part)),
        };
        self.note_cut(name, shape, part);
        self.kept(name, made, base.kind())
    }

    /// Takes a weight out of those given.
    fn given(
        &mut self,
        name: &str,
        (expected, part): (&[i64], Option<PartOf<'_>>),
    ) -> Result<Option<Tensor>> {
        let Origin::Given { weights, .. } = &mut self.origin else {
            return Ok(None);
        };
        let is_part = |tensor: &Tensor| {
            part.is_some_and(|(cut, all)| tensor.size() == all.part_shape(cut, expected))
        };
        let problem = match weights.remove(name) {
            Some(tensor) if tensor.size() == expected => {
                return match part {
                    Some((cut, splitting)) => splitting.part(cut, &tensor).map(Some),
                    None => Ok(Some(tensor)),
                };
            }
            // A copy of another model's adapters.
            Some(tensor) if is_part(&tensor) => return Ok(Some(tensor)),
            Some(tensor) => WeightProblem::Shape {
                name: name.into(),
                found: tensor.size(),
                expected: expected.into(),
            },
            None => WeightProblem::Missing {
                name: name.into(),
                shape: expected.into(),
            },
        };
        self.problems.push(problem.into());
        Ok(None)
    }

    fn keep(&mut self, name: &str, tensor: &Tensor, kind: Kind) -> Result<Tensor> {
        let tensor = tensor.f_to_kind(kind)?.f_to_device(self.device)?;
        let tensor = tensor.f_set_requires_grad(self.trainable)?;
        let alias = tensor.shallow_clone();
        self.built.weights.insert(name.into(), alias);
        Ok(tensor)
    }

    pub(crate) fn finish(mut self) -> Result<Adapters> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let known = last_parts(&self.linears);
        for name in self.selection.unmatched(&self.linears) {
            let known = known.clone();
            let problem = AdapterProblem::UnknownTarget { name, known };
            self.problems.push(problem);
        }
        let path = match self.origin {
            Origin::Fresh { .. } => {
                for name in &self.built.config.modules_to_save {
                    if !self.modules.iter().any(|module| is_end(name, module)) {
                        self.problems.push(AdapterProblem::UnknownModule {
                            name: name.clone(),
                            known: last_parts(&self.modules),
                        });
                    }
                }
                None
            }
            // PEFT lists the heads that a classifier may have, of which it has one.
            Origin::Given { weights, path } => {
                for (name, tensor) in weights {
                    let shape = tensor.size();
                    let problem = WeightProblem::Unexpected { name, shape };
                    self.problems.push(problem.into());
                }
                path
            }
        };
        if self.built.adapters.is_empty() && self.problems.is_empty() {
            self.problems.push(AdapterProblem::NoTarget { known });
        }
        match self.problems.is_empty() {
            true => Ok(self.built),
            false => Err(Error::Adapter {
                path,
                problems: self.problems,
            }),
        }
    }
}

impl Adapters {
    /// The sum of all ranks.
    pub(crate) fn ranks(&self) -> u64 {
        let ranks = self
            .adapters
            .values()
            .map(|(adapter, _)| adapter.a.size()[0]);
        ranks.sum::<i64>() as u64
    }

    /// All that is trained, without history.
    pub(super) fn detached(&self) -> Vec<(String, Tensor)> {
        let detached = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.detach());
        self.weights.iter().map(detached).collect()
    }

    /// All that is trained, by name.
    pub(crate) fn weights(&self) -> &WeightMap {
        &self.weights
    }

    /// The weight `name` of the frozen model with what is trained in it, in the wider kind of
    /// the two; `None` where nothing is.
    pub(crate) fn merged(&self, name: &str, base: &Tensor) -> Result<Option<Tensor>> {
        if let Some(saved) = self.weights.get(name) {
            return Ok(Some(saved.f_detach()?));
        }
        let Some((adapter, layout)) = name
            .strip_suffix(".weight")
            .and_then(|module| self.adapters.get(module))
        else {
            return Ok(None);
        };
        Ok(Some(adapter.merged(base, *layout)?))
    }

    /// The modules that have adapters, in order.
    pub(super) fn modules(&self) -> impl Iterator<Item = &String> {
        self.adapters.keys()
    }

    /// Whether the adapted matrices are stored `[in, out]`.
    pub(super) fn is_fan_in_fan_out(&self) -> bool {
        let mut layouts = self.adapters.values().map(|(_, layout)| *layout);
        layouts.any(|layout| layout == Layout::InOut)
    }

    /// A copy of every weight.
    pub(super) fn copied(&self) -> Result<WeightMap> {
        self.weights
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), copied(tensor)?)))
            .collect()
    }
}

/// Memory of its own, and no history.
pub(crate) fn copied(tensor: &Tensor) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let mut copy = tensor.f_detach()?.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

/// The module that a weight belongs to.
fn module_of(weight: &str) -> &str {
    weight.rsplit_once('.').map_or(weight, |(module, _)| module)
}

/// What names end with, each once.
pub(super) fn last_parts<'a>(names: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let parts: BTreeSet<&str> = names
        .into_iter()
        .map(|name| name.rsplit('.').next().unwrap_or(name))
        .collect();
    parts.into_iter().map(String::from).collect()
}
