//! ROUGE: overlap of a text with a reference text (Lin 2004).
//!
//! Tokens are runs of `a-z0-9` in the lower-cased text and words are not stemmed, as in the
//! `rouge-score` package with its defaults.

/// Overlap of a prediction with a target, each number in `0..=1`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rouge {
    /// Share of the prediction that is found in the target.
    pub precision: f64,
    /// Share of the target that is found in the prediction.
    pub recall: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
}

impl Rouge {
    fn new(overlap: usize, target: usize, prediction: usize) -> Self {
        if overlap == 0 {
            return Self::default();
        }
        let precision = overlap as f64 / prediction as f64;
        let recall = overlap as f64 / target as f64;
        Self {
            precision,
            recall,
            f1: 2.0 * precision * recall / (precision + recall),
        }
    }
}

/// ROUGE-N: overlap of the runs of `n` words. 0 where a text has fewer than `n` words.
pub fn rouge_n(target: &str, prediction: &str, n: usize) -> Rouge {
    let (target, prediction) = (words(target), words(prediction));
    let n = n.max(1);
    let mut counts = std::collections::HashMap::new();
    for run in target.windows(n) {
        *counts.entry(run).or_insert(0usize) += 1;
    }
    let mut overlap = 0;
    for run in prediction.windows(n) {
        if let Some(left) = counts.get_mut(run).filter(|left| **left > 0) {
            *left -= 1;
            overlap += 1;
        }
    }
    let runs = |words: &[String]| (words.len() + 1).saturating_sub(n);
    Rouge::new(overlap, runs(&target), runs(&prediction))
}

/// ROUGE-L: the longest common subsequence of words.
pub fn rouge_l(target: &str, prediction: &str) -> Rouge {
    let (target, prediction) = (words(target), words(prediction));
    // row[j]: longest common subsequence of the target so far and prediction[..j].
    let mut row = vec![0usize; prediction.len() + 1];
    for word in &target {
        let mut diagonal = 0;
        for (j, other) in prediction.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other {
                diagonal + 1
            } else {
                above.max(row[j])
            };
            diagonal = above;
        }
    }
    Rouge::new(row[prediction.len()], target.len(), prediction.len())
}

fn words(text: &str) -> Vec<String> {
    text.to_lowercase()
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_string)
        .collect()
}
