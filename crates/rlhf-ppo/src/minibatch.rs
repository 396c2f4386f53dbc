//! What an optimiser step reports, and what it is added up from.

use rlhf_core::{Error as CoreError, Replicas};
use tch::{Kind, Tensor};

use crate::named_sums::named_sums;
use crate::rollout::Microbatch;
use crate::{Guarded, Result};

/// What one optimiser step did: token means over its whole minibatch, however it was split into
/// microbatches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinibatchStats {
    /// `policy_loss + vf_coef · (value_loss + cost_value_loss) − entropy_coef · entropy`, plus
    /// `kl_coef · kl_loss` and `ptx.coef · ptx_loss` where they are part of it.
    pub loss: f64,
    /// The clipped surrogate loss.
    pub policy_loss: f64,
    /// The clipped value loss, its factor ½ included.
    pub value_loss: f64,
    /// The same of all cost critics together; 0 without one.
    pub cost_value_loss: f64,
    /// The KL from the reference as a loss, nats per token; 0 where it is part of the reward.
    pub kl_loss: f64,
    /// Cross-entropy of pretraining texts, nats per token, where there are any.
    pub ptx_loss: Option<f64>,
    /// `½ (logprob − old_logprob)²`, nats.
    pub approx_kl: f64,
    /// Share of the tokens whose ratio was clipped.
    pub policy_clipfrac: f64,
    /// Share of the tokens whose loss the dual clip bounded.
    pub dual_clipfrac: f64,
    /// Share of the states whose value was clipped.
    pub value_clipfrac: f64,
    /// Mean of the ratios.
    pub ratio: f64,
    /// Population variance of the ratios.
    pub ratio_var: f64,
    /// Entropy of the policy's distribution, nats.
    pub entropy: f64,
    /// Norm of all gradients before clipping; infinite where no step was taken.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Whether the step was skipped because a gradient was not finite at its loss scale.
    pub skipped: bool,
    /// The guard that kept the step from being taken.
    pub guarded: Option<Guarded>,
    /// The step's loss scale, where there is one.
    pub loss_scale: Option<f64>,
}

/// How many tokens and states a whole minibatch has: the denominators of its means.
#[derive(Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) tokens: f64,
    pub(crate) states: f64,
}

impl Counts {
    pub(crate) fn of(microbatches: &[Microbatch]) -> Self {
        Self {
            tokens: microbatches.iter().map(Microbatch::tokens).sum::<i64>() as f64,
            states: microbatches.iter().map(Microbatch::states).sum::<i64>() as f64,
        }
    }
}

/// What a model's part of a microbatch adds to the minibatch's loss, and to its statistics.
pub(crate) struct MicrobatchLoss {
    pub(crate) loss: Tensor,
    /// `[Parts::COUNT]` f64, detached, still on the device: see [`Parts`].
    pub(crate) parts: Tensor,
}

named_sums! {
    /// What the microbatches' statistics add up to.
    Parts {
        loss,
        policy_loss,
        value_loss,
        cost_value_loss,
        kl_loss,
        /// Divergence from the policy of the rollout, as the guard estimates it.
        moved,
        approx_kl,
        clipfrac,
        dual_clipfrac,
        value_clipfrac,
        ratio,
        ratio_deviation,
        entropy,
    }
}

impl MicrobatchLoss {
    /// What is not among `parts` is 0.
    pub(crate) fn new(loss: Tensor, parts: Parts<Option<&Tensor>>) -> Result<Self> {
        let parts = Parts {
            loss: Some(&loss),
            ..parts
        };
        let nothing = Tensor::f_zeros([], (Kind::Double, loss.device()))?;
        let row = parts.into_array().into_iter().map(|part| match part {
            Some(value) => {
                let value = value.f_detach()?.f_to_device(loss.device())?;
                value.f_to_kind(Kind::Double)
            }
            None => Ok(nothing.shallow_clone()),
        });
        Ok(Self {
            parts: Tensor::f_stack(&row.collect::<Result<Vec<_>, _>>()?, 0)?,
            loss,
        })
    }
}

impl Parts<f64> {
    /// Adds up what the microbatches of all processes contributed; waits for the device.
    pub(crate) fn sum(parts: &[Tensor], replicas: &Replicas) -> rlhf_core::Result<Self> {
        let own = match parts.is_empty() {
            true => vec![0.0; Self::COUNT],
            false => {
                let sum = Tensor::f_stack(parts, 0)?;
                let sum = sum.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
                Vec::<f64>::try_from(sum)?
            }
        };
        Self::from_sums(replicas.sum::<CoreError>(Ok(own))?)
    }
}

