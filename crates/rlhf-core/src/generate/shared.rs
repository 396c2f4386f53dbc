//! Writing responses on several processes.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Generator;
use crate::{
    Completions, Error, FinishReason, KeptSet, Policy, Replicas, Result, RngStreams, Sequence,
    SequenceBatch, Text,
};

/// A completion on its way to the other processes. Log-probabilities are bits, so that none is
/// changed.
#[derive(Serialize, Deserialize)]
struct Written {
    response: Vec<i64>,
    finish: FinishReason,
    text: Option<Text>,
    sampling: Option<Vec<u32>>,
    policy: Option<Vec<u32>>,
    kept: Option<Vec<KeptSet>>,
}

impl<P: Policy + ?Sized> Generator<'_, P> {
    /// [`generate`](Self::generate), where each of `replicas` writes the answers to its share of
    /// the prompts. All get all of them: the same as one process alone would write, as far as the
    /// model's arithmetic does not depend on what is computed side by side.
    ///
    /// # Errors
    /// As [`generate`](Self::generate); [`Error::Peer`] where another process fails.
    pub fn generate_shared(
        &self,
        replicas: &Replicas,
        prompts: &[Arc<[i64]>],
        rng: &RngStreams,
        first_index: u64,
    ) -> Result<Completions> {
        if replicas.size() == 1 || prompts.is_empty() {
            return self.generate(prompts, rng, first_index);
        }
        let samples = self.config.samples_per_prompt;
        let share = replicas.share(prompts.len());
        let own = match share.is_empty() {
            true => Ok(Vec::new()),
            false => {
                let first = first_index + (share.start * samples) as u64;
                let written = self.generate(&prompts[share], rng, first);
                written.and_then(|completions| pack(&completions))
            }
        };
        let mut written: Vec<Written> = Vec::with_capacity(prompts.len() * samples);
        for (rank, message) in replicas.exchange(own)?.iter().enumerate() {
            if !message.is_empty() {
                written.extend(unpack(rank, message)?);
            }
        }
        if written.len() != prompts.len() * samples {
            return Err(Error::LengthMismatch {
                left: "the completions of all processes",
                left_len: written.len(),
                right: "the samples of all prompts",
                right_len: prompts.len() * samples,
            });
        }
        join(prompts, samples, written)
    }
}

fn pack(completions: &Completions) -> Result<Vec<u8>> {
    let bits = |lists: &Option<Vec<Vec<f32>>>, row: usize| {
        let list = lists.as_ref().map(|lists| &lists[row]);
        list.map(|list| list.iter().map(|number| number.to_bits()).collect())
    };
    let rows = completions.batch.sequences().iter().enumerate();
    let written: Vec<Written> = rows
        .map(|(row, sequence)| Written {
            response: sequence.response.clone(),
            finish: completions.finish_reasons[row],
            text: completions.texts.as_ref().map(|texts| texts[row].clone()),
            sampling: bits(&completions.sampling_logprobs, row),
            policy: bits(&completions.policy_logprobs, row),
            kept: completions.kept.as_ref().map(|kept| kept[row].to_vec()),
        })
        .collect();
    serde_json::to_vec(&written).map_err(Error::model)
}

fn unpack(rank: usize, message: &[u8]) -> Result<Vec<Written>> {
    serde_json::from_slice(message).map_err(|error| Error::Peer {
        rank,
        message: format!("its completions are not readable: {error}"),
    })
}

fn join(prompts: &[Arc<[i64]>], samples: usize, written: Vec<Written>) -> Result<Completions> {
    let prompts = prompts.iter().flat_map(|p| std::iter::repeat_n(p, samples));
    let numbers = |bits: Vec<u32>| bits.into_iter().map(f32::from_bits).collect::<Vec<_>>();
    let mut sequences = Vec::with_capacity(written.len());
    let mut finish_reasons = Vec::with_capacity(written.len());
    let (mut texts, mut sampling, mut policy, mut kept) = (vec![], vec![], vec![], vec![]);
    for (prompt, row) in prompts.zip(written) {
        sequences.push(Sequence::new(Arc::clone(prompt), row.response));
        finish_reasons.push(row.finish);
        texts.extend(row.text);
        sampling.extend(row.sampling.map(numbers));
        policy.extend(row.policy.map(numbers));
        kept.extend(row.kept.map(Arc::from));
    }
    let rows = sequences.len();
    Ok(Completions {
        batch: SequenceBatch::new(sequences)?,
        texts: (texts.len() == rows).then_some(texts),
        finish_reasons,
        sampling_logprobs: (sampling.len() == rows).then_some(sampling),
        policy_logprobs: (policy.len() == rows).then_some(policy),
        kept: (kept.len() == rows).then_some(kept),
    })
}
