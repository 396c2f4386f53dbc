//! How many sequences go through a model at a time.

use rlhf_core::{Replicas, SequenceBatch};

/// The size of a forward pass. Changes memory and speed, not what is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Microbatching {
    /// Most sequences.
    pub(crate) sequences: usize,
    /// Most tokens, prompts included; a prompt that neighbours share counts once. A sequence that
    /// is longer goes alone.
    pub(crate) tokens: Option<usize>,
}

impl Microbatching {
    /// Small enough for each of several processes to have a part of `rows`.
    pub(crate) fn shared(self, replicas: &Replicas, rows: usize) -> Self {
        Self {
            sequences: replicas.microbatch_size(rows, self.sequences),
            ..self
        }
    }

    /// Cuts `rows` of a batch, in their order.
    pub(crate) fn cut<'a>(&self, batch: &SequenceBatch, rows: &'a [usize]) -> Vec<&'a [usize]> {
        let Some(most) = self.tokens else {
            return rows.chunks(self.sequences).collect();
        };
        let sequences = batch.sequences();
        let (mut parts, mut start, mut tokens) = (Vec::new(), 0, 0);
        for (end, &row) in rows.iter().enumerate() {
            let sequence = &sequences[row];
            let shared =
                end > start && std::ptr::eq(&*sequences[rows[end - 1]].prompt, &*sequence.prompt);
            let own = match shared {
                true => sequence.response.len(),
                false => sequence.len(),
            };
            if end > start && (end - start == self.sequences || tokens + own > most) {
                parts.push(&rows[start..end]);
                (start, tokens) = (end, sequence.len());
            } else {
                tokens += own;
            }
        }
        if start < rows.len() {
            parts.push(&rows[start..]);
        }
        parts
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rlhf_core::Sequence;
    use std::sync::Arc;

    #[test]
    fn by_tokens_and_by_sequences() {
        let prompt: Arc<[i64]> = [1, 2, 3].into();
        let sequences = vec![
            Sequence::new(Arc::clone(&prompt), [4, 5]),
            Sequence::new(Arc::clone(&prompt), [4]),
            Sequence::new([1, 2, 3], [4]),
            Sequence::new([1], vec![7; 20]),
            Sequence::new([1], [2]),
            Sequence::new([1], [2]),
            Sequence::new([1], [2]),
        ];
        let batch = SequenceBatch::new(sequences).unwrap();
        let rows: Vec<usize> = (0..7).collect();
        let sizes = |sequences, tokens| -> Vec<usize> {
            let parts = Microbatching { sequences, tokens }.cut(&batch, &rows);
            assert_eq!(parts.concat(), rows);
            parts.iter().map(|p| p.len()).collect()
        };
        assert_eq!(sizes(3, None), [3, 3, 1]);
        // 5 and 1 more with the shared prompt; 4; 21 alone; the rest.
        assert_eq!(sizes(8, Some(6)), [2, 1, 1, 3]);
        assert_eq!(sizes(2, Some(6)), [2, 1, 1, 2, 1]);
        assert_eq!(sizes(8, Some(5)), [1, 1, 1, 1, 2, 1]);
    }
}
