//! What a step is predicted to need, part by part.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The bytes that a training step is predicted to need: what there is of each kind, and the peak of
/// each phase with everything that is alive in it.
///
/// It counts tensors, and kernels that are compiled for them. What a process has beside (libtorch's
/// code, the buffers of its kernels, the tokens) is some tens to hundreds of MiB, whatever the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// Weights, frozen ones included.
    pub weights: u64,
    /// Moments, and f32 masters of 16-bit weights.
    pub optimizer: u64,
    /// Averaged weights.
    pub averages: u64,
    /// What else stays: other models, as the caller stated.
    pub others: u64,
    /// Compiled kernels that stay: oneDNN's for products of 16 bits on a processor.
    pub kernels: u64,
    /// One gradient for every trainable weight, f32 where they are summed.
    pub gradients: u64,
    /// Activations that are kept between forward and backward.
    pub activations: u64,
    /// Logits and what log-probabilities need beside them, at the most at a time.
    pub logits: u64,
    /// Keys and values of a generation phase.
    pub kv_cache: u64,
    /// Peak of forward.
    pub forward: u64,
    /// Peak of backward.
    pub backward: u64,
    /// Peak of the optimiser's step.
    pub update: u64,
    /// Peak of the generation phase; 0 if there is none.
    pub generation: u64,
}

impl MemoryPlan {
    /// The most bytes at a time.
    pub fn peak(&self) -> u64 {
        let phases = [self.forward, self.backward, self.update, self.generation];
        phases.into_iter().max().unwrap_or(0)
    }

    /// What stays from step to step: weights, optimiser, averages, kernels and the caller's own.
    pub fn resident(&self) -> u64 {
        self.weights + self.optimizer + self.averages + self.others + self.kernels
    }

    /// Fails if the peak does not fit `budget` bytes.
    ///
    /// # Errors
    /// [`Error::OverBudget`] with all the numbers.
    pub fn check(&self, budget: u64) -> Result<()> {
        if self.peak() <= budget {
            return Ok(());
        }
        Err(Error::OverBudget {
            budget,
            plan: Box::new(*self),
        })
    }
}

/// A line for every part and for every phase, in MiB.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, bytes) in [
            ("weights", self.weights),
            ("optimizer", self.optimizer),
            ("averages", self.averages),
            ("others", self.others),
            ("kernels", self.kernels),
            ("gradients", self.gradients),
            ("activations", self.activations),
            ("logits", self.logits),
            ("kv cache", self.kv_cache),
            ("peak of forward", self.forward),
            ("peak of backward", self.backward),
            ("peak of update", self.update),
            ("peak of generation", self.generation),
        ] {
            if bytes > 0 {
                writeln!(f, "{name:<19}{:>10} MiB", mib(bytes))?;
            }
        }
        write!(f, "{:<19}{:>10} MiB", "peak", mib(self.peak()))
    }
}

/// With one decimal.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

/// Host memory that new tensors could take without swapping, in bytes; `None` where the system does
/// not say (only Linux does).
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(1024 * kib)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_plan_over_budget_is_refused_with_its_numbers() {
        let plan = MemoryPlan {
            weights: 3 << 20,
            forward: 5 << 20,
            backward: 7 << 20,
            update: 6 << 20,
            ..MemoryPlan::default()
        };
        plan.check(7 << 20).unwrap();
        let error = plan.check((7 << 20) - 1).unwrap_err();
        assert!(
            matches!(&error, Error::OverBudget { budget, plan: p } if *budget == (7 << 20) - 1 && **p == plan),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains("7.0 MiB") && text.contains("peak of backward"),
            "{text}"
        );
        assert!(!text.contains("kv cache"), "{text}");
    }
}
