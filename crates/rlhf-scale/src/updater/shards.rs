//! Gradients of parameters that lie on several ranks.

use std::collections::BTreeMap;

use rlhf_core::{ParameterShards, PipelineStage, Reduction};
use tch::{Device, Kind, Tensor};

use crate::gradients::{self, Norm};
use crate::{Error, Result};

/// What a rank says of its gradients when the norm of all is not finite, the gravest last.
const FINE: f64 = 0.0;
const NOT_FINITE: f64 = 1.0;

/// The norm of all ranks' gradients as one vector, a f32 scalar: the squares of a parameter that
/// several ranks have are divided among them, and one number is all-reduced.
pub(super) fn grad_norm<'a>(
    shards: &ParameterShards,
    device: Device,
    grads: impl Iterator<Item = (&'a str, &'a Tensor)>,
) -> Result<Tensor> {
    let mut by_copies: BTreeMap<usize, Vec<&Tensor>> = BTreeMap::new();
    for (name, grad) in grads {
        let copies = shards.copies(name).max(1);
        by_copies.entry(copies).or_default().push(grad);
    }
    // Sums of squares in f64: they are exact where f32's would depend on how they are split.
    let mut total = Tensor::f_zeros([1], (Kind::Double, device))?;
    for (copies, grads) in by_copies {
        let norm = gradients::grad_norm(&grads, Norm::L2)?.f_to_kind(Kind::Double)?;
        let share = norm.f_square()?.f_div_scalar(copies as f64)?;
        total = total.f_add(&share)?;
    }
    shards.all_reduce(&total, Reduction::Sum)?;
    Ok(total.f_sqrt()?.f_to_kind(Kind::Float)?.f_reshape([])?)
}

/// Adds the other stage's gradient to that of every weight that two stages have. Both get the same
/// bits: of two numbers the sum does not depend on their order.
pub(super) fn sum_tied(
    stage: &PipelineStage,
    params: &[(String, Tensor)],
    grads: &mut [Option<Tensor>],
) -> Result<()> {
    for (name, other) in &stage.tied {
        let position = params.iter().position(|(param, _)| param == name);
        let Some(grad) = position.and_then(|position| grads[position].as_mut()) else {
            continue;
        };
        let own = grad.f_contiguous()?;
        stage.group.send(&own, *other)?;
        let theirs = own.f_empty_like()?;
        stage.group.receive(&theirs, *other)?;
        *grad = own.f_add(&theirs)?;
    }
    Ok(())
}

/// The losses of the last stage, in all.
pub(super) fn share_losses(stage: &PipelineStage, losses: &[Tensor]) -> Result<Vec<Tensor>> {
    let own = Tensor::f_stack(losses, 0)?;
    let losses = match stage.has_loss() {
        true => own,
        false => own.f_zeros_like()?,
    };
    stage.group.all_reduce(&losses, Reduction::Sum)?;
    Ok(losses.f_unbind(0)?)
}

/// One opinion of all ranks: where the gradient of one is not finite, the others' are no less at fault.
pub(super) fn blame(
    shards: &ParameterShards,
    device: Device,
    own: Error,
    loss: f64,
) -> Result<Error> {
    let said = match own {
        Error::NonFiniteGradient { .. } => NOT_FINITE,
        _ => FINE,
    };
    let verdict = Tensor::from_slice(&[said]).f_to_device(device)?;
    shards.all_reduce(&verdict, Reduction::Max)?;
    let worst = f64::try_from(verdict.f_reshape([])?)?;
    Ok(match own {
        Error::NormOverflow { .. } if worst == NOT_FINITE => Error::NonFiniteGradient {
            parameter: "a parameter of another rank".into(),
            loss,
        },
        own => own,
    })
}
