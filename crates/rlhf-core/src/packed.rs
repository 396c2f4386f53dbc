//! The layout without padding, in which a prompt that several sequences share is there once.

use std::collections::HashMap;
use std::ops::Range;

use tch::{Device, Tensor};

use crate::SequenceBatch;

/// A batch as one run of tokens: `N` of them, no padding between or after the sequences.
///
/// Every layer that treats tokens one by one runs on `[N, H]`; only attention looks at
/// [`segments`](Self::segments). A sequence's tokens are those of its prompt's and its response's
/// rows, which lie apart where the prompt is [shared](SequenceBatch::packed).
#[derive(Debug)]
pub struct PackedBatch {
    /// Token ids, `[N]` i64.
    pub input_ids: Tensor,
    /// `[N]` i64: each token's position in its own sequence, counted from 0.
    pub position_ids: Tensor,
    /// The run from its first row to its last, by what each token may look at.
    pub segments: Vec<Segment>,
    /// Where each sequence's prompt lies in the run; the same rows for sequences that share it.
    pub prompts: Vec<Range<i64>>,
    /// Where each sequence's response lies in the run; empty ranges for empty responses.
    pub responses: Vec<Range<i64>>,
}

/// Neighbouring rows of a run of which each looks at those before it in the segment, and at a
/// prefix elsewhere in the run if there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The segment's own rows.
    pub rows: Range<i64>,
    /// Rows that all of its own come after, as far as attention is concerned: a shared prompt.
    /// They are the first rows of an earlier segment that has no prefix itself.
    pub prefix: Option<Range<i64>>,
}

impl Segment {
    /// Rows that begin a sequence.
    pub fn whole(rows: Range<i64>) -> Self {
        Self { rows, prefix: None }
    }

    /// Number of its own rows.
    #[allow(clippy::len_without_is_empty)] // a layout has no empty ones
    pub fn len(&self) -> i64 {
        self.rows.end - self.rows.start
    }
}

impl PackedBatch {
    /// Prompts once for all sequences that hold the same `Arc`: the first of them follows its
    /// prompt, and the others' responses come after it.
    pub(crate) fn shared(batch: &SequenceBatch, device: Device) -> Self {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut group_of = HashMap::new();
        for (i, sequence) in batch.sequences().iter().enumerate() {
            // Slices of one address and length are one prompt.
            let group = *group_of
                .entry(std::ptr::from_ref(&*sequence.prompt))
                .or_insert(groups.len());
            match groups.get_mut(group) {
                Some(members) => members.push(i),
                None => groups.push(vec![i]),
            }
        }
        Self::of_groups(batch, &groups, device)
    }

    /// Every sequence on its own, in order.
    pub(crate) fn apart(batch: &SequenceBatch, device: Device) -> Self {
        let groups: Vec<Vec<usize>> = (0..batch.len()).map(|i| vec![i]).collect();
        Self::of_groups(batch, &groups, device)
    }

    fn of_groups(batch: &SequenceBatch, groups: &[Vec<usize>], device: Device) -> Self {
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let mut segments = Vec::new();
        let mut prompts = vec![0..0; batch.len()];
        let mut responses = prompts.clone();
        for members in groups {
            let mut prompt = None;
            for &i in members {
                let sequence = &batch.sequences()[i];
                let start = ids.len() as i64;
                let length = sequence.prompt.len() as i64;
                let prefix = prompt.clone();
                let rows = prompt.get_or_insert_with(|| {
                    ids.extend_from_slice(&sequence.prompt);
                    positions.extend(0..length);
                    start..start + length
                });
                prompts[i] = rows.clone();
                let response = ids.len() as i64;
                ids.extend_from_slice(&sequence.response);
                positions.extend(length..sequence.len() as i64);
                let end = ids.len() as i64;
                if start < end {
                    segments.push(Segment {
                        rows: start..end,
                        prefix,
                    });
                }
                responses[i] = response..end;
            }
        }
        Self {
            input_ids: Tensor::from_slice(&ids).to_device(device),
            position_ids: Tensor::from_slice(&positions).to_device(device),
            segments,
            prompts,
            responses,
        }
    }

    /// Number of tokens, `N`.
    pub fn tokens(&self) -> i64 {
        self.segments.last().map_or(0, |s| s.rows.end)
    }

    /// The rows of one sequence's tokens, prompt first.
    ///
    /// # Panics
    /// If the batch has no such sequence.
    pub fn rows(&self, sequence: usize) -> impl Iterator<Item = i64> + use<> {
        let (prompt, response) = (&self.prompts[sequence], &self.responses[sequence]);
        prompt.clone().chain(response.clone())
    }

