//! Llama: rotary positions, RMS norm, gated feed-forward, grouped queries (Touvron et al. 2023,
//! arXiv 2307.09288; Llama 3, arXiv 2407.21783). SmolLM is one.

use rlhf_core::Result;
use serde_json::{Map, Value, json};

use crate::architecture::{Architecture, Names, Sizes};
use crate::attention_spec::AttentionSpec;
use crate::config::Fields;
use crate::pre_norm::pre_norm_trunk;
use crate::self_attention::AttentionOptions;
use crate::tensor_parallel::{LLAMA_PLAN, Plan, Widths};
use crate::transformer_config::FieldNames;
use crate::trunk::Trunk;
use crate::weights::Builder;
use crate::{Error, SpecialTokens, TransformerConfig};

/// Sizes of a Llama. Field names are those of `config.json`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LlamaConfig {
    /// What it has in common with its relatives.
    pub transformer: TransformerConfig,
    /// Whether the attention's projections have biases.
    pub attention_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
}

impl LlamaConfig {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let default = TransformerConfig::default();
        Ok(Self {
            transformer: TransformerConfig::from_fields(fields, default, FieldNames::LLAMA)?,
            attention_bias: fields.get("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.get("mlp_bias")?.unwrap_or(false),
        })
    }
}

impl Architecture for LlamaConfig {
    fn names(&self) -> Names {
        Names::usual("llama", "Llama")
    }

    fn sizes(&self) -> Sizes {
        self.transformer.sizes()
    }

    fn special_tokens(&self) -> &SpecialTokens {
        &self.transformer.special_tokens
    }

    fn special_tokens_mut(&mut self) -> &mut SpecialTokens {
        &mut self.transformer.special_tokens
    }

    fn validate(&self) -> Result<()> {
        self.transformer.validate()
    }

    fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("attention_bias".into(), json!(self.attention_bias));
        map.insert("mlp_bias".into(), json!(self.mlp_bias));
        self.transformer.write(&mut map, FieldNames::LLAMA);
        map
    }

    fn plan(&self) -> Plan {
        LLAMA_PLAN
    }

    fn widths(&self) -> Widths {
        self.transformer.widths()
    }

    fn build(&self, builder: &mut Builder) -> Result<Trunk, Error> {
        let config = &self.transformer;
        let options = AttentionOptions {
            qkv_bias: self.attention_bias,
            output_bias: self.attention_bias,
            ..AttentionOptions::plain(AttentionSpec::plain(config.head_dim))
        };
        pre_norm_trunk(config, |_| options, self.mlp_bias, builder)
    }
}
