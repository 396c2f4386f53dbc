//! Layers that several architectures are made of.

use std::sync::Arc;

use rlhf_core::Collective;
use rlhf_core::Result;
use rlhf_scale::{enter_parallel, kernels, leave_parallel, recorded};
use tch::{Kind, Tensor};

use crate::lora::Adapter;
use crate::tensor_parallel::{Part, Shard};
use crate::weights::{Builder, Init};

/// An affine map of the last dimension, with a LoRA adapter where the builder has one for it.
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    layout: Layout,
    adapter: Option<Adapter>,
    /// Where other ranks have parts of the layer too.
    shard: Option<Shard>,
}

/// Which way a checkpoint stores a matrix. Weights keep the checkpoint's layout, so that a
/// parameter is the same tensor in memory and on disk; on CPU both multiply equally fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[out, in]`, as PyTorch's `Linear`.
    OutIn,
    /// `[in, out]`, as the `Conv1D` of GPT-2.
    InOut,
}

impl Linear {
    /// Takes `<name>.weight`, and `<name>.bias` where there is one.
    pub(crate) fn build(
        builder: &mut Builder,
        name: &str,
        (inputs, outputs): (i64, i64),
        layout: Layout,
        bias: bool,
        init: Init,
    ) -> Self {
        let shape = match layout {
            Layout::OutIn => [outputs, inputs],
            Layout::InOut => [inputs, outputs],
        };
        Self {
            weight: builder.matrix(&format!("{name}.weight"), &shape, init, layout),
            bias: bias.then(|| builder.weight(&format!("{name}.bias"), &[outputs], Init::Zeros)),
            layout,
            adapter: builder.adapter(name, (inputs, outputs), layout),
            shard: builder.shard(name, inputs),
        }
    }

    /// The same layer under another handle.
    pub(crate) fn share(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            layout: self.layout,
            adapter: self.adapter.as_ref().map(Adapter::share),
            shard: self.shard.clone(),
        }
    }

    /// `[N, in]` to `[N, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.shard {
            None => self.forward_here(x),
            Some(shard) if shard.has_some_inputs() => self.forward_summed(x, shard),
            Some(shard) => self.forward_part(&enter(x, shard)?, shard),
        }
    }

    /// A layer that is not split, or a part of one that has all inputs.
    fn forward_here(&self, x: &Tensor) -> Result<Tensor> {
        let output = match (self.layout, &self.bias) {
            (Layout::OutIn, bias) => linear(x, &self.weight, bias.as_ref())?,
            (Layout::InOut, bias) => linear_in_out(x, &self.weight, bias.as_ref())?,
        };
        match &self.adapter {
            Some(adapter) => adapter.add_to(output, x),
            None => Ok(output),
        }
    }
}

/// The layer on several ranks.
impl Linear {
    /// Some of the outputs, of an input that has entered.
    fn forward_part(&self, x: &Tensor, shard: &Shard) -> Result<Tensor> {
        let Part::SomeOf { first, count } = shard.part else {
            return self.forward_here(x);
        };
        let rows = |all: &Tensor| -> Result<Tensor> {
            let all = enter_parallel(all, &shard.group).map_err(rlhf_core::Error::from)?;
            Ok(all.f_narrow(0, first, count)?)
        };
        let bias = self.bias.as_ref().map(rows).transpose()?;
        let output = linear(x, &rows(&self.weight)?, bias.as_ref())?;
        match &self.adapter {
            Some(adapter) => adapter.add_to(output, x),
            None => Ok(output),
        }
    }

    /// The sum over ranks of what each has of the inputs. The bias comes once, after it.
    fn forward_summed(&self, x: &Tensor, shard: &Shard) -> Result<Tensor> {
        let output = match self.layout {
            Layout::OutIn => linear(x, &self.weight, None)?,
            Layout::InOut => linear_in_out(x, &self.weight, None)?,
        };
        let output = match &self.adapter {
            Some(adapter) => adapter.add_to(output, x)?,
            None => output,
        };
        let sum = leave_parallel(output, &shard.group).map_err(rlhf_core::Error::from)?;
        match &self.bias {
            Some(bias) => Ok(sum.f_add(bias)?),
            None => Ok(sum),
        }
    }
}

fn enter(x: &Tensor, shard: &Shard) -> Result<Tensor> {
    enter_parallel(x, &shard.group).map_err(rlhf_core::Error::from)
}

/// Several layers of the same input.
pub(crate) fn forward_all<const N: usize>(layers: [&Linear; N], x: &Tensor) -> Result<[Tensor; N]> {
    // They are split together or not at all; their input enters once.
    if let Some(shard) = layers.iter().find_map(|layer| layer.shard.as_ref()) {
        let x = enter(x, shard)?;
        let mut outputs = layers.map(|_| Tensor::new());
        for (output, layer) in outputs.iter_mut().zip(layers) {
            *output = match &layer.shard {
                Some(shard) => layer.forward_part(&x, shard)?,
                None => layer.forward_here(&x)?,
            };
        }
        return Ok(outputs);
    }
    let plain = |l: &&Linear| l.layout == Layout::OutIn && l.adapter.is_none();
    if layers.iter().all(plain) {
        let maps = layers.map(|l| (&l.weight, l.bias.as_ref()));
        if let Some(outputs) = kernels::linears(x, maps).map_err(rlhf_core::Error::from)? {
            return Ok(outputs);
        }
    }
    let mut outputs = layers.map(|_| Tensor::new());
    for (output, layer) in outputs.iter_mut().zip(layers) {
        *output = layer.forward(x)?;
    }
    Ok(outputs)
}

