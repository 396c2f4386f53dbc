//! Testing the policy's constraints on held-out prompts.

use std::sync::Arc;

use rlhf_core::{Error as CoreError, GenerationConfig, Policy};

use crate::{ConstraintSafety, Critic, PpoTrainer, Result, SafetyReport, completions, measure};

impl<P: Policy, V: Critic<P>> PpoTrainer<P, V> {
    /// Samples one response to each of `prompts`, which should be none that was trained on, and
    /// counts how often each constraint is broken. Random numbers follow from `seed`; take another
    /// than the run's own. Nothing is changed.
    ///
    /// ```no_run
    /// # fn f<P: rlhf_ppo::core::Policy, V: rlhf_ppo::core::ValueModel>(
    /// #     trainer: &rlhf_ppo::PpoTrainer<P, V>, held_out: &[std::sync::Arc<[i64]>],
    /// # ) -> rlhf_ppo::Result<()> {
    /// let report = trainer.safety_test(held_out, 7)?;
    /// if !report.passes(0.05, 0.95)? {
    ///     println!("more than 1 in 20 may be unsafe: {:?}", report.upper_bounds(0.95)?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// No constraint, no prompt; the constraints' and the policy's own.
    pub fn safety_test(&self, prompts: &[Arc<[i64]>], seed: u64) -> Result<SafetyReport> {
        if self.constraints.is_empty() {
            let (what, help) = ("the constraints", "a safety test needs at least one");
            return Err(CoreError::Empty { what, help }.into());
        }
        let _no_grad = tch::no_grad_guard();
        // Several answers to one prompt would not be independent.
        let generation = GenerationConfig {
            samples_per_prompt: 1,
            ..self.config.generation.clone()
        };
        let detokenizer = self.detokenizer.as_deref();
        let written =
            completions::write(&self.policy, &generation, detokenizer, prompts, (seed, 0))?;
        let constraints = self
            .constraints
            .iter()
            .map(|constraint| {
                let costs = measure::costs(constraint, &written)?;
                let above = costs.iter().filter(|&&cost| cost > constraint.threshold);
                Ok(ConstraintSafety {
                    name: constraint.name.clone(),
                    violations: above.count(),
                    mean_cost: costs.iter().sum::<f64>() / costs.len() as f64,
                })
            })
            .collect::<Result<_>>()?;
        Ok(SafetyReport {
            samples: written.batch.len(),
            constraints,
        })
    }
}
