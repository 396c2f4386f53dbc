//! Collectives in the autograd graph: where activations pass from what every rank has to what a rank
//! has alone, and back (Shoeybi et al. 2019, "Megatron-LM", arXiv 1909.08053, section 3).
//!
//! With `n` ranks a ring moves `2 (n - 1) / n` of a tensor's bytes out of each rank for a sum, and
//! `n - 1` times a rank's part for a gathering.

use std::sync::Arc;

use rlhf_core::{Collective, Reduction};
use tch::Tensor;

use crate::ffi::autograd::grad_enabled;
use crate::{Error, Result, custom_function};

/// What all ranks have, on the way into what each computes with a part of the weights: the tensor
/// itself, whose gradient is the sum of the ranks' gradients. `f` of Megatron-LM.
///
/// A weight that every rank has, but that each uses for a part of what there is to compute, goes
/// through this too: its gradient is then the whole one, and the same on all ranks.
///
/// # Errors
/// Those of the group, in backward.
pub fn enter_parallel(x: &Tensor, group: &Arc<dyn Collective>) -> Result<Tensor> {
    if group.size() == 1 || !grad_enabled() || !x.requires_grad() {
        return Ok(x.shallow_clone());
    }
    let group = Arc::clone(group);
    let mut outputs = custom_function(&[x], |inputs| {
        let output = inputs[0].shallow_clone();
        let backward = move |grads: &[Option<Tensor>], _: &[bool]| -> Result<_> {
            let Some(Some(grad)) = grads.first() else {
                return Ok(vec![None]);
            };
            // A copy: the gradient may be an expanded one, or another node's too.
            let mut sum = Tensor::f_empty(grad.size(), (grad.kind(), grad.device()))?;
            sum.f_copy_(grad)?;
            group.all_reduce(&sum, Reduction::Sum)?;
            Ok(vec![Some(sum)])
        };
        Ok::<_, Error>((vec![output], backward))
    })?;
    Ok(outputs.remove(0))
}

/// The sum of what each rank has computed with its part of the weights, which all ranks have then;
/// the gradient goes back as it is. `g` of Megatron-LM.
///
/// The sum takes the memory of `partial`, which nothing else may need.
///
/// # Errors
/// Those of the group.
pub fn leave_parallel(partial: Tensor, group: &Arc<dyn Collective>) -> Result<Tensor> {
    if group.size() == 1 {
        return Ok(partial);
    }
    let mut outputs = custom_function(&[&partial], |inputs| {
        let sum = inputs[0].f_contiguous()?;
        group.all_reduce(&sum, Reduction::Sum)?;
        let backward = |grads: &[Option<Tensor>], _: &[bool]| -> Result<_> {
            Ok(vec![grads.first().and_then(share)])
        };
        Ok::<_, Error>((vec![sum], backward))
    })?;
    Ok(outputs.remove(0))
}

/// The columns of all ranks side by side: those from `first` on of `columns` are this rank's. The
/// gradient of its columns goes back to them.
///
/// Ranks may have different numbers of columns, at most `widest`.
///
/// # Shapes
/// `[M, own]` to `[M, columns]`.
///
/// # Errors
/// Those of the group.
pub fn gather_columns(
    own: &Tensor,
    (first, columns): (i64, i64),
    widest: i64,
    group: &Arc<dyn Collective>,
) -> Result<Tensor> {
    if group.size() == 1 {
        return Ok(own.shallow_clone());
    }
    let width = own.size()[1];
    let mut outputs = custom_function(&[own], |inputs| {
        let rows = inputs[0].size()[0];
        let padded = match width == widest {
            true => inputs[0].f_contiguous()?,
            false => inputs[0]
                .f_constant_pad_nd([0, widest - width].as_slice())?
                .f_contiguous()?,
        };
        let parts = group.all_gather(&padded)?;
        let whole = Tensor::f_cat(&parts, 1)?;
        debug_assert_eq!(whole.size()[0], rows);
        let whole = whole.f_narrow(1, 0, columns)?;
        let backward = move |grads: &[Option<Tensor>], _: &[bool]| -> Result<_> {
            Ok(vec![match grads.first() {
                Some(Some(grad)) => Some(grad.f_narrow(1, first, width)?),
                _ => None,
            }])
        };
        Ok::<_, Error>((vec![whole], backward))
    })?;
    Ok(outputs.remove(0))
}

fn share(grad: &Option<Tensor>) -> Option<Tensor> {
    grad.as_ref().map(Tensor::shallow_clone)
}

/// The part of a vocabulary that this rank's output layer has: tokens from `first` on, as many as
/// its weight has rows.
#[derive(Clone)]
pub struct VocabularyShard {
    /// The first token.
    pub first: i64,
    /// Most tokens that a rank has.
    pub widest: i64,
    /// Tokens of all ranks.
    pub vocabulary: i64,
    /// The ranks that have the vocabulary together.
    pub group: Arc<dyn Collective>,
}

impl std::fmt::Debug for VocabularyShard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VocabularyShard")
            .field("first", &self.first)
            .field("vocabulary", &self.vocabulary)
            .field("rank", &self.group.rank())
            .field("size", &self.group.size())
            .finish()
    }
}
