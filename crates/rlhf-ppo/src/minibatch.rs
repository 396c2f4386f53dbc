//! The joined loss of policy and critics.

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, Replicas, ValueModel, masked_sum};
use tch::{Kind, Tensor};

use crate::rollout::{Microbatch, Targets};
use crate::{
    Critic, Guarded, KlPlacement, PolicyLossInput, PpoConfig, Result, ValueLoss, ValueLossInput,
    policy_loss, value_loss,
};

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

/// A microbatch's share of the minibatch's loss, and of its statistics.
pub(crate) struct MicrobatchLoss {
    pub(crate) loss: Tensor,
    /// `[PARTS]` f64, detached, still on the device: see [`Parts`].
    pub(crate) parts: Tensor,
}

/// What the microbatches' statistics add up to.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Parts {
    loss: f64,
    policy_loss: f64,
    value_loss: f64,
    cost_value_loss: f64,
    kl_loss: f64,
    /// Divergence from the policy of the rollout, as the guard estimates it.
    pub(crate) moved: f64,
    approx_kl: f64,
    clipfrac: f64,
    dual_clipfrac: f64,
    value_clipfrac: f64,
    pub(crate) ratio: f64,
    ratio_deviation: f64,
    entropy: f64,
}

const PARTS: usize = 13;

impl Parts {
    /// Adds up what the microbatches of all processes contributed; waits for the device.
    pub(crate) fn sum(parts: &[Tensor], replicas: &Replicas) -> rlhf_core::Result<Self> {
        let own = match parts.is_empty() {
            true => vec![0.0; PARTS],
            false => {
                let sum = Tensor::f_stack(parts, 0)?;
                let sum = sum.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
                Vec::<f64>::try_from(sum)?
            }
        };
        let sum = replicas.sum::<CoreError>(Ok(own))?;
        let [
            loss,
            policy_loss,
            value_loss,
            cost_value_loss,
            kl_loss,
            moved,
            approx_kl,
            clipfrac,
            dual_clipfrac,
            value_clipfrac,
            ratio,
            ratio_deviation,
            entropy,
        ] = sum[..]
        else {
            return Err(CoreError::LengthMismatch {
                left: "a microbatch's statistics",
                left_len: sum.len(),
                right: "their names",
                right_len: PARTS,
            });
        };
        Ok(Self {
            loss,
            policy_loss,
            value_loss,
            cost_value_loss,
            kl_loss,
            moved,
            approx_kl,
            clipfrac,
            dual_clipfrac,
            value_clipfrac,
            ratio,
            ratio_deviation,
            entropy,
        })
    }
}

/// The models whose losses are joined.
pub(crate) struct Learners<'a, P: ?Sized, V: ?Sized> {
    pub(crate) policy: &'a P,
    pub(crate) critic: &'a V,
    /// In the order of the microbatches' `costs`.
    pub(crate) cost_critics: Vec<&'a dyn ValueModel>,
    pub(crate) config: &'a PpoConfig,
    pub(crate) kl_coef: f64,
}

