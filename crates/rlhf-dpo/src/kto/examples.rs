//! Answers that somebody found good, or not.

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, Sequence, SequenceBatch};
use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::reference::host;

/// An answer that somebody found good, or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelledAnswer {
    /// Prompt and answer.
    pub sequence: Sequence,
    /// Whether it is good.
    pub desirable: bool,
}

impl LabelledAnswer {
    /// An answer and its label.
    pub fn new(sequence: Sequence, desirable: bool) -> Self {
        Self {
            sequence,
            desirable,
        }
    }

    /// Both answers of each comparison, one by one: the chosen are desirable. Shuffle them before
    /// they are trained on without shuffling ([`mismatched_answers`] takes the neighbour's).
    pub fn from_pairs(pairs: &[rlhf_core::Preference]) -> Vec<Self> {
        let side = |pair: &rlhf_core::Preference, response: &[i64], desirable| Self {
            sequence: Sequence {
                prompt: pair.prompt.clone(),
                response: response.to_vec(),
            },
            desirable,
        };
        pairs
            .iter()
            .flat_map(|p| [side(p, &p.chosen, true), side(p, &p.rejected, false)])
            .collect()
    }
}

/// An answer together with what the reference thinks of it.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredAnswer {
    /// The answer.
    pub answer: LabelledAnswer,
    /// `log π_ref(answer | prompt)`, in nats.
    pub ref_logprob: f32,
}

/// Each prompt with the answer before it in the batch, the first with the last: what KTO's `z` is
/// estimated on. An answer that does not fit behind its new prompt loses its end.
///
/// The batch is that of an optimiser step, however it is split. Of a single example there is no
/// other answer: `None`, and `z` is 0.
pub fn mismatched_answers(
    answers: &[ScoredAnswer],
    max_length: Option<usize>,
) -> Option<Vec<Sequence>> {
    if answers.len() < 2 {
        return None;
    }
    let others = answers.iter().cycle().skip(answers.len() - 1);
    let mismatched = answers.iter().zip(others).map(|(here, before)| {
        let prompt = here.answer.sequence.prompt.clone();
        let room = max_length.map_or(usize::MAX, |max| max.saturating_sub(prompt.len()));
        let other = &before.answer.sequence.response;
        Sequence {
            prompt,
            response: other[..other.len().min(room)].to_vec(),
        }
    });
    Some(mismatched.collect())
}

/// Log-probabilities of whole responses, `[B]`.
pub(super) fn answer_logprobs(
    model: &(impl Policy + ?Sized),
    sequences: Vec<Sequence>,
) -> Result<Tensor> {
    let scores = model.logprobs(&SequenceBatch::new(sequences)?, &LogprobOptions::default())?;
    let sums = scores
        .logprobs
        .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    Ok(sums.map_err(CoreError::from)?)
}

/// The same on the host, `batch_size` at a time and without gradients.
pub(super) fn host_logprobs(
    model: &(impl Policy + ?Sized),
    sequences: &[Sequence],
    batch_size: usize,
    what: &'static str,
) -> Result<Vec<f32>> {
    let _no_grad = tch::no_grad_guard();
    let mut all = Vec::with_capacity(sequences.len());
    for part in sequences.chunks(batch_size) {
        let sums = answer_logprobs(model, part.to_vec())?;
        all.extend(host(&sums, what, all.len(), 1)?);
    }
    Ok(all)
}

/// What [`kto_loss`](crate::kto_loss) needs beside the policy's log-probs.
pub(super) struct Targets {
    pub(super) reference: Tensor,
    pub(super) desirable: Tensor,
}

impl Targets {
    pub(super) fn new(answers: &[ScoredAnswer], device: Device) -> Self {
        let reference: Vec<f32> = answers.iter().map(|a| a.ref_logprob).collect();
        let desirable: Vec<bool> = answers.iter().map(|a| a.answer.desirable).collect();
        Self {
            reference: Tensor::from_slice(&reference).to_device(device),
            desirable: Tensor::from_slice(&desirable).to_device(device),
        }
    }
}
