//! Softmax over blocks of a vocabulary, each block in one call.
//!
//! Both functions return `false`, and have done nothing, where they do not apply: on another device
//! than a processor with AVX2, for another kind than f32 and bf16, for tensors that are not
//! contiguous. The caller does it with libtorch then.

use std::ptr::null_mut;

use tch::{Kind, Tensor};

use super::{Message, Raw, check, raw};
use crate::Result;

unsafe extern "C" {
    fn rlhf_softmax_available() -> bool;
    fn rlhf_softmax_add(
        logits: Raw,
        ids: Raw,
        first: i64,
        scale: f64,
        maxima: Raw,
        sums: Raw,
        products: Raw,
        chosen: Raw,
        done: *mut bool,
    ) -> Message;
    fn rlhf_softmax_grad(
        logits: Raw,
        ids: Raw,
        first: i64,
        scale: f64,
        maxima: Raw,
        log_sums: Raw,
        own: Raw,
        entropy_grads: Raw,
        entropies: Raw,
        out: Raw,
        done: *mut bool,
    ) -> Message;
}

/// A block of logits `[M, W]`.
#[derive(Clone, Copy)]
pub(crate) struct LogitBlock<'a> {
    /// Before the division by the temperature.
    pub(crate) logits: &'a Tensor,
    /// `[M]` i64: the rows' tokens, if they are to be told apart.
    pub(crate) ids: Option<&'a Tensor>,
    /// The token of the first column.
    pub(crate) first: i64,
    /// What the logits are multiplied by.
    pub(crate) scale: f64,
}

/// What is known of `M` rows, `[M, 1]` f32 each.
pub(crate) struct RowSums<'a> {
    /// The largest logits.
    pub(crate) maxima: &'a Tensor,
    /// Of the exponentials of the logits less those.
    pub(crate) sums: &'a Tensor,
    /// Of the exponentials' products with their exponents, where entropies are wanted.
    pub(crate) products: Option<&'a Tensor>,
    /// The logits of the rows' tokens.
    pub(crate) chosen: &'a Tensor,
}

/// What gradients of logits are made of, `[M, 1]` f32 each.
pub(crate) struct RowGrads<'a> {
    /// The largest logits.
    pub(crate) maxima: &'a Tensor,
    /// Logarithms of the sums of the exponentials.
    pub(crate) log_sums: &'a Tensor,
    /// What the logit of the row's own token gets.
    pub(crate) own: &'a Tensor,
    /// What the entropy's derivative is multiplied by, and the entropies.
    pub(crate) entropy: Option<(&'a Tensor, &'a Tensor)>,
}

/// Whether the functions apply to contiguous tensors of this kind on the CPU.
pub(crate) fn is_available(kind: Kind) -> bool {
    // SAFETY: asks for features of the processor.
    matches!(kind, Kind::Float | Kind::BFloat16) && unsafe { rlhf_softmax_available() }
}

/// Adds a block, with ids, to the sums.
pub(crate) fn add(block: LogitBlock<'_>, rows: &RowSums<'_>) -> Result<bool> {
    let Some(ids) = block.ids else {
        return Ok(false);
    };
    let mut done = false;
    // SAFETY: live tensors; null stands for no products. The shim checks kinds, sizes and layouts,
    // and compares ids with the block's columns before it uses them.
    check(unsafe {
        rlhf_softmax_add(
            raw(block.logits),
            raw(ids),
            block.first,
            block.scale,
            raw(rows.maxima),
            raw(rows.sums),
            rows.products.map_or(null_mut(), raw),
            raw(rows.chosen),
            &mut done,
        )
    })?;
    Ok(done)
}

/// Writes the gradient of a block's logits into `out`, which may be the block.
pub(crate) fn grad(block: LogitBlock<'_>, rows: &RowGrads<'_>, out: &Tensor) -> Result<bool> {
    let mut done = false;
    let (entropy_grads, entropies) = match rows.entropy {
        Some((grads, entropies)) => (raw(grads), raw(entropies)),
        None => (null_mut(), null_mut()),
    };
    // SAFETY: live tensors; null stands for what is absent. The shim checks kinds, sizes and
    // layouts; every element is read before it is written.
    check(unsafe {
        rlhf_softmax_grad(
            raw(block.logits),
            block.ids.map_or(null_mut(), raw),
            block.first,
            block.scale,
            raw(rows.maxima),
            raw(rows.log_sums),
            raw(rows.own),
            entropy_grads,
            entropies,
            raw(out),
            &mut done,
        )
    })?;
    Ok(done)
}