impl MinibatchStats {
    /// Of a step that was taken, or skipped by loss scaling.
    pub(crate) fn new(parts: Parts<f64>, update: &rlhf_scale::UpdateStats) -> Self {
        Self {
            loss: update.loss,
            grad_norm: update.grad_norm,
            skipped: update.skipped,
            loss_scale: update.loss_scale,
            ..Self::untaken(parts, update.lr)
        }
    }

    /// Of a step that a guard kept from being taken.
    pub(crate) fn guarded(parts: Parts<f64>, lr: f64, guarded: Guarded) -> Self {
        Self {
            guarded: Some(guarded),
            ..Self::untaken(parts, lr)
        }
    }

    fn untaken(parts: Parts<f64>, lr: f64) -> Self {
        Self {
            loss: parts.loss,
            policy_loss: parts.policy_loss,
            value_loss: parts.value_loss,
            cost_value_loss: parts.cost_value_loss,
            kl_loss: parts.kl_loss,
            ptx_loss: None,
            approx_kl: parts.approx_kl,
            policy_clipfrac: parts.clipfrac,
            dual_clipfrac: parts.dual_clipfrac,
            value_clipfrac: parts.value_clipfrac,
            ratio: parts.ratio,
            ratio_var: parts.ratio_deviation - (parts.ratio - 1.0).powi(2),
            entropy: parts.entropy,
            grad_norm: f64::INFINITY,
            lr,
            skipped: false,
            guarded: None,
            loss_scale: None,
        }
    }

    /// Whether the optimiser moved.
    pub fn was_taken(&self) -> bool {
        !self.skipped && self.guarded.is_none()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn microbatches_add_up_and_ratios_have_a_variance() {
        // Ratios 1.5 and 1.5 in one microbatch, 1 in the other: mean 4/3, variance 1/18.
        let part = |parts: Parts<f64>| Tensor::from_slice(&parts.into_array());
        let parts = [
            part(Parts {
                loss: 9.0,
                policy_loss: 0.1,
                value_loss: 0.2,
                cost_value_loss: 1.0,
                kl_loss: 2.0,
                moved: 3.0,
                approx_kl: 0.3,
                clipfrac: 0.0,
                dual_clipfrac: 0.25,
                value_clipfrac: 0.5,
                ratio: 1.0,
                ratio_deviation: 0.5 / 3.0,
                entropy: 1.0,
            }),
            part(Parts {
                loss: 9.0,
                policy_loss: 0.2,
                value_loss: 0.3,
                cost_value_loss: 1.5,
                kl_loss: 2.5,
                moved: 3.5,
                approx_kl: 0.4,
                clipfrac: 0.1,
                dual_clipfrac: 0.25,
                value_clipfrac: 0.0,
                ratio: 1.0 / 3.0,
                ratio_deviation: 0.0,
                entropy: 2.0,
            }),
        ];
        let update = rlhf_scale::UpdateStats {
            loss: 7.0,
            grad_norm: 8.0,
            lr: 9.0,
            step: 1,
            ..rlhf_scale::UpdateStats::default()
        };
        let sum = Parts::sum(&parts, &Replicas::alone()).unwrap();
        assert_eq!(sum.moved, 6.5);
        let stats = MinibatchStats::new(sum, &update);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} is not {b}");
        close(stats.policy_loss, 0.3);
        close(stats.value_loss, 0.5);
        close(stats.cost_value_loss, 2.5);
        close(stats.kl_loss, 4.5);
        close(stats.approx_kl, 0.7);
        close(stats.policy_clipfrac, 0.1);
        close(stats.dual_clipfrac, 0.5);
        close(stats.value_clipfrac, 0.5);
        close(stats.ratio, 4.0 / 3.0);
        close(stats.ratio_var, 1.0 / 18.0);
        close(stats.entropy, 3.0);
        assert_eq!((stats.loss, stats.grad_norm, stats.lr), (7.0, 8.0, 9.0));
        let stopped = MinibatchStats::guarded(sum, 9.0, Guarded::Kl);
        assert_eq!((stopped.loss, stopped.was_taken()), (18.0, false));
    }
}
