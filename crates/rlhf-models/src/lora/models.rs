//! Adapters on every kind of model.

use std::path::Path;

use rlhf_core::Replicas;

use super::build::{AdapterBuilder, Origin, copied};
use super::config::LoraConfig;
use super::files::{self, AdapterFiles};
use crate::model::Model;
use crate::trunk::Trunk;
use crate::weights::{Builder, WeightMap};
use crate::{CausalLm, Error, ModelConfig, Result, SequenceClassifier, ValueHeadModel};

/// A head that can be built again from other weights of the same shapes.
pub(crate) trait Rebuild {
    /// Whether it computes with the input embedding, where the configuration ties it to the output.
    const READS_EMBEDDING: bool;

    /// A head like this one.
    fn rebuild(&self, config: &ModelConfig, trunk: &Trunk, builder: &mut Builder) -> Self;

    /// The module that is trained whole beside adapters.
    fn trained_module(&self) -> Option<&'static str>;

    /// What PEFT calls a model with this head.
    fn task_type(&self) -> &'static str;
}

impl<H: Rebuild> Model<H> {
    fn rebuilt(&self, builder: Builder) -> Result<Self> {
        let config = self.config.clone();
        let builder = builder.at(&self.placement);
        let mut model = Self::build(config, builder, Path::new(""), |config, trunk, builder| {
            self.head.rebuild(config, trunk, builder)
        })?;
        model.checkpointing = self.checkpointing;
        Ok(model)
    }

    /// Frozen handles of the weights that the adapters are beside.
    pub(crate) fn base(&self) -> Result<WeightMap> {
        self.weights
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor.f_detach()?)))
            .collect()
    }

    fn adapters_from(&self, config: &LoraConfig, origin: Origin) -> Result<AdapterBuilder> {
        AdapterBuilder::new(config, origin, self.device(), self.kind())
    }

    /// A model on the same weights, with other adapters or none.
    fn on_base(&self, adapters: Option<AdapterBuilder>) -> Result<Self> {
        self.rebuilt(Builder::shared(
            self.base()?,
            self.device(),
            self.kind(),
            adapters,
        ))
    }

    /// A copy that shares nothing.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let Some(adapters) = &self.adapters else {
            let (device, kind) = (self.device(), self.kind());
            return self.rebuilt(Builder::from_weights(self.copied_weights()?, device, kind));
        };
        let base = self
            .base()?
            .into_iter()
            .map(|(name, tensor)| Ok((name, copied(&tensor)?)))
            .collect::<Result<_>>()?;
        let weights = adapters.copied()?;
        let origin = Origin::Given {
            weights,
            path: None,
        };
        let builder = self.adapters_from(&adapters.config, origin)?;
        let copy = self.rebuilt(Builder::shared(
            base,
            self.device(),
            self.kind(),
            Some(builder),
        ))?;
        copy.set_dropout_active(self.is_dropout_active());
        Ok(copy)
    }

    fn add_adapter(&mut self, config: &LoraConfig, seed: u64) -> Result<()> {
        self.check_plain()?;
        let config = with_module(config, self.head.trained_module());
        let adapters = self.adapters_from(&config, Origin::Fresh { seed })?;
        *self = self.on_base(Some(adapters))?;
        Ok(())
    }

    fn load_adapter(&mut self, dir: &Path) -> Result<()> {
        self.check_plain()?;
        let files = AdapterFiles::read(dir)?;
        let mut weights = files.weights;
        if let Some(stage) = &self.trunk.stage {
            weights.retain(|name, _| stage.has(name));
        }
        let path = Some(dir.to_path_buf());
        let adapters = self.adapters_from(&files.config, Origin::Given { weights, path })?;
        let model = self.on_base(Some(adapters))?;
        if model.trains_tied_embedding() && !files.ties_saved_embedding {
            return Err(Error::InvalidField {
                path: dir.join("adapter_config.json"),
                field: "ensure_weight_tying".into(),
                value: "false".into(),
                reason: "the output layer is the embedding, and the adapter trains only one of \
                         the two"
                    .into(),
            });
        }
        *self = model;
        Ok(())
    }

    fn save_adapter(&self, dir: &Path) -> Result<()> {
        let adapters = self.adapters.as_ref().ok_or(Error::NoAdapter)?;
        let task_type = self.head.task_type();
        let tied = self.trains_tied_embedding();
        let (weights, placement) = (adapters.detached(), &self.placement);
        if !placement.is_split() {
            return files::write(dir, adapters, weights, task_type, tied);
        }
        if Replicas::current().rank() > 0 {
            return Ok(());
        }
        let written = match placement.gather_all(weights, &adapters.cuts, self.device())? {
            Some(weights) => files::write(dir, adapters, weights, task_type, tied),
            None => Ok(()),
        };
        placement.agree(written, self.device())
    }

    fn merge(&mut self) -> Result<()> {
        if self.adapters.is_none() {
            return Err(Error::NoAdapter);
        }
        let _guard = tch::no_grad_guard();
        let kind = self.kind();
        let mut weights = self.base()?;
        for (name, weight) in &mut weights {
            if let Some(merged) = self.merged_weight(name)? {
                *weight = merged.f_to_kind(kind)?;
            }
        }
        *self = self.rebuilt(Builder::shared(weights, self.device(), kind, None))?;
        Ok(())
    }

    /// The model with its adapters off, on the same memory.
    fn reference(&self) -> Result<Self> {
        match &self.adapters {
            Some(_) => self.on_base(None),
            None => Err(Error::NoAdapter),
        }
    }

    /// The model as it is now: the base in the same memory, the adapters in a frozen copy.
    fn snapshot(&self) -> Result<Self> {
        let adapters = self.adapters.as_ref().ok_or(Error::NoAdapter)?;
        let origin = Origin::Given {
            weights: adapters.copied()?,
            path: None,
        };
        let copies = self.adapters_from(&adapters.config, origin)?;
        self.on_base(Some(copies.frozen()))
    }

    fn is_dropout_active(&self) -> bool {
        let adapters = self.adapters.as_ref();
        adapters.is_some_and(|adapters| adapters.dropout.is_active())
    }

    fn set_dropout_active(&self, active: bool) {
        if let Some(adapters) = &self.adapters {
            adapters.dropout.set_active(active);
        }
    }

    fn trains_tied_embedding(&self) -> bool {
        self.config.ties_embeddings()
            && self.head.task_type() == CAUSAL_LM
            && self.adapters.as_ref().is_some_and(|adapters| {
                let embedding = self.trunk.token_embedding();
                if !embedding.defined() {
                    return false;
                }
                let embedding = embedding.data_ptr();
                let mut weights = adapters.weights().values();
                weights.any(|weight| weight.data_ptr() == embedding)
            })
    }

    fn check_plain(&self) -> Result<()> {
        match self.adapters {
            Some(_) => Err(Error::HasAdapter),
            None => Ok(()),
        }
    }
}

