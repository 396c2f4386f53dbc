//! What the length of answers has to do with their scores.

use serde::{Deserialize, Serialize};

use super::ScoredPair;
use super::buckets::{Bucket, bucket};

/// Whether longer is always better.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LengthBias {
    /// Mean tokens of the preferred answers.
    pub mean_chosen: f64,
    /// Mean tokens of the others.
    pub mean_rejected: f64,
    /// Share of pairs in which the longer answer was preferred (of those of different length).
    pub people_prefer_longer: Option<f64>,
    /// Share of them in which the *model* prefers the longer answer.
    pub model_prefers_longer: Option<f64>,
    /// Accuracy of always saying what length says, longer or shorter, whichever is right more
    /// often; a pair of equal length counts half. What the model must beat to have learnt
    /// anything else.
    pub length_rule_accuracy: f64,
    /// Accuracy of the model where that rule is wrong.
    pub accuracy_against_rule: Option<f64>,
    /// Pearson's correlation of score difference and length difference over all pairs; `None`
    /// where one of them does not vary.
    pub correlation: Option<f64>,
}

impl LengthBias {
    pub(super) fn of(pairs: &[ScoredPair]) -> Self {
        let count = pairs.len() as f64;
        let mean = |tokens: fn(&ScoredPair) -> usize| {
            pairs.iter().map(|p| tokens(p) as f64).sum::<f64>() / count
        };
        let differ: Vec<_> = pairs
            .iter()
            .filter(|p| p.length_difference() != 0)
            .collect();
        let share = |of: &[&ScoredPair], is: &dyn Fn(&ScoredPair) -> bool| {
            let found = of.iter().filter(|p| is(p)).count();
            (!of.is_empty()).then(|| found as f64 / of.len() as f64)
        };
        let longer_chosen = |p: &ScoredPair| p.length_difference() > 0;
        let people = share(&differ, &longer_chosen);
        let longer_is_better = people.is_none_or(|share| share >= 0.5);
        let against: Vec<_> = differ
            .iter()
            .copied()
            .filter(|p| longer_chosen(p) != longer_is_better)
            .collect();
        let by_rule = differ.len() - against.len();
        let ties = (pairs.len() - differ.len()) as f64;
        let series =
            |value: &dyn Fn(&ScoredPair) -> f64| pairs.iter().map(value).collect::<Vec<_>>();
        Self {
            mean_chosen: mean(|p| p.chosen_len),
            mean_rejected: mean(|p| p.rejected_len),
            people_prefer_longer: people,
            model_prefers_longer: share(&differ, &|p| {
                let (score, length) = (p.difference(), p.length_difference() as f64);
                score * length > 0.0
            }),
            length_rule_accuracy: (by_rule as f64 + 0.5 * ties) / count,
            accuracy_against_rule: share(&against, &ScoredPair::is_right),
            // Neither side of a pair comes first, so the correlation is about 0, not the means.
            correlation: uncentred_correlation(
                &series(&ScoredPair::difference),
                &series(&|p| p.length_difference() as f64),
            ),
        }
    }
}

/// Whether a difference in length belongs to a bucket.
type Includes = fn(i64) -> bool;

/// By which answer is longer, and by how much.
pub(super) fn by_length(pairs: &[ScoredPair]) -> Vec<Bucket> {
    let bounds: [(&str, Includes); 5] = [
        ("chosen shorter by 10 tokens or more", |d| d <= -10),
        ("chosen shorter by 1 to 9", |d| (-9..0).contains(&d)),
        ("same length", |d| d == 0),
        ("chosen longer by 1 to 9", |d| (1..10).contains(&d)),
        ("chosen longer by 10 or more", |d| d >= 10),
    ];
    bounds
        .into_iter()
        .map(|(name, within)| {
            let part: Vec<_> = pairs
                .iter()
                .filter(|p| within(p.length_difference()))
                .collect();
            bucket(name.into(), &part, |p| p.length_difference() as f64)
        })
        .collect()
}

/// Correlation about 0; `None` where a series is all 0.
fn uncentred_correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norm = (dot(a, a) * dot(b, b)).sqrt();
    (norm > 0.0).then(|| dot(a, b) / norm)
}
