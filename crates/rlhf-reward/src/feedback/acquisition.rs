//! Which questions are worth a person's time.

use rlhf_core::{Completions, Error as CoreError, Preference, PreferenceBatch};
use tch::{Kind, Tensor};

use crate::{EnsembleScores, Result};

/// What the answer to a question would tell about which member of an ensemble is right, in nats:
/// the entropy of the members' mean probability less their mean entropy (BALD; Houlsby et al.
/// 2011, arXiv 1112.5745). `differences` has each member's difference of the two scores.
///
/// It is high where members are sure of opposite things, and low where all say the same, *or* all
/// say that they do not know: a question that nobody can answer teaches nothing.
///
/// ```
/// use rlhf_reward::feedback::information;
///
/// let (split, unanimous, unsure) = ([3.0, -3.0], [3.0, 3.0], [0.0, 0.0]);
/// assert!(information(&split) > 0.5);
/// assert!(information(&unanimous) < 1e-12 && information(&unsure) < 1e-12);
/// ```
pub fn information(differences: &[f64]) -> f64 {
    let count = differences.len().max(1) as f64;
    let probability = |d: &f64| 1.0 / (1.0 + (-d).exp());
    let mean = differences.iter().map(probability).sum::<f64>() / count;
    let own = differences
        .iter()
        .map(|d| entropy(probability(d)))
        .sum::<f64>()
        / count;
    entropy(mean) - own
}

/// Entropy of a coin, nats.
fn entropy(p: f64) -> f64 {
    let term = |p: f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
    term(p) + term(1.0 - p)
}

/// The positions of `questions` from the most informative to the least ([`information`]).
///
/// A question is a [`Preference`] of which nobody knows yet whether it is one; `judge` is
/// [`Ensemble::score_with_disagreement`](crate::Ensemble::score_with_disagreement) or that of
/// [`HeadEnsemble`](crate::HeadEnsemble). Equal ones stay in their order.
///
/// # Errors
/// No question; those of the judge.
pub fn most_informative(
    judge: impl Fn(&Completions) -> rlhf_core::Result<EnsembleScores>,
    questions: &[Preference],
    batch_size: usize,
) -> Result<Vec<usize>> {
    let mut values = Vec::with_capacity(questions.len());
    for part in PreferenceBatch::new(questions.to_vec())?.split(batch_size)? {
        let completions = Completions::written(part.interleaved()?);
        let members = judge(&completions)?.members; // [2B, M]
        let shape = members.size();
        let sides = members
            .f_view([part.len() as i64, 2, -1])
            .map_err(CoreError::from)?;
        let differences: Tensor = sides.select(1, 0) - sides.select(1, 1);
        let flat = differences.to_kind(Kind::Double).reshape([-1]);
        let flat = Vec::<f64>::try_from(flat).map_err(CoreError::from)?;
        values.extend(flat.chunks(shape[1] as usize).map(information));
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
    Ok(order)
}
