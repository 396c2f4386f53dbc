//! What lies between a model's matrix products on the CPU, and causal attention, in f32 and bf16: in
//! single passes that are recorded for backward.
//!
//! Beside products that use what a processor has, what was small is not any more: libtorch has up to
//! eight passes over memory for a norm, as many back, and calls a library for every tile of attention.
//! These kernels have one pass each way, compute in f32 and round results only. They keep for backward
//! what they read, not what they computed in between.
//!
//! They serve with and without gradients, to the same bits, so that log-probabilities of a rollout are
//! those that training begins with. Each returns `None` where it does not apply and the caller does it
//! with libtorch: on another device or kind than f32 and bf16, on a processor without AVX2, under
//! autocast; in f32, where they are [not wanted](super::kernels::set_training). Forward's results depend
//! neither on other rows nor on the number of threads, and so do gradients. There is no second
//! derivative: asking for one is an error.

use std::ptr::null_mut;

use rlhf_core::Segment;
use tch::{Kind, Tensor};

use super::{Message, Raw, check, raw};
use crate::Result;

unsafe extern "C" {
    fn rlhf_records(bf16: bool) -> bool;
    fn rlhf_recorded_rms_norm(
        x: Raw,
        added: Raw,
        weight: Raw,
        epsilon: f64,
        sum: *mut Raw,
        result: *mut Raw,
    ) -> Message;
    fn rlhf_recorded_rotate(x: Raw, cos: Raw, sin: Raw, result: *mut Raw) -> Message;
    fn rlhf_recorded_silu_gated(gate: Raw, up: Raw, result: *mut Raw) -> Message;
    fn rlhf_causal_attention(
        query: Raw,
        key: Raw,
        value: Raw,
        segments: *const i64,
        count: usize,
        scale: f64,
        window: i64,
        result: *mut Raw,
    ) -> Message;
}

/// Whether this processor has these kernels for a kind, and they are
/// [wanted](super::kernels::set_training).
pub fn available(kind: Kind) -> bool {
    // SAFETY: asks the processor, and reads a flag.
    matches!(kind, Kind::Float | Kind::BFloat16) && unsafe { rlhf_records(kind == Kind::BFloat16) }
}

/// Each vector of the last dimension over the root of its mean square plus `epsilon`, rounded, times
/// `weight`.
///
/// # Shapes
/// `x`: `[.., H]`; `weight`: `[H]`. Returns `[.., H]`.
///
/// # Errors
/// libtorch's (out of memory).
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Option<Tensor>> {
    let (mut sum, mut result) = (null_mut(), null_mut());
    // SAFETY: live tensors; the shim checks kinds and sizes, and sets `result` or nothing.
    let message = unsafe {
        rlhf_recorded_rms_norm(
            raw(x),
            null_mut(),
            raw(weight),
            epsilon,
            &mut sum,
            &mut result,
        )
    };
    check(message)?;
    Ok(taken(result))
}

/// `x + added`, rounded, and its [`rms_norm`]: of a residual stream, where the gradients of both meet.
///
/// # Shapes
/// `x`, `added`: `[.., H]`; `weight`: `[H]`. Returns two of `[.., H]`.
///
/// # Errors
/// libtorch's (out of memory).
pub fn add_rms_norm(
    x: &Tensor,
    added: &Tensor,
    weight: &Tensor,
    epsilon: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    let (mut sum, mut result) = (null_mut(), null_mut());
    // SAFETY: live tensors; the shim checks kinds and sizes, and sets both results or none.
    let message = unsafe {
        rlhf_recorded_rms_norm(
            raw(x),
            raw(added),
            raw(weight),
            epsilon,
            &mut sum,
            &mut result,
        )
    };
    check(message)?;
    Ok(taken(sum).zip(taken(result)))
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
    let mut result = null_mut();
    // SAFETY: live tensors; the shim checks kinds and sizes.
    check(unsafe { rlhf_recorded_rotate(raw(x), raw(cos), raw(sin), &mut result) })?;
    Ok(taken(result))
}

/// `silu(gate) * up`.
///
/// # Shapes
/// All of one shape.
///
/// # Errors
/// libtorch's (out of memory).
pub fn silu_gated(gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    let mut result = null_mut();
    // SAFETY: live tensors; the shim checks kinds and sizes.
    check(unsafe { rlhf_recorded_silu_gated(raw(gate), raw(up), &mut result) })?;
    Ok(taken(result))
}

/// What the tokens of a packed run attend to, for [`causal_attention`].
#[derive(Debug)]
pub struct CausalAttentionInput<'a> {
    /// `[N, heads, d]`.
    pub query: &'a Tensor,
    /// `[N, kv_heads, d]`.
    pub key: &'a Tensor,
    /// `[N, kv_heads, d]`.
    pub value: &'a Tensor,
    /// All rows of the run, in order. A token looks at itself, those before it in its segment, and the
    /// segment's prefix, which lies in an earlier one.
    pub segments: &'a [Segment],
    /// Multiplies the products of queries and keys.
    pub scale: f64,
    /// Most keys that a query looks at, its own included.
    pub window: Option<i64>,
}

/// Attention of all segments at once. Softmax and sums are f32, and so are the weights.
///
/// # Shapes
/// Returns `[N, heads * d]`; `d` is a multiple of 16.
///
/// # Errors
/// libtorch's (out of memory).
pub fn causal_attention(input: &CausalAttentionInput) -> Result<Option<Tensor>> {
    let segments: Vec<i64> = input
        .segments
        .iter()
        .flat_map(|segment| {
            let prefix = segment.prefix.clone().unwrap_or(0..0);
            [
                segment.rows.start,
                segment.rows.end,
                prefix.start,
                prefix.end,
            ]
        })
        .collect();
    let mut result = null_mut();
    // SAFETY: live tensors and four numbers a segment; the shim checks kinds, sizes and that segments
    // are rows of the run, one after another.
    let message = unsafe {
        rlhf_causal_attention(
            raw(input.query),
            raw(input.key),
            raw(input.value),
            segments.as_ptr(),
            input.segments.len(),
            input.scale,
            input.window.unwrap_or(0),
            &mut result,
        )
    };
    check(message)?;
    Ok(taken(result))
}

fn taken(tensor: Raw) -> Option<Tensor> {
    // SAFETY: null, or a tensor that is ours.
    (!tensor.is_null()).then(|| unsafe { Tensor::from_ptr(tensor) })
}
