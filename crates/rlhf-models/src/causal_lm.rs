//! Language models.

use std::path::Path;

use rlhf_core::{PackedBatch, ParameterShards, Parameters};
use rlhf_scale::{GradientCheckpointing, VocabularyShard, enter_parallel, gather_columns};
use tch::{Device, Kind, Tensor};

use crate::config::Head;
use crate::layers::linear;
use crate::lora::{CAUSAL_LM, Rebuild};
use crate::model::Model;
use crate::trunk::Trunk;
use crate::weights::{Builder, Init, WeightMap};
use crate::{Error, ModelConfig, Placement, Result, SaveOptions};

mod scoring;

/// Where and in what precision a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadOptions {
    /// The device of the weights.
    pub device: Device,
    /// Their kind; `None` for the one they are stored in.
    pub kind: Option<Kind>,
    /// Which activations training keeps, and which it computes again.
    pub gradient_checkpointing: GradientCheckpointing,
}

impl Default for LoadOptions {
    /// On the CPU, as stored, all activations kept.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            kind: None,
            gradient_checkpointing: GradientCheckpointing::default(),
        }
    }
}

/// A causal language model: a trunk and the projection to the vocabulary.
///
/// Weights keep the names and layouts of the Hugging Face checkpoint, and are trainable unless
/// [`set_trainable`](Self::set_trainable) says otherwise. With
/// [LoRA adapters](Self::add_adapter) those are trained in their place. There is no dropout but
/// that of adapters.
pub struct CausalLm {
    pub(crate) model: Model<LmHead>,
    chunk_rows: Option<usize>,
}

/// The projection to the vocabulary.
pub(crate) struct LmHead {
    /// `[V, H]`: a weight of its own, or the input embedding.
    weight: Tensor,
    /// Bound of the logits.
    softcap: Option<f64>,
    /// Which tokens the rows of the weight are, where other ranks have the others.
    shard: Option<VocabularyShard>,
}

impl LmHead {
    fn build(config: &ModelConfig, trunk: &Trunk, builder: &mut Builder) -> Self {
        let weight = if config.ties_embeddings() {
            trunk.token_embedding().shallow_clone()
        } else {
            let shape = [config.vocab_size(), config.hidden_size()];
            let init = Init::Normal(config.initializer_range());
            builder.weight(config.head_name(), &shape, init)
        };
        Self {
            weight,
            softcap: config.logit_softcap(),
            shard: builder.vocabulary(config.vocab_size()),
        }
    }
}

impl Rebuild for LmHead {
    const READS_EMBEDDING: bool = true;

    fn rebuild(&self, config: &ModelConfig, trunk: &Trunk, builder: &mut Builder) -> Self {
        Self::build(config, trunk, builder)
    }

    fn trained_module(&self) -> Option<&'static str> {
        None
    }

    fn task_type(&self) -> &'static str {
        CAUSAL_LM
    }
}

impl CausalLm {
    /// A model with random weights, as transformers draws them: normal with the config's
    /// `initializer_range`, biases 0, norms 1. The weights depend on the seed alone.
    ///
    /// # Errors
    /// Those of [`ModelConfig::validate`], and libtorch's (out of memory).
    pub fn new(config: ModelConfig, seed: u64, device: Device, kind: Kind) -> Result<Self> {
        Self::build_new(config, Builder::random(seed, device, kind))
    }

    /// [`new`](Self::new) on several ranks: each has its part of the weights that one rank would have.
    ///
    /// # Errors
    /// Those of [`new`](Self::new); [`Error::CannotSplit`].
    pub fn new_parallel(
        config: ModelConfig,
        seed: u64,
        (device, kind): (Device, Kind),
        placement: impl Into<Placement>,
    ) -> Result<Self> {
        let builder = Builder::random(seed, device, kind).at(&placement.into());
        Self::build_new(config, builder)
    }

    fn build_new(config: ModelConfig, builder: Builder) -> Result<Self> {
        config.validate()?;
        let model = Model::build(config, builder, Path::new(""), LmHead::build)?;
        Ok(Self {
            model,
            chunk_rows: None,
        })
    }

    /// Loads a folder in the layout of the Hugging Face hub: `config.json` and
    /// `model.safetensors`, or its shards.
    ///
    /// # Errors
    /// Those of [`ModelConfig::from_dir`]; a weights file that is absent or damaged;
    /// [`Error::Weights`](crate::Error::Weights) with every tensor that is missing, unexpected or
    /// misshapen.
    pub fn from_pretrained(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        Self::load(dir.as_ref(), options, &Placement::default())
    }

    /// [`from_pretrained`](Self::from_pretrained) on several ranks, each of which reads its part of
    /// the weights: of its layers ([`TensorParallel`](crate::TensorParallel)), its blocks
    /// ([`PipelineParallel`](crate::PipelineParallel)), or of both. The model is trained as any other,
    /// by all ranks alike. [`save_pretrained`](Self::save_pretrained) writes it whole, from rank 0.
    ///
    /// # Errors
    /// Those of [`from_pretrained`](Self::from_pretrained); [`Error::CannotSplit`] where the ranks
    /// do not divide the model.
    pub fn from_pretrained_parallel(
        dir: impl AsRef<Path>,
        options: &LoadOptions,
        placement: impl Into<Placement>,
    ) -> Result<Self> {
        Self::load(dir.as_ref(), options, &placement.into())
    }

    fn load(dir: &Path, options: &LoadOptions, placement: &Placement) -> Result<Self> {
        let model = Model::load(
            dir,
            (options, placement),
            drop_tied_head,
            |(), config, trunk, builder| LmHead::build(config, trunk, builder),
        )?;
        Ok(Self {
            model,
            chunk_rows: None,
        })
    }

