//! What a policy is held to.

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, Preference, PreferenceBatch};
use tch::{Kind, Tensor};

use crate::Result;
use crate::pair_scores::row_sums;

/// What a policy is held to.
///
/// A [`Policy`] becomes one by `into()`, which the trainers call.
pub enum Reference {
    /// A model: a frozen copy of the policy, or the policy with its LoRA adapters off, which needs
    /// no memory of its own.
    Model(Box<dyn Policy>),
    /// One that is not here: examples come with its log-probabilities
    /// ([`ReferenceCache`](crate::ReferenceCache), [`score_preferences`]).
    Scored,
    /// None. Log-ratios are log-probabilities: SimPO, CPO and ORPO, or DPO without a reference.
    Free,
}

impl<P: Policy + 'static> From<P> for Reference {
    fn from(model: P) -> Self {
        Self::Model(Box::new(model))
    }
}

impl Reference {
    /// Whether log-probabilities of a reference are read.
    pub(crate) fn is_there(&self) -> bool {
        !matches!(self, Self::Free)
    }

    pub(crate) fn model(&self) -> Option<&dyn Policy> {
        match self {
            Self::Model(model) => Some(model),
            _ => None,
        }
    }
}

/// A comparison together with what the reference thinks of it. The reference seldom changes, so
/// a dataset is scored once, not once an epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredPreference {
    /// The comparison.
    pub pair: Preference,
    /// `log π_ref(chosen | prompt)`, in nats; 0 without a reference.
    pub ref_chosen: f32,
    /// `log π_ref(rejected | prompt)`, in nats; 0 without a reference.
    pub ref_rejected: f32,
}

impl ScoredPreference {
    /// A comparison that no reference has seen.
    pub(crate) fn free(pair: &Preference) -> Self {
        Self {
            pair: pair.clone(),
            ref_chosen: 0.0,
            ref_rejected: 0.0,
        }
    }
}

/// How a dataset is scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreOptions {
    /// Pairs that are in memory at once.
    pub batch_size: usize,
    /// [`Objective::ld_alpha`](crate::Objective::ld_alpha) of the training to come.
    pub ld_alpha: Option<f64>,
}

impl Default for ScoreOptions {
    /// 8 pairs at once, whole answers.
    fn default() -> Self {
        Self {
            batch_size: 8,
            ld_alpha: None,
        }
    }
}

/// Scores comparisons under `reference` without gradients.
///
/// # Errors
/// No pairs; a `batch_size` of 0; a log-probability that is not finite; those of the model.
pub fn score_preferences(
    reference: &(impl Policy + ?Sized),
    pairs: &[Preference],
    options: &ScoreOptions,
) -> Result<Vec<ScoredPreference>> {
    let mut scored = Vec::with_capacity(pairs.len());
    score_each(reference, pairs, options, |part| {
        scored.extend(part);
        Ok(())
    })?;
    Ok(scored)
}

/// Scores a batch at a time and gives it to `done`.
pub(crate) fn score_each(
    reference: &(impl Policy + ?Sized),
    pairs: &[Preference],
    options: &ScoreOptions,
    mut done: impl FnMut(Vec<ScoredPreference>) -> Result<()>,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let batch = PreferenceBatch::new(pairs.to_vec())?;
    let mut row = 0;
    for part in batch.split(options.batch_size)? {
        let sequences = part.interleaved()?;
        let scores = reference.logprobs(&sequences, &LogprobOptions::default())?;
        let sums = row_sums(&scores.logprobs, &sequences, part.len(), options.ld_alpha)?;
        let sides = host(&sums, "reference log-probability", row, 2)?;
        let scored = part.pairs().iter().zip(sides.chunks_exact(2));
        let scored = scored.map(|(pair, side)| ScoredPreference {
            pair: pair.clone(),
            ref_chosen: side[0],
            ref_rejected: side[1],
        });
        row += part.len();
        done(scored.collect())?;
    }
    Ok(())
}

/// A `[B · each]` tensor on the host, all finite.
pub(crate) fn host(
    sums: &Tensor,
    what: &'static str,
    first_row: usize,
    each: usize,
) -> Result<Vec<f32>> {
    let sums = sums.f_to_kind(Kind::Float).and_then(|s| s.f_view([-1]));
    let values = sums.and_then(Vec::<f32>::try_from);
    let values = values.map_err(CoreError::from)?;
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(CoreError::NonFinite {
            what,
            row: first_row + at / each,
            value: f64::from(values[at]),
        }
        .into()),
        None => Ok(values),
    }
}
