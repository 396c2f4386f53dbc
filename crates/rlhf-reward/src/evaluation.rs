//! How far to trust a reward model: accuracy where it matters, calibration, agreement.

mod agreement;
mod table;

use rlhf_core::{Completions, Error as CoreError, Preference, PreferenceBatch, RewardModel};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::screen::usable;
use crate::{Result, Skipped};

pub use agreement::{Agreement, agreement};

/// The scores of one comparison.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ScoredPair {
    /// Score of the answer that was preferred.
    pub chosen: f64,
    /// Score of the other one.
    pub rejected: f64,
    /// By how much the first was preferred, where the labellers said so.
    pub label_margin: Option<f64>,
    /// Tokens of the answer that was preferred.
    pub chosen_len: usize,
    /// Tokens of the other one.
    pub rejected_len: usize,
}

impl ScoredPair {
    /// Chosen minus rejected score.
    pub fn difference(&self) -> f64 {
        self.chosen - self.rejected
    }

    /// Whether the preferred answer scores strictly higher.
    pub fn is_right(&self) -> bool {
        self.chosen > self.rejected
    }

    /// Chosen minus rejected tokens.
    pub fn length_difference(&self) -> i64 {
        self.chosen_len as i64 - self.rejected_len as i64
    }

    /// The probability that Bradley and Terry give to the model's own choice, in `0.5..=1`.
    pub fn confidence(&self) -> f64 {
        1.0 / (1.0 + (-self.difference().abs()).exp())
    }
}

/// Scores comparisons, `batch_size` of them at a time; both answers of a pair are in one batch and
/// share their prompt. Pairs with equal answers or an empty one are left out and counted.
///
/// # Errors
/// No pairs, or none that can be compared; a score that is not finite; those of the model.
pub fn score_pairs(
    model: &dyn RewardModel,
    pairs: &[Preference],
    batch_size: usize,
) -> Result<(Vec<ScoredPair>, Skipped)> {
    let _no_grad = tch::no_grad_guard();
    let (batch, skipped) = usable(&PreferenceBatch::new(pairs.to_vec())?)?;
    let mut scored = Vec::with_capacity(batch.len());
    for part in batch.split(batch_size)? {
        let completions = Completions::written(part.interleaved()?);
        let scores = model.score(&completions)?;
        crate::ensemble::one_a_completion(&scores, completions.batch.len() as i64)?;
        let scores = values(&scores)?;
        for (pair, sides) in part.pairs().iter().zip(scores.chunks(2)) {
            if let Some(value) = sides.iter().find(|score| !score.is_finite()) {
                return Err(CoreError::NonFinite {
                    what: "score",
                    row: scored.len(),
                    value: *value,
                }
                .into());
            }
            scored.push(ScoredPair {
                chosen: sides[0],
                rejected: sides[1],
                label_margin: pair.margin,
                chosen_len: pair.chosen.len(),
                rejected_len: pair.rejected.len(),
            });
        }
    }
    Ok((scored, skipped))
}

fn values(scores: &Tensor) -> Result<Vec<f64>> {
    let scores = scores.to_device(Device::Cpu).to_kind(Kind::Double);
    Ok(Vec::try_from(scores.contiguous()).map_err(CoreError::from)?)
}

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
            by_length: by_length(pairs),
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

fn check(pairs: &[ScoredPair]) -> Result<()> {
    if pairs.is_empty() {
        return Err(CoreError::Empty {
            what: "the comparisons",
            help: "give at least one scored pair",
        }
        .into());
    }
    let off = |p: &ScoredPair| !p.chosen.is_finite() || !p.rejected.is_finite();
    match pairs.iter().position(off) {
        Some(row) => Err(CoreError::NonFinite {
            what: "score",
            row,
            value: match pairs[row].chosen.is_finite() {
                true => pairs[row].rejected,
                false => pairs[row].chosen,
            },
        }
        .into()),
        None => Ok(()),
    }
}

fn bucket(name: String, pairs: &[&ScoredPair], by: impl Fn(&ScoredPair) -> f64) -> Bucket {
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
fn fifths(pairs: &[&ScoredPair], by: impl Fn(&ScoredPair) -> f64) -> Vec<Bucket> {
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

/// Whether a difference in length belongs to a bucket.
type Includes = fn(i64) -> bool;

fn by_length(pairs: &[ScoredPair]) -> Vec<Bucket> {
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

/// Ten bins of the confidence, `0.5..0.55` and so on: a model says nothing below a half.
fn calibration(pairs: &[ScoredPair]) -> Vec<Bucket> {
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

impl LengthBias {
    fn of(pairs: &[ScoredPair]) -> Self {
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

impl Histogram {
    fn of(pairs: &[ScoredPair]) -> Self {
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

/// Correlation about 0; `None` where a series is all 0.
fn uncentred_correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norm = (dot(a, a) * dot(b, b)).sqrt();
    (norm > 0.0).then(|| dot(a, b) / norm)
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
                Err(crate::Error::Core(CoreError::NonFinite { row: 1, .. }))
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
