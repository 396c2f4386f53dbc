//! Architecture and sizes of a model, read from and written to `config.json`.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tch::Kind;

use crate::{Error, Gpt2Config, LlamaConfig, Result};

/// Every `model_type` that can be loaded.
pub const SUPPORTED_ARCHITECTURES: &[&str] = &["gpt2", "llama"];

/// A model's architecture with its sizes: `config.json`, resolved.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ModelConfig {
    /// GPT-2.
    Gpt2(Gpt2Config),
    /// Llama and its kin (SmolLM2 among them).
    Llama(LlamaConfig),
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
        match model_type.as_str() {
            "gpt2" => Gpt2Config::from_fields(fields).map(Self::Gpt2),
            "llama" => LlamaConfig::from_fields(fields).map(Self::Llama),
            _ => Err(Error::UnknownArchitecture {
                path: fields.path.clone(),
                found: model_type,
                supported: SUPPORTED_ARCHITECTURES,
            }),
        }
    }

    pub(crate) fn to_json(&self, head: Head, kind: Kind) -> Value {
        let (mut map, class, causal) = match self {
            Self::Gpt2(config) => (config.to_json(), "GPT2", "LMHeadModel"),
            Self::Llama(config) => (config.to_json(), "Llama", "ForCausalLM"),
        };
        let suffix = match head {
            Head::CausalLm => causal,
            Head::Classifier { .. } => "ForSequenceClassification",
        };
        map.insert("architectures".into(), json!([format!("{class}{suffix}")]));
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
        match self {
            Self::Gpt2(c) => c.validate(),
            Self::Llama(c) => c.validate(),
        }
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> i64 {
        match self {
            Self::Gpt2(c) => c.vocab_size,
            Self::Llama(c) => c.vocab_size,
        }
    }

    /// Width of the residual stream, `H`.
    pub fn hidden_size(&self) -> i64 {
        match self {
            Self::Gpt2(c) => c.n_embd,
            Self::Llama(c) => c.hidden_size,
        }
    }

    /// Number of transformer blocks.
    pub fn layers(&self) -> i64 {
        match self {
            Self::Gpt2(c) => c.n_layer,
            Self::Llama(c) => c.num_hidden_layers,
        }
    }

    /// Most tokens of a sequence.
    pub fn max_length(&self) -> usize {
        match self {
            Self::Gpt2(c) => c.n_positions as usize,
            Self::Llama(c) => c.max_position_embeddings as usize,
        }
    }

    /// Ids with a meaning of their own.
    pub fn special_tokens(&self) -> &SpecialTokens {
        match self {
            Self::Gpt2(c) => &c.special_tokens,
            Self::Llama(c) => &c.special_tokens,
        }
    }

    /// Ids with a meaning of their own, to be changed.
    pub fn special_tokens_mut(&mut self) -> &mut SpecialTokens {
        match self {
            Self::Gpt2(c) => &mut c.special_tokens,
            Self::Llama(c) => &mut c.special_tokens,
        }
    }

    /// Whether the output layer is the input embedding.
    pub fn ties_embeddings(&self) -> bool {
        match self {
            Self::Gpt2(c) => c.tie_word_embeddings,
            Self::Llama(c) => c.tie_word_embeddings,
        }
    }

    /// Standard deviation of freshly initialised weights.
    pub fn initializer_range(&self) -> f64 {
        match self {
            Self::Gpt2(c) => c.initializer_range,
            Self::Llama(c) => c.initializer_range,
        }
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

/// A JSON object, with errors that name the file and the field.
#[derive(Debug)]
pub(crate) struct Fields {
    pub(crate) path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("reading", path))?;
        let map = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
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

/// Fails unless every size is at least 1.
pub(crate) fn check_sizes(sizes: &[(&'static str, i64)]) -> rlhf_core::Result<()> {
    match sizes.iter().find(|(_, size)| *size < 1) {
        Some(&(field, size)) => {
            let reason = "it must be at least 1";
            Err(rlhf_core::Error::config(field, size, reason))
        }
        None => Ok(()),
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        Kind::Double => "float64",
        _ => "float32",
    }
}
