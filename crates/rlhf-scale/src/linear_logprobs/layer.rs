//! An output layer that is taken block by block.

use tch::{Device, Kind, Tensor};

use super::blocks::{Block, Blocks, Buffers, Cache, Place};
use super::gradients::{Coefficients, Gradients, grad_logits};
use super::product::{Target, add_product, multiply};
use super::scores::{RunningScores, Scores};
use crate::ffi::softmax;
use crate::{Result, VocabularyShard};

/// The tensors of the output layer, detached, and the tokens.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    /// `[M, H]`
    pub(super) hidden: &'a Tensor,
    /// `[V, H]`
    pub(super) weight: &'a Tensor,
    /// `[V]`
    pub(super) bias: Option<&'a Tensor>,
    /// `[M]`
    pub(super) ids: &'a Tensor,
}

/// What does not depend on the operands' values. All methods run under `no_grad`.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutputLayer {
    pub(super) temperature: f64,
    pub(super) softcap: Option<f64>,
    pub(super) blocks: Blocks,
}

impl OutputLayer {
    /// Scores all tokens. Products that find room in the cache stay there.
    pub(super) fn scores(
        &self,
        (operands, shard): (Operands<'_>, Option<&VocabularyShard>),
        with_entropy: bool,
        cache: Option<&Cache>,
        buffers: &mut Buffers,
    ) -> Result<Scores> {
        let mut running = RunningScores::new(operands, with_entropy)?;
        let blocks = match cache {
            Some(cache) => cache.in_forward(),
            None => self.blocks.iter().collect(),
        };
        for block in blocks {
            let place = self.place(operands, block, cache, buffers)?;
            self.multiply(operands, block, &place.logits)?;
            let product = (&place.logits, !place.is_kept);
            running.add(self, operands, product, block, buffers)?;
        }
        if let Some(shard) = shard {
            let _ = running.join(shard)?;
        }
        running.finish()
    }

    /// Scores all tokens and returns `∂ logprob / ∂ hidden` `[M, H]`, of the hidden states' kind,
    /// beside. There is no cap.
    ///
    /// It is `(W[id] - Σ p W) / temperature`. The sum is relative to the largest logit so far, and
    /// shrinks where a block has a larger one, as the softmax of FlashAttention does (Dao et al.
    /// 2022). Of a part of the vocabulary they are what that part adds.
    pub(super) fn scores_and_directions(
        &self,
        operands: Operands<'_>,
        shard: Option<&VocabularyShard>,
    ) -> Result<(Scores, Tensor)> {
        let (hidden, weight) = (operands.hidden, operands.weight);
        let mut buffers = Buffers::new(self.blocks, operands);
        let mut running = RunningScores::new(operands, false)?;
        let mut expected = Tensor::f_zeros(hidden.size(), (Kind::Float, hidden.device()))?;
        let zeros = running.maxima.f_zeros_like()?;
        let minus_ones = running.maxima.f_full_like(-1.0)?;
        for block in self.blocks.iter() {
            let product = buffers.scratch(block, operands)?;
            self.multiply(operands, block, &product)?;
            let before = running.maxima.f_detach_copy()?;
            let free = (&product, true);
            let exponentials = match running.add(self, operands, free, block, &mut buffers)? {
                Some(exponentials) => exponentials.f_to_kind(weight.kind())?,
                None => {
                    let coefficients = Coefficients {
                        maxima: &running.maxima,
                        log_sums: &zeros,
                        own: &minus_ones,
                        entropy: None,
                    };
                    let anonymous = (self, operands, None);
                    grad_logits(anonymous, free, block, &coefficients, &mut buffers)?
                }
            };
            if block.first > 0 {
                let _ = expected.f_mul_(&before.f_sub(&running.maxima)?.f_exp()?)?;
            }
            let rows = weight.f_narrow(0, block.first, block.width)?;
            add_product(&mut expected, &exponentials, &rows, None)?;
        }
        let chosen = match shard {
            None => weight.f_index_select(0, operands.ids)?,
            Some(shard) => {
                let _ = expected.f_mul_(&running.join(shard)?)?;
                let all = Block::all(weight.size()[0]);
                let (rows, inside) = own_columns(operands.ids, all)?;
                let rows = weight.f_index_select(0, &rows.f_squeeze_dim(1)?)?;
                rows.f_mul(&inside.f_to_kind(rows.kind())?)?
            }
        };
        let _ = expected.f_div_(&running.sums)?.f_neg_()?;
        let _ = expected.f_add_(&chosen)?;
        let directions = expected.f_div_scalar_(self.temperature)?;
        Ok((running.finish()?, directions.f_to_kind(hidden.kind())?))
    }

    /// Adds the gradients of everything to `sums`, from those of the outputs and from the products
    /// that the cache has; the others are computed again. The operands' hidden states begin at row
    /// `start` of those that `sums` is for.
    pub(super) fn add_gradients(
        &self,
        operands: Operands<'_>,
        coefficients: &Coefficients<'_>,
        cache: Option<&Cache>,
        (sums, start, scale): (&mut Gradients, i64, Option<&Tensor>),
        buffers: &mut Buffers,
    ) -> Result<()> {
        for block in self.blocks.iter() {
            let place = self.place(operands, block, cache, buffers)?;
            if !place.is_kept {
                self.multiply(operands, block, &place.logits)?;
            }
            let layer = (self, operands, Some(operands.ids));
            let product = (&place.logits, place.is_free);
            let grad = grad_logits(layer, product, block, coefficients, buffers)?;
            let aside = match place.is_in_the_way {
                true => Some(buffers.rows(block, operands)?),
                false => None,
            };
            sums.add((operands, block), &grad, (start, scale), aside)?;
        }
        Ok(())
    }

    /// Whether kernels go through blocks of logits once, so that none is copied.
    pub(super) fn is_in_one_pass(&self, weight: &Tensor) -> bool {
        let on_cpu = weight.device() == Device::Cpu;
        self.softcap.is_none() && on_cpu && softmax::is_available(weight.kind())
    }

    /// Memory for the logits of a block: the cache's, or the scratch block.
    fn place(
        &self,
        operands: Operands<'_>,
        block: Block,
        cache: Option<&Cache>,
        buffers: &mut Buffers,
    ) -> Result<Place> {
        if let Some(place) = cache.map(|cache| cache.place(block)).transpose()?.flatten() {
            return Ok(place);
        }
        Ok(Place {
            logits: buffers.scratch(block, operands)?,
            is_kept: false,
            is_free: true,
            is_in_the_way: false,
        })
    }

    /// `hidden · weightᵀ + bias` for the block's tokens of the vocabulary.
    fn multiply(&self, operands: Operands<'_>, block: Block, out: &Tensor) -> Result<()> {
        let rows = |tensor: &Tensor| tensor.f_narrow(0, block.first, block.width);
        let weight = rows(operands.weight)?.f_transpose(0, 1)?;
        let mut out = out.shallow_clone();
        if let Some(bias) = operands.bias {
            out.f_copy_(&rows(bias)?)?;
            return multiply(&mut out, operands.hidden, &weight, Target::Sum);
        }
        multiply(&mut out, operands.hidden, &weight, Target::Place)
    }

    /// From products in f32 to logits, in place: capped, then divided by the temperature.
    pub(super) fn finish_logits(&self, products: &mut Tensor) -> Result<()> {
        if let Some(cap) = self.softcap {
            let _ = products.f_div_scalar_(cap)?.f_tanh_()?.f_mul_scalar_(cap)?;
        }
        if self.temperature != 1.0 {
            let _ = products.f_div_scalar_(self.temperature)?;
        }
        Ok(())
    }

    /// `∂ capped / ∂ product` from finished logits.
    pub(super) fn slope(&self, logits: &Tensor) -> Result<Option<Tensor>> {
        let Some(cap) = self.softcap else {
            return Ok(None);
        };
        let mut tangents = logits.f_mul_scalar(self.temperature / cap)?;
        Ok(Some(tangents.f_square_()?.f_neg_()?.f_add_scalar_(1.0)?))
    }
}

/// The columns of the block that the tokens are in, `[M, 1]`, and a mask of those that are in it;
/// what is not has some column of the block.
pub(super) fn own_columns(ids: &Tensor, block: Block) -> Result<(Tensor, Tensor)> {
    let columns = ids.f_sub_scalar(block.first)?.f_unsqueeze(1)?;
    let inside = columns
        .f_ge(0)?
        .f_logical_and(&columns.f_lt(block.width)?)?;
    Ok((columns.f_clamp(0, block.width - 1)?, inside))
}
