//! From logits to the log-probabilities of tokens.

use tch::{Kind, Tensor};

use crate::{
    Error, KeptSet, KeptTokens, LogprobOptions, Result, SequenceBatch, check_kept, dropped_mask,
};

/// Log-probabilities of response tokens.
#[derive(Debug)]
pub struct TokenLogprobs {
    /// `[B, R]` f32, nats; 0 where [`mask`](Self::mask) is `false`.
    pub logprobs: Tensor,
    /// `[B, R]` bool, `true` where there is a response token.
    pub mask: Tensor,
    /// `[B, R]` f32, nats, 0 where masked: the entropy of the distribution each token was drawn
    /// from. Present where [`LogprobOptions::entropy`] asked for it.
    pub entropy: Option<Tensor>,
}

/// Log-probability of each of `ids` under `logits`.
///
/// # Shapes
/// `logits`: `[.., V]` f32; `ids`: `[..]` i64. Returns `[..]` f32.
pub fn gather_logprobs(logits: &Tensor, ids: &Tensor) -> Tensor {
    let chosen = logits.gather(-1, &ids.unsqueeze(-1), false).squeeze_dim(-1);
    chosen - logits.logsumexp([-1], false)
}

/// Entropy of the softmax of `logits`, in nats.
///
/// # Shapes
/// `[.., V]` f32 to `[..]` f32.
pub fn entropy(logits: &Tensor) -> Tensor {
    let logprobs = logits.log_softmax(-1, Kind::Float);
    -(logprobs.exp() * logprobs).sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)
}

/// Takes the place of the logits of tokens that were dropped: so low that they have probability 0,
/// and finite, so that no product with a probability is NaN.
pub const DROPPED_LOGIT: f64 = -1e15;

/// Scores the responses of `batch` under logits of its right-padded layout: the logits at a
/// token predict the token after it.
///
/// # Shapes
/// `logits`: `[B, T, V]` f32.
///
/// # Errors
/// [`Error::ShapeMismatch`] if `logits` is not of the batch's `[B, T]`.
pub fn response_logprobs(
    logits: &Tensor,
    batch: &SequenceBatch,
    options: &LogprobOptions,
) -> Result<TokenLogprobs> {
    let logits = response_logits(logits, batch, options)?;
    Ok(scored(&logits, batch, options))
}

/// [`response_logprobs`] under the distribution over the tokens that were kept at each step.
///
/// # Errors
/// Those of [`response_logprobs`] and [`check_kept`].
pub fn response_logprobs_within(
    logits: &Tensor,
    batch: &SequenceBatch,
    kept: &[KeptTokens],
    options: &LogprobOptions,
) -> Result<TokenLogprobs> {
    check_kept(batch, kept)?;
    let logits = response_logits(logits, batch, options)?;
    let size = logits.size();
    let none = KeptSet::All;
    let sets: Vec<&KeptSet> = kept
        .iter()
        .flat_map(|row| (0..size[1] as usize).map(|t| row.get(t).unwrap_or(&none)))
        .collect();
    let dropped = dropped_mask(&sets, size[2], logits.device())?.f_view_as(&logits)?;
    let logits = logits.f_masked_fill(&dropped, DROPPED_LOGIT)?;
    Ok(scored(&logits, batch, options))
}

/// The logits that predict each response token, divided by the temperature. `[B, R, V]`.
fn response_logits(
    logits: &Tensor,
    batch: &SequenceBatch,
    options: &LogprobOptions,
) -> Result<Tensor> {
    let size = logits.size();
    let (rows, width) = (batch.len() as i64, batch.max_len() as i64);
    if size.len() != 3 || size[0] != rows || size[1] != width {
        return Err(Error::ShapeMismatch {
            left: "logits",
            left_shape: size,
            right: "the padded batch [B, T, V]",
            right_shape: vec![rows, width, -1],
        });
    }
    let (device, vocab) = (logits.device(), size[2]);
    let responses = batch.max_response_len() as i64;
    // Row i's response starts at column P_i, so the logits that predict it start at P_i - 1.
    let starts: Vec<i64> = batch
        .sequences()
        .iter()
        .map(|s| s.prompt.len() as i64 - 1)
        .collect();
    let columns = Tensor::arange(responses, (Kind::Int64, device)).unsqueeze(0)
        + Tensor::from_slice(&starts).to_device(device).unsqueeze(1);
    let columns = columns
        .clamp_max(width - 1)
        .unsqueeze(-1)
        .expand([-1, -1, vocab], false);
    Ok(logits.f_gather(1, &columns, false)? / options.temperature)
}

