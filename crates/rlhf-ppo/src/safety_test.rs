//! Testing the policy's constraints on held-out prompts.

use std::sync::Arc;

use rlhf_core::{Detokenize, GenerationConfig, Policy};

use crate::constraints::Constraints;
use crate::{Critic, GrpoTrainer, PpoTrainer, Result, SafetyReport, completions};

/// The policy's answers to `prompts`, one to each, against the constraints.
fn test(
    policy: &dyn Policy,
    constraints: &Constraints,
    generation: &GenerationConfig,
    detokenizer: Option<&dyn Detokenize>,
    (prompts, seed): (&[Arc<[i64]>], u64),
) -> Result<SafetyReport> {
    constraints.check_any()?;
    let _no_grad = tch::no_grad_guard();
    // Several answers to one prompt would not be independent.
    let generation = GenerationConfig {
        samples_per_prompt: 1,
        ..generation.clone()
    };
    let written = completions::write(policy, &generation, detokenizer, prompts, (seed, 0))?;
    constraints.safety(&written)
}

macro_rules! safety_tested {
    ([$($generics:tt)*] $trainer:ty, $(#[$doc:meta])*) => {
        impl<$($generics)*> $trainer {
            $(#[$doc])*
            ///
            /// # Errors
            /// No constraint, no prompt; the constraints' and the policy's own.
            pub fn safety_test(&self, prompts: &[Arc<[i64]>], seed: u64) -> Result<SafetyReport> {
                test(
                    &self.policy,
                    &self.constraints,
                    &self.config.generation,
                    self.detokenizer.as_deref(),
                    (prompts, seed),
                )
            }
        }
    };
}

safety_tested! {
    [P: Policy, V: Critic<P>] PpoTrainer<P, V>,
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
}

safety_tested! {
    [P: Policy] GrpoTrainer<P>,
    /// As [`PpoTrainer::safety_test`].
}
