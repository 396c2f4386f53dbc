//! The softmax of all blocks, as it is known after each.

use rlhf_core::Reduction;
use tch::{Kind, Tensor};

use super::blocks::{Block, Buffers};
use super::layer::{Operands, OutputLayer, own_columns};
use crate::ffi::softmax::{self, LogitBlock, RowSums};
use crate::{Result, VocabularyShard};

/// Below every logit, and finite, so that differences are.
const LOWEST: f64 = -1e30;

/// What is known of `M` tokens after some blocks of logits `z`, `[M, 1]` f32 each.
pub(super) struct RunningScores {
    /// `max z`
    pub(super) maxima: Tensor,
    /// `Σ e^(z - max)`
    pub(super) sums: Tensor,
    /// `Σ e^(z - max) (z - max)`, if entropies are wanted.
    products: Option<Tensor>,
    /// The logits of the tokens that are scored.
    chosen: Tensor,
}

/// What forward computes for each of `M` tokens, in f32.
pub(super) struct Scores {
    /// `[M, 1]`: the largest logits.
    pub(super) maxima: Tensor,
    /// `[M, 1]`: logarithms of the sums of the exponentials of logits less those.
    pub(super) log_sums: Tensor,
    /// `[M]`
    pub(super) logprobs: Tensor,
    /// `[M]`
    pub(super) entropy: Option<Tensor>,
}

impl RunningScores {
    pub(super) fn new(operands: Operands<'_>, with_entropy: bool) -> Result<Self> {
        let device = operands.hidden.device();
        let column = [operands.hidden.size()[0], 1];
        let zeros = || Tensor::f_zeros(column, (Kind::Float, device));
        Ok(Self {
            maxima: Tensor::f_full(column, LOWEST, (Kind::Float, device))?,
            sums: zeros()?,
            products: with_entropy.then(zeros).transpose()?,
            chosen: zeros()?,
        })
    }

    /// Adds a block, from its products before cap and temperature, which may be overwritten if they are
    /// free. Where libtorch's operations do it they leave the exponentials, relative to the largest logit so
    /// far, which are returned.
    pub(super) fn add(
        &mut self,
        layer: &OutputLayer,
        operands: Operands<'_>,
        products: (&Tensor, bool),
        block: Block,
        buffers: &mut Buffers,
    ) -> Result<Option<Tensor>> {
        let logits = LogitBlock {
            logits: products.0,
            ids: Some(operands.ids),
            first: block.first,
            scale: 1.0 / layer.temperature,
        };
        let rows = RowSums {
            maxima: &self.maxima,
            sums: &self.sums,
            products: self.products.as_ref(),
            chosen: &self.chosen,
        };
        if layer.softcap.is_none() && softmax::add(logits, &rows)? {
            return Ok(None);
        }
        self.add_by_parts(layer, operands, products, block, buffers)
            .map(Some)
    }

    fn add_by_parts(
        &mut self,
        layer: &OutputLayer,
        operands: Operands<'_>,
        products: (&Tensor, bool),
        block: Block,
        buffers: &mut Buffers,
    ) -> Result<Tensor> {
        let mut logits = buffers.widened(products, block, operands)?;
        layer.finish_logits(&mut logits)?;
        let (columns, inside) = own_columns(operands.ids, block)?;
        let own = logits.f_gather(1, &columns, false)?;
        self.chosen = own.f_where_self(&inside, &self.chosen)?;

        let maxima = self
            .maxima
            .f_maximum(&logits.f_amax([-1i64].as_slice(), true)?)?;
        let lower = self.maxima.f_sub(&maxima)?;
        let shrink = lower.f_exp()?;
        self.maxima = maxima;
        let _ = logits.f_sub_(&self.maxima)?;
        let exponentials = match &mut self.products {
            Some(before) => {
                let exponentials = logits.f_exp_out(&buffers.second(block, operands)?)?;
                // A row's product with a row, without a tensor for its terms.
                let products = logits
                    .f_unsqueeze(1)?
                    .f_bmm(&exponentials.f_unsqueeze(2)?)?
                    .f_squeeze_dim(2)?;
                let moved = before.f_add(&lower.f_mul(&self.sums)?)?.f_mul(&shrink)?;
                *before = moved.f_add(&products)?;
                exponentials
            }
            None => logits.f_exp_()?,
        };
        let sums = exponentials.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?;
        self.sums = self.sums.f_mul(&shrink)?.f_add(&sums)?;
        Ok(exponentials)
    }

    /// From what is known of this rank's part of the vocabulary to what is known of all of it. Other
    /// ranks' tokens have chosen logits of 0 here. Returns what sums relative to this rank's largest
    /// logit are to be multiplied by, `[M, 1]`.
    ///
    /// One all-reduce of `[M]` for the maxima and one of `[2, M]` for the sums, of `[3, M]` with
    /// entropies.
    pub(super) fn join(&mut self, shard: &VocabularyShard) -> Result<Tensor> {
        let maxima = self.maxima.f_detach_copy()?;
        shard.group.all_reduce(&maxima, Reduction::Max)?;
        let lower = self.maxima.f_sub(&maxima)?;
        let shrink = lower.f_exp()?;
        let mut sums = vec![self.sums.f_mul(&shrink)?, self.chosen.shallow_clone()];
        if let Some(products) = &self.products {
            let moved = products.f_add(&lower.f_mul(&self.sums)?)?;
            sums.push(moved.f_mul(&shrink)?);
        }
        let sums = Tensor::f_stack(&sums, 0)?;
        shard.group.all_reduce(&sums, Reduction::Sum)?;
        self.maxima = maxima;
        self.sums = sums.f_select(0, 0)?;
        self.chosen = sums.f_select(0, 1)?;
        if self.products.is_some() {
            self.products = Some(sums.f_select(0, 2)?);
        }
        Ok(shrink)
    }

    pub(super) fn finish(self) -> Result<Scores> {
        let log_sums = self.sums.f_log()?;
        // The difference first: it is small where the token is likely.
        let logprobs = self.chosen.f_sub(&self.maxima)?.f_sub(&log_sums)?;
        // log Σ e^z - Σ p z
        let entropy = match &self.products {
            Some(products) => Some(
                log_sums
                    .f_sub(&products.f_div(&self.sums)?)?
                    .f_squeeze_dim(1)?,
            ),
            None => None,
        };
        Ok(Scores {
            maxima: self.maxima,
            log_sums,
            logprobs: logprobs.f_squeeze_dim(1)?,
            entropy,
        })
    }
}
