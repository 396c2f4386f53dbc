//! Embeddings and blocks of any architecture.

use rlhf_core::PackedBatch;
use rlhf_scale::{GradientCheckpointing, StageLink, VocabularyShard, leave_parallel};
use tch::{Device, Kind, Tensor};

use crate::attention::{Attention, RowsOfLast, SegmentAttention};
use crate::layers::{LayerNorm, RmsNorm};
use crate::pipeline_parallel::Stage;
use crate::rope::{Rope, Rotation};
use crate::weights::{Builder, Init};

/// Everything of a model but its head: what an architecture hands over.
pub(crate) struct Trunk {
    pub(crate) embedding: Embedding,
    pub(crate) rope: Rope,
    /// All blocks, or those of the stage.
    pub(crate) blocks: Vec<Box<dyn Block>>,
    pub(crate) final_norm: Norm,
    pub(crate) stage: Option<Stage>,
    /// Kind and device of the weights.
    pub(crate) place: (Kind, Device),
}

/// One of the layers that the residual stream runs through.
pub(crate) trait Block: Send {
    /// The same weights under other handles, which backward can keep.
    fn share(&self) -> Box<dyn Block>;

    /// `[N, H]` to `[N, H]`, or to the [rows](Attention::attended_rows) that the attention goes on
    /// with; `layer` counts from 0.
    fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> rlhf_core::Result<Tensor>;
}

/// Of tokens, and of positions where they are learned.
pub(crate) struct Embedding {
    tokens: Tensor,
    positions: Option<Tensor>,
    scale: Option<f64>,
    /// Which tokens these are, where other ranks have the others.
    shard: Option<VocabularyShard>,
}

impl Embedding {
    /// Takes the matrix of that name, `[tokens, width]`.
    pub(crate) fn build(
        builder: &mut Builder,
        name: &str,
        (tokens, width): (i64, i64),
        initializer_range: f64,
    ) -> Self {
        Self {
            tokens: builder.weight(name, &[tokens, width], Init::Normal(initializer_range)),
            positions: None,
            scale: None,
            shard: builder.vocabulary(tokens),
        }
    }

    /// With an embedding of positions, too.
    pub(crate) fn with_positions(self, positions: Tensor) -> Self {
        Self {
            positions: Some(positions),
            ..self
        }
    }

    /// Multiplied by a number.
    pub(crate) fn scaled(self, scale: f64) -> Self {
        Self {
            scale: Some(scale),
            ..self
        }
    }

    fn forward(&self, ids: &Tensor, positions: &Tensor) -> rlhf_core::Result<Tensor> {
        let mut x = match &self.shard {
            None => Tensor::f_embedding(&self.tokens, ids, -1, false, false)?,
            Some(shard) => self.of_all_ranks(ids, shard)?,
        };
        if let Some(scale) = self.scale {
            // Rounded to the model's kind before the product, as transformers does.
            x = x.f_mul(&Tensor::from(scale).f_to_kind(x.kind())?)?;
        }
        if let Some(table) = &self.positions {
            x = x.f_add(&Tensor::f_embedding(table, positions, -1, false, false)?)?;
        }
        Ok(x)
    }
}

impl Embedding {
    /// Of tokens that some rank has: the others add zeros.
    fn of_all_ranks(&self, ids: &Tensor, shard: &VocabularyShard) -> rlhf_core::Result<Tensor> {
        let (rows, own) = (ids.f_sub_scalar(shard.first)?, self.tokens.size()[0]);
        let inside = rows.f_ge(0)?.f_logical_and(&rows.f_lt(own)?)?;
        let rows = rows.f_clamp(0, own - 1)?;
        let x = Tensor::f_embedding(&self.tokens, &rows, -1, false, false)?;
        let x = x.f_mul(&inside.f_unsqueeze(1)?.f_to_kind(x.kind())?)?;
        leave_parallel(x, &shard.group).map_err(rlhf_core::Error::from)
    }
}

/// The norm after the last block.
pub(crate) enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    fn forward(&self, x: &Tensor) -> rlhf_core::Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }
}

impl Trunk {
    pub(crate) fn token_embedding(&self) -> &Tensor {
        &self.embedding.tokens
    }

