//! Log-probabilities of tokens from hidden states, without memory for the logits of all of them.

use std::sync::{Mutex, PoisonError};

use rlhf_core::{Error as CoreError, LogprobOptions};
use tch::{Kind, Tensor};

use crate::ffi::autograd::grad_enabled;
use crate::{Error, Result, Saved, VocabularyShard, custom_function, enter_parallel};

mod blocks;
mod gradients;
mod layer;
mod product;
mod scores;
mod token_loss;

pub(crate) use blocks::Blocks;
use blocks::{Buffers, Cache, Room};
use gradients::{Gradients, ScoreGrads};
use layer::{Operands, OutputLayer};
use scores::Scores;
pub use token_loss::{LinearTokenLoss, linear_token_loss, parallel_token_loss};
pub(crate) use token_loss::{at_once, rows_at_once};

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
/// that softmax, in blocks of the vocabulary. A soft cap bounds the logits before the temperature
/// divides them.
///
/// Beside what it returns it has no memory for the `[M, V]` logits, nor for gradients of that size: a softmax
/// that goes on from block to block, as that of online normalizer calculation (Milakov and Gimelshein
/// 2018), leaves forward with two numbers a token. Backward makes the gradient of the weight block by
/// block, where forward left as many logits as find room there, and those of three to five blocks more: with no more
/// tokens than the hidden states are wide (`M ≤ H`) all of them, so that nothing is computed twice; of
/// more tokens a share of `H / M` and those blocks, and the others are computed again, at most one more
/// matrix product than the plain computation has. The room, the size of the weight, and those blocks are
/// taken from forward on.
/// Where each token's loss depends on that token alone, [`linear_token_loss`] computes nothing twice
/// for any number of tokens. If the output layer is frozen, has no cap, and no entropy is asked for,
/// forward makes the hidden states' gradients instead.
///
/// Softmax, sums and log-probabilities are f32 whatever the kind of the weights.
///
/// `chunk_rows` bounds a block: it has as many logits as that many tokens. `None` is a sixteenth of
/// all, at least 2²⁰ and at most 2²⁴, which are 64 MiB of f32. Small blocks are slow.
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
    logprobs_of(input, options, chunk_rows, None)
}

/// [`linear_logprobs`] of a layer whose vocabulary lies on several ranks: each gives its rows of weight
/// and bias, and all the same hidden states and tokens; every rank gets the log-probabilities in the
/// whole vocabulary, with the gradients of its rows and, summed, those of the hidden states.
///
/// The largest logit and the sums of exponentials are joined over the ranks; a token's logit comes from
/// the rank that has it. Forward all-reduces `M` f32 maxima and `2 M` sums, `3 M` with entropies;
/// backward the gradient of the hidden states `[M, H]`, of their kind, and nothing of the vocabulary's
/// size.
///
/// # Errors
/// Those of [`linear_logprobs`] and of the group.
pub fn parallel_logprobs(
    input: LinearLogprobsInput<'_>,
    shard: &VocabularyShard,
    options: &LogprobOptions,
    chunk_rows: Option<usize>,
) -> Result<LinearLogprobs> {
    let hidden = enter_parallel(input.hidden, &shard.group)?;
    let ids = input.ids.f_sub_scalar(shard.first)?;
    let input = LinearLogprobsInput {
        hidden: &hidden,
        ids: &ids,
        ..input
    };
    logprobs_of(input, options, chunk_rows, Some(shard))
}

/// `input.ids` count from the shard's first token.
fn logprobs_of(
    input: LinearLogprobsInput<'_>,
    options: &LogprobOptions,
    chunk_rows: Option<usize>,
    shard: Option<&VocabularyShard>,
) -> Result<LinearLogprobs> {
    let layer = output_layer(&input, options, chunk_rows, shard)?;
    let trainable_head =
        input.weight.requires_grad() || input.bias.is_some_and(Tensor::requires_grad);
    let recorded = grad_enabled() && (input.hidden.requires_grad() || trainable_head);
    // The gradient through a cap is made where the logits are.
    let ahead = recorded && !trainable_head && !options.entropy && input.softcap.is_none();
    let has_room = recorded && input.weight.requires_grad();

    let mut inputs = vec![input.hidden, input.weight];
    inputs.extend(input.bias);
    let mut outputs = custom_function(&inputs, |inputs| {
        let operands = Operands {
            hidden: &inputs[0],
            weight: &inputs[1],
            bias: inputs.get(2),
            ids: input.ids,
        };
        let mut room = None;
        let (scores, directions) = if ahead {
            let (scores, directions) = layer.scores_and_directions(operands, shard)?;
            (scores, Some(directions))
        } else {
            if has_room {
                let in_one_pass = layer.is_in_one_pass(operands.weight);
                room = Some(Room::new(operands, layer.blocks, in_one_pass)?);
            }
            let cache = room
                .as_ref()
                .map(|room| Cache::new(room, layer.blocks))
                .transpose()?;
            let mut buffers = Buffers::new(layer.blocks, operands);
            let entropy = options.entropy;
            let whole = (operands, shard);
            let scores = layer.scores(whole, entropy, cache.as_ref(), &mut buffers)?;
            (scores, None)
        };
        let mut outputs = vec![scores.logprobs.shallow_clone()];
        outputs.extend(scores.entropy.as_ref().map(Tensor::shallow_clone));
        let kept = match (recorded, directions) {
            (false, _) => None,
            (true, Some(directions)) => Some(Kept::Directions(directions)),
            (true, None) => Some(Kept::Operands(Box::new(KeptOperands {
                layer,
                scores,
                hidden: Saved::new(operands.hidden)?,
                weight: Saved::new(operands.weight)?,
                bias: operands.bias.map(Saved::new).transpose()?,
                ids: Saved::new(operands.ids)?,
                room: Mutex::new(room),
            }))),
        };
        let backward = move |grads: &[Option<Tensor>], needed: &[bool]| -> Result<_> {
            match &kept {
                Some(Kept::Directions(directions)) => ahead_of_time(directions, grads, needed),
                Some(Kept::Operands(kept)) => kept.backward(grads, needed),
                None => Ok(needed.iter().map(|_| None).collect()),
            }
        };
        Ok::<_, Error>((outputs, backward))
    })?;
    let entropy = options.entropy.then(|| outputs.remove(1));
    Ok(LinearLogprobs {
        logprobs: outputs.remove(0),
        entropy,
    })
}

