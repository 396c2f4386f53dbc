//! When an optimiser step is not taken.

use rlhf_core::Error;
use serde::{Deserialize, Serialize};

use crate::KlEstimator;

/// Conditions under which a minibatch's step is not taken, looked at after its forward passes and
/// before the optimiser moves. A step that is not taken changes nothing: the schedule waits too.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpdateGuards {
    /// The policy has moved too far from the one of the rollout.
    pub kl: Option<KlGuard>,
    /// The mean ratio of a minibatch is above this: its samples say nothing about this policy any
    /// more. TRL 0.11 has 10 (`ratio_threshold`).
    pub max_mean_ratio: Option<f64>,
}

/// A bound on how far a rollout may carry the policy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlGuard {
    /// The most divergence from the policy of the rollout, nats **per token**, as a mean over the
    /// minibatch. TRL 0.11 has 1.5 times its `target_kl`.
    pub limit: f64,
    /// How it is estimated: of `d = old_logprob − logprob`, since the tokens are the old policy's.
    /// TRL 0.11 has `K1`, which may come out negative; `K3` may not.
    pub estimator: KlEstimator,
    /// What happens above the limit.
    pub action: OnKl,
}

/// What happens to a minibatch that is too far from the rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnKl {
    /// Its step is skipped; the others go on.
    SkipStep,
    /// The update ends, epochs that are left included (early stopping).
    EndUpdate,
}

/// Which guard kept a step from being taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Guarded {
    /// [`UpdateGuards::kl`].
    Kl,
    /// [`UpdateGuards::max_mean_ratio`].
    Ratio,
}

impl UpdateGuards {
    /// Fails for limits that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], naming the field.
    pub fn validate(&self) -> rlhf_core::Result<()> {
        let positive = |field, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(Error::config(field, value, "a positive number is needed")),
        };
        if let Some(kl) = &self.kl {
            positive("guards.kl.limit", kl.limit)?;
        }
        match self.max_mean_ratio {
            Some(ratio) if !(ratio.is_finite() && ratio > 1.0) => {
                let reason = "a number above 1: the ratios of an unmoved policy are 1";
                Err(Error::config("guards.max_mean_ratio", ratio, reason))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn any(&self) -> bool {
        self.kl.is_some() || self.max_mean_ratio.is_some()
    }

    /// Looks at a minibatch's mean divergence and mean ratio.
    pub(crate) fn look(&self, kl: f64, ratio: f64) -> Option<Guarded> {
        if self.kl.is_some_and(|guard| kl > guard.limit) {
            return Some(Guarded::Kl);
        }
        let too_far = self.max_mean_ratio.is_some_and(|most| ratio > most);
        too_far.then_some(Guarded::Ratio)
    }

    pub(crate) fn ends_update(&self, guarded: Guarded) -> bool {
        let ends = |guard: KlGuard| guard.action == OnKl::EndUpdate;
        guarded == Guarded::Kl && self.kl.is_some_and(ends)
    }
}
