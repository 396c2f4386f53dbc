//! Decoding on the CPU: products of few rows with large matrices, and attention to a cache.
//!
//! libtorch's matrix products are made for many rows. With few, the time goes into fetching the
//! weights; these kernels fetch each weight once, ahead of its use, and multiply it with all rows
//! while it is at hand. They use the weights as they lie, `[out, in]`: nothing is packed, kept
//! beside them, or made stale by an update.
//!
//! Each returns `None` where it does not apply and the caller does it with libtorch: while
//! gradients are recorded, on another device or kind than f32 and bf16, for more than 32 rows, on
//! a processor without AVX-512. A row's result depends on that row alone, bit for bit: not on how
//! many rows there are, nor on the number of threads.

use std::ptr::null_mut;

use tch::Tensor;

use super::{Message, Raw, check, raw};
use crate::{Error, Result};

unsafe extern "C" {
    fn rlhf_few_rows_linear(x: Raw, weight: Raw, bias: Raw, result: *mut Raw) -> Message;
    fn rlhf_few_rows_rms_norm(x: Raw, weight: Raw, epsilon: f64, result: *mut Raw) -> Message;
    fn rlhf_cached_attention(
        query: Raw,
        key: Raw,
        value: Raw,
        keys: Raw,
        values: Raw,
        lengths: *const i64,
        scale: f64,
        window: i64,
        cap: f64,
        result: *mut Raw,
    ) -> Message;
}

/// An affine map: `x weightᵀ + bias`. Sums are f32, rounded once for bf16.
///
/// # Shapes
/// `x`: `[M, in]`; `weight`: `[out, in]`; `bias`: `[out]`. Returns `[M, out]`.
///
/// # Errors
/// libtorch's (out of memory).
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    // SAFETY: live tensors; null stands for no bias.
    returned(|result| unsafe {
        rlhf_few_rows_linear(raw(x), raw(weight), bias.map_or(null_mut(), raw), result)
    })
}

/// Each row over the root of its mean square plus `epsilon`, rounded to `x`'s kind, times
/// `weight`.
///
/// # Shapes
/// `x`: `[M, H]`; `weight`: `[H]`. Returns `[M, H]`.
///
/// # Errors
/// libtorch's (out of memory).
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Option<Tensor>> {
    // SAFETY: live tensors.
    returned(|result| unsafe { rlhf_few_rows_rms_norm(raw(x), raw(weight), epsilon, result) })
}

/// One token of every row and the cache that it looks at, for [`cached_attention`].
#[derive(Debug)]
pub struct CachedAttentionInput<'a> {
    /// `[B, heads, d]`.
    pub query: &'a Tensor,
    /// `[B, kv_heads, d]`.
    pub key: &'a Tensor,
    /// `[B, kv_heads, d]`.
    pub value: &'a Tensor,
    /// Keys of earlier tokens, `[at least B, kv_heads, capacity, d]`: row `i` holds `lengths[i]`.
    pub keys: &'a Tensor,
    /// Their values.
    pub values: &'a Tensor,
    /// Tokens in the cache, by row; fewer than the capacity.
    pub lengths: &'a [i64],
    /// Multiplies the products of queries and keys.
    pub scale: f64,
    /// Most keys that a query looks at, its own included.
    pub window: Option<i64>,
    /// Bounds the scaled products: `cap * tanh(x / cap)`.
    pub softcap: Option<f64>,
}

/// Writes keys and values into the cache and attends to it, row by row, with no padding.
///
/// # Shapes
/// Returns `[B, heads * d]`.
///
/// # Errors
/// [`Error::Core`] unless there is one length a row; libtorch's (out of memory).
pub fn cached_attention(input: &CachedAttentionInput) -> Result<Option<Tensor>> {
    let rows = input.query.size().first().copied().unwrap_or(0);
    if input.lengths.len() as i64 != rows {
        return Err(Error::Core(rlhf_core::Error::LengthMismatch {
            left: "lengths",
            left_len: input.lengths.len(),
            right: "the queries' rows",
            right_len: rows as usize,
        }));
    }
    // SAFETY: live tensors, and as many lengths as the query has rows; the shim checks every other
    // size, and that each length is within the cache.
    returned(|result| unsafe {
        rlhf_cached_attention(
            raw(input.query),
            raw(input.key),
            raw(input.value),
            raw(input.keys),
            raw(input.values),
            input.lengths.as_ptr(),
            input.scale,
            input.window.unwrap_or(0),
            input.softcap.unwrap_or(0.0),
            result,
        )
    })
}

fn returned(call: impl FnOnce(*mut Raw) -> Message) -> Result<Option<Tensor>> {
    let mut result = null_mut();
    check(call(&mut result))?;
    // SAFETY: null, or a tensor that is ours.
    Ok((!result.is_null()).then(|| unsafe { Tensor::from_ptr(result) }))
}