    /// Row of the run that *predicts* each response token: the token before it, which for a first
    /// token is the prompt's last. In the order of the sequences, then of their responses.
    ///
    /// # Shapes
    /// `[S]` i64 where `S` is the number of response tokens.
    pub fn predicting_rows(&self) -> Tensor {
        let rows = self.states().flat_map(|(last, response)| {
            let tokens = (response.end - response.start) as usize;
            std::iter::once(last).chain(response).take(tokens)
        });
        self.index(rows.collect())
    }

    /// Row of each state along the responses: the prompt's last token, then every token of the
    /// response. In the order of the sequences.
    ///
    /// # Shapes
    /// `[S + B]` i64 where `S` is the number of response tokens.
    pub fn state_rows(&self) -> Tensor {
        let rows = self
            .states()
            .flat_map(|(last, response)| std::iter::once(last).chain(response));
        self.index(rows.collect())
    }

    /// Row of the run of each sequence's last token.
    ///
    /// # Shapes
    /// `[B]` i64.
    pub fn last_rows(&self) -> Tensor {
        let rows = self
            .states()
            .map(|(last, response)| match response.is_empty() {
                true => last,
                false => response.end - 1,
            });
        self.index(rows.collect())
    }

    /// The row of each prompt's last token, and the response's rows.
    fn states(&self) -> impl Iterator<Item = (i64, Range<i64>)> {
        self.prompts
            .iter()
            .zip(&self.responses)
            .map(|(prompt, response)| (prompt.end - 1, response.clone()))
    }

    fn index(&self, rows: Vec<i64>) -> Tensor {
        Tensor::from_slice(&rows).to_device(self.input_ids.device())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Sequence;

    fn flat(t: &Tensor) -> Vec<i64> {
        Vec::try_from(t).unwrap()
    }

    fn after(rows: Range<i64>, prefix: Range<i64>) -> Segment {
        Segment {
            rows,
            prefix: Some(prefix),
        }
    }

    #[test]
    fn rows_of_a_run() {
        let batch = SequenceBatch::new(vec![Sequence::new([1, 2], [3, 4]), Sequence::new([5], [])])
            .unwrap();
        let packed = batch.packed(Device::Cpu);
        assert_eq!(flat(&packed.input_ids), [1, 2, 3, 4, 5]);
        assert_eq!(flat(&packed.position_ids), [0, 1, 2, 3, 0]);
        assert_eq!(
            packed.segments,
            [Segment::whole(0..4), Segment::whole(4..5)]
        );
        assert_eq!(flat(&packed.predicting_rows()), [1, 2]);
        assert_eq!(flat(&packed.state_rows()), [1, 2, 3, 4]);
        assert_eq!(flat(&packed.last_rows()), [3, 4]);
        assert_eq!(packed.tokens(), 5);
    }

    /// Answers of one prompt that are not neighbours, an empty one first and one last, and
    /// another prompt of the same tokens.
    #[test]
    fn a_shared_prompt_is_there_once() {
        let prompt: Arc<[i64]> = [1, 2].into();
        let of = |response: &[i64]| Sequence::new(Arc::clone(&prompt), response);
        let batch = SequenceBatch::new(vec![
            of(&[]),
            Sequence::new([1, 2], [9]),
            of(&[3, 4]),
            of(&[5]),
            of(&[]),
        ])
        .unwrap();
        let packed = batch.packed(Device::Cpu);
        assert_eq!(flat(&packed.input_ids), [1, 2, 3, 4, 5, 1, 2, 9]);
        assert_eq!(flat(&packed.position_ids), [0, 1, 2, 3, 2, 0, 1, 2]);
        assert_eq!(
            packed.segments,
            [
                Segment::whole(0..2),
                after(2..4, 0..2),
                after(4..5, 0..2),
                Segment::whole(5..8)
            ]
        );
        assert_eq!(packed.rows(2).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(packed.rows(4).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(flat(&packed.predicting_rows()), [6, 1, 2, 1]);
        assert_eq!(flat(&packed.state_rows()), [1, 6, 7, 1, 2, 3, 1, 4, 1]);
        assert_eq!(flat(&packed.last_rows()), [1, 7, 3, 4, 1]);

        let apart = batch.packed_apart(Device::Cpu);
        assert_eq!(apart.tokens(), 2 + 3 + 4 + 3 + 2);
        assert!(apart.segments.iter().all(|s| s.prefix.is_none()));
    }
}
