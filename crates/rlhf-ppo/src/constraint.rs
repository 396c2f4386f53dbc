//! Constraints: costs with a limit, and what happens above it.

use rlhf_core::{ConstraintModel, Error, ValueModel};
use serde::{Deserialize, Serialize};

use crate::{LagrangianConfig, Multiplier};

/// A cost and the most of it that a completion may have.
///
/// Whatever the rule, every completion is counted in the statistics: how many are above the
/// threshold, and what they cost on average.
pub struct Constraint {
    /// Names the constraint in statistics, errors and checkpoints.
    pub name: String,
    /// Computes the costs.
    pub model: Box<dyn ConstraintModel>,
    /// The greatest cost that is allowed: a completion above it breaks the constraint. A
    /// [`Lagrangian`](ConstraintRule::Lagrangian) holds the *mean* cost there, unless it names
    /// [another](LagrangianConfig::target).
    pub threshold: f64,
    /// What happens above it.
    pub rule: ConstraintRule,
    /// Says how much cost is still to come, for a [`Lagrangian`](ConstraintRule::Lagrangian) of
    /// PPO.
    pub(crate) critic: Option<Box<dyn ValueModel>>,
}

/// What a constraint does to the update.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ConstraintRule {
    /// A completion above the threshold takes no part in the update: its tokens count neither in
    /// the losses nor in whitening nor in any denominator.
    #[default]
    SkipSample,
    /// No completion of a rollout takes part if the share of those above the threshold is more
    /// than `max_violation_rate`; 0 is the strictest.
    SkipBatch {
        /// Share of a rollout, in `[0, 1)`.
        max_violation_rate: f64,
    },
    /// `coef` times the cost above the threshold is taken off the score.
    Shaping {
        /// Score a unit of cost.
        coef: f64,
    },
    /// The mean cost is held at the threshold by a price that follows it (PPO-Lagrangian).
    Lagrangian(LagrangianConfig),
}

impl Constraint {
    /// A constraint whose violations [are not learnt from](ConstraintRule::SkipSample).
    pub fn new(
        name: impl Into<String>,
        model: impl ConstraintModel + 'static,
        threshold: f64,
    ) -> Self {
        Self {
            name: name.into(),
            model: Box::new(model),
            threshold,
            rule: ConstraintRule::SkipSample,
            critic: None,
        }
    }

    /// The same with another rule. For a Lagrangian in [`PpoTrainer`](crate::PpoTrainer) see
    /// [`lagrangian`](Self::lagrangian), which takes the critic that it needs;
    /// [`GrpoTrainer`](crate::GrpoTrainer) needs none.
    #[must_use]
    pub fn with_rule(mut self, rule: ConstraintRule) -> Self {
        self.rule = rule;
        self
    }

    /// A constraint on the mean cost by a multiplier; `critic` learns how much cost is still to
    /// come, as the value model does of the reward.
    pub fn lagrangian(
        name: impl Into<String>,
        model: impl ConstraintModel + 'static,
        threshold: f64,
        config: LagrangianConfig,
        critic: impl ValueModel + 'static,
    ) -> Self {
        Self {
            rule: ConstraintRule::Lagrangian(config),
            critic: Some(Box::new(critic)),
            ..Self::new(name, model, threshold)
        }
    }

    /// Fails for numbers that make no sense, and for a Lagrangian without a critic, which PPO
    /// needs.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> rlhf_core::Result<()> {
        self.validate_rule()?;
        match (self.rule, &self.critic) {
            (ConstraintRule::Lagrangian(_), None) => Err(Error::config(
                "constraint.rule",
                "lagrangian",
                "needs a critic of the cost: see Constraint::lagrangian",
            )),
            _ => Ok(()),
        }
    }

    /// Fails for what makes no sense where answers are each other's baseline: a critic.
    pub(crate) fn validate_without_critic(&self) -> rlhf_core::Result<()> {
        self.validate_rule()?;
        match self.critic {
            Some(_) => Err(Error::config(
                "constraint.critic",
                &self.name,
                "has nothing to do where answers are each other's baseline: give \
                 Constraint::with_rule(ConstraintRule::Lagrangian(..)), without a critic",
            )),
            None => Ok(()),
        }
    }

    fn validate_rule(&self) -> rlhf_core::Result<()> {
        if !self.threshold.is_finite() {
            let reason = "a finite number is needed";
            return Err(Error::config(
                "constraint.threshold",
                self.threshold,
                reason,
            ));
        }
        match self.rule {
            ConstraintRule::SkipSample => Ok(()),
            ConstraintRule::SkipBatch { max_violation_rate } => {
                match (0.0..1.0).contains(&max_violation_rate) {
                    true => Ok(()),
                    false => Err(Error::config(
                        "constraint.max_violation_rate",
                        max_violation_rate,
                        "a number in [0, 1) is needed",
                    )),
                }
            }
            ConstraintRule::Shaping { coef } => match coef.is_finite() && coef >= 0.0 {
                true => Ok(()),
                false => {
                    let reason = "a number that is not negative";
                    Err(Error::config("constraint.coef", coef, reason))
                }
            },
            ConstraintRule::Lagrangian(config) => config.validate(),
        }
    }

    /// The multiplier to begin with, where the rule has one.
    pub(crate) fn multiplier(&self) -> Option<Multiplier> {
        match self.rule {
            ConstraintRule::Lagrangian(config) => Some(Multiplier::new(config)),
            _ => None,
        }
    }

    /// Share of the costs that are above the threshold.
    pub(crate) fn violation_rate(&self, costs: &[f64]) -> f64 {
        let above = costs.iter().filter(|&&cost| cost > self.threshold).count();
        above as f64 / costs.len().max(1) as f64
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint")
            .field("name", &self.name)
            .field("threshold", &self.threshold)
            .field("rule", &self.rule)
            .finish_non_exhaustive()
    }
}
