//! Llama: rotary positions, RMS norm, gated feed-forward, grouped queries (Touvron et al. 2023,
//! arXiv 2307.09288; Llama 3, arXiv 2407.21783).

use rlhf_core::Result;
use rlhf_scale::GradientCheckpointing;
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use crate::attention::{Attention, Qkv, SegmentAttention};
use crate::attention_spec::AttentionSpec;
use crate::config::{Fields, check_sizes};
use crate::layers::{Activation, Layout, Linear, RmsNorm};
use crate::rope::{Rope, RopeConfig, RopeScaling, Rotation};
use crate::weights::{Builder, Init};
use crate::{Error, SpecialTokens};

/// Sizes of a Llama. Field names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
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
    /// Whether the attention's projections have biases.
    pub attention_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
    /// Whether the output layer is the input embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Ids with a meaning of their own.
    pub special_tokens: SpecialTokens,
}

impl Default for LlamaConfig {
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
            attention_bias: false,
            mlp_bias: false,
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

impl LlamaConfig {
    pub(crate) fn from_fields(fields: &Fields) -> Result<Self, Error> {
        let default = Self::default();
        let hidden_size: i64 = fields.need("hidden_size")?;
        let heads: i64 = fields.need("num_attention_heads")?;
        let config = Self {
            vocab_size: fields.need("vocab_size")?,
            max_position_embeddings: fields.need("max_position_embeddings")?,
            hidden_size,
            intermediate_size: fields.need("intermediate_size")?,
            num_hidden_layers: fields.need("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: fields.get("num_key_value_heads")?.unwrap_or(heads),
            head_dim: fields
                .get("head_dim")?
                .unwrap_or(hidden_size / heads.max(1)),
            hidden_act: fields.get("hidden_act")?.unwrap_or(default.hidden_act),
            rms_norm_eps: fields.get("rms_norm_eps")?.unwrap_or(default.rms_norm_eps),
            rope: RopeConfig::from_fields(fields)?,
            attention_bias: fields.get("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.get("mlp_bias")?.unwrap_or(false),
            tie_word_embeddings: fields.get("tie_word_embeddings")?.unwrap_or(false),
            initializer_range: fields
                .get("initializer_range")?
                .unwrap_or(default.initializer_range),
            special_tokens: SpecialTokens::from_fields(fields)?,
        };
        config.validate().map_err(|error| fields.because(error))?;
        Ok(config)
    }

    /// Fails for sizes that make no model.
    ///
    /// # Errors
    /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig), naming the field.
    pub fn validate(&self) -> Result<()> {
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
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            let (heads, reason) = (
                self.num_key_value_heads,
                "it must divide num_attention_heads",
            );
            return Err(rlhf_core::Error::config(
                "num_key_value_heads",
                heads,
                reason,
            ));
        }
        if self.head_dim % 2 != 0 {
            let reason = "rotary positions turn pairs of dimensions";
            return Err(rlhf_core::Error::config("head_dim", self.head_dim, reason));
        }
        Ok(())
    }

    pub(crate) fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        for (field, value) in [
            ("model_type", json!("llama")),
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
            ("hidden_act", json!(self.hidden_act)),
            ("rms_norm_eps", json!(self.rms_norm_eps)),
            ("attention_bias", json!(self.attention_bias)),
            ("attention_dropout", json!(0.0)),
            ("mlp_bias", json!(self.mlp_bias)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("initializer_range", json!(self.initializer_range)),
        ] {
            map.insert(field.into(), value);
        }
        self.rope.write(&mut map);
        self.special_tokens.write(&mut map);
        map
    }
}

/// Embedding and blocks.
pub(crate) struct Llama {
    token_embedding: Tensor,
    blocks: Vec<Block>,
    final_norm: RmsNorm,
    rope: Rope,
}

struct Block {
    attention_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
    head_dim: i64,
}

impl Llama {
    pub(crate) fn build(config: &LlamaConfig, builder: &mut Builder, device: Device) -> Self {
        let shape = [config.vocab_size, config.hidden_size];
        let normal = Init::Normal(config.initializer_range);
        let token_embedding = builder.weight("model.embed_tokens.weight", &shape, normal);
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| Block::build(config, layer, builder))
            .collect();
        let (width, epsilon) = (config.hidden_size, config.rms_norm_eps);
        Self {
            token_embedding,
            blocks,
            final_norm: RmsNorm::build(builder, "model.norm", width, epsilon),
            rope: Rope::new(&config.rope, config.head_dim, device),
        }
    }