/// What backward needs.
enum Kept {
    /// `∂ logprob / ∂ hidden`
    Directions(Tensor),
    Operands(Box<KeptOperands>),
}

struct KeptOperands {
    layer: OutputLayer,
    scores: Scores,
    hidden: Saved,
    weight: Saved,
    bias: Option<Saved>,
    ids: Saved,
    /// Memory for the weight's gradient, with the first logits. The first backward takes it; one more
    /// has to compute them again.
    room: Mutex<Option<Room>>,
}

impl KeptOperands {
    /// Gradients of hidden states, weight and bias from those of log-probabilities and entropies.
    fn backward(&self, grads: &[Option<Tensor>], needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let operands = Operands {
            hidden: self.hidden.get()?,
            weight: self.weight.get()?,
            bias: self.bias.as_ref().map(Saved::get).transpose()?,
            ids: self.ids.get()?,
        };
        let grad = |i: usize| grads.get(i).and_then(Option::as_ref);
        let score_grads = ScoreGrads::new(&self.layer, &self.scores, grad(0), grad(1))?;
        let coefficients = score_grads.coefficients(&self.scores);
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let room = room.take();
        let cache = room
            .as_ref()
            .map(|room| Cache::new(room, self.layer.blocks))
            .transpose()?;
        let gradient = room.map(|room| room.gradient);
        let mut sums = Gradients::at_once(operands, needed, gradient)?;
        let mut buffers = Buffers::new(self.layer.blocks, operands);
        let target = (&mut sums, 0, None);
        self.layer.add_gradients(
            operands,
            &coefficients,
            cache.as_ref(),
            target,
            &mut buffers,
        )?;
        let mut kinds = vec![operands.hidden.kind(), operands.weight.kind()];
        kinds.extend(operands.bias.map(Tensor::kind));
        sums.finish(&kinds, None)
    }
}

/// The hidden states' gradient from the direction of each token's log-probability.
fn ahead_of_time(
    directions: &Tensor,
    grads: &[Option<Tensor>],
    needed: &[bool],
) -> Result<Vec<Option<Tensor>>> {
    let mut result: Vec<Option<Tensor>> = needed.iter().map(|_| None).collect();
    if let Some(Some(grad)) = grads.first() {
        let grad = grad.f_unsqueeze(1)?.f_to_kind(directions.kind())?;
        result[0] = Some(directions.f_mul(&grad)?);
    }
    Ok(result)
}

/// Checks what the caller gave.
fn output_layer(
    input: &LinearLogprobsInput<'_>,
    options: &LogprobOptions,
    chunk_rows: Option<usize>,
    shard: Option<&VocabularyShard>,
) -> Result<OutputLayer> {
    options.validate()?;
    check(input)?;
    if chunk_rows == Some(0) {
        return Err(CoreError::config("chunk_rows", 0, "at least one is needed").into());
    }
    let (tokens, vocab) = (input.ids.size()[0], input.weight.size()[0]);
    // Tokens outside the vocabulary are libtorch's error, and where a device does not wait for it a
    // failed assertion there.
    let nothing = Tensor::f_zeros([1], (Kind::Float, input.ids.device()))?;
    let _ = match shard {
        None => nothing
            .f_expand([vocab], false)?
            .f_gather(0, input.ids, false)?,
        Some(shard) => nothing.f_expand([shard.vocabulary], false)?.f_gather(
            0,
            &input.ids.f_add_scalar(shard.first)?,
            false,
        )?,
    };
    Ok(OutputLayer {
        temperature: options.temperature,
        softcap: input.softcap,
        blocks: Blocks::new(tokens, vocab, chunk_rows.map(|rows| rows as i64)),
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
