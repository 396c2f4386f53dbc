//! Log-probabilities of tokens from hidden states, without the logits of all of them at once.

use rlhf_core::{Error as CoreError, LogprobOptions};
use tch::{Kind, Tensor};

use crate::ffi::autograd::grad_enabled;
use crate::{Error, Result, custom_function};

mod layer;
mod token_loss;

use layer::{Gradient, Kept, Operands, OutputLayer};
pub use token_loss::{LinearTokenLoss, linear_token_loss};

/// Logits that exist at a time, at most: 64 MiB of f32.
const CHUNK_ELEMENTS: i64 = 1 << 24;

/// Fewer rows than this and the products become slow.
const MIN_ROWS: i64 = 64;

/// What [`linear_logprobs`] reads.
///
/// # Shapes
/// `M` tokens, hidden size `H`, vocabulary `V`.
#[derive(Debug, Clone, Copy)]
pub struct LinearLogprobsInput<'a> {
    /// `[M, H]`, the hidden states that predict the tokens; F32, BF16 or F16.
    pub hidden: &'a Tensor,
    /// `[V, H]`, the output layer, of the same kind.
    pub weight: &'a Tensor,
    /// `[V]`, its bias, of the same kind.
    pub bias: Option<&'a Tensor>,
    /// `[M]` i64, the tokens.
    pub ids: &'a Tensor,
    /// Bound of the logits, as Gemma 2 has it: `cap * tanh(x / cap)`.
    pub softcap: Option<f64>,
}

/// What [`linear_logprobs`] returns.
#[derive(Debug)]
pub struct LinearLogprobs {
    /// `[M]` f32, nats.
    pub logprobs: Tensor,
    /// `[M]` f32, nats: the entropy of the distribution that each token was drawn from, where the
    /// options asked for it.
    pub entropy: Option<Tensor>,
}

