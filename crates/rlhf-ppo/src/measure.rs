//! Running the models over finished responses.

use rlhf_core::{
    Completions, Error as CoreError, LogprobOptions, Policy, Replicas, RewardModel, SequenceBatch,
};
use tch::{Device, Kind, Tensor};

use crate::microbatching::Microbatching;
use crate::{Constraint, Error, Result, critic};

/// How models are run over finished responses.
#[derive(Clone, Copy)]
pub(crate) struct Forward {
    /// Divides the logits.
    pub(crate) temperature: f64,
    pub(crate) microbatching: Microbatching,
}

/// One finite number per completion, on the CPU.
pub(crate) fn judgement(model: &str, numbers: &Tensor, rows: usize) -> Result<Vec<f64>> {
    if numbers.size() != [rows as i64] {
        return Err(Error::WrongJudgement {
            model: model.to_string(),
            got: numbers.size(),
            expected: rows,
        });
    }
    let numbers = numbers.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)?;
    Ok(Vec::try_from(numbers).map_err(CoreError::from)?)
}

/// What a reward model says, the same in all processes; finite or not.
pub(crate) fn judged(
    name: &str,
    reward: &dyn RewardModel,
    completions: &Completions,
) -> Result<Vec<f64>> {
    let rows = completions.batch.len();
    let ask = || judgement(name, &reward.score(completions)?, rows);
    Replicas::current().numbers_of_the_first(reward.is_asked_everywhere(), ask)
}

/// What the reward model says. `[B]` f32 on the CPU.
pub(crate) fn scores(reward: &dyn RewardModel, completions: &Completions) -> Result<Tensor> {
    let scores = judged("the reward model", reward, completions)?;
    if let Some(row) = scores.iter().position(|s| !s.is_finite()) {
        let value = scores[row];
        return Err(CoreError::NonFinite {
            what: "the score",
            row,
            value,
        }
        .into());
    }
    Ok(Tensor::from_slice(&scores).to_kind(Kind::Float))
}

/// What a constraint's model says. `[B]` f32 on the CPU.
pub(crate) fn costs(constraint: &Constraint, completions: &Completions) -> Result<Vec<f64>> {
    let rows = completions.batch.len();
    let model = &constraint.model;
    let ask = || judgement(&constraint.name, &model.cost(completions)?, rows);
    let costs = Replicas::current().numbers_of_the_first(model.is_asked_everywhere(), ask)?;
    match costs.iter().position(|c| !c.is_finite()) {
        Some(row) => Err(Error::NonFiniteCost {
            constraint: constraint.name.clone(),
            row,
            value: costs[row],
        }),
        None => Ok(costs),
    }
}

/// Log-probabilities of all responses, a microbatch at a time. `[B, R]` f32 on the CPU.
pub(crate) fn logprobs(
    what: &'static str,
    policy: &dyn Policy,
    completions: &Completions,
    forward: Forward,
) -> Result<Tensor> {
    let options = LogprobOptions {
        temperature: forward.temperature,
        entropy: false,
    };
    let batch = &completions.batch;
    let width = batch.max_response_len() as i64;
    let logprobs = by_microbatch(batch, forward.microbatching, width, |rows| {
        let part = batch.select(rows)?;
        let kept = completions.kept.as_ref();
        let kept: Option<Vec<_>> =
            kept.map(|kept| rows.iter().map(|&row| kept[row].clone()).collect());
        let out = critic::logprobs(policy, &part, kept.as_deref(), &options)?;
        check_shape("logprobs", &out.logprobs, &part, 0)?;
        Ok(out.logprobs)
    })?;
    check_finite(what, &logprobs)?;
    Ok(logprobs)
}

/// The log-probabilities that the responses were sampled with. `[B, R]` f32 on the CPU.
pub(crate) fn sampled_logprobs(batch: &SequenceBatch, sampled: &[Vec<f32>]) -> Result<Tensor> {
    let width = batch.max_response_len();
    let mut flat = Vec::with_capacity(batch.len() * width);
    for (sequence, row) in batch.sequences().iter().zip(sampled) {
        if row.len() != sequence.response.len() {
            return Err(CoreError::LengthMismatch {
                left: "sampling_logprobs",
                left_len: row.len(),
                right: "the response",
                right_len: sequence.response.len(),
            }
            .into());
        }
        flat.extend_from_slice(row);
        flat.resize(flat.len() + width - row.len(), 0.0);
    }
    let flat = Tensor::from_slice(&flat);
    Ok(flat.f_view([batch.len() as i64, width as i64])?)
}

/// Values of all states, a microbatch at a time. `[B, R + 1]` f32 on the CPU.
pub(crate) fn values(
    batch: &SequenceBatch,
    microbatching: Microbatching,
    values_of: impl Fn(&SequenceBatch) -> rlhf_core::Result<Tensor>,
) -> Result<Tensor> {
    let width = batch.max_response_len() as i64 + 1;
    by_microbatch(batch, microbatching, width, |rows| {
        let part = batch.select(rows)?;
        let values = values_of(&part)?;
        check_shape("values", &values, &part, 1)?;
        Ok(values)
    })
}

/// Runs `f` over microbatches and stacks what it returns, padded with 0 to `width` columns. Each of
/// several processes runs its share, and all get all of it.
fn by_microbatch(
    batch: &SequenceBatch,
    microbatching: Microbatching,
    width: i64,
    f: impl Fn(&[usize]) -> Result<Tensor>,
) -> Result<Tensor> {
    let replicas = Replicas::current();
    let rows: Vec<usize> = (0..batch.len()).collect();
    let cut = microbatching
        .shared(&replicas, rows.len())
        .cut(batch, &rows);
    let run = || -> Result<Option<Tensor>> {
        let parts = cut[replicas.share(cut.len())]
            .iter()
            .map(|rows| {
                let part = f(rows)?.f_to_kind(Kind::Float)?;
                let missing = width - part.size()[1];
                Ok(part.f_constant_pad_nd([0, missing])?)
            })
            .collect::<Result<Vec<_>>>()?;
        if parts.is_empty() {
            return Ok(None);
        }
        // One transfer for all of them.
        Ok(Some(Tensor::f_cat(&parts, 0)?.f_to_device(Device::Cpu)?))
    };
    replicas.gather_rows(run())
}

pub(crate) fn check_shape(
    what: &'static str,
    got: &Tensor,
    batch: &SequenceBatch,
    extra: i64,
) -> rlhf_core::Result<()> {
    let want = vec![batch.len() as i64, batch.max_response_len() as i64 + extra];
    if got.size() == want {
        return Ok(());
    }
    Err(CoreError::ShapeMismatch {
        left: what,
        left_shape: got.size(),
        right: "the batch",
        right_shape: want,
    })
}

/// Fails for the first row that holds a number that is not finite.
///
/// # Shapes
/// `[B, ..]` on the CPU.
pub(crate) fn check_finite(what: &'static str, tensor: &Tensor) -> rlhf_core::Result<()> {
    if bool::try_from(tensor.isfinite().all())? {
        return Ok(());
    }
    let rows = tensor.size()[0];
    for row in 0..rows {
        let numbers = Vec::<f32>::try_from(tensor.get(row).contiguous().view(-1))?;
        if let Some(value) = numbers.into_iter().find(|n| !n.is_finite()) {
            return Err(CoreError::NonFinite {
                what,
                row: row as usize,
                value: f64::from(value),
            });
        }
    }
    Ok(())
}
