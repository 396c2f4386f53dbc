//! The price of a constraint, which follows its cost.

use std::collections::VecDeque;

use rlhf_core::{Error, Result, check_same_shape};
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// How the multiplier `λ` of a constraint moves: descent on `−λ (mean cost − threshold)` with
/// respect to `log λ`, so `log λ ← log λ + lr λ (mean cost − threshold)`
/// (Safe RLHF: Dai et al. 2023, arXiv 2310.12773, and its released code).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LagrangianConfig {
    /// The mean cost to hold; `None` for the constraint's threshold, above which *one* completion
    /// breaks it. Where costs are probabilities of an offence, that may be ½ and this 0.02.
    pub target: Option<f64>,
    /// The multiplier to begin with.
    pub init: f64,
    /// Learning rate of its logarithm.
    pub lr: f64,
    /// Completions, the latest ones, whose mean cost counts.
    pub window: usize,
    /// The most that the multiplier becomes. Its step grows with it, so a cost that stays too high
    /// carries it off in a few steps; `None` for no bound but e²⁰.
    pub max: Option<f64>,
    /// Steps before it first moves.
    pub delay: u64,
}

impl Default for LagrangianConfig {
    /// Those of Safe RLHF's training script: 1, learning rate 0.1, the last 128 completions, at most
    /// 5, no delay.
    fn default() -> Self {
        Self {
            target: None,
            init: 1.0,
            lr: 0.1,
            window: 128,
            max: Some(5.0),
            delay: 0,
        }
    }
}

impl LagrangianConfig {
    /// Fails for numbers that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], naming the field.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("lagrangian.init", self.init),
            ("lagrangian.lr", self.lr),
            ("lagrangian.max", self.max.unwrap_or(1.0)),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::config(field, value, "a positive number is needed"));
            }
        }
        if let Some(target) = self.target.filter(|target| !target.is_finite()) {
            let reason = "a finite number is needed";
            return Err(Error::config("lagrangian.target", target, reason));
        }
        match self.window {
            0 => Err(Error::config(
                "lagrangian.window",
                0,
                "at least 1 is needed",
            )),
            _ => Ok(()),
        }
    }
}

/// Bound of the multiplier's logarithm, so that nothing overflows.
const LOG_LIMIT: f64 = 20.0;

/// A [`LagrangianConfig`] at work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Multiplier {
    config: LagrangianConfig,
    log_lambda: f64,
    costs: VecDeque<f64>,
    steps: u64,
}

impl Multiplier {
    /// A multiplier that has seen nothing.
    pub fn new(config: LagrangianConfig) -> Self {
        Self {
            log_lambda: config.init.ln(),
            config,
            costs: VecDeque::new(),
            steps: 0,
        }
    }

    /// `λ`.
    pub fn value(&self) -> f64 {
        self.log_lambda.exp()
    }

    /// Takes in the costs of a rollout and moves towards holding their mean at the target, or at
    /// `threshold` where there is none.
    pub fn observe(&mut self, costs: &[f64], threshold: f64) {
        self.costs.extend(costs);
        let old = self.costs.len().saturating_sub(self.config.window);
        self.costs.drain(..old);
        self.steps += 1;
        if self.steps <= self.config.delay || self.costs.is_empty() {
            return;
        }
        let mean = self.costs.iter().sum::<f64>() / self.costs.len() as f64;
        self.log_lambda +=
            self.config.lr * self.value() * (mean - self.config.target.unwrap_or(threshold));
        let most = self.config.max.map_or(LOG_LIMIT, f64::ln);
        self.log_lambda = self.log_lambda.clamp(-LOG_LIMIT, most);
    }
}

/// What [`lagrangian_advantages`] reads. All tensors are `[B, S]`.
#[derive(Debug)]
pub struct LagrangianInput<'a> {
    /// `A_R`, of the reward.
    pub rewards: &'a Tensor,
    /// `A_C` of each constraint, with its multiplier.
    pub costs: &'a [(f64, Tensor)],
}

/// `(A_R − Σ λ A_C) / (1 + Σ λ)` (Safe RLHF: Dai et al. 2023, arXiv 2310.12773, for any number of constraints).
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn lagrangian_advantages(input: &LagrangianInput<'_>) -> Result<Tensor> {
    let mut sum = input.rewards.shallow_clone();
    let mut weights = 1.0;
    for (multiplier, advantages) in input.costs {
        check_same_shape(("rewards", input.rewards), ("costs", advantages))?;
        sum = sum.f_sub(&(advantages * *multiplier))?;
        weights += multiplier;
    }
    Ok(sum / weights)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The numbers of Safe RLHF's code: `SGD(lr)` on `−(mean − d) · exp(log λ)`.
    #[test]
    fn the_multiplier_by_hand() {
        let mut multiplier = Multiplier::new(LagrangianConfig {
            target: None,
            init: 2.0,
            lr: 0.1,
            window: 3,
            max: Some(2.5),
            delay: 1,
        });
        multiplier.observe(&[9.0, 1.0], 0.5); // delayed
        assert!((multiplier.value() - 2.0).abs() < 1e-12);
        multiplier.observe(&[2.0, 3.0], 1.5); // of 1, 2, 3: mean 2
        let want = 2.0 * (0.1 * 2.0 * 0.5f64).exp();
        assert!((multiplier.value() - want).abs() < 1e-12);
        let mut other = multiplier.clone();
        other.config.target = Some(2.0); // the mean of the window, 2.5 now, less this
        other.observe(&[2.5; 3], 1.5);
        assert!((other.value() - 2.5f64.min(want * (0.1 * want * 0.5).exp())).abs() < 1e-12);
        multiplier.observe(&[50.0; 3], 1.5);
        assert!((multiplier.value() - 2.5).abs() < 1e-12);
        multiplier.observe(&[0.5; 3], 1.5);
        assert!((multiplier.value() - 2.5 * (-0.25f64).exp()).abs() < 1e-12);
    }

    #[test]
    fn no_multiplier_overflows() {
        let unbounded = LagrangianConfig {
            lr: 10.0,
            max: None,
            ..LagrangianConfig::default()
        };
        for cost in [1e6, -1e6] {
            let mut multiplier = Multiplier::new(unbounded);
            for _ in 0..50 {
                multiplier.observe(&[cost], 0.0);
            }
            assert!(multiplier.value().is_finite() && multiplier.value() > 0.0);
        }
    }

    #[test]
    fn advantages_by_hand() {
        let tensor = |x: &[f64]| Tensor::from_slice(x).unsqueeze(0);
        let costs = [(1.0, tensor(&[2.0, -2.0])), (2.0, tensor(&[1.0, 0.0]))];
        let out = lagrangian_advantages(&LagrangianInput {
            rewards: &tensor(&[8.0, 2.0]),
            costs: &costs,
        });
        assert_eq!(
            Vec::<f64>::try_from(out.unwrap().view(-1)).unwrap(),
            [1.0, 1.0]
        );
        let error = lagrangian_advantages(&LagrangianInput {
            rewards: &tensor(&[8.0]),
            costs: &costs,
        });
        assert!(matches!(error, Err(Error::ShapeMismatch { .. })));
    }
}
