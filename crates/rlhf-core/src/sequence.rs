//! Token sequences of a prompt and a response, and ragged batches of them.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::{Error, PackedBatch, PaddedBatch, Result};

/// A prompt and the response to it, as token ids.
///
/// Sequences that hold the *same* `Arc` share their prompt: a model may compute it once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Sequence {
    /// The tokens that the model is given; never scored.
    pub prompt: Arc<[i64]>,
    /// The tokens that the model wrote, or is to write; may be empty.
    pub response: Vec<i64>,
}

impl Sequence {
    /// A sequence of a prompt and a response.
    pub fn new(prompt: impl Into<Arc<[i64]>>, response: impl Into<Vec<i64>>) -> Self {
        Self {
            prompt: prompt.into(),
            response: response.into(),
        }
    }

    /// Number of tokens, `P + R`.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.response.len()
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All tokens, prompt first.
    pub fn tokens(&self) -> impl Iterator<Item = i64> + '_ {
        self.prompt.iter().chain(&self.response).copied()
    }
}

/// A non-empty, ragged batch of [`Sequence`]s, each with a prompt of at least one token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceBatch {
    sequences: Vec<Sequence>,
}

impl SequenceBatch {
    /// Checks and wraps sequences.
    ///
    /// # Errors
    /// [`Error::Empty`] without sequences, [`Error::EmptyPrompt`] where a prompt has no token,
    /// [`Error::TokenOutOfRange`] for a negative id.
    pub fn new(sequences: Vec<Sequence>) -> Result<Self> {
        if sequences.is_empty() {
            return Err(Error::Empty {
                what: "the batch",
                help: "give it at least one sequence",
            });
        }
        let batch = Self { sequences };
        if let Some(row) = batch.sequences.iter().position(|s| s.prompt.is_empty()) {
            return Err(Error::EmptyPrompt { row });
        }
        batch.check_vocabulary(i64::MAX)?;
        Ok(batch)
    }

    /// Fails unless every id is in `0..vocab_size`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] for the first id that is not.
    pub fn check_vocabulary(&self, vocab_size: i64) -> Result<()> {
        for (row, sequence) in self.sequences.iter().enumerate() {
            for (position, id) in sequence.tokens().enumerate() {
                if !(0..vocab_size).contains(&id) {
                    return Err(Error::TokenOutOfRange {
                        row,
                        position,
                        id,
                        vocab_size,
                    });
                }
            }
        }
        Ok(())
    }

    /// Fails unless every sequence fits a context window of `max_length` tokens.
    ///
    /// # Errors
    /// [`Error::TooLong`] for the first sequence that does not fit.
    pub fn check_length(&self, max_length: usize) -> Result<()> {
        match self.sequences.iter().position(|s| s.len() > max_length) {
            Some(row) => Err(Error::TooLong {
                row,
                length: self.sequences[row].len(),
                max_length,
            }),
            None => Ok(()),
        }
    }

    /// Number of sequences, `B`.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// The sequences, in order.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// Takes the sequences out.
    pub fn into_sequences(self) -> Vec<Sequence> {
        self.sequences
    }

    /// The rows of `indices`, in that order; prompts stay shared.
    ///
    /// # Errors
    /// [`Error::Empty`] if `indices` is.
    ///
    /// # Panics
    /// If an index is not below [`len`](Self::len).
    pub fn select(&self, indices: &[usize]) -> Result<Self> {
        Self::new(indices.iter().map(|&i| self.sequences[i].clone()).collect())
    }

    /// The rows by turns of at most `size`, in order; prompts stay shared.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if `size` is 0.
    pub fn split(&self, size: usize) -> Result<Vec<Self>> {
        if size == 0 {
            return Err(Error::config("size", size, "must be at least 1"));
        }
        let part = |rows: &[Sequence]| Self {
            sequences: rows.to_vec(),
        };
        Ok(self.sequences.chunks(size).map(part).collect())
    }

