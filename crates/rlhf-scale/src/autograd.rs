//! Functions with a backward of their own.

use std::fmt::Display;

use tch::Tensor;

use crate::{Error, Result, ffi};

/// Runs `forward` without recording it, and gives its outputs the backward that it returns: what
/// `torch.autograd.Function` is in Python.
///
/// `forward` gets the inputs and returns the outputs with a closure for backward. That closure owns
/// what it needs, gets the gradients of the outputs (`None` where nothing depends on an output) and
/// whether each input's gradient is wanted, and returns one gradient or `None` for each input. It
/// runs at most once, on the thread that libtorch runs backward on, without recording. Tensors of
/// integers or booleans among the outputs have no gradient.
///
/// Tensors that the closure needs are best kept in a [`Saved`], which notices if they are changed in
/// between. An output that backward needs must be kept as a [`Tensor::detach`] of it.
///
/// Without an input that requires gradients, or under `no_grad`, the outputs are plain.
///
/// # Errors
/// What `forward` returns. An error of the backward closure, and a panic in it, end the backward
/// that called it with an `Err` that has their text; the process and the graph stay usable. There
/// is no second derivative: asking for one is such an error.
///
/// ```
/// use rlhf_scale::{Error, Saved, custom_function};
/// use tch::{Kind, Tensor};
///
/// /// ReLU in the forward pass, the gradient of the identity in the backward pass.
/// fn straight_through(x: &Tensor) -> Result<Tensor, Error> {
///     let mut outputs = custom_function(&[x], |inputs| {
///         let output = inputs[0].f_relu()?;
///         let backward = |grads: &[Option<Tensor>], _: &[bool]| -> Result<_, Error> {
///             Ok(vec![grads[0].as_ref().map(Tensor::shallow_clone)])
///         };
///         Ok((vec![output], backward))
///     })?;
///     Ok(outputs.remove(0))
/// }
///
/// # fn main() -> Result<(), Error> {
/// let x = Tensor::from_slice(&[-1.0f32, 2.0]).set_requires_grad(true);
/// let y = straight_through(&x)?;
/// assert_eq!(Vec::<f32>::try_from(&y)?, [0.0, 2.0]);
/// y.sum(Kind::Float).backward();
/// assert_eq!(Vec::<f32>::try_from(x.grad())?, [1.0, 1.0]);
/// # Ok(())
/// # }
/// ```
pub fn custom_function<F, B, E>(inputs: &[&Tensor], forward: F) -> Result<Vec<Tensor>, E>
where
    F: FnOnce(&[Tensor]) -> Result<(Vec<Tensor>, B), E>,
    B: Fn(&[Option<Tensor>], &[bool]) -> Result<Vec<Option<Tensor>>, E> + Send + 'static,
    E: From<Error> + Display,
{
    let detached = inputs
        .iter()
        .map(|input| input.f_detach().map_err(Error::from))
        .collect::<Result<Vec<_>>>()?;
    let (outputs, backward) = {
        let _guard = tch::no_grad_guard();
        forward(&detached)?
    };
    if !ffi::autograd::grad_enabled() || inputs.iter().all(|input| !input.requires_grad()) {
        return Ok(outputs);
    }
    let backward = Box::new(move |grads: &[Option<Tensor>], needed: &[bool]| {
        backward(grads, needed).map_err(|error| error.to_string())
    });
    ffi::autograd::attach_backward(inputs, &outputs, backward)?;
    Ok(outputs)
}

/// A tensor that a backward closure keeps, and that must not change until then.
///
/// It aliases the tensor, without its history. An in-place change of the tensor or of any view of
/// it, an optimiser step for one, makes [`Saved::get`] fail, where the gradient would otherwise be
/// silently wrong.
#[derive(Debug)]
pub struct Saved {
    alias: Tensor,
    version: u32,
}

impl Saved {
    /// Keeps `tensor`.
    ///
    /// # Errors
    /// Only if libtorch fails.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let alias = tensor.f_detach()?;
        Ok(Self {
            version: ffi::autograd::version(&alias)?,
            alias,
        })
    }

    /// The tensor.
    ///
    /// # Errors
    /// [`Error::SavedTensorChanged`] if it is not what it was.
    pub fn get(&self) -> Result<&Tensor> {
        let version = ffi::autograd::version(&self.alias)?;
        if version != self.version {
            return Err(Error::SavedTensorChanged {
                shape: self.alias.size(),
                changes: version - self.version,
            });
        }
        Ok(&self.alias)
    }
}
