//! The joined loss of policy and critics.

use std::ops::Range;

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, Replicas, ValueModel, masked_sum};
use tch::{Kind, Tensor};

use crate::critic::logprobs;
use crate::named_sums::named_sums;
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
    fn new(loss: Tensor, parts: Parts<Option<&Tensor>>) -> Result<Self> {
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
    /// The losses of a microbatch, by graphs: the policy's, with that of a critic on its trunk, and
    /// that of every other critic. One graph is done with before the next begins, so that there are the
    /// activations of one model at a time. All are one where a model is not trained, and has none.
    pub(crate) fn graphs(&self) -> Vec<Range<usize>> {
        let critic = (!self.critic.shares_trunk()).then(|| self.critic.named_parameters());
        let others = self.cost_critics.iter().map(|c| c.named_parameters());
        let trained: Vec<bool> = std::iter::once(self.policy.named_parameters())
            .chain(critic)
            .chain(others)
            .map(|parameters| !parameters.is_empty())
            .collect();
        match trained.contains(&false) {
            true => vec![0..trained.len()],
            false => (0..trained.len()).map(|model| model..model + 1).collect(),
        }
    }

    /// The loss of one of the [`graphs`](Self::graphs) of a microbatch.
    pub(crate) fn loss(
        &self,
        microbatch: &Microbatch,
        graph: Range<usize>,
        counts: Counts,
    ) -> Result<MicrobatchLoss> {
        let mut sum = self.loss_of(microbatch, graph.start, counts)?;
        for model in graph.start + 1..graph.end {
            let more = self.loss_of(microbatch, model, counts)?;
            let device = sum.loss.device();
            sum.loss = sum.loss + more.loss.to_device(device);
            sum.parts = sum.parts + more.parts.to_device(device);
        }
        Ok(sum)
    }

    fn loss_of(
        &self,
        microbatch: &Microbatch,
        model: usize,
        counts: Counts,
    ) -> Result<MicrobatchLoss> {
        let first_cost = 1 + usize::from(!self.critic.shares_trunk());
        if model == 0 {
            return self.policy_loss(microbatch, counts);
        }
        if model < first_cost {
            let values = self.critic.values_with(self.policy, &microbatch.batch)?;
            let part = self.value_loss(&values, &microbatch.values, microbatch, counts)?;
            let parts = Parts {
                value_loss: Some(&part.loss),
                value_clipfrac: Some(&part.clipfrac),
                ..Parts::default()
            };
            return MicrobatchLoss::new(&part.loss * self.config.vf_coef, parts);
        }
        let cost = model - first_cost;
        let values = self.cost_critics[cost].values(&microbatch.batch)?;
        let part = self.value_loss(&values, &microbatch.costs[cost], microbatch, counts)?;
        let parts = Parts {
            cost_value_loss: Some(&part.loss),
            ..Parts::default()
        };
        MicrobatchLoss::new(&part.loss * self.config.vf_coef, parts)
    }

    /// The policy's, with that of a critic on its trunk.
    fn policy_loss(&self, microbatch: &Microbatch, counts: Counts) -> Result<MicrobatchLoss> {
        let config = self.config;
        let options = LogprobOptions {
            temperature: config.temperature(),
            entropy: true,
        };
        let (batch, kept) = (&microbatch.batch, microbatch.kept.as_deref());
        let (new, values) = match self.critic.shares_trunk() {
            true => {
                let (new, values) = self
                    .critic
                    .scores_with(self.policy, batch, kept, &options)?;
                (new, Some(values))
            }
            false => (logprobs(self.policy, batch, kept, &options)?, None),
        };

        let device = new.logprobs.device();
        let on_device = |t: &Tensor| t.to_device(device);
        let mask = on_device(&microbatch.mask);
        let old_logprobs = on_device(&microbatch.old_logprobs);
        let of_policy = policy_loss(&PolicyLossInput {
            logprobs: &new.logprobs,
            old_logprobs: &old_logprobs,
            advantages: &on_device(&microbatch.advantages),
            mask: &mask,
            weights: microbatch.weights.as_ref().map(on_device).as_ref(),
            clip: config.clip(),
            tokens: counts.tokens,
        })?;
        let entropy = new.entropy.ok_or(CoreError::Empty {
            what: "TokenLogprobs::entropy",
            help: "a policy returns it where LogprobOptions::entropy asks for it",
        })?;
        let entropy = masked_sum(&entropy, &mask) / counts.tokens;
        let mut parts = Parts {
            policy_loss: Some(&of_policy.loss),
            approx_kl: Some(&of_policy.approx_kl),
            clipfrac: Some(&of_policy.clipfrac),
            dual_clipfrac: Some(&of_policy.dual_clipfrac),
            ratio: Some(&of_policy.ratio),
            ratio_deviation: Some(&of_policy.ratio_deviation),
            entropy: Some(&entropy),
            ..Parts::default()
        };

        let mut loss = of_policy.loss.shallow_clone();
        let of_values = match &values {
            Some(values) => {
                Some(self.value_loss(values, &microbatch.values, microbatch, counts)?)
            }
            None => None,
        };
        if let Some(of_values) = &of_values {
            loss = loss + of_values.loss.to_device(device) * config.vf_coef;
            parts.value_loss = Some(&of_values.loss);
            parts.value_clipfrac = Some(&of_values.clipfrac);
        }
        if config.entropy_coef > 0.0 {
            loss = loss - &entropy * config.entropy_coef;
        }
        let kl_loss = (config.kl_placement == KlPlacement::Loss).then(|| {
            let kl = config.kl_of(&new.logprobs, &on_device(&microbatch.ref_logprobs));
            masked_sum(&kl, &mask) / counts.tokens
        });
        if let Some(kl_loss) = &kl_loss {
            loss = loss + kl_loss * self.kl_coef;
        }
        parts.kl_loss = kl_loss.as_ref();
        let moved = config.guards.kl.as_ref().map(|guard| {
            let _no_grad = tch::no_grad_guard();
            let kl = guard.estimator.estimate(&old_logprobs, &new.logprobs);
            masked_sum(&kl, &mask) / counts.tokens
        });
        parts.moved = moved.as_ref();
        MicrobatchLoss::new(loss, parts)
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
