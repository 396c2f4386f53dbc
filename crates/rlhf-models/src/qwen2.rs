//! Qwen2: a Llama with biases on query, key and value, whose later layers may have a window
//! (Yang et al. 2024, arXiv 2407.10671). Qwen2.5 is one.

use rlhf_core::Result;
use serde_json::{Map, Value, json};

use crate::architecture::{Architecture, Names, Sizes};
use crate::attention_spec::AttentionSpec;
use crate::config::Fields;
use crate::layer_windows::SlidingWindow;
use crate::pre_norm::pre_norm_trunk;
use crate::self_attention::AttentionOptions;
use crate::tensor_parallel::{LLAMA_PLAN, Plan, Widths};
use crate::transformer_config::FieldNames;
use crate::trunk::Trunk;
use crate::weights::Builder;
use crate::{Error, SpecialTokens, TransformerConfig};

/// Sizes of a Qwen2. Field names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Qwen2Config {
    /// What it has in common with its relatives.
    pub transformer: TransformerConfig,
    /// The window of some layers; `None` where no layer has one.
    pub sliding_window: Option<SlidingWindow>,
}

impl Default for Qwen2Config {
    /// As `transformers.Qwen2Config()`.
    fn default() -> Self {
        Self {
            transformer: TransformerConfig {
                vocab_size: 151_936,
                max_position_embeddings: 32_768,
                intermediate_size: 22_016,
                special_tokens: SpecialTokens::default(),
                ..TransformerConfig::default()
            },
            sliding_window: None,
        }
    }
}

impl Qwen2Config {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let default = Self::default().transformer;
        let transformer = TransformerConfig::from_fields(fields, default, FieldNames::GROUPED)?;
        let sliding_window = qwen_windows(fields, transformer.num_hidden_layers)?;
        Ok(Self {
            transformer,
            sliding_window,
        })
    }
}

/// Both Qwens switch the window with `use_sliding_window` and, in older files, begin it at the
/// layer `max_window_layers`.
pub(crate) fn qwen_windows(fields: &Fields, layers: i64) -> Result<Option<SlidingWindow>, Error> {
    let length = match fields.get("use_sliding_window")?.unwrap_or(false) {
        true => fields.get_or("sliding_window", Some(4096))?,
        false => None,
    };
    let first = fields.get("max_window_layers")?.unwrap_or(28);
    SlidingWindow::from_fields(fields, length, layers, |layer| {
        length.is_some() && layer >= first
    })
}

/// The fields that [`qwen_windows`] reads.
pub(crate) fn write_qwen_windows(
    window: Option<&SlidingWindow>,
    layers: i64,
    map: &mut Map<String, Value>,
) {
    let first = window.and_then(|window| window.layers.iter().position(|&sliding| sliding));
    map.insert("use_sliding_window".into(), json!(window.is_some()));
    map.insert(
        "max_window_layers".into(),
        json!(first.map_or(layers, |first| first as i64)),
    );
    SlidingWindow::write(window, layers, map);
}

impl Architecture for Qwen2Config {
    fn names(&self) -> Names {
        Names::usual("qwen2", "Qwen2")
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
        self.transformer.write(&mut map, FieldNames::GROUPED);
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
            qkv_bias: true,
            ..AttentionOptions::plain(AttentionSpec {
                window: SlidingWindow::of(self.sliding_window.as_ref(), layer),
                ..AttentionSpec::plain(config.head_dim)
            })
        };
        pre_norm_trunk(config, options, false, builder)
    }
}
