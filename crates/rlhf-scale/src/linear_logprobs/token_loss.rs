//! A loss on log-probabilities whose gradient is made while the logits are there.

use std::fmt::Display;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rlhf_core::LogprobOptions;
use tch::{Kind, Tensor};

use super::layer::{Buffers, ChunkScores, Gradients, Operands, OutputLayer, chunk_scores};
use super::{LinearLogprobs, LinearLogprobsInput, output_layer};
use crate::ffi::autograd::grad_enabled;
use crate::{Error, Result, custom_function};

/// What [`linear_token_loss`] returns.
#[derive(Debug)]
pub struct LinearTokenLoss {
    /// A f32 scalar, the sum of what the closure returned, with its gradient.
    pub loss: Tensor,
    /// `[M]` f32, nats; without gradient.
    pub logprobs: Tensor,
    /// `[M]` f32, nats, without gradient: where the options asked for it.
    pub entropy: Option<Tensor>,
}

/// A sum of losses of tokens, each a function of that token's log-probability (and entropy) alone:
/// cross-entropy, the clipped objectives of PPO and GRPO, an entropy bonus.
///
/// `loss` gets the log-probabilities of a chunk of tokens, as leaves, with the chunk's range of
/// rows, and returns the sum of the chunk's losses as a scalar. Its gradient turns the chunk's
/// logits into theirs at once, so hidden states, weight and bias have their gradients when forward
/// is done, from three matrix products where [`linear_logprobs`](super::linear_logprobs) needs four
/// and the plain computation as many with `[M, V]` tensors between them. Backward multiplies them
/// by the gradient of the loss.
///
/// A mean over tokens is such a sum if the closure divides by the number of all tokens. A loss that
/// combines tokens otherwise, the sequence's probability in DPO for one, is not. What else `loss`
/// reads gets no gradient.
///
/// Options, kinds, precision and `chunk_rows` are those of `linear_logprobs`. The gradient of a
/// 16-bit layer is made from coefficients of size 1, and gets their scale in f32: what is small
/// does not vanish, with or without loss scaling.
///
/// # Errors
/// Those of `linear_logprobs` and of `loss`. Backward runs once.
///
/// ```
/// use rlhf_scale::{Error, LinearLogprobsInput, core::LogprobOptions, linear_token_loss};
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Error> {
/// let hidden = Tensor::randn([6, 16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let weight = Tensor::randn([100, 16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let ids = Tensor::from_slice(&[5i64, 99, 0, 7, 7, 31]);
/// let input = LinearLogprobsInput {
///     hidden: &hidden,
///     weight: &weight,
///     bias: None,
///     ids: &ids,
///     softcap: None,
/// };
/// // Mean cross-entropy.
/// let output = linear_token_loss(input, &LogprobOptions::default(), None, |scores, _| {
///     Ok::<_, Error>(-scores.logprobs.f_sum(Kind::Float)? / 6.0)
/// })?;
///
/// let logits = hidden.linear(&weight, None::<&Tensor>);
/// assert!(output.loss.allclose(&logits.cross_entropy_for_logits(&ids), 1e-5, 1e-5, false));
/// output.loss.backward();
/// assert_eq!(weight.grad().size(), [100, 16]);
/// # Ok(())
/// # }
/// ```
pub fn linear_token_loss<F, E>(
    input: LinearLogprobsInput<'_>,
    options: &LogprobOptions,
    chunk_rows: Option<usize>,
    mut loss: F,
) -> Result<LinearTokenLoss, E>
where
    F: FnMut(&LinearLogprobs, Range<i64>) -> Result<Tensor, E>,
    E: From<Error> + Display,
{
    let layer = output_layer(&input, options, chunk_rows)?;
    let mut inputs = vec![input.hidden, input.weight];
    inputs.extend(input.bias);
    let recorded = grad_enabled();
    let needed: Vec<bool> = inputs
        .iter()
        .map(|input| recorded && input.requires_grad())
        .collect();
    let mut scores = None;
    let mut outputs = custom_function(&inputs, |inputs| {
        let operands = Operands {
            hidden: &inputs[0],
            weight: &inputs[1],
            bias: inputs.get(2),
        };
        let mut pass = Pass::new(&layer, operands, options.entropy, &needed)?;
        for (start, rows) in layer.chunks() {
            pass.chunk(start, rows, &mut loss)?;
        }
        let Pass {
            total,
            logprobs,
            entropy,
            sums,
            ..
        } = pass;
        scores = Some((logprobs, entropy));
        let kinds: Vec<Kind> = inputs.iter().map(Tensor::kind).collect();
        let kept = Mutex::new(Some(sums));
        let backward = move |grads: &[Option<Tensor>], _: &[bool]| -> Result<_, E> {
            let sums = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
            let (Some(sums), Some(Some(grad))) = (sums, grads.first()) else {
                return Err(Error::SecondBackward.into());
            };
            Ok(sums.scaled(grad, &kinds)?)
        };
        Ok((vec![total], backward))
    })?;
    let Some((logprobs, entropy)) = scores else {
        // `custom_function` has called the closure, or has returned its error.
        return Err(Error::SecondBackward.into());
    };
    Ok(LinearTokenLoss {
        loss: outputs.remove(0),
        logprobs,
        entropy,
    })
}

/// Forward of one chunk after another.
struct Pass<'a> {
    layer: &'a OutputLayer,
    operands: Operands<'a>,
    buffers: Buffers,
    sums: Gradients,
    with_gradient: bool,
    total: Tensor,
    logprobs: Tensor,
    entropy: Option<Tensor>,
}