/// [`Tensor::f_linear`], by kernels of our own where they apply.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match kernels::linear(x, weight, bias).map_err(rlhf_core::Error::from)? {
        Some(y) => Ok(y),
        None => Ok(x.f_linear(weight, bias)?),
    }
}

/// `x weight + bias`.
fn linear_in_out(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let own = kernels::linear_in_out(x, weight, bias).map_err(rlhf_core::Error::from)?;
    Ok(match (own, bias) {
        (Some(y), _) => y,
        (None, Some(bias)) => bias.f_addmm(x, weight)?,
        (None, None) => x.f_matmul(weight)?,
    })
}

/// Normalisation to mean 0 and variance 1, then an affine map.
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl LayerNorm {
    pub(crate) fn build(builder: &mut Builder, name: &str, size: i64, epsilon: f64) -> Self {
        Self {
            weight: builder.weight(&format!("{name}.weight"), &[size], Init::Ones),
            bias: builder.weight(&format!("{name}.bias"), &[size], Init::Zeros),
            epsilon,
        }
    }

    /// The same layer under another handle.
    pub(crate) fn share(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.shallow_clone(),
            epsilon: self.epsilon,
        }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let size = self.weight.size();
        Ok(x.f_layer_norm(
            size.as_slice(),
            Some(&self.weight),
            Some(&self.bias),
            self.epsilon,
            true,
        )?)
    }
}

/// Normalisation to a mean square of 1, then a scale per dimension (Zhang and Sennrich 2019).
pub(crate) struct RmsNorm {
    weight: Tensor,
    epsilon: f64,
    scale: RmsScale,
    /// The ranks, where each norms other rows with the same weight.
    ranks: Option<Arc<dyn Collective>>,
}

/// What a dimension is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RmsScale {
    /// The weight.
    Weight,
    /// One more than the weight, as in Gemma.
    OneMore,
}

impl RmsNorm {
    pub(crate) fn build(builder: &mut Builder, name: &str, size: i64, epsilon: f64) -> Self {
        Self {
            weight: builder.weight(&format!("{name}.weight"), &[size], Init::Ones),
            epsilon,
            scale: RmsScale::Weight,
            ranks: builder.sharing(name),
        }
    }

    /// One whose weights are what the scales have more than one.
    pub(crate) fn around_one(builder: &mut Builder, name: &str, size: i64, epsilon: f64) -> Self {
        Self {
            weight: builder.weight(&format!("{name}.weight"), &[size], Init::Zeros),
            epsilon,
            scale: RmsScale::OneMore,
            ranks: builder.sharing(name),
        }
    }

    /// The same layer under another handle.
    pub(crate) fn share(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            ranks: self.ranks.clone(),
            ..*self
        }
    }

    /// The sum of both, and it normalised.
    pub(crate) fn add_forward(&self, x: &Tensor, added: &Tensor) -> Result<(Tensor, Tensor)> {
        let weight = self.entered_weight()?;
        if self.scale == RmsScale::Weight {
            let recorded = recorded::add_rms_norm(x, added, &weight, self.epsilon);
            if let Some(both) = recorded.map_err(rlhf_core::Error::from)? {
                return Ok(both);
            }
        }
        let sum = x.f_add(added)?;
        let normed = self.forward_by(&weight, &sum)?;
        Ok((sum, normed))
    }

    /// The mean square is taken in f32 whatever the model's kind, as transformers does.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_by(&self.entered_weight()?, x)
    }

    /// The weight, whose gradient is the sum of those of all ranks.
    fn entered_weight(&self) -> Result<Tensor> {
        match &self.ranks {
            None => Ok(self.weight.shallow_clone()),
            Some(ranks) => Ok(enter_parallel(&self.weight, ranks).map_err(rlhf_core::Error::from)?),
        }
    }

    fn forward_by(&self, weight: &Tensor, x: &Tensor) -> Result<Tensor> {
        if self.scale == RmsScale::Weight {
            let recorded = recorded::rms_norm(x, weight, self.epsilon);
            if let Some(y) = recorded.map_err(rlhf_core::Error::from)? {
                return Ok(y);
            }
        }
        let wide = x.f_to_kind(Kind::Float)?;
        let mean = wide
            .f_square()?
            .f_mean_dim([-1i64].as_slice(), true, Kind::Float)?;
        let scale = mean.f_add_scalar(self.epsilon)?.f_rsqrt()?;
        let normed = wide.f_mul(&scale)?;
        Ok(match self.scale {
            RmsScale::Weight => normed.f_to_kind(x.kind())?.f_mul(weight)?,
            // Gemma rounds after the product.
            RmsScale::OneMore => {
                let scales = weight.f_to_kind(Kind::Float)?.f_add_scalar(1.0)?;
                normed.f_mul(&scales)?.f_to_kind(x.kind())?
            }
        })
    }
}

/// The non-linearity of a feed-forward layer, by the name that `config.json` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Activation {
    /// GELU in its tanh approximation, by the name that GPT-2 has for it.
    #[serde(rename = "gelu_new")]
    GeluNew,
    /// The same, by the name that Gemma has for it. transformers has a kernel for each, and they
    /// differ in the last bits.
    #[serde(rename = "gelu_pytorch_tanh")]
    GeluTanh,
    /// GELU with the error function.
    #[serde(rename = "gelu")]
    Gelu,
    /// max(x, 0).
    #[serde(rename = "relu")]
    Relu,
    /// x · sigmoid(x).
    #[serde(rename = "silu", alias = "swish")]
    Silu,
}

impl Activation {
    pub(crate) fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::GeluNew | Self::GeluTanh => x.f_gelu("tanh")?,
            Self::Gelu => x.f_gelu("none")?,
            Self::Relu => x.f_relu()?,
            Self::Silu => x.f_silu()?,
        })
    }
}
