//! Matrix products into memory that is there.

use tch::Tensor;

use crate::Result;
use crate::ffi::kernels::multiply_into;

/// What a product does to what was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// It takes its place.
    Place,
    /// It is added to it.
    Sum,
}

/// `a b`, without gradients, by a kernel of our own where that applies.
pub(super) fn multiply(out: &mut Tensor, a: &Tensor, b: &Tensor, target: Target) -> Result<()> {
    if multiply_into(out, a, b, target == Target::Sum)? {
        return Ok(());
    }
    let _ = match target {
        Target::Place => a.f_mm_out(out, b)?,
        Target::Sum => out.f_addmm_(a, b)?,
    };
    Ok(())
}
