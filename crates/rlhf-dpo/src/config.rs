//! Options of training on comparisons.

use rlhf_core::Error as CoreError;
use rlhf_scale::{AdamWConfig, UpdateConfig};
use serde::{Deserialize, Serialize};

use crate::{Error, Objective, ReferenceSync, Result, ScoreOptions};

/// How a [`DpoTrainer`](crate::DpoTrainer) trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DpoConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// What is minimised.
    pub objective: Objective,
    /// Whether the reference follows the policy; `None`: it never changes.
    pub sync: Option<ReferenceSync>,
    /// Pairs that are in memory at once. The result of a step does not depend on it, but for
    /// rounding. Losses that look at the whole batch (AOT's sort, BCO's running mean) cost a
    /// forward pass more where a step has more pairs than this.
    pub microbatch_size: usize,
}

impl Default for DpoConfig {
    /// TRL's `DPOConfig`: learning rate 1e-6, sigmoid loss, β 0.1, 8 pairs at once. Its schedule is
    /// linear; this one is constant until it is told how many steps there will be.
    fn default() -> Self {
        Self {
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: 1e-6,
                    ..AdamWConfig::default()
                },
                ..UpdateConfig::default()
            },
            objective: Objective::default(),
            sync: None,
            microbatch_size: 8,
        }
    }
}

impl DpoConfig {
    /// The default with another objective, or one loss.
    pub fn of(objective: impl Into<Objective>) -> Self {
        Self {
            objective: objective.into(),
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field; an option that a loss cannot use, with the
    /// reason.
    pub fn validate(&self) -> Result<()> {
        self.update.validate()?;
        self.objective.validate()?;
        if let Some(sync) = &self.sync {
            sync.validate()?;
        }
        match self.microbatch_size {
            0 => Err(CoreError::config("microbatch_size", 0, "must be at least 1").into()),
            _ => Ok(()),
        }
    }

    /// How the reference scores pairs for this training.
    pub fn score_options(&self) -> ScoreOptions {
        ScoreOptions {
            batch_size: self.microbatch_size,
            ld_alpha: self.objective.ld_alpha,
        }
    }

    pub(crate) fn check_weights(&self, weights: impl Iterator<Item = f64>) -> Result<f64> {
        let weights: Vec<f64> = weights.collect();
        let total: f64 = weights.iter().sum();
        if !(total.is_finite() && total > 0.0) {
            let reason = "the weights of a batch must add up to a positive number";
            return Err(CoreError::config("the sum of the pairs' weights", total, reason).into());
        }
        if self.objective.sorts() && weights.iter().any(|w| *w != weights[0]) {
            return Err(Error::Unusable {
                loss: "AOT".into(),
                option: "weight of pairs",
                reason: "it sorts the batch, so that a loss belongs to a quantile and a weight to \
                         a pair; give all pairs the same weight",
            });
        }
        Ok(total)
    }
}