    /// Longest response, `R`.
    pub fn max_response_len(&self) -> usize {
        self.sequences
            .iter()
            .map(|s| s.response.len())
            .max()
            .unwrap_or(0)
    }

    /// Longest sequence, `T`.
    pub fn max_len(&self) -> usize {
        self.sequences.iter().map(Sequence::len).max().unwrap_or(0)
    }

    /// Response tokens of the whole batch.
    pub fn response_tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.response.len()).sum()
    }

    /// The response ids, right-padded with `pad_id`.
    ///
    /// # Shapes
    /// `[B, R]`, i64.
    pub fn responses(&self, pad_id: i64, device: Device) -> Tensor {
        let width = self.max_response_len();
        let mut ids = Vec::with_capacity(self.len() * width);
        for sequence in &self.sequences {
            ids.extend_from_slice(&sequence.response);
            ids.resize(ids.len() + width - sequence.response.len(), pad_id);
        }
        Tensor::from_slice(&ids)
            .view([self.len() as i64, width as i64])
            .to_device(device)
    }

    /// `true` at the response tokens that exist.
    ///
    /// # Shapes
    /// `[B, R]`, bool.
    pub fn response_mask(&self, device: Device) -> Tensor {
        let lengths: Vec<i64> = self
            .sequences
            .iter()
            .map(|s| s.response.len() as i64)
            .collect();
        let columns = Tensor::arange(self.max_response_len() as i64, (Kind::Int64, device));
        columns
            .unsqueeze(0)
            .lt_tensor(&Tensor::from_slice(&lengths).to_device(device).unsqueeze(1))
    }

    /// The batch as padded `[B, T]` tensors.
    pub fn padded(&self, pad_id: i64, side: PaddingSide, device: Device) -> PaddedBatch {
        PaddedBatch::new(self, pad_id, side, device)
    }

    /// The batch as one run of `[N]` tokens with no padding. A prompt that several sequences hold
    /// by the same `Arc`, neighbours or not, is there once.
    pub fn packed(&self, device: Device) -> PackedBatch {
        PackedBatch::shared(self, device)
    }

    /// [`packed`](Self::packed) with a prompt for every sequence: one segment each, in order.
    pub fn packed_apart(&self, device: Device) -> PackedBatch {
        PackedBatch::apart(self, device)
    }
}

/// Which end of a padded row holds the padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PaddingSide {
    /// Padding first: all rows end at the same column, as decoding with a padded batch needs.
    Left,
    /// Padding last.
    Right,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_checked_where_it_enters() {
        assert!(matches!(
            SequenceBatch::new(vec![]),
            Err(Error::Empty { .. })
        ));
        let no_prompt = vec![Sequence::new([1], [2]), Sequence::new([], [2])];
        assert!(matches!(
            SequenceBatch::new(no_prompt),
            Err(Error::EmptyPrompt { row: 1 })
        ));
        let negative = SequenceBatch::new(vec![Sequence::new([1], [2, -1])]);
        assert!(matches!(
            negative,
            Err(Error::TokenOutOfRange {
                position: 2,
                id: -1,
                ..
            })
        ));
        let batch = SequenceBatch::new(vec![Sequence::new([1, 9], [2])]).unwrap();
        assert!(matches!(
            batch.check_vocabulary(9),
            Err(Error::TokenOutOfRange { position: 1, .. })
        ));
        assert!(matches!(
            batch.check_length(2),
            Err(Error::TooLong { length: 3, .. })
        ));
    }

    #[test]
    fn responses_are_right_padded_and_masked() {
        let batch =
            SequenceBatch::new(vec![Sequence::new([1], [5, 6]), Sequence::new([1], [7])]).unwrap();
        let ids = Vec::<i64>::try_from(batch.responses(0, Device::Cpu).view(-1)).unwrap();
        assert_eq!(ids, [5, 6, 7, 0]);
        let mask = Vec::<bool>::try_from(batch.response_mask(Device::Cpu).view(-1)).unwrap();
        assert_eq!(mask, [true, true, true, false]);
    }
}
