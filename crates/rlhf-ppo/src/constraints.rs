//! The constraints of a trainer, taken together.

use rlhf_core::{Completions, Error as CoreError, Stats};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Constraint, ConstraintRule, ConstraintSafety, Multiplier, Result, SafetyReport, measure,
};

/// Constraints in the order they were added, with the prices of those that have one.
#[derive(Default)]
pub(crate) struct Constraints {
    all: Vec<Constraint>,
    multipliers: Vec<Option<Multiplier>>,
}

/// What the constraints say of a batch of completions.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// Which completions may be learnt from.
    pub(crate) allowed: Vec<bool>,
    /// The constraint that forbids all of them.
    pub(crate) skipped_by: Option<String>,
    /// What [`Shaping`](ConstraintRule::Shaping) takes off each score.
    pub(crate) penalty: Vec<f64>,
    /// The multipliers with these costs taken in.
    pub(crate) multipliers: Vec<Option<Multiplier>>,
}

/// A constraint in a checkpoint: what it must be in the trainer that goes on, and its multiplier.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ConstraintState {
    name: String,
    threshold: f64,
    rule: ConstraintRule,
    multiplier: Option<Multiplier>,
}

impl Constraints {
    /// Adds a constraint that its trainer has validated.
    pub(crate) fn push(&mut self, constraint: Constraint) -> Result<()> {
        if self.place(&constraint.name).is_some() {
            let reason = "another constraint has this name";
            return Err(CoreError::config("constraint.name", &constraint.name, reason).into());
        }
        self.multipliers.push(constraint.multiplier());
        self.all.push(constraint);
        Ok(())
    }

    pub(crate) fn all(&self) -> &[Constraint] {
        &self.all
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.all
            .iter()
            .position(|constraint| constraint.name == name)
    }

    /// The price of the constraint of that name, where it has one.
    pub(crate) fn multiplier(&self, name: &str) -> Option<f64> {
        let place = self.place(name)?;
        self.multipliers[place].as_ref().map(Multiplier::value)
    }

    /// What every constraint's model says of every completion.
    pub(crate) fn costs(&self, completions: &Completions) -> Result<Vec<Vec<f64>>> {
        let of = |constraint| measure::costs(constraint, completions);
        self.all.iter().map(of).collect()
    }

    /// What follows from the costs of `rows` completions.
    pub(crate) fn verdict(&self, costs: &[Vec<f64>], rows: usize) -> Verdict {
        let mut verdict = Verdict {
            allowed: vec![true; rows],
            skipped_by: None,
            penalty: vec![0.0; rows],
            multipliers: self.multipliers.clone(),
        };
        for (place, (constraint, costs)) in self.all.iter().zip(costs).enumerate() {
            match constraint.rule {
                ConstraintRule::SkipSample => {
                    for (allowed, cost) in verdict.allowed.iter_mut().zip(costs) {
                        *allowed &= *cost <= constraint.threshold;
                    }
                }
                ConstraintRule::SkipBatch { max_violation_rate } => {
                    if constraint.violation_rate(costs) > max_violation_rate {
                        verdict.allowed.fill(false);
                        let name = || constraint.name.clone();
                        verdict.skipped_by.get_or_insert_with(name);
                    }
                }
                ConstraintRule::Shaping { coef } => {
                    for (penalty, cost) in verdict.penalty.iter_mut().zip(costs) {
                        *penalty += coef * (cost - constraint.threshold).max(0.0);
                    }
                }
                ConstraintRule::Lagrangian(_) => {
                    if let Some(multiplier) = &mut verdict.multipliers[place] {
                        multiplier.observe(costs, constraint.threshold);
                    }
                }
            }
        }
        verdict
    }

    /// Goes on with a price, of a rollout that was learnt from.
    pub(crate) fn set_multiplier(&mut self, place: usize, multiplier: &Multiplier) {
        self.multipliers[place] = Some(multiplier.clone());
    }

    /// Goes on with all the prices of a rollout.
    pub(crate) fn go_on_with(&mut self, multipliers: &[Option<Multiplier>]) {
        self.multipliers.clone_from_slice(multipliers);
    }

    /// How often each is broken by `written`, and what it costs.
    pub(crate) fn safety(&self, written: &Completions) -> Result<SafetyReport> {
        let costs = self.costs(written)?;
        let constraints = self.all.iter().zip(&costs).map(|(constraint, costs)| {
            let above = costs.iter().filter(|&&cost| cost > constraint.threshold);
            ConstraintSafety {
                name: constraint.name.clone(),
                violations: above.count(),
                mean_cost: mean(costs),
            }
        });
        Ok(SafetyReport {
            samples: written.batch.len(),
            constraints: constraints.collect(),
        })
    }

    /// Fails where there is nothing that a safety test could test.
    pub(crate) fn check_any(&self) -> Result<()> {
        match self.all.is_empty() {
            true => Err(CoreError::Empty {
                what: "the constraints",
                help: "a safety test needs at least one",
            }
            .into()),
            false => Ok(()),
        }
    }

    /// `PREFIX/constraint/NAME/…` of a rollout's costs.
    pub(crate) fn stats(
        &self,
        prefix: &str,
        costs: &[Vec<f64>],
        skipped_by: Option<&str>,
        multipliers: &[Option<Multiplier>],
    ) -> Stats {
        let mut stats = Stats::new();
        for (place, (constraint, costs)) in self.all.iter().zip(costs).enumerate() {
            let key = |what: &str| format!("{prefix}/constraint/{}/{what}", constraint.name);
            stats.insert(key("violation_rate"), constraint.violation_rate(costs));
            stats.insert(key("mean_cost"), mean(costs));
            if matches!(constraint.rule, ConstraintRule::SkipBatch { .. }) {
                let skipped = skipped_by == Some(constraint.name.as_str());
                stats.insert(key("batch_skipped"), f64::from(skipped));
            }
            if let Some(multiplier) = &multipliers[place] {
                stats.insert(key("multiplier"), multiplier.value());
            }
        }
        stats
    }

    /// What a checkpoint keeps.
    pub(crate) fn states(&self) -> Vec<ConstraintState> {
        let both = self.all.iter().zip(&self.multipliers);
        both.map(|(constraint, multiplier)| ConstraintState {
            name: constraint.name.clone(),
            threshold: constraint.threshold,
            rule: constraint.rule,
            multiplier: multiplier.clone(),
        })
        .collect()
    }

    /// What was saved and what there is, as JSON, where the two differ.
    pub(crate) fn difference(&self, saved: &[ConstraintState]) -> Option<(String, String)> {
        let rule = |state: &ConstraintState| serde_json::json!({"name": state.name, "threshold": state.threshold, "rule": state.rule});
        let rules = |states: &[ConstraintState]| states.iter().map(rule).collect::<Value>();
        let (saved, current) = (rules(saved), rules(&self.states()));
        (saved != current).then(|| (saved.to_string(), current.to_string()))
    }

    /// Goes on with saved constraints that do not [differ](Self::difference).
    pub(crate) fn restore(&mut self, saved: Vec<ConstraintState>) {
        self.multipliers = saved.into_iter().map(|state| state.multiplier).collect();
    }
}

fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len().max(1) as f64
}
