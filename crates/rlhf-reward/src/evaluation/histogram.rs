//! Where scores lie.

use serde::{Deserialize, Serialize};

use super::ScoredPair;

/// Counts of scores in intervals of equal width.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Bounds of the intervals, one more than there are of them.
    pub edges: Vec<f64>,
    /// Preferred answers in each.
    pub chosen: Vec<usize>,
    /// The others.
    pub rejected: Vec<usize>,
}

impl Histogram {
    pub(super) fn of(pairs: &[ScoredPair]) -> Self {
        const BINS: usize = 20;
        let all = || pairs.iter().flat_map(|p| [p.chosen, p.rejected]);
        let low = all().fold(f64::INFINITY, f64::min);
        let high = all().fold(f64::NEG_INFINITY, f64::max);
        let width = ((high - low) / BINS as f64).max(f64::MIN_POSITIVE);
        let count = |side: fn(&ScoredPair) -> f64| {
            let mut counts = vec![0; BINS];
            for pair in pairs {
                counts[(((side(pair) - low) / width) as usize).min(BINS - 1)] += 1;
            }
            counts
        };
        Self {
            edges: (0..=BINS).map(|i| low + width * i as f64).collect(),
            chosen: count(|p| p.chosen),
            rejected: count(|p| p.rejected),
        }
    }
}