    /// `[N]` ids and positions to `[N, H]` hidden states, or where a later stage makes them 0, a
    /// scalar. Layers are counted from the first that is here.
    pub(crate) fn forward(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attention,
    ) -> rlhf_core::Result<Tensor> {
        let (mut x, pass) = self.enter(ids, positions)?;
        let rotation = self.rope.rotation(positions, x.kind())?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(layer, &x, &rotation, attention)?;
        }
        self.leave(&x, pass)
    }

    /// What the first block here gets, `[N, H]`, and the number of the pass where there are stages.
    fn enter(
        &self,
        ids: &Tensor,
        positions: &Tensor,
    ) -> rlhf_core::Result<(Tensor, Option<(&StageLink, u64)>)> {
        let Some(stage) = &self.stage else {
            return Ok((self.embedding.forward(ids, positions)?, None));
        };
        let pass = stage.link.begin();
        let x = match stage.link.is_first() {
            true => self.embedding.forward(ids, positions)?,
            false => {
                let shape = [ids.size()[0], stage.width];
                stage.link.receive(pass, &shape, self.place)?
            }
        };
        Ok((x, Some((&stage.link, pass))))
    }

    /// What follows the last block here: the norm, or the next stage.
    fn leave(&self, x: &Tensor, pass: Option<(&StageLink, u64)>) -> rlhf_core::Result<Tensor> {
        match pass {
            Some((link, pass)) if !link.is_last() => Ok(link.send(pass, x)?),
            _ => self.final_norm.forward(x),
        }
    }

    /// Hidden states of a packed batch, or where a later stage makes them 0, a scalar, keeping the
    /// activations that `checkpointing` says: of `rows`, `[M, H]`, or of all tokens, `[N, H]`.
    pub(crate) fn hidden_states(
        &self,
        batch: &PackedBatch,
        rows: Option<Tensor>,
        checkpointing: GradientCheckpointing,
    ) -> rlhf_core::Result<Tensor> {
        let segments = SegmentAttention::new(&batch.segments, batch.position_ids.device())?;
        match rows {
            None => self.forward_checkpointed(batch, &segments, checkpointing),
            Some(rows) => {
                let last = self.last_of_forward().saturating_add(self.first_layer());
                let attention = RowsOfLast {
                    segments,
                    last,
                    rows,
                };
                self.forward_checkpointed(batch, &attention, checkpointing)
            }
        }
    }

    /// [`forward`](Self::forward), keeping the activations that `checkpointing` says.
    fn forward_checkpointed(
        &self,
        batch: &PackedBatch,
        attention: &(impl Attention + Clone + Send + 'static),
        checkpointing: GradientCheckpointing,
    ) -> rlhf_core::Result<Tensor> {
        let (ids, positions) = (&batch.input_ids, &batch.position_ids);
        let first = self.first_layer();
        let (x, pass) = self.enter(ids, positions)?;
        let rotation = self.rope.rotation(positions, x.kind())?;
        let blocks = self.blocks.iter().enumerate().map(|(layer, block)| {
            let (block, rotation, attention) = (block.share(), rotation.share(), attention.clone());
            move |x: &Tensor| block.forward(first + layer, x, &rotation, &mut attention.clone())
        });
        let x = checkpointing.run(blocks.collect(), &x)?;
        self.leave(&x, pass)
    }

    /// The block after which hidden states come out, as [`forward`](Self::forward) counts them; none if
    /// they come out in a later stage.
    pub(crate) fn last_of_forward(&self) -> usize {
        match self.has_end() {
            // Every config has at least one block.
            true => self.blocks.len().saturating_sub(1),
            false => usize::MAX,
        }
    }

    /// The number of the first block here.
    fn first_layer(&self) -> usize {
        let stage = self.stage.as_ref();
        stage.map_or(0, |stage| stage.layers.start as usize)
    }

    /// Whether hidden states come out here, rather than in a later stage.
    pub(crate) fn has_end(&self) -> bool {
        let stage = self.stage.as_ref();
        stage.is_none_or(|stage| stage.link.is_last())
    }

    /// The stage, where what the last one computes is wanted in all of them.
    pub(crate) fn sharing(&self) -> Option<&Stage> {
        self.stage
            .as_ref()
            .filter(|stage| stage.link.shares_results())
    }
}
