//! The clipped surrogate objective.

use rlhf_core::{Error, Result, check_same_shape, masked_sum};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Log-ratios are held within plus and minus this before they are exponentiated, as in verl and
/// OpenRLHF, so that no ratio overflows. Far outside any clip range.
pub const LOG_RATIO_LIMIT: f64 = 20.0;

/// How far a token's ratio may carry its loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clip {
    /// Ratios count down to `1 − low`.
    pub low: f64,
    /// Ratios count up to `1 + high`.
    pub high: f64,
    /// Dual clip (Ye et al. 2020, arXiv 1912.09729): where the advantage is negative,
    /// the loss is at most `c |A|`, however large the ratio. `c > 1`; verl has 3.
    pub dual: Option<f64>,
}

impl Clip {
    /// The same range on both sides, no dual clip.
    pub const fn symmetric(cliprange: f64) -> Self {
        Self {
            low: cliprange,
            high: cliprange,
            dual: None,
        }
    }
}

/// What [`surrogate`] returns, one number a token, neither masked nor reduced.
#[derive(Debug)]
pub struct Surrogate {
    /// The loss; differentiable.
    pub loss: Tensor,
    /// Where the ratio was clipped to the loss's disadvantage, bool.
    pub clipped: Tensor,
    /// Where the dual clip bounded the loss, bool; `None` without one.
    pub dual_clipped: Option<Tensor>,
}

/// `max(−A ρ, −A clip(ρ, 1 − low, 1 + high))` of each element, bounded by the dual clip.
///
/// # Shapes
/// `ratio` of any shape, `advantages` of the same or one that broadcasts to it.
pub fn surrogate(ratio: &Tensor, advantages: &Tensor, clip: Clip) -> Surrogate {
    let clipped_ratio = ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
    let unclipped = -(advantages * ratio);
    let clipped = -(advantages * clipped_ratio);
    let mut loss = unclipped.maximum(&clipped);
    let dual_clipped = clip.dual.map(|c| {
        let bound = advantages * -c;
        let bounded = loss.gt_tensor(&bound).logical_and(&advantages.lt(0.0));
        loss = bound.where_self(&bounded, &loss);
        bounded
    });
    Surrogate {
        clipped: clipped.gt_tensor(&unclipped),
        dual_clipped,
        loss,
    }
}

/// `logprobs − old_logprobs` within plus and minus [`LOG_RATIO_LIMIT`], and 0 outside the mask:
/// what is outside may be anything, and must not reach the gradient.
///
/// # Shapes
/// All of one shape.
pub fn log_ratios(logprobs: &Tensor, old_logprobs: &Tensor, mask: &Tensor) -> Tensor {
    (logprobs - old_logprobs)
        .masked_fill(&mask.logical_not(), 0.0)
        .clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
}

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
    /// Factor of each token's loss: the importance of a token that another distribution than
    /// `old_logprobs` was sampled from. `None` for 1. The statistics are not weighted.
    pub weights: Option<&'a Tensor>,
    /// How far ratios count.
    pub clip: Clip,
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
    /// Share of the tokens whose loss the dual clip bounded; 0 without one.
    pub dual_clipfrac: Tensor,
    /// The ratio `ρ`.
    pub ratio: Tensor,
    /// `(ρ − 1)²`. The variance of the ratio is this less `(mean ρ − 1)²`, which is exact where
    /// ratios are close to 1.
    pub ratio_deviation: Tensor,
}

