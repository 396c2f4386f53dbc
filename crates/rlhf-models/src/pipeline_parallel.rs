//! A model's blocks on several ranks, which pass activations on and gradients back.

use std::ops::Range;
use std::sync::Arc;

use rlhf_core::{Collective, PipelineStage, SequenceBatch};
use rlhf_scale::StageLink;
use tch::{Device, Kind, Tensor};

use crate::architecture::{Architecture, Names, Sizes};
use crate::{Error, Result};

/// The stages that a model's blocks are spread over, in the order of the group's ranks.
///
/// The first has the embedding, the last the last norm and the output layer; a tied embedding is on
/// both, and its gradient the sum of theirs. All stages call the same methods with the same batches.
///
/// While gradients are recorded, log-probabilities, values and losses come out in the last stage, and
/// stand-ins elsewhere, which are 0 and carry the gradient. [`Updater`](rlhf_scale::Updater) runs an
/// update's microbatches in the order one forward, one backward, so that a stage keeps the activations
/// of at most as many microbatches as stages follow it, and one more. Of `m` microbatches on `p` stages
/// each stage waits `p - 1` of `m + p - 1` turns.
///
/// Under `no_grad` every stage gets what the last has computed: a batch goes through the stages in
/// up to `2 p` parts, one behind the other. Responses are written by all stages together, each with
/// the cache of its blocks; the last chooses the tokens and tells the others. A token depends on the
/// one before it, so that of `p` stages one is busy at a time then.
///
/// # Bytes
/// A pass of `N` packed tokens sends `N H` elements of the model's kind, and 16 bytes, from every stage
/// but the last, and as many back from every stage but the first, checkpointed or not; an update
/// the gradient of a tied embedding once from the first and once from the last stage. Under `no_grad`
/// the last stage broadcasts its results, `4 B R` bytes for log-probabilities; for each token that is
/// written of `r` responses side by side, `8 (2 + 3 r)`.
///
/// # Limits
/// A stage has no logits and no hidden states to give away. Dropout of adapters draws other elements
/// than on one rank.
#[derive(Clone)]
pub struct PipelineParallel {
    pub(crate) group: Arc<dyn Collective>,
    /// One for all models, so that their passes are numbered together.
    link: Arc<StageLink>,
    blocks: Option<Vec<usize>>,
}

impl std::fmt::Debug for PipelineParallel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PipelineParallel")
            .field("stage", &self.group.rank())
            .field("stages", &self.group.size())
            .field("blocks", &self.blocks)
            .finish()
    }
}

impl PipelineParallel {
    /// Stages with as many blocks each, or one more.
    pub fn new(group: Arc<dyn Collective>) -> Self {
        Self {
            link: Arc::new(StageLink::new(Arc::clone(&group))),
            group,
            blocks: None,
        }
    }

    /// Stages with so many blocks each: fewer in the first and last, say, which have the vocabulary.
    #[must_use]
    pub fn with_blocks(self, blocks: Vec<usize>) -> Self {
        Self {
            blocks: Some(blocks),
            ..self
        }
    }

    /// This rank's blocks, of so many.
    fn range(&self, layers: i64) -> Result<Range<i64>> {
        let (stage, stages) = (self.group.rank(), self.group.size());
        let refuse = |reason| {
            Err(Error::CannotSplit {
                field: "number of layers",
                size: layers,
                ranks: stages,
                reason,
            })
        };
        match &self.blocks {
            None if layers < stages as i64 => refuse("a stage would have none"),
            None => {
                let first = |stage: usize| layers * stage as i64 / stages as i64;
                Ok(first(stage)..first(stage + 1))
            }
            Some(blocks) if blocks.len() != stages => {
                refuse("the list of blocks must have a number for each")
            }
            Some(blocks) if blocks.contains(&0) => refuse("each must have a block at least"),
            Some(blocks) if blocks.iter().sum::<usize>() as i64 != layers => {
                refuse("the numbers of blocks must add up to it")
            }
            Some(blocks) => {
                let first: usize = blocks.iter().take(stage).sum();
                let own = blocks.get(stage).copied().unwrap_or(0);
                Ok(first as i64..(first + own) as i64)
            }
        }
    }
}

