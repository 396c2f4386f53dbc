//! Whether two reward models are of one mind.

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};

use super::{ScoredPair, check};
use crate::Result;

/// How much two models agree on the same comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Share of pairs of which both prefer the same answer, or neither prefers one.
    pub same_preference: f64,
    /// Cohen's kappa of their being right: agreement beyond what two models of these accuracies
    /// reach by chance. `None` where chance alone makes them agree always.
    pub kappa: Option<f64>,
    /// Pearson's correlation of their score differences; `None` where one does not vary.
    pub pearson: Option<f64>,
    /// Spearman's, of the ranks.
    pub spearman: Option<f64>,
}

/// Compares the scores that two models gave to the same pairs in the same order.
///
/// # Errors
/// No pairs, or not as many of one as of the other; a score that is not finite.
pub fn agreement(first: &[ScoredPair], second: &[ScoredPair]) -> Result<Agreement> {
    check(first)?;
    check(second)?;
    if first.len() != second.len() {
        return Err(CoreError::LengthMismatch {
            left: "pairs of the first model",
            left_len: first.len(),
            right: "those of the second",
            right_len: second.len(),
        }
        .into());
    }
    let count = first.len() as f64;
    let differences =
        |pairs: &[ScoredPair]| -> Vec<f64> { pairs.iter().map(ScoredPair::difference).collect() };
    let (a, b) = (differences(first), differences(second));
    let share = |found: usize| found as f64 / count;
    let same = |(a, b): &(&f64, &f64)| a.partial_cmp(&&0.0) == b.partial_cmp(&&0.0);
    let both = first.iter().zip(second);
    let observed = share(both.filter(|(a, b)| a.is_right() == b.is_right()).count());
    let right = |pairs: &[ScoredPair]| share(pairs.iter().filter(|p| p.is_right()).count());
    let (p, q) = (right(first), right(second));
    let chance = p * q + (1.0 - p) * (1.0 - q);
    Ok(Agreement {
        same_preference: share(a.iter().zip(&b).filter(same).count()),
        kappa: (chance < 1.0).then(|| (observed - chance) / (1.0 - chance)),
        pearson: pearson(&a, &b),
        spearman: pearson(&ranks(&a), &ranks(&b)),
    })
}

fn pearson(a: &[f64], b: &[f64]) -> Option<f64> {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (x - mean_a, y - mean_b);
        (ab, aa, bb) = (ab + x * y, aa + x * x, bb + y * y);
    }
    let norm = (aa * bb).sqrt();
    (norm > 0.0).then(|| ab / norm)
}

/// Ranks from 0; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for run in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let rank = start as f64 + (run.len() - 1) as f64 / 2.0;
        run.iter().for_each(|&i| ranks[i] = rank);
        start += run.len();
    }
    ranks
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pairs(differences: &[f64]) -> Vec<ScoredPair> {
        let pair = |&d: &f64| ScoredPair {
            chosen: d,
            rejected: 0.0,
            label_margin: None,
            chosen_len: 1,
            rejected_len: 1,
        };
        differences.iter().map(pair).collect()
    }

    #[test]
    fn by_hand() {
        let first = pairs(&[1.0, 2.0, -1.0, -3.0]);
        let same = agreement(&first, &first).unwrap();
        assert_eq!((same.same_preference, same.kappa), (1.0, Some(1.0)));
        assert!((same.pearson.unwrap() - 1.0).abs() < 1e-12);
        // Right: 1 1 0 0 and 1 0 1 0: agreement is chance.
        let other = agreement(&first, &pairs(&[8.0, -1.0, 1.0, -2.0])).unwrap();
        assert_eq!((other.same_preference, other.kappa), (0.5, Some(0.0)));
        // Ranks 2 3 1 0 and 3 1 2 0.
        assert!((other.spearman.unwrap() - (1.0 - 6.0 * 6.0 / 60.0)).abs() < 1e-12);
        // All right, both of them: nothing to be learnt from agreement.
        let right = pairs(&[1.0, 1.0]);
        let trivial = agreement(&right, &right).unwrap();
        assert_eq!((trivial.kappa, trivial.pearson), (None, None));
        // A tie agrees with a tie alone.
        let ties = agreement(&pairs(&[0.0, 0.0]), &pairs(&[0.0, -1.0])).unwrap();
        assert_eq!(ties.same_preference, 0.5);
        assert!(agreement(&first, &right).is_err());
        assert_eq!(ranks(&[3.0, 1.0, 3.0]), [1.5, 0.0, 1.5]);
    }
}
