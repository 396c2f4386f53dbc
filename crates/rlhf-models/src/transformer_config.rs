//! What Llama and its relatives have in common in `config.json`.

use rlhf_core::Error as CoreError;
use serde_json::{Map, Value, json};

use crate::architecture::Sizes;
use crate::config::{Fields, check_layers, check_sizes};
use crate::rope::{RopeConfig, RopeScaling, rope_number};
use crate::tensor_parallel::Widths;
use crate::{Activation, Result, SpecialTokens};

/// Sizes of a decoder with rotary positions, RMS norm, grouped queries and a gated feed-forward
/// layer: [`LlamaConfig`](crate::LlamaConfig), [`MistralConfig`](crate::MistralConfig),
/// [`Qwen2Config`](crate::Qwen2Config), [`Qwen3Config`](crate::Qwen3Config) and
/// [`Gemma2Config`](crate::Gemma2Config) have it. Field names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct TransformerConfig {
    /// Number of token ids.
    pub vocab_size: i64,
    /// Most tokens of a sequence; before a dynamic [`RopeScaling`] extends it.
    pub max_position_embeddings: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the feed-forward layer.
    pub intermediate_size: i64,
    /// Number of blocks.
    pub num_hidden_layers: i64,
    /// Query heads of a block.
    pub num_attention_heads: i64,
    /// Key and value heads; divides the number of query heads.
    pub num_key_value_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Non-linearity of the gate.
    pub hidden_act: Activation,
    /// Added to the mean square in RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Whether the output layer is the input embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Ids with a meaning of their own.
    pub special_tokens: SpecialTokens,
}

impl Default for TransformerConfig {
    /// Llama 7B, as `transformers.LlamaConfig()`.
    fn default() -> Self {
        Self {
            vocab_size: 32_000,
            max_position_embeddings: 2048,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 128,
            hidden_act: Activation::Silu,
            rms_norm_eps: 1e-6,
            rope: RopeConfig {
                theta: 10_000.0,
                scaling: RopeScaling::Default,
            },
            tie_word_embeddings: false,
            initializer_range: 0.02,
            special_tokens: SpecialTokens {
                bos: Some(1),
                eos: vec![2],
                pad: None,
            },
        }
    }
}

impl TransformerConfig {
    /// Reads what a file says. Of what it leaves out, sizes are an error, and the rest is that
    /// of `default`, the architecture's own.
    pub(crate) fn from_fields(fields: &Fields, default: Self, names: FieldNames) -> Result<Self> {
        let hidden_size: i64 = fields.need("hidden_size")?;
        let heads: i64 = fields.need("num_attention_heads")?;
        let max_position_embeddings: i64 = fields.need("max_position_embeddings")?;
        let part = match rope_number(fields, "partial_rotary_factor")? {
            Some(part) => Some(part),
            None => fields.get("partial_rotary_factor")?,
        };
        if part.is_some_and(|part: f64| part != 1.0) {
            let reason = "only GPT-NeoX turns a part of a head";
            return Err(fields.invalid("partial_rotary_factor", reason));
        }
        let (head_dim, kv_heads) = (default.head_dim, default.num_key_value_heads);
        let config = Self {
            vocab_size: fields.need("vocab_size")?,
            max_position_embeddings,
            hidden_size,
            intermediate_size: fields.need("intermediate_size")?,
            num_hidden_layers: fields.need("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: fields
                .get_or("num_key_value_heads", names.kv_heads.value(kv_heads))?
                .unwrap_or(heads),
            head_dim: fields
                .get_or("head_dim", names.head_dim.value(head_dim))?
                .unwrap_or(hidden_size / heads.max(1)),
            hidden_act: fields.get(names.activation)?.unwrap_or(default.hidden_act),
            rms_norm_eps: fields.get("rms_norm_eps")?.unwrap_or(default.rms_norm_eps),
            rope: RopeConfig::from_fields(fields, max_position_embeddings)?,
            tie_word_embeddings: fields
                .get("tie_word_embeddings")?
                .unwrap_or(default.tie_word_embeddings),
            initializer_range: fields
                .get("initializer_range")?
                .unwrap_or(default.initializer_range),
            special_tokens: SpecialTokens::from_fields(fields)?,
        };
        // Before anything is made for each of its layers.
        config.validate().map_err(|error| fields.because(error))?;
        Ok(config)
    }

    /// Fails for sizes that make no model.
    ///
    /// # Errors
    /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig), naming the field.
    pub fn validate(&self) -> rlhf_core::Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            return Err(CoreError::config(
                "num_key_value_heads",
                self.num_key_value_heads,
                "it must divide num_attention_heads",
            ));
        }
        if self.head_dim % 2 != 0 {
            let reason = "rotary positions turn pairs of dimensions";
            return Err(CoreError::config("head_dim", self.head_dim, reason));
        }
        self.rope.validate(self.head_dim)
    }

    /// Width of the queries of all heads.
    pub(crate) fn query_width(&self) -> i64 {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the keys of all heads.
    pub(crate) fn key_width(&self) -> i64 {
        self.num_key_value_heads * self.head_dim
    }

    pub(crate) fn widths(&self) -> Widths {
        Widths {
            heads: ("num_attention_heads", self.num_attention_heads),
            kv_heads: ("num_key_value_heads", self.num_key_value_heads),
            head_dim: self.head_dim,
            inner: ("intermediate_size", self.intermediate_size),
        }
    }

    pub(crate) fn sizes(&self) -> Sizes {
        Sizes {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers: self.num_hidden_layers,
            max_length: self.rope.max_length(self.max_position_embeddings),
            ties_embeddings: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
        }
    }

    pub(crate) fn write(&self, map: &mut Map<String, Value>, names: FieldNames) {
        for (field, value) in [
            ("vocab_size", json!(self.vocab_size)),
            (
                "max_position_embeddings",
                json!(self.max_position_embeddings),
            ),
            ("hidden_size", json!(self.hidden_size)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("num_hidden_layers", json!(self.num_hidden_layers)),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_key_value_heads", json!(self.num_key_value_heads)),
            ("head_dim", json!(self.head_dim)),
            (names.activation, json!(self.hidden_act)),
            ("rms_norm_eps", json!(self.rms_norm_eps)),
            ("attention_dropout", json!(0.0)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("initializer_range", json!(self.initializer_range)),
        ] {
            map.insert(field.into(), value);
        }
        self.rope.write(map);
        self.special_tokens.write(map);
    }
}

/// Where architectures differ in how they write the same thing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FieldNames {
    pub(crate) activation: &'static str,
    pub(crate) head_dim: LeftOut,
    pub(crate) kv_heads: LeftOut,
}

/// What a size is that a file leaves out.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LeftOut {
    /// It follows from the others.
    Derived,
    /// That of the architecture's default.
    Default,
}

impl LeftOut {
    fn value(self, default: i64) -> Option<i64> {
        match self {
            Self::Derived => None,
            Self::Default => Some(default),
        }
    }
}

impl FieldNames {
    pub(crate) const LLAMA: Self = Self {
        activation: "hidden_act",
        head_dim: LeftOut::Derived,
        kv_heads: LeftOut::Derived,
    };
    /// Mistral's and Qwen2's.
    pub(crate) const GROUPED: Self = Self {
        kv_heads: LeftOut::Default,
        ..Self::LLAMA
    };
}
