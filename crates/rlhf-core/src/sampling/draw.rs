//! One token a row from its logits.

use tch::{Device, Kind, Tensor};

use crate::{Error, Result, gather_logprobs};

/// One token per row, still on the device.
#[derive(Debug)]
pub struct Drawn {
    /// `[B]` i64.
    pub tokens: Tensor,
    /// `[B]` f32, nats: the token's log-probability under the distribution it was drawn from.
    /// Not finite where the row's logits are not, or leave no token to draw.
    pub logprobs: Tensor,
}

/// The likeliest token of each row, drawn from a distribution with all its mass there: its
/// log-probability is 0.
///
/// # Shapes
/// `logits`: `[B, V]` f32.
///
/// # Errors
/// libtorch's own.
pub fn greedy(logits: &Tensor) -> Result<Drawn> {
    let (best, tokens) = logits.f_max_dim(-1, false)?;
    // 0, or NaN where the maximum is not finite.
    let logprobs = (best * 0.0).abs();
    Ok(Drawn { tokens, logprobs })
}

/// Draws one token a row from the softmax of `logits`, by the inverse of its distribution
/// function: the first token whose cumulative probability exceeds the row's uniform number. A
/// token of probability 0 is never drawn.
///
/// # Shapes
/// `logits`: `[B, V]` f32; `uniforms`: one number in `[0, 1)` per row.
///
/// # Errors
/// [`Error::LengthMismatch`] unless there is one number per row, and libtorch's own.
pub fn draw(logits: &Tensor, uniforms: &[f64]) -> Result<Drawn> {
    let size = logits.size();
    let rows = size.first().copied().unwrap_or(0);
    if uniforms.len() as i64 != rows {
        return Err(Error::LengthMismatch {
            left: "uniforms",
            left_len: uniforms.len(),
            right: "the logits",
            right_len: rows as usize,
        });
    }
    // Largest number whose product with any total stays below the total after rounding.
    let below_one = 1.0 - f64::EPSILON;
    let uniforms: Vec<f64> = uniforms.iter().map(|u| u.clamp(0.0, below_one)).collect();
    let best = logits.f_amax([-1i64].as_slice(), true)?;
    let weights = logits.f_sub(&best)?.f_exp()?;
    if weights.device() == Device::Cpu {
        draw_on_host(&weights, &uniforms)
    } else {
        draw_on_device(logits, &weights, &uniforms)
    }
}

/// One pass over the weights instead of three: sums of blocks, then the block, then the token.
fn draw_on_host(weights: &Tensor, uniforms: &[f64]) -> Result<Drawn> {
    const BLOCK: usize = 512;
    let vocab = weights.size()[1] as usize;
    let mut host = vec![0f32; vocab];
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    for (place, &uniform) in (0..).zip(uniforms) {
        let weights = weights.f_get(place)?.f_contiguous()?;
        weights.f_copy_data(&mut host, vocab)?;
        let row = host.as_slice();
        let sums: Vec<f64> = row.chunks(BLOCK).map(sum).collect();
        let total: f64 = sums.iter().sum();
        let target = uniform * total;
        let (mut below, mut start) = (0.0, 0);
        // The last block with any weight takes what rounding leaves over.
        for (block, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
            start = block * BLOCK;
            if below + sum > target {
                break;
            }
            below += sum;
        }
        let mut token = start;
        let block = &row[start..vocab.min(start + BLOCK)];
        for (place, &weight) in block.iter().enumerate().filter(|(_, w)| **w > 0.0) {
            token = start + place;
            below += f64::from(weight);
            if below > target {
                break;
            }
        }
        tokens.push(token as i64);
        logprobs.push((f64::from(row[token]) / total).ln() as f32);
    }
    Ok(Drawn {
        tokens: Tensor::from_slice(&tokens),
        logprobs: Tensor::from_slice(&logprobs),
    })
}

/// Summed in f64: in f32 the tail of a large vocabulary would round away. Several sums at once, so
/// that the additions do not wait for each other.
fn sum(values: &[f32]) -> f64 {
    let mut sums = [0f64; 16];
    let chunks = values.chunks_exact(16);
    let rest: f64 = chunks.remainder().iter().map(|&v| f64::from(v)).sum();
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(value);
        }
    }
    sums.iter().sum::<f64>() + rest
}

