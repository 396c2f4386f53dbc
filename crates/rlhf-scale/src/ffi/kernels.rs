//! Matrix products, and attention to a cache, on the CPU of a processor with AVX2 or AVX-512.
//!
//! Products of many rows copy both factors into panels that fill the widest registers, on
//! processors of any maker, and have gradients: in f32, and in bf16 where the processor has nothing
//! that multiplies it quicker than f32 (where it has, libtorch's use that: AMD's AVX-512, Intel's
//! AMX; Intel's AVX-512 takes twice as long for bf16 as for f32). With few rows, as in decoding, the
//! time goes into fetching the weights; there a kernel of its own fetches each weight once, ahead of
//! its use, and multiplies it with all rows while it is at hand. Both use the weights as they lie:
//! nothing is kept beside them, or made stale by an update.
//!
//! Each returns `None` where it does not apply and the caller does it with libtorch: on another
//! device, under autocast, on another processor; for other kinds than f32 and bf16. A row's result
//! depends on that row alone, bit for bit: not on how many rows there are (but that few and many
//! are different kernels), nor on the number of threads. Nor do gradients depend on the latter.
//!
//! What lies between the products is in [`recorded`](super::recorded). The environment variable
//! `RLHF_KERNELS` keeps all of them to less than the processor has: `none`, or `avx2`. Products of
//! many rows have the same bits with either; a few sums in decoding do not.

use std::ffi::c_int;
use std::ptr::null_mut;

use tch::{Kind, Tensor};

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
    fn rlhf_linear(
        x: Raw,
        weights: *const Raw,
        biases: *const Raw,
        count: usize,
        out_first: c_int,
        results: *mut Raw,
    ) -> Message;
    fn rlhf_want_kernels(wanted: c_int);
    fn rlhf_multiplies(bf16: bool) -> bool;
    fn rlhf_multiply_into(out: Raw, a: Raw, b: Raw, add: c_int, done: *mut c_int) -> Message;
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

/// Whether the products of many rows, and what is [`recorded`](super::recorded) in f32, run where they
/// apply, as they do unless told otherwise: in the whole process. Without them libtorch's operations
/// compute the same up to rounding, and keep more for backward.
pub fn set_training(enabled: bool) {
    // SAFETY: sets a flag.
    unsafe { rlhf_want_kernels(c_int::from(enabled)) }
}

/// Whether products of many rows of this kind are of our own on this processor, and
/// [wanted](set_training).
pub fn multiplies(kind: Kind) -> bool {
    // SAFETY: asks the processor, and reads a flag.
    matches!(kind, Kind::Float | Kind::BFloat16)
        && unsafe { rlhf_multiplies(kind == Kind::BFloat16) }
}

/// An affine map: `x weightᵀ + bias`. Sums are f32, rounded once for bf16. With gradients where
/// they are recorded.
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

/// Several affine maps of the same rows, [`linear`]'s results: threads start once for all, and
/// what is prepared of the rows is prepared once.
///
/// # Errors
/// libtorch's (out of memory).
pub fn linears<const N: usize>(
    x: &Tensor,
    maps: [(&Tensor, Option<&Tensor>); N],
) -> Result<Option<[Tensor; N]>> {
    let weights = maps.map(|(weight, _)| raw(weight));
    let biases = maps.map(|(_, bias)| bias.map_or(null_mut(), raw));
    let (weights, biases) = (weights.as_ptr(), biases.as_ptr());
    // SAFETY: live tensors, as many as it is told; null stands for no bias.
    let few = all_returned(|results| unsafe {
        rlhf_few_rows_linear(raw(x), weights, biases, N, results)
    })?;
    match few {
        Some(few) => Ok(Some(few)),
        // SAFETY: as above.
        None => {
            all_returned(|results| unsafe { rlhf_linear(raw(x), weights, biases, N, 1, results) })
        }
    }
}

/// [`linear`] with a weight that lies the other way: `x weight + bias`.
///
/// # Shapes
/// `x`: `[M, in]`; `weight`: `[in, out]`; `bias`: `[out]`. Returns `[M, out]`.
///
/// # Errors
/// libtorch's (out of memory).
pub fn linear_in_out(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (weights, biases) = ([raw(weight)], [bias.map_or(null_mut(), raw)]);
    // SAFETY: live tensors, one each; null stands for no bias.
    let outputs = all_returned(|results| unsafe {
        rlhf_linear(raw(x), weights.as_ptr(), biases.as_ptr(), 1, 0, results)
    })?;
    Ok(outputs.map(|[output]| output))
}

/// Writes `a b` to `out`, or adds it there, without gradients. False where this does not apply, and
/// nothing is done.
///
/// # Shapes
/// `a`: `[M, K]`; `b`: `[K, N]`; `out`: `[M, N]`, of their kind or f32.
///
/// # Errors
/// libtorch's (out of memory).
pub(crate) fn multiply_into(out: &Tensor, a: &Tensor, b: &Tensor, add: bool) -> Result<bool> {
    let mut done = 0;
    // SAFETY: live tensors; the shim checks their sizes. `out` overlaps neither.
    check(unsafe { rlhf_multiply_into(raw(out), raw(a), raw(b), c_int::from(add), &mut done) })?;
    Ok(done != 0)
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

/// As many results as the call was told to make, or none.
fn all_returned<const N: usize>(
    call: impl FnOnce(*mut Raw) -> Message,
) -> Result<Option<[Tensor; N]>> {
    let mut results = [null_mut(); N];
    check(call(results.as_mut_ptr()))?;
    if results.contains(&null_mut()) {
        return Ok(None);
    }
    // SAFETY: tensors that are ours.
    Ok(Some(
        results.map(|result| unsafe { Tensor::from_ptr(result) }),
    ))
}

fn returned(call: impl FnOnce(*mut Raw) -> Message) -> Result<Option<Tensor>> {
    let mut result = null_mut();
    check(call(&mut result))?;
    // SAFETY: null, or a tensor that is ours.
    Ok((!result.is_null()).then(|| unsafe { Tensor::from_ptr(result) }))
}
