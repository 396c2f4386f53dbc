//! What policy and reference think of some pairs, as the losses read it.

use std::sync::Arc;

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, Preference, Sequence, SequenceBatch};
use tch::{Device, Kind, Tensor};

use crate::objective::PairWeighting;
use crate::{
    BatchMeans, DpoInputs, DpoOutput, Objective, PromptLogprobs, ReferenceLogprobs, Result,
    ScoredPreference,
};

/// A policy's log-probabilities of some pairs, `[B]` f32 each.
pub(crate) struct PairScores {
    pub(crate) chosen: Tensor,
    pub(crate) rejected: Tensor,
    /// Of the prompts after their first tokens, where they are learned.
    prompt: Option<Tensor>,
    /// Weights of the pairs, without gradient.
    weights: Option<Tensor>,
}

impl PairScores {
    /// What `objective` needs from the policy. Chosen and rejected share their prompt, which the
    /// model computes once.
    pub(crate) fn of(
        model: &(impl Policy + ?Sized),
        pairs: &[ScoredPreference],
        objective: &Objective,
    ) -> Result<Self> {
        let mut sequences = interleaved(pairs.iter().map(|p| &p.pair));
        if objective.learns_prompts() {
            sequences.extend(pairs.iter().map(|p| prompt_as_response(&p.pair.prompt)));
        }
        let batch = SequenceBatch::new(sequences)?;
        let scores = model.logprobs(&batch, &LogprobOptions::default())?;
        let sums = row_sums(&scores.logprobs, &batch, pairs.len(), objective.ld_alpha)?;
        let rows = pairs.len() as i64;
        let sides = sums.f_narrow(0, 0, 2 * rows).map_err(CoreError::from)?;
        let sides = sides.view([rows, 2]);
        Ok(Self {
            chosen: sides.select(1, 0),
            rejected: sides.select(1, 1),
            prompt: objective
                .learns_prompts()
                .then(|| sums.narrow(0, 2 * rows, rows)),
            weights: match objective.weighting {
                PairWeighting::Uniform => None,
                PairWeighting::Wpo => Some(wpo_weights(model, &batch, &scores.logprobs, rows)?),
            },
        })
    }

    fn tensors(&self) -> [Option<&Tensor>; 4] {
        let Self {
            chosen,
            rejected,
            prompt,
            weights,
        } = self;
        [
            Some(chosen),
            Some(rejected),
            prompt.as_ref(),
            weights.as_ref(),
        ]
    }

    /// The parts of a batch as one, whose gradients are wanted but go no further.
    pub(crate) fn leaves(parts: &[Self]) -> Result<Self> {
        let whole = Self::cat(parts)?;
        let leaf = |t: Tensor| t.detach().set_requires_grad(true);
        Ok(Self {
            chosen: leaf(whole.chosen),
            rejected: leaf(whole.rejected),
            prompt: whole.prompt.map(leaf),
            weights: whole.weights,
        })
    }

    /// The parts of a batch as one.
    pub(crate) fn cat(parts: &[Self]) -> Result<Self> {
        let cat = |i: usize| -> Result<Option<Tensor>> {
            let column: Vec<_> = parts.iter().filter_map(|p| p.tensors()[i]).collect();
            match column.is_empty() {
                true => Ok(None),
                false => Ok(Some(Tensor::f_cat(&column, 0).map_err(CoreError::from)?)),
            }
        };
        let nothing = || CoreError::Empty {
            what: "the batch of comparisons",
            help: "give it at least one pair",
        };
        Ok(Self {
            chosen: cat(0)?.ok_or_else(nothing)?,
            rejected: cat(1)?.ok_or_else(nothing)?,
            prompt: cat(2)?,
            weights: cat(3)?,
        })
    }

    pub(crate) fn detached(&self) -> Self {
        Self {
            chosen: self.chosen.detach(),
            rejected: self.rejected.detach(),
            prompt: self.prompt.as_ref().map(Tensor::detach),
            weights: self.weights.as_ref().map(Tensor::detach),
        }
    }

    /// The gradients that [`leaves`](Self::leaves) got.
    pub(crate) fn slopes(&self) -> [Option<Tensor>; 3] {
        let slope = |t: &Tensor| {
            let grad = t.grad();
            grad.defined().then_some(grad)
        };
        [
            slope(&self.chosen),
            slope(&self.rejected),
            self.prompt.as_ref().and_then(slope),
        ]
    }

    /// `Σ slope · log-probability` of the rows from `start`: the gradient of a loss whose slopes
    /// are known, with a value of no meaning.
    pub(crate) fn along(&self, slopes: &[Option<Tensor>; 3], start: i64) -> Result<Tensor> {
        let mut sum =
            Tensor::f_zeros([], (Kind::Float, self.chosen.device())).map_err(CoreError::from)?;
        for (column, slope) in self.tensors().into_iter().zip(slopes) {
            if let (Some(column), Some(slope)) = (column, slope) {
                let slope = slope.narrow(0, start, column.size()[0]);
                sum += (column * slope).sum(Kind::Float);
            }
        }
        Ok(sum)
    }

    /// Mean weight of the pairs beside the data's, where there are any.
    pub(crate) fn weights(&self) -> Option<&Tensor> {
        self.weights.as_ref()
    }

