//! Architecture and sizes of a model, read from and written to `config.json`.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tch::Kind;

use crate::architecture::Architecture;
use crate::trunk::Trunk;
use crate::weights::Builder;
use crate::{
    Error, Gemma2Config, Gpt2Config, GptNeoxConfig, LlamaConfig, MistralConfig, Qwen2Config,
    Qwen3Config, Result,
};

/// Every `model_type` that can be loaded.
pub const SUPPORTED_ARCHITECTURES: &[&str] = &[
    "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3",
];

/// Most of any size but the number of layers: more makes no model, and products of two stay in
/// range.
pub(crate) const MAX_SIZE: i64 = 1 << 28;
/// Most layers; each that a file lacks is a problem to report.
const MAX_LAYERS: i64 = 4096;

/// A model's architecture with its sizes: `config.json`, resolved.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ModelConfig {
    /// GPT-2.
    Gpt2(Gpt2Config),
    /// GPT-NeoX and Pythia.
    GptNeox(GptNeoxConfig),
    /// Llama and SmolLM.
    Llama(LlamaConfig),
    /// Mistral.
    Mistral(MistralConfig),
    /// Qwen2 and Qwen2.5.
    Qwen2(Qwen2Config),
    /// Qwen3.
    Qwen3(Qwen3Config),
    /// Gemma 2.
    Gemma2(Gemma2Config),
}

/// Ids with a meaning of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<i64>,
    /// Any of these ends a text.
    pub eos: Vec<i64>,
    /// Fills rows of a padded batch.
    pub pad: Option<i64>,
}

