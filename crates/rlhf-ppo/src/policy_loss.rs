//! The clipped surrogate objective.

use rlhf_core::{Error, Result, check_same_shape, masked_sum};
use tch::{Kind, Tensor};

/// Log-ratios are held within plus and minus this before they are exponentiated, as in verl and
/// OpenRLHF, so that no ratio overflows. Far outside any clip range.
pub const LOG_RATIO_LIMIT: f64 = 20.0;

/// What [`policy_loss`] reads. All tensors are `[B, R]`.
#[derive(Debug)]
pub struct PolicyLossInput<'a> {
    /// Log-probabilities under the policy being trained, f32, nats; carry the gradient.
    pub logprobs: &'a Tensor,
    /// Log-probabilities under the policy that wrote the responses.
    pub old_logprobs: &'a Tensor,
    /// Advantages of the tokens.
    pub advantages: &'a Tensor,
    /// Tokens that take part, bool.
    pub mask: &'a Tensor,
    /// Ratios count within `1 ± cliprange`.
    pub cliprange: f64,
    /// Tokens that take part in the **whole minibatch**, of which this may be one microbatch:
    /// the denominator of every reduction.
    pub tokens: f64,
}

/// What [`policy_loss`] returns: scalars, each `Σ_mask x / tokens`. The microbatches of a
/// minibatch add up to the minibatch's token mean, however it was split.
#[derive(Debug)]
pub struct PolicyLoss {
    /// The loss; differentiable.
    pub loss: Tensor,
    /// `½ (logprob − old_logprob)²`, nats: how far the policy has moved (estimator k2). Detached,
    /// like all below.
    pub approx_kl: Tensor,
    /// Share of the tokens whose ratio was clipped to the loss's disadvantage.
    pub clipfrac: Tensor,
    /// The ratio `ρ`.
    pub ratio: Tensor,
    /// `(ρ − 1)²`. The variance of the ratio is this less `(mean ρ − 1)²`, which is exact where
    /// ratios are close to 1.
    pub ratio_deviation: Tensor,
}

/// `max(−A ρ, −A clip(ρ, 1 ± cliprange))` with `ρ = exp(logprob − old_logprob)`
/// (Schulman et al. 2017, arXiv 1707.06347, equation 7), summed over the mask and divided by
/// `tokens`.
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::Empty`] unless `tokens` is positive.
pub fn policy_loss(input: &PolicyLossInput<'_>) -> Result<PolicyLoss> {
    for (name, tensor) in [
        ("old_logprobs", input.old_logprobs),
        ("advantages", input.advantages),
        ("mask", input.mask),
    ] {
        check_same_shape(("logprobs", input.logprobs), (name, tensor))?;
    }
    check_denominator(input.tokens)?;
    let mean = |x: &Tensor| masked_sum(x, input.mask) / input.tokens;

    // Masked first: what is outside may be anything, and must not reach the gradient.
    let log_ratio = (input.logprobs - input.old_logprobs)
        .masked_fill(&input.mask.logical_not(), 0.0)
        .clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT);
    let ratio = log_ratio.exp();
    let clipped_ratio = ratio.clamp(1.0 - input.cliprange, 1.0 + input.cliprange);
    let unclipped = -(input.advantages * &ratio);
    let clipped = -(input.advantages * clipped_ratio);
    let loss = mean(&unclipped.maximum(&clipped));

    let _no_grad = tch::no_grad_guard();
    Ok(PolicyLoss {
        loss,
        approx_kl: mean(&(log_ratio.detach().square() * 0.5)),
        clipfrac: mean(&clipped.gt_tensor(&unclipped).to_kind(Kind::Float)),
        ratio: mean(&ratio.detach()),
        ratio_deviation: mean(&(ratio.detach() - 1.0).square()),
    })
}

pub(crate) fn check_denominator(count: f64) -> Result<()> {
    if count > 0.0 {
        return Ok(());
    }
    Err(Error::Empty {
        what: "the minibatch",
        help: "a mean needs at least one token; leave the minibatch out",
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tch::Device;

    struct Case {
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
    }

    impl Case {
        fn new() -> Self {
            // Ratios 1.5 (A > 0: clipped), 1.5 (A < 0: not), 1, and one that is masked.
            let up = 1.5f64.ln();
            Self {
                logprobs: Tensor::from_slice2(&[[up - 1.0, up - 1.0], [-1.0, f64::NAN]])
                    .set_requires_grad(true),
                old_logprobs: Tensor::from_slice2(&[[-1.0, -1.0], [-1.0, 0.0]]),
                advantages: Tensor::from_slice2(&[[2.0, -2.0], [1.0, 9.0]]),
                mask: Tensor::from_slice2(&[[true, true], [true, false]]),
            }
        }

        fn loss(&self, rows: std::ops::Range<i64>) -> PolicyLoss {
            let cut = |t: &Tensor| t.slice(0, rows.start, rows.end, 1);
            policy_loss(&PolicyLossInput {
                logprobs: &cut(&self.logprobs),
                old_logprobs: &cut(&self.old_logprobs),
                advantages: &cut(&self.advantages),
                mask: &cut(&self.mask),
                cliprange: 0.2,
                tokens: 3.0,
            })
            .unwrap()
        }
    }

    #[test]
    fn by_hand() {
        let case = Case::new();
        let out = case.loss(0..2);
        let number = |t: &Tensor| f64::try_from(t).unwrap();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} is not {b}");
        close(number(&out.loss), (-2.4 + 3.0 - 1.0) / 3.0);
        close(number(&out.clipfrac), 1.0 / 3.0);
        close(number(&out.ratio), 4.0 / 3.0);
        close(number(&out.ratio_deviation), 0.5 / 3.0);
        close(number(&out.approx_kl), 1.5f64.ln().powi(2) / 3.0);
        out.loss.backward();
        let gradient = Vec::<f64>::try_from(case.logprobs.grad().view(-1)).unwrap();
        close(gradient[0], 0.0); // clipped
        close(gradient[1], 1.0); // −A ρ / 3
        close(gradient[2], -1.0 / 3.0);
        assert_eq!(gradient[3], 0.0);
    }

    #[test]
    fn microbatches_add_up() {
        let (case, split) = (Case::new(), Case::new());
        case.loss(0..2).loss.backward();
        split.loss(0..1).loss.backward();
        split.loss(1..2).loss.backward();
        assert_eq!(case.logprobs.grad(), split.logprobs.grad());
    }

    #[test]
    fn no_token_is_an_error() {
        let zeros = Tensor::zeros([1, 1], (Kind::Float, Device::Cpu));
        let out = policy_loss(&PolicyLossInput {
            logprobs: &zeros,
            old_logprobs: &zeros,
            advantages: &zeros,
            mask: &zeros.to_kind(Kind::Bool),
            cliprange: 0.2,
            tokens: 0.0,
        });
        assert!(matches!(out, Err(Error::Empty { .. })));
    }
}