/// The part of a model that a stage has.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    stages: PipelineParallel,
    pub(crate) link: Arc<StageLink>,
    pub(crate) layers: Range<i64>,
    /// Prefix of the trunk's weights.
    trunk: &'static str,
    ties: bool,
    pub(crate) width: i64,
}

impl Stage {
    /// `reads_embedding` says whether the head is the embedding, where the configuration ties the
    /// two.
    pub(crate) fn new(
        stages: &PipelineParallel,
        architecture: &dyn Architecture,
        reads_embedding: bool,
    ) -> Result<Self> {
        let Sizes {
            layers,
            ties_embeddings,
            hidden_size,
            ..
        } = architecture.sizes();
        let Names { trunk, .. } = architecture.names();
        Ok(Self {
            layers: stages.range(layers)?,
            link: Arc::clone(&stages.link),
            stages: stages.clone(),
            trunk,
            ties: ties_embeddings && reads_embedding,
            width: hidden_size,
        })
    }

    /// Whether a weight, or an adapter of it, is in this stage.
    pub(crate) fn has(&self, name: &str) -> bool {
        let end = self.link.is_last();
        let Some(name) = name.strip_prefix(self.trunk) else {
            return end;
        };
        let mut parts = name.split('.');
        let (first, second) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        match (first, second.parse()) {
            ("h" | "layers", Ok(layer)) => self.layers.contains(&layer),
            _ if TOKENS.contains(&first) => self.link.is_first() || (end && self.ties),
            ("wpe", _) => self.link.is_first(),
            _ => end,
        }
    }

    /// The stage as the update path sees it.
    pub(crate) fn described(&self, device: Device) -> PipelineStage {
        let (rank, last) = (self.stages.group.rank(), self.stages.group.size() - 1);
        let mut tied = Vec::new();
        if self.ties && last > 0 && (rank == 0 || rank == last) {
            let name = |module| (format!("{}{module}.weight", self.trunk), last - rank);
            tied.extend(TOKENS.map(name));
        }
        PipelineStage {
            group: Arc::clone(&self.stages.group),
            device,
            tied,
        }
    }
}

/// What comes out in the last stage.
impl Stage {
    /// What the other stages have in its place while gradients are recorded: 0, with the gradient's
    /// way to the last.
    pub(crate) fn stand_in(shape: &[i64], sent: &Tensor) -> rlhf_core::Result<Tensor> {
        let zeros = Tensor::f_zeros(shape, (Kind::Float, sent.device()))?;
        Ok(zeros.f_add(sent)?)
    }

    /// Puts the last stage's elements in the place of the others'.
    pub(crate) fn share(&self, result: &Tensor) -> rlhf_core::Result<()> {
        self.link.share(result).map_err(rlhf_core::Error::from)
    }

    /// What the last stage computes of a batch, in all stages. `compute` gets parts of the batch, which
    /// follow one another through the stages, and the rows that they are; it returns as many tensors
    /// `[rows, ..]` each time, which become `[B, width]` f32, with 0 past their columns.
    pub(crate) fn in_turns(
        &self,
        batch: &SequenceBatch,
        width: i64,
        compute: impl Fn(&SequenceBatch, Range<usize>) -> rlhf_core::Result<Vec<Tensor>>,
    ) -> rlhf_core::Result<Vec<Tensor>> {
        let turns = TURNS_PER_STAGE * self.stages.group.size();
        let size = batch.len().div_ceil(turns);
        let mut parts = Vec::new();
        for first in (0..batch.len()).step_by(size) {
            let rows = first..(first + size).min(batch.len());
            let part = batch.select(&rows.clone().collect::<Vec<_>>())?;
            let padded = compute(&part, rows)?
                .into_iter()
                .map(|t| t.f_constant_pad_nd([0, width - t.size()[1]]))
                .collect::<Result<Vec<_>, _>>()?;
            parts.push(Tensor::f_stack(&padded, 0)?);
        }
        let whole = Tensor::f_cat(&parts, 1)?.f_contiguous()?;
        self.share(&whole)?;
        Ok(whole.f_unbind(0)?)
    }
}

