//! Activations that go from stage to stage, and gradients that come back (Huang et al. 2019, "GPipe",
//! arXiv 1811.06965; one forward, one backward: Narayanan et al. 2021, arXiv 2104.04473).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rlhf_core::Collective;
use tch::{Device, Kind, Tensor};

use crate::ffi::autograd::grad_enabled;
use crate::{Error, Result, custom_function};

/// The stages of a model before and after this one, as nodes of the autograd graph.
///
/// A pass through the model is [`receive`](Self::receive), the stage's own blocks, and
/// [`send`](Self::send). What `send` returns stands in for the loss that the last stage computes: its
/// backward waits for the gradient from the next stage, and that of what was received sends the gradient
/// on. [`Updater`](crate::Updater) calls both in the order one forward, one backward.
///
/// A pass has a number, which goes with its tensors: stages that do not make the same passes in the same
/// order end in [`Error::PipelineOrder`]. Models on the same stages share a link, so that this holds
/// across them.
pub struct StageLink {
    group: Arc<dyn Collective>,
    passes: AtomicU64,
}

impl std::fmt::Debug for StageLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageLink")
            .field("stage", &self.group.rank())
            .field("stages", &self.group.size())
            .finish_non_exhaustive()
    }
}

impl StageLink {
    /// A rank of the stages, which are in the order of their ranks.
    pub fn new(group: Arc<dyn Collective>) -> Self {
        Self {
            group,
            passes: AtomicU64::new(0),
        }
    }

    /// Whether no stage comes before this one.
    pub fn is_first(&self) -> bool {
        self.group.rank() == 0
    }

    /// Whether no stage comes after this one.
    pub fn is_last(&self) -> bool {
        self.group.rank() + 1 == self.group.size()
    }

    /// Whether what the last stage makes now is wanted in all: where no gradient is recorded, and so
    /// no stage has a part in a backward.
    pub fn shares_results(&self) -> bool {
        !grad_enabled()
    }

    /// Puts the last stage's elements in the place of the others', which have the same shape and kind.
    ///
    /// # Errors
    /// Those of the group.
    pub fn share(&self, result: &Tensor) -> Result<()> {
        Ok(self.group.broadcast(result, self.group.size() - 1)?)
    }

    /// Begins a pass; its number.
    pub fn begin(&self) -> u64 {
        self.passes.fetch_add(1, Ordering::Relaxed)
    }

    /// What the stage before this one sends in a pass. It gets the gradient back, if it wants one.
    ///
    /// # Errors
    /// Those of the group; [`Error::PipelineOrder`].
    pub fn receive(
        &self,
        pass: u64,
        shape: &[i64],
        (kind, device): (Kind, Device),
    ) -> Result<Tensor> {
        let previous = self.group.rank().saturating_sub(1);
        let wanted = receive_header(&*self.group, pass, previous, device)?;
        let x = Tensor::f_empty(shape, (kind, device))?;
        self.group.receive(&x, previous)?;
        if !wanted || !grad_enabled() {
            return Ok(x);
        }
        let group = Arc::clone(&self.group);
        // A leaf to hang the graph on.
        let anchor = Tensor::f_zeros([1], (kind, device))?.f_set_requires_grad(true)?;
        let mut outputs = custom_function(&[&anchor], |_| {
            let backward = move |grads: &[Option<Tensor>], _: &[bool]| -> Result<_> {
                let Some(Some(grad)) = grads.first() else {
                    return Err(Error::PipelineOrder { pass, found: None });
                };
                send_header(&*group, pass, false, previous, grad.device())?;
                group.send(&grad.f_contiguous()?, previous)?;
                Ok(vec![None])
            };
            Ok::<_, Error>((vec![x], backward))
        })?;
        Ok(outputs.remove(0))
    }

    /// Sends what this stage has made in a pass to the next. Returns 0, a f32 scalar, that depends on
    /// `x` as the last stage's loss does: whatever gradient comes to it, `x` gets the one that the next
    /// stage sends.
    ///
    /// # Errors
    /// Those of the group; in backward [`Error::PipelineOrder`].
    pub fn send(&self, pass: u64, x: &Tensor) -> Result<Tensor> {
        let next = self.group.rank() + 1;
        let wanted = grad_enabled() && x.requires_grad();
        let group = Arc::clone(&self.group);
        let mut outputs = custom_function(&[x], |inputs| {
            let x = inputs[0].f_contiguous()?;
            send_header(&*group, pass, wanted, next, x.device())?;
            group.send(&x, next)?;
            let stand_in = Tensor::f_zeros([] as [i64; 0], (Kind::Float, x.device()))?;
            let (shape, place) = (x.size(), (x.kind(), x.device()));
            let backward = move |_: &[Option<Tensor>], _: &[bool]| -> Result<_> {
                receive_header(&*group, pass, next, place.1)?;
                let grad = Tensor::f_empty(shape.as_slice(), place)?;
                group.receive(&grad, next)?;
                Ok(vec![Some(grad)])
            };
            Ok::<_, Error>((vec![stand_in], backward))
        })?;
        Ok(outputs.remove(0))
    }
}

/// The number of a pass, and whether a gradient is to come back.
fn send_header(
    group: &dyn Collective,
    pass: u64,
    wanted: bool,
    to: usize,
    device: Device,
) -> Result<()> {
    let header = Tensor::from_slice(&[pass as i64, i64::from(wanted)]);
    Ok(group.send(&header.f_to_device(device)?, to)?)
}

fn receive_header(group: &dyn Collective, pass: u64, from: usize, device: Device) -> Result<bool> {
    let header = Tensor::f_zeros([2], (Kind::Int64, device))?;
    group.receive(&header, from)?;
    let header = Vec::<i64>::try_from(&header)?;
    let found = header[0] as u64;
    match found == pass {
        true => Ok(header[1] == 1),
        false => Err(Error::PipelineOrder {
            pass,
            found: Some(found),
        }),
    }
}
