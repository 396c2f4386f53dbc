//! From the gradients of scores to those of hidden states, weight and bias.

use tch::{Device, Kind, Tensor};

use super::blocks::{Block, Buffers};
use super::layer::{Operands, OutputLayer, own_columns};
use super::product::{Target, add_product, multiply};
use super::scores::Scores;
use crate::Result;
use crate::ffi::softmax::{self, LogitBlock, RowGrads};

/// What the gradients of logits are made of, `[M, 1]` f32 each.
pub(super) struct Coefficients<'a> {
    pub(super) maxima: &'a Tensor,
    pub(super) log_sums: &'a Tensor,
    /// The gradient of the log-probability, over the temperature.
    pub(super) own: &'a Tensor,
    /// That of the entropy, over the temperature, and the entropy.
    pub(super) entropy: Option<(&'a Tensor, &'a Tensor)>,
}

/// Gradients of scores as [`Coefficients`] need them.
pub(super) struct ScoreGrads {
    own: Tensor,
    entropy: Option<(Tensor, Tensor)>,
}

impl ScoreGrads {
    /// From gradients `[M]`.
    pub(super) fn new(
        layer: &OutputLayer,
        scores: &Scores,
        logprobs: Option<&Tensor>,
        entropy: Option<&Tensor>,
    ) -> Result<Self> {
        let column = |grad: &Tensor| -> Result<Tensor> {
            let grad = grad.f_div_scalar(layer.temperature)?;
            Ok(grad.f_unsqueeze(1)?.f_contiguous()?)
        };
        Ok(Self {
            own: match logprobs {
                Some(grad) => column(grad)?,
                None => scores.maxima.f_zeros_like()?,
            },
            entropy: match (entropy, &scores.entropy) {
                (Some(grad), Some(entropy)) => Some((column(grad)?, entropy.f_unsqueeze(1)?)),
                _ => None,
            },
        })
    }

    /// Divides all by the largest and returns that.
    pub(super) fn normalize(&mut self) -> Result<Tensor> {
        let mut largest = self.own.f_abs()?.f_max()?;
        if let Some((grad, _)) = &self.entropy {
            largest = largest.f_maximum(&grad.f_abs()?.f_max()?)?;
        }
        // All of them 0: so they stay.
        let largest = largest.f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
        let _ = self.own.f_div_(&largest)?;
        if let Some((grad, _)) = &mut self.entropy {
            let _ = grad.f_div_(&largest)?;
        }
        Ok(largest)
    }

    pub(super) fn coefficients<'a>(&'a self, scores: &'a Scores) -> Coefficients<'a> {
        Coefficients {
            maxima: &scores.maxima,
            log_sums: &scores.log_sums,
            own: &self.own,
            entropy: self.entropy.as_ref().map(|(grad, entropy)| (grad, entropy)),
        }
    }
}

