//! Embeddings and blocks of any architecture, with the weights of the whole model.

use std::path::Path;

use rlhf_core::{PackedBatch, ParameterShards, SequenceBatch};
use rlhf_scale::{GradientCheckpointing, VocabularyShard, leave_parallel};
use tch::{Device, Kind, Tensor};

use crate::attention::{Attention, RowsOfLast, SegmentAttention};
use crate::checkpoint::{Reading, read_weights, write_model};
use crate::config::Head;
use crate::layers::{LayerNorm, RmsNorm};
use crate::lora::Adapters;
use crate::pipeline_parallel::Stage;
use crate::placement::Placement;
use crate::rope::{Rope, Rotation};
use crate::tensor_parallel::Cuts;
use crate::weights::{Builder, Built, Init, WeightMap};
use crate::{LoadOptions, ModelConfig, Result, SaveOptions};

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

    /// `[N]` ids and positions to `[N, H]` hidden states, of a trunk that is whole.
    pub(crate) fn forward(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attention,
    ) -> rlhf_core::Result<Tensor> {
        let mut x = self.embedding.forward(ids, positions)?;
        let rotation = self.rope.rotation(positions, x.kind())?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(layer, &x, &rotation, attention)?;
        }
        self.final_norm.forward(&x)
    }

    /// Hidden states of a packed batch, or where a later stage makes them 0, a scalar, keeping the activations that `checkpointing` says: of
    /// `rows`, `[M, H]`, or of all tokens, `[N, H]`.
    fn hidden_states(
        &self,
        batch: &PackedBatch,
        rows: Option<Tensor>,
        checkpointing: GradientCheckpointing,
    ) -> rlhf_core::Result<Tensor> {
        let segments = SegmentAttention::new(&batch.segments, batch.position_ids.device())?;
        match rows {
            None => self.forward_checkpointed(batch, &segments, checkpointing),
            Some(rows) => {
                // Every config has at least one block.
                let last = self.first_layer() + self.blocks.len().saturating_sub(1);
                let last = match self.has_end() {
                    true => last,
                    false => usize::MAX,
                };
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
        let pass = self.stage.as_ref().map(|stage| (stage, stage.link.begin()));
        let x = match pass {
            Some((stage, pass)) if !stage.link.is_first() => {
                let shape = [ids.size()[0], stage.width];
                stage.link.receive(pass, &shape, self.place)?
            }
            _ => self.embedding.forward(ids, positions)?,
        };
        let rotation = self.rope.rotation(positions, x.kind())?;
        let blocks = self.blocks.iter().enumerate().map(|(layer, block)| {
            let (block, rotation, attention) = (block.share(), rotation.share(), attention.clone());
            move |x: &Tensor| block.forward(first + layer, x, &rotation, &mut attention.clone())
        });
        let x = checkpointing.run(blocks.collect(), &x)?;
        match pass {
            Some((stage, pass)) if !stage.link.is_last() => Ok(stage.link.send(pass, &x)?),
            _ => self.final_norm.forward(&x),
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
}

/// A trunk and a head with the weights of both.
pub(crate) struct Model<H> {
    pub(crate) config: ModelConfig,
    pub(crate) trunk: Trunk,
    pub(crate) head: H,
    pub(crate) weights: WeightMap,
    /// Adapters of frozen weights.
    pub(crate) adapters: Option<Adapters>,
    /// Where the other parts of the model are.
    pub(crate) placement: Placement,
    /// The weights that are split over ranks.
    cuts: Cuts,
    pub(crate) checkpointing: GradientCheckpointing,
}

impl<H> Model<H> {
    /// Builds trunk and head from one source of weights; `dir` names it in errors.
    pub(crate) fn build(
        config: ModelConfig,
        mut builder: Builder,
        dir: &Path,
        head: impl FnOnce(&ModelConfig, &Trunk, &mut Builder) -> H,
    ) -> Result<Self> {
        rlhf_scale::reuse_memory().map_err(rlhf_core::Error::from)?;
        builder.split(&config)?;
        let trunk = config.build_trunk(&mut builder)?;
        let head = head(&config, &trunk, &mut builder);
        let Built {
            weights,
            adapters,
            placement,
            cuts,
        } = builder.finish(dir)?;
        Ok(Self {
            config,
            trunk,
            head,
            weights,
            adapters,
            placement,
            cuts,
            checkpointing: GradientCheckpointing::default(),
        })
    }

    /// Reads a folder's weights under this crate's names for them. `prepare` sees them before
    /// the model is built, and what it returns goes to `head`. On several ranks each reads its part.
    pub(crate) fn load<P>(
        dir: &Path,
        (options, placement): (&LoadOptions, &Placement),
        prepare: impl FnOnce(&ModelConfig, &mut WeightMap) -> P,
        head: impl FnOnce(P, &ModelConfig, &Trunk, &mut Builder) -> H,
    ) -> Result<Self> {
        // Before the first weight is made.
        rlhf_scale::reuse_memory().map_err(rlhf_core::Error::from)?;
        let config = ModelConfig::from_dir(dir)?;
        let mut weights: WeightMap = read_weights(dir, Reading::of(placement))?
            .into_iter()
            .map(|(name, tensor)| (config.canonical_name(name), tensor))
            .collect();
        let prepared = prepare(&config, &mut weights);
        let stored = weights.values().next().map_or(Kind::Float, Tensor::kind);
        let kind = options.kind.unwrap_or(stored);
        let builder = Builder::from_weights(weights, options.device, kind)
            .copying()
            .at(placement);
        let mut model = Self::build(config, builder, dir, |config, trunk, builder| {
            head(prepared, config, trunk, builder)
        })?;
        model.set_checkpointing(options.gradient_checkpointing)?;
        Ok(model)
    }

    /// Writes a folder that holds a plain model: adapters are merged into what is written. Of several
    /// ranks the first writes the whole model.
    pub(crate) fn save(&self, dir: &Path, head: Head, options: &SaveOptions) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let kind = options.kind.unwrap_or_else(|| self.kind());
        let weights = self
            .weights
            .iter()
            .map(|(name, tensor)| {
                let merged = self.merged_weight(name)?;
                let weight = merged.unwrap_or_else(|| tensor.shallow_clone());
                Ok((name.clone(), weight))
            })
            .collect::<Result<Vec<_>>>()?;
        let config = self.config.to_json(head, kind);
        let write = |weights| write_model(dir, weights, kind, &config, options.max_shard_size);
        let placement = &self.placement;
        if !placement.is_split() {
            return write(weights);
        }
        let written = match placement.gather_all(weights, &self.cuts, self.device())? {
            Some(weights) => write(weights),
            None => Ok(()),
        };
        placement.agree(written, self.device())
    }

    /// A copy of every weight, adapters merged, to build another plain model from.
    pub(crate) fn copied_weights(&self) -> Result<WeightMap> {
        let _guard = tch::no_grad_guard();
        self.weights
            .iter()
            .map(|(name, tensor)| {
                let mut copy = tensor.f_empty_like()?;
                copy.f_copy_(self.merged_weight(name)?.as_ref().unwrap_or(tensor))?;
                Ok((name.clone(), copy))
            })
            .collect()
    }

    /// The weight of that name with its adapter, in the wider kind of the two; `None` where
    /// there is nothing to add.
    pub(crate) fn merged_weight(&self, name: &str) -> Result<Option<Tensor>> {
        match (&self.adapters, self.weights.get(name)) {
            (Some(adapters), Some(weight)) => adapters.merged(name, weight),
            _ => Ok(None),
        }
    }

    /// `[N, H]` hidden states of a packed batch, after the last norm.
    pub(crate) fn hidden_states(&self, batch: &PackedBatch) -> rlhf_core::Result<Tensor> {
        self.trunk.hidden_states(batch, None, self.checkpointing)
    }

    /// `[M, H]` hidden states of some rows of a packed batch, which may be named more than once.
    /// The last block's feed-forward layer and the last norm see no other.
    pub(crate) fn hidden_states_of(
        &self,
        batch: &PackedBatch,
        rows: Tensor,
    ) -> rlhf_core::Result<Tensor> {
        self.trunk
            .hidden_states(batch, Some(rows), self.checkpointing)
    }

    /// The packed layout of a batch that this model can read.
    pub(crate) fn checked_packed(&self, batch: &SequenceBatch) -> rlhf_core::Result<PackedBatch> {
        batch.check_length(self.config.max_length())?;
        batch.check_vocabulary(self.config.vocab_size())?;
        Ok(batch.packed(self.device()))
    }

    /// Where the weights are, if not all on this rank.
    pub(crate) fn shards(&self) -> Option<ParameterShards> {
        let of_adapters = self
            .adapters
            .iter()
            .flat_map(|adapters| adapters.cuts.keys());
        let cuts = self.cuts.keys().chain(of_adapters).cloned();
        self.placement.shards(cuts, self.trunk.stage.as_ref())
    }

    pub(crate) fn trainable(&self) -> Vec<(String, Tensor)> {
        let adapters = self.adapters.iter().flat_map(Adapters::weights);
        let mut trainable: Vec<_> = self
            .weights
            .iter()
            .chain(adapters)
            .filter(|(_, tensor)| tensor.requires_grad())
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect();
        trainable.sort_by(|a, b| a.0.cmp(&b.0));
        trainable
    }

    pub(crate) fn set_checkpointing(&mut self, checkpointing: GradientCheckpointing) -> Result<()> {
        checkpointing.validate()?;
        self.checkpointing = checkpointing;
        Ok(())
    }

    /// Where there are adapters it is about them; what they adapt stays frozen.
    pub(crate) fn set_trainable(&mut self, trainable: bool) {
        let weights = match &self.adapters {
            Some(adapters) => adapters.weights(),
            None => &self.weights,
        };
        for tensor in weights.values() {
            // Returns another handle of the same tensor, on which the flag is set.
            let _ = tensor.set_requires_grad(trainable);
        }
    }

    pub(crate) fn device(&self) -> Device {
        self.trunk.place.1
    }

    pub(crate) fn kind(&self) -> Kind {
        self.trunk.place.0
    }
}
