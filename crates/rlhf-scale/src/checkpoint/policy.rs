//! Which blocks of a deep model are recomputed.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::Checkpoint;
use crate::ffi::autograd::grad_enabled;
use crate::{Error, Result};

/// Which activations of a stack of `L` blocks are kept for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointPolicy {
    /// All of them; nothing is computed twice.
    #[default]
    None,
    /// The input of every block: `L` inputs and one block's activations at a time, for one more
    /// forward pass.
    EveryBlock,
    /// The input of every k-th block: `L / k` inputs and the activations of `k` blocks at a time,
    /// for one more forward pass. `k = √L` is the least for this form.
    EveryKth(usize),
    /// The input of every `⌈√L⌉`-th block, and within the run that backward is in those of its
    /// blocks: `2√L` inputs and one block's activations at a time, for two more forward passes.
    SquareRoot,
}

/// Gradient checkpointing of a stack of blocks: the one switch that every model has.
///
/// ```
/// use rlhf_scale::{CheckpointPolicy, GradientCheckpointing};
///
/// let every_block = GradientCheckpointing::from(CheckpointPolicy::EveryBlock);
/// let text = r#"{"policy": {"every_kth": 4}, "offload": true}"#;
/// let from_file: GradientCheckpointing = serde_json::from_str(text).unwrap();
/// assert_eq!(from_file.policy, CheckpointPolicy::EveryKth(4));
/// assert!(from_file.offload && !every_block.offload);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GradientCheckpointing {
    /// Which activations are kept.
    pub policy: CheckpointPolicy,
    /// Whether those that are kept wait in host memory: see [`Checkpoint::offload`].
    pub offload: bool,
}

impl From<CheckpointPolicy> for GradientCheckpointing {
    fn from(policy: CheckpointPolicy) -> Self {
        Self {
            policy,
            offload: false,
        }
    }
}

impl GradientCheckpointing {
    /// Fails for runs of no blocks.
    ///
    /// # Errors
    /// Names the field.
    pub fn validate(&self) -> Result<()> {
        match self.policy {
            CheckpointPolicy::EveryKth(0) => Err(CoreError::config(
                "gradient_checkpointing.policy.every_kth",
                0,
                "a run has at least one block; use the policy \"none\" to keep everything",
            )
            .into()),
            _ => Ok(()),
        }
    }

    /// `blocks[L-1](…blocks[1](blocks[0](input)))`, keeping what the policy says.
    ///
    /// A block owns handles ([`Tensor::shallow_clone`]) of its weights, since backward calls it
    /// again after this function is done. Random generators are restored, so blocks may have
    /// dropout. The recomputation of a run stops early, which blocks that use `f_` methods and `?`
    /// do not notice: see [`Checkpoint::stop_early`].
    ///
    /// # Errors
    /// As [`checkpoint`](super::checkpoint), and those of [`validate`](Self::validate).
    ///
    /// ```
    /// use rlhf_scale::{CheckpointPolicy, Error, GradientCheckpointing};
    /// use tch::{Device, Kind, Tensor};
    ///
    /// # fn main() -> Result<(), Error> {
    /// let options = (Kind::Float, Device::Cpu);
    /// let weights: Vec<Tensor> = (0..9)
    ///     .map(|_| (Tensor::randn([16, 16], options) * 0.1).set_requires_grad(true))
    ///     .collect();
    /// let blocks = weights
    ///     .iter()
    ///     .map(|weight| {
    ///         let weight = weight.shallow_clone();
    ///         move |x: &Tensor| -> Result<Tensor, Error> { Ok(x.f_add(&x.f_matmul(&weight)?.f_tanh()?)?) }
    ///     })
    ///     .collect();
    /// let checkpointing = GradientCheckpointing::from(CheckpointPolicy::SquareRoot);
    /// let output = checkpointing.run(blocks, &Tensor::ones([4, 16], options))?;
    /// output.sum(Kind::Float).backward();
    /// assert!(weights.iter().all(|weight| weight.grad().defined()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn run<B, E>(&self, blocks: Vec<B>, input: &Tensor) -> Result<Tensor, E>
    where
        B: Fn(&Tensor) -> Result<Tensor, E> + Send + 'static,
        E: From<Error> + Display + 'static,
    {
        self.validate()?;
        let (run_length, nested) = match self.policy {
            _ if !grad_enabled() => return through(&blocks, input),
            CheckpointPolicy::None => return through(&blocks, input),
            CheckpointPolicy::EveryBlock => (1, false),
            CheckpointPolicy::EveryKth(k) => (k, false),
            CheckpointPolicy::SquareRoot => ((blocks.len() as f64).sqrt().ceil() as usize, true),
        };
        let options = Checkpoint {
            offload: self.offload,
            stop_early: true,
            ..Checkpoint::default()
        };
        let mut x = input.shallow_clone();
        let mut blocks = blocks.into_iter().peekable();
        while blocks.peek().is_some() {
            let run: Vec<B> = blocks.by_ref().take(run_length.max(1)).collect();
            x = match nested {
                false => checkpointed(options, &x, move |x| through(&run, x))?,
                true => {
                    // Several checkpoints come to own a block, one each time the run is computed.
                    let run: Vec<_> = run.into_iter().map(|b| Arc::new(Mutex::new(b))).collect();
                    checkpointed(options, &x, move |x| each_checkpointed(options, &run, x))?
                }
            };
        }
        Ok(x)
    }
}

fn through<B, E>(blocks: &[B], input: &Tensor) -> Result<Tensor, E>
where
    B: Fn(&Tensor) -> Result<Tensor, E>,
{
    let mut x = input.shallow_clone();
    for block in blocks {
        x = block(&x)?;
    }
    Ok(x)
}

fn each_checkpointed<B, E>(
    options: Checkpoint,
    blocks: &[Arc<Mutex<B>>],
    input: &Tensor,
) -> Result<Tensor, E>
where
    B: Fn(&Tensor) -> Result<Tensor, E> + Send + 'static,
    E: From<Error> + Display + 'static,
{
    let mut x = input.shallow_clone();
    for block in blocks {
        let block = Arc::clone(block);
        x = checkpointed(options, &x, move |x| {
            // A block that panicked has changed nothing: it is called by shared reference.
            let block = block.lock().unwrap_or_else(PoisonError::into_inner);
            block(x)
        })?;
    }
    Ok(x)
}

/// A checkpoint of one tensor in and one out.
fn checkpointed<F, E>(options: Checkpoint, input: &Tensor, f: F) -> Result<Tensor, E>
where
    F: Fn(&Tensor) -> Result<Tensor, E> + Send + 'static,
    E: From<Error> + Display,
{
    let mut outputs = options.run(&[input], move |inputs| Ok::<_, E>(vec![f(&inputs[0])?]))?;
    Ok(outputs.remove(0))
}
