//! The critic: a number for every state along a response.

use std::path::Path;

use rlhf_core::{Error as CoreError, ParameterShards, Parameters, SequenceBatch, ValueModel};
use rlhf_scale::GradientCheckpointing;
use tch::{Device, Kind, Tensor};

use crate::classifier::SCORE;
use crate::config::Head;
use crate::layers::{Layout, Linear};
use crate::lora::{CAUSAL_LM, Rebuild, SEQ_CLS, adapted};
use crate::model::Model;
use crate::pipeline_parallel::Stage;
use crate::trunk::Trunk;
use crate::weights::{Builder, Init, WeightMap, fresh};
use crate::{
    CausalLm, LoadOptions, LoraConfig, ModelConfig, Placement, Result, SaveOptions,
    SequenceClassifier,
};

/// A trunk with a linear layer that gives every token a value.
///
/// The value of a token is that of the state after it, so [`ValueModel::values`] begins at the
/// prompt's last token.
pub struct ValueHeadModel {
    pub(crate) model: Model<ValueHead>,
}

pub(crate) struct ValueHead {
    linear: Linear,
    layout: HeadLayout,
}

/// Under which names a checkpoint holds the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadLayout {
    /// `score.weight`: a classifier with one label.
    Score,
    /// `v_head.summary.weight` and `.bias`: `AutoModelForCausalLMWithValueHead` of TRL.
    Summary,
}

impl HeadLayout {
    fn of(weights: &WeightMap) -> Self {
        match weights.contains_key("v_head.summary.weight") {
            true => Self::Summary,
            false => Self::Score,
        }
    }

    fn build(self, config: &ModelConfig, builder: &mut Builder) -> ValueHead {
        let size = (config.hidden_size(), 1);
        let (name, bias) = match self {
            Self::Score => ("score", false),
            Self::Summary => ("v_head.summary", true),
        };
        ValueHead {
            linear: Linear::build(builder, name, size, Layout::OutIn, bias, Init::Zeros),
            layout: self,
        }
    }
}

impl Rebuild for ValueHead {
    const READS_EMBEDDING: bool = false;

    fn rebuild(&self, config: &ModelConfig, _: &Trunk, builder: &mut Builder) -> Self {
        self.layout.build(config, builder)
    }

    fn trained_module(&self) -> Option<&'static str> {
        Some(match self.layout {
            HeadLayout::Score => "score",
            HeadLayout::Summary => "v_head.summary",
        })
    }

    fn task_type(&self) -> &'static str {
        match self.layout {
            HeadLayout::Score => SEQ_CLS,
            HeadLayout::Summary => CAUSAL_LM,
        }
    }
}

impl ValueHeadModel {
    /// Loads the folder of a classifier with one label, or of a language model with the value
    /// head of TRL (`v_head.summary`).
    ///
    /// # Errors
    /// Those of [`CausalLm::from_pretrained`].
    pub fn from_pretrained(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        Self::load(dir.as_ref(), options, &Placement::default())
    }

    /// [`from_pretrained`](Self::from_pretrained) on several ranks, as
    /// [`CausalLm::from_pretrained_parallel`]; the head is the same on all, in the last stage.
    ///
    /// # Errors
    /// Those of [`from_pretrained`](Self::from_pretrained);
    /// [`Error::CannotSplit`](crate::Error::CannotSplit).
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
            |config, weights| {
                weights.remove(config.head_name());
                HeadLayout::of(weights)
            },
            |layout, config, _, builder| layout.build(config, builder),
        )?;
        Ok(Self { model })
    }

    /// A copy of a reward model that values every token, the usual start of a critic.
    ///
    /// # Errors
    /// [`InvalidConfig`](CoreError::InvalidConfig) unless there is one label; libtorch's (out of
    /// memory).
    pub fn from_classifier(classifier: &SequenceClassifier) -> Result<Self> {
        let labels = classifier.num_labels();
        if labels != 1 {
            let reason = "a value head starts from a classifier with one label";
            return Err(CoreError::config("num_labels", labels, reason).into());
        }
        let model = &classifier.model;
        let weights = model.copied_weights()?;
        Self::build_like(model, weights)
    }

    /// A copy of a language model's trunk with a fresh head,
    /// [normal with deviation `1 / sqrt(H + 1)`](ValueHeadInit::InverseSqrt).
    ///
    /// # Errors
    /// libtorch's (out of memory).
    pub fn from_causal_lm(model: &CausalLm, seed: u64) -> Result<Self> {
        Self::from_causal_lm_with(model, ValueHeadInit::InverseSqrt, seed)
    }

    /// [`from_causal_lm`](Self::from_causal_lm) with a head that begins otherwise.
    ///
    /// # Errors
    /// libtorch's (out of memory).
    pub fn from_causal_lm_with(model: &CausalLm, init: ValueHeadInit, seed: u64) -> Result<Self> {
        let mut weights = model.model.copied_weights()?;
        weights.remove(model.config().head_name());
        weights.insert(SCORE.into(), fresh_score(model, init, seed)?);
        Self::build_like(&model.model, weights)
    }

    /// A critic on the frozen weights of a language model with adapters, in the same memory: it
    /// adds adapters of its own and a head as that of [`from_causal_lm`](Self::from_causal_lm).
    ///
    /// # Errors
    /// [`Error::NoAdapter`](crate::Error::NoAdapter) if the language model has no adapters, since
    /// its weights are trained then; those of [`CausalLm::add_adapter`].
    pub fn on_base_of(model: &CausalLm, config: &LoraConfig, seed: u64) -> Result<Self> {
        let mut weights = model.shared_trunk()?;
        weights.insert(
            SCORE.into(),
            fresh_score(model, ValueHeadInit::InverseSqrt, seed)?,
        );
        let head = |config: &ModelConfig, _: &Trunk, builder: &mut Builder| {
            HeadLayout::Score.build(config, builder)
        };
        let model = adapted(model, weights, (config, seed), "score", head)?;
        Ok(Self { model })
    }

    /// A model of `weights` that is otherwise as `origin`.
    fn build_like<H: Rebuild>(origin: &Model<H>, weights: WeightMap) -> Result<Self> {
        let layout = HeadLayout::of(&weights);
        let builder =
            Builder::from_weights(weights, origin.device(), origin.kind()).at(&origin.placement);
        let config = origin.config.clone();
        let mut model = Model::build(config, builder, Path::new(""), |config, _, builder| {
            layout.build(config, builder)
        })?;
        model.checkpointing = origin.checkpointing;
        Ok(Self { model })
    }

    /// Writes `config.json` and `model.safetensors`, with the head under the name it was loaded
    /// by; a `score` head makes a classifier that transformers reads back.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<()> {
        let head = match self.model.head.layout {
            HeadLayout::Score => Head::Classifier { labels: 1 },
            HeadLayout::Summary => Head::CausalLm,
        };
        self.model.save(dir.as_ref(), head, &SaveOptions::default())
    }

    /// Architecture and sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.model.device()
    }

    /// A copy that shares no weight with this model.
    ///
    /// # Errors
    /// libtorch's (out of memory).
    pub fn try_clone(&self) -> Result<Self> {
        let model = self.model.duplicate()?;
        Ok(Self { model })
    }

    /// Whether gradients are recorded for the weights, or for the adapters where there are any.
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

