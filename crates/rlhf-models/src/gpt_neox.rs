//! GPT-NeoX: rotary positions on part of a head, attention and feed-forward side by side (Black
//! et al. 2022, arXiv 2204.06745). Pythia is one (Biderman et al. 2023, arXiv 2304.01373).

use rlhf_core::{Error as CoreError, Result};
use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::architecture::{Architecture, Names, Sizes};
use crate::attention::{Attention, Qkv};
use crate::attention_spec::AttentionSpec;
use crate::config::{Fields, check_layers, check_sizes};
use crate::layers::{Activation, LayerNorm, Layout, Linear};
use crate::rope::{Rope, RopeConfig, RopeScaling, Rotation, rope_number};
use crate::tensor_parallel::{GPT_NEOX_PLAN, Plan, Widths};
use crate::trunk::{Block, Embedding, Norm, Trunk};
use crate::weights::{Builder, Init};
use crate::{Error, SpecialTokens};

/// Sizes of a GPT-NeoX. Field names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct GptNeoxConfig {
    /// Number of token ids.
    pub vocab_size: i64,
    /// Most tokens of a sequence.
    pub max_position_embeddings: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the feed-forward layer.
    pub intermediate_size: i64,
    /// Number of blocks.
    pub num_hidden_layers: i64,
    /// Attention heads of a block; divides `hidden_size`.
    pub num_attention_heads: i64,
    /// Non-linearity of the feed-forward layer.
    pub hidden_act: Activation,
    /// Added to the variance in layer norm.
    pub layer_norm_eps: f64,
    /// Rotary positions; `theta` is `rotary_emb_base`.
    pub rope: RopeConfig,
    /// The part of a head that has rotary positions.
    pub rotary_pct: f64,
    /// Whether attention and feed-forward layer see the same input, rather than one the other's
    /// output.
    pub use_parallel_residual: bool,
    /// Whether the attention's projections have biases.
    pub attention_bias: bool,
    /// Whether the output layer is the input embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Ids with a meaning of their own.
    pub special_tokens: SpecialTokens,
}

impl Default for GptNeoxConfig {
    /// GPT-NeoX 20B, as `transformers.GPTNeoXConfig()`.
    fn default() -> Self {
        Self {
            vocab_size: 50_432,
            max_position_embeddings: 2048,
            hidden_size: 6144,
            intermediate_size: 24_576,
            num_hidden_layers: 44,
            num_attention_heads: 64,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-5,
            rope: RopeConfig {
                theta: 10_000.0,
                scaling: RopeScaling::Default,
            },
            rotary_pct: 0.25,
            use_parallel_residual: true,
            attention_bias: true,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            special_tokens: SpecialTokens {
                bos: Some(0),
                eos: vec![2],
                pad: None,
            },
        }
    }
}

impl GptNeoxConfig {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let default = Self::default();
        let max_position_embeddings: i64 = fields.need("max_position_embeddings")?;
        let rope = RopeConfig::from_fields(fields, max_position_embeddings)?;
        let part = match rope_number(fields, "partial_rotary_factor")? {
            Some(part) => Some(part),
            None => fields.get("rotary_pct")?,
        };
        Ok(Self {
            vocab_size: fields.need("vocab_size")?,
            max_position_embeddings,
            hidden_size: fields.need("hidden_size")?,
            intermediate_size: fields.need("intermediate_size")?,
            num_hidden_layers: fields.need("num_hidden_layers")?,
            num_attention_heads: fields.need("num_attention_heads")?,
            hidden_act: fields.get("hidden_act")?.unwrap_or(default.hidden_act),
            layer_norm_eps: fields
                .get("layer_norm_eps")?
                .unwrap_or(default.layer_norm_eps),
            rope,
            rotary_pct: part.unwrap_or(default.rotary_pct),
            use_parallel_residual: fields.get("use_parallel_residual")?.unwrap_or(true),
            attention_bias: fields.get("attention_bias")?.unwrap_or(true),
            tie_word_embeddings: fields.get("tie_word_embeddings")?.unwrap_or(false),
            initializer_range: fields
                .get("initializer_range")?
                .unwrap_or(default.initializer_range),
            special_tokens: SpecialTokens::from_fields(fields)?,
        })
    }

    fn head_dim(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }

    /// Dimensions of a head that have rotary positions.
    fn rotary_width(&self) -> i64 {
        (self.head_dim() as f64 * self.rotary_pct) as i64
    }
}

impl Architecture for GptNeoxConfig {
    fn names(&self) -> Names {
        Names {
            trunk: "gpt_neox.",
            head: "embed_out.weight",
            ..Names::usual("gpt_neox", "GPTNeoX")
        }
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers: self.num_hidden_layers,
            max_length: self.rope.max_length(self.max_position_embeddings),
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
            ("max_position_embeddings", self.max_position_embeddings),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        if self.hidden_size % self.num_attention_heads != 0 {
            let (heads, reason) = (self.num_attention_heads, "it must divide hidden_size");
            return Err(CoreError::config("num_attention_heads", heads, reason));
        }
        let width = self.rotary_width();
        if !(0.0..=1.0).contains(&self.rotary_pct) || width < 2 || width % 2 != 0 {
            let reason = "rotary positions turn pairs of a head's dimensions";
            return Err(CoreError::config("rotary_pct", self.rotary_pct, reason));
        }
        self.rope.validate(width)
    }

    fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        self.rope.write(&mut map);
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
            ("hidden_act", json!(self.hidden_act)),
            ("layer_norm_eps", json!(self.layer_norm_eps)),
            ("rotary_pct", json!(self.rotary_pct)),
            ("rotary_emb_base", json!(self.rope.theta)),
            ("use_parallel_residual", json!(self.use_parallel_residual)),
            ("attention_bias", json!(self.attention_bias)),
            ("attention_dropout", json!(0.0)),
            ("hidden_dropout", json!(0.0)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("initializer_range", json!(self.initializer_range)),
        ] {
            map.insert(field.into(), value);
        }
        self.special_tokens.write(&mut map);
        map
    }

    fn plan(&self) -> Plan {
        GPT_NEOX_PLAN
    }

    fn widths(&self) -> Widths {
        Widths {
            heads: ("num_attention_heads", self.num_attention_heads),
            kv_heads: ("num_attention_heads", self.num_attention_heads),
            head_dim: self.head_dim(),
            inner: ("intermediate_size", self.intermediate_size),
        }
    }

    fn build(&self, builder: &mut Builder) -> Result<Trunk, Error> {
        let size = (self.vocab_size, self.hidden_size);
        let embedding = "gpt_neox.embed_in.weight";
        let embedding = Embedding::build(builder, embedding, size, self.initializer_range);
        let blocks = builder
            .layers(self.num_hidden_layers)
            .map(|layer| Box::new(GptNeoxBlock::build(self, layer, builder)) as Box<dyn Block>)
            .collect();
        let (name, width) = ("gpt_neox.final_layer_norm", self.hidden_size);
        let norm = LayerNorm::build(builder, name, width, self.layer_norm_eps);
        Ok(Trunk {
            embedding,
            rope: Rope::new(&self.rope, self.rotary_width(), builder.device())?,
            blocks,
            final_norm: Norm::Layer(norm),
            stage: builder.stage(),
            place: builder.place(),
        })
    }
}

struct GptNeoxBlock {
    attention_norm: LayerNorm,
    qkv: Linear,
    attention_output: Linear,
    mlp_norm: LayerNorm,
    mlp_input: Linear,
    mlp_output: Linear,
    activation: Activation,
    heads: i64,
    head_dim: i64,
    parallel: bool,
    spec: AttentionSpec,
}

impl GptNeoxBlock {
    fn build(config: &GptNeoxConfig, layer: i64, builder: &mut Builder) -> Self {
        let name = |part: &str| format!("gpt_neox.layers.{layer}.{part}");
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let init = Init::Normal(config.initializer_range);
        let mut linear = |part: &str, size, bias| {
            Linear::build(builder, &name(part), size, Layout::OutIn, bias, init)
        };
        let bias = config.attention_bias;
        let qkv = linear("attention.query_key_value", (width, 3 * width), bias);
        let attention_output = linear("attention.dense", (width, width), bias);
        let mlp_input = linear("mlp.dense_h_to_4h", (width, inner), true);
        let mlp_output = linear("mlp.dense_4h_to_h", (inner, width), true);
        let epsilon = config.layer_norm_eps;
        let mut norm = |part: &str| LayerNorm::build(builder, &name(part), width, epsilon);
        Self {
            attention_norm: norm("input_layernorm"),
            qkv,
            attention_output,
            mlp_norm: norm("post_attention_layernorm"),
            mlp_input,
            mlp_output,
            activation: config.hidden_act,
            heads: builder.local_heads(config.num_attention_heads),
            head_dim: config.head_dim(),
            parallel: config.use_parallel_residual,
            spec: AttentionSpec::plain(config.head_dim()),
        }
    }

    fn attended(
        &self,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.attention_norm.forward(x)?)?;
        // Query, key and value of a head lie together.
        let qkv = qkv.f_view([-1, self.heads, 3, self.head_dim])?;
        let qkv = Qkv::from_parts(qkv.f_unbind(2)?)?;
        let qkv = Qkv {
            query: rotation.apply(&qkv.query)?,
            key: rotation.apply(&qkv.key)?,
            ..qkv
        };
        let attended = attention.attend(layer, &qkv, &self.spec)?;
        self.attention_output.forward(&attended)
    }

    fn fed(&self, x: &Tensor) -> Result<Tensor> {
        let inner = self.mlp_input.forward(&self.mlp_norm.forward(x)?)?;
        self.mlp_output.forward(&self.activation.forward(&inner)?)
    }
}

impl Block for GptNeoxBlock {
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
        rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let attended = self.attended(layer, x, rotation, attention)?;
        let x = attention.attended_rows(layer, x)?;
        if self.parallel {
            return Ok(self.fed(&x)?.f_add(&attended)?.f_add(&x)?);
        }
        let x = x.f_add(&attended)?;
        Ok(self.fed(&x)?.f_add(&x)?)
    }
}
