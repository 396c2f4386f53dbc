//! Gemma 2: soft caps on attention and logits, every other layer with a window, norms before
//! and after each sublayer (Gemma Team 2024, arXiv 2408.00118).

use rlhf_core::{Error as CoreError, Result};
use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::architecture::{Architecture, Names, Sizes};
use crate::attention::Attention;
use crate::attention_spec::AttentionSpec;
use crate::config::{Fields, check_sizes};
use crate::gated_mlp::GatedMlp;
use crate::layer_windows::SlidingWindow;
use crate::layers::RmsNorm;
use crate::rope::{Rope, Rotation};
use crate::self_attention::{AttentionOptions, SelfAttention};
use crate::tensor_parallel::{LLAMA_PLAN, Plan, Widths};
use crate::transformer_config::{FieldNames, LeftOut};
use crate::trunk::{Block, Embedding, Norm, Trunk};
use crate::weights::Builder;
use crate::{Activation, Error, SpecialTokens, TransformerConfig};

/// Sizes of a Gemma 2. Field names are those of `config.json`, where the activation is
/// `hidden_activation`.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemma2Config {
    /// What it has in common with its relatives.
    pub transformer: TransformerConfig,
    /// Attention scores are divided by its square root.
    pub query_pre_attn_scalar: i64,
    /// Bound of the attention scores: `cap * tanh(x / cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// Bound of the logits.
    pub final_logit_softcapping: Option<f64>,
    /// Whether the attention's projections have biases.
    pub attention_bias: bool,
    /// The window of some layers; `None` where no layer has one.
    pub sliding_window: Option<SlidingWindow>,
}

const NAMES: FieldNames = FieldNames {
    activation: "hidden_activation",
    head_dim: LeftOut::Default,
    kv_heads: LeftOut::Default,
};

impl Default for Gemma2Config {
    /// As `transformers.Gemma2Config()`.
    fn default() -> Self {
        Self {
            transformer: TransformerConfig {
                vocab_size: 256_000,
                max_position_embeddings: 8192,
                hidden_size: 2304,
                intermediate_size: 9216,
                num_hidden_layers: 26,
                num_attention_heads: 8,
                num_key_value_heads: 4,
                head_dim: 256,
                hidden_act: Activation::GeluTanh,
                tie_word_embeddings: true,
                special_tokens: SpecialTokens {
                    bos: Some(2),
                    eos: vec![1],
                    pad: Some(0),
                },
                ..TransformerConfig::default()
            },
            query_pre_attn_scalar: 256,
            attn_logit_softcapping: Some(50.0),
            final_logit_softcapping: Some(30.0),
            attention_bias: false,
            sliding_window: Some(SlidingWindow {
                length: 4096,
                layers: (0..26).map(|layer| layer % 2 == 0).collect(),
            }),
        }
    }
}

impl Gemma2Config {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let default = Self::default();
        if fields.get("use_bidirectional_attention")?.unwrap_or(false) {
            let reason = "only causal attention is supported";
            return Err(fields.invalid("use_bidirectional_attention", reason));
        }
        let transformer = TransformerConfig::from_fields(fields, default.transformer, NAMES)?;
        let window = fields.get_or("sliding_window", Some(4096))?;
        let layers = transformer.num_hidden_layers;
        Ok(Self {
            query_pre_attn_scalar: fields
                .get("query_pre_attn_scalar")?
                .unwrap_or(default.query_pre_attn_scalar),
            // An explicit null is no cap, unlike a field that is left out.
            attn_logit_softcapping: fields
                .get_or("attn_logit_softcapping", default.attn_logit_softcapping)?,
            final_logit_softcapping: fields
                .get_or("final_logit_softcapping", default.final_logit_softcapping)?,
            attention_bias: fields.get("attention_bias")?.unwrap_or(false),
            sliding_window: SlidingWindow::from_fields(fields, window, layers, |layer| {
                layer % 2 == 0
            })?,
            transformer,
        })
    }
}

