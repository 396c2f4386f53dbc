//! Log-probabilities of an output layer, in one tensor and in blocks.

use rlhf::core::LogprobOptions;
use rlhf::core::tch::{Device, Kind, Tensor};
use rlhf::scale::{
    LinearLogprobs, LinearLogprobsInput, clear_grads, linear_logprobs, linear_token_loss,
};

use crate::Result;

/// Tokens, hidden size, vocabulary.
pub(crate) const OUTPUT_LAYER: [i64; 3] = [1024, 768, 50_000];

fn output_kind(how: &str) -> Kind {
    match how.ends_with("bf16") {
        true => Kind::BFloat16,
        false => Kind::Float,
    }
}

/// What the gradients of hidden states and weight take.
pub(crate) fn gradient_mib(how: &str, tokens: i64) -> f64 {
    let [_, hidden, vocab] = OUTPUT_LAYER;
    let bytes = ((tokens + vocab) * hidden) as usize * output_kind(how).elt_size_in_bytes();
    bytes as f64 / (1 << 20) as f64
}

pub(crate) fn logprobs_step(how: &str, tokens: i64) -> Box<dyn FnMut() -> Result<()>> {
    let [_, size, vocab] = OUTPUT_LAYER;
    let kind = output_kind(how);
    let normal = |shape: [i64; 2], scale: f64| {
        let values = Tensor::randn(shape, (Kind::Float, Device::Cpu)) * scale;
        values.to_kind(kind).set_requires_grad(true)
    };
    let (hidden, weight) = (normal([tokens, size], 1.0), normal([vocab, size], 0.05));
    let ids = Tensor::randint(vocab, [tokens], (Kind::Int64, Device::Cpu));
    let how = how.to_string();
    Box::new(move || {
        let options = LogprobOptions {
            temperature: 1.0,
            entropy: how.ends_with("entropy"),
        };
        let input = LinearLogprobsInput {
            hidden: &hidden,
            weight: &weight,
            bias: None,
            ids: &ids,
            softcap: None,
        };
        let loss = if how.starts_with("token_loss") {
            linear_token_loss(input, &options, None, |scores, _| token_loss(scores))?.loss
        } else if how.starts_with("chunked") {
            token_loss(&linear_logprobs(input, &options, None)?)?
        } else {
            token_loss(&plain_logprobs(input, options.entropy)?)?
        };
        loss.f_backward()?;
        clear_grads(&[hidden.shallow_clone(), weight.shallow_clone()])?;
        Ok(())
    })
}

/// A function of each token, so that the gradients differ.
fn token_loss(scores: &LinearLogprobs) -> rlhf::scale::Result<Tensor> {
    let loss = scores.logprobs.f_tanh()?.f_sum(Kind::Float)?;
    Ok(match &scores.entropy {
        Some(entropy) => loss.f_add(&entropy.f_sum(Kind::Float)?.f_mul_scalar(0.01)?)?,
        None => loss,
    })
}

fn plain_logprobs(input: LinearLogprobsInput<'_>, entropy: bool) -> Result<LinearLogprobs> {
    let logits = input.hidden.f_linear(input.weight, None::<&Tensor>)?;
    let all = logits.f_log_softmax(-1, Kind::Float)?;
    drop(logits);
    let entropy = match entropy {
        true => Some(
            all.f_exp()?
                .f_mul(&all)?
                .f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?
                .f_neg()?,
        ),
        false => None,
    };
    Ok(LinearLogprobs {
        logprobs: all
            .f_gather(1, &input.ids.f_unsqueeze(1)?, false)?
            .f_squeeze_dim(1)?,
        entropy,
    })
}
