//! Decoding one token at a time.

use std::sync::Arc;

use tch::Tensor;

use crate::{Error, PaddingSide, Policy, Result, Sequence, SequenceBatch};

/// A batch of sequences that grows by one token per row and step.
///
/// ```text
/// prefill(prompts) ─► logits ─► sample ─► step(tokens) ─► logits ─► …
///                                  └─ select(rows): finished rows leave, rows may repeat
/// ```
pub trait Decoder {
    /// Starts with these prompts and returns the logits of each one's next token.
    ///
    /// # Shapes
    /// `[B, V]` f32.
    ///
    /// # Errors
    /// An empty prompt, a prompt that leaves no room for a token, and the model's own.
    fn prefill(&mut self, prompts: &[Arc<[i64]>]) -> Result<Tensor>;

    /// Appends one token to every row and returns the logits of the next.
    ///
    /// # Shapes
    /// `tokens`: `[B]` i64 on the model's device. Returns `[B, V]` f32.
    ///
    /// # Errors
    /// A row that outgrows the context window, and the model's own.
    fn step(&mut self, tokens: &Tensor) -> Result<Tensor>;

    /// Keeps the rows of `rows`, in that order. A row may be named several times: n samples of
    /// one prompt come from one prefill.
    ///
    /// # Errors
    /// The model's own.
    fn select(&mut self, rows: &[usize]) -> Result<()>;
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

    fn next_logits(&self) -> Result<Tensor> {
        let sequences = self
            .rows
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
    fn prefill(&mut self, prompts: &[Arc<[i64]>]) -> Result<Tensor> {
        self.rows = prompts.iter().map(|p| p.to_vec()).collect();
        self.next_logits()
    }

    fn step(&mut self, tokens: &Tensor) -> Result<Tensor> {
        let tokens = Vec::<i64>::try_from(tokens)?;
        if tokens.len() != self.rows.len() {
            return Err(Error::LengthMismatch {
                left: "tokens",
                left_len: tokens.len(),
                right: "the decoder's rows",
                right_len: self.rows.len(),
            });
        }
        for (row, token) in self.rows.iter_mut().zip(tokens) {
            row.push(token);
        }
        self.next_logits()
    }

    fn select(&mut self, rows: &[usize]) -> Result<()> {
        self.rows = rows.iter().map(|&r| self.rows[r].clone()).collect();
        Ok(())
    }
}
