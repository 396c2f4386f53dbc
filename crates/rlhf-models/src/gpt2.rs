//! GPT-2: learned positions, layer norm before each sublayer, one matrix for query, key and
//! value (Radford et al. 2019).

use rlhf_core::Result;
use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::architecture::{Architecture, Names, Sizes};
use crate::attention::{Attention, Qkv};
use crate::attention_spec::AttentionSpec;
use crate::config::{Fields, check_layers, check_sizes};
use crate::layers::{Activation, LayerNorm, Layout, Linear};
use crate::rope::{Rope, Rotation};
use crate::tensor_parallel::{GPT2_PLAN, Plan, Widths};
use crate::trunk::{Block, Embedding, Norm, Trunk};
use crate::weights::{Builder, Init};
use crate::{Error, SpecialTokens};

/// Sizes of a GPT-2. Field names are those of `config.json`.
///
/// Dropout probabilities are kept for `config.json`, and never applied: no stage of RLHF here
/// trains with dropout, and log-probs would differ between two passes over the same tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpt2Config {
    /// Number of token ids.
    pub vocab_size: i64,
    /// Most tokens of a sequence.
    pub n_positions: i64,
    /// Width of the residual stream.
    pub n_embd: i64,
    /// Number of blocks.
    pub n_layer: i64,
    /// Attention heads of a block; divides `n_embd`.
    pub n_head: i64,
    /// Width of the feed-forward layer; four times `n_embd` if `None`.
    pub n_inner: Option<i64>,
    /// Non-linearity of the feed-forward layer.
    pub activation_function: Activation,
    /// Added to the variance in layer norm.
    pub layer_norm_epsilon: f64,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Whether the output layer is the input embedding.
    pub tie_word_embeddings: bool,
    /// Whether attention scores are divided by the square root of the head's width.
    pub scale_attn_weights: bool,
    /// Whether they are divided by the number of the layer (from 1), too.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// Dropout of the residual stream, not applied.
    pub resid_pdrop: f64,
    /// Dropout of the embeddings, not applied.
    pub embd_pdrop: f64,
    /// Dropout of the attention weights, not applied.
    pub attn_pdrop: f64,
    /// Ids with a meaning of their own.
    pub special_tokens: SpecialTokens,
}

impl Default for Gpt2Config {
    /// GPT-2 small (124 million parameters), as `transformers.GPT2Config()`, but without
    /// dropout.
    fn default() -> Self {
        Self {
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: Activation::GeluNew,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            tie_word_embeddings: true,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            resid_pdrop: 0.0,
            embd_pdrop: 0.0,
            attn_pdrop: 0.0,
            special_tokens: SpecialTokens {
                bos: Some(50256),
                eos: vec![50256],
                pad: None,
            },
        }
    }
}

impl Gpt2Config {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let default = Self::default();
        if fields.get("add_cross_attention")?.unwrap_or(false) {
            return Err(fields.invalid("add_cross_attention", "only decoders are supported"));
        }
        Ok(Self {
            vocab_size: fields.need("vocab_size")?,
            n_positions: fields.need("n_positions")?,
            n_embd: fields.need("n_embd")?,
            n_layer: fields.need("n_layer")?,
            n_head: fields.need("n_head")?,
            n_inner: fields.get("n_inner")?,
            activation_function: fields
                .get("activation_function")?
                .unwrap_or(default.activation_function),
            layer_norm_epsilon: fields
                .get("layer_norm_epsilon")?
                .unwrap_or(default.layer_norm_epsilon),
            initializer_range: fields
                .get("initializer_range")?
                .unwrap_or(default.initializer_range),
            tie_word_embeddings: fields.get("tie_word_embeddings")?.unwrap_or(true),
            scale_attn_weights: fields.get("scale_attn_weights")?.unwrap_or(true),
            scale_attn_by_inverse_layer_idx: fields
                .get("scale_attn_by_inverse_layer_idx")?
                .unwrap_or(false),
            resid_pdrop: fields.get("resid_pdrop")?.unwrap_or(0.1),
            embd_pdrop: fields.get("embd_pdrop")?.unwrap_or(0.1),
            attn_pdrop: fields.get("attn_pdrop")?.unwrap_or(0.1),
            special_tokens: SpecialTokens::from_fields(fields)?,
        })
    }

    fn attention(&self, layer: i64) -> AttentionSpec {
        let mut scale = 1.0;
        if self.scale_attn_weights {
            scale /= ((self.n_embd / self.n_head) as f64).sqrt();
        }
        if self.scale_attn_by_inverse_layer_idx {
            scale /= (layer + 1) as f64;
        }
        AttentionSpec {
            scale,
            window: None,
            softcap: None,
        }
    }
}