impl<P: Policy, V: Critic<P>> Learners<'_, P, V> {
    pub(crate) fn loss(&self, microbatch: &Microbatch, counts: Counts) -> Result<MicrobatchLoss> {
        let config = self.config;
        let options = LogprobOptions {
            temperature: config.temperature(),
            entropy: true,
        };
        let (batch, kept) = (&microbatch.batch, microbatch.kept.as_deref());
        let (new, values) = self
            .critic
            .scores_with(self.policy, batch, kept, &options)?;

        let device = new.logprobs.device();
        let on_device = |t: &Tensor| t.to_device(device);
        let mask = on_device(&microbatch.mask);
        let old_logprobs = on_device(&microbatch.old_logprobs);
        let policy_part = policy_loss(&PolicyLossInput {
            logprobs: &new.logprobs,
            old_logprobs: &old_logprobs,
            advantages: &on_device(&microbatch.advantages),
            mask: &mask,
            weights: microbatch.weights.as_ref().map(on_device).as_ref(),
            clip: config.clip(),
            tokens: counts.tokens,
        })?;
        let value_part = self.value_loss(&values, &microbatch.values, microbatch, counts)?;
        let entropy = new.entropy.ok_or(CoreError::Empty {
            what: "TokenLogprobs::entropy",
            help: "a policy returns it where LogprobOptions::entropy asks for it",
        })?;
        let entropy = masked_sum(&entropy, &mask) / counts.tokens;

        let mut loss = &policy_part.loss + value_part.loss.to_device(device) * config.vf_coef;
        if config.entropy_coef > 0.0 {
            loss -= &entropy * config.entropy_coef;
        }
        let nothing = policy_part.loss.detach().zeros_like();
        let mut kl_loss = nothing.shallow_clone();
        if config.kl_placement == KlPlacement::Loss {
            let kl = config.kl_of(&new.logprobs, &on_device(&microbatch.ref_logprobs));
            kl_loss = masked_sum(&kl, &mask) / counts.tokens;
            loss += &kl_loss * self.kl_coef;
        }
        let mut cost_value_loss = nothing.copy();
        for (critic, targets) in self.cost_critics.iter().zip(&microbatch.costs) {
            let values = critic.values(batch)?;
            let part = self.value_loss(&values, targets, microbatch, counts)?;
            let part = part.loss.to_device(device);
            loss += &part * config.vf_coef;
            cost_value_loss += part.detach();
        }
        let moved = match &config.guards.kl {
            Some(guard) => {
                let _no_grad = tch::no_grad_guard();
                let kl = guard.estimator.estimate(&old_logprobs, &new.logprobs);
                masked_sum(&kl, &mask) / counts.tokens
            }
            None => nothing,
        };
        let parts: [&Tensor; PARTS] = [
            &loss,
            &policy_part.loss,
            &value_part.loss,
            &cost_value_loss,
            &kl_loss,
            &moved,
            &policy_part.approx_kl,
            &policy_part.clipfrac,
            &policy_part.dual_clipfrac,
            &value_part.clipfrac,
            &policy_part.ratio,
            &policy_part.ratio_deviation,
            &entropy,
        ];
        let parts = parts.map(|t| t.detach().to_device(device).to_kind(Kind::Double));
        Ok(MicrobatchLoss {
            parts: Tensor::stack(&parts, 0),
            loss,
        })
    }

    fn value_loss(
        &self,
        values: &Tensor,
        targets: &Targets,
        microbatch: &Microbatch,
        counts: Counts,
    ) -> Result<ValueLoss> {
        let device = values.device();
        Ok(value_loss(&ValueLossInput {
            values,
            old_values: &targets.old.to_device(device),
            returns: &targets.returns.to_device(device),
            mask: &microbatch.value_mask.to_device(device),
            cliprange_value: self.config.cliprange_value,
            states: counts.states,
        })?)
    }
}

impl PpoConfig {
    /// The estimate of the divergence of each token, clamped.
    pub(crate) fn kl_of(&self, logprobs: &Tensor, ref_logprobs: &Tensor) -> Tensor {
        let kl = self.kl_estimator.estimate(logprobs, ref_logprobs);
        match self.kl_clamp {
            Some(limit) => kl.clamp(-limit, limit),
            None => kl,
        }
    }
}

impl MinibatchStats {
    /// Of a step that was taken, or skipped by loss scaling.
    pub(crate) fn new(parts: Parts, update: &rlhf_scale::UpdateStats) -> Self {
        Self {
            loss: update.loss,
            grad_norm: update.grad_norm,
            skipped: update.skipped,
            loss_scale: update.loss_scale,
            ..Self::untaken(parts, update.lr)
        }
    }

    /// Of a step that a guard kept from being taken.
    pub(crate) fn guarded(parts: Parts, lr: f64, guarded: Guarded) -> Self {
        Self {
            guarded: Some(guarded),
            ..Self::untaken(parts, lr)
        }
    }

    fn untaken(parts: Parts, lr: f64) -> Self {
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
        let part = |numbers: [f64; PARTS]| Tensor::from_slice(&numbers);
        let parts = [
            part([
                9.0,
                0.1,
                0.2,
                1.0,
                2.0,
                3.0,
                0.3,
                0.0,
                0.25,
                0.5,
                1.0,
                0.5 / 3.0,
                1.0,
            ]),
            part([
                9.0,
                0.2,
                0.3,
                1.5,
                2.5,
                3.5,
                0.4,
                0.1,
                0.25,
                0.0,
                1.0 / 3.0,
                0.0,
                2.0,
            ]),
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
