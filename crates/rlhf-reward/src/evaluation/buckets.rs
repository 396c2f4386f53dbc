//! Accuracy among pairs that have something in common.

use serde::{Deserialize, Serialize};

use super::ScoredPair;

/// Right answers among some pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Which pairs these are.
    pub name: String,
    /// How many there are.
    pub pairs: usize,
    /// Share of them that the model gets right; `None` of none.
    pub accuracy: Option<f64>,
    /// Mean of what they were put into this bucket by; `None` of none.
    pub mean: Option<f64>,
}

/// Accuracy and the mean of `by` over some pairs.
pub(super) fn bucket(
    name: String,
    pairs: &[&ScoredPair],
    by: impl Fn(&ScoredPair) -> f64,
) -> Bucket {
    let mean_of = |value: &dyn Fn(&ScoredPair) -> f64| {
        let sum: f64 = pairs.iter().map(|p| value(p)).sum();
        (!pairs.is_empty()).then(|| sum / pairs.len() as f64)
    };
    Bucket {
        name,
        pairs: pairs.len(),
        accuracy: mean_of(&|p| f64::from(p.is_right())),
        mean: mean_of(&by),
    }
}

/// The pairs in order of `by`, cut into five parts as equal as can be.
pub(super) fn fifths(pairs: &[&ScoredPair], by: impl Fn(&ScoredPair) -> f64) -> Vec<Bucket> {
    let mut sorted = pairs.to_vec();
    sorted.sort_by(|a, b| by(a).total_cmp(&by(b)));
    (0..5)
        .map(|i| &sorted[i * sorted.len() / 5..(i + 1) * sorted.len() / 5])
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (low, high) = (by(part[0]), by(part[part.len() - 1]));
            bucket(format!("{low:.3} to {high:.3}"), part, &by)
        })
        .collect()
}

/// Ten bins of the confidence, `0.5..0.55` and so on: a model says nothing below a half.
pub(super) fn calibration(pairs: &[ScoredPair]) -> Vec<Bucket> {
    const BINS: usize = 10;
    let bin =
        |p: &ScoredPair| (((p.confidence() - 0.5) * 2.0 * BINS as f64) as usize).min(BINS - 1);
    (0..BINS)
        .map(|i| {
            let part: Vec<_> = pairs.iter().filter(|p| bin(p) == i).collect();
            let bound = |i: usize| 0.5 + i as f64 / (2 * BINS) as f64;
            let name = format!("{:.2} to {:.2}", bound(i), bound(i + 1));
            bucket(name, &part, ScoredPair::confidence)
        })
        .collect()
}
