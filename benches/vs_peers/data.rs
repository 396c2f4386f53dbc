//! The token ids that both sides get.

use std::path::Path;
use std::sync::Arc;

use rlhf::core::{Preference, PreferenceBatch, Sequence, SequenceBatch};
use serde::{Deserialize, Serialize};

use crate::{Result, Work};

#[derive(Deserialize)]
struct Pair {
    prompt: Vec<i64>,
    chosen: Vec<i64>,
    rejected: Vec<i64>,
}

/// Count and sum of the ids of a step's sequences, prompts counted with every answer: equal on both
/// sides if they did the same work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tokens {
    pub(crate) tokens: i64,
    pub(crate) id_sum: i64,
}

impl Tokens {
    pub(crate) fn of(batch: &SequenceBatch) -> Self {
        let ids = || batch.sequences().iter().flat_map(Sequence::tokens);
        Self {
            tokens: ids().count() as i64,
            id_sum: ids().sum(),
        }
    }
}

/// The pairs of every step.
pub(crate) fn pairs(work: &Work) -> Result<Vec<PreferenceBatch>> {
    let pairs = read(&work.pairs)?;
    (0..work.steps)
        .map(|step| {
            let first = step * work.batch;
            let pairs = (first..first + work.batch).map(|i| pairs[i % pairs.len()].clone());
            Ok(PreferenceBatch::new(pairs.collect())?)
        })
        .collect()
}

/// The prompts of every step with their right answers.
pub(crate) fn demonstrations(work: &Work) -> Result<Vec<SequenceBatch>> {
    pairs(work)?
        .iter()
        .map(|batch| {
            let right = |pair: &Preference| Sequence {
                prompt: Arc::clone(&pair.prompt),
                response: pair.chosen.clone(),
            };
            Ok(SequenceBatch::new(
                batch.pairs().iter().map(right).collect(),
            )?)
        })
        .collect()
}

fn read(path: &Path) -> Result<Vec<Preference>> {
    std::fs::read_to_string(path)?
        .lines()
        .map(|line| {
            let pair: Pair = serde_json::from_str(line)?;
            Ok(Preference::new(pair.prompt, pair.chosen, pair.rejected))
        })
        .collect()
}
