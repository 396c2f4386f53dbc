//! Autograd nodes that call Rust closures.

use std::any::Any;
use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::slice;

use tch::Tensor;

use super::{Message, Raw, check, raw};
use crate::Result;

/// What a node calls: tensors (`None`: undefined) and flags in, tensors or a message out.
pub(crate) type Closure =
    dyn Fn(&[Option<Tensor>], &[bool]) -> Result<Vec<Option<Tensor>>, String> + Send;

type Call =
    extern "C" fn(*mut c_void, *const Raw, usize, *const bool, *mut Raw, usize) -> *mut c_char;
type Release = extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn rlhf_grad_enabled() -> bool;
    fn rlhf_version(tensor: Raw, version: *mut u32) -> Message;
    fn rlhf_attach_backward(
        inputs: *const Raw,
        input_count: usize,
        outputs: *const Raw,
        output_count: usize,
        closure: *mut c_void,
        call: Call,
        release: Release,
    ) -> Message;
    fn rlhf_checkpoint_begin(
        inputs: *const Raw,
        count: usize,
        preserve_rng: bool,
        leaves: *mut Raw,
        frame: *mut *mut c_void,
    ) -> Message;
    fn rlhf_checkpoint_abort(frame: *mut c_void);
    fn rlhf_checkpoint_end(
        frame: *mut c_void,
        inputs: *const Raw,
        leaves: *const Raw,
        input_count: usize,
        outputs: *const Raw,
        output_count: usize,
        offload: bool,
        closure: *mut c_void,
        call: Call,
        release: Release,
    ) -> Message;
    fn rlhf_stopping_begin(
        inputs: *const Raw,
        count: usize,
        preserve_rng: bool,
        offload: bool,
        frame: *mut *mut c_void,
    ) -> Message;
    fn rlhf_stopping_abort(frame: *mut c_void);
    fn rlhf_stopping_end(
        frame: *mut c_void,
        outputs: *const Raw,
        output_count: usize,
        closure: *mut c_void,
        call: Call,
        release: Release,
    ) -> Message;
}

/// Whether operations of this thread are recorded for backward: not under `tch::no_grad_guard`.
pub fn grad_enabled() -> bool {
    // SAFETY: reads a thread-local flag.
    unsafe { rlhf_grad_enabled() }
}

/// How often a tensor, or another that shares its storage, was changed in place.
pub(crate) fn version(tensor: &Tensor) -> Result<u32> {
    let mut version = 0;
    // SAFETY: a live tensor.
    check(unsafe { rlhf_version(raw(tensor), &mut version) })?;
    Ok(version)
}

/// Makes `backward` the backward of `outputs`, which were computed without gradients.
pub(crate) fn attach_backward(
    inputs: &[&Tensor],
    outputs: &[Tensor],
    backward: Box<Closure>,
) -> Result<()> {
    let inputs: Vec<Raw> = inputs.iter().map(|t| raw(t)).collect();
    let outputs: Vec<Raw> = outputs.iter().map(raw).collect();
    // SAFETY: live tensors. The closure is given away; C++ calls `release` on it once and `call`
    // only before that, one call at a time (a node runs under its lock), so `Send` is enough.
    check(unsafe {
        rlhf_attach_backward(
            inputs.as_ptr(),
            inputs.len(),
            outputs.as_ptr(),
            outputs.len(),
            give_away(backward),
            call,
            release,
        )
    })
}

/// A checkpoint whose closure is about to run.
pub(crate) struct CheckpointFrame {
    frame: *mut c_void,
    leaves: Vec<Tensor>,
}

impl CheckpointFrame {
    pub(crate) fn begin(inputs: &[&Tensor], preserve_rng: bool) -> Result<Self> {
        let inputs: Vec<Raw> = inputs.iter().map(|t| raw(t)).collect();
        let mut leaves = vec![null_mut(); inputs.len()];
        let mut frame = null_mut();
        // SAFETY: live tensors; room for as many leaves. All leaves and the frame are set exactly
        // when no error is returned.
        unsafe {
            check(rlhf_checkpoint_begin(
                inputs.as_ptr(),
                inputs.len(),
                preserve_rng,
                leaves.as_mut_ptr(),
                &mut frame,
            ))?;
            Ok(Self {
                frame,
                leaves: leaves.into_iter().map(|p| Tensor::from_ptr(p)).collect(),
            })
        }
    }

    /// What the closure computes with.
    pub(crate) fn leaves(&self) -> &[Tensor] {
        &self.leaves
    }