/// How the head of a critic begins. Its bias, where it has one, begins at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ValueHeadInit {
    /// Normal with deviation `1 / sqrt(H + 1)`: lm-human-preferences, Stiennon et al. 2020
    /// (arXiv 2009.01325), Huang et al. 2024.
    #[default]
    InverseSqrt,
    /// Normal with deviation `1 / (H + 1)`: OpenRLHF.
    Inverse,
    /// Zeros: every state is worth nothing, and the trunk learns nothing from the first step.
    Zeros,
}

impl ValueHeadInit {
    pub(crate) fn of_width(self, width: i64) -> Init {
        let width = (width + 1) as f64;
        match self {
            Self::InverseSqrt => Init::Normal(1.0 / width.sqrt()),
            Self::Inverse => Init::Normal(1.0 / width),
            Self::Zeros => Init::Zeros,
        }
    }
}

/// The head that a critic begins with, `[1, H]` f32.
fn fresh_score(model: &CausalLm, init: ValueHeadInit, seed: u64) -> Result<Tensor> {
    let width = model.config().hidden_size();
    fresh(seed, SCORE, &[1, width], init.of_width(width))
}

/// Spreads values of all states `[S + B]`, in the order of the sequences, over a rectangle
/// `[B, R + 1]` with 0 elsewhere.
pub(crate) fn padded_values(batch: &SequenceBatch, values: &Tensor) -> rlhf_core::Result<Tensor> {
    let width = batch.max_response_len() as i64 + 1;
    let cells: Vec<i64> = batch
        .sequences()
        .iter()
        .enumerate()
        .flat_map(|(i, s)| (0..=s.response.len() as i64).map(move |j| i as i64 * width + j))
        .collect();
    let cells = Tensor::from_slice(&cells).to_device(values.device());
    let options = (Kind::Float, values.device());
    let padded = Tensor::f_zeros([batch.len() as i64 * width], options)?;
    Ok(padded
        .f_index_copy(0, &cells, values)?
        .f_view([batch.len() as i64, width])?)
}

/// What stands for [`padded_values`] where a later stage has the head.
pub(crate) fn values_elsewhere(batch: &SequenceBatch, sent: &Tensor) -> rlhf_core::Result<Tensor> {
    let width = batch.max_response_len() as i64 + 1;
    Stage::stand_in(&[batch.len() as i64, width], sent)
}

impl Parameters for ValueHeadModel {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.model.trainable()
    }

    fn parameter_shards(&self) -> Option<ParameterShards> {
        self.model.shards()
    }
}

impl ValueHeadModel {
    fn values_at_once(&self, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        let packed = self.model.checked_packed(batch)?;
        let rows = packed.state_rows();
        let states = self.model.hidden_states_of(&packed, rows)?;
        if !self.model.trunk.has_end() {
            return values_elsewhere(batch, &states);
        }
        let values = self.model.head.linear.forward(&states)?.squeeze_dim(1);
        padded_values(batch, &values.f_to_kind(Kind::Float)?)
    }
}

impl ValueModel for ValueHeadModel {
    /// Columns past a row's `R_i` are 0.
    fn values(&self, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        let Some(stage) = self.model.trunk.sharing() else {
            return self.values_at_once(batch);
        };
        let width = batch.max_response_len() as i64 + 1;
        let values =
            stage.in_turns(batch, width, |part, _| Ok(vec![self.values_at_once(part)?]))?;
        Ok(values.into_iter().next().unwrap_or_default())
    }

    fn disable_dropout(&mut self) {
        self.set_dropout_active(false);
    }
}
