//! The clipped regression loss of the value model.

use rlhf_core::{Result, check_same_shape, masked_sum};
use tch::{Kind, Tensor};

use crate::policy_loss::check_denominator;

/// What [`value_loss`] reads. All tensors are `[B, S]`, `S` states.
#[derive(Debug)]
pub struct ValueLossInput<'a> {
    /// Values under the model being trained, f32; carry the gradient.
    pub values: &'a Tensor,
    /// Values at the time of the rollout.
    pub old_values: &'a Tensor,
    /// What is to be learnt.
    pub returns: &'a Tensor,
    /// States that take part, bool.
    pub mask: &'a Tensor,
    /// Values count within `old_value ± cliprange_value`.
    pub cliprange_value: f64,
    /// States that take part in the **whole minibatch**: the denominator of every reduction.
    pub states: f64,
}

/// What [`value_loss`] returns: scalars, each `Σ_mask x / states`, so that microbatches add up.
#[derive(Debug)]
pub struct ValueLoss {
    /// The loss, its factor ½ included, `vf_coef` not; differentiable.
    pub loss: Tensor,
    /// Share of the states where the clipped value is the worse one. Detached.
    pub clipfrac: Tensor,
}

/// `½ max((V − R)², (clip(V, V_old ± cliprange_value) − R)²)`, summed over the mask and divided
/// by `states` (OpenAI baselines' `ppo2`; Huang et al. 2022, "The 37 implementation details of
/// PPO", detail 9).
///
/// # Errors
/// [`ShapeMismatch`](rlhf_core::Error::ShapeMismatch);
/// [`Empty`](rlhf_core::Error::Empty) unless `states` is positive.
pub fn value_loss(input: &ValueLossInput<'_>) -> Result<ValueLoss> {
    for (name, tensor) in [
        ("old_values", input.old_values),
        ("returns", input.returns),
        ("mask", input.mask),
    ] {
        check_same_shape(("values", input.values), (name, tensor))?;
    }
    check_denominator(input.states)?;
    let outside = input.mask.logical_not();
    let inside = |t: &Tensor| t.masked_fill(&outside, 0.0);
    let values = inside(input.values);
    let (old, returns) = (inside(input.old_values), inside(input.returns));
    let clipped_values = values.clamp_tensor(
        Some(&old - input.cliprange_value),
        Some(&old + input.cliprange_value),
    );
    let unclipped = (&values - &returns).square();
    let clipped = (clipped_values - &returns).square();
    let loss = masked_sum(&unclipped.maximum(&clipped), input.mask) * (0.5 / input.states);
    let _no_grad = tch::no_grad_guard();
    let worse = clipped.gt_tensor(&unclipped).to_kind(Kind::Float);
    Ok(ValueLoss {
        loss,
        clipfrac: masked_sum(&worse, input.mask) / input.states,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let values = Tensor::from_slice2(&[[1f64, 0.1, f64::NAN]]).set_requires_grad(true);
        let out = value_loss(&ValueLossInput {
            values: &values,
            old_values: &Tensor::from_slice2(&[[0f64, 0.0, 0.0]]),
            returns: &Tensor::from_slice2(&[[1f64, 1.0, 1.0]]),
            mask: &Tensor::from_slice2(&[[true, true, false]]),
            cliprange_value: 0.2,
            states: 2.0,
        })
        .unwrap();
        // The first is clipped to 0.2: (0.2 − 1)²; the second stays at 0.1: (0.1 − 1)².
        let want = 0.25 * (0.64 + 0.81);
        assert!((f64::try_from(&out.loss).unwrap() - want).abs() < 1e-6);
        assert_eq!(f64::try_from(&out.clipfrac).unwrap(), 0.5);
        out.loss.backward();
        let gradient = Vec::<f64>::try_from(values.grad().view(-1)).unwrap();
        assert_eq!(gradient[0], 0.0);
        assert!((gradient[1] + 0.45).abs() < 1e-6);
        assert_eq!(gradient[2], 0.0);
    }
}
