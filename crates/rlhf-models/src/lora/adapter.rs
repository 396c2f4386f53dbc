//! What is added to a frozen linear layer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rlhf_core::Result;
use rlhf_scale::{enter_parallel, grad_enabled, kernels};
use tch::{Kind, Tensor};

use crate::layers::{Layout, linear};
use crate::tensor_parallel::{Part, Shard};

/// `s · B A`, the low-rank part of a linear layer.
pub(crate) struct Adapter {
    /// `[r, in]`
    pub(super) a: Tensor,
    /// `[out, r]`
    pub(super) b: Tensor,
    pub(super) scaling: f64,
    pub(super) dropout: Arc<Dropout>,
    /// Where other ranks have parts of the layer too: a part of `B` with the layer's outputs, or of
    /// `A` with its inputs.
    pub(super) shard: Option<Shard>,
}

/// Dropout of the adapters' inputs: one switch for all adapters of a model, which the copies of
/// its blocks that backward owns see too.
pub(super) struct Dropout {
    pub(super) probability: f64,
    active: AtomicBool,
}

impl Dropout {
    pub(super) fn new(probability: f64) -> Self {
        Self {
            probability,
            active: AtomicBool::new(true),
        }
    }

    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
    }
}

impl Adapter {
    /// The same adapter under another handle.
    pub(crate) fn share(&self) -> Self {
        Self {
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
            scaling: self.scaling,
            dropout: Arc::clone(&self.dropout),
            shard: self.shard.clone(),
        }
    }

    /// `output + s · B A x`, written into `output`, which nothing else may need.
    ///
    /// The factors are rounded to the kind of `x`, as under autocast: with a 16-bit base the
    /// products run in 16 bits, and the factors and their gradients' sums are f32.
    ///
    /// # Shapes
    /// `output`: `[N, out]`; `x`: `[N, in]`.
    pub(crate) fn add_to(&self, mut output: Tensor, x: &Tensor) -> Result<Tensor> {
        let (a, b) = self.factors()?;
        let (a, b) = (a.f_to_kind(x.kind())?, b.f_to_kind(x.kind())?);
        let dropped = match self.drops() {
            true => Some(self.dropped(x)?),
            false => None,
        };
        let x = dropped.as_ref().unwrap_or(x);
        // Where bf16 is slow for libtorch, its products, and the kernels that they keep, cost more than a sum.
        if x.kind() == Kind::BFloat16 && kernels::multiplies(Kind::BFloat16) {
            // Scaled where it is smallest.
            let narrow = linear(x, &a, None)?.f_mul_scalar(self.scaling)?;
            return Ok(output.f_add_(&linear(&narrow, &b, None)?)?);
        }
        let narrow = x
            .f_linear(&a, None::<&Tensor>)?
            .f_mul_scalar_(self.scaling)?;
        Ok(output.f_addmm_(&narrow, &b.f_transpose(0, 1)?)?)
    }

    /// The factors as they are multiplied. One that all ranks have is used by each for its part of the
    /// layer, and its gradient is the sum of theirs.
    fn factors(&self) -> Result<(Tensor, Tensor)> {
        let own = |factor: &Tensor| factor.shallow_clone();
        let Some(Shard { part, group }) = &self.shard else {
            return Ok((own(&self.a), own(&self.b)));
        };
        let enter = |factor| enter_parallel(factor, group).map_err(rlhf_core::Error::from);
        Ok(match part {
            Part::Outputs => (enter(&self.a)?, own(&self.b)),
            Part::SomeOf { first, count } => {
                let b = enter(&self.b)?.f_narrow(0, *first, *count)?;
                (enter(&self.a)?, b)
            }
            Part::Inputs { .. } => (own(&self.a), enter(&self.b)?),
        })
    }

    /// The input with dropout. Some of the inputs lose what they would lose among all.
    fn dropped(&self, x: &Tensor) -> Result<Tensor> {
        let p = self.dropout.probability;
        let Some(Shard {
            part: Part::Inputs { first, all },
            ..
        }) = self.shard
        else {
            return Ok(x.f_dropout(p, true)?);
        };
        let size = x.size();
        let kept = Tensor::f_ones([size[0], all], (x.kind(), x.device()))?.f_dropout(p, true)?;
        Ok(x.f_mul(&kept.f_narrow(1, first, size[1])?)?)
    }

    /// What is random is random in training alone: rollouts and evaluations record no gradients.
    fn drops(&self) -> bool {
        self.dropout.probability > 0.0
            && self.dropout.is_active()
            && self.a.requires_grad()
            && grad_enabled()
    }

    /// `weight + s · B A`, in the wider kind of the two.
    pub(super) fn merged(&self, weight: &Tensor, layout: Layout) -> Result<Tensor> {
        let kind = match (weight.kind(), self.a.kind()) {
            (Kind::Double, _) | (_, Kind::Double) => Kind::Double,
            _ => Kind::Float,
        };
        let product = self.b.f_to_kind(kind)?.f_matmul(&self.a.f_to_kind(kind)?)?;
        let product = match layout {
            Layout::OutIn => product,
            Layout::InOut => product.f_transpose(0, 1)?,
        };
        let scaled = product.f_mul_scalar(self.scaling)?;
        Ok(weight.f_to_kind(kind)?.f_add(&scaled)?)
    }
}