impl Architecture for Gpt2Config {
    fn names(&self) -> Names {
        Names {
            causal_lm: "LMHeadModel",
            trunk: "transformer.",
            ..Names::usual("gpt2", "GPT2")
        }
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocab_size: self.vocab_size,
            hidden_size: self.n_embd,
            layers: self.n_layer,
            max_length: self.n_positions,
            ties_embeddings: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
        }
    }

    fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    fn special_tokens_mut(&mut self) -> &mut SpecialTokens {
        &mut self.special_tokens
    }

    fn validate(&self) -> Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_layer", self.n_layer),
            ("n_head", self.n_head),
            ("n_inner", self.n_inner.unwrap_or(1)),
        ])?;
        if self.n_embd % self.n_head != 0 {
            let reason = "it must divide n_embd";
            return Err(rlhf_core::Error::config("n_head", self.n_head, reason));
        }
        check_layers("n_layer", self.n_layer)
    }

    fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        for (field, value) in [
            ("vocab_size", json!(self.vocab_size)),
            ("n_positions", json!(self.n_positions)),
            ("n_embd", json!(self.n_embd)),
            ("n_layer", json!(self.n_layer)),
            ("n_head", json!(self.n_head)),
            ("n_inner", json!(self.n_inner)),
            ("activation_function", json!(self.activation_function)),
            ("layer_norm_epsilon", json!(self.layer_norm_epsilon)),
            ("initializer_range", json!(self.initializer_range)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("scale_attn_weights", json!(self.scale_attn_weights)),
            (
                "scale_attn_by_inverse_layer_idx",
                json!(self.scale_attn_by_inverse_layer_idx),
            ),
            ("resid_pdrop", json!(self.resid_pdrop)),
            ("embd_pdrop", json!(self.embd_pdrop)),
            ("attn_pdrop", json!(self.attn_pdrop)),
        ] {
            map.insert(field.into(), value);
        }
        self.special_tokens.write(&mut map);
        map
    }

    fn plan(&self) -> Plan {
        GPT2_PLAN
    }

    fn widths(&self) -> Widths {
        Widths {
            heads: ("n_head", self.n_head),
            kv_heads: ("n_head", self.n_head),
            head_dim: self.n_embd / self.n_head,
            inner: ("n_inner", self.n_inner.unwrap_or(4 * self.n_embd)),
        }
    }

    fn build(&self, builder: &mut Builder) -> Result<Trunk, Error> {
        let (width, range) = (self.n_embd, self.initializer_range);
        let (tokens, positions) = ("transformer.wte.weight", "transformer.wpe.weight");
        let embedding = Embedding::build(builder, tokens, (self.vocab_size, width), range);
        let shape = [self.n_positions, width];
        let positions = builder.weight(positions, &shape, Init::Normal(range));
        let blocks = builder
            .layers(self.n_layer)
            .map(|layer| Box::new(Gpt2Block::build(self, layer, builder)) as Box<dyn Block>)
            .collect();
        let epsilon = self.layer_norm_epsilon;
        let norm = LayerNorm::build(builder, "transformer.ln_f", width, epsilon);
        Ok(Trunk {
            embedding: embedding.with_positions(positions),
            rope: Rope::none(),
            blocks,
            final_norm: Norm::Layer(norm),
            stage: builder.stage(),
            place: builder.place(),
        })
    }
}

struct Gpt2Block {
    attention_norm: LayerNorm,
    qkv: Linear,
    attention_output: Linear,
    mlp_norm: LayerNorm,
    mlp_input: Linear,
    mlp_output: Linear,
    activation: Activation,
    heads: i64,
    head_dim: i64,
    attention: AttentionSpec,
}

impl Gpt2Block {
    fn build(config: &Gpt2Config, layer: i64, builder: &mut Builder) -> Self {
        let name = |part: &str| format!("transformer.h.{layer}.{part}");
        let (width, epsilon) = (config.n_embd, config.layer_norm_epsilon);
        let inner = config.n_inner.unwrap_or(4 * width);
        let normal = Init::Normal(config.initializer_range);
        // Two projections a block add to the residual stream; their scale keeps its variance
        // from growing with depth.
        let residual =
            Init::Normal(config.initializer_range / (2.0 * config.n_layer as f64).sqrt());
        let mut linear = |part: &str, size, init| {
            Linear::build(builder, &name(part), size, Layout::InOut, true, init)
        };
        let qkv = linear("attn.c_attn", (width, 3 * width), normal);
        let attention_output = linear("attn.c_proj", (width, width), residual);
        let mlp_input = linear("mlp.c_fc", (width, inner), normal);
        let mlp_output = linear("mlp.c_proj", (inner, width), residual);
        Self {
            attention_norm: LayerNorm::build(builder, &name("ln_1"), width, epsilon),
            qkv,
            attention_output,
            mlp_norm: LayerNorm::build(builder, &name("ln_2"), width, epsilon),
            mlp_input,
            mlp_output,
            activation: config.activation_function,
            heads: builder.local_heads(config.n_head),
            head_dim: width / config.n_head,
            attention: config.attention(layer),
        }
    }
}

impl Block for Gpt2Block {
    fn share(&self) -> Box<dyn Block> {
        Box::new(Self {
            attention_norm: self.attention_norm.share(),
            qkv: self.qkv.share(),
            attention_output: self.attention_output.share(),
            mlp_norm: self.mlp_norm.share(),
            mlp_input: self.mlp_input.share(),
            mlp_output: self.mlp_output.share(),
            ..*self
        })
    }

    fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        _rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.attention_norm.forward(x)?)?;
        let qkv = qkv.f_view([-1, 3, self.heads, self.head_dim])?;
        let qkv = Qkv::from_parts(qkv.f_unbind(1)?)?;
        let attended = attention.attend(layer, &qkv, &self.attention)?;
        let x = attention
            .attended_rows(layer, x)?
            .f_add(&self.attention_output.forward(&attended)?)?;
        let inner = self.mlp_input.forward(&self.mlp_norm.forward(&x)?)?;
        let inner = self.activation.forward(&inner)?;
        Ok(x.f_add(&self.mlp_output.forward(&inner)?)?)
    }
}
