//! The rectangular layout of a batch.

use tch::{Device, Tensor};

use crate::{PaddingSide, SequenceBatch};

/// A batch as rectangular tensors, for models that know nothing of packing.
#[derive(Debug)]
pub struct PaddedBatch {
    /// Token ids, `[B, T]` i64, the padding id where there is no token.
    pub input_ids: Tensor,
    /// `[B, T]` bool, `true` where there is a token.
    pub attention_mask: Tensor,
    /// `[B, T]` i64: the token's position in its own sequence, counted from 0; 0 at padding.
    pub position_ids: Tensor,
    /// Column of each sequence's first token.
    pub offsets: Vec<usize>,
    /// Number of tokens of each sequence.
    pub lengths: Vec<usize>,
}

impl PaddedBatch {
    pub(crate) fn new(
        batch: &SequenceBatch,
        pad_id: i64,
        side: PaddingSide,
        device: Device,
    ) -> Self {
        let width = batch.max_len();
        let cells = batch.len() * width;
        let (mut ids, mut mask, mut positions) =
            (vec![pad_id; cells], vec![false; cells], vec![0i64; cells]);
        let (mut offsets, mut lengths) = (Vec::new(), Vec::new());
        for (row, sequence) in batch.sequences().iter().enumerate() {
            let length = sequence.len();
            let offset = match side {
                PaddingSide::Left => width - length,
                PaddingSide::Right => 0,
            };
            let start = row * width + offset;
            for (i, id) in sequence.tokens().enumerate() {
                ids[start + i] = id;
                mask[start + i] = true;
                positions[start + i] = i as i64;
            }
            offsets.push(offset);
            lengths.push(length);
        }
        let shape = [batch.len() as i64, width as i64];
        let place = |t: Tensor| t.view(shape).to_device(device);
        Self {
            input_ids: place(Tensor::from_slice(&ids)),
            attention_mask: place(Tensor::from_slice(&mask)),
            position_ids: place(Tensor::from_slice(&positions)),
            offsets,
            lengths,
        }
    }

    /// Number of sequences, `B`.
    pub fn rows(&self) -> i64 {
        self.lengths.len() as i64
    }

    /// Length of the rows, `T`.
    pub fn width(&self) -> i64 {
        self.input_ids.size()[1]
    }

    /// Whether no row needs padding.
    pub fn is_dense(&self) -> bool {
        self.lengths.iter().all(|&n| n as i64 == self.width())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Sequence;

    #[test]
    fn both_sides() {
        let batch =
            SequenceBatch::new(vec![Sequence::new([1, 2], [3]), Sequence::new([4], [])]).unwrap();
        let flat = |t: &Tensor| Vec::<i64>::try_from(t.view(-1)).unwrap();
        let right = batch.padded(0, PaddingSide::Right, Device::Cpu);
        assert_eq!(flat(&right.input_ids), [1, 2, 3, 4, 0, 0]);
        assert_eq!(right.offsets, [0, 0]);
        let left = batch.padded(0, PaddingSide::Left, Device::Cpu);
        assert_eq!(flat(&left.input_ids), [1, 2, 3, 0, 0, 4]);
        assert_eq!(flat(&left.position_ids), [0, 1, 2, 0, 0, 0]);
        assert_eq!(left.offsets, [0, 2]);
    }
}
