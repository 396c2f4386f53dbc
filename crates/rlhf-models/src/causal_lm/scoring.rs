//! How a language model scores responses.

use std::ops::Range;

use rlhf_core::{
    Decoder, KeptSet, KeptTokens, LogprobOptions, PackedBatch, PaddedBatch, Policy, Segment,
    SequenceBatch, TokenLogprobs, check_kept, check_same_shape,
};
use rlhf_scale::{
    LinearLogprobs, LinearLogprobsInput, linear_logprobs, linear_token_loss, parallel_logprobs,
    parallel_token_loss,
};
use tch::{Device, Kind, Tensor};

use super::{CausalLm, LmHead};
use crate::Result;
use crate::decoder::CachedDecoder;
use crate::kept_logprobs::KeptLogprobs;
use crate::pipeline_parallel::Stage;

impl CausalLm {
    fn score(
        &self,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        options.validate()?;
        if let Some(stage) = self.model.trunk.sharing() {
            return self.score_in_turns(stage, batch, kept, options);
        }
        self.score_at_once(batch, kept, options)
    }

    /// What the last stage computes, in all.
    fn score_in_turns(
        &self,
        stage: &Stage,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        // What may be wrong must be found in all stages.
        if let Some(kept) = kept {
            check_kept(batch, kept)?;
        }
        let mask = batch.response_mask(self.device());
        let scored = stage.in_turns(batch, mask.size()[1], |part, rows| {
            let scores = self.score_at_once(part, kept.map(|kept| &kept[rows]), options)?;
            let entropy = scores.entropy.into_iter();
            Ok(std::iter::once(scores.logprobs).chain(entropy).collect())
        })?;
        let mut scored = scored.into_iter();
        Ok(TokenLogprobs {
            logprobs: scored.next().unwrap_or_default(),
            entropy: scored.next(),
            mask,
        })
    }

    fn score_at_once(
        &self,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        let packed = self.model.checked_packed(batch)?;
        // Of the tokens that predict a response token, and of no other.
        let rows = packed.predicting_rows();
        let hidden = self.model.hidden_states_of(&packed, rows)?;
        self.scores(batch, &hidden, kept, options)
    }

    fn head_input<'a>(&'a self, hidden: &'a Tensor, ids: &'a Tensor) -> LinearLogprobsInput<'a> {
        LinearLogprobsInput {
            hidden,
            weight: &self.model.head.weight,
            bias: None,
            softcap: self.model.head.softcap,
            ids,
        }
    }

    /// Scores the responses from the hidden states that predict their tokens, `[S, H]`.
    pub(crate) fn scores(
        &self,
        batch: &SequenceBatch,
        hidden: &Tensor,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        let mask = batch.response_mask(self.device());
        if !self.model.trunk.has_end() {
            let logprobs = Stage::stand_in(&mask.size(), hidden)?;
            return Ok(TokenLogprobs {
                entropy: options.entropy.then(|| logprobs.detach()),
                logprobs,
                mask,
            });
        }
        let ids = batch.responses(0, self.device()).masked_select(&mask);
        let LmHead {
            weight,
            softcap,
            shard,
        } = &self.model.head;
        let (logprobs, entropy) = match kept {
            None => {
                let input = self.head_input(hidden, &ids);
                let scores = match shard {
                    None => linear_logprobs(input, options, self.chunk_rows)?,
                    Some(shard) => parallel_logprobs(input, shard, options, self.chunk_rows)?,
                };
                (scores.logprobs, scores.entropy)
            }
            Some(kept) => {
                check_kept(batch, kept)?;
                let sets: Vec<&KeptSet> = kept.iter().flat_map(|row| row.iter()).collect();
                let layer = KeptLogprobs {
                    weight,
                    softcap: *softcap,
                    shard: shard.as_ref(),
                    options: *options,
                    chunk_rows: self.chunk_rows,
                };
                layer.of(hidden, &ids, &sets)?
            }
        };
        let scattered = |values: &Tensor| {
            Tensor::f_zeros(mask.size(), (Kind::Float, self.device()))?
                .f_masked_scatter(&mask, values)
        };
        Ok(TokenLogprobs {
            logprobs: scattered(&logprobs)?,
            entropy: entropy.as_ref().map(scattered).transpose()?,
            mask,
        })
    }
}

