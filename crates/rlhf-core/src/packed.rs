//! The layout without padding.

use std::ops::Range;

use tch::{Device, Tensor};

use crate::SequenceBatch;

/// A batch as one run of tokens: `N` of them, no padding between or after the sequences.
///
/// Every layer that treats tokens one by one runs on `[N, H]`; only attention looks at
/// [`segments`](Self::segments).
#[derive(Debug)]
pub struct PackedBatch {
    /// Token ids, `[N]` i64.
    pub input_ids: Tensor,
    /// `[N]` i64: each token's position in its own sequence, counted from 0.
    pub position_ids: Tensor,
    /// Where each sequence lies in the run.
    pub segments: Vec<Range<i64>>,
    /// Where each sequence's response lies in the run; empty ranges for empty responses.
    pub responses: Vec<Range<i64>>,
}

impl PackedBatch {
    pub(crate) fn new(batch: &SequenceBatch, device: Device) -> Self {
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let (mut segments, mut responses) = (Vec::new(), Vec::new());
        for sequence in batch.sequences() {
            let start = ids.len() as i64;
            ids.extend(sequence.tokens());
            positions.extend(0..sequence.len() as i64);
            let end = ids.len() as i64;
            segments.push(start..end);
            responses.push(start + sequence.prompt.len() as i64..end);
        }
        Self {
            input_ids: Tensor::from_slice(&ids).to_device(device),
            position_ids: Tensor::from_slice(&positions).to_device(device),
            segments,
            responses,
        }
    }

    /// Number of tokens, `N`.
    pub fn tokens(&self) -> i64 {
        self.segments.last().map_or(0, |s| s.end)
    }

    /// Length of the longest sequence, `T`.
    pub fn max_len(&self) -> i64 {
        self.segments
            .iter()
            .map(|s| s.end - s.start)
            .max()
            .unwrap_or(0)
    }

    /// Row of the run that *predicts* each response token: the token before it. In the order of
    /// the sequences, then of their responses.
    ///
    /// # Shapes
    /// `[S]` i64 where `S` is the number of response tokens.
    pub fn predicting_rows(&self) -> Tensor {
        let rows: Vec<i64> = self
            .responses
            .iter()
            .flat_map(|r| r.start - 1..r.end - 1)
            .collect();
        Tensor::from_slice(&rows).to_device(self.input_ids.device())
    }

    /// Row of the run of each sequence's last token.
    ///
    /// # Shapes
    /// `[B]` i64.
    pub fn last_rows(&self) -> Tensor {
        let rows: Vec<i64> = self.segments.iter().map(|s| s.end - 1).collect();
        Tensor::from_slice(&rows).to_device(self.input_ids.device())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Sequence;

    #[test]
    fn rows_of_a_run() {
        let batch = SequenceBatch::new(vec![Sequence::new([1, 2], [3, 4]), Sequence::new([5], [])])
            .unwrap();
        let packed = batch.packed(Device::Cpu);
        let flat = |t: &Tensor| Vec::<i64>::try_from(t).unwrap();
        assert_eq!(flat(&packed.input_ids), [1, 2, 3, 4, 5]);
        assert_eq!(flat(&packed.position_ids), [0, 1, 2, 3, 0]);
        assert_eq!(packed.segments, [0..4, 4..5]);
        assert_eq!(flat(&packed.predicting_rows()), [1, 2]);
        assert_eq!(flat(&packed.last_rows()), [3, 4]);
    }
}