    /// The losses of these pairs.
    pub(crate) fn judge(
        &self,
        targets: &PairTargets,
        objective: &Objective,
        means: BatchMeans,
    ) -> Result<DpoOutput> {
        let reference = targets.reference.as_ref();
        objective.losses(DpoInputs {
            policy_chosen: &self.chosen,
            policy_rejected: &self.rejected,
            reference: reference.map(|[chosen, rejected]| ReferenceLogprobs { chosen, rejected }),
            chosen_lengths: &targets.chosen_lengths,
            rejected_lengths: &targets.rejected_lengths,
            prompt: self.prompt.as_ref().map(|logprobs| PromptLogprobs {
                logprobs,
                lengths: &targets.prompt_lengths,
            }),
            pair_weights: self.weights(),
            means: Some(means),
        })
    }
}

/// What a loss needs beside the policy's log-probs, `[B]` each.
pub(crate) struct PairTargets {
    /// Of chosen and rejected answers.
    pub(crate) reference: Option<[Tensor; 2]>,
    pub(crate) chosen_lengths: Tensor,
    pub(crate) rejected_lengths: Tensor,
    prompt_lengths: Tensor,
    pub(crate) weights: Tensor,
}

impl PairTargets {
    pub(crate) fn new(pairs: &[ScoredPreference], referenced: bool, device: Device) -> Self {
        let column = |value: fn(&ScoredPreference) -> f32| {
            let values: Vec<f32> = pairs.iter().map(value).collect();
            Tensor::from_slice(&values).to_device(device)
        };
        Self {
            reference: referenced.then(|| [column(|p| p.ref_chosen), column(|p| p.ref_rejected)]),
            chosen_lengths: column(|p| p.pair.chosen.len() as f32),
            rejected_lengths: column(|p| p.pair.rejected.len() as f32),
            prompt_lengths: column(|p| p.pair.prompt.len().saturating_sub(1) as f32),
            weights: column(|p| p.pair.weight as f32),
        }
    }
}

/// Chosen and rejected by turns (rows `2i` and `2i + 1`), which share their prompt.
pub(crate) fn interleaved<'a>(pairs: impl Iterator<Item = &'a Preference>) -> Vec<Sequence> {
    let sequence = |prompt: &Arc<[i64]>, response: &[i64]| Sequence {
        prompt: Arc::clone(prompt),
        response: response.to_vec(),
    };
    pairs
        .flat_map(|pair| [&pair.chosen, &pair.rejected].map(|r| sequence(&pair.prompt, r)))
        .collect()
}

fn prompt_as_response(prompt: &[i64]) -> Sequence {
    let (first, rest) = prompt.split_at(prompt.len().min(1));
    Sequence::new(first, rest)
}

/// Sums over each row's tokens; those of the first `2 · pairs` rows with LD-DPO's weights.
pub(crate) fn row_sums(
    logprobs: &Tensor,
    batch: &SequenceBatch,
    pairs: usize,
    ld_alpha: Option<f64>,
) -> Result<Tensor> {
    // Masked tokens are 0.
    let sum = |logprobs: &Tensor| logprobs.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    let Some(alpha) = ld_alpha else {
        return Ok(sum(logprobs).map_err(CoreError::from)?);
    };
    let width = batch.max_response_len();
    let mut weights = vec![1f32; batch.len() * width];
    for (pair, sides) in batch.sequences()[..2 * pairs].chunks_exact(2).enumerate() {
        let shared = sides[0].response.len().min(sides[1].response.len());
        for row in [2 * pair, 2 * pair + 1] {
            weights[row * width + shared..(row + 1) * width].fill(alpha as f32);
        }
    }
    let weights = Tensor::from_slice(&weights)
        .view([batch.len() as i64, width as i64])
        .to_device(logprobs.device());
    Ok(sum(&(logprobs * weights)).map_err(CoreError::from)?)
}

/// `exp(mean(log π − log Σ_v π²))` of both answers, multiplied.
///
/// With logits `x`, `log Σ π² = lse(2x) − 2 lse(x)`, and at temperature ½ a token has
/// log-probability `2x − lse(2x)`. So the difference is `log π_½ − log π`, which any policy can
/// give.
fn wpo_weights(
    model: &(impl Policy + ?Sized),
    batch: &SequenceBatch,
    logprobs: &Tensor,
    pairs: i64,
) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let sharper = LogprobOptions {
        temperature: 0.5,
        ..LogprobOptions::default()
    };
    let sharp = model.logprobs(batch, &sharper)?;
    let lengths: Vec<f32> = batch
        .sequences()
        .iter()
        .map(|s| s.response.len().max(1) as f32)
        .collect();
    let lengths = Tensor::from_slice(&lengths).to_device(logprobs.device());
    let sums = (sharp.logprobs - logprobs.detach()).f_sum_dim_intlist(
        [1i64].as_slice(),
        false,
        Kind::Float,
    );
    let means = sums.map_err(CoreError::from)? / lengths;
    let sides = means.narrow(0, 0, 2 * pairs).view([pairs, 2]);
    Ok(sides
        .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
        .and_then(|logs| logs.f_exp())
        .map_err(CoreError::from)?)
}
