//! From next-token logits to tokens.
//!
//! The filters are those of `transformers`, with the same edge cases, and [`SamplingConfig`]
//! applies them in the same order: repetition penalty, banned tokens, temperature, top-k, top-p,
//! min-p. Each is a pure function on `[B, V]` f32 logits that writes `-inf` where a token may not
//! be drawn.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result, gather_logprobs};

/// How a token is chosen from the model's distribution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingConfig {
    /// Logits are divided by this. 0 takes the likeliest token every time.
    pub temperature: f64,
    /// Only the `k` likeliest tokens may be drawn; all that tie with the last of them may too.
    pub top_k: Option<usize>,
    /// Only the fewest tokens whose probabilities together reach this may be drawn
    /// (nucleus sampling, <https://arxiv.org/abs/1904.09751>).
    pub top_p: Option<f64>,
    /// Only tokens at least this fraction as likely as the likeliest may be drawn
    /// (<https://arxiv.org/abs/2407.01082>).
    pub min_p: Option<f64>,
    /// Positive logits of tokens that the sequence already holds, prompt included, are divided
    /// by this and negative ones multiplied (<https://arxiv.org/abs/1909.05858>). 1 changes
    /// nothing.
    pub repetition_penalty: f64,
}

impl Default for SamplingConfig {
    /// The model's own distribution: temperature 1 and no filter, the only setting under which
    /// sampled log-probs are the policy's own.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: 1.0,
        }
    }
}

impl SamplingConfig {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Whether the likeliest token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for the first field that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let fail = |field, value: f64, reason| Err(Error::config(field, value, reason));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let reason = "a positive number is needed, or 0 for the likeliest token";
            return fail("sampling.temperature", self.temperature, reason);
        }
        if self.top_k == Some(0) {
            let reason = "at least one token must remain; leave it out for no filter";
            return fail("sampling.top_k", 0.0, reason);
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return fail("sampling.top_p", p, "a number in (0, 1] is needed");
        }
        if let Some(p) = self.min_p.filter(|p| !(0.0..=1.0).contains(p)) {
            return fail("sampling.min_p", p, "a number in [0, 1] is needed");
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let reason = "a positive number is needed; 1 changes nothing";
            return fail(
                "sampling.repetition_penalty",
                self.repetition_penalty,
                reason,
            );
        }
        Ok(())
    }

    /// Temperature, top-k, top-p and min-p, in that order. With temperature 0 the logits are
    /// returned as they are: no filter removes the likeliest token.
    ///
    /// # Shapes
    /// `[B, V]` f32 to `[B, V]` f32.
    pub fn warp(&self, logits: &Tensor) -> Tensor {
        if self.is_greedy() {
            return logits.shallow_clone();
        }
        let mut logits = if self.temperature == 1.0 {
            logits.shallow_clone()
        } else {
            logits / self.temperature
        };
        if let Some(k) = self.top_k {
            logits = top_k(&logits, k);
        }
        if let Some(p) = self.top_p.filter(|&p| p < 1.0) {
            logits = top_p(&logits, p);
        }
        if let Some(p) = self.min_p.filter(|&p| p > 0.0) {
            logits = min_p(&logits, p);
        }
        logits
    }

    /// Chooses one token a row from logits that [`warp`](Self::warp) returned.
    ///
    /// # Shapes
    /// `logits`: `[B, V]` f32; `uniforms`: one number in `[0, 1)` per row, not looked at when
    /// greedy.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] unless there is one number per row, and libtorch's own.
    pub fn choose(&self, logits: &Tensor, uniforms: &[f64]) -> Result<Drawn> {
        if self.is_greedy() {
            greedy(logits)
        } else {
            draw(logits, uniforms)
        }
    }
}

/// One token per row, still on the device.
#[derive(Debug)]
pub struct Drawn {
    /// `[B]` i64.
    pub tokens: Tensor,
    /// `[B]` f32, nats: the token's log-probability under the distribution it was drawn from.
    /// Not finite where the row's logits are not, or leave no token to draw.
    pub logprobs: Tensor,
}

