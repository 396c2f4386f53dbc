//! Embeddings and blocks of any architecture, with the weights of the whole model.

use std::path::Path;

use rlhf_core::{PackedBatch, SequenceBatch};
use rlhf_scale::GradientCheckpointing;
use tch::{Device, Kind, Tensor};

use crate::attention::{Attention, SegmentAttention};
use crate::checkpoint::{read_weights, write_model};
use crate::config::Head;
use crate::gpt2::Gpt2;
use crate::llama::Llama;
use crate::weights::{Builder, WeightMap};
use crate::{Error, LoadOptions, ModelConfig, Result};

/// Everything of a model but its head.
pub(crate) enum Trunk {
    Gpt2(Gpt2),
    Llama(Llama),
}

impl Trunk {
    pub(crate) fn build(config: &ModelConfig, builder: &mut Builder) -> Self {
        match config {
            ModelConfig::Gpt2(config) => Self::Gpt2(Gpt2::build(config, builder)),
            ModelConfig::Llama(config) => {
                let device = builder.device();
                Self::Llama(Llama::build(config, builder, device))
            }
        }
    }

    pub(crate) fn token_embedding(&self) -> &Tensor {
        match self {
            Self::Gpt2(model) => model.token_embedding(),
            Self::Llama(model) => model.token_embedding(),
        }
    }

    /// `[N]` ids and positions to `[N, H]` hidden states.
    pub(crate) fn forward(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attention,
    ) -> rlhf_core::Result<Tensor> {
        match self {
            Self::Gpt2(model) => model.forward(ids, positions, attention),
            Self::Llama(model) => model.forward(ids, positions, attention),
        }
    }

    /// `[N, H]` hidden states of a packed batch.
    fn hidden_states(
        &self,
        batch: &PackedBatch,
        checkpointing: GradientCheckpointing,
    ) -> rlhf_core::Result<Tensor> {
        let (ids, positions) = (&batch.input_ids, &batch.position_ids);
        let attention = SegmentAttention::new(&batch.segments);
        match self {
            Self::Gpt2(model) => {
                model.forward_checkpointed(ids, positions, &attention, checkpointing)
            }
            Self::Llama(model) => {
                model.forward_checkpointed(ids, positions, &attention, checkpointing)
            }
        }
    }
}

/// A trunk and a head with the weights of both.
pub(crate) struct Model<H> {
    pub(crate) config: ModelConfig,
    pub(crate) trunk: Trunk,
    pub(crate) head: H,
    pub(crate) weights: WeightMap,
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
        let trunk = Trunk::build(&config, &mut builder);
        let head = head(&config, &trunk, &mut builder);
        let weights = builder.finish().map_err(|problems| Error::Weights {
            path: dir.into(),
            problems,
        })?;
        Ok(Self {
            config,
            trunk,
            head,
            weights,
            checkpointing: GradientCheckpointing::default(),
        })
    }

    /// Reads a folder's weights under this crate's names for them. `prepare` sees them before
    /// the model is built, and what it returns goes to `head`.
    pub(crate) fn load<P>(
        dir: &Path,
        options: &LoadOptions,
        prepare: impl FnOnce(&ModelConfig, &mut WeightMap) -> P,
        head: impl FnOnce(P, &ModelConfig, &Trunk, &mut Builder) -> H,
    ) -> Result<Self> {
        let config = ModelConfig::from_dir(dir)?;
        let mut weights: WeightMap = read_weights(dir)?
            .into_iter()
            .map(|(name, tensor)| (canonical(&config, name), tensor))
            .collect();
        let prepared = prepare(&config, &mut weights);
        let stored = weights.values().next().map_or(Kind::Float, Tensor::kind);
        let kind = options.kind.unwrap_or(stored);
        let builder = Builder::from_weights(weights, options.device, kind);
        let mut model = Self::build(config, builder, dir, |config, trunk, builder| {
            head(prepared, config, trunk, builder)
        })?;
        model.set_checkpointing(options.gradient_checkpointing)?;
        Ok(model)
    }

    pub(crate) fn save(&self, dir: &Path, head: Head, kind: Kind) -> Result<()> {
        let weights = self
            .weights
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor.f_to_kind(kind)?)))
            .collect::<Result<Vec<_>>>()?;
        write_model(dir, weights, &self.config.to_json(head, kind))
    }

    /// A copy of every weight, to build another model from.
    pub(crate) fn copied_weights(&self) -> Result<WeightMap> {
        let _guard = tch::no_grad_guard();
        self.weights
            .iter()
            .map(|(name, tensor)| {
                let mut copy = tensor.f_empty_like()?;
                copy.f_copy_(tensor)?;
                Ok((name.clone(), copy))
            })
            .collect()
    }

    /// `[N, H]` hidden states of a packed batch, after the last norm.
    pub(crate) fn hidden_states(&self, batch: &PackedBatch) -> rlhf_core::Result<Tensor> {
        self.trunk.hidden_states(batch, self.checkpointing)
    }

    /// The packed layout of a batch that this model can read.
    pub(crate) fn checked_packed(&self, batch: &SequenceBatch) -> rlhf_core::Result<PackedBatch> {
        batch.check_length(self.config.max_length())?;
        batch.check_vocabulary(self.config.vocab_size())?;
        Ok(batch.packed(self.device()))
    }

    pub(crate) fn trainable(&self) -> Vec<(String, Tensor)> {
        self.weights
            .iter()
            .filter(|(_, tensor)| tensor.requires_grad())
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect()
    }

    pub(crate) fn set_checkpointing(&mut self, checkpointing: GradientCheckpointing) -> Result<()> {
        checkpointing.validate()?;
        self.checkpointing = checkpointing;
        Ok(())
    }

    pub(crate) fn set_trainable(&mut self, trainable: bool) {
        for tensor in self.weights.values() {
            // Returns another handle of the same tensor, on which the flag is set.
            let _ = tensor.set_requires_grad(trainable);
        }
    }

    pub(crate) fn device(&self) -> Device {
        self.trunk.token_embedding().device()
    }

    pub(crate) fn kind(&self) -> Kind {
        self.trunk.token_embedding().kind()
    }
}

/// Trunks are saved with and without the prefix that their causal model gives them.
fn canonical(config: &ModelConfig, name: String) -> String {
    let prefix = match config {
        ModelConfig::Gpt2(_) => "transformer.",
        ModelConfig::Llama(_) => "model.",
    };
    let of_head = ["lm_head.", "score.", "v_head."]
        .iter()
        .any(|head| name.starts_with(head));
    if of_head || name.starts_with(prefix) {
        name
    } else {
        format!("{prefix}{name}")
    }
}
