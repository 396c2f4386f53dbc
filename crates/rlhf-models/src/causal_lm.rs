//! Language models.

use std::ops::Range;
use std::path::Path;

use rlhf_core::{
    Decoder, KeptSet, KeptTokens, LogprobOptions, PackedBatch, PaddedBatch, ParameterShards,
    Parameters, Policy, Segment, SequenceBatch, TokenLogprobs, check_kept, check_same_shape,
};
use rlhf_scale::{
    GradientCheckpointing, LinearLogprobs, LinearLogprobsInput, VocabularyShard, enter_parallel,
    gather_columns, linear_logprobs, linear_token_loss, parallel_logprobs, parallel_token_loss,
};
use tch::{Device, Kind, Tensor};

use crate::config::Head;
use crate::decoder::CachedDecoder;
use crate::kept_logprobs::KeptLogprobs;
use crate::layers::linear;
use crate::lora::{CAUSAL_LM, Rebuild};
use crate::trunk::{Model, Trunk};
use crate::weights::{Builder, Init, WeightMap};
use crate::{Error, ModelConfig, Placement, Result, SaveOptions};

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

    fn score(
        &self,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        options.validate()?;
        let packed = self.model.checked_packed(batch)?;
        // Of the tokens that predict a response token, and of no other.
        let rows = packed.predicting_rows();
        let hidden = self.model.hidden_states_of(&packed, rows)?;
        self.scores(batch, &hidden, kept, options)
    }

    fn head_input<'a>(&'a self, hidden: &'a Tensor, ids: &'a Tensor) -> LinearLogprobsInput<'a> {
        LinearLogprobsInput {
            hidden,
            weight: &self.model.head.weight,
            bias: None,
            softcap: self.model.head.softcap,
            ids,
        }
    }

    /// Scores the responses from the hidden states that predict their tokens, `[S, H]`.
    pub(crate) fn scores(
        &self,
        batch: &SequenceBatch,
        hidden: &Tensor,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        let mask = batch.response_mask(self.device());
        if !self.model.trunk.has_end() {
            // They are known in the last stage; these lead the gradient to it.
            let zeros = Tensor::f_zeros(mask.size(), (Kind::Float, self.device()))?;
            return Ok(TokenLogprobs {
                logprobs: zeros.f_add(hidden)?,
                entropy: options.entropy.then_some(zeros),
                mask,
            });
        }
        let ids = batch.responses(0, self.device()).masked_select(&mask);
        let LmHead {
            weight,
            softcap,
            shard,
        } = &self.model.head;
        let (logprobs, entropy) = match kept {
            None => {
                let input = self.head_input(hidden, &ids);
                let scores = match shard {
                    None => linear_logprobs(input, options, self.chunk_rows)?,
                    Some(shard) => parallel_logprobs(input, shard, options, self.chunk_rows)?,
                };
                (scores.logprobs, scores.entropy)
            }
            Some(kept) => {
                check_kept(batch, kept)?;
                let sets: Vec<&KeptSet> = kept.iter().flat_map(|row| row.iter()).collect();
                let layer = KeptLogprobs {
                    weight,
                    softcap: *softcap,
                    shard: shard.as_ref(),
                    options: *options,
                    chunk_rows: self.chunk_rows,
                };
                layer.of(hidden, &ids, &sets)?
            }
        };
        let scattered = |values: &Tensor| {
            Tensor::f_zeros(mask.size(), (Kind::Float, self.device()))?
                .f_masked_scatter(&mask, values)
        };
        Ok(TokenLogprobs {
            logprobs: scattered(&logprobs)?,
            entropy: entropy.as_ref().map(scattered).transpose()?,
            mask,
        })
    }
}