pub(crate) const CAUSAL_LM: &str = "CAUSAL_LM";
pub(crate) const SEQ_CLS: &str = "SEQ_CLS";

/// The config with one module more that is trained whole.
fn with_module(config: &LoraConfig, module: Option<&str>) -> LoraConfig {
    let mut config = config.clone();
    if let Some(module) = module
        && !config.modules_to_save.iter().any(|saved| saved == module)
    {
        config.modules_to_save.push(module.into());
    }
    config
}

/// A model that is made of another one's weights, with adapters of its own.
///
/// # Errors
/// Those of [`CausalLm::add_adapter`].
pub(crate) fn adapted<H: Rebuild>(
    origin: &CausalLm,
    weights: WeightMap,
    (lora, seed): (&LoraConfig, u64),
    module: &str,
    head: impl FnOnce(&ModelConfig, &Trunk, &mut Builder) -> H,
) -> Result<Model<H>> {
    let lora = with_module(lora, Some(module));
    let origin = &origin.model;
    let adapters = origin.adapters_from(&lora, Origin::Fresh { seed })?;
    let (device, kind) = (origin.device(), origin.kind());
    let builder = Builder::shared(weights, device, kind, Some(adapters)).at(&origin.placement);
    let mut model = Model::build(origin.config.clone(), builder, Path::new(""), head)?;
    model.checkpointing = origin.checkpointing;
    Ok(model)
}

