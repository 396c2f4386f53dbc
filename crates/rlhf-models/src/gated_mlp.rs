//! The feed-forward layer of Llama and its relatives.

use rlhf_core::Result;
use rlhf_scale::recorded;
use tch::Tensor;

use crate::TransformerConfig;
use crate::layers::{Activation, Layout, Linear, forward_all};
use crate::weights::{Builder, Init};

/// `down(activation(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202).
pub(crate) struct GatedMlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl GatedMlp {
    /// Takes `<name>.gate_proj`, `up_proj` and `down_proj`.
    pub(crate) fn build(
        config: &TransformerConfig,
        bias: bool,
        name: &str,
        builder: &mut Builder,
    ) -> Self {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let init = Init::Normal(config.initializer_range);
        let mut linear = |part: &str, size| {
            let name = format!("{name}.{part}");
            Linear::build(builder, &name, size, Layout::OutIn, bias, init)
        };
        Self {
            gate: linear("gate_proj", (width, inner)),
            up: linear("up_proj", (width, inner)),
            down: linear("down_proj", (inner, width)),
            activation: config.hidden_act,
        }
    }

    /// The same weights under other handles.
    pub(crate) fn share(&self) -> Self {
        Self {
            gate: self.gate.share(),
            up: self.up.share(),
            down: self.down.share(),
            activation: self.activation,
        }
    }

    /// `[N, H]` to `[N, H]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up] = forward_all([&self.gate, &self.up], x)?;
        let fused = match self.activation {
            Activation::Silu => recorded::silu_gated(&gate, &up).map_err(rlhf_core::Error::from)?,
            _ => None,
        };
        let product = match fused {
            Some(product) => product,
            None => self.activation.forward(&gate)?.f_mul(&up)?,
        };
        self.down.forward(&product)
    }
}
