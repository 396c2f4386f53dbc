//! The block that Llama, Mistral and Qwen are made of.

use rlhf_core::Result;
use tch::Tensor;

use crate::TransformerConfig;
use crate::attention::Attention;
use crate::gated_mlp::GatedMlp;
use crate::layers::RmsNorm;
use crate::rope::{Rope, Rotation};
use crate::self_attention::{AttentionOptions, SelfAttention};
use crate::trunk::{Block, Embedding, Norm, Trunk};
use crate::weights::Builder;

/// Attention and feed-forward layer, each after a norm of its own and added to what came in.
pub(crate) struct PreNormBlock {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

/// A trunk of such blocks; `options` are those of each layer's attention.
pub(crate) fn pre_norm_trunk(
    config: &TransformerConfig,
    options: impl Fn(i64) -> AttentionOptions,
    mlp_bias: bool,
    builder: &mut Builder,
) -> crate::Result<Trunk> {
    let embedding = Embedding::build(
        builder,
        "model.embed_tokens.weight",
        (config.vocab_size, config.hidden_size),
        config.initializer_range,
    );
    let blocks = builder
        .layers(config.num_hidden_layers)
        .map(|layer| {
            let name = format!("model.layers.{layer}");
            let block = PreNormBlock::build(config, options(layer), mlp_bias, &name, builder);
            Box::new(block) as Box<dyn Block>
        })
        .collect();
    let norm = RmsNorm::build(
        builder,
        "model.norm",
        config.hidden_size,
        config.rms_norm_eps,
    );
    Ok(Trunk {
        embedding,
        rope: Rope::new(&config.rope, config.head_dim, builder.device())?,
        blocks,
        final_norm: Norm::Rms(norm),
        stage: builder.stage(),
        place: builder.place(),
    })
}

impl PreNormBlock {
    fn build(
        config: &TransformerConfig,
        options: AttentionOptions,
        mlp_bias: bool,
        name: &str,
        builder: &mut Builder,
    ) -> Self {
        let (width, epsilon) = (config.hidden_size, config.rms_norm_eps);
        let part = |part: &str| format!("{name}.{part}");
        Self {
            attention_norm: RmsNorm::build(builder, &part("input_layernorm"), width, epsilon),
            attention: SelfAttention::build(config, options, &part("self_attn"), builder),
            mlp_norm: RmsNorm::build(builder, &part("post_attention_layernorm"), width, epsilon),
            mlp: GatedMlp::build(config, mlp_bias, &part("mlp"), builder),
        }
    }
}

impl Block for PreNormBlock {
    fn share(&self) -> Box<dyn Block> {
        Box::new(Self {
            attention_norm: self.attention_norm.share(),
            attention: self.attention.share(),
            mlp_norm: self.mlp_norm.share(),
            mlp: self.mlp.share(),
        })
    }

    fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let normed = self.attention_norm.forward(x)?;
        let attended = self
            .attention
            .forward(layer, &normed, rotation, attention)?;
        let rows = attention.attended_rows(layer, x)?;
        let (x, normed) = self.mlp_norm.add_forward(&rows, &attended)?;
        let fed = self.mlp.forward(&normed)?;
        Ok(x.f_add(&fed)?)
    }
}