    /// Writes `config.json` and `model.safetensors` (past 50 GB: shards and their index), which
    /// transformers reads back. Tied weights are written once. Adapters are merged into what is
    /// written, and only there; for the adapters alone see [`save_adapter`](Self::save_adapter).
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.save_pretrained_with(dir, &SaveOptions::default())
    }

    /// [`save_pretrained`](Self::save_pretrained) with the weights rounded to another kind, such
    /// as bf16 for a model trained in f32.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save_pretrained_as(&self, dir: impl AsRef<Path>, kind: Kind) -> Result<()> {
        let options = SaveOptions {
            kind: Some(kind),
            ..SaveOptions::default()
        };
        self.save_pretrained_with(dir, &options)
    }

    /// [`save_pretrained`](Self::save_pretrained) in another kind, or in shards of another size.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save_pretrained_with(&self, dir: impl AsRef<Path>, options: &SaveOptions) -> Result<()> {
        self.model.save(dir.as_ref(), Head::CausalLm, options)
    }

    /// Architecture and sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Kind of the weights.
    pub fn kind(&self) -> Kind {
        self.model.kind()
    }

    /// Hidden states after the last norm, of every token of a packed batch.
    ///
    /// # Shapes
    /// `[N, H]`, of the model's kind.
    ///
    /// # Errors
    /// libtorch's: an id outside the vocabulary, a position outside the context window.
    pub fn hidden_states(&self, batch: &PackedBatch) -> rlhf_core::Result<Tensor> {
        self.check_whole("hidden states")?;
        self.model.hidden_states(batch)
    }

    /// Next-token logits of hidden states.
    ///
    /// # Shapes
    /// `[M, H]` to `[M, V]`, of the model's kind.
    ///
    /// # Errors
    /// libtorch's.
    pub fn logits_of(&self, hidden: &Tensor) -> rlhf_core::Result<Tensor> {
        let LmHead {
            weight,
            softcap,
            shard,
        } = &self.model.head;
        let capped = |logits: Tensor| -> rlhf_core::Result<Tensor> {
            Ok(match softcap {
                Some(cap) => logits.f_div_scalar(*cap)?.f_tanh()?.f_mul_scalar(*cap)?,
                None => logits,
            })
        };
        let Some(shard) = shard else {
            return capped(linear(hidden, weight, None)?);
        };
        let entered = enter_parallel(hidden, &shard.group).map_err(rlhf_core::Error::from)?;
        let own = capped(linear(&entered, weight, None)?)?;
        whole_logits(&own, shard).map_err(rlhf_core::Error::from)
    }

    /// A copy that shares no weight with this model; a reference policy, for one.
    ///
    /// # Errors
    /// libtorch's (out of memory).
    pub fn try_clone(&self) -> Result<Self> {
        Ok(self.with_model(self.model.duplicate()?))
    }

    /// Another model with the settings of this one.
    pub(crate) fn with_model(&self, model: Model<LmHead>) -> Self {
        Self {
            model,
            chunk_rows: self.chunk_rows,
        }
    }

    /// Whether gradients are recorded for the weights, or for the adapters where there are any.
    /// A model that is not trainable has no [`named_parameters`](Parameters::named_parameters).
    pub fn set_trainable(&mut self, trainable: bool) {
        self.model.set_trainable(trainable);
    }

    /// Which activations training keeps, and which it computes again.
    pub fn gradient_checkpointing(&self) -> GradientCheckpointing {
        self.model.checkpointing
    }

    /// Changes which activations training keeps.
    ///
    /// # Errors
    /// Those of [`GradientCheckpointing::validate`].
    pub fn set_gradient_checkpointing(
        &mut self,
        checkpointing: GradientCheckpointing,
    ) -> Result<()> {
        self.model.set_checkpointing(checkpointing)
    }
}

impl CausalLm {
    /// Fails for a stage of a pipeline.
    fn check_whole(&self, what: &'static str) -> rlhf_core::Result<()> {
        match self.model.trunk.stage {
            Some(_) => Err(rlhf_core::Error::model(Error::OnlyAStage { what })),
            None => Ok(()),
        }
    }
}

/// What the memory plan may change.
impl CausalLm {
    /// Tokens whose logits are there at once when responses are scored; `None` for the default of
    /// [`linear_logprobs`](rlhf_scale::linear_logprobs()).
    pub fn logprob_chunk_rows(&self) -> Option<usize> {
        self.chunk_rows
    }

    /// Changes [`logprob_chunk_rows`](Self::logprob_chunk_rows).
    ///
    /// # Errors
    /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig) for 0.
    pub fn set_logprob_chunk_rows(&mut self, rows: Option<usize>) -> Result<()> {
        if rows == Some(0) {
            let reason = "must be at least 1";
            return Err(rlhf_core::Error::config("logprob_chunk_rows", 0, reason).into());
        }
        self.chunk_rows = rows;
        Ok(())
    }
}

/// All logits from this rank's `[M, own]`.
pub(crate) fn whole_logits(own: &Tensor, shard: &VocabularyShard) -> rlhf_scale::Result<Tensor> {
    let place = (shard.first, shard.vocabulary);
    gather_columns(own, place, shard.widest, &shard.group)
}

/// Checkpoints of tied models may hold the output layer all the same.
fn drop_tied_head(config: &ModelConfig, weights: &mut WeightMap) {
    if config.ties_embeddings() {
        weights.remove(config.head_name());
    }
}

impl Parameters for CausalLm {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.model.trainable()
    }

    fn parameter_shards(&self) -> Option<ParameterShards> {
        self.model.shards()
    }
}
