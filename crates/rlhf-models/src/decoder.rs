//! Decoding with a cache of keys and values.

use std::sync::Arc;

use rlhf_core::{Decoder, Error, Result, Sequence, SequenceBatch};
use tch::{Kind, Tensor};

use crate::CausalLm;
use crate::attention::SegmentAttention;
use crate::kv_cache::{KvCache, PrefillAttention, StepAttention};

/// The [`Decoder`] of a [`CausalLm`]: every token is computed once. No gradients are recorded.
pub(crate) struct CachedDecoder<'a> {
    model: &'a CausalLm,
    max_new_tokens: usize,
    cache: KvCache,
}

impl<'a> CachedDecoder<'a> {
    pub(crate) fn new(model: &'a CausalLm, max_new_tokens: usize) -> Self {
        Self {
            model,
            max_new_tokens,
            cache: KvCache::new(&[], 0),
        }
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
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
}

impl Decoder for CachedDecoder<'_> {
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
        let device = self.model.model.device();
        let packed = batch.packed_apart(device);
        let mut cache = KvCache::new(&lengths, self.max_new_tokens as i64);
        let segments = SegmentAttention::new(&packed.segments, device)?;
        let hidden = self.model.model.trunk.forward(
            &packed.input_ids,
            &packed.position_ids,
            &mut PrefillAttention::new(&mut cache, segments),
        )?;
        self.cache = cache;
        self.logits(&hidden.f_index_select(0, &packed.last_rows())?)
    }

    fn step(&mut self, tokens: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let rows = self.cache.rows();
        if tokens.size() != [rows as i64] {
            return Err(Error::ShapeMismatch {
                left: "tokens",
                left_shape: tokens.size(),
                right: "the decoder's rows",
                right_shape: vec![rows as i64],
            });
        }
        // A row's next position is the number of tokens it has.
        let lengths = self.cache.lengths();
        self.check_room(&lengths)?;
        if self.cache.is_full() {
            return Err(Error::config(
                "max_new_tokens",
                self.max_new_tokens,
                "the decoder was made for no more tokens than that",
            ));
        }
        let device = self.model.model.device();
        let positions = Tensor::from_slice(&lengths).to_device(device);
        let hidden = self.model.model.trunk.forward(
            tokens,
            &positions,
            &mut StepAttention::new(&mut self.cache, device),
        )?;
        self.cache.advance();
        self.logits(&hidden)
    }

    fn select(&mut self, rows: &[usize]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let known = self.cache.rows();
        if let Some(&row) = rows.iter().find(|&&row| row >= known) {
            return Err(Error::LengthMismatch {
                left: "the rows up to the one selected",
                left_len: row + 1,
                right: "the decoder's rows",
                right_len: known,
            });
        }
        self.cache.select(rows)
    }
}