macro_rules! adapter_methods {
    ($($model:ty),*) => {$(
        impl $model {
            /// Freezes the weights and puts LoRA adapters beside them, which are trained in their
            /// place. The model computes what it did until they are: `A` is random, drawn from
            /// `seed` as PEFT draws it, and `B` zero. They are f32 beside 16-bit weights.
            ///
            /// # Errors
            /// Those of [`LoraConfig::validate`]; [`Error::HasAdapter`]; [`Error::Adapter`] with
            /// every name that no layer has. Nothing has changed then.
            pub fn add_adapter(&mut self, config: &LoraConfig, seed: u64) -> Result<()> {
                self.model.add_adapter(config, seed)
            }

            /// [`add_adapter`](Self::add_adapter) with the adapters of a folder in PEFT's layout:
            /// `adapter_config.json` and `adapter_model.safetensors`.
            ///
            /// # Errors
            /// Files that are absent or damaged; a variant of LoRA that is not supported, naming
            /// the field; [`Error::HasAdapter`]; [`Error::Adapter`] with every tensor that is
            /// missing, unexpected or misshapen. Nothing has changed then.
            pub fn load_adapter(&mut self, dir: impl AsRef<Path>) -> Result<()> {
                self.model.load_adapter(dir.as_ref())
            }

            /// Writes the adapters, without the weights that they are beside, as a folder that
            /// PEFT reads. Each file is complete or not there.
            ///
            /// # Errors
            /// [`Error::NoAdapter`]; a folder or file that cannot be written.
            pub fn save_adapter(&self, dir: impl AsRef<Path>) -> Result<()> {
                self.model.save_adapter(dir.as_ref())
            }

            /// The options of the adapters, where there are any.
            pub fn adapter(&self) -> Option<&LoraConfig> {
                self.model.adapters.as_ref().map(|adapters| &adapters.config)
            }

            /// Adds the adapters to the weights, rounded to the model's kind once: a plain model
            /// again, and as quick as one. It is frozen until
            /// [`set_trainable`](Self::set_trainable), as weights that had no adapter may still
            /// lie in the memory of a reference.
            ///
            /// # Errors
            /// [`Error::NoAdapter`]; libtorch's (out of memory: the weights are there twice
            /// meanwhile). Nothing has changed then.
            pub fn merge(&mut self) -> Result<()> {
                self.model.merge()
            }

            /// Whether the adapters' dropout is on, as it is from the start. It acts only where
            /// gradients are recorded for the adapters, so not under `tch::no_grad_guard`, which
            /// is how trainers roll out and evaluate.
            pub fn is_dropout_active(&self) -> bool {
                self.model.is_dropout_active()
            }

            /// Switches the adapters' dropout on or off: `train()` and `eval()` of PyTorch.
            pub fn set_dropout_active(&mut self, active: bool) {
                self.model.set_dropout_active(active);
            }
        }
    )*};
}

adapter_methods!(CausalLm, SequenceClassifier, ValueHeadModel);

impl CausalLm {
    /// This model with its adapters off, to be the reference of a trainer: the same weights in the
    /// same memory, not a copy of them. It stays what it is while the adapters are trained, since
    /// what it shares is frozen.
    ///
    /// # Errors
    /// [`Error::NoAdapter`]: without adapters the weights themselves are trained, and a reference
    /// is a [`try_clone`](Self::try_clone).
    ///
    /// ```
    /// # use rlhf_models::{CausalLm, LoadOptions};
    /// use rlhf_models::LoraConfig;
    /// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/models/llama");
    ///
    /// let mut policy = CausalLm::from_pretrained(folder, &LoadOptions::default())?;
    /// policy.add_adapter(&LoraConfig::default(), 0)?;
    /// let reference = policy.reference()?;
    /// # Ok::<(), rlhf_models::Error>(())
    /// ```
    pub fn reference(&self) -> Result<Self> {
        let model = self.model.reference()?;
        Ok(self.with_model(model))
    }

    /// This model as it is now, adapters and all, which does not change when they are trained: the
    /// base lies in the same memory, the adapters are copied. The reference of a policy whose
    /// training began with adapters, as TRL takes it then.
    ///
    /// # Errors
    /// [`Error::NoAdapter`]; libtorch's.
    pub fn snapshot(&self) -> Result<Self> {
        let model = self.model.snapshot()?;
        Ok(self.with_model(model))
    }

    /// The weights that other models may share, without the output layer.
    ///
    /// # Errors
    /// [`Error::NoAdapter`]: what is trained cannot be shared.
    pub(crate) fn shared_trunk(&self) -> Result<WeightMap> {
        if self.model.adapters.is_none() {
            return Err(Error::NoAdapter);
        }
        let mut weights = self.model.base()?;
        weights.remove(self.config().head_name());
        Ok(weights)
    }
}
