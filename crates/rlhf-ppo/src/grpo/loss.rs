//! The losses of the critic-free methods.

use rlhf_core::{Error, Result, check_same_shape};
use tch::{Kind, Tensor};

use super::choices::{KlPenalty, KlWeight, Objective, RatioLevel};
use crate::{LOG_RATIO_LIMIT, surrogate};

/// What [`group_loss`] reads.
#[derive(Debug)]
pub struct GroupLossInput<'a> {
    /// Log-probabilities under the policy being trained, nats; carry the gradient. `[B, R]`.
    pub logprobs: &'a Tensor,
    /// Those under the policy that wrote the answers. `[B, R]`.
    pub old_logprobs: &'a Tensor,
    /// Those under the reference, for a KL penalty in the loss. `[B, R]`.
    pub ref_logprobs: Option<&'a Tensor>,
    /// Advantages of the answers. `[B]`.
    pub advantages: &'a Tensor,
    /// Tokens that take part, bool. `[B, R]`.
    pub mask: &'a Tensor,
    /// Weight of each answer's tokens, see [`token_weights`](crate::token_weights). `[B]`.
    pub token_weights: &'a Tensor,
    /// [`importance_weights`](crate::importance_weights), if the answers were sampled by somebody
    /// else. `[B, R]` or `[B, 1]`.
    pub importance_weights: Option<&'a Tensor>,
    /// What has one ratio.
    pub ratio: RatioLevel,
    /// What is made likelier.
    pub objective: Objective,
    /// The KL penalty; only one in the loss is looked at.
    pub kl: KlPenalty,
}

/// What [`group_loss`] returns.
#[derive(Debug)]
pub struct GroupLoss {
    /// `Σ weight · (surrogate + kl_coef · kl)` over the mask; differentiable scalar.
    pub loss: Tensor,
    /// The surrogate's share of it. Detached, like all below.
    pub policy: Tensor,
    /// The estimated divergence of each token as the loss has it, the ratio it is
    /// multiplied by included. `[B, R]`, 0 outside the mask; `None` without a penalty in the loss.
    pub kl: Option<Tensor>,
    /// The ratio of each token, or of its answer. `[B, R]`, 1 outside the mask.
    pub ratio: Tensor,
    /// Whether `A < 0` and the ratio is below its range. `[B, R]` bool, like the next.
    pub clipped_low: Tensor,
    /// Whether `A > 0` and the ratio is above its range.
    pub clipped_high: Tensor,
}

/// The loss of one or more answers, of which there may be more elsewhere: sums of it over the
/// parts of a batch are the batch's.
///
/// With `A` the advantage, `ρ` the [ratio](RatioLevel), `w` the importance weight:
/// `w · surrogate(ρ, A)` by [`Objective`], plus `kl_coef · kl`, times `ρ` where
/// [`KlWeight::Ratio`] says so.
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::Empty`] for a KL penalty without a reference.
pub fn group_loss(input: &GroupLossInput<'_>) -> Result<GroupLoss> {
    check(input)?;
    let outside = input.mask.logical_not();
    // Masked first: what is outside may be anything, and must not reach the gradient.
    let within = |t: &Tensor| t.masked_fill(&outside, 0.0);
    let logprobs = within(input.logprobs);
    let log_ratio = &logprobs - within(input.old_logprobs);
    let ratio = ratio(input.ratio, &log_ratio, input.mask);
    let advantages = input.advantages.unsqueeze(1);

    let mut token_loss = token_loss(input.objective, &ratio, &advantages, &logprobs);
    if let Some(weights) = input.importance_weights {
        token_loss *= weights;
    }
    let weights = input.token_weights.unsqueeze(1);
    // In the kind of the inputs, so that an f64 check is one.
    let sum = |x: &Tensor| within(&(x * &weights).expand_as(&logprobs)).sum(logprobs.kind());
    let policy = sum(&token_loss);
    let mut loss = policy.shallow_clone();
    let mut kl = None;
    if let KlPenalty::InLoss {
        kl_coef,
        estimator,
        weight,
    } = input.kl
        && let Some(ref_logprobs) = input.ref_logprobs
    {
        let mut estimate = estimator.estimate(&logprobs, &within(ref_logprobs));
        if weight == KlWeight::Ratio {
            estimate *= &ratio;
        }
        loss += sum(&estimate) * kl_coef;
        kl = Some(within(&estimate.detach()));
    }

    let _no_grad = tch::no_grad_guard();
    let (low, high) = input.objective.room();
    let ratio = ratio
        .detach()
        .expand_as(&logprobs)
        .masked_fill(&outside, 1.0);
    let inside = |t: Tensor| t.logical_and(input.mask);
    Ok(GroupLoss {
        loss,
        policy: policy.detach(),
        kl,
        clipped_low: inside(ratio.lt(1.0 - low).logical_and(&advantages.lt(0.0))),
        clipped_high: inside(ratio.gt(1.0 + high).logical_and(&advantages.gt(0.0))),
        ratio,
    })
}

/// `[B, R]` for tokens, `[B, 1]` for answers; carries the gradient.
fn ratio(level: RatioLevel, log_ratio: &Tensor, mask: &Tensor) -> Tensor {
    let sum = || log_ratio.sum_dim_intlist([1i64].as_slice(), true, None::<Kind>);
    let log_ratio = match level {
        RatioLevel::Token => log_ratio.shallow_clone(),
        RatioLevel::SequenceProduct => sum(),
        RatioLevel::SequenceMean => {
            let lengths = mask.sum_dim_intlist([1i64].as_slice(), true, log_ratio.kind());
            sum() / lengths.clamp_min(1.0)
        }
    };
    log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
}

/// Broadcasts to `[B, R]`.
fn token_loss(
    objective: Objective,
    ratio: &Tensor,
    advantages: &Tensor,
    logprobs: &Tensor,
) -> Tensor {
    match objective {
        Objective::Surrogate(clip) => surrogate(ratio, advantages, clip).loss,
        Objective::DetachedWeight { low, high } => {
            let weight = ratio.detach().clamp((1.0 - low).max(0.0), 1.0 + high);
            -(weight * advantages * logprobs)
        }
    }
}

fn check(input: &GroupLossInput<'_>) -> Result<()> {
    let logprobs = ("logprobs", input.logprobs);
    check_same_shape(logprobs, ("old_logprobs", input.old_logprobs))?;
    check_same_shape(logprobs, ("mask", input.mask))?;
    match (input.kl, input.ref_logprobs) {
        (KlPenalty::InLoss { .. }, None) => {
            return Err(Error::Empty {
                what: "GroupLossInput::ref_logprobs",
                help: "a KL penalty in the loss needs those of a reference",
            });
        }
        (_, Some(ref_logprobs)) => check_same_shape(logprobs, ("ref_logprobs", ref_logprobs))?,
        _ => {}
    }
    let rows = vec![input.mask.size()[0]];
    for (left, tensor) in [
        ("advantages", input.advantages),
        ("token_weights", input.token_weights),
    ] {
        if tensor.size() != rows {
            return Err(Error::ShapeMismatch {
                left,
                left_shape: tensor.size(),
                right: "the answers [B]",
                right_shape: rows,
            });
        }
    }
    if let Some(weights) = input.importance_weights
        && weights.size() != input.mask.size()
        && weights.size() != [rows[0], 1]
    {
        return Err(Error::ShapeMismatch {
            left: "importance_weights",
            left_shape: weights.size(),
            right: "the tokens [B, R], or [B, 1]",
            right_shape: input.mask.size(),
        });
    }
    Ok(())
}
