//! Answers to one prompt in the order that a person put them in.

use std::sync::Arc;

use rlhf_core::{Error as CoreError, Sequence, SequenceBatch};

use crate::{Error, Result};

/// Several answers to a prompt and their ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// What all of them answer.
    pub prompt: Arc<[i64]>,
    /// The answers, in any order.
    pub answers: Vec<Vec<i64>>,
    /// One rank an answer, the lower the better. Answers of the same rank are not compared.
    pub ranks: Vec<u32>,
    /// How much the ranking counts; 1 unless the data says otherwise.
    pub weight: f64,
}

impl Ranking {
    /// Answers from the best to the worst.
    pub fn best_first(prompt: impl Into<Arc<[i64]>>, answers: Vec<Vec<i64>>) -> Self {
        Self {
            prompt: prompt.into(),
            ranks: (0..answers.len() as u32).collect(),
            answers,
            weight: 1.0,
        }
    }

    /// Which answers are compared: `(better, worse)` by position. Answers of equal rank are not,
    /// and neither are those with the same tokens nor empty ones, which say nothing.
    pub fn comparisons(&self) -> Vec<(usize, usize)> {
        let usable = |i: usize| !self.answers[i].is_empty();
        let count = self.answers.len().min(self.ranks.len());
        let all = (0..count).flat_map(|better| (0..count).map(move |worse| (better, worse)));
        all.filter(|&(better, worse)| {
            self.ranks[better] < self.ranks[worse]
                && usable(better)
                && usable(worse)
                && self.answers[better] != self.answers[worse]
        })
        .collect()
    }

    /// Pairs that the ranks order, whether or not they can be compared.
    fn ordered_pairs(&self) -> usize {
        let later = |(i, rank): (usize, &u32)| {
            let differs = |other: &&u32| *other != rank;
            self.ranks[i + 1..].iter().filter(differs).count()
        };
        self.ranks.iter().enumerate().map(later).sum()
    }
}

/// A non-empty batch of rankings, each of which compares something.
#[derive(Debug, Clone, PartialEq)]
pub struct RankingBatch {
    rankings: Vec<Ranking>,
    skipped: usize,
}

/// The comparisons of a batch of rankings as rows of its scores.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RankedRows {
    /// Row of the better answer of each comparison.
    pub better: Vec<i64>,
    /// Row of the worse one.
    pub worse: Vec<i64>,
    /// How much each comparison counts: its ranking's weight over the number of the ranking's
    /// comparisons, so that every prompt counts the same however many answers it has.
    pub weights: Vec<f64>,
}

impl RankingBatch {
    /// Checks and wraps rankings.
    ///
    /// # Errors
    /// [`Error::BadRanking`] where answers and ranks are not as many, or no two answers can be
    /// compared; a weight that is not finite; those of [`SequenceBatch::new`].
    pub fn new(rankings: Vec<Ranking>) -> Result<Self> {
        let mut skipped = 0;
        for (row, ranking) in rankings.iter().enumerate() {
            let bad = |reason| Error::BadRanking { row, reason };
            if ranking.answers.len() != ranking.ranks.len() {
                return Err(bad("it needs one rank for each answer"));
            }
            let compared = ranking.comparisons().len();
            if compared == 0 {
                return Err(bad(
                    "no two answers differ in rank and tokens without being empty",
                ));
            }
            skipped += ranking.ordered_pairs() - compared;
            let value = ranking.weight;
            if !value.is_finite() {
                let what = "weight";
                return Err(CoreError::NonFinite { what, row, value }.into());
            }
        }
        let batch = Self { rankings, skipped };
        batch.sequences()?;
        Ok(batch)
    }

