//! A trunk with a head, and the weights of both.

use std::path::Path;

use rlhf_core::{Cuts, PackedBatch, ParameterShards, PipelineStage, Replicas, SequenceBatch};
use rlhf_scale::GradientCheckpointing;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{Reading, read_weights, write_model};
use crate::config::Head;
use crate::lora::{Adapters, Rebuild};
use crate::placement::Placement;
use crate::trunk::Trunk;
use crate::weights::{Builder, Built, WeightMap};
use crate::{LoadOptions, ModelConfig, Result, SaveOptions};

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

impl<H: Rebuild> Model<H> {
    /// Builds trunk and head from one source of weights; `dir` names it in errors.
    pub(crate) fn build(
        config: ModelConfig,
        mut builder: Builder,
        dir: &Path,
        head: impl FnOnce(&ModelConfig, &Trunk, &mut Builder) -> H,
    ) -> Result<Self> {
        rlhf_scale::reuse_memory().map_err(rlhf_core::Error::from)?;
        builder.split(&config, H::READS_EMBEDDING)?;
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
}

impl<H> Model<H> {
    /// Writes a folder that holds a plain model: adapters are merged into what is written. Of several
    /// ranks, and copies of what they have, the first writes the whole model.
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
        // Of copies beside each other the first writes.
        if Replicas::current().rank() > 0 {
            return Ok(());
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

    /// The stage that this rank has, of several.
    pub(crate) fn stage(&self) -> Option<PipelineStage> {
        let stage = self.trunk.stage.as_ref();
        stage.map(|stage| stage.described(self.device()))
    }

    /// Where the weights are, if not all on this rank.
    pub(crate) fn shards(&self) -> Option<ParameterShards> {
        let mut cuts = self.cuts.clone();
        if let Some(adapters) = &self.adapters {
            cuts.extend(adapters.cuts.clone());
        }
        let stage = self.trunk.stage.as_ref();
        self.placement.shards(cuts, (stage, self.device()))
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