impl Architecture for Gemma2Config {
    fn names(&self) -> Names {
        Names::usual("gemma2", "Gemma2")
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
        for (field, value) in [
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ] {
            if let Some(value) = value
                && !(value > 0.0 && value.is_finite())
            {
                return Err(CoreError::config(field, value, "it must be above 0"));
            }
        }
        check_sizes(&[("query_pre_attn_scalar", self.query_pre_attn_scalar)])?;
        self.transformer.validate()?;
        match &self.sliding_window {
            Some(window) => window.validate(self.transformer.num_hidden_layers),
            None => Ok(()),
        }
    }

    fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        for (field, value) in [
            ("query_pre_attn_scalar", json!(self.query_pre_attn_scalar)),
            ("attn_logit_softcapping", json!(self.attn_logit_softcapping)),
            (
                "final_logit_softcapping",
                json!(self.final_logit_softcapping),
            ),
            ("attention_bias", json!(self.attention_bias)),
        ] {
            map.insert(field.into(), value);
        }
        self.transformer.write(&mut map, NAMES);
        let layers = self.transformer.num_hidden_layers;
        SlidingWindow::write(self.sliding_window.as_ref(), layers, &mut map);
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
        let size = (config.vocab_size, config.hidden_size);
        let embedding = "model.embed_tokens.weight";
        let embedding = Embedding::build(builder, embedding, size, config.initializer_range)
            .scaled((config.hidden_size as f64).sqrt());
        let blocks = builder
            .layers(config.num_hidden_layers)
            .map(|layer| Box::new(Gemma2Block::build(self, layer, builder)) as Box<dyn Block>)
            .collect();
        let (width, epsilon) = (config.hidden_size, config.rms_norm_eps);
        let norm = RmsNorm::around_one(builder, "model.norm", width, epsilon);
        Ok(Trunk {
            embedding,
            rope: Rope::new(&config.rope, config.head_dim, builder.device())?,
            blocks,
            final_norm: Norm::Rms(norm),
            stage: builder.stage(),
            place: builder.place(),
        })
    }

    fn logit_softcap(&self) -> Option<f64> {
        self.final_logit_softcapping
    }
}

struct Gemma2Block {
    before_attention: RmsNorm,
    attention: SelfAttention,
    after_attention: RmsNorm,
    before_mlp: RmsNorm,
    mlp: GatedMlp,
    after_mlp: RmsNorm,
}

impl Gemma2Block {
    fn build(config: &Gemma2Config, layer: i64, builder: &mut Builder) -> Self {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let shared = &config.transformer;
        let (width, epsilon) = (shared.hidden_size, shared.rms_norm_eps);
        let options = AttentionOptions {
            spec: AttentionSpec {
                scale: 1.0 / (config.query_pre_attn_scalar as f64).sqrt(),
                window: SlidingWindow::of(config.sliding_window.as_ref(), layer),
                softcap: config.attn_logit_softcapping,
            },
            qkv_bias: config.attention_bias,
            output_bias: config.attention_bias,
            head_norms: false,
        };
        let attention = SelfAttention::build(shared, options, &name("self_attn"), builder);
        let mlp = GatedMlp::build(shared, false, &name("mlp"), builder);
        let mut norm = |part: &str| RmsNorm::around_one(builder, &name(part), width, epsilon);
        Self {
            before_attention: norm("input_layernorm"),
            attention,
            after_attention: norm("post_attention_layernorm"),
            before_mlp: norm("pre_feedforward_layernorm"),
            mlp,
            after_mlp: norm("post_feedforward_layernorm"),
        }
    }
}

impl Block for Gemma2Block {
    fn share(&self) -> Box<dyn Block> {
        Box::new(Self {
            before_attention: self.before_attention.share(),
            attention: self.attention.share(),
            after_attention: self.after_attention.share(),
            before_mlp: self.before_mlp.share(),
            mlp: self.mlp.share(),
            after_mlp: self.after_mlp.share(),
        })
    }

    fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let normed = self.before_attention.forward(x)?;
        let attended = self
            .attention
            .forward(layer, &normed, rotation, attention)?;
        let x = attention
            .attended_rows(layer, x)?
            .f_add(&self.after_attention.forward(&attended)?)?;
        let fed = self.mlp.forward(&self.before_mlp.forward(&x)?)?;
        Ok(x.f_add(&self.after_mlp.forward(&fed)?)?)
    }
}
