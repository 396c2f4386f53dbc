//! A reference that follows the policy.

use rlhf_core::{Error as CoreError, Policy};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// When and how far the reference follows the policy: `π_ref ← α π + (1 − α) π_ref` (TR-DPO,
/// Gorbatovski et al. 2024, arXiv 2404.09656, equation 5; `α = 1` is its hard update).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReferenceSync {
    /// Optimiser steps from one synchronisation to the next.
    pub every: u64,
    /// `α`, in `(0, 1]`.
    pub alpha: f64,
}

impl Default for ReferenceSync {
    /// Every 512 steps by 0.6: the paper's, and TRL's.
    fn default() -> Self {
        Self {
            every: 512,
            alpha: 0.6,
        }
    }
}

impl ReferenceSync {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        if self.every == 0 {
            return Err(CoreError::config("sync.every", 0, "must be at least 1").into());
        }
        if !(self.alpha > 0.0 && self.alpha <= 1.0) {
            let reason = "a number in (0, 1] is needed";
            return Err(CoreError::config("sync.alpha", self.alpha, reason).into());
        }
        Ok(())
    }

    /// Fails unless each of the policy's weights has its like in the reference.
    pub(crate) fn check(policy: &dyn Policy, reference: Option<&dyn Policy>) -> Result<()> {
        let refuse = |reason: String| Err(Error::NotSynchronisable { reason });
        let Some(reference) = reference else {
            return refuse("there is no reference model here".into());
        };
        let theirs = reference.named_parameters();
        for (name, weight) in policy.named_parameters() {
            let Some((_, like)) = theirs.iter().find(|(n, _)| *n == name) else {
                return refuse(format!("it shows no weight {name}"));
            };
            if like.size() != weight.size() {
                let (found, expected) = (like.size(), weight.size());
                return refuse(format!("{name} is {found:?} there and {expected:?} here"));
            }
            if like.data_ptr() == weight.data_ptr() {
                return refuse(format!("its {name} is the policy's own"));
            }
        }
        Ok(())
    }

    /// Moves the reference towards the policy; 16-bit weights are mixed in f32.
    pub(crate) fn apply(&self, policy: &dyn Policy, reference: &dyn Policy) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let theirs = reference.named_parameters();
        for (name, weight) in policy.named_parameters() {
            if let Some((_, like)) = theirs.iter().find(|(n, _)| *n == name) {
                self.mix(&weight, like).map_err(CoreError::from)?;
            }
        }
        Ok(())
    }

    fn mix(&self, weight: &Tensor, like: &Tensor) -> Result<(), tch::TchError> {
        let target = weight
            .f_to_device(like.device())?
            .f_to_kind(Kind::Float)?
            .f_mul_scalar(self.alpha)?;
        let kept = like
            .f_to_kind(Kind::Float)?
            .f_mul_scalar(1.0 - self.alpha)?;
        let mut like = like.shallow_clone();
        like.f_copy_(&target.f_add(&kept)?)
    }
}