/// The gradients of a block's products, of the weight's kind, in their place if they are free, else in one
/// of the buffers:
///
/// ```text
/// ∂ logprob / ∂ zⱼ = [j = id] - pⱼ        ∂ entropy / ∂ zⱼ = -pⱼ (log pⱼ + entropy)
/// ```
///
/// Without ids no token is the row's own.
pub(super) fn grad_logits(
    (layer, operands, ids): (&OutputLayer, Operands<'_>, Option<&Tensor>),
    (products, is_free): (&Tensor, bool),
    block: Block,
    coefficients: &Coefficients<'_>,
    buffers: &mut Buffers,
) -> Result<Tensor> {
    if layer.softcap.is_none() {
        let logits = LogitBlock {
            logits: products,
            ids,
            first: block.first,
            scale: 1.0 / layer.temperature,
        };
        let rows = RowGrads {
            maxima: coefficients.maxima,
            log_sums: coefficients.log_sums,
            own: coefficients.own,
            entropy: coefficients.entropy,
        };
        let out = match is_free {
            true => products.shallow_clone(),
            false => buffers.scratch(block, operands)?,
        };
        if softmax::grad(logits, &rows, &out)? {
            return Ok(out);
        }
    }
    let mut logits = buffers.widened((products, is_free), block, operands)?;
    layer.finish_logits(&mut logits)?;
    let slope = layer.slope(&logits)?;
    let _ = logits.f_sub_(coefficients.maxima)?;
    let mut logprobs = logits.f_sub_(coefficients.log_sums)?;
    let own = coefficients.own;
    let mut grad = match coefficients.entropy {
        Some((grad, entropy)) => {
            let mut probabilities = logprobs.f_exp_out(&buffers.second(block, operands)?)?;
            let _ = logprobs.f_add_(entropy)?.f_mul_(grad)?.f_add_(own)?;
            probabilities.f_mul_(&logprobs.f_neg_()?)?
        }
        None => logprobs.f_exp_()?.f_mul_(&own.f_neg()?)?,
    };
    if let Some(ids) = ids {
        let (columns, inside) = own_columns(ids, block)?;
        let _ = grad.f_scatter_add_(1, &columns, &own.f_mul(&inside)?)?;
    }
    if let Some(slope) = slope {
        let _ = grad.f_mul_(&slope)?;
    }
    if operands.weight.kind() == Kind::Float {
        return Ok(grad);
    }
    let mut narrow = buffers.scratch(block, operands)?;
    narrow.f_copy_(&grad)?;
    Ok(narrow)
}

/// Gradients of those operands that need one.
pub(super) struct Gradients {
    /// `[M, H]` f32, a sum over blocks.
    hidden: Option<Tensor>,
    /// `[V, H]`, of the weight's kind, or if summed f32.
    weight: Option<Tensor>,
    /// `[V]` f32.
    bias: Option<Tensor>,
    /// Whether weight and bias get a share from each of several groups of tokens.
    summed: bool,
}

impl Gradients {
    /// All tokens come at once. `room` is memory for the weight's gradient.
    pub(super) fn at_once(
        operands: Operands<'_>,
        needed: &[bool],
        room: Option<Tensor>,
    ) -> Result<Self> {
        let mut gradients = Self::new(operands, needed)?;
        if is_needed(needed, 1) {
            gradients.weight = Some(match room {
                Some(room) => room,
                None => operands.weight.f_empty_like()?.f_contiguous()?,
            });
        }
        Ok(gradients)
    }

    /// Tokens come in groups, whose shares are summed in f32.
    pub(super) fn summed(operands: Operands<'_>, needed: &[bool]) -> Result<Self> {
        let f32s = (Kind::Float, operands.weight.device());
        let zeros = || Tensor::f_zeros(operands.weight.size(), f32s);
        Ok(Self {
            weight: is_needed(needed, 1).then(zeros).transpose()?,
            summed: true,
            ..Self::new(operands, needed)?
        })
    }

    fn new(operands: Operands<'_>, needed: &[bool]) -> Result<Self> {
        let zeros =
            |like: &Tensor| Tensor::f_zeros(like.size(), (Kind::Float, operands.weight.device()));
        let bias = operands.bias.filter(|_| is_needed(needed, 2));
        Ok(Self {
            hidden: is_needed(needed, 0)
                .then(|| zeros(operands.hidden))
                .transpose()?,
            weight: None,
            bias: bias.map(zeros).transpose()?,
            summed: false,
        })
    }

    /// Adds the share of a block of logits, which belongs to the tokens from `start` on. Products
    /// with 16-bit operands are multiplied by `scale`, a f32 scalar, in f32. Rows of the weight's gradient
    /// whose place has the gradients of logits are made `aside`.
    pub(super) fn add(
        &mut self,
        (operands, block): (Operands<'_>, Block),
        grad_logits: &Tensor,
        (start, scale): (i64, Option<&Tensor>),
        aside: Option<Tensor>,
    ) -> Result<()> {
        let of_block = |tensor: &Tensor| tensor.f_narrow(0, block.first, block.width);
        let scaled = |product: Tensor| -> Result<Tensor> {
            Ok(match scale {
                Some(scale) => product.f_to_kind(Kind::Float)?.f_mul(scale)?,
                None => product,
            })
        };
        if let Some(sum) = &self.bias {
            let share = grad_logits.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
            let _ = of_block(sum)?.f_add_(&scaled(share)?)?;
        }
        if let Some(hidden) = &self.hidden {
            let mut rows = hidden.f_narrow(0, start, grad_logits.size()[0])?;
            let weight = of_block(operands.weight)?;
            add_product(&mut rows, grad_logits, &weight, scale)?;
        }
        if let Some(weight) = &self.weight {
            let mut rows = of_block(weight)?;
            let grad_logits = grad_logits.f_transpose(0, 1)?;
            match self.summed {
                false => {
                    let mut made = aside.unwrap_or_else(|| rows.shallow_clone());
                    multiply(&mut made, &grad_logits, operands.hidden, Target::Place)?;
                    if made.data_ptr() != rows.data_ptr() {
                        rows.f_copy_(&made)?;
                    }
                }
                true => add_product(&mut rows, &grad_logits, operands.hidden, scale)?,
            }
        }
        Ok(())
    }

    /// The gradients in the order and kinds of the inputs, times `factor`, a scalar, if there is one.
    pub(super) fn finish(
        self,
        kinds: &[Kind],
        factor: Option<&Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        // A host's scalar may be looked at; a device's is not waited for.
        let factor = match factor {
            Some(factor)
                if factor.device() == Device::Cpu && factor.f_double_value(&[])? == 1.0 =>
            {
                None
            }
            factor => factor,
        };
        let sums = [self.hidden, self.weight, self.bias];
        let finished = |(sum, &kind): (Option<Tensor>, &Kind)| -> Result<Option<Tensor>> {
            let Some(mut sum) = sum else { return Ok(None) };
            if let Some(factor) = factor {
                sum = sum.f_mul_(&factor.f_to_device(sum.device())?)?;
            }
            Ok(Some(sum.f_to_kind(kind)?))
        };
        sums.into_iter().zip(kinds).map(finished).collect()
    }
}

fn is_needed(needed: &[bool], i: usize) -> bool {
    needed.get(i) == Some(&true)
}
