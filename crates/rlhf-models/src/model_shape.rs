//! Every architecture in the numbers that decide what its training keeps in memory.

use crate::{Activation, Gemma2Config, Gpt2Config, GptNeoxConfig, ModelConfig, TransformerConfig};

/// A model whose blocks are alike. Sizes count elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ModelShape {
    pub(crate) vocab: u64,
    pub(crate) hidden: u64,
    pub(crate) layers: u64,
    /// Whether the output layer is the embedding.
    pub(crate) tied: bool,
    /// Whether its logits are capped.
    pub(crate) logit_cap: bool,
    /// Weights of tokens' and positions' embeddings.
    pub(crate) embeddings: u64,
    pub(crate) block_parameters: u64,
    pub(crate) intermediate: u64,
    /// Whether the feed-forward layer has a gate.
    pub(crate) gated: bool,
    /// Whether that is SiLU's, for which there is a kernel.
    pub(crate) silu: bool,
    /// Whether attention and feed-forward layer read the same input.
    pub(crate) parallel: bool,
    /// Width of the queries, and of the keys.
    pub(crate) query: u64,
    pub(crate) key: u64,
    pub(crate) heads: u64,
    pub(crate) projection: Projection,
    /// Whether attention scores are capped, which no fused kernel does.
    pub(crate) score_cap: bool,
    /// Dimensions of a head that positions turn.
    pub(crate) rotary: u64,
    pub(crate) norm: Norm,
    /// Whether the sublayers' outputs have norms, too.
    pub(crate) after_norms: bool,
    /// Whether each head's query and key have.
    pub(crate) head_norms: bool,
    /// Whether it is trained on a CPU, where kernels of our own keep less.
    pub(crate) on_cpu: bool,
}

/// How queries, keys and values are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Projection {
    /// By one matrix; attention reads parts of its product.
    Fused,
    /// By one matrix; queries and keys are turned, which makes new ones, while the values keep the
    /// product.
    FusedThenRotated,
    /// By three matrices.
    Separate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Norm {
    Layer,
    Rms,
    /// RMS norm whose scale is one more than the weight.
    RmsAroundOne,
}

impl ModelShape {
    pub(crate) fn of(config: &ModelConfig) -> Self {
        match config {
            ModelConfig::Gpt2(config) => gpt2(config),
            ModelConfig::GptNeox(config) => gpt_neox(config),
            ModelConfig::Llama(config) => {
                let bias = config.attention_bias;
                pre_norm(&config.transformer, (bias, bias), config.mlp_bias)
            }
            ModelConfig::Mistral(config) => pre_norm(&config.transformer, (false, false), false),
            ModelConfig::Qwen2(config) => pre_norm(&config.transformer, (true, false), false),
            ModelConfig::Qwen3(config) => {
                let bias = config.attention_bias;
                let shape = pre_norm(&config.transformer, (bias, bias), false);
                Self {
                    block_parameters: shape.block_parameters
                        + 2 * config.transformer.head_dim as u64,
                    head_norms: true,
                    ..shape
                }
            }
            ModelConfig::Gemma2(config) => gemma2(config),
        }
    }

    /// All weights, each once.
    pub(crate) fn parameters(&self) -> u64 {
        let head = if self.tied {
            0
        } else {
            self.vocab * self.hidden
        };
        self.trunk_parameters() + head
    }

    /// Those of a model without an output layer.
    pub(crate) fn trunk_parameters(&self) -> u64 {
        let last_norm = match self.norm {
            Norm::Layer => 2 * self.hidden,
            Norm::Rms | Norm::RmsAroundOne => self.hidden,
        };
        self.embeddings + self.layers * self.block_parameters + last_norm
    }
}

/// `count` of what is there, and none of what is not.
pub(crate) fn when(present: bool, count: u64) -> u64 {
    if present { count } else { 0 }
}

fn gpt2(config: &Gpt2Config) -> ModelShape {
    let [vocab, hidden, layers, heads, positions] = [
        config.vocab_size,
        config.n_embd,
        config.n_layer,
        config.n_head,
        config.n_positions,
    ]
    .map(|n| n as u64);
    let intermediate = config.n_inner.map_or(4 * hidden, |n| n as u64);
    ModelShape {
        vocab,
        hidden,
        layers,
        tied: config.tie_word_embeddings,
        logit_cap: false,
        embeddings: (vocab + positions) * hidden,
        block_parameters: 4 * hidden * hidden
            + 2 * hidden * intermediate
            + (4 + 1 + 4) * hidden
            + intermediate,
        intermediate,
        gated: false,
        silu: false,
        parallel: false,
        query: hidden,
        key: hidden,
        heads,
        projection: Projection::Fused,
        score_cap: false,
        rotary: 0,
        norm: Norm::Layer,
        after_norms: false,
        head_norms: false,
        on_cpu: true,
    }
}

fn gpt_neox(config: &GptNeoxConfig) -> ModelShape {
    let [vocab, hidden, layers, heads, intermediate] = [
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
    ]
    .map(|n| n as u64);
    ModelShape {
        vocab,
        hidden,
        layers,
        tied: config.tie_word_embeddings,
        logit_cap: false,
        embeddings: vocab * hidden,
        block_parameters: 4 * hidden * hidden
            + 2 * hidden * intermediate
            + when(config.attention_bias, 4 * hidden)
            + (1 + 4) * hidden
            + intermediate,
        intermediate,
        gated: false,
        silu: false,
        parallel: config.use_parallel_residual,
        query: hidden,
        key: hidden,
        heads,
        projection: Projection::FusedThenRotated,
        score_cap: false,
        rotary: ((hidden / heads) as f64 * config.rotary_pct) as u64,
        norm: Norm::Layer,
        after_norms: false,
        head_norms: false,
        on_cpu: true,
    }
}

/// Llama and its relatives; biases of query, key and value, and of the output projection.
fn pre_norm(
    config: &TransformerConfig,
    (qkv_bias, output_bias): (bool, bool),
    mlp_bias: bool,
) -> ModelShape {
    let [
        vocab,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate,
    ] = [
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
    ]
    .map(|n| n as u64);
    let (query, key) = (heads * head_dim, kv_heads * head_dim);
    ModelShape {
        vocab,
        hidden,
        layers,
        tied: config.tie_word_embeddings,
        logit_cap: false,
        embeddings: vocab * hidden,
        block_parameters: 2 * hidden * (query + key)
            + 3 * hidden * intermediate
            + 2 * hidden
            + when(qkv_bias, query + 2 * key)
            + when(output_bias, hidden)
            + when(mlp_bias, 2 * intermediate + hidden),
        intermediate,
        gated: true,
        silu: config.hidden_act == Activation::Silu,
        parallel: false,
        query,
        key,
        heads,
        projection: Projection::Separate,
        score_cap: false,
        rotary: head_dim,
        norm: Norm::Rms,
        after_norms: false,
        head_norms: false,
        on_cpu: true,
    }
}

fn gemma2(config: &Gemma2Config) -> ModelShape {
    let bias = config.attention_bias;
    let shape = pre_norm(&config.transformer, (bias, bias), false);
    ModelShape {
        block_parameters: shape.block_parameters + 2 * shape.hidden,
        norm: Norm::RmsAroundOne,
        after_norms: true,
        score_cap: config.attn_logit_softcapping.is_some(),
        logit_cap: config.final_logit_softcapping.is_some(),
        ..shape
    }
}
