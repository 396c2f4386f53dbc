//! A model's blocks on several ranks, which pass activations on and gradients back.

use std::ops::Range;
use std::sync::Arc;

use rlhf_core::{Collective, PipelineStage};
use rlhf_scale::StageLink;
use tch::{Device, Kind, Tensor};

use crate::architecture::{Architecture, Names, Sizes};
use crate::{Error, Result};

/// The stages that a model's blocks are spread over, in the order of the group's ranks.
///
/// The first has the embedding, the last the last norm and the output layer; a tied embedding is on
/// both, and its gradient the sum of theirs. All stages call the same methods with the same batches:
/// log-probabilities and losses come out in the last, and stand-ins elsewhere, which are 0 and carry
/// the gradient. [`Updater`](rlhf_scale::Updater) runs an update's microbatches in the order one
/// forward, one backward, so that a stage keeps the activations of at most as many microbatches as
/// stages follow it, and one more. Of `m` microbatches on `p` stages each stage waits `p - 1` of
/// `m + p - 1` turns.
///
/// # Bytes
/// A pass of `N` packed tokens sends `N H` elements of the model's kind, and 16 bytes, from every stage
/// but the last, and as many back from every stage but the first, checkpointed or not; an update
/// the gradient of a tied embedding once from the first and once from the last stage.
///
/// # Limits
/// Training and scoring of [`CausalLm`](crate::CausalLm). A stage has no logits and no decoder: write
/// responses with a model that is not spread. The stats of trainers are those of the last stage, but
/// for the loss and the gradient norm. Dropout of adapters draws other elements than on one rank.
#[derive(Clone)]
pub struct PipelineParallel {
    pub(crate) group: Arc<dyn Collective>,
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

    /// What all stages have, on the first and by name; `None` on the others. Every stage calls it.
    pub(crate) fn gather_all(
        &self,
        mut weights: Vec<(String, Tensor)>,
        device: Device,
    ) -> Result<Option<Vec<(String, Tensor)>>> {
        if self.group.rank() > 0 {
            self.send_all(&weights, device)?;
            return Ok(None);
        }
        for stage in 1..self.group.size() {
            for (name, tensor) in self.receive_all(stage, device)? {
                // A tied embedding is here already.
                if weights.iter().all(|(known, _)| *known != name) {
                    weights.push((name, tensor));
                }
            }
        }
        weights.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Some(weights))
    }

    fn send_all(&self, weights: &[(String, Tensor)], device: Device) -> Result<()> {
        let list: Vec<Sent> = weights
            .iter()
            .map(|(name, tensor)| Sent {
                name: name.clone(),
                shape: tensor.size(),
                kind: KINDS.iter().position(|kind| *kind == tensor.kind()),
            })
            .collect();
        let text = serde_json::to_vec(&list).map_err(rlhf_core::Error::model)?;
        let length = Tensor::from_slice(&[text.len() as i64]).f_to_device(device)?;
        self.group.send(&length, 0)?;
        self.group
            .send(&Tensor::from_slice(&text).f_to_device(device)?, 0)?;
        for (_, tensor) in weights {
            let tensor = tensor.f_detach()?.f_to_device(device)?.f_contiguous()?;
            self.group.send(&tensor, 0)?;
        }
        Ok(())
    }

    fn receive_all(&self, stage: usize, device: Device) -> Result<Vec<(String, Tensor)>> {
        let length = Tensor::f_zeros([1], (Kind::Int64, device))?;
        self.group.receive(&length, stage)?;
        let length = i64::try_from(&length.f_reshape([] as [i64; 0])?)?;
        let text = Tensor::f_zeros([length], (Kind::Uint8, device))?;
        self.group.receive(&text, stage)?;
        let text = Vec::<u8>::try_from(&text)?;
        let list: Vec<Sent> = serde_json::from_slice(&text).map_err(rlhf_core::Error::model)?;
        list.into_iter()
            .map(|Sent { name, shape, kind }| {
                let kind = kind.and_then(|kind| KINDS.get(kind).copied());
                let kind = kind.unwrap_or(Kind::Float);
                let tensor = Tensor::f_empty(shape.as_slice(), (kind, device))?;
                self.group.receive(&tensor, stage)?;
                Ok((name, tensor))
            })
            .collect()
    }
}

/// Kinds of weights.
const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16];

/// A tensor that a stage sends.
#[derive(serde::Serialize, serde::Deserialize)]
struct Sent {
    name: String,
    shape: Vec<i64>,
    /// Its place among the kinds of weights.
    kind: Option<usize>,
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
    pub(crate) fn new(stages: &PipelineParallel, architecture: &dyn Architecture) -> Result<Self> {
        let Sizes {
            layers,
            ties_embeddings,
            hidden_size,
            ..
        } = architecture.sizes();
        let Names { trunk, .. } = architecture.names();
        Ok(Self {
            layers: stages.range(layers)?,
            link: Arc::new(StageLink::new(Arc::clone(&stages.group))),
            stages: stages.clone(),
            trunk,
            ties: ties_embeddings,
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
    pub(crate) fn described(&self) -> PipelineStage {
        let (rank, last) = (self.stages.group.rank(), self.stages.group.size() - 1);
        let mut tied = Vec::new();
        if self.ties && last > 0 && (rank == 0 || rank == last) {
            let name = |module| (format!("{}{module}.weight", self.trunk), last - rank);
            tied.extend(TOKENS.map(name));
        }
        PipelineStage {
            group: Arc::clone(&self.stages.group),
            tied,
        }
    }
}

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
                let stages = PipelineParallel {
                    group: Arc::new(Alone(rank, size)),
                    blocks: blocks.clone(),
                };
                stages.range(7)
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
        let has = |rank, ties, name: &str| {
            let stages = PipelineParallel::new(Arc::new(Alone(rank, 2)));
            let stage = Stage::new(&stages, config(ties).architecture()).unwrap();
            stage.has(name)
        };
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
