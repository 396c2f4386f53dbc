//! Models with a linear head on the last token: rewards, costs, labels.

use std::path::Path;

use rlhf_core::{
    Completions, Error as CoreError, ParameterShards, Parameters, RewardModel, Scorer,
    SequenceBatch,
};
use rlhf_scale::GradientCheckpointing;
use tch::{Device, Kind, Tensor};

use crate::config::{Head, label_count};
use crate::layers::{Layout, Linear};
use crate::lora::{Rebuild, SEQ_CLS};
use crate::model::Model;
use crate::pipeline_parallel::Stage;
use crate::trunk::Trunk;
use crate::weights::{Builder, Init, fresh};
use crate::{CausalLm, LoadOptions, ModelConfig, Placement, Result, SaveOptions};

/// Name of the head's matrix in a checkpoint.
pub(crate) const SCORE: &str = "score.weight";

/// A trunk with a linear layer on the last token's hidden state: `…ForSequenceClassification`
/// of transformers.
///
/// The last token is the last one *given*. transformers looks for the last id that is not the
/// padding id instead, and so skips an EOS token at the end wherever the two share an id.
pub struct SequenceClassifier {
    pub(crate) model: Model<ScoreHead>,
}

/// `[num_labels, H]`, without a bias.
pub(crate) struct ScoreHead {
    pub(crate) linear: Linear,
    labels: i64,
}

impl ScoreHead {
    fn build(config: &ModelConfig, builder: &mut Builder, labels: i64) -> Self {
        let size = (config.hidden_size(), labels);
        let init = Init::Normal(config.initializer_range());
        Self {
            linear: Linear::build(builder, "score", size, Layout::OutIn, false, init),
            labels,
        }
    }
}

impl Rebuild for ScoreHead {
    const READS_EMBEDDING: bool = false;

    fn rebuild(&self, config: &ModelConfig, _: &Trunk, builder: &mut Builder) -> Self {
        Self::build(config, builder, self.labels)
    }

    fn trained_module(&self) -> Option<&'static str> {
        Some("score")
    }

    fn task_type(&self) -> &'static str {
        SEQ_CLS
    }
}

impl SequenceClassifier {
    /// Loads a folder in the layout of the Hugging Face hub.
    ///
    /// # Errors
    /// Those of [`CausalLm::from_pretrained`]. The folder of a language model has no
    /// `score.weight`: see [`from_causal_lm`](Self::from_causal_lm).
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
        let named = label_count(dir)?;
        let model = Model::load(
            dir,
            (options, placement),
            |config, weights| {
                weights.remove(config.head_name());
                let stored = weights
                    .get(SCORE)
                    .and_then(|score| score.size().first().copied());
                named.or(stored).unwrap_or(1)
            },
            |labels, config, _, builder| ScoreHead::build(config, builder, labels),
        )?;
        Ok(Self { model })
    }

    /// A copy of a language model's trunk with a fresh head, normal with the config's
    /// `initializer_range` as in transformers.
    ///
    /// # Errors
    /// [`InvalidConfig`](CoreError::InvalidConfig) for less than one label; libtorch's (out of
    /// memory).
    pub fn from_causal_lm(model: &CausalLm, num_labels: i64, seed: u64) -> Result<Self> {
        if num_labels < 1 {
            let reason = "a classifier has at least one label";
            return Err(CoreError::config("num_labels", num_labels, reason).into());
        }
        let config = model.config().clone();
        let mut weights = model.model.copied_weights()?;
        weights.remove(config.head_name());
        let shape = [num_labels, config.hidden_size()];
        let init = Init::Normal(config.initializer_range());
        weights.insert(SCORE.into(), fresh(seed, SCORE, &shape, init)?);
        let model = &model.model;
        let builder =
            Builder::from_weights(weights, model.device(), model.kind()).at(&model.placement);
        let mut classifier = Self::build(config, builder, num_labels)?;
        classifier.model.checkpointing = model.checkpointing;
        Ok(classifier)
    }

    fn build(config: ModelConfig, builder: Builder, labels: i64) -> Result<Self> {
        let model = Model::build(config, builder, Path::new(""), |config, _, builder| {
            ScoreHead::build(config, builder, labels)
        })?;
        Ok(Self { model })
    }

    /// Writes `config.json` and `model.safetensors` (past 50 GB: shards and their index), which
    /// transformers reads back.
    ///
    /// A config without `pad_token_id` gets one (the EOS id, or 0), because transformers scores
    /// no batch of several sequences without it.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.save_pretrained_with(dir, &SaveOptions::default())
    }

    /// [`save_pretrained`](Self::save_pretrained) with the weights rounded to another kind.
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
        let labels = self.num_labels();
        self.model
            .save(dir.as_ref(), Head::Classifier { labels }, options)
    }

    /// Architecture and sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Kind of the weights.
    pub fn kind(&self) -> Kind {
        self.model.kind()
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.model.device()
    }

    /// Numbers per sequence.
    pub fn num_labels(&self) -> i64 {
        self.model.head.labels
    }

    /// The head's output at the last token of every sequence, prompt and response together.
    ///
    /// # Shapes
    /// `[B, num_labels]` f32.
    ///
    /// # Errors
    /// [`TooLong`](CoreError::TooLong), [`TokenOutOfRange`](CoreError::TokenOutOfRange), and
    /// libtorch's.
    pub fn logits(&self, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        let Some(stage) = self.model.trunk.sharing() else {
            return self.logits_at_once(batch);
        };
        let labels = self.num_labels();
        let logits = stage.in_turns(batch, labels, |part, _| {
            Ok(vec![self.logits_at_once(part)?])
        })?;
        Ok(logits.into_iter().next().unwrap_or_default())
    }

    fn logits_at_once(&self, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        let packed = self.model.checked_packed(batch)?;
        let last = self.model.hidden_states_of(&packed, packed.last_rows())?;
        if !self.model.trunk.has_end() {
            return Stage::stand_in(&[batch.len() as i64, self.num_labels()], &last);
        }
        let logits = self.model.head.linear.forward(&last)?;
        Ok(logits.f_to_kind(Kind::Float)?)
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

    /// Keeps the trunk as it is and trains the head alone. The trunk's activations are not kept for
    /// backward then. [`set_trainable`](Self::set_trainable) sets all weights the same again.
    pub fn train_head_only(&mut self) {
        self.model.set_trainable(false);
        let head = self.model.weights.iter().filter(|(name, _)| *name == SCORE);
        for (_, weight) in head {
            // Returns another handle of the same tensor, on which the flag is set.
            let _ = weight.set_requires_grad(true);
        }
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

impl Parameters for SequenceClassifier {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.model.trainable()
    }

    fn parameter_shards(&self) -> Option<ParameterShards> {
        self.model.shards()
    }
}

impl Scorer for SequenceClassifier {
    fn scores(&self, batch: &SequenceBatch) -> rlhf_core::Result<Tensor> {
        self.logits(batch)
    }
}

impl RewardModel for SequenceClassifier {
    /// The one label's score. No gradients are recorded.
    fn score(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let labels = self.num_labels();
        if labels != 1 {
            let reason = "a reward model is a classifier with one label";
            return Err(CoreError::config("num_labels", labels, reason));
        }
        let scores = self.logits(&completions.batch)?.squeeze_dim(1);
        let values = Vec::<f32>::try_from(&scores)?;
        match values.iter().position(|value| !value.is_finite()) {
            Some(row) => Err(CoreError::NonFinite {
                what: "score",
                row,
                value: values[row].into(),
            }),
            None => Ok(scores),
        }
    }
}