    pub(crate) fn token_embedding(&self) -> &Tensor {
        &self.token_embedding
    }

    /// `[N]` ids and positions to `[N, H]` hidden states.
    pub(crate) fn forward(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let (mut x, rotation) = self.embed(ids, positions)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(layer, &x, &rotation, attention)?;
        }
        self.final_norm.forward(&x)
    }

    /// [`forward`](Self::forward), keeping the activations that `checkpointing` says.
    pub(crate) fn forward_checkpointed(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &SegmentAttention,
        checkpointing: GradientCheckpointing,
    ) -> Result<Tensor> {
        let (x, rotation) = self.embed(ids, positions)?;
        let blocks = self.blocks.iter().enumerate().map(|(layer, block)| {
            let (block, rotation, attention) = (block.share(), rotation.share(), attention.clone());
            move |x: &Tensor| block.forward(layer, x, &rotation, &mut attention.clone())
        });
        self.final_norm
            .forward(&checkpointing.run(blocks.collect(), &x)?)
    }

    fn embed(&self, ids: &Tensor, positions: &Tensor) -> Result<(Tensor, Rotation)> {
        let x = Tensor::f_embedding(&self.token_embedding, ids, -1, false, false)?;
        let rotation = self.rope.rotation(positions, x.kind())?;
        Ok((x, rotation))
    }
}

impl Block {
    fn build(config: &LlamaConfig, layer: i64, builder: &mut Builder) -> Self {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let normal = Init::Normal(config.initializer_range);
        let mut linear = |part: &str, size, bias| {
            Linear::build(builder, &name(part), size, Layout::OutIn, bias, normal)
        };
        let bias = config.attention_bias;
        let query = linear("self_attn.q_proj", (width, queries), bias);
        let key = linear("self_attn.k_proj", (width, keys), bias);
        let value = linear("self_attn.v_proj", (width, keys), bias);
        let attention_output = linear("self_attn.o_proj", (queries, width), bias);
        let gate = linear("mlp.gate_proj", (width, inner), config.mlp_bias);
        let up = linear("mlp.up_proj", (width, inner), config.mlp_bias);
        let down = linear("mlp.down_proj", (inner, width), config.mlp_bias);
        let mut norm =
            |part: &str| RmsNorm::build(builder, &name(part), width, config.rms_norm_eps);
        Self {
            attention_norm: norm("input_layernorm"),
            query,
            key,
            value,
            attention_output,
            mlp_norm: norm("post_attention_layernorm"),
            gate,
            up,
            down,
            activation: config.hidden_act,
            head_dim: config.head_dim,
        }
    }

    /// The same weights under other handles.
    fn share(&self) -> Self {
        Self {
            attention_norm: self.attention_norm.share(),
            query: self.query.share(),
            key: self.key.share(),
            value: self.value.share(),
            attention_output: self.attention_output.share(),
            mlp_norm: self.mlp_norm.share(),
            gate: self.gate.share(),
            up: self.up.share(),
            down: self.down.share(),
            ..*self
        }
    }

    fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let normed = self.attention_norm.forward(x)?;
        let heads = |linear: &Linear| -> Result<Tensor> {
            Ok(linear
                .forward(&normed)?
                .f_view([normed.size()[0], -1, self.head_dim])?)
        };
        let qkv = Qkv {
            query: rotation.apply(&heads(&self.query)?)?,
            key: rotation.apply(&heads(&self.key)?)?,
            value: heads(&self.value)?,
        };
        let attended = attention.attend(layer, &qkv, &AttentionSpec::plain(self.head_dim))?;
        let x = x.f_add(&self.attention_output.forward(&attended)?)?;
        let normed = self.mlp_norm.forward(&x)?;
        let gate = self.activation.forward(&self.gate.forward(&normed)?)?;
        let inner = gate.f_mul(&self.up.forward(&normed)?)?;
        Ok(x.f_add(&self.down.forward(&inner)?)?)
    }
}
