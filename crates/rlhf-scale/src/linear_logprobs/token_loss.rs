//! A loss on log-probabilities whose gradient is made while the logits are there.

use std::fmt::Display;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rlhf_core::LogprobOptions;
use tch::{Kind, Tensor};

use super::blocks::{Blocks, Buffers, Cache, Room};
use super::gradients::{Gradients, ScoreGrads};
use super::layer::{Operands, OutputLayer};
use super::{LinearLogprobs, LinearLogprobsInput, output_layer};
use crate::ffi::autograd::grad_enabled;
use crate::{Error, Result, VocabularyShard, custom_function, enter_parallel};

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
/// `loss` gets the log-probabilities of tokens, as leaves, with their range of rows, and returns the
/// sum of their losses as a scalar; it is called for all tokens at once or for one group of them after
/// another. Its gradient turns the tokens' logits into theirs while they are there, so hidden states,
/// weight and bias have their gradients when forward is done, from three matrix products for any number
/// of tokens, as many as the plain computation has with `[M, V]` tensors between them. Backward
/// multiplies them by the gradient of the loss.
///
/// A mean over tokens is such a sum if the closure divides by the number of all tokens. A loss that
/// combines tokens otherwise, the sequence's probability in DPO for one, is not. What else `loss`
/// reads gets no gradient.
///
/// Options, kinds and precision are those of `linear_logprobs`. Up to `2 H` tokens of a f32 or bf16
/// layer are one group, whose logits are, as there, where the gradient of the weight will be, and the
/// rest computed again. Of more tokens, and of f16, groups have `chunk_rows` tokens; `None` for an eighth of
/// all, at least 64, and at most 64 MiB of f32 logits. The shares of 16-bit groups are made from
/// coefficients of size 1, and get their scale in f32, where they are summed: what is small does not
/// vanish, with or without loss scaling.
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
    loss: F,
) -> Result<LinearTokenLoss, E>
where
    F: FnMut(&LinearLogprobs, Range<i64>) -> Result<Tensor, E>,
    E: From<Error> + Display,
{
    token_loss(input, options, chunk_rows, None, loss)
}

/// [`linear_token_loss`] of a layer whose vocabulary lies on several ranks, as
/// [`parallel_logprobs`](super::parallel_logprobs) has it: each rank gives its part of weight and bias,
/// the same hidden states, tokens and loss, and gets the loss of the whole.
///
/// The ranks have the same groups of tokens, so that what [`parallel_logprobs`] sends of all tokens is
/// sent of one group after another.
///
/// # Errors
/// Those of [`linear_token_loss`] and of the group.
///
/// [`parallel_logprobs`]: super::parallel_logprobs
pub fn parallel_token_loss<F, E>(
    input: LinearLogprobsInput<'_>,
    shard: &VocabularyShard,
    options: &LogprobOptions,
    chunk_rows: Option<usize>,
    loss: F,
) -> Result<LinearTokenLoss, E>
where
    F: FnMut(&LinearLogprobs, Range<i64>) -> Result<Tensor, E>,
    E: From<Error> + Display,
{
    let hidden = enter_parallel(input.hidden, &shard.group)?;
    let ids = input.ids.f_sub_scalar(shard.first).map_err(Error::from)?;
    let input = LinearLogprobsInput {
        hidden: &hidden,
        ids: &ids,
        ..input
    };
    token_loss(input, options, chunk_rows, Some(shard), loss)
}

fn token_loss<F, E>(
    input: LinearLogprobsInput<'_>,
    options: &LogprobOptions,
    chunk_rows: Option<usize>,
    shard: Option<&VocabularyShard>,
    mut loss: F,
) -> Result<LinearTokenLoss, E>
where
    F: FnMut(&LinearLogprobs, Range<i64>) -> Result<Tensor, E>,
    E: From<Error> + Display,
{
    let layer = output_layer(&input, options, chunk_rows, shard)?;
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
            ids: input.ids,
        };
        let mut pass = Pass::new((operands, shard), options.entropy, &needed)?;
        let sums = pass.run(&layer, chunk_rows, &needed, &mut loss)?;
        let Pass {
            total,
            logprobs,
            entropy,
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
            Ok(sums.finish(&kinds, Some(grad))?)
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

/// Whether all tokens are one group: the logits that find no room are computed again, which is no
/// more work than summing the shares of small groups. The range of f16 is too small for a gradient
/// that gets its scale at the end.
pub(crate) fn at_once(tokens: i64, hidden: i64, kind: Kind) -> bool {
    kind != Kind::Half && tokens <= 2 * hidden
}

/// Tokens of a group where there are several.
pub(crate) fn rows_at_once(tokens: i64, vocab: i64, chunk_rows: Option<i64>) -> i64 {
    /// 64 MiB of f32.
    const ELEMENTS: i64 = 1 << 24;
    let fitting = (ELEMENTS / vocab.max(1)).max(1);
    chunk_rows.unwrap_or_else(|| (tokens / 8).max(64).min(fitting))
}

/// Forward of one group of tokens after another.
struct Pass<'a> {
    operands: Operands<'a>,
    shard: Option<&'a VocabularyShard>,
    with_gradient: bool,
    with_entropy: bool,
    total: Tensor,
    logprobs: Tensor,
    entropy: Option<Tensor>,
}

