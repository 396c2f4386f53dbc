//! Generalised advantage estimation.

use rlhf_core::{Error, Result, check_same_shape};
use tch::Tensor;

/// What [`gae`] reads. All tensors are `[B, S]`, `S` steps.
#[derive(Debug)]
pub struct GaeInput<'a> {
    /// Reward of each step, f32.
    pub rewards: &'a Tensor,
    /// Value of the state before each step, f32.
    pub values: &'a Tensor,
    /// The steps of each episode: a prefix of each row, bool. The state after the last of them
    /// is worth 0.
    pub mask: &'a Tensor,
    /// Discount.
    pub gamma: f64,
    /// Decay of the weights of ever longer looks ahead.
    pub lam: f64,
}

/// What [`gae`] returns. Both `[B, S]` f32, 0 outside the mask.
#[derive(Debug)]
pub struct Gae {
    /// `A_t`, not whitened.
    pub advantages: Tensor,
    /// `A_t + V_t`: what the value model is to learn.
    pub returns: Tensor,
}

/// `δ_t = r_t + γ V_{t+1} − V_t`, `A_t = δ_t + γ λ A_{t+1}`
/// (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16).
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn gae(input: &GaeInput<'_>) -> Result<Gae> {
    check_same_shape(("rewards", input.rewards), ("values", input.values))?;
    check_same_shape(("rewards", input.rewards), ("mask", input.mask))?;
    let size = input.rewards.size();
    let &[rows, steps] = size.as_slice() else {
        return Err(Error::ShapeMismatch {
            left: "rewards",
            left_shape: size,
            right: "[B, S]",
            right_shape: vec![-1, -1],
        });
    };
    let outside = input.mask.logical_not();
    let rewards = input.rewards.masked_fill(&outside, 0.0);
    let values = input.values.masked_fill(&outside, 0.0);
    let mut next_value = values.new_zeros([rows], (values.kind(), values.device()));
    let mut advantage = next_value.copy();
    let mut advantages = Vec::with_capacity(steps as usize);
    for t in (0..steps).rev() {
        let value = values.select(1, t);
        let delta = rewards.select(1, t) + next_value * input.gamma - &value;
        advantage = delta + advantage * (input.gamma * input.lam);
        advantages.push(advantage.shallow_clone());
        next_value = value;
    }
    advantages.reverse();
    let advantages = match steps {
        0 => rewards.zeros_like(),
        _ => Tensor::stack(&advantages, 1),
    };
    Ok(Gae {
        returns: &advantages + values,
        advantages,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // One episode of two steps and one of none; what is outside the mask must not leak in.
        let out = gae(&GaeInput {
            rewards: &Tensor::from_slice2(&[[1f64, 2.0, 50.0], [50.0, 50.0, 50.0]]),
            values: &Tensor::from_slice2(&[[3f64, 5.0, 70.0], [70.0, 70.0, f64::NAN]]),
            mask: &Tensor::from_slice2(&[[true, true, false], [false, false, false]]),
            gamma: 0.9,
            lam: 0.5,
        })
        .unwrap();
        let row = Vec::<f64>::try_from(out.advantages.view(-1)).unwrap();
        let last = 2.0 - 5.0;
        let first = 1.0 + 0.9 * 5.0 - 3.0 + 0.45 * last;
        assert_eq!(row, [first, last, 0.0, 0.0, 0.0, 0.0]);
        let returns = Vec::<f64>::try_from(out.returns.view(-1)).unwrap();
        assert_eq!(returns[..3], [first + 3.0, last + 5.0, 0.0]);
    }
}
