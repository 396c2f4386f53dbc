//! Decoding one token at a time.

use std::sync::Arc;

use tch::Tensor;

use crate::{Error, PaddingSide, PipelineStage, Policy, Result, Sequence, SequenceBatch};

/// A batch of sequences that grows by one token per row and step. Rows come and go: it begins
/// with none.
///
/// ```text
/// prefill(prompts) ─► logits ─► sample ─► step(tokens) ─► logits ─► …
///   └─ new rows join            └─ select(rows): finished rows leave, rows may repeat
/// ```
pub trait Decoder {
    /// Rows that there are.
    fn rows(&self) -> usize;

    /// Adds a row for each of these prompts, after those there are, and returns the logits of each
    /// new row's next token.
    ///
    /// # Shapes
    /// `[prompts, V]` f32.
    ///
    /// # Errors
    /// An empty prompt, a prompt that leaves no room for a token, and the model's own.
    fn prefill(&mut self, prompts: &[Arc<[i64]>]) -> Result<Tensor>;

    /// Appends one token to every row and returns the logits of the next.
    ///
    /// # Shapes
    /// `tokens`: one per row. Returns `[B, V]` f32.
    ///
    /// # Errors
    /// A row that outgrows the context window, and the model's own.
    fn step(&mut self, tokens: &[i64]) -> Result<Tensor>;

    /// Keeps the rows of `rows`, in that order; none may be kept. A row may be named several
    /// times: n samples of one prompt come from one prefill.
    ///
    /// # Errors
    /// The model's own.
    fn select(&mut self, rows: &[usize]) -> Result<()>;

    /// Takes a row back to its first `tokens` tokens. The next token to be appended follows them.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for more tokens than the row has.
    fn rewind(&mut self, row: usize, tokens: usize) -> Result<()>;

    /// Says beforehand that up to `rows` rows of up to `tokens` tokens are to come. The default
    /// does nothing.
    ///
    /// # Errors
    /// The model's own (out of memory).
    fn reserve(&mut self, rows: usize, tokens: usize) -> Result<()> {
        let _ = (rows, tokens); // a cache would be sized by it
        Ok(())
    }

    /// The stage that this rank has, where the model's blocks are spread over several. Logits are
    /// those of the last then, and something of their shape in the others; who chooses tokens by
    /// them does so in the last, which [tells](PipelineStage::tell) the others.
    fn stage(&self) -> Option<&PipelineStage> {
        None
    }
}

/// The decoder of any [`Policy`]: recomputes every sequence at every step.
#[derive(Debug)]
pub struct RecomputeDecoder<'a, P: ?Sized> {
    policy: &'a P,
    rows: Vec<Vec<i64>>,
}

impl<'a, P: Policy + ?Sized> RecomputeDecoder<'a, P> {
    /// A decoder with no rows yet.
    pub fn new(policy: &'a P) -> Self {
        Self {
            policy,
            rows: Vec::new(),
        }
    }

    fn next_logits(&self, rows: &[Vec<i64>]) -> Result<Tensor> {
        let sequences = rows
            .iter()
            .map(|r| Sequence::new(r.as_slice(), []))
            .collect();
        let batch = SequenceBatch::new(sequences)?;
        if let Some(max_length) = self.policy.max_length() {
            batch.check_length(max_length)?;
        }
        let device = self.policy.device();
        let padded = batch.padded(self.policy.pad_token_id(), PaddingSide::Right, device);
        let logits = self.policy.logits(&padded)?;
        let last: Vec<i64> = padded.lengths.iter().map(|&n| n as i64 - 1).collect();
        let vocab = *logits.size().last().unwrap_or(&0);
        let index = Tensor::from_slice(&last)
            .to_device(device)
            .view([-1, 1, 1])
            .expand([-1, 1, vocab], false);
        Ok(logits
            .f_gather(1, &index, false)?
            .squeeze_dim(1)
            .to_kind(tch::Kind::Float))
    }
}

impl<P: Policy + ?Sized> Decoder for RecomputeDecoder<'_, P> {
    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn prefill(&mut self, prompts: &[Arc<[i64]>]) -> Result<Tensor> {
        let new: Vec<Vec<i64>> = prompts.iter().map(|p| p.to_vec()).collect();
        let logits = self.next_logits(&new)?;
        self.rows.extend(new);
        Ok(logits)
    }

    fn step(&mut self, tokens: &[i64]) -> Result<Tensor> {
        if tokens.len() != self.rows.len() {
            return Err(Error::LengthMismatch {
                left: "tokens",
                left_len: tokens.len(),
                right: "the decoder's rows",
                right_len: self.rows.len(),
            });
        }
        for (row, &token) in self.rows.iter_mut().zip(tokens) {
            row.push(token);
        }
        self.next_logits(&self.rows)
    }

    fn select(&mut self, rows: &[usize]) -> Result<()> {
        self.rows = rows.iter().map(|&r| self.rows[r].clone()).collect();
        Ok(())
    }

    fn rewind(&mut self, row: usize, tokens: usize) -> Result<()> {
        let row = &mut self.rows[row];
        if tokens > row.len() {
            return Err(Error::LengthMismatch {
                left: "the tokens to keep",
                left_len: tokens,
                right: "the row",
                right_len: row.len(),
            });
        }
        row.truncate(tokens);
        Ok(())
    }
}