/// Makes the tokens that a row holds less likely (`penalty > 1`) or likelier (`penalty < 1`).
///
/// # Shapes
/// `logits`: `[B, V]` f32; `seen`: the ids that each row holds, each in `0..V`, repeated or not.
///
/// # Errors
/// libtorch's own.
pub fn repetition_penalty(logits: &Tensor, seen: &[Vec<i64>], penalty: f64) -> Result<Tensor> {
    let vocab = logits.size()[1];
    let cells: Vec<i64> = (0..)
        .zip(seen)
        .flat_map(|(row, ids)| ids.iter().map(move |id| row * vocab + id))
        .collect();
    let cells = Tensor::from_slice(&cells).f_to_device(logits.device())?;
    let flat = logits.f_reshape(-1)?;
    let before = flat.f_index_select(0, &cells)?;
    let after = before
        .f_mul_scalar(penalty)?
        .f_where_self(&before.f_lt(0.0)?, &before.f_div_scalar(penalty)?)?;
    Ok(flat.f_index_copy(0, &cells, &after)?.f_view_as(logits)?)
}

/// Forbids the tokens of `ids` in each of `rows`.
///
/// # Shapes
/// `logits`: `[B, V]` f32; `rows`: each in `0..B`; `ids`: each in `0..V`.
///
/// # Errors
/// libtorch's own.
pub fn ban_tokens(logits: &Tensor, rows: &[usize], ids: &[i64]) -> Result<Tensor> {
    let vocab = logits.size()[1];
    let cells: Vec<i64> = rows
        .iter()
        .flat_map(|&row| ids.iter().map(move |id| row as i64 * vocab + id))
        .collect();
    let cells = Tensor::from_slice(&cells).f_to_device(logits.device())?;
    let flat = logits.f_reshape(-1)?;
    Ok(flat
        .f_index_fill(0, &cells, f64::NEG_INFINITY)?
        .f_view_as(logits)?)
}

/// Keeps the `k` likeliest tokens of each row and those that tie with the last of them.
///
/// # Shapes
/// `[B, V]` f32 to `[B, V]` f32.
pub fn top_k(logits: &Tensor, k: usize) -> Tensor {
    let vocab = logits.size()[1];
    let k = i64::try_from(k).unwrap_or(vocab).min(vocab);
    let (values, _) = logits.topk(k, -1, true, true);
    let last_kept = values.narrow(-1, k - 1, 1);
    logits.masked_fill(&logits.lt_tensor(&last_kept), f64::NEG_INFINITY)
}

/// Keeps the fewest likeliest tokens of each row whose probabilities together exceed `p`, at
/// least one.
///
/// # Shapes
/// `[B, V]` f32 to `[B, V]` f32.
pub fn top_p(logits: &Tensor, p: f64) -> Tensor {
    let (sorted, order) = logits.sort_stable(true, -1, false);
    let below = sorted.softmax(-1, Kind::Float).cumsum(-1, Kind::Float);
    let drop = below.le(1.0 - p);
    let _ = drop.narrow(-1, -1, 1).fill_(0);
    let drop = drop.zeros_like().scatter(1, &order, &drop);
    logits.masked_fill(&drop, f64::NEG_INFINITY)
}

/// Keeps the tokens of each row at least `p` times as likely as its likeliest.
///
/// # Shapes
/// `[B, V]` f32 to `[B, V]` f32.
pub fn min_p(logits: &Tensor, p: f64) -> Tensor {
    let probabilities = logits.softmax(-1, Kind::Float);
    let threshold = probabilities.amax([-1i64].as_slice(), true) * p;
    logits.masked_fill(&probabilities.lt_tensor(&threshold), f64::NEG_INFINITY)
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
    let mut host = vec![0f32; uniforms.len() * vocab];
    let count = host.len();
    weights.f_contiguous()?.f_copy_data(&mut host, count)?;
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    for (row, &uniform) in host.chunks_exact(vocab.max(1)).zip(uniforms) {
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

    #[test]
    fn a_config_names_the_field_that_is_wrong() {
        let base = SamplingConfig::default;
        let cases = [
            (
                SamplingConfig {
                    temperature: -1.0,
                    ..base()
                },
                "sampling.temperature",
            ),
            (
                SamplingConfig {
                    top_k: Some(0),
                    ..base()
                },
                "sampling.top_k",
            ),
            (
                SamplingConfig {
                    top_p: Some(0.0),
                    ..base()
                },
                "sampling.top_p",
            ),
            (
                SamplingConfig {
                    min_p: Some(1.5),
                    ..base()
                },
                "sampling.min_p",
            ),
            (
                SamplingConfig {
                    repetition_penalty: 0.0,
                    ..base()
                },
                "sampling.repetition_penalty",
            ),
        ];
        base().validate().unwrap();
        for (config, expected) in cases {
            let Err(Error::InvalidConfig { field, .. }) = config.validate() else {
                unreachable!("{config:?} passes")
            };
            assert_eq!(field, expected);
        }
    }
}
