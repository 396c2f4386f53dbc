//! Several rewards of each answer, as one.

use rlhf_core::{Error, Result};

use super::advantages::{check_groups, whitened};

/// What [`mixed_rewards`] returns, one for each answer.
#[derive(Debug, Clone, PartialEq)]
pub struct MixedRewards {
    /// The weighted sums; 0 for an answer without any reward.
    pub rewards: Vec<f64>,
    /// Whether the answer has a reward at all.
    pub counted: Vec<bool>,
}

/// `Σ_f weight_f · score_f` over the rewards that an answer has. A score that is NaN is one that
/// its model did not give, and counts as nothing; an answer without any is not counted.
///
/// # Errors
/// [`Error::LengthMismatch`] unless every reward has one score for each answer, and one weight.
pub fn mixed_rewards(scores: &[Vec<f64>], weights: &[f64]) -> Result<MixedRewards> {
    let answers = check_scores(scores, weights)?;
    let columns = || scores.iter().zip(weights);
    let sum = |row: usize| {
        let present = columns().filter(|(column, _)| !column[row].is_nan());
        present.map(|(column, weight)| column[row] * weight).sum()
    };
    Ok(MixedRewards {
        rewards: (0..answers).map(sum).collect(),
        counted: (0..answers)
            .map(|row| scores.iter().any(|column| !column[row].is_nan()))
            .collect(),
    })
}

/// Advantages of rewards that are each centred and scaled within its group before they are
/// weighted and summed, the sums whitened over all answers
/// ([`RewardMix::NormalizeThenSum`](crate::RewardMix::NormalizeThenSum)). NaN and answers that are
/// not counted as in [`mixed_rewards`].
pub(crate) fn normalized_sum(
    scores: &[Vec<f64>],
    weights: &[f64],
    counted: &[bool],
    group_size: usize,
) -> Result<Vec<f64>> {
    let answers = check_scores(scores, weights)?;
    check_groups(answers, counted, group_size)?;
    let mut sums = vec![0.0; answers];
    for (column, weight) in scores.iter().zip(weights) {
        let present: Vec<bool> = column
            .iter()
            .zip(counted)
            .map(|(score, counted)| *counted && !score.is_nan())
            .collect();
        for start in (0..answers).step_by(group_size) {
            let rows = start..start + group_size;
            let scaled = whitened(&column[rows.clone()], &present[rows.clone()]);
            for (sum, scaled) in sums[rows].iter_mut().zip(scaled) {
                *sum += scaled * weight;
            }
        }
    }
    Ok(whitened(&sums, counted))
}

fn check_scores(scores: &[Vec<f64>], weights: &[f64]) -> Result<usize> {
    let mismatch = |left, left_len, right, right_len| Error::LengthMismatch {
        left,
        left_len,
        right,
        right_len,
    };
    if scores.len() != weights.len() {
        let (left, right) = ("the rewards", "their weights");
        return Err(mismatch(left, scores.len(), right, weights.len()));
    }
    let answers = scores.first().map_or(0, Vec::len);
    match scores.iter().find(|column| column.len() != answers) {
        Some(column) => {
            let (left, right) = ("the scores of a reward", "those of the first");
            Err(mismatch(left, column.len(), right, answers))
        }
        None => Ok(answers),
    }
}