/// `log softmax((hidden · weightᵀ + bias) / temperature)[id]` for every token, and the entropy of
/// that softmax, in chunks of tokens. A soft cap bounds the logits before the temperature divides
/// them.
///
/// It never holds the `[M, V]` logits, nor gradients of that size: forward keeps a number for each
/// token, and backward computes the logits of a chunk again, turns them into their gradient in
/// place, and adds the products that the inputs are owed. That is one more matrix product than the
/// plain computation has, and none of its passes over `[M, V]` in memory; where each token's loss
/// depends on that token alone, [`linear_token_loss`] does without it. If the output layer is
/// frozen, has no cap, and no entropy is asked for, forward makes the hidden states' gradients instead and
/// nothing is computed twice.
///
/// Softmax, sums and log-probabilities are f32 whatever the kind of the weights; the gradient of a
/// 16-bit output layer is summed over chunks in f32.
///
/// `chunk_rows` is how many tokens' logits exist at a time; `None` for an eighth of the tokens, at
/// least 64, and at most 64 MiB of f32 logits.
///
/// # Errors
/// [`Error::Core`] for shapes or kinds that do not belong together, a temperature or soft cap that
/// is not positive, `chunk_rows` of 0; libtorch's error for a token outside the vocabulary.
///
/// ```
/// use rlhf_scale::{LinearLogprobsInput, core::LogprobOptions, linear_logprobs};
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), rlhf_scale::Error> {
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
/// let output = linear_logprobs(input, &LogprobOptions::default(), None)?;
///
/// let plain = hidden.linear(&weight, None::<&Tensor>).log_softmax(-1, Kind::Float);
/// let plain = plain.gather(1, &ids.unsqueeze(1), false).squeeze_dim(1);
/// assert!(output.logprobs.allclose(&plain, 1e-5, 1e-5, false));
/// output.logprobs.mean(Kind::Float).backward();
/// assert_eq!(weight.grad().size(), [100, 16]);
/// # Ok(())
/// # }
/// ```
pub fn linear_logprobs(
    input: LinearLogprobsInput<'_>,
    options: &LogprobOptions,
    chunk_rows: Option<usize>,
) -> Result<LinearLogprobs> {
    let layer = output_layer(&input, options, chunk_rows)?;
    let trainable_head =
        input.weight.requires_grad() || input.bias.is_some_and(Tensor::requires_grad);
    let recorded = grad_enabled() && (input.hidden.requires_grad() || trainable_head);
    // The gradient through a cap is made where the logits are computed again.
    let later = trainable_head || options.entropy || input.softcap.is_some();
    let gradient = match (recorded, later) {
        (false, _) => Gradient::None,
        (true, true) => Gradient::Later,
        (true, false) => Gradient::Ahead,
    };

    let mut inputs = vec![input.hidden, input.weight];
    inputs.extend(input.bias);
    let mut outputs = custom_function(&inputs, |inputs| {
        let operands = Operands {
            hidden: &inputs[0],
            weight: &inputs[1],
            bias: inputs.get(2),
        };
        let scores = layer.forward(operands, options.entropy, gradient)?;
        let mut outputs = vec![scores.logprobs.shallow_clone()];
        outputs.extend(scores.entropy.as_ref().map(Tensor::shallow_clone));
        let kept = Kept::new(layer, operands, scores)?;
        Ok::<_, Error>((outputs, move |grads: &[Option<Tensor>], needed: &[bool]| {
            kept.backward(grads, needed)
        }))
    })?;
    let entropy = options.entropy.then(|| outputs.remove(1));
    Ok(LinearLogprobs {
        logprobs: outputs.remove(0),
        entropy,
    })
}

/// Checks what the caller gave.
fn output_layer(
    input: &LinearLogprobsInput<'_>,
    options: &LogprobOptions,
    chunk_rows: Option<usize>,
) -> Result<OutputLayer> {
    options.validate()?;
    check(input)?;
    let chunk_rows = match chunk_rows {
        Some(0) => {
            return Err(CoreError::config("chunk_rows", 0, "at least one is needed").into());
        }
        Some(rows) => rows as i64,
        None => default_rows(input.ids.size()[0], input.weight.size()[0]),
    };
    Ok(OutputLayer {
        temperature: options.temperature,
        softcap: input.softcap,
        chunk_rows,
        ids: input.ids.shallow_clone(),
    })
}

fn check(input: &LinearLogprobsInput<'_>) -> Result<()> {
    let (hidden, weight, ids) = (input.hidden.size(), input.weight.size(), input.ids.size());
    let mismatch = |left, left_shape, right, right_shape| CoreError::ShapeMismatch {
        left,
        left_shape,
        right,
        right_shape,
    };
    if hidden.len() != 2 || weight.len() != 2 || hidden[1] != weight[1] {
        return Err(mismatch("hidden [M, H]", hidden, "weight [V, H]", weight).into());
    }
    if ids != [hidden[0]] {
        return Err(mismatch("ids [M]", ids, "hidden [M, H]", hidden).into());
    }
    if let Some(bias) = input.bias
        && bias.size() != [weight[0]]
    {
        return Err(mismatch("bias [V]", bias.size(), "weight [V, H]", weight).into());
    }
    if let Some(cap) = input.softcap
        && !(cap > 0.0 && cap.is_finite())
    {
        return Err(CoreError::config("softcap", cap, "it must be above 0").into());
    }
    let kind = input.weight.kind();
    let known = matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half);
    let same = input.hidden.kind() == kind && input.bias.is_none_or(|bias| bias.kind() == kind);
    if !known || !same || input.ids.kind() != Kind::Int64 {
        return Err(Error::LogprobKinds {
            hidden: input.hidden.kind(),
            weight: kind,
            bias: input.bias.map(Tensor::kind),
            ids: input.ids.kind(),
        });
    }
    Ok(())
}

pub(crate) fn default_rows(tokens: i64, vocab: i64) -> i64 {
    let fitting = (CHUNK_ELEMENTS / vocab.max(1)).max(1);
    (tokens / 8).max(MIN_ROWS).min(fitting)
}
