//! Ranks that compute one thing together, as the models and the update path see them.

use std::collections::BTreeMap;
use std::sync::Arc;

use tch::Tensor;

use crate::Result;

/// A group of ranks that exchange tensors: processes of a c10d group, usually.
///
/// A model whose weights are split over ranks, and the update path that clips its gradients, ask no
/// more of a group than this. All ranks make the same calls in the same order; a group's calls may
/// come from any thread, one at a time.
pub trait Collective: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Puts the sum, or the largest, of all ranks' elements in the place of each; every rank gets the
    /// same bits.
    ///
    /// # Errors
    /// A rank that is gone or late; a tensor that is not contiguous.
    fn all_reduce(&self, tensor: &Tensor, reduction: Reduction) -> Result<()>;

    /// The tensors of all ranks, which have one shape and kind, in the order of the ranks.
    ///
    /// # Errors
    /// A rank that is gone or late.
    fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>>;

    /// Sends a tensor to a rank. It may return before the tensor is there, and does not wait for
    /// the other to ask: two ranks may send to each other before either receives.
    ///
    /// # Errors
    /// A rank that is gone or late.
    fn send(&self, tensor: &Tensor, to: usize) -> Result<()>;

    /// Fills a contiguous tensor with the next one that a rank sends.
    ///
    /// # Errors
    /// A rank that is gone or late; a tensor of another size.
    fn receive(&self, tensor: &Tensor, from: usize) -> Result<()>;
}

/// What becomes of the elements of several ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

/// How the trainable weights of a model lie on several ranks.
///
/// A norm over all of them counts each weight once, however many ranks have it.
#[derive(Clone)]
pub struct ParameterShards {
    /// Parts of layers.
    tensor: Option<Arc<dyn Collective>>,
    pipeline: Option<PipelineStage>,
    copies: BTreeMap<String, usize>,
}

/// One of the stages that the blocks of a model are spread over.
#[derive(Clone)]
pub struct PipelineStage {
    /// The stages, in order.
    pub group: Arc<dyn Collective>,
    /// Weights that another stage has, too, by the stage's rank: a gradient is the sum of both.
    pub tied: Vec<(String, usize)>,
}

impl PipelineStage {
    /// Whether losses are computed here, in the last stage.
    pub fn has_loss(&self) -> bool {
        self.group.rank() + 1 == self.group.size()
    }

    /// Microbatches whose forward pass is done before the first backward: the later stages are then
    /// busy with them.
    pub fn ahead(&self) -> usize {
        self.group.size() - 1 - self.group.rank()
    }
}

impl ParameterShards {
    /// `copies` says how many ranks of the group have the same weight under a name: 1 for a part of
    /// a weight that is split. Weights that are not listed are the same on all ranks.
    pub fn new(group: Arc<dyn Collective>, copies: BTreeMap<String, usize>) -> Self {
        Self {
            tensor: Some(group),
            pipeline: None,
            copies,
        }
    }

    /// Those of a stage whose layers are whole.
    pub fn of_stage(stage: PipelineStage) -> Self {
        Self {
            tensor: None,
            pipeline: Some(stage),
            copies: BTreeMap::new(),
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

    /// Which part this rank has, in words: `part 1 of 2, stage 0 of 4`, counted from 0.
    pub fn place(&self) -> String {
        let of = |what: &str, group: &Arc<dyn Collective>| {
            format!("{what} {} of {}", group.rank(), group.size())
        };
        let part = self.tensor.as_ref().map(|group| of("part", group));
        let stage = self
            .pipeline
            .as_ref()
            .map(|stage| of("stage", &stage.group));
        let words: Vec<String> = part.into_iter().chain(stage).collect();
        words.join(", ")
    }

    /// How many ranks have the same weight under this name.
    pub fn copies(&self, name: &str) -> usize {
        let all = || self.tensor.as_ref().map_or(1, |group| group.size());
        let in_stage = self.copies.get(name).copied().unwrap_or_else(all);
        let tied = |stage: &PipelineStage| stage.tied.iter().any(|(tied, _)| tied == name);
        match self.pipeline.as_ref().is_some_and(tied) {
            true => 2 * in_stage,
            false => in_stage,
        }
    }

    /// The same shards where each name has a prefix: see
    /// [`joined_parameters`](crate::joined_parameters).
    #[must_use]
    pub fn prefixed(mut self, prefix: &str) -> Self {
        let prefixed = |name: String| format!("{prefix}.{name}");
        let copies = self.copies.into_iter();
        self.copies = copies.map(|(name, n)| (prefixed(name), n)).collect();
        if let Some(stage) = &mut self.pipeline {
            let tied = stage.tied.drain(..);
            stage.tied = tied.map(|(name, rank)| (prefixed(name), rank)).collect();
        }
        self
    }

    /// These and others on the same ranks.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.copies.extend(other.copies);
        if let (Some(stage), Some(others)) = (&mut self.pipeline, other.pipeline) {
            stage.tied.extend(others.tied);
        }
        self
    }
}

impl std::fmt::Debug for ParameterShards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParameterShards")
            .field("copies", &self.copies)
            .field(
                "stage",
                &self.pipeline.as_ref().map(|stage| stage.group.rank()),
            )
            .finish_non_exhaustive()
    }
}
