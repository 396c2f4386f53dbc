//! Decoding with a cache of keys and values.

use std::sync::Arc;

use rlhf_core::{Decoder, Error, PipelineStage, Result, Sequence, SequenceBatch};
use tch::{Kind, Tensor};

use crate::CausalLm;
use crate::attention::{RowsOfLast, SegmentAttention};
use crate::kv_cache::{KvCache, PrefillAttention, StepAttention};

/// The [`Decoder`] of a [`CausalLm`]: every token is computed once. No gradients are recorded. Of a
/// model in stages each has the cache of its blocks.
pub(crate) struct CachedDecoder<'a> {
    model: &'a CausalLm,
    max_new_tokens: i64,
    cache: KvCache,
    stage: Option<PipelineStage>,
}

impl<'a> CachedDecoder<'a> {
    pub(crate) fn new(model: &'a CausalLm, max_new_tokens: usize) -> Self {
        let max_length = model.config().max_length();
        Self {
            model,
            max_new_tokens: max_new_tokens.min(max_length) as i64,
            cache: KvCache::default(),
            stage: model.model.stage(),
        }
    }

    /// Logits of the hidden states of so many rows. They are known in the last stage, and 0 in the others,
    /// in no memory.
    fn logits(&self, hidden: &Tensor, rows: usize) -> Result<Tensor> {
        if !self.model.model.trunk.has_end() {
            let zero = Tensor::f_zeros([1, 1], (Kind::Float, hidden.device()))?;
            return Ok(zero.f_expand([rows as i64, self.model.config().vocab_size()], false)?);
        }
        Ok(self.model.logits_of(hidden)?.f_to_kind(Kind::Float)?)
    }

    /// Fails unless every row has room for one token more.
    fn check_room(&self, lengths: &[i64]) -> Result<()> {
        let max_length = self.model.config().max_length();
        match lengths.iter().position(|&n| n as usize >= max_length) {
            Some(row) => Err(Error::TooLong {
                row,
                length: lengths[row] as usize + 1,
                max_length,
            }),
            None => Ok(()),
        }
    }

    fn check_row(&self, row: usize) -> Result<()> {
        if row < self.cache.rows() {
            return Ok(());
        }
        Err(Error::LengthMismatch {
            left: "the rows up to the one selected",
            left_len: row + 1,
            right: "the decoder's rows",
            right_len: self.cache.rows(),
        })
    }
}

impl Decoder for CachedDecoder<'_> {
    fn rows(&self) -> usize {
        self.cache.rows()
    }

    fn prefill(&mut self, prompts: &[Arc<[i64]>]) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let sequences = prompts
            .iter()
            .map(|prompt| Sequence::new(Arc::clone(prompt), []))
            .collect();
        let batch = SequenceBatch::new(sequences)?;
        batch.check_vocabulary(self.model.config().vocab_size())?;
        let lengths: Vec<i64> = prompts.iter().map(|p| p.len() as i64).collect();
        self.check_room(&lengths)?;
        let max_length = self.model.config().max_length() as i64;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let rows = self.cache.rows() + prompts.len();
        let tokens = (longest + self.max_new_tokens).min(max_length);
        self.cache.reserve(rows, tokens)?;
        let device = self.model.model.device();
        let packed = batch.packed_apart(device);
        let trunk = &self.model.model.trunk;
        // Nothing but keys and values is wanted of the other tokens.
        let attention = RowsOfLast {
            segments: SegmentAttention::new(&packed.segments, device)?,
            last: trunk.last_of_forward(),
            rows: packed.last_rows(),
        };
        let hidden = trunk.forward(
            &packed.input_ids,
            &packed.position_ids,
            &mut PrefillAttention::new(&mut self.cache, &packed.prompts, attention),
        )?;
        let logits = self.logits(&hidden, prompts.len())?;
        self.cache.add(&lengths);
        Ok(logits)
    }

    fn step(&mut self, tokens: &[i64]) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let rows = self.cache.rows();
        if tokens.len() != rows {
            return Err(Error::LengthMismatch {
                left: "tokens",
                left_len: tokens.len(),
                right: "the decoder's rows",
                right_len: rows,
            });
        }
        // A row's next position is the number of tokens it has.
        let lengths = self.cache.lengths();
        self.check_room(lengths)?;
        let device = self.model.model.device();
        let positions = Tensor::from_slice(lengths).f_to_device(device)?;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        // In steps of 64 where nobody said how long rows would be.
        if longest + 1 > self.cache.columns() {
            self.cache.reserve(rows, (longest / 64 + 1) * 64)?;
        }
        let hidden = self.model.model.trunk.forward(
            &Tensor::from_slice(tokens).f_to_device(device)?,
            &positions,
            &mut StepAttention::new(&mut self.cache, device),
        )?;
        let logits = self.logits(&hidden, rows)?;
        self.cache.advance();
        Ok(logits)
    }

    fn select(&mut self, rows: &[usize]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        rows.iter().try_for_each(|&row| self.check_row(row))?;
        self.cache.select(rows)
    }

    fn rewind(&mut self, row: usize, tokens: usize) -> Result<()> {
        self.check_row(row)?;
        let length = self.cache.lengths()[row] as usize;
        if tokens > length {
            return Err(Error::LengthMismatch {
                left: "the tokens to keep",
                left_len: tokens,
                right: "the row",
                right_len: length,
            });
        }
        self.cache.rewind(row, tokens);
        Ok(())
    }

    fn reserve(&mut self, rows: usize, tokens: usize) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let max_length = self.model.config().max_length();
        self.cache.reserve(rows, tokens.min(max_length) as i64)
    }

    fn stage(&self) -> Option<&PipelineStage> {
        self.stage.as_ref()
    }
}