/// Parts of a batch for each stage, where nothing is kept for a backward: stages are busy for `2 p` of
/// `3 p - 1` turns then.
const TURNS_PER_STAGE: usize = 2;

/// Embeddings of tokens, by their names after the trunk's.
const TOKENS: [&str; 3] = ["wte", "embed_tokens", "embed_in"];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ModelConfig;
    use rlhf_core::Reduction;

    /// A stage that sends nothing.
    struct Alone(usize, usize);

    impl Collective for Alone {
        fn rank(&self) -> usize {
            self.0
        }
        fn size(&self) -> usize {
            self.1
        }
        fn all_reduce(&self, _: &Tensor, _: Reduction) -> rlhf_core::Result<()> {
            Ok(())
        }
        fn all_gather(&self, tensor: &Tensor) -> rlhf_core::Result<Vec<Tensor>> {
            Ok(vec![tensor.shallow_clone()])
        }
        fn broadcast(&self, _: &Tensor, _: usize) -> rlhf_core::Result<()> {
            Ok(())
        }
        fn send(&self, _: &Tensor, _: usize) -> rlhf_core::Result<()> {
            Ok(())
        }
        fn receive(&self, _: &Tensor, _: usize) -> rlhf_core::Result<()> {
            Ok(())
        }
    }

    fn stages(size: usize, blocks: Option<Vec<usize>>) -> Vec<Result<Range<i64>>> {
        (0..size)
            .map(|rank| {
                let stages = PipelineParallel::new(Arc::new(Alone(rank, size)));
                match &blocks {
                    Some(blocks) => stages.with_blocks(blocks.clone()).range(7),
                    None => stages.range(7),
                }
            })
            .collect()
    }

    #[test]
    fn blocks_are_dealt_out_in_order() {
        let ranges = |size, blocks| -> Vec<Range<i64>> {
            let all = stages(size, blocks);
            all.into_iter().map(Result::unwrap).collect()
        };
        assert_eq!(ranges(3, None), [0..2, 2..4, 4..7]);
        assert_eq!(ranges(2, Some(vec![4, 3])), [0..4, 4..7]);
        for (size, blocks) in [
            (8, None),
            (2, Some(vec![7])),
            (2, Some(vec![7, 0])),
            (2, Some(vec![4, 4])),
        ] {
            let refused = stages(size, blocks);
            assert!(refused.iter().all(Result::is_err));
        }
    }

    #[test]
    fn weights_are_in_their_stage() {
        let config = |tie_word_embeddings| {
            ModelConfig::Gpt2(crate::Gpt2Config {
                tie_word_embeddings,
                ..crate::Gpt2Config::default()
            })
        };
        let stage = |rank, ties, reads| {
            let stages = PipelineParallel::new(Arc::new(Alone(rank, 2)));
            Stage::new(&stages, config(ties).architecture(), reads).unwrap()
        };
        let has = |rank, ties, name: &str| stage(rank, ties, true).has(name);
        // A value head has no use for the embedding.
        assert!(!stage(1, true, false).has("transformer.wte.weight"));
        assert!(stage(1, true, false).has("score.weight"));
        assert!(!stage(0, true, false).has("score.weight"));
        assert!(stage(0, true, false).described(Device::Cpu).tied.is_empty());
        assert!(!stage(0, true, true).described(Device::Cpu).tied.is_empty());
        for (name, tied, untied) in [
            ("transformer.wte.weight", [true, true], [true, false]),
            ("transformer.wpe.weight", [true, false], [true, false]),
            ("transformer.h.0.ln_1.bias", [true, false], [true, false]),
            ("transformer.h.11.ln_1.bias", [false, true], [false, true]),
            ("transformer.ln_f.weight", [false, true], [false, true]),
            ("lm_head.weight", [false, true], [false, true]),
        ] {
            for rank in [0, 1] {
                assert_eq!(has(rank, true, name), tied[rank], "{name} {rank}");
                assert_eq!(has(rank, false, name), untied[rank], "{name} {rank}");
            }
        }
    }
}
