//! What the answers of a rollout look like, whatever they are worth.

use std::collections::HashSet;

use rlhf_core::{Completions, FinishReason, Stats};

/// `PHASE/length`, `PHASE/finished`, `PHASE/distinct_1`, `PHASE/distinct_2`, `PHASE/distinct_2_across`
/// and `PHASE/score/length_correlation`; the documentation of the crate says what they mean.
pub(crate) fn answer_stats(phase: &str, completions: &Completions, scores: &[f64]) -> Stats {
    let answers: Vec<&[i64]> = completions
        .batch
        .sequences()
        .iter()
        .map(|s| s.response.as_slice())
        .collect();
    let lengths: Vec<f64> = answers.iter().map(|a| a.len() as f64).collect();
    let finished = completions
        .finish_reasons
        .iter()
        .map(|&f| f64::from(f == FinishReason::Stop));
    let key = |name: &str| format!("{phase}/{name}");
    let mut stats = Stats::from_iter([
        (key("length"), mean(&lengths)),
        (key("finished"), mean(&finished.collect::<Vec<_>>())),
    ]);
    let optional = [
        ("distinct_1", distinct_within(&answers, 1)),
        ("distinct_2", distinct_within(&answers, 2)),
        ("distinct_2_across", distinct_across(&answers, 2)),
        ("score/length_correlation", correlation(scores, &lengths)),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            stats.insert(key(name), value);
        }
    }
    stats
}

/// Share of an answer's `n`-grams that are not repeats of another in it, mean over the answers
/// that have two or more; `None` if there is none.
pub(crate) fn distinct_within(answers: &[&[i64]], n: usize) -> Option<f64> {
    let shares: Vec<f64> = answers
        .iter()
        .filter(|answer| answer.len() > n)
        .map(|answer| {
            let grams = answer.len() + 1 - n;
            answer.windows(n).collect::<HashSet<_>>().len() as f64 / grams as f64
        })
        .collect();
    (!shares.is_empty()).then(|| mean(&shares))
}

/// Distinct `n`-grams of all answers over all `n`-grams of all answers (Li et al. 2016,
/// arXiv 1510.03055): low where different prompts get the same answer.
pub(crate) fn distinct_across(answers: &[&[i64]], n: usize) -> Option<f64> {
    let grams = || answers.iter().flat_map(|answer| answer.windows(n));
    let count = grams().count();
    (count > 0).then(|| grams().collect::<HashSet<_>>().len() as f64 / count as f64)
}

/// Pearson's; `None` where either does not vary.
fn correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let (mean_a, mean_b) = (mean(a), mean(b));
    let products = a.iter().zip(b).map(|(a, b)| (a - mean_a) * (b - mean_b));
    let covariance = products.sum::<f64>() / a.len().max(1) as f64;
    let scale = (variance(a) * variance(b)).sqrt();
    (scale > 1e-12).then(|| (covariance / scale).clamp(-1.0, 1.0))
}

/// 0 of nothing.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Population variance; 0 of nothing.
pub(crate) fn variance(values: &[f64]) -> f64 {
    let centre = mean(values);
    let squares: Vec<f64> = values.iter().map(|v| (v - centre).powi(2)).collect();
    mean(&squares)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn repetition_within_and_across_answers() {
        // 1 2 1 2: bigrams 12, 21, 12. 1 2 3: 12, 23. One token: none.
        let answers: [&[i64]; 3] = [&[1, 2, 1, 2], &[1, 2, 3], &[7]];
        assert_eq!(distinct_within(&answers, 1), Some((0.5 + 1.0) / 2.0));
        assert_eq!(distinct_within(&answers, 2), Some((2.0 / 3.0 + 1.0) / 2.0));
        assert_eq!(distinct_across(&answers, 2), Some(3.0 / 5.0));
        assert_eq!(distinct_within(&answers[2..], 1), None);
        assert_eq!(distinct_across(&answers[2..], 2), None);
    }

    #[test]
    fn correlations_by_hand() {
        let close = |got: Option<f64>, want: f64| assert!((got.unwrap() - want).abs() < 1e-12);
        close(correlation(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]), 1.0);
        close(correlation(&[1.0, 2.0, 3.0], &[1.0, 0.0, 1.0]), 0.0);
        assert_eq!(correlation(&[1.0, 1.0], &[1.0, 2.0]), None);
    }
}
