//! Mistral: a Llama whose tokens look back only so far (Jiang et al. 2023, arXiv 2310.06825).

use rlhf_core::{Error as CoreError, Result};
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

/// Sizes of a Mistral. Field names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct MistralConfig {
    /// What it has in common with its relatives.
    pub transformer: TransformerConfig,
    /// Most tokens that a token looks at, itself included; `None` for all before it.
    pub sliding_window: Option<i64>,
}

impl Default for MistralConfig {
    /// Mistral 7B, as `transformers.MistralConfig()`.
    fn default() -> Self {
        Self {
            transformer: TransformerConfig {
                max_position_embeddings: 4096 * 32,
                intermediate_size: 14_336,
                num_key_value_heads: 8,
                ..TransformerConfig::default()
            },
            sliding_window: Some(4096),
        }
    }
}

impl MistralConfig {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let default = Self::default().transformer;
        Ok(Self {
            transformer: TransformerConfig::from_fields(fields, default, FieldNames::GROUPED)?,
            sliding_window: fields.get_or("sliding_window", Some(4096))?,
        })
    }
}

impl Architecture for MistralConfig {
    fn names(&self) -> Names {
        Names::usual("mistral", "Mistral")
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
        if let Some(window) = self.sliding_window
            && window < 1
        {
            let reason = "a token looks at itself at least";
            return Err(CoreError::config("sliding_window", window, reason));
        }
        self.transformer.validate()
    }

    fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("sliding_window".into(), json!(self.sliding_window));
        self.transformer.write(&mut map, FieldNames::GROUPED);
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
        let options = AttentionOptions::plain(AttentionSpec {
            window: self.sliding_window,
            ..AttentionSpec::plain(config.head_dim)
        });
        pre_norm_trunk(config, |_| options, false, builder)
    }
}