fn draw_on_device(logits: &Tensor, weights: &Tensor, uniforms: &[f64]) -> Result<Drawn> {
    let cumulative = weights.f_cumsum(-1, Kind::Double)?;
    let total = cumulative.narrow(-1, -1, 1);
    let target = Tensor::from_slice(uniforms)
        .f_to_device(logits.device())?
        .unsqueeze(-1)
        .f_mul(&total)?;
    let tokens = target
        .f_searchsorted(&cumulative, false, true, "right", None::<Tensor>)?
        .squeeze_dim(-1)
        // Only a row without a distribution (NaN) runs past the end; its log-prob says so.
        .clamp_max(logits.size()[1] - 1);
    let logprobs = gather_logprobs(logits, &tokens);
    Ok(Drawn { tokens, logprobs })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tokens(logits: &Tensor, uniforms: &[f64]) -> Vec<i64> {
        Vec::try_from(draw(logits, uniforms).unwrap().tokens).unwrap()
    }

    #[test]
    fn a_uniform_number_picks_the_token_it_falls_on() {
        let quarter = Tensor::from_slice(&[0.25f32, 0.5, 0.25]).log().unsqueeze(0);
        for (u, token) in [(0.0, 0), (0.2, 0), (0.3, 1), (0.7, 1), (0.8, 2)] {
            assert_eq!(tokens(&quarter, &[u]), [token], "u = {u}");
        }
    }

    #[test]
    fn a_token_of_probability_zero_is_never_drawn() {
        let inf = f32::NEG_INFINITY;
        let row = Tensor::from_slice(&[inf, 0.3, inf, 0.9, inf, inf]).unsqueeze(0);
        for u in [0.0, f64::MIN_POSITIVE, 1.0 - f64::EPSILON / 2.0, 1.0] {
            let token = tokens(&row, &[u])[0];
            assert!(token == 1 || token == 3, "u = {u} drew {token}");
        }
        assert_eq!(tokens(&row, &[0.0]), [1]);
        assert_eq!(tokens(&row, &[1.0]), [3]);
    }

    #[test]
    fn a_tail_too_thin_for_f32_is_still_drawn() {
        let row = Tensor::from_slice(&[0.0f32, -20.0]).unsqueeze(0); // e^-20 = 2e-9
        assert_eq!(tokens(&row, &[1.0 - 1e-9]), [1]);
        assert_eq!(tokens(&row, &[1.0 - 3e-9]), [0]);
    }

    #[test]
    fn host_and_device_draw_alike() {
        let logits = Tensor::arange(3 * 1700, (Kind::Float, Device::Cpu))
            .f_mul_scalar(1.3)
            .unwrap()
            .sin()
            .view([3, 1700])
            * 4.0;
        let weights = (&logits - logits.amax([-1i64].as_slice(), true)).exp();
        for step in 0..200 {
            let uniforms = [0.0, 0.33, 0.66].map(|u| u + f64::from(step) / 600.0);
            let host = draw_on_host(&weights, &uniforms).unwrap();
            let device = draw_on_device(&logits, &weights, &uniforms).unwrap();
            assert!(host.tokens.equal(&device.tokens), "{uniforms:?}");
            assert!(host.logprobs.allclose(&device.logprobs, 0.0, 1e-5, false));
        }
    }

    #[test]
    fn rows_without_a_distribution_have_no_finite_logprob() {
        let nan = Tensor::from_slice(&[0f32, f32::NAN]).unsqueeze(0);
        let empty = Tensor::full([1, 2], f64::NEG_INFINITY, (Kind::Float, tch::Device::Cpu));
        for logits in [nan, empty] {
            for drawn in [draw(&logits, &[0.5]), greedy(&logits)] {
                assert!(!drawn.unwrap().logprobs.double_value(&[0]).is_finite());
            }
        }
    }

    #[test]
    fn one_number_a_row() {
        let two_rows = Tensor::zeros([2, 3], (Kind::Float, tch::Device::Cpu));
        assert!(matches!(
            draw(&two_rows, &[0.5]),
            Err(Error::LengthMismatch {
                left_len: 1,
                right_len: 2,
                ..
            })
        ));
    }
}
