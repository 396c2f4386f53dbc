//! What a piece of code really allocates.

use crate::Result;
use crate::ffi::memory::Meter;

/// Bytes of the tensors that a closure made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// The most that were alive at a time.
    pub peak: u64,
    /// Those still alive at its end: what it returned, what autograd keeps, gradients.
    pub kept: u64,
}

/// Runs `f` and counts the bytes of the tensors that it makes on this thread, to the byte and the
/// same each time, as libtorch's own profiler would.
///
/// Backward is counted where it runs, except for what a checkpoint computes again: that counts
/// where its forward ran, so measure the two together. Buffers that the kernels of oneDNN, MKL or
/// cuBLAS make for themselves are no tensors and not counted. Calls may be nested; memory that was
/// there before and is freed by `f` is not subtracted.
///
/// # Errors
/// Only if libtorch fails; `f` has not run then.
///
/// ```
/// use rlhf_scale::measure_memory;
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), rlhf_scale::Error> {
/// let (sum, memory) = measure_memory(|| {
///     let zeros = Tensor::zeros([1000], (Kind::Float, Device::Cpu));
///     let twice = &zeros + &zeros;
///     twice
/// })?;
/// assert_eq!((memory.peak, memory.kept), (8000, 4000));
/// # drop(sum);
/// # Ok(())
/// # }
/// ```
pub fn measure_memory<T>(f: impl FnOnce() -> T) -> Result<(T, MemoryUse)> {
    let meter = Meter::begin()?;
    let result = f();
    let (peak, kept) = meter.read();
    Ok((result, MemoryUse { peak, kept }))
}
