//! A share of language modelling in the updates, against forgetting.

use rlhf_core::{
    DataCursor, DataOrder, Error, LogprobOptions, Policy, Sequence, SequenceBatch, masked_sum,
};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::Result;

/// The pretraining loss: `coef` times the token mean of `−logprob` over texts of the pretraining
/// data ("PPO-ptx": Ouyang et al. 2022, arXiv 2203.02155, equation 2).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PtxConfig {
    /// Weight of the loss.
    pub coef: f64,
    /// Texts for each optimiser step of PPO.
    pub batch_size: usize,
    /// Which step its gradient goes into.
    pub step: PtxStep,
}

/// Which optimiser step the gradient of the pretraining loss goes into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PtxStep {
    /// PPO's own: gradients are added up (InstructGPT).
    Joint,
    /// One of its own after PPO's (DeepSpeed-Chat). The schedule counts both.
    Separate,
}

impl Default for PtxConfig {
    /// Coefficient 27.8 (InstructGPT), eight texts, one step for both.
    fn default() -> Self {
        Self {
            coef: 27.8,
            batch_size: 8,
            step: PtxStep::Joint,
        }
    }
}

impl PtxConfig {
    /// Fails for numbers that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], naming the field.
    pub fn validate(&self) -> rlhf_core::Result<()> {
        if !(self.coef.is_finite() && self.coef > 0.0) {
            let reason = "a positive number is needed; leave ptx out for none";
            return Err(Error::config("ptx.coef", self.coef, reason));
        }
        match self.batch_size {
            0 => Err(Error::config("ptx.batch_size", 0, "at least 1 is needed")),
            _ => Ok(()),
        }
    }
}

/// The texts, and the place in them.
pub(crate) struct Pretraining {
    texts: Vec<Sequence>,
    pub(crate) cursor: DataCursor,
}

impl Pretraining {
    /// # Errors
    /// No text, or none with a token to score.
    pub(crate) fn new(texts: Vec<Sequence>, seed: u64) -> Result<Self> {
        let batch = SequenceBatch::new(texts)?;
        if let Some(row) = batch.sequences().iter().position(|s| s.response.is_empty()) {
            return Err(Error::config(
                "pretraining",
                format!("text {row}"),
                "has no response token, and only those are scored",
            )
            .into());
        }
        // Another order than that of the prompts.
        let cursor = DataCursor::new(seed ^ 0x7074_7800, batch.len(), DataOrder::Shuffled)?;
        Ok(Self {
            texts: batch.into_sequences(),
            cursor,
        })
    }

    /// The next texts, and the place after them, which counts once their step is done.
    pub(crate) fn next(&self, size: usize) -> Result<(SequenceBatch, DataCursor)> {
        let mut cursor = self.cursor.clone();
        let rows = cursor.next_full_batch(size);
        let texts = rows.into_iter().map(|i| self.texts[i].clone()).collect();
        Ok((SequenceBatch::new(texts)?, cursor))
    }

    /// Fails for a place in other texts.
    pub(crate) fn check(&self, cursor: &DataCursor) -> Result<()> {
        Ok(cursor.check_items(self.texts.len())?)
    }
}

/// `Σ −logprob / tokens` of a microbatch of a batch with that many response tokens.
pub(crate) fn ptx_loss(
    policy: &dyn Policy,
    batch: &SequenceBatch,
    tokens: usize,
) -> Result<Tensor> {
    let out = policy.logprobs(batch, &LogprobOptions::default())?;
    Ok(masked_sum(&out.logprobs, &out.mask) * (-1.0 / tokens as f64))
}
