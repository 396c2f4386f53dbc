//! Gradient checkpointing: activations that are computed again instead of kept.

use std::fmt::Display;

use tch::Tensor;

use crate::ffi::autograd::{CheckpointFrame, Closure, StoppingFrame, grad_enabled};
use crate::{Error, Result};

mod policy;

pub use policy::{CheckpointPolicy, GradientCheckpointing};

/// How [`Checkpoint::run`] keeps what it must.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Moves the inputs to host memory until backward, where they come back. It is a copy each way
    /// that the device waits for, and nothing at all for tensors that are on the CPU.
    pub offload: bool,
    /// Restores the state of libtorch's random generators for the recomputation, so that dropout
    /// drops the same elements. The generators are those of the CPU and of the inputs' devices.
    pub preserve_rng: bool,
    /// Ends the recomputation when it has the last tensor that backward needs, which saves the
    /// operations after it: in a transformer block the last matrix product, a third of its forward
    /// pass. The graph of forward stays, without its tensors, so this costs some hundred bytes an
    /// operation.
    ///
    /// The closure is left through an error of the libtorch operation that it is in. One that hands
    /// such errors on (`f_` methods and `?`) does not notice; in one that does not, tch panics,
    /// which is caught, but the panic hook reports it, and a program built with `panic = "abort"`
    /// ends. What the closure does after that operation is not done again and not compared. A
    /// closure that runs backward itself needs `false`.
    ///
    /// Where libtorch's engine has been replaced, as Python does, this has no effect.
    pub stop_early: bool,
}

impl Default for Checkpoint {
    /// On the device, with the generators restored, as `torch.utils.checkpoint`; to the end, so that
    /// closures of any form may be used.
    fn default() -> Self {
        Self {
            offload: false,
            preserve_rng: true,
            stop_early: false,
        }
    }
}

/// Computes `f(inputs)` and keeps the inputs alone; backward computes it again (Chen et al. 2016,
/// "Training Deep Nets with Sublinear Memory Cost").
///
/// The gradients are those of `f(inputs)` called plainly, those of every tensor that `f` captures
/// included, which need not be listed. Calls may be nested. Under `no_grad`, and where nothing
/// requires gradients, this is `f(inputs)`.
///
/// `f` must do the same each time, on the thread that calls it, with the tensors it has captured.
/// Gradient mode and autocast are as they were. Where `f` draws random numbers by other means than
/// libtorch's generators, it must draw the same ones again.
///
/// For options see [`Checkpoint::run`].
///
/// # Errors
/// What `f` returns. In backward: what `f` returns then, a panic of `f`, another graph than in
/// forward, inputs or captured parameters that were changed in place in between, and a second
/// backward; the error has its text, and the process and the graph stay usable.
///
/// ```
/// use rlhf_scale::{Error, checkpoint};
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Error> {
/// let weight = Tensor::randn([8, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let x = Tensor::randn([4, 8], (Kind::Float, Device::Cpu));
///
/// let captured = weight.shallow_clone();
/// let outputs = checkpoint(&[&x], move |inputs| -> Result<_, Error> {
///     Ok(vec![inputs[0].f_matmul(&captured)?.f_gelu("none")?.f_dropout(0.1, true)?])
/// })?;
/// outputs[0].sum(Kind::Float).backward();
/// assert_eq!(weight.grad().size(), [8, 8]);
/// # Ok(())
/// # }
/// ```
pub fn checkpoint<F, E>(inputs: &[&Tensor], f: F) -> Result<Vec<Tensor>, E>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>, E> + Send + 'static,
    E: From<Error> + Display,
{
    Checkpoint::default().run(inputs, f)
}

impl Checkpoint {
    /// [`checkpoint`] with options.
    ///
    /// # Errors
    /// As [`checkpoint`].
    pub fn run<F, E>(self, inputs: &[&Tensor], f: F) -> Result<Vec<Tensor>, E>
    where
        F: Fn(&[Tensor]) -> Result<Vec<Tensor>, E> + Send + 'static,
        E: From<Error> + Display,
    {
        if !grad_enabled() {
            let inputs: Vec<Tensor> = inputs.iter().map(|input| input.shallow_clone()).collect();
            return f(&inputs);
        }
        if self.stop_early
            && let Some(frame) = StoppingFrame::begin(inputs, self.preserve_rng, self.offload)?
        {
            let own: Vec<Tensor> = inputs.iter().map(|input| input.shallow_clone()).collect();
            let outputs = f(&own)?;
            frame.finish(&outputs, recomputation(f))?;
            return Ok(outputs);
        }
        let frame = CheckpointFrame::begin(inputs, self.preserve_rng)?;
        let outputs = f(frame.leaves())?;
        if outputs.iter().all(|output| !output.requires_grad()) {
            return Ok(outputs);
        }
        frame.finish(inputs, &outputs, self.offload, recomputation(f))?;
        Ok(outputs)
    }
}

/// `f` as the graph calls it.
fn recomputation<F, E>(f: F) -> Box<Closure>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>, E> + Send + 'static,
    E: Display,
{
    Box::new(move |leaves, _| {
        let leaves: Vec<Tensor> = leaves.iter().flatten().map(Tensor::shallow_clone).collect();
        match f(&leaves) {
            Ok(outputs) => Ok(outputs.into_iter().map(Some).collect()),
            Err(error) => Err(error.to_string()),
        }
    })
}
