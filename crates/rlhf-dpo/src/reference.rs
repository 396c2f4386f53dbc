//! Log-probabilities under the policy and under the reference.

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, Preference, PreferenceBatch};
use tch::{Device, Kind, Tensor};

use crate::Result;

/// A comparison together with what the reference thinks of it. The reference never changes, so
/// a dataset is scored once, not once an epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredPreference {
    /// The comparison.
    pub pair: Preference,
    /// `log π_ref(chosen | prompt)`, in nats.
    pub ref_chosen: f32,
    /// `log π_ref(rejected | prompt)`, in nats.
    pub ref_rejected: f32,
}

/// Scores comparisons under `reference`, `batch_size` at a time, without gradients.
///
/// # Errors
/// No pairs; a `batch_size` of 0; a log-probability that is not finite; those of the model.
pub fn score_preferences(
    reference: &(impl Policy + ?Sized),
    pairs: &[Preference],
    batch_size: usize,
) -> Result<Vec<ScoredPreference>> {
    let _no_grad = tch::no_grad_guard();
    let batch = PreferenceBatch::new(pairs.to_vec())?;
    let mut scored = Vec::with_capacity(pairs.len());
    for part in batch.split(batch_size)? {
        let sums = PairLogprobs::of(reference, &part)?;
        let sides = Tensor::stack(&[&sums.chosen, &sums.rejected], 1).view(-1);
        let sides = Vec::<f32>::try_from(sides).map_err(CoreError::from)?;
        for (pair, side) in part.pairs().iter().zip(sides.chunks_exact(2)) {
            if let Some(value) = side.iter().find(|s| !s.is_finite()) {
                return Err(CoreError::NonFinite {
                    what: "reference log-probability",
                    row: scored.len(),
                    value: f64::from(*value),
                }
                .into());
            }
            scored.push(ScoredPreference {
                pair: pair.clone(),
                ref_chosen: side[0],
                ref_rejected: side[1],
            });
        }
    }
    Ok(scored)
}

/// Log-probabilities of whole responses, `[B]` f32.
pub(crate) struct PairLogprobs {
    pub(crate) chosen: Tensor,
    pub(crate) rejected: Tensor,
}

impl PairLogprobs {
    pub(crate) fn of(model: &(impl Policy + ?Sized), batch: &PreferenceBatch) -> Result<Self> {
        let scored = model.logprobs(&batch.interleaved()?, &LogprobOptions::default())?;
        // Masked tokens are 0.
        let sums = scored
            .logprobs
            .sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        let sides = sums.view([-1, 2]);
        Ok(Self {
            chosen: sides.select(1, 0),
            rejected: sides.select(1, 1),
        })
    }
}

/// What [`dpo_loss`](crate::dpo_loss) needs beside the policy's log-probs, `[B]` each.
pub(crate) struct PairTargets {
    pub(crate) ref_chosen: Tensor,
    pub(crate) ref_rejected: Tensor,
    pub(crate) chosen_lengths: Tensor,
    pub(crate) rejected_lengths: Tensor,
    pub(crate) weights: Tensor,
}

impl PairTargets {
    pub(crate) fn new(pairs: &[ScoredPreference], device: Device) -> Self {
        let column = |value: fn(&ScoredPreference) -> f32| {
            let values: Vec<f32> = pairs.iter().map(value).collect();
            Tensor::from_slice(&values).to_device(device)
        };
        Self {
            ref_chosen: column(|p| p.ref_chosen),
            ref_rejected: column(|p| p.ref_rejected),
            chosen_lengths: column(|p| p.pair.chosen.len() as f32),
            rejected_lengths: column(|p| p.pair.rejected.len() as f32),
            weights: column(|p| p.pair.weight as f32),
        }
    }
}
