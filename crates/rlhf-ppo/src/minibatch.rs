//! The joined loss of policy and value model.

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, ValueModel, masked_sum};
use tch::{Kind, Tensor};

use crate::rollout::Microbatch;
use crate::{PolicyLossInput, PpoConfig, Result, ValueLossInput, policy_loss, value_loss};

/// What one optimiser step did: token means over its whole minibatch, however it was split into
/// microbatches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinibatchStats {
    /// `policy_loss + vf_coef · value_loss − entropy_coef · entropy`.
    pub loss: f64,
    /// The clipped surrogate loss.
    pub policy_loss: f64,
    /// The clipped value loss, its factor ½ included.
    pub value_loss: f64,
    /// `½ (logprob − old_logprob)²`, nats.
    pub approx_kl: f64,
    /// Share of the tokens whose ratio was clipped.
    pub policy_clipfrac: f64,
    /// Share of the states whose value was clipped.
    pub value_clipfrac: f64,
    /// Mean of the ratios.
    pub ratio: f64,
    /// Population variance of the ratios.
    pub ratio_var: f64,
    /// Entropy of the policy's distribution, nats.
    pub entropy: f64,
    /// Norm of all gradients before clipping; infinite where the step was skipped.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Whether the step was skipped because a gradient was not finite at its loss scale.
    pub skipped: bool,
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

/// A microbatch's share of the minibatch's loss, and of its statistics.
pub(crate) struct MicrobatchLoss {
    pub(crate) loss: Tensor,
    /// `[8]` f64, detached, still on the device: see [`MinibatchStats::new`].
    pub(crate) parts: Tensor,
}

pub(crate) fn microbatch_loss(
    policy: &dyn Policy,
    value_model: &dyn ValueModel,
    config: &PpoConfig,
    microbatch: &Microbatch,
    counts: Counts,
) -> Result<MicrobatchLoss> {
    let options = LogprobOptions {
        temperature: config.temperature(),
        entropy: true,
    };
    let new = policy.logprobs(&microbatch.batch, &options)?;
    let values = value_model.values(&microbatch.batch)?;

    let device = new.logprobs.device();
    let mask = microbatch.mask.to_device(device);
    let policy_part = policy_loss(&PolicyLossInput {
        logprobs: &new.logprobs,
        old_logprobs: &microbatch.old_logprobs.to_device(device),
        advantages: &microbatch.advantages.to_device(device),
        mask: &mask,
        weights: None,
        clip: config.clip(),
        tokens: counts.tokens,
    })?;
    let value_part = value_loss(&ValueLossInput {
        values: &values,
        old_values: &microbatch.old_values.to_device(values.device()),
        returns: &microbatch.returns.to_device(values.device()),
        mask: &microbatch.value_mask.to_device(values.device()),
        cliprange_value: config.cliprange_value,
        states: counts.states,
    })?;
    let entropy = new.entropy.ok_or(CoreError::Empty {
        what: "TokenLogprobs::entropy",
        help: "a policy returns it where LogprobOptions::entropy asks for it",
    })?;
    let entropy = masked_sum(&entropy, &mask) / counts.tokens;

    let mut loss = &policy_part.loss + value_part.loss.to_device(device) * config.vf_coef;
    if config.entropy_coef > 0.0 {
        loss -= &entropy * config.entropy_coef;
    }
    let parts = [
        &policy_part.loss,
        &value_part.loss,
        &policy_part.approx_kl,
        &policy_part.clipfrac,
        &value_part.clipfrac,
        &policy_part.ratio,
        &policy_part.ratio_deviation,
        &entropy,
    ]
    .map(|t| t.detach().to_device(device).to_kind(Kind::Double));
    Ok(MicrobatchLoss {
        loss,
        parts: Tensor::stack(&parts, 0),
    })
}

impl MinibatchStats {
    /// Adds up what the microbatches contributed; waits for the device.
    pub(crate) fn new(
        parts: &[Tensor],
        update: &rlhf_scale::UpdateStats,
    ) -> rlhf_core::Result<Self> {
        let sum =
            Tensor::f_stack(parts, 0)?.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
        let sum = Vec::<f64>::try_from(sum)?;
        let ratio = sum[5];
        Ok(Self {
            loss: update.loss,
            policy_loss: sum[0],
            value_loss: sum[1],
            approx_kl: sum[2],
            policy_clipfrac: sum[3],
            value_clipfrac: sum[4],
            ratio,
            ratio_var: sum[6] - (ratio - 1.0).powi(2),
            entropy: sum[7],
            grad_norm: update.grad_norm,
            lr: update.lr,
            skipped: update.skipped,
            loss_scale: update.loss_scale,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn microbatches_add_up_and_ratios_have_a_variance() {
        // Ratios 1.5 and 1.5 in one microbatch, 1 in the other: mean 4/3, variance 1/18.
        let parts = [
            Tensor::from_slice(&[0.1, 0.2, 0.3, 0.0, 0.5, 3.0 / 3.0, 0.5 / 3.0, 1.0]),
            Tensor::from_slice(&[0.2, 0.3, 0.4, 0.1, 0.0, 1.0 / 3.0, 0.0, 2.0]),
        ];
        let update = rlhf_scale::UpdateStats {
            loss: 7.0,
            grad_norm: 8.0,
            lr: 9.0,
            step: 1,
            ..rlhf_scale::UpdateStats::default()
        };
        let stats = MinibatchStats::new(&parts, &update).unwrap();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} is not {b}");
        close(stats.policy_loss, 0.3);
        close(stats.value_loss, 0.5);
        close(stats.approx_kl, 0.7);
        close(stats.policy_clipfrac, 0.1);
        close(stats.value_clipfrac, 0.5);
        close(stats.ratio, 4.0 / 3.0);
        close(stats.ratio_var, 1.0 / 18.0);
        close(stats.entropy, 3.0);
        assert_eq!((stats.loss, stats.grad_norm, stats.lr), (7.0, 8.0, 9.0));
    }
}