impl<'a> Pass<'a> {
    fn new(
        (operands, shard): (Operands<'a>, Option<&'a VocabularyShard>),
        with_entropy: bool,
        needed: &[bool],
    ) -> Result<Self> {
        let f32s = (Kind::Float, operands.hidden.device());
        let column = || Tensor::f_empty(operands.ids.size(), f32s);
        Ok(Self {
            operands,
            shard,
            with_gradient: needed.contains(&true),
            with_entropy,
            total: Tensor::f_zeros(&[] as &[i64], f32s)?,
            logprobs: column()?,
            entropy: with_entropy.then(column).transpose()?,
        })
    }

    fn run<F, E>(
        &mut self,
        layer: &OutputLayer,
        chunk_rows: Option<usize>,
        needed: &[bool],
        loss: &mut F,
    ) -> Result<Gradients, E>
    where
        F: FnMut(&LinearLogprobs, Range<i64>) -> Result<Tensor, E>,
        E: From<Error> + Display,
    {
        let operands = self.operands;
        let (tokens, kind) = (operands.ids.size()[0], operands.weight.kind());
        let (vocab, hidden) = (operands.weight.size()[0], operands.weight.size()[1]);
        let mut buffers = Buffers::new(layer.blocks, operands);
        let one_group = needed[1] && at_once(tokens, hidden, kind);
        if one_group || !self.with_gradient {
            let room = one_group
                .then(|| {
                    let in_one_pass = layer.is_in_one_pass(operands.weight);
                    Room::new(operands, layer.blocks, in_one_pass)
                })
                .transpose()?;
            let cache = room.as_ref().map(|room| Cache::new(room, layer.blocks));
            let cache = cache.transpose()?;
            let gradient = room.map(|room| room.gradient);
            let mut sums = Gradients::at_once(operands, needed, gradient)?;
            let group = (operands, 0, cache.as_ref());
            self.group(layer, group, (&mut sums, false), &mut buffers, loss)?;
            return Ok(sums);
        }
        let mut sums = Gradients::summed(operands, needed)?;
        // Ranks whose parts of the vocabulary differ in size must form the same groups.
        let widest = self.shard.map_or(vocab, |shard| shard.widest);
        let step = rows_at_once(tokens, widest, chunk_rows.map(|rows| rows as i64)).min(tokens);
        let logits = Tensor::f_empty([step * vocab], (kind, operands.weight.device()));
        let logits = logits.map_err(Error::from)?;
        let mut start = 0;
        while start < tokens {
            let rows = step.min(tokens - start);
            let rows_of = |tensor: &Tensor| tensor.f_narrow(0, start, rows).map_err(Error::from);
            let (hidden, ids) = (rows_of(operands.hidden)?, rows_of(operands.ids)?);
            let part = Operands {
                hidden: &hidden,
                ids: &ids,
                ..operands
            };
            let layer = OutputLayer {
                blocks: Blocks::new(rows, vocab, None),
                ..*layer
            };
            buffers.set_blocks(layer.blocks);
            let room = logits.f_narrow(0, 0, rows * vocab).map_err(Error::from)?;
            let cache = Cache::new(&Room::for_all(&room), layer.blocks)?;
            let group = (part, start, Some(&cache));
            self.group(&layer, group, (&mut sums, true), &mut buffers, loss)?;
            start += rows;
        }
        Ok(sums)
    }

    /// Scores a group of tokens, which begins at row `start`, and adds its gradients. Is it one of
    /// several and of 16 bits, they are made from coefficients of size 1.
    fn group<F, E>(
        &mut self,
        layer: &OutputLayer,
        (operands, start, cache): (Operands<'_>, i64, Option<&Cache>),
        (sums, is_share): (&mut Gradients, bool),
        buffers: &mut Buffers,
        loss: &mut F,
    ) -> Result<(), E>
    where
        F: FnMut(&LinearLogprobs, Range<i64>) -> Result<Tensor, E>,
        E: From<Error> + Display,
    {
        let rows = operands.ids.size()[0];
        let scores = layer.scores((operands, self.shard), self.with_entropy, cache, buffers)?;
        let leaves = LinearLogprobs {
            logprobs: scores.logprobs.shallow_clone(),
            entropy: scores.entropy.as_ref().map(Tensor::shallow_clone),
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
        if !with_gradient {
            return Ok(());
        }
        let mut grads = Vec::new();
        if value.requires_grad() {
            // Nothing else that the closure reads gets a gradient.
            let wanted: Vec<&Tensor> = std::iter::once(&leaves.logprobs)
                .chain(&leaves.entropy)
                .collect();
            let values = [&value];
            grads = Tensor::f_run_backward(&values, &wanted, false, false).map_err(Error::from)?;
        } else if is_share {
            return Ok(());
        }
        let grad = |i: usize| grads.get(i).filter(|grad: &&Tensor| grad.defined());
        let mut grads = ScoreGrads::new(layer, &scores, grad(0), grad(1))?;
        let is_scaled = is_share && operands.weight.kind() != Kind::Float;
        let scale = is_scaled.then(|| grads.normalize()).transpose()?;
        let target = (sums, start, scale.as_ref());
        let coefficients = grads.coefficients(&scores);
        layer.add_gradients(operands, &coefficients, cache, target, buffers)?;
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
}
