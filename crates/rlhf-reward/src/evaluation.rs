//! How far to trust a reward model: accuracy where it matters, calibration, agreement.

mod agreement;
mod buckets;
mod histogram;
mod length;
mod scored_pair;
mod table;

use rlhf_core::{Preference, RewardModel};
use serde::{Deserialize, Serialize};

use crate::{Result, Skipped};

use buckets::{calibration, fifths};
use scored_pair::check;

pub use agreement::{Agreement, agreement};
pub use buckets::Bucket;
pub use histogram::Histogram;
pub use length::LengthBias;
pub use scored_pair::{ScoredPair, score_pairs};

/// What is known about a reward model from held-out comparisons.
///
/// Its `Display` is a table for a terminal, its serde form the JSON to keep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PairReport {
    /// Comparisons that this was measured on.
    pub pairs: usize,
    /// Comparisons that were left out.
    pub skipped: Skipped,
    /// Share of pairs whose preferred answer scores strictly higher.
    pub accuracy: f64,
    /// Wilson's interval for the accuracy, at 95%: what so few pairs can tell.
    pub accuracy_interval: (f64, f64),
    /// Mean of chosen minus rejected score.
    pub mean_margin: f64,
    /// Mean negative log-likelihood of the labels, nats; `ln 2 ≈ 0.693` is a coin's.
    pub log_loss: f64,
    /// By the distance of the two scores, in fifths of the pairs: is the model right where it is
    /// sure?
    pub by_score_margin: Vec<Bucket>,
    /// By the labellers' margin, in fifths; empty where there are none.
    pub by_label_margin: Vec<Bucket>,
    /// By which answer is longer, and by how much.
    pub by_length: Vec<Bucket>,
    /// Length, and what it has to do with the scores.
    pub length: LengthBias,
    /// Expected calibration error of the Bradley-Terry probability, over [`Self::calibration`].
    pub calibration_error: f64,
    /// By confidence, in ten bins of equal width; [`Bucket::mean`] is the mean confidence.
    pub calibration: Vec<Bucket>,
    /// Where the scores lie.
    pub histogram: Histogram,
}

impl PairReport {
    /// The report of these scores.
    ///
    /// # Errors
    /// No pairs; a score that is not finite.
    pub fn new(pairs: &[ScoredPair], skipped: Skipped) -> Result<Self> {
        check(pairs)?;
        let count = pairs.len() as f64;
        let right = pairs.iter().filter(|p| p.is_right()).count();
        let accuracy = right as f64 / count;
        let calibration = calibration(pairs);
        let gap = |bucket: &Bucket| match (bucket.accuracy, bucket.mean) {
            (Some(accuracy), Some(mean)) => bucket.pairs as f64 * (accuracy - mean).abs(),
            _ => 0.0,
        };
        let labelled: Vec<_> = pairs.iter().filter(|p| p.label_margin.is_some()).collect();
        let all: Vec<_> = pairs.iter().collect();
        let log_loss = |p: &ScoredPair| softplus(-p.difference());
        Ok(Self {
            pairs: pairs.len(),
            skipped,
            accuracy,
            accuracy_interval: wilson(right, pairs.len()),
            mean_margin: pairs.iter().map(ScoredPair::difference).sum::<f64>() / count,
            log_loss: pairs.iter().map(log_loss).sum::<f64>() / count,
            by_score_margin: fifths(&all, |p| p.difference().abs()),
            by_label_margin: fifths(&labelled, |p| p.label_margin.unwrap_or(0.0)),
            by_length: length::by_length(pairs),
            length: LengthBias::of(pairs),
            calibration_error: calibration.iter().map(gap).sum::<f64>() / count,
            calibration,
            histogram: Histogram::of(pairs),
        })
    }

    /// Scores comparisons and reports on them.
    ///
    /// # Errors
    /// Those of [`score_pairs`].
    pub fn of_model(
        model: &dyn RewardModel,
        pairs: &[Preference],
        batch_size: usize,
    ) -> Result<Self> {
        let (scored, skipped) = score_pairs(model, pairs, batch_size)?;
        Self::new(&scored, skipped)
    }
}