/// What the memory plan may change.
impl CausalLm {
    /// Tokens whose logits are there at once when responses are scored; `None` for the default of
    /// [`linear_logprobs`].
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

impl Policy for CausalLm {
    fn logits(&self, batch: &PaddedBatch) -> rlhf_core::Result<Tensor> {
        let (packed, cells) = unpadded(batch)?;
        let logits = self.logits_of(&self.hidden_states(&packed)?)?;
        let (rows, width, vocab) = (batch.rows(), batch.width(), logits.size()[1]);
        let padded = Tensor::f_zeros([rows * width, vocab], (logits.kind(), logits.device()))?;
        Ok(padded
            .f_index_copy(0, &cells, &logits)?
            .f_view([rows, width, vocab])?)
    }

    fn device(&self) -> Device {
        self.model.device()
    }

    fn pad_token_id(&self) -> i64 {
        self.config().special_tokens().pad.unwrap_or(0)
    }

    fn max_length(&self) -> Option<usize> {
        Some(self.config().max_length())
    }

    fn logprobs(
        &self,
        batch: &SequenceBatch,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        self.score(batch, None, options)
    }

    fn logprobs_within(
        &self,
        batch: &SequenceBatch,
        kept: &[KeptTokens],
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        self.score(batch, Some(kept), options)
    }

    fn weighted_nll(
        &self,
        batch: &SequenceBatch,
        weights: Option<&Tensor>,
    ) -> rlhf_core::Result<Tensor> {
        let packed = self.model.checked_packed(batch)?;
        let rows = packed.predicting_rows();
        let hidden = self.model.hidden_states_of(&packed, rows)?;
        if !self.model.trunk.has_end() {
            return Ok(hidden);
        }
        let mask = batch.response_mask(self.device());
        let ids = batch.responses(0, self.device()).masked_select(&mask);
        let weights = match weights {
            Some(weights) => {
                check_same_shape(("weights", weights), ("the responses", &mask))?;
                Some(weights.f_masked_select(&mask)?)
            }
            None => None,
        };
        let loss = |scores: &LinearLogprobs, rows: Range<i64>| -> Result<Tensor> {
            let logprobs = &scores.logprobs;
            let sum = match &weights {
                Some(weights) => {
                    let weights = weights.f_narrow(0, rows.start, rows.end - rows.start)?;
                    logprobs.f_mul(&weights)?.f_sum(Kind::Float)?
                }
                None => logprobs.f_sum(Kind::Float)?,
            };
            Ok(sum.f_neg()?)
        };
        let input = self.head_input(&hidden, &ids);
        let (options, rows) = (LogprobOptions::default(), self.chunk_rows);
        let output = match &self.model.head.shard {
            None => linear_token_loss(input, &options, rows, loss)?,
            Some(shard) => parallel_token_loss(input, shard, &options, rows, loss)?,
        };
        Ok(output.loss)
    }

    fn disable_dropout(&mut self) {
        self.set_dropout_active(false);
    }

    fn decoder(&self, max_new_tokens: usize) -> rlhf_core::Result<Box<dyn Decoder + '_>> {
        self.check_whole("decoder")?;
        Ok(Box::new(CachedDecoder::new(self, max_new_tokens)))
    }
}

/// The tokens of a padded batch as one run, and the cell of the rectangle that each came from.
fn unpadded(batch: &PaddedBatch) -> rlhf_core::Result<(PackedBatch, Tensor)> {
    let width = batch.width();
    let (mut cells, mut segments) = (Vec::new(), Vec::new());
    for (row, (&offset, &length)) in batch.offsets.iter().zip(&batch.lengths).enumerate() {
        let (start, first) = (cells.len() as i64, row as i64 * width + offset as i64);
        cells.extend(first..first + length as i64);
        segments.push(Segment::whole(start..start + length as i64));
    }
    let cells = Tensor::from_slice(&cells).to_device(batch.input_ids.device());
    let take = |t: &Tensor| t.f_view(-1)?.f_index_select(0, &cells);
    let packed = PackedBatch {
        input_ids: take(&batch.input_ids)?,
        position_ids: take(&batch.position_ids)?,
        prompts: segments.iter().map(|s| s.rows.clone()).collect(),
        responses: segments.iter().map(|s| s.rows.end..s.rows.end).collect(),
        segments,
    };
    Ok((packed, cells))
}
