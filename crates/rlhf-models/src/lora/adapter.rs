//! What is added to a frozen linear layer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rlhf_core::Result;
use rlhf_scale::grad_enabled;
use tch::{Kind, Tensor};

use crate::layers::Layout;

/// `s · B A`, the low-rank part of a linear layer.
pub(crate) struct Adapter {
    /// `[r, in]`
    pub(super) a: Tensor,
    /// `[out, r]`
    pub(super) b: Tensor,
    pub(super) scaling: f64,
    pub(super) dropout: Arc<Dropout>,
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
        let (a, b) = (self.a.f_to_kind(x.kind())?, self.b.f_to_kind(x.kind())?);
        let mut narrow = match self.drops() {
            true => x
                .f_dropout(self.dropout.probability, true)?
                .f_linear(&a, None::<&Tensor>)?,
            false => x.f_linear(&a, None::<&Tensor>)?,
        };
        // Scaled where it is smallest.
        let narrow = narrow.f_mul_scalar_(self.scaling)?;
        Ok(output.f_addmm_(&narrow, &b.f_transpose(0, 1)?)?)
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
