//! Gradients: set, cleared, propagated, measured and clipped.

use tch::{Kind, Tensor};

use crate::{Error, Result, ffi};

/// Which norm of a gradient is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Norm {
    /// The Euclidean norm.
    #[default]
    L2,
    /// The largest absolute value.
    Max,
}

/// Removes the gradients of `params`, so that the next backward starts afresh.
///
/// # Errors
/// Only if libtorch fails.
pub fn clear_grads(params: &[Tensor]) -> Result<()> {
    ffi::clear_grads(&params.iter().collect::<Vec<_>>())
}

/// Makes `grad` the gradient of `param`; `None` removes it. No copy is made: both share storage.
///
/// # Errors
/// [`Error::GradMismatch`] unless shape, kind and device are the parameter's.
pub fn set_grad(param: &Tensor, grad: Option<&Tensor>) -> Result<()> {
    if let Some(grad) = grad {
        check_grad(param, grad)?;
    }
    ffi::set_grad(param, grad)
}

/// Backpropagates `grad_outputs`, the gradients of some scalar with respect to `outputs`, and adds
/// the result to the gradients of the leaves.
///
/// # Errors
/// [`Error::GradOutputCount`] and [`Error::GradMismatch`] if the two lists do not correspond, and
/// libtorch's error if backward fails.
pub fn backward(outputs: &[Tensor], grad_outputs: &[Tensor]) -> Result<()> {
    if outputs.len() != grad_outputs.len() {
        return Err(Error::GradOutputCount {
            outputs: outputs.len(),
            grad_outputs: grad_outputs.len(),
        });
    }
    for (output, grad) in outputs.iter().zip(grad_outputs) {
        check_grad(output, grad)?;
    }
    ffi::backward(outputs, grad_outputs)
}

/// Scales the gradients of `params` so that their Euclidean norm, taken together, is at most
/// `max_norm`. Returns the norm before clipping, computed in f32.
///
/// Parameters without a gradient are skipped; without any gradient the norm is 0. See
/// [`clip_grad_norm_of`].
///
/// # Errors
/// Only if libtorch fails.
pub fn clip_grad_norm(params: &[Tensor], max_norm: f64) -> Result<f64> {
    clip_grad_norm_of(params, max_norm, Norm::L2)
}

/// [`clip_grad_norm`] for a norm of choice.
///
/// As in PyTorch the gradients are multiplied by `min(1, max_norm / (norm + 1e-6))`. A norm that is
/// not finite is returned and nothing is scaled: the caller decides.
///
/// # Errors
/// Only if libtorch fails.
pub fn clip_grad_norm_of(params: &[Tensor], max_norm: f64, norm: Norm) -> Result<f64> {
    let grads = params.iter().map(grad_of).collect::<Result<Vec<_>>>()?;
    let grads: Vec<&Tensor> = grads.iter().flatten().collect();
    if grads.is_empty() {
        return Ok(0.0);
    }
    let total = f64::try_from(grad_norm(&grads, norm)?)?;
    let factor = clip_factor(total, max_norm);
    if factor < 1.0 {
        ffi::scale_all(&grads, factor)?;
    }
    Ok(total)
}

/// The gradient of `param`, if it has one; it aliases the stored one.
pub(crate) fn grad_of(param: &Tensor) -> Result<Option<Tensor>> {
    let grad = param.f_grad()?;
    Ok(grad.defined().then_some(grad))
}

/// The norm of all `grads` as one vector: a f32 scalar that is still on the device.
pub(crate) fn grad_norm(grads: &[&Tensor], norm: Norm) -> Result<Tensor> {
    let order = match norm {
        Norm::L2 => 2.0,
        Norm::Max => f64::INFINITY,
    };
    Ok(ffi::norm(grads, order)?.f_to_kind(Kind::Float)?)
}

/// What gradients whose norm is `total` are multiplied by for a norm of at most `max_norm`.
pub(crate) fn clip_factor(total: f64, max_norm: f64) -> f64 {
    match total.is_finite() {
        true => (max_norm / (total + 1e-6)).min(1.0),
        false => 1.0,
    }
}

fn check_grad(tensor: &Tensor, grad: &Tensor) -> Result<()> {
    let same = tensor.size() == grad.size()
        && tensor.kind() == grad.kind()
        && tensor.device() == grad.device();
    if same {
        return Ok(());
    }
    Err(Error::GradMismatch {
        shape: tensor.size(),
        kind: tensor.kind(),
        device: tensor.device(),
        grad_shape: grad.size(),
        grad_kind: grad.kind(),
        grad_device: grad.device(),
    })
}
