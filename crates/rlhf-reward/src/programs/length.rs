//! How long an answer should be.

use rlhf_core::Error as CoreError;

use super::TextReward;
use crate::Result;

/// What length is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LengthUnit {
    /// Runs of what is not white space.
    Words,
    /// Unicode scalar values.
    Characters,
}

/// 0 for an answer within `tolerance` of `target`; then less, by 1 for each further `target`:
/// `−max(0, |length − target| − tolerance) / target`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LengthTarget {
    target: usize,
    tolerance: usize,
    unit: LengthUnit,
}

impl LengthTarget {
    /// A target of at least 1.
    ///
    /// # Errors
    /// An invalid configuration: a target of 0.
    pub fn new(target: usize, tolerance: usize, unit: LengthUnit) -> Result<Self> {
        if target == 0 {
            return Err(CoreError::config("target", target, "must be at least 1").into());
        }
        Ok(Self {
            target,
            tolerance,
            unit,
        })
    }
}

impl TextReward for LengthTarget {
    fn reward(&self, _prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        let length = match self.unit {
            LengthUnit::Words => answer.split_whitespace().count(),
            LengthUnit::Characters => answer.chars().count(),
        };
        let excess = length.abs_diff(self.target).saturating_sub(self.tolerance);
        Ok(-(excess as f64) / self.target as f64)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let words = LengthTarget::new(4, 1, LengthUnit::Words).unwrap();
        for (answer, reward) in [
            ("one two  three four", 0.0),
            ("one two three", 0.0),
            ("", -0.75),
            ("1 2 3 4 5 6 7 8 9", -1.0),
        ] {
            assert_eq!(words.reward("", answer).unwrap(), reward, "{answer}");
        }
        let characters = LengthTarget::new(2, 0, LengthUnit::Characters).unwrap();
        assert_eq!(characters.reward("", "äöü").unwrap(), -0.5);
        assert!(LengthTarget::new(0, 0, LengthUnit::Words).is_err());
    }
}