impl Policy for CausalLm {
    fn logits(&self, batch: &PaddedBatch) -> rlhf_core::Result<Tensor> {
        let (packed, cells) = unpadded(batch)?;
        let logits = self.logits_of(&self.hidden_states(&packed)?)?;
        let (rows, width, vocab) = (batch.rows(), batch.width(), logits.size()[1]);
        let padded = Tensor::f_zeros([rows * width, vocab], (logits.kind(), logits.device()))?;
        Ok(padded
            .f_index_copy(0, &cells, &logits)?
            .f_view([rows, width, vocab])?)
    }

    fn device(&self) -> Device {
        self.model.device()
    }

    fn pad_token_id(&self) -> i64 {
        self.config().special_tokens().pad.unwrap_or(0)
    }

    fn max_length(&self) -> Option<usize> {
        Some(self.config().max_length())
    }

    fn logprobs(
        &self,
        batch: &SequenceBatch,
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        self.score(batch, None, options)
    }

    fn logprobs_within(
        &self,
        batch: &SequenceBatch,
        kept: &[KeptTokens],
        options: &LogprobOptions,
    ) -> rlhf_core::Result<TokenLogprobs> {
        self.score(batch, Some(kept), options)
    }

    fn weighted_nll(
        &self,
        batch: &SequenceBatch,
        weights: Option<&Tensor>,
    ) -> rlhf_core::Result<Tensor> {
        let packed = self.model.checked_packed(batch)?;
        let rows = packed.predicting_rows();
        let hidden = self.model.hidden_states_of(&packed, rows)?;
        if !self.model.trunk.has_end() {
            if let Some(stage) = self.model.trunk.sharing() {
                stage.share(&hidden)?;
            }
            return Ok(hidden);
        }
        let mask = batch.response_mask(self.device());
        let ids = batch.responses(0, self.device()).masked_select(&mask);
        let weights = match weights {
            Some(weights) => {
                check_same_shape(("weights", weights), ("the responses", &mask))?;
                Some(weights.f_masked_select(&mask)?)
            }
            None => None,
        };
        let loss = |scores: &LinearLogprobs, rows: Range<i64>| -> Result<Tensor> {
            let logprobs = &scores.logprobs;
            let sum = match &weights {
                Some(weights) => {
                    let weights = weights.f_narrow(0, rows.start, rows.end - rows.start)?;
                    logprobs.f_mul(&weights)?.f_sum(Kind::Float)?
                }
                None => logprobs.f_sum(Kind::Float)?,
            };
            Ok(sum.f_neg()?)
        };
        let input = self.head_input(&hidden, &ids);
        let (options, rows) = (LogprobOptions::default(), self.chunk_rows);
        let output = match &self.model.head.shard {
            None => linear_token_loss(input, &options, rows, loss)?,
            Some(shard) => parallel_token_loss(input, shard, &options, rows, loss)?,
        };
        if let Some(stage) = self.model.trunk.sharing() {
            stage.share(&output.loss)?;
        }
        Ok(output.loss)
    }

    fn disable_dropout(&mut self) {
        self.set_dropout_active(false);
    }

    fn decoder(&self, max_new_tokens: usize) -> rlhf_core::Result<Box<dyn Decoder + '_>> {
        Ok(Box::new(CachedDecoder::new(self, max_new_tokens)))
    }
}

/// The tokens of a padded batch as one run, and the cell of the rectangle that each came from.
fn unpadded(batch: &PaddedBatch) -> rlhf_core::Result<(PackedBatch, Tensor)> {
    let width = batch.width();
    let (mut cells, mut segments) = (Vec::new(), Vec::new());
    for (row, (&offset, &length)) in batch.offsets.iter().zip(&batch.lengths).enumerate() {
        let (start, first) = (cells.len() as i64, row as i64 * width + offset as i64);
        cells.extend(first..first + length as i64);
        segments.push(Segment::whole(start..start + length as i64));
    }
    let cells = Tensor::from_slice(&cells).to_device(batch.input_ids.device());
    let take = |t: &Tensor| t.f_view(-1)?.f_index_select(0, &cells);
    let packed = PackedBatch {
        input_ids: take(&batch.input_ids)?,
        position_ids: take(&batch.position_ids)?,
        prompts: segments.iter().map(|s| s.rows.clone()).collect(),
        responses: segments.iter().map(|s| s.rows.end..s.rows.end).collect(),
        segments,
    };
    Ok((packed, cells))
}