    /// Lets `outputs` forget how they were computed; `recompute` will tell. `inputs` are those that
    /// the checkpoint began with.
    pub(crate) fn finish(
        mut self,
        inputs: &[&Tensor],
        outputs: &[Tensor],
        offload: bool,
        recompute: Box<Closure>,
    ) -> Result<()> {
        // C++ relies on a leaf for every input.
        let inputs = &inputs[..inputs.len().min(self.leaves.len())];
        let frame = std::mem::replace(&mut self.frame, null_mut());
        let inputs: Vec<Raw> = inputs.iter().map(|t| raw(t)).collect();
        let leaves: Vec<Raw> = self.leaves.iter().map(raw).collect();
        let outputs: Vec<Raw> = outputs.iter().map(raw).collect();
        // SAFETY: live tensors, as many leaves as inputs. The frame comes from `begin` and is given
        // back once; the closure as in `attach_backward`.
        check(unsafe {
            rlhf_checkpoint_end(
                frame,
                inputs.as_ptr(),
                leaves.as_ptr(),
                inputs.len(),
                outputs.as_ptr(),
                outputs.len(),
                offload,
                give_away(recompute),
                call,
                release,
            )
        })
    }
}

impl Drop for CheckpointFrame {
    fn drop(&mut self) {
        if !self.frame.is_null() {
            // SAFETY: made by `begin`, not yet given back.
            unsafe { rlhf_checkpoint_abort(self.frame) }
        }
    }
}

/// A checkpoint that stops early and whose closure is about to run, with the inputs themselves.
///
/// Frames end in the reverse order of their beginnings, on one thread: the raw pointer makes this
/// not `Send`, and callers keep it on the stack.
pub(crate) struct StoppingFrame(*mut c_void);

impl StoppingFrame {
    /// `None` where libtorch's engine is not its own, so that saved tensors cannot be watched.
    pub(crate) fn begin(
        inputs: &[&Tensor],
        preserve_rng: bool,
        offload: bool,
    ) -> Result<Option<Self>> {
        let inputs: Vec<Raw> = inputs.iter().map(|t| raw(t)).collect();
        let mut frame = null_mut();
        // SAFETY: live tensors; `frame` is set, or null, when no error is returned.
        check(unsafe {
            rlhf_stopping_begin(
                inputs.as_ptr(),
                inputs.len(),
                preserve_rng,
                offload,
                &mut frame,
            )
        })?;
        Ok((!frame.is_null()).then_some(Self(frame)))
    }

    /// Gives the graph of `outputs` what computes its saved tensors again.
    pub(crate) fn finish(mut self, outputs: &[Tensor], recompute: Box<Closure>) -> Result<()> {
        let frame = std::mem::replace(&mut self.0, null_mut());
        let outputs: Vec<Raw> = outputs.iter().map(raw).collect();
        // SAFETY: live tensors. The frame comes from `begin` and is given back once; the closure as
        // in `attach_backward`, called under the checkpoint's lock.
        check(unsafe {
            rlhf_stopping_end(
                frame,
                outputs.as_ptr(),
                outputs.len(),
                give_away(recompute),
                call,
                release,
            )
        })
    }
}

impl Drop for StoppingFrame {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by `begin`, not yet given back.
            unsafe { rlhf_stopping_abort(self.0) }
        }
    }
}

/// A thin pointer to the closure.
fn give_away(closure: Box<Closure>) -> *mut c_void {
    Box::into_raw(Box::new(closure)).cast()
}

extern "C" fn call(
    closure: *mut c_void,
    inputs: *const Raw,
    input_count: usize,
    needed: *const bool,
    outputs: *mut Raw,
    output_count: usize,
) -> *mut c_char {
    let run = || {
        // SAFETY: the pointer of `give_away`, not yet released; `input_count` tensors or nulls;
        // no flags or as many as there are outputs.
        let (closure, inputs, needed) = unsafe {
            let inputs: Vec<Option<Tensor>> = many(inputs, input_count)
                .iter()
                .map(|&input| (!input.is_null()).then(|| Tensor::clone_from_ptr(input)))
                .collect();
            let flags = if needed.is_null() { 0 } else { output_count };
            (
                &*closure.cast::<Box<Closure>>(),
                inputs,
                many(needed, flags),
            )
        };
        let results = closure(&inputs, needed)?;
        if results.len() != output_count {
            return Err(format!(
                "a closure of the graph returned {} tensors; it should return {output_count}",
                results.len()
            ));
        }
        for (i, tensor) in results.into_iter().enumerate() {
            if let Some(tensor) = tensor {
                // SAFETY: room for `output_count` tensors, which the caller comes to own.
                unsafe { *outputs.add(i) = raw(&tensor) };
                std::mem::forget(tensor);
            }
        }
        Ok(())
    };
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return null_mut(),
        Ok(Err(message)) => message,
        Err(panic) => format!("a closure of the graph panicked: {}", panic_text(&*panic)),
    };
    let text = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: a C string; the caller frees the copy.
    unsafe { libc::strdup(text.as_ptr()) }
}

extern "C" fn release(closure: *mut c_void) {
    // SAFETY: the pointer of `give_away`, once.
    let closure = unsafe { Box::from_raw(closure.cast::<Box<Closure>>()) };
    // A destructor that panics must not unwind into C++; there is nobody to tell.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(closure)));
}

/// # Safety
/// `count` elements at `first`, which may be null if there are none.
unsafe fn many<'a, T>(first: *const T, count: usize) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: the caller's.
    unsafe { slice::from_raw_parts(first, count) }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}
