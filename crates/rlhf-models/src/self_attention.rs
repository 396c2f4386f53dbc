//! The attention of Llama and its relatives, with its projections.

use rlhf_core::Result;
use tch::Tensor;

use crate::TransformerConfig;
use crate::attention::{Attention, Qkv};
use crate::attention_spec::AttentionSpec;
use crate::layers::{Layout, Linear, RmsNorm, forward_all};
use crate::rope::Rotation;
use crate::weights::{Builder, Init};

/// Grouped queries with rotary positions (Ainslie et al. 2023, arXiv 2305.13245).
pub(crate) struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Norms of each head's query and key.
    norms: Option<(RmsNorm, RmsNorm)>,
    head_dim: i64,
    spec: AttentionSpec,
}

/// What the attention of one architecture has and that of another has not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionOptions {
    pub(crate) spec: AttentionSpec,
    /// Biases of query, key and value.
    pub(crate) qkv_bias: bool,
    /// Bias of the output projection.
    pub(crate) output_bias: bool,
    /// Norms of each head's query and key.
    pub(crate) head_norms: bool,
}

impl AttentionOptions {
    /// No biases, no norms.
    pub(crate) fn plain(spec: AttentionSpec) -> Self {
        Self {
            spec,
            qkv_bias: false,
            output_bias: false,
            head_norms: false,
        }
    }
}

impl SelfAttention {
    /// Takes `<name>.q_proj`, `k_proj`, `v_proj`, `o_proj`, `q_norm` and `k_norm`.
    pub(crate) fn build(
        config: &TransformerConfig,
        options: AttentionOptions,
        name: &str,
        builder: &mut Builder,
    ) -> Self {
        let (width, queries, keys) = (config.hidden_size, config.query_width(), config.key_width());
        let init = Init::Normal(config.initializer_range);
        let mut linear = |part: &str, size, bias| {
            let name = format!("{name}.{part}");
            Linear::build(builder, &name, size, Layout::OutIn, bias, init)
        };
        let query = linear("q_proj", (width, queries), options.qkv_bias);
        let key = linear("k_proj", (width, keys), options.qkv_bias);
        let value = linear("v_proj", (width, keys), options.qkv_bias);
        let output = linear("o_proj", (queries, width), options.output_bias);
        let mut norm = |part: &str| {
            let name = format!("{name}.{part}");
            RmsNorm::build(builder, &name, config.head_dim, config.rms_norm_eps)
        };
        let norms = options.head_norms.then(|| (norm("q_norm"), norm("k_norm")));
        Self {
            query,
            key,
            value,
            output,
            norms,
            head_dim: config.head_dim,
            spec: options.spec,
        }
    }

    /// The same weights under other handles.
    pub(crate) fn share(&self) -> Self {
        Self {
            query: self.query.share(),
            key: self.key.share(),
            value: self.value.share(),
            output: self.output.share(),
            norms: self.norms.as_ref().map(|(q, k)| (q.share(), k.share())),
            ..*self
        }
    }

    /// `[N, H]` to `[N, H]`.
    pub(crate) fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let heads = |t: &Tensor| t.f_view([x.size()[0], -1, self.head_dim]);
        let [query, key, value] = forward_all([&self.query, &self.key, &self.value], x)?;
        let (mut query, mut key) = (heads(&query)?, heads(&key)?);
        if let Some((query_norm, key_norm)) = &self.norms {
            query = query_norm.forward(&query)?;
            key = key_norm.forward(&key)?;
        }
        let qkv = Qkv {
            query: rotation.apply(&query)?,
            key: rotation.apply(&key)?,
            value: heads(&value)?,
        };
        self.output
            .forward(&attention.attend(layer, &qkv, &self.spec)?)
    }
}