/// `log(1 + e^x)`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Wilson's score interval at 95%.
fn wilson(right: usize, count: usize) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    let (n, p) = (count as f64, right as f64 / count as f64);
    let centre = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pair(chosen: f64, rejected: f64, chosen_len: usize, rejected_len: usize) -> ScoredPair {
        ScoredPair {
            chosen,
            rejected,
            label_margin: None,
            chosen_len,
            rejected_len,
        }
    }

    fn report(pairs: &[ScoredPair]) -> PairReport {
        PairReport::new(pairs, Skipped::default()).unwrap()
    }

    #[test]
    fn accuracy_loss_and_margins_by_hand() {
        let pairs = [
            pair(1.0, 0.0, 5, 3),
            pair(0.0, 2.0, 3, 20),
            pair(0.5, 0.5, 4, 4),
            pair(3.0, 0.0, 2, 3),
            pair(4.0, 0.0, 9, 9),
        ];
        let report = report(&pairs);
        assert_eq!((report.accuracy, report.mean_margin), (0.6, 6.0 / 5.0));
        let loss = [1.0f64, -2.0, 0.0, 3.0, 4.0].map(|d| (1.0 + (-d).exp()).ln());
        assert!((report.log_loss - loss.iter().sum::<f64>() / 5.0).abs() < 1e-12);
        // Sure and wrong once; the tie is no success.
        let right: Vec<_> = report.by_score_margin.iter().map(|b| b.accuracy).collect();
        let expected = [0.0, 1.0, 0.0, 1.0, 1.0].map(Some);
        assert_eq!(right, expected);
        let counts: Vec<_> = report.by_length.iter().map(|b| b.pairs).collect();
        assert_eq!(counts, [1, 1, 2, 1, 0]);
        assert_eq!(report.by_length[4].accuracy, None);
        assert!(report.by_label_margin.is_empty());
        // Wilson's interval of 3 in 5, from its definition as a root: |p − q| = z √(q(1 − q)/n).
        let (low, high) = report.accuracy_interval;
        for q in [low, high] {
            let z = (0.6 - q).abs() / (q * (1.0 - q) / 5.0).sqrt();
            assert!((z - 1.96).abs() < 1e-3, "{q}");
        }
    }

    #[test]
    fn length_is_compared_with_people_and_with_its_own_rule() {
        // People prefer the longer one 3 times in 4; the model always.
        let pairs = [
            pair(1.0, 0.0, 5, 3),
            pair(2.0, 0.0, 5, 1),
            pair(1.0, 0.0, 9, 8),
            pair(0.0, 1.0, 3, 7),
            pair(1.0, 0.0, 4, 4),
        ];
        let length = report(&pairs).length;
        assert_eq!(length.people_prefer_longer, Some(0.75));
        assert_eq!(length.model_prefers_longer, Some(1.0));
        assert_eq!(length.length_rule_accuracy, 3.5 / 5.0);
        assert_eq!(length.accuracy_against_rule, Some(0.0));
        let dot = 2.0 + 8.0 + 1.0 + 4.0;
        let norm = (8.0f64 * (4.0 + 16.0 + 1.0 + 16.0)).sqrt();
        assert!((length.correlation.unwrap() - dot / norm).abs() < 1e-12);
        // Shorter is the better rule when everything is turned round.
        let turned: Vec<_> = pairs
            .iter()
            .map(|p| pair(p.chosen, p.rejected, p.rejected_len, p.chosen_len))
            .collect();
        assert_eq!(report(&turned).length.length_rule_accuracy, 3.5 / 5.0);
        let same = report(&[pair(1.0, 0.0, 2, 2)]).length;
        assert_eq!((same.people_prefer_longer, same.correlation), (None, None));
    }

    #[test]
    fn calibration_of_a_model_that_knows_and_of_one_that_boasts() {
        // 3 of 4 right at a stated probability of 3/4; then at nearly 1.
        let pairs = |difference: f64| {
            let mut pairs = vec![pair(difference, 0.0, 1, 1); 3];
            pairs.push(pair(0.0, difference, 1, 1));
            report(&pairs)
        };
        let honest = pairs(3f64.ln());
        assert!(
            honest.calibration_error < 1e-12,
            "{}",
            honest.calibration_error
        );
        assert_eq!(honest.calibration[5].pairs, 4);
        let boasting = pairs(30.0);
        assert!((boasting.calibration_error - 0.25).abs() < 1e-9);
        assert_eq!(boasting.calibration[9].pairs, 4);
    }

    #[test]
    fn every_score_is_in_the_histogram() {
        let pairs: Vec<_> = (0..40).map(|i| pair(f64::from(i), -1.0, 1, 1)).collect();
        let histogram = report(&pairs).histogram;
        assert_eq!(histogram.chosen.iter().sum::<usize>(), 40);
        assert_eq!(histogram.rejected[0], 40);
        assert_eq!((histogram.edges[0], histogram.edges.len()), (-1.0, 21));
        assert!((histogram.edges[20] - 39.0).abs() < 1e-9);
        // Scores that are all the same.
        let flat = report(&[pair(1.0, 1.0, 1, 1)]).histogram;
        assert_eq!(flat.chosen.iter().sum::<usize>(), 1);
    }

    #[test]
    fn wrong_inputs_are_errors() {
        assert!(PairReport::new(&[], Skipped::default()).is_err());
        for bad in [pair(f64::NAN, 0.0, 1, 1), pair(0.0, f64::INFINITY, 1, 1)] {
            let good = pair(0.0, 0.0, 1, 1);
            assert!(matches!(
                PairReport::new(&[good, bad], Skipped::default()),
                Err(crate::Error::Core(rlhf_core::Error::NonFinite {
                    row: 1,
                    ..
                }))
            ));
        }
    }

    #[test]
    fn a_report_is_a_table_and_json() {
        let mut margins = vec![pair(1.0, 0.0, 5, 3), pair(0.0, 2.0, 3, 20)];
        margins[0].label_margin = Some(2.0);
        let report = report(&margins);
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<PairReport>(&json).unwrap(), report);
        let table = report.to_string();
        for part in ["accuracy", "50.0%", "longer", "calibration", "length rule"] {
            assert!(table.contains(part), "{part} in\n{table}");
        }
    }
}