    /// Number of rankings.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.rankings.len()
    }

    /// The rankings.
    pub fn rankings(&self) -> &[Ranking] {
        &self.rankings
    }

    /// Pairs of different rank that are not compared, because their answers are equal or one is
    /// empty.
    pub fn skipped_pairs(&self) -> usize {
        self.skipped
    }

    /// All answers, prompt by prompt. Those of one ranking share their prompt.
    ///
    /// # Errors
    /// Those of [`SequenceBatch::new`].
    pub fn sequences(&self) -> Result<SequenceBatch> {
        let of_one = |ranking: &Ranking| {
            let prompt = Arc::clone(&ranking.prompt);
            let answers = ranking.answers.clone().into_iter();
            answers.map(move |response| Sequence {
                prompt: Arc::clone(&prompt),
                response,
            })
        };
        let sequences = self.rankings.iter().flat_map(of_one).collect();
        Ok(SequenceBatch::new(sequences)?)
    }

    /// The comparisons, as rows of [`sequences`](Self::sequences).
    pub fn rows(&self) -> RankedRows {
        let mut rows = RankedRows::default();
        let mut first = 0;
        for ranking in &self.rankings {
            let pairs = ranking.comparisons();
            let weight = ranking.weight / pairs.len() as f64;
            for (better, worse) in pairs {
                rows.better.push(first + better as i64);
                rows.worse.push(first + worse as i64);
                rows.weights.push(weight);
            }
            first += ranking.answers.len() as i64;
        }
        rows
    }

    /// Sum of the rankings' weights.
    pub fn total_weight(&self) -> f64 {
        self.rankings.iter().map(|r| r.weight).sum()
    }

    /// The rankings by turns of at most `size`, in order.
    pub(crate) fn split(&self, size: usize) -> Result<Vec<Self>> {
        self.rankings
            .chunks(size)
            .map(|part| Self::new(part.to_vec()))
            .collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn all_pairs_of_a_prompt_and_each_prompt_counts_the_same() {
        let four = Ranking::best_first([1], vec![vec![2], vec![3], vec![4], vec![5]]);
        let mut tied = Ranking::best_first([9], vec![vec![2], vec![3], vec![4]]);
        tied.ranks = vec![1, 0, 0];
        let batch = RankingBatch::new(vec![four, tied]).unwrap();
        let rows = batch.rows();
        assert_eq!(rows.better.len(), 4 * 3 / 2 + 2);
        assert_eq!(rows.better[6..], [5, 6]);
        assert_eq!(rows.worse[6..], [4, 4]);
        assert!(rows.weights[..6].iter().all(|w| *w == 1.0 / 6.0));
        assert_eq!(rows.weights[6..], [0.5, 0.5]);
        assert_eq!(
            (rows.weights.iter().sum::<f64>(), batch.total_weight()),
            (2.0, 2.0)
        );
        // One prompt in memory: its answers hold the same `Arc`.
        let sequences = batch.sequences().unwrap();
        let shared = |a: usize, b: usize| {
            let prompt = |i: usize| &sequences.sequences()[i].prompt;
            Arc::ptr_eq(prompt(a), prompt(b))
        };
        assert!(shared(0, 3) && shared(4, 6) && !shared(3, 4));
    }

    #[test]
    fn useless_pairs_are_counted_and_useless_rankings_are_errors() {
        let some = Ranking::best_first([1], vec![vec![2], vec![2], vec![], vec![3]]);
        let batch = RankingBatch::new(vec![some]).unwrap();
        assert_eq!(batch.rows().better.len(), 2);
        assert_eq!(batch.skipped_pairs(), 4);
        let mut short = Ranking::best_first([1], vec![vec![2], vec![3]]);
        short.ranks.pop();
        let equal = Ranking::best_first([1], vec![vec![2], vec![2]]);
        let one = Ranking::best_first([1], vec![vec![2]]);
        for bad in [short, equal, one] {
            assert!(matches!(
                RankingBatch::new(vec![bad]),
                Err(Error::BadRanking { row: 0, .. })
            ));
        }
        let mut weight = Ranking::best_first([1], vec![vec![2], vec![3]]);
        weight.weight = f64::NAN;
        assert!(RankingBatch::new(vec![weight]).is_err());
        assert!(RankingBatch::new(vec![]).is_err());
    }
}
