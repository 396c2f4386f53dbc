//! The C++ shim, and the only `unsafe` code of this crate.
//!
//! Safe wrappers are public to the crate; the invariants that C++ relies on are theirs to uphold.
#![allow(unsafe_code)]

pub(crate) mod allocator;
pub(crate) mod autograd;
#[cfg(feature = "distributed")]
pub(crate) mod c10d;
pub mod kernels;
pub(crate) mod memory;
pub mod recorded;
#[cfg(feature = "distributed")]
pub(crate) mod reducer;
pub(crate) mod softmax;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;

use rlhf_core::Error as CoreError;
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::{Error, Result};

type Raw = *mut C_tensor;

/// Null, or a message to be released with `free`.
type Message = *mut c_char;

unsafe extern "C" {
    fn rlhf_adamw_reads_bf16() -> bool;
    fn rlhf_adamw(
        params: *const Raw,
        grads: *const Raw,
        exp_avgs: *const Raw,
        exp_avg_sqs: *const Raw,
        steps: *const Raw,
        count: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        scale: f64,
    ) -> Message;
    fn rlhf_copy_all(targets: *const Raw, sources: *const Raw, count: usize) -> Message;
    fn rlhf_round_all(
        targets: *const Raw,
        sources: *const Raw,
        places: *const i64,
        count: usize,
    ) -> Message;
    fn rlhf_norm(tensors: *const Raw, count: usize, order: f64, result: *mut Raw) -> Message;
    fn rlhf_scale_all(tensors: *const Raw, count: usize, factor: f64) -> Message;
    fn rlhf_set_grad(param: Raw, grad: Raw) -> Message;
    fn rlhf_clear_grads(params: *const Raw, count: usize) -> Message;
    fn rlhf_backward(outputs: *const Raw, grad_outputs: *const Raw, count: usize) -> Message;
    fn rlhf_from_owner(
        data: *mut c_void,
        shape: *const i64,
        dims: usize,
        kind: c_int,
        owner: *mut c_void,
        drop: extern "C" fn(*mut c_void),
        result: *mut Raw,
    ) -> Message;
}

/// Whether [`FusedAdamW::step`] reads bf16 gradients of f32 weights on the CPU.
pub(crate) fn adamw_reads_bf16() -> bool {
    // SAFETY: no arguments.
    unsafe { rlhf_adamw_reads_bf16() }
}

/// The tensors of one step: five lists of one length, all of one device and kind but for gradients
/// that are [bf16](adamw_reads_bf16).
#[derive(Default)]
pub(crate) struct FusedAdamW<'a> {
    pub(crate) params: Vec<&'a Tensor>,
    pub(crate) grads: Vec<&'a Tensor>,
    pub(crate) exp_avgs: Vec<&'a Tensor>,
    pub(crate) exp_avg_sqs: Vec<&'a Tensor>,
    pub(crate) steps: Vec<&'a Tensor>,
}

impl FusedAdamW<'_> {
    /// Raises `steps` by one and applies AdamW in place, on gradients times `scale`, which may have
    /// been scaled themselves then. The caller has checked that strides agree, since the kernel walks
    /// the storage.
    pub(crate) fn step(
        &self,
        scale: f64,
        lr: f64,
        config: &crate::AdamWConfig,
        weight_decay: f64,
    ) -> Result<()> {
        let [params, grads, exp_avgs, exp_avg_sqs, steps] = [
            raw_list(&self.params),
            raw_list(&self.grads),
            raw_list(&self.exp_avgs),
            raw_list(&self.exp_avg_sqs),
            raw_list(&self.steps),
        ];
        // SAFETY: live tensors; the lists are filled together, so `count` holds for all of them.
        check(unsafe {
            rlhf_adamw(
                params.as_ptr(),
                grads.as_ptr(),
                exp_avgs.as_ptr(),
                exp_avg_sqs.as_ptr(),
                steps.as_ptr(),
                params.len(),
                lr,
                config.beta1,
                config.beta2,
                weight_decay,
                config.eps,
                scale,
            )
        })
    }
}

/// `targets[i].copy_(sources[i])` without autograd.
pub(crate) fn copy_all(targets: &[&Tensor], sources: &[&Tensor]) -> Result<()> {
    debug_assert_eq!(targets.len(), sources.len());
    let count = targets.len().min(sources.len());
    // SAFETY: live tensors, `count` of each.
    check(unsafe {
        rlhf_copy_all(
            raw_list(targets).as_ptr(),
            raw_list(sources).as_ptr(),
            count,
        )
    })
}

/// `targets[i]` from its master `sources[i]`, rounded as [`AdamW`](crate::AdamW) says; `places[i]` is
/// where it begins in its parameter.
pub(crate) fn round_all(targets: &[&Tensor], sources: &[&Tensor], places: &[i64]) -> Result<()> {
    debug_assert!(targets.len() == sources.len() && targets.len() == places.len());
    let count = targets.len().min(sources.len()).min(places.len());
    // SAFETY: live tensors, `count` of each, and as many places; the shim looks at sizes and strides.
    check(unsafe {
        rlhf_round_all(
            raw_list(targets).as_ptr(),
            raw_list(sources).as_ptr(),
            places.as_ptr(),
            count,
        )
    })
}

/// The norm of all tensors as one vector.
pub(crate) fn norm(tensors: &[&Tensor], order: f64) -> Result<Tensor> {
    let mut result = null_mut();
    // SAFETY: live tensors; `result` is set exactly when no error is returned.
    unsafe {
        check(rlhf_norm(
            raw_list(tensors).as_ptr(),
            tensors.len(),
            order,
            &mut result,
        ))?;
        Ok(Tensor::from_ptr(result))
    }
}