/// The head that a saved model has on its trunk; decides the class that `config.json` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    CausalLm,
    Classifier { labels: i64 },
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// A file that is absent or not JSON, an architecture other than
    /// [`SUPPORTED_ARCHITECTURES`], a field that is missing or has a value with no support here.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        Self::from_fields(&Fields::read(&dir.as_ref().join("config.json"))?)
    }

    pub(crate) fn from_fields(fields: &Fields) -> Result<Self> {
        let model_type: String = fields.need("model_type")?;
        let config = match model_type.as_str() {
            "gpt2" => Self::Gpt2(Gpt2Config::from_fields(fields)?),
            "gpt_neox" => Self::GptNeox(GptNeoxConfig::from_fields(fields)?),
            "llama" => Self::Llama(LlamaConfig::from_fields(fields)?),
            "mistral" => Self::Mistral(MistralConfig::from_fields(fields)?),
            "qwen2" => Self::Qwen2(Qwen2Config::from_fields(fields)?),
            "qwen3" => Self::Qwen3(Qwen3Config::from_fields(fields)?),
            "gemma2" => Self::Gemma2(Gemma2Config::from_fields(fields)?),
            _ => {
                return Err(Error::UnknownArchitecture {
                    path: fields.path.clone(),
                    found: model_type,
                    supported: SUPPORTED_ARCHITECTURES,
                });
            }
        };
        config.validate().map_err(|error| fields.because(error))?;
        Ok(config)
    }

    pub(crate) fn architecture(&self) -> &dyn Architecture {
        match self {
            Self::Gpt2(config) => config,
            Self::GptNeox(config) => config,
            Self::Llama(config) => config,
            Self::Mistral(config) => config,
            Self::Qwen2(config) => config,
            Self::Qwen3(config) => config,
            Self::Gemma2(config) => config,
        }
    }

    fn architecture_mut(&mut self) -> &mut dyn Architecture {
        match self {
            Self::Gpt2(config) => config,
            Self::GptNeox(config) => config,
            Self::Llama(config) => config,
            Self::Mistral(config) => config,
            Self::Qwen2(config) => config,
            Self::Qwen3(config) => config,
            Self::Gemma2(config) => config,
        }
    }

    pub(crate) fn build_trunk(&self, builder: &mut Builder) -> Result<Trunk> {
        self.architecture().build(builder)
    }

    /// This crate's name for a weight: trunks are saved with and without the prefix that their
    /// causal model gives them.
    pub(crate) fn canonical_name(&self, name: String) -> String {
        let names = self.architecture().names();
        let of_head = [names.head, "score.", "v_head."]
            .iter()
            .any(|head| name.starts_with(head));
        if of_head || name.starts_with(names.trunk) {
            name
        } else {
            format!("{}{name}", names.trunk)
        }
    }

    /// Name of the output layer's matrix.
    pub(crate) fn head_name(&self) -> &'static str {
        self.architecture().names().head
    }

    /// Bound of the output layer's logits: `cap * tanh(x / cap)`.
    pub(crate) fn logit_softcap(&self) -> Option<f64> {
        self.architecture().logit_softcap()
    }

    pub(crate) fn to_json(&self, head: Head, kind: Kind) -> Value {
        let (mut map, names) = (self.architecture().to_json(), self.architecture().names());
        let suffix = match head {
            Head::CausalLm => names.causal_lm,
            Head::Classifier { .. } => "ForSequenceClassification",
        };
        let class = format!("{}{suffix}", names.class);
        map.insert("model_type".into(), json!(names.model_type));
        map.insert("architectures".into(), json!([class]));
        // transformers 5 reads this spelling too; 4 reads no other.
        map.insert("torch_dtype".into(), json!(kind_name(kind)));
        if let Head::Classifier { labels } = head {
            let id2label: Map<_, _> = (0..labels)
                .map(|i| (i.to_string(), json!(format!("LABEL_{i}"))))
                .collect();
            let label2id: Map<_, _> = (0..labels)
                .map(|i| (format!("LABEL_{i}"), json!(i)))
                .collect();
            if self.special_tokens().pad.is_none() {
                let stand_in = self.special_tokens().eos.first().copied().unwrap_or(0);
                map.insert("pad_token_id".into(), json!(stand_in));
            }
            map.insert("id2label".into(), Value::Object(id2label));
            map.insert("label2id".into(), Value::Object(label2id));
        }
        Value::Object(map)
    }

    /// Fails for sizes that make no model.
    ///
    /// # Errors
    /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig), naming the field.
    pub fn validate(&self) -> rlhf_core::Result<()> {
        self.architecture().validate()
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> i64 {
        self.architecture().sizes().vocab_size
    }

    /// Width of the residual stream, `H`.
    pub fn hidden_size(&self) -> i64 {
        self.architecture().sizes().hidden_size
    }

    /// Number of transformer blocks.
    pub fn layers(&self) -> i64 {
        self.architecture().sizes().layers
    }

    /// Most tokens of a sequence.
    pub fn max_length(&self) -> usize {
        self.architecture().sizes().max_length as usize
    }

    /// Ids with a meaning of their own.
    pub fn special_tokens(&self) -> &SpecialTokens {
        self.architecture().special_tokens()
    }

    /// Ids with a meaning of their own, to be changed.
    pub fn special_tokens_mut(&mut self) -> &mut SpecialTokens {
        self.architecture_mut().special_tokens_mut()
    }

    /// Whether the output layer is the input embedding.
    pub fn ties_embeddings(&self) -> bool {
        self.architecture().sizes().ties_embeddings
    }

    /// Standard deviation of freshly initialised weights.
    pub fn initializer_range(&self) -> f64 {
        self.architecture().sizes().initializer_range
    }
}

/// Number of labels of a saved classifier, where its config says so.
pub(crate) fn label_count(dir: &Path) -> Result<Option<i64>> {
    let fields = Fields::read(&dir.join("config.json"))?;
    let labels: Option<Map<String, Value>> = fields.get("id2label")?;
    Ok(match labels {
        Some(labels) => Some(labels.len() as i64),
        None => fields.get("num_labels")?,
    })
}

impl SpecialTokens {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self> {
        Ok(Self {
            bos: fields.get("bos_token_id")?,
            eos: fields
                .get::<OneOrMany>("eos_token_id")?
                .map_or_else(Vec::new, OneOrMany::into),
            pad: fields.get("pad_token_id")?,
        })
    }

