//! The losses of policy and critics.

use std::cell::RefCell;
use std::ops::Range;

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, ValueModel, masked_sum};
use tch::Tensor;

use crate::critic::logprobs;
use crate::first_pass::FirstPass;
use crate::minibatch::{Counts, MicrobatchLoss, Parts};
use crate::rollout::{Microbatch, Targets};
use crate::{
    Critic, KlPlacement, PolicyLossInput, PpoConfig, Result, ValueLoss, ValueLossInput,
    policy_loss, value_loss,
};

/// The models whose losses are joined.
pub(crate) struct Learners<'a, P: ?Sized, V: ?Sized> {
    pub(crate) policy: &'a P,
    pub(crate) critic: &'a V,
    /// In the order of the microbatches' `costs`.
    pub(crate) cost_critics: Vec<&'a dyn ValueModel>,
    pub(crate) config: &'a PpoConfig,
    pub(crate) kl_coef: f64,
    /// What is known of the first microbatch.
    pub(crate) first_pass: RefCell<Option<FirstPass>>,
}

impl<P: Policy, V: Critic<P>> Learners<'_, P, V> {
    /// The losses of a microbatch, by graphs: the policy's, with that of a critic on its trunk, and
    /// that of every other critic. One graph is done with before the next begins, so that there are the
    /// activations of one model at a time: a critic's that are there already go first. All are one where
    /// a model is not trained, and has none.
    pub(crate) fn graphs(&self) -> Vec<Range<usize>> {
        let critic = (!self.critic.shares_trunk()).then(|| self.critic.named_parameters());
        let others = self.cost_critics.iter().map(|c| c.named_parameters());
        let trained: Vec<bool> = std::iter::once(self.policy.named_parameters())
            .chain(critic)
            .chain(others)
            .map(|parameters| !parameters.is_empty())
            .collect();
        if trained.contains(&false) {
            return std::iter::once(0..trained.len()).collect();
        }
        let mut graphs: Vec<_> = (0..trained.len()).map(|model| model..model + 1).collect();
        if self.first_pass.borrow().is_some() && !self.critic.shares_trunk() {
            graphs.swap(0, 1);
        }
        graphs
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
            sum.loss += more.loss.to_device(device);
            sum.parts += more.parts.to_device(device);
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
            let values = match self.first_pass.take() {
                Some(pass) => pass.values,
                None => self.critic.values_with(self.policy, &microbatch.batch)?,
            };
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
                let first = self.first_pass.take();
                let (new, values) = match first.and_then(|pass| Some((pass.scores?, pass.values))) {
                    Some(first) => first,
                    None => self
                        .critic
                        .scores_with(self.policy, batch, kept, &options)?,
                };
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

        let mut loss = of_policy.loss.copy();
        let value_part = |values| self.value_loss(values, &microbatch.values, microbatch, counts);
        let of_values = values.as_ref().map(value_part).transpose()?;
        if let Some(of_values) = &of_values {
            loss += of_values.loss.to_device(device) * config.vf_coef;
            parts.value_loss = Some(&of_values.loss);
            parts.value_clipfrac = Some(&of_values.clipfrac);
        }
        if config.entropy_coef > 0.0 {
            loss -= &entropy * config.entropy_coef;
        }
        let kl_loss = (config.kl_placement == KlPlacement::Loss).then(|| {
            let kl = config.kl_of(&new.logprobs, &on_device(&microbatch.ref_logprobs));
            masked_sum(&kl, &mask) / counts.tokens
        });
        if let Some(kl_loss) = &kl_loss {
            loss += kl_loss * self.kl_coef;
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
