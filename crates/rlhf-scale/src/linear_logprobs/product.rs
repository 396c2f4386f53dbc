//! Matrix products into memory that is there.

use tch::{Kind, Tensor};

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

/// Adds `scale` times `a b` to `sum`, which is f32; `scale` is a f32 scalar, `None` for 1. Products of 16
/// bits that no kernel of our own computes are rounded to these before.
pub(super) fn add_product(
    sum: &mut Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: Option<&Tensor>,
) -> Result<()> {
    let Some(scale) = scale else {
        if multiply_into(sum, a, b, true)? {
            return Ok(());
        }
        let _ = match a.kind() {
            Kind::Float => sum.f_addmm_(a, b)?,
            _ => sum.f_add_(&a.f_mm(b)?)?,
        };
        return Ok(());
    };
    let mut product = Tensor::f_empty(sum.size(), (Kind::Float, sum.device()))?;
    if !multiply_into(&product, a, b, false)? {
        product = a.f_mm(b)?.f_to_kind(Kind::Float)?;
    }
    let _ = sum.f_add_(&product.f_mul_(scale)?)?;
    Ok(())
}
