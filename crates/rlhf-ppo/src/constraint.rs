//! Constraints: completions that must not be learnt from.

use rlhf_core::ConstraintModel;

/// A cost and the most of it that a completion may have.
///
/// A completion whose cost is above the threshold takes no part in the update: its tokens count
/// neither in the losses nor in whitening nor in any denominator. It is still counted in the
/// statistics.
pub struct Constraint {
    /// Names the constraint in statistics and errors.
    pub name: String,
    /// Computes the costs.
    pub model: Box<dyn ConstraintModel>,
    /// The greatest cost that is allowed.
    pub threshold: f64,
}

impl Constraint {
    /// A constraint of the given parts.
    pub fn new(
        name: impl Into<String>,
        model: impl ConstraintModel + 'static,
        threshold: f64,
    ) -> Self {
        Self {
            name: name.into(),
            model: Box::new(model),
            threshold,
        }
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint")
            .field("name", &self.name)
            .field("threshold", &self.threshold)
            .finish_non_exhaustive()
    }
}
