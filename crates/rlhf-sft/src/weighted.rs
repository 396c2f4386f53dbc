//! Batches whose prompts are learned too.

use rlhf_core::{Sequence, SequenceBatch};
use tch::{Device, Tensor};

use crate::Result;

/// A batch and how much each of its tokens counts.
///
/// Policies score responses only. Where prompts count, all but their first token is moved into
/// the response, and weights tell the two apart.
#[derive(Debug)]
pub(crate) struct WeightedBatch {
    sequences: SequenceBatch,
    /// Of each row, the tokens at the response's start that were the prompt's.
    moved: Vec<usize>,
    prompt_weight: f64,
}

impl WeightedBatch {
    pub(crate) fn new(batch: SequenceBatch, prompt_weight: f64) -> Result<Self> {
        if prompt_weight == 0.0 {
            return Ok(Self {
                moved: vec![0; batch.len()],
                sequences: batch,
                prompt_weight,
            });
        }
        let moved = batch.sequences().iter().map(|s| s.prompt.len() - 1);
        let whole = |s: &Sequence| {
            let tokens: Vec<i64> = s.tokens().collect();
            Sequence::new(&tokens[..1], &tokens[1..])
        };
        Ok(Self {
            moved: moved.collect(),
            sequences: SequenceBatch::new(batch.sequences().iter().map(whole).collect())?,
            prompt_weight,
        })
    }

    pub(crate) fn sequences(&self) -> &SequenceBatch {
        &self.sequences
    }

    /// Sum of the weights of all tokens.
    pub(crate) fn total_weight(&self) -> f64 {
        let moved: usize = self.moved.iter().sum();
        let written = self.sequences.response_tokens() - moved;
        written as f64 + self.prompt_weight * moved as f64
    }

    /// `[B, R]` f32; `None` where every token counts 1.
    pub(crate) fn weights(&self, device: Device) -> Option<Tensor> {
        if self.moved.iter().all(|&moved| moved == 0) {
            return None;
        }
        let width = self.sequences.max_response_len();
        let weight = |from_prompt: bool| match from_prompt {
            true => self.prompt_weight as f32,
            false => 1.0,
        };
        let weights: Vec<f32> = self
            .moved
            .iter()
            .flat_map(|&moved| (0..width).map(move |column| weight(column < moved)))
            .collect();
        let shape = [self.moved.len() as i64, width as i64];
        Some(Tensor::from_slice(&weights).view(shape).to_device(device))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn batch() -> SequenceBatch {
        let rows = vec![Sequence::new([1, 2, 3], [4]), Sequence::new([5], [6, 7])];
        SequenceBatch::new(rows).unwrap()
    }

    #[test]
    fn prompts_move_into_the_response_with_their_weight() {
        let weighted = WeightedBatch::new(batch(), 0.25).unwrap();
        assert_eq!(
            weighted.sequences().sequences(),
            [Sequence::new([1], [2, 3, 4]), Sequence::new([5], [6, 7])]
        );
        let weights = weighted.weights(Device::Cpu).unwrap();
        assert_eq!(
            Vec::<f32>::try_from(weights.view(-1)).unwrap(),
            [0.25, 0.25, 1.0, 1.0, 1.0, 1.0]
        );
        assert_eq!(weighted.total_weight(), 3.5);
    }

    #[test]
    fn without_weight_nothing_moves() {
        let weighted = WeightedBatch::new(batch(), 0.0).unwrap();
        assert_eq!(weighted.sequences(), &batch());
        assert!(weighted.weights(Device::Cpu).is_none());
        assert_eq!(weighted.total_weight(), 3.0);
    }
}
