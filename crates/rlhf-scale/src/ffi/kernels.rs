//! Decoding on the CPU: products of few rows with large matrices, attention to a cache, and what
//! lies between them in single passes.
//!
//! libtorch's matrix products are made for many rows. With few, the time goes into fetching the
//! weights; these kernels fetch each weight once, ahead of its use, and multiply it with all rows
//! while it is at hand. They use the weights as they lie, `[out, in]`: nothing is packed, kept
//! beside them, or made stale by an update.
//!
//! Each returns `None` where it does not apply and the caller does it with libtorch: while
//! gradients are recorded, on another device or kind than f32 and bf16, on a processor without
//! AVX-512; products also for more than 32 rows. A row's result depends on that row alone, bit for
//! bit: not on how many rows there are, nor on the number of threads.

use std::ptr::null_mut;

use tch::Tensor;

use super::{Message, Raw, check, raw};
use crate::{Error, Result};

unsafe extern "C" {
    fn rlhf_few_rows_linear(
        x: Raw,
        weights: *const Raw,
        biases: *const Raw,
        count: usize,
        results: *mut Raw,
    ) -> Message;
    fn rlhf_rms_norm(x: Raw, weight: Raw, epsilon: f64, result: *mut Raw) -> Message;
    fn rlhf_rotate(x: Raw, cos: Raw, sin: Raw, result: *mut Raw) -> Message;
    fn rlhf_silu_gated(gate: Raw, up: Raw, result: *mut Raw) -> Message;
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
    let outputs = linears(x, [(weight, bias)])?;
    Ok(outputs.map(|[output]| output))
}

/// Several affine maps of the same rows, [`linear`]'s results: threads start once for all.
///
/// # Errors
/// libtorch's (out of memory).
pub fn linears<const N: usize>(
    x: &Tensor,
    maps: [(&Tensor, Option<&Tensor>); N],
) -> Result<Option<[Tensor; N]>> {
    let weights = maps.map(|(weight, _)| raw(weight));
    let biases = maps.map(|(_, bias)| bias.map_or(null_mut(), raw));
    let mut results = [null_mut(); N];
    // SAFETY: live tensors, as many as it is told; null stands for no bias.
    let message = unsafe {
        rlhf_few_rows_linear(
            raw(x),
            weights.as_ptr(),
            biases.as_ptr(),
            N,
            results.as_mut_ptr(),
        )
    };
    check(message)?;
    if results.contains(&null_mut()) {
        return Ok(None);
    }
    // SAFETY: all are set, or none.
    Ok(Some(
        results.map(|result| unsafe { Tensor::from_ptr(result) }),
    ))
}

/// Each vector of the last dimension over the root of its mean square plus `epsilon`, rounded to
/// `x`'s kind, times `weight`.
///
/// # Shapes
/// `x`: `[.., H]`; `weight`: `[H]`. Returns `[.., H]`.
///
/// # Errors
/// libtorch's (out of memory).
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Option<Tensor>> {
    // SAFETY: live tensors.
    returned(|result| unsafe { rlhf_rms_norm(raw(x), raw(weight), epsilon, result) })
}

/// Rotary positions: `x * cos` plus `sin` times `x` with the halves of its first `width` dimensions
/// exchanged; the dimensions after them stay.
///
/// # Shapes
/// `x`: `[N, heads, d]`; `cos`, `sin`: `[N, 1, width]`, `sin` with its first half negated. Returns
/// `[N, heads, d]`.
///
/// # Errors
/// libtorch's (out of memory).
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Option<Tensor>> {
    // SAFETY: live tensors; the shim checks their sizes.
    returned(|result| unsafe { rlhf_rotate(raw(x), raw(cos), raw(sin), result) })
}

/// `silu(gate) * up`.
///
/// # Shapes
/// All of one shape.
///
/// # Errors
/// libtorch's (out of memory).
pub fn silu_gated(gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    // SAFETY: live tensors; the shim checks their sizes.
    returned(|result| unsafe { rlhf_silu_gated(raw(gate), raw(up), result) })
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