/// `tensors[i] *= factor` without autograd.
pub(crate) fn scale_all(tensors: &[&Tensor], factor: f64) -> Result<()> {
    // SAFETY: live tensors.
    check(unsafe { rlhf_scale_all(raw_list(tensors).as_ptr(), tensors.len(), factor) })
}

pub(crate) fn set_grad(param: &Tensor, grad: Option<&Tensor>) -> Result<()> {
    // SAFETY: live tensors; null stands for no gradient.
    check(unsafe { rlhf_set_grad(raw(param), grad.map_or(null_mut(), raw)) })
}

pub(crate) fn clear_grads(params: &[&Tensor]) -> Result<()> {
    // SAFETY: live tensors.
    check(unsafe { rlhf_clear_grads(raw_list(params).as_ptr(), params.len()) })
}

/// Both lists have one length, which the caller has checked.
pub(crate) fn backward(outputs: &[Tensor], grad_outputs: &[Tensor]) -> Result<()> {
    debug_assert_eq!(outputs.len(), grad_outputs.len());
    let count = outputs.len().min(grad_outputs.len());
    let outputs: Vec<Raw> = outputs.iter().map(raw).collect();
    let grad_outputs: Vec<Raw> = grad_outputs.iter().map(raw).collect();
    // SAFETY: live tensors, `count` of each.
    check(unsafe { rlhf_backward(outputs.as_ptr(), grad_outputs.as_ptr(), count) })
}

/// A contiguous CPU tensor over memory that `owner` holds, without a copy.
///
/// `bytes` picks the memory out of the owner after it has come to rest. The owner is dropped with
/// the tensor's storage, that is when the tensor and every view of it are gone, on whatever thread
/// that happens. Writes to the tensor land in the memory, which is why it must be mutable: map a
/// file copy-on-write (`memmap2::MmapOptions::map_copy`) to use its weights in place. Several
/// tensors of one file are views of one byte tensor over all of it
/// ([`Tensor::view_dtype`] after [`Tensor::narrow`]).
///
/// # Errors
/// [`Error::Memory`] if the bytes are too few, too many, or not aligned for `kind`.
///
/// ```
/// use rlhf_scale::tensor_from_owner;
/// use tch::Kind;
///
/// # fn main() -> Result<(), rlhf_scale::Error> {
/// let tensor = tensor_from_owner(vec![1u8, 2, 3], |bytes| bytes, &[3], Kind::Uint8)?;
/// assert_eq!(Vec::<u8>::try_from(&tensor)?, [1, 2, 3]);
/// # Ok(())
/// # }
/// ```
pub fn tensor_from_owner<T: Send + 'static>(
    owner: T,
    bytes: impl for<'a> FnOnce(&'a mut T) -> &'a mut [u8],
    shape: &[i64],
    kind: Kind,
) -> Result<Tensor> {
    let mut owner = Box::new(owner);
    let memory = bytes(&mut owner);
    let needed = shape
        .iter()
        .try_fold(kind.elt_size_in_bytes(), |product, &size| {
            product.checked_mul(usize::try_from(size).ok()?)
        });
    let aligned = (memory.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes());
    if needed != Some(memory.len()) || !aligned {
        return Err(Error::Memory {
            bytes: memory.len(),
            alignment: if aligned { "" } else { ", misaligned," },
            shape: shape.to_vec(),
            kind,
        });
    }
    let data = memory.as_mut_ptr().cast();
    let mut result = null_mut();
    // SAFETY: `data` points to as many bytes as the shape needs, borrowed mutably from the boxed
    // owner. The box is given to C++, which drops it once, after the last access, and nobody else
    // can reach it, so the loan lasts as long as the storage. `T: Send` lets any thread drop it.
    unsafe {
        check(rlhf_from_owner(
            data,
            shape.as_ptr(),
            shape.len(),
            scalar_type(kind),
            Box::into_raw(owner).cast(),
            drop_owner::<T>,
            &mut result,
        ))?;
        Ok(Tensor::from_ptr(result))
    }
}

extern "C" fn drop_owner<T>(owner: *mut c_void) {
    // SAFETY: C++ passes the pointer that `Box::into_raw` gave, once.
    let owner = unsafe { Box::from_raw(owner.cast::<T>()) };
    // A destructor that panics must not unwind into C++; there is nobody to tell.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(owner)));
}

fn raw(tensor: &Tensor) -> Raw {
    tensor.as_ptr().cast_mut()
}

fn raw_list(tensors: &[&Tensor]) -> Vec<Raw> {
    tensors.iter().map(|tensor| raw(tensor)).collect()
}

fn check(message: Message) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns a C string made by `strdup`, which is ours to free.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().trim().to_string();
        libc::free(message.cast());
        text
    };
    Err(CoreError::Tensor { message: text }.into())
}

/// `c10::ScalarType` of a kind.
fn scalar_type(kind: Kind) -> c_int {
    match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::ComplexHalf => 8,
        Kind::ComplexFloat => 9,
        Kind::ComplexDouble => 10,
        Kind::Bool => 11,
        Kind::QInt8 => 12,
        Kind::QUInt8 => 13,
        Kind::QInt32 => 14,
        Kind::BFloat16 => 15,
        Kind::Float8e5m2 => 23,
        Kind::Float8e4m3fn => 24,
        Kind::Float8e5m2fnuz => 25,
        Kind::Float8e4m3fnuz => 26,
    }
}