impl<'a> Pass<'a> {
    fn new(
        layer: &'a OutputLayer,
        operands: Operands<'a>,
        with_entropy: bool,
        needed: &[bool],
    ) -> Result<Self> {
        let f32s = (Kind::Float, operands.hidden.device());
        let tokens = layer.ids.size()[0];
        let column = || Tensor::f_empty([tokens], f32s);
        Ok(Self {
            layer,
            operands,
            buffers: Buffers::new(layer, operands, with_entropy)?,
            sums: Gradients::new(operands, needed, Kind::Float)?,
            with_gradient: needed.contains(&true),
            total: Tensor::f_zeros(&[] as &[i64], f32s)?,
            logprobs: column()?,
            entropy: if with_entropy { Some(column()?) } else { None },
        })
    }

    fn chunk<F, E>(&mut self, start: i64, rows: i64, loss: &mut F) -> Result<(), E>
    where
        F: FnMut(&LinearLogprobs, Range<i64>) -> Result<Tensor, E>,
        E: From<Error> + Display,
    {
        let scores = chunk_scores(
            self.layer,
            self.operands,
            &mut self.buffers,
            (start, rows),
            self.with_gradient,
        )?;
        let leaves = LinearLogprobs {
            logprobs: scores.logprobs.f_squeeze_dim(1).map_err(Error::from)?,
            entropy: match &scores.entropy {
                Some(entropy) => Some(entropy.f_squeeze_dim(1).map_err(Error::from)?),
                None => None,
            },
        };
        let with_gradient = self.with_gradient;
        for leaf in std::iter::once(&leaves.logprobs).chain(&leaves.entropy) {
            let _ = leaf.set_requires_grad(with_gradient);
        }
        let value = match with_gradient {
            true => tch::with_grad(|| loss(&leaves, start..start + rows))?,
            false => loss(&leaves, start..start + rows)?,
        };
        self.note(&leaves, &value, start, rows)?;
        if with_gradient && value.requires_grad() {
            // Nothing else that the closure reads gets a gradient.
            let wanted: Vec<&Tensor> = std::iter::once(&leaves.logprobs)
                .chain(&leaves.entropy)
                .collect();
            let mut grads = Tensor::f_run_backward(&[&value], &wanted, false, false)
                .map_err(Error::from)?
                .into_iter()
                .map(|grad| grad.defined().then_some(grad));
            let grads = (grads.next().flatten(), grads.next().flatten());
            self.add_gradients(scores, grads, start, rows)?;
        } else if let Some(hidden) = &self.sums.hidden {
            let mut hidden = hidden.f_narrow(0, start, rows).map_err(Error::from)?;
            let _ = hidden.f_zero_().map_err(Error::from)?;
        }
        Ok(())
    }

    fn note(
        &mut self,
        leaves: &LinearLogprobs,
        value: &Tensor,
        start: i64,
        rows: i64,
    ) -> Result<()> {
        let _ = self.total.f_add_(&value.f_detach()?)?;
        let copy = |all: &Tensor, chunk: &Tensor| -> Result<()> {
            all.f_narrow(0, start, rows)?.f_copy_(&chunk.f_detach()?)?;
            Ok(())
        };
        copy(&self.logprobs, &leaves.logprobs)?;
        if let (Some(all), Some(chunk)) = (&self.entropy, &leaves.entropy) {
            copy(all, chunk)?;
        }
        Ok(())
    }

    fn add_gradients(
        &mut self,
        scores: ChunkScores,
        (logprobs, entropy): (Option<Tensor>, Option<Tensor>),
        start: i64,
        rows: i64,
    ) -> Result<()> {
        let column = |grad: Option<Tensor>| -> Result<Tensor> {
            match grad {
                Some(grad) => Ok(grad.f_unsqueeze(1)?),
                None => Ok(scores.sums.f_zeros_like()?),
            }
        };
        let (mut logprobs, has_entropy) = (column(logprobs)?, entropy.is_some());
        let mut entropy = column(entropy)?;
        let mut scale = None;
        if self.operands.weight.kind() != Kind::Float {
            let largest = logprobs.f_abs()?.f_max()?;
            let largest = largest.f_maximum(&entropy.f_abs()?.f_max()?)?;
            // All of them 0: so they stay.
            let largest = largest.f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
            logprobs = logprobs.f_div(&largest)?;
            entropy = entropy.f_div(&largest)?;
            scale = Some(largest);
        }
        let ids = self.layer.ids.f_narrow(0, start, rows)?.f_unsqueeze(1)?;
        let entropy = has_entropy.then_some(entropy);
        let grad = scores.into_grad_logits(&ids, self.layer.temperature, &logprobs, entropy)?;
        self.sums
            .add_scaled(self.operands, &grad, scale.as_ref(), start, rows)
    }
}
