//! The coefficient of the KL penalty, and how it changes.

use rlhf_core::Error;
use serde::{Deserialize, Serialize};

/// How the coefficient of the KL penalty is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum KlControl {
    /// One coefficient throughout.
    Fixed {
        /// The coefficient, per nat.
        kl_coef: f64,
    },
    /// Follows a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2):
    /// `β ← β·(1 + clip(KL / target − 1, ±0.2)·n / horizon)`.
    ///
    /// **KL is measured per sequence**: nats summed over a whole response, averaged over the
    /// responses. A target meant for a mean per *token* (OpenRLHF) is smaller by the length of
    /// the responses.
    Adaptive {
        /// The coefficient to start with, per nat.
        init_kl_coef: f64,
        /// The wanted KL, in nats per sequence.
        target: f64,
        /// Sequences over which the coefficient may change by a fifth.
        horizon: f64,
    },
}

impl KlControl {
    /// The adaptive control with the values of Ziegler et al.: start 0.2, target 6 nats per
    /// sequence, horizon 10,000 sequences.
    pub const fn ziegler() -> Self {
        Self::Adaptive {
            init_kl_coef: 0.2,
            target: 6.0,
            horizon: 10_000.0,
        }
    }

    /// Fails for numbers that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], naming the field.
    pub fn validate(&self) -> rlhf_core::Result<()> {
        let non_negative = |field, value: f64| {
            (value.is_finite() && value >= 0.0)
                .then_some(())
                .ok_or_else(|| Error::config(field, value, "a number that is not negative"))
        };
        let positive = |field, value: f64| {
            (value.is_finite() && value > 0.0)
                .then_some(())
                .ok_or_else(|| Error::config(field, value, "a positive number is needed"))
        };
        match *self {
            Self::Fixed { kl_coef } => non_negative("kl_control.kl_coef", kl_coef),
            Self::Adaptive {
                init_kl_coef,
                target,
                horizon,
            } => {
                positive("kl_control.init_kl_coef", init_kl_coef)?;
                positive("kl_control.target", target)?;
                positive("kl_control.horizon", horizon)
            }
        }
    }
}

/// A [`KlControl`] at work: holds the coefficient of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlController {
    control: KlControl,
    kl_coef: f64,
}

impl KlController {
    /// A controller at its first coefficient.
    pub fn new(control: KlControl) -> Self {
        let kl_coef = match control {
            KlControl::Fixed { kl_coef } => kl_coef,
            KlControl::Adaptive { init_kl_coef, .. } => init_kl_coef,
        };
        Self { control, kl_coef }
    }

    /// The coefficient of the moment.
    pub fn kl_coef(&self) -> f64 {
        self.kl_coef
    }

    /// Sets the coefficient that a saved run had reached.
    pub fn restore(&mut self, kl_coef: f64) {
        self.kl_coef = kl_coef;
    }

    /// Takes in what was measured: the KL in nats **per sequence**, averaged over `sequences`.
    /// A KL that is not finite leaves the coefficient alone.
    pub fn observe(&mut self, kl_per_sequence: f64, sequences: usize) {
        let KlControl::Adaptive {
            target, horizon, ..
        } = self.control
        else {
            return;
        };
        if kl_per_sequence.is_finite() {
            let error = (kl_per_sequence / target - 1.0).clamp(-0.2, 0.2);
            self.kl_coef *= 1.0 + error * sequences as f64 / horizon;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn fixed_stays_and_adaptive_follows() {
        let mut fixed = KlController::new(KlControl::Fixed { kl_coef: 0.05 });
        fixed.observe(100.0, 512);
        assert_eq!(fixed.kl_coef(), 0.05);

        let mut adaptive = KlController::new(KlControl::ziegler());
        adaptive.observe(6.6, 1000); // a tenth too much, on a tenth of the horizon
        assert!((adaptive.kl_coef() - 0.2 * 1.01).abs() < 1e-12);
        adaptive.observe(f64::NAN, 1000);
        assert!((adaptive.kl_coef() - 0.2 * 1.01).abs() < 1e-12);
        // However far off, as if it were a fifth.
        for (kl, factor) in [(600.0, 1.02), (0.0, 0.98)] {
            let mut adaptive = KlController::new(KlControl::ziegler());
            adaptive.observe(kl, 1000);
            assert!((adaptive.kl_coef() - 0.2 * factor).abs() < 1e-12);
        }
    }

    #[test]
    fn a_target_of_zero_is_refused() {
        let control = KlControl::Adaptive {
            init_kl_coef: 0.2,
            target: 0.0,
            horizon: 10.0,
        };
        let message = control.validate().unwrap_err().to_string();
        assert!(message.contains("kl_control.target"), "{message}");
    }
}
