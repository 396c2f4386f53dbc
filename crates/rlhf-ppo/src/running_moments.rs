//! The scale of the scores seen so far.

use rlhf_core::Error;
use serde::{Deserialize, Serialize};

/// Whether scores are brought to the scale of those seen so far, those of the rollout included
/// ([`RunningMoments`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreScaling {
    /// Left as they are.
    #[default]
    Off,
    /// Divided by the deviation: TRL 0.11's `use_score_scaling`.
    Divide,
    /// Less the mean, divided by the deviation: with `use_score_norm`.
    Standardize,
}

/// Added to the deviation: the machine epsilon of f32, as in TRL 0.11.
const EPSILON: f64 = f32::EPSILON as f64;

/// Count, mean and variance of numbers that come in batches, merged as Chan et al. 1983 do.
///
/// The variance of a batch is the population's, the deviation that scores are divided by has
/// `n − 1`: TRL 0.11's `RunningMoments`. It begins empty.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningMoments {
    count: f64,
    mean: f64,
    /// Population variance.
    variance: f64,
}

impl RunningMoments {
    /// Takes in a batch.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for a number that is not finite. Nothing is changed then.
    pub fn update(&mut self, batch: &[f64]) -> rlhf_core::Result<()> {
        if let Some(row) = batch.iter().position(|x| !x.is_finite()) {
            let (what, value) = ("the score", batch[row]);
            return Err(Error::NonFinite { what, row, value });
        }
        if batch.is_empty() {
            return Ok(());
        }
        let n = batch.len() as f64;
        let mean = batch.iter().sum::<f64>() / n;
        let variance = batch.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let total = self.count + n;
        let delta = mean - self.mean;
        let squares =
            variance * n + self.variance * self.count + delta.powi(2) * self.count * n / total;
        self.mean += delta * n / total;
        self.variance = squares / total;
        self.count = total;
        Ok(())
    }

    /// Numbers taken in.
    pub fn count(&self) -> f64 {
        self.count
    }

    /// Their mean.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Their deviation, with `n − 1`; 1 of fewer than two numbers, and where all were the same:
    /// nothing is known about the scale then.
    pub fn deviation(&self) -> f64 {
        let deviation = (self.variance * self.count / (self.count - 1.0).max(1.0)).sqrt();
        match self.count > 1.0 && deviation > 0.0 {
            true => deviation,
            false => 1.0,
        }
    }

    /// A number on the scale of those taken in.
    pub fn scale(&self, scaling: ScoreScaling, x: f64) -> f64 {
        match scaling {
            ScoreScaling::Off => x,
            ScoreScaling::Divide => x / (self.deviation() + EPSILON),
            ScoreScaling::Standardize => (x - self.mean) / (self.deviation() + EPSILON),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn batches_add_up_to_the_whole() {
        let numbers = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0];
        let mut moments = RunningMoments::default();
        for batch in [&numbers[..1], &numbers[1..1], &numbers[1..4], &numbers[4..]] {
            moments.update(batch).unwrap();
        }
        let mean = numbers.iter().sum::<f64>() / 8.0;
        let squares: f64 = numbers.iter().map(|x| (x - mean).powi(2)).sum();
        let deviation = (squares / 7.0).sqrt();
        assert_eq!(moments.count(), 8.0);
        assert!((moments.mean() - mean).abs() < 1e-12);
        assert!((moments.deviation() - deviation).abs() < 1e-12);
        let close = |scaling, want: f64| {
            let got = moments.scale(scaling, 4.0);
            assert!(
                (got - want).abs() < 1e-6,
                "{scaling:?}: {got} is not {want}"
            );
        };
        close(ScoreScaling::Off, 4.0);
        close(ScoreScaling::Divide, 4.0 / deviation);
        close(ScoreScaling::Standardize, (4.0 - mean) / deviation);
    }

    #[test]
    fn one_number_has_no_scale_and_nan_changes_nothing() {
        let mut moments = RunningMoments::default();
        moments.update(&[7.0]).unwrap();
        assert_eq!(moments.deviation(), 1.0);
        let before = moments;
        assert!(moments.update(&[1.0, f64::NAN]).is_err());
        assert_eq!(moments, before);
    }
}