    pub(crate) fn write(&self, map: &mut Map<String, Value>) {
        let eos = match self.eos.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        map.insert("bos_token_id".into(), json!(self.bos));
        map.insert("eos_token_id".into(), eos);
        map.insert("pad_token_id".into(), json!(self.pad));
    }
}

/// `eos_token_id` is a number or a list of them.
#[derive(serde::Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

impl From<OneOrMany> for Vec<i64> {
    fn from(ids: OneOrMany) -> Self {
        match ids {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        }
    }
}

/// Most bytes of a configuration or an index. An index of 200,000 tensors has 20 million.
const MAX_JSON: u64 = 64 << 20;

/// The bytes of a file that should be small; one that is not is not read.
fn read_small(path: &Path) -> Result<Vec<u8>> {
    let about = std::fs::metadata(path).map_err(Error::io("reading", path))?;
    if !about.is_file() {
        return Err(Error::NotAFile { path: path.into() });
    }
    if about.len() > MAX_JSON {
        return Err(Error::FileTooLarge {
            path: path.into(),
            limit: MAX_JSON,
        });
    }
    std::fs::read(path).map_err(Error::io("reading", path))
}

/// A JSON object, with errors that name the file and the field.
#[derive(Debug)]
pub(crate) struct Fields {
    pub(crate) path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &read_small(path)?)
    }

    /// The object in a file's bytes.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let map = serde_json::from_slice(bytes).map_err(|source| Error::Json {
            path: path.into(),
            source,
        })?;
        let path = path.into();
        Ok(Self { path, map })
    }

    /// The value of a field, `None` where it is absent or null.
    pub(crate) fn get<T: DeserializeOwned>(&self, field: &str) -> Result<Option<T>> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value.clone())
                .map(Some)
                .map_err(|e| self.invalid(field, e.to_string())),
        }
    }

    /// The value of a field; `default` where it is absent, `None` where it is null.
    pub(crate) fn get_or<T: DeserializeOwned>(
        &self,
        field: &str,
        default: Option<T>,
    ) -> Result<Option<T>> {
        match self.map.contains_key(field) {
            true => self.get(field),
            false => Ok(default),
        }
    }

    /// All fields, in the order of the file.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    pub(crate) fn need<T: DeserializeOwned>(&self, field: &str) -> Result<T> {
        self.get(field)?.ok_or_else(|| Error::MissingField {
            path: self.path.clone(),
            field: field.into(),
        })
    }

    /// The error of a config that was read from this file and does not hold together.
    pub(crate) fn because(&self, error: rlhf_core::Error) -> Error {
        match error {
            rlhf_core::Error::InvalidConfig { field, reason, .. } => self.invalid(field, reason),
            other => other.into(),
        }
    }

    pub(crate) fn invalid(&self, field: &str, reason: impl Into<String>) -> Error {
        Error::InvalidField {
            path: self.path.clone(),
            field: field.into(),
            value: self.map.get(field).unwrap_or(&Value::Null).to_string(),
            reason: reason.into(),
        }
    }
}

/// Fails unless every size is at least 1 and one that models have.
pub(crate) fn check_sizes(sizes: &[(&'static str, i64)]) -> rlhf_core::Result<()> {
    for &(field, size) in sizes {
        if size < 1 {
            let reason = "it must be at least 1";
            return Err(rlhf_core::Error::config(field, size, reason));
        }
        if size > MAX_SIZE {
            let reason = "no model is as large as that";
            return Err(rlhf_core::Error::config(field, size, reason));
        }
    }
    Ok(())
}

/// Fails for more layers than any model has.
pub(crate) fn check_layers(field: &'static str, layers: i64) -> rlhf_core::Result<()> {
    if layers > MAX_LAYERS {
        let reason = "no model is as deep as that";
        return Err(rlhf_core::Error::config(field, layers, reason));
    }
    Ok(())
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        Kind::Double => "float64",
        _ => "float32",
    }
}