fn scored(logits: &Tensor, batch: &SequenceBatch, options: &LogprobOptions) -> TokenLogprobs {
    let mask = batch.response_mask(logits.device());
    let ids = batch.responses(0, logits.device());
    let outside = mask.logical_not();
    TokenLogprobs {
        logprobs: gather_logprobs(logits, &ids).masked_fill(&outside, 0.0),
        entropy: options
            .entropy
            .then(|| entropy(logits).masked_fill(&outside, 0.0)),
        mask,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Sequence, check_same_shape};
    use tch::Device;

    #[test]
    fn responses_are_predicted_by_the_token_before() {
        // V = 2; the logit difference at position t is t, so log p(1) = -softplus(-t).
        let batch =
            SequenceBatch::new(vec![Sequence::new([0, 0], [1, 1]), Sequence::new([0], [1])])
                .unwrap();
        let t = Tensor::arange(4, (Kind::Float, Device::Cpu));
        let logits = Tensor::stack(&[t.zeros_like(), t], 1)
            .unsqueeze(0)
            .repeat([2, 1, 1]);
        let options = LogprobOptions {
            temperature: 1.0,
            entropy: true,
        };
        let out = response_logprobs(&logits, &batch, &options).unwrap();
        check_same_shape(("logprobs", &out.logprobs), ("mask", &out.mask)).unwrap();
        let expected = |t: f64| -(-t).exp().ln_1p();
        let got = |i, j| out.logprobs.double_value(&[i, j]);
        for (value, want) in [
            (got(0, 0), expected(1.0)),
            (got(0, 1), expected(2.0)),
            (got(1, 0), expected(0.0)),
            (got(1, 1), 0.0),
        ] {
            assert!((value - want).abs() < 1e-6, "{value} is not {want}");
        }
        let entropy = out.entropy.unwrap();
        assert!((entropy.double_value(&[1, 0]) - 2f64.ln()).abs() < 1e-6);
        assert_eq!(entropy.double_value(&[1, 1]), 0.0);
    }

    #[test]
    fn within_a_kept_set_probabilities_sum_to_one() {
        let batch =
            SequenceBatch::new(vec![Sequence::new([0], [1, 0]), Sequence::new([0], [2])]).unwrap();
        let row = Tensor::from_slice(&[0.0f32, 1.0, 2.0]);
        let logits = row
            .view([1, 1, 3])
            .repeat([2, 3, 1])
            .set_requires_grad(true);
        let options = LogprobOptions {
            temperature: 0.5,
            entropy: true,
        };
        let kept: [KeptTokens; 2] = [
            vec![KeptSet::Only([1, 2].into()), KeptSet::AllBut([2].into())].into(),
            vec![KeptSet::Only([2].into())].into(),
        ];
        let out = response_logprobs_within(&logits, &batch, &kept, &options).unwrap();
        let got = |i, j| out.logprobs.double_value(&[i, j]);
        let softplus = |x: f64| x.exp().ln_1p();
        for (value, want) in [
            (got(0, 0), -softplus(2.0)), // against token 2, 1 / 0.5 above
            (got(0, 1), -softplus(2.0)), // token 0 against token 1
            (got(1, 0), 0.0),            // nothing else was left
        ] {
            assert!((value - want).abs() < 1e-6, "{value} is not {want}");
        }
        let entropy = out.entropy.unwrap();
        assert_eq!(entropy.double_value(&[1, 0]), 0.0);
        (out.logprobs.sum(Kind::Float) + entropy.sum(Kind::Float)).backward();
        let gradient = logits.grad();
        assert!(bool::try_from(gradient.isfinite().all()).unwrap());
        assert_eq!(gradient.double_value(&[0, 0, 0]), 0.0); // dropped there

        let outside: [KeptTokens; 2] = [kept[0].clone(), vec![KeptSet::Only([1].into())].into()];
        let error = response_logprobs_within(&logits, &batch, &outside, &options).unwrap_err();
        assert!(matches!(error, Error::TokenNotKept { row: 1, id: 2, .. }));
    }
}