/// The clipped [`surrogate`] of `ρ = exp(logprob − old_logprob)`
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
    if let Some(weights) = input.weights {
        check_same_shape(("logprobs", input.logprobs), ("weights", weights))?;
    }
    check_denominator(input.tokens)?;
    let mean = |x: &Tensor| masked_sum(x, input.mask) / input.tokens;
    let share = |x: &Tensor| mean(&x.to_kind(Kind::Float));

    let log_ratio = log_ratios(input.logprobs, input.old_logprobs, input.mask);
    let ratio = log_ratio.exp();
    let surrogate = surrogate(&ratio, input.advantages, input.clip);
    let loss = match input.weights {
        Some(weights) => {
            let inside = weights.masked_fill(&input.mask.logical_not(), 0.0);
            mean(&(surrogate.loss * inside))
        }
        None => mean(&surrogate.loss),
    };

    let _no_grad = tch::no_grad_guard();
    Ok(PolicyLoss {
        dual_clipfrac: match &surrogate.dual_clipped {
            Some(bounded) => share(bounded),
            None => loss.detach().zeros_like(),
        },
        loss,
        approx_kl: mean(&(log_ratio.detach().square() * 0.5)),
        clipfrac: share(&surrogate.clipped),
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
        weights: Option<Tensor>,
        clip: Clip,
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
                weights: None,
                clip: Clip::symmetric(0.2),
            }
        }

        fn loss(&self, rows: std::ops::Range<i64>) -> PolicyLoss {
            let cut = |t: &Tensor| t.slice(0, rows.start, rows.end, 1);
            policy_loss(&PolicyLossInput {
                logprobs: &cut(&self.logprobs),
                old_logprobs: &cut(&self.old_logprobs),
                advantages: &cut(&self.advantages),
                mask: &cut(&self.mask),
                weights: self.weights.as_ref().map(cut).as_ref(),
                clip: self.clip,
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

    /// The second token's ratio of 1.5 is within the dual bound of 2, and beyond that of 1.2; its
    /// gradient is cut with it. Positive advantages know no second bound.
    #[test]
    fn the_dual_clip_bounds_bad_tokens() {
        let number = |t: &Tensor| f64::try_from(t).unwrap();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} is not {b}");
        for (dual, loss, share, slope) in [
            (2.0, (-2.4 + 3.0 - 1.0) / 3.0, 0.0, 1.0),
            (1.2, (-2.4 + 2.4 - 1.0) / 3.0, 1.0 / 3.0, 0.0),
        ] {
            let mut case = Case::new();
            case.clip.dual = Some(dual);
            let out = case.loss(0..2);
            close(number(&out.loss), loss);
            close(number(&out.dual_clipfrac), share);
            close(number(&out.clipfrac), 1.0 / 3.0);
            out.loss.backward();
            let gradient = Vec::<f64>::try_from(case.logprobs.grad().view(-1)).unwrap();
            close(gradient[1], slope);
            close(gradient[2], -1.0 / 3.0);
        }
    }

    #[test]
    fn the_sides_of_the_clip_are_two() {
        let mut case = Case::new();
        case.clip.high = 0.4;
        let out = case.loss(0..2);
        let want = (-2.8 + 3.0 - 1.0) / 3.0;
        assert!((f64::try_from(&out.loss).unwrap() - want).abs() < 1e-6);
        // A good token that became unlikely is never clipped; a bad one is, at the lower side.
        let ratio = Tensor::from_slice(&[0.5f64, 0.5]);
        let clip = Clip {
            low: 0.1,
            ..Clip::symmetric(0.3)
        };
        let out = surrogate(&ratio, &Tensor::from_slice(&[1.0f64, -1.0]), clip);
        assert_eq!(Vec::<f64>::try_from(out.loss).unwrap(), [-0.5, 0.9]);
    }

    #[test]
    fn weights_scale_the_loss_alone() {
        let mut case = Case::new();
        case.weights = Some(Tensor::from_slice2(&[[0.5, 1.0], [2.0, f64::NAN]]));
        let out = case.loss(0..2);
        let want = (0.5 * -2.4 + 3.0 - 2.0) / 3.0;
        assert!((f64::try_from(&out.loss).unwrap() - want).abs() < 1e-6);
        let ratio = f64::try_from(&out.ratio).unwrap();
        assert!((ratio - 4.0 / 3.0).abs() < 1e-6);
        out.loss.backward();
        let gradient = Vec::<f64>::try_from(case.logprobs.grad().view(-1)).unwrap();
        let want = [0.0, 1.0, -2.0 / 3.0, 0.0];
        for (got, want) in gradient.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{gradient:?}");
        }
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
            weights: None,
            clip: Clip::symmetric(0.2),
            tokens: 0.0,
        });
        assert!(matches!(out, Err(Error::Empty { .. })));
    }
}
