//! Where the weights of a model are that no rank has alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tch::Tensor;

use crate::gather::{gather_parts, gather_stages};
use crate::{Collective, Cut, PipelineStage, Reduction, Result};

/// Weights of which a rank has a part, by name: how they are cut, and the size of the whole dimension.
pub type Cuts = BTreeMap<String, (Cut, i64)>;

/// How the trainable weights of a model lie on several ranks.
///
/// A norm over all of them counts each weight once, however many ranks have it, and files hold each
/// whole.
#[derive(Clone)]
pub struct ParameterShards {
    /// Parts of layers.
    tensor: Option<Arc<dyn Collective>>,
    pipeline: Option<PipelineStage>,
    cuts: Cuts,
    /// Weights that every stage has.
    whole: BTreeSet<String>,
}

impl ParameterShards {
    /// `cuts` lists the weights of which each rank of the group has a part; the others are the same on
    /// all ranks.
    pub fn new(group: Arc<dyn Collective>, cuts: Cuts) -> Self {
        Self {
            tensor: Some(group),
            pipeline: None,
            cuts,
            whole: BTreeSet::new(),
        }
    }

    /// Those of a stage whose layers are whole.
    pub fn of_stage(stage: PipelineStage) -> Self {
        Self {
            tensor: None,
            pipeline: Some(stage),
            cuts: Cuts::new(),
            whole: BTreeSet::new(),
        }
    }

    /// These, in one stage of several.
    #[must_use]
    pub fn in_stage(self, stage: PipelineStage) -> Self {
        Self {
            pipeline: Some(stage),
            ..self
        }
    }

    /// The stage, where blocks are spread over several.
    pub fn stage(&self) -> Option<&PipelineStage> {
        self.pipeline.as_ref()
    }

    /// Reduces over all ranks that have the model together.
    ///
    /// # Errors
    /// Those of [`Collective::all_reduce`].
    pub fn all_reduce(&self, tensor: &Tensor, reduction: Reduction) -> Result<()> {
        let stages = self.pipeline.as_ref().map(|stage| &stage.group);
        for group in self.tensor.iter().chain(stages) {
            group.all_reduce(tensor, reduction)?;
        }
        Ok(())
    }

    /// Whether this is the first of the ranks that have the model together: the one that writes it.
    pub fn is_first(&self) -> bool {
        let stages = self.pipeline.as_ref().map(|stage| &stage.group);
        self.tensor
            .iter()
            .chain(stages)
            .all(|group| group.rank() == 0)
    }

    /// How many ranks have the same weight under this name.
    pub fn copies(&self, name: &str) -> usize {
        let in_stage = match &self.tensor {
            Some(group) if !self.cuts.contains_key(name) => group.size(),
            _ => 1,
        };
        let stages = match &self.pipeline {
            Some(stage) if self.whole.contains(name) => stage.group.size(),
            Some(stage) if stage.tied.iter().any(|(tied, _)| tied == name) => 2,
            _ => 1,
        };
        stages * in_stage
    }

    /// With weights of a model beside this one that all ranks have whole.
    #[must_use]
    pub fn with_whole(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.whole.extend(names);
        self
    }

    /// The same shards where each name has a prefix: see
    /// [`joined_parameters`](crate::joined_parameters).
    #[must_use]
    pub fn prefixed(mut self, prefix: &str) -> Self {
        let prefixed = |name: String| format!("{prefix}.{name}");
        let cuts = self.cuts.into_iter();
        self.cuts = cuts.map(|(name, cut)| (prefixed(name), cut)).collect();
        self.whole = self.whole.into_iter().map(prefixed).collect();
        if let Some(stage) = &mut self.pipeline {
            let tied = stage.tied.drain(..);
            stage.tied = tied.map(|(name, rank)| (prefixed(name), rank)).collect();
        }
        self
    }

    /// These and others on the same ranks.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.cuts.extend(other.cuts);
        self.whole.extend(other.whole);
        if let (Some(stage), Some(others)) = (&mut self.pipeline, other.pipeline) {
            stage.tied.extend(others.tied);
        }
        self
    }
}

/// Whole tensors from parts, and parts from whole ones. Tensors that are not a weight's, or a number
/// of it, are the same on all ranks.
impl ParameterShards {
    /// The shape of the whole of a tensor like the weight of that name.
    pub fn whole_shape(&self, weight: &str, part: &Tensor) -> Vec<i64> {
        let mut shape = part.size();
        if let (Some((cut, size)), false) = (self.cuts.get(weight), shape.is_empty()) {
            shape[cut.dim as usize] = *size;
        }
        shape
    }

    /// This rank's part of a whole tensor like the weight of that name.
    ///
    /// # Errors
    /// libtorch's (out of memory).
    pub fn part_of(&self, weight: &str, whole: Tensor) -> Result<Tensor> {
        match (&self.tensor, self.cuts.get(weight)) {
            (Some(group), Some((cut, _))) if whole.dim() > 0 => {
                cut.take(&whole, group.rank(), group.size())
            }
            _ => Ok(whole),
        }
    }

    /// Whole tensors of all stages on the CPU of the first rank, sorted by name; `None` elsewhere.
    /// `weight_of` says, by a tensor's name, like which weight it is. All ranks that have the model
    /// together call it.
    ///
    /// # Errors
    /// Those of the groups; libtorch's.
    pub fn gather(
        &self,
        tensors: Vec<(String, Tensor)>,
        weight_of: fn(&str) -> &str,
    ) -> Result<Option<Vec<(String, Tensor)>>> {
        let of_stage = match &self.tensor {
            None => Some(tensors),
            Some(group) => {
                let cut = |name: &str, tensor: &Tensor| {
                    let cut = self.cuts.get(weight_of(name));
                    cut.filter(|_| tensor.dim() > 0).copied()
                };
                gather_parts(group.as_ref(), tensors, cut)?
            }
        };
        match (of_stage, &self.pipeline) {
            (Some(tensors), Some(stage)) => {
                gather_stages(stage.group.as_ref(), tensors, stage.device)
            }
            (tensors, _) => Ok(tensors),
        }
    }
}

impl std::fmt::Debug for ParameterShards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParameterShards")
            .field("cuts", &self.cuts)
            .field(
                "stage",
                &self.pipeline.as_ref().map(|stage| stage.group.rank()),
            )
            .finish_non_exhaustive()
    }
}
