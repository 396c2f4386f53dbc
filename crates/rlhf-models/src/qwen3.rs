//! Qwen3: a Llama with norms of each head's query and key, whose later layers may have a window
//! (Yang et al. 2025, arXiv 2505.09388).

use rlhf_core::Result;
use serde_json::{Map, Value, json};

use crate::architecture::{Architecture, Names, Sizes};
use crate::attention_spec::AttentionSpec;
use crate::config::Fields;
use crate::layer_windows::SlidingWindow;
use crate::pre_norm::pre_norm_trunk;
use crate::qwen2::{qwen_windows, write_qwen_windows};
use crate::self_attention::AttentionOptions;
use crate::tensor_parallel::{LLAMA_PLAN, Plan, Widths};
use crate::transformer_config::{FieldNames, LeftOut};
use crate::trunk::Trunk;
use crate::weights::Builder;
use crate::{Error, SpecialTokens, TransformerConfig};

/// Sizes of a Qwen3. Field names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Qwen3Config {
    /// What it has in common with its relatives.
    pub transformer: TransformerConfig,
    /// Whether the attention's projections have biases.
    pub attention_bias: bool,
    /// The window of some layers; `None` where no layer has one.
    pub sliding_window: Option<SlidingWindow>,
}

const NAMES: FieldNames = FieldNames {
    head_dim: LeftOut::Default,
    ..FieldNames::GROUPED
};

impl Default for Qwen3Config {
    /// As `transformers.Qwen3Config()`.
    fn default() -> Self {
        Self {
            transformer: TransformerConfig {
                vocab_size: 151_936,
                max_position_embeddings: 32_768,
                intermediate_size: 22_016,
                special_tokens: SpecialTokens::default(),
                ..TransformerConfig::default()
            },
            attention_bias: false,
            sliding_window: None,
        }
    }
}

impl Qwen3Config {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let default = Self::default().transformer;
        let transformer = TransformerConfig::from_fields(fields, default, NAMES)?;
        let sliding_window = qwen_windows(fields, transformer.num_hidden_layers)?;
        Ok(Self {
            transformer,
            attention_bias: fields.get("attention_bias")?.unwrap_or(false),
            sliding_window,
        })
    }
}

impl Architecture for Qwen3Config {
    fn names(&self) -> Names {
        Names::usual("qwen3", "Qwen3")
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
        self.transformer.validate()?;
        match &self.sliding_window {
            Some(window) => window.validate(self.transformer.num_hidden_layers),
            None => Ok(()),
        }
    }

    fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("attention_bias".into(), json!(self.attention_bias));
        self.transformer.write(&mut map, NAMES);
        let layers = self.transformer.num_hidden_layers;
        write_qwen_windows(self.sliding_window.as_ref(), layers, &mut map);
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
        let options = |layer| AttentionOptions {
            spec: AttentionSpec {
                window: SlidingWindow::of(self.sliding_window.as_ref(), layer),
                ..AttentionSpec::plain(config.head_dim)
            },
            qkv_bias: self.attention_bias,
            output_bias: self.attention_bias,
            head_norms: true,
        };
        pre_norm_trunk(config, options, false, builder)
    }
}
