//! The state of a model that lies on several ranks, and its files, which know nothing of that.

use std::path::Path;

use rlhf_core::{ParameterShards, Reduction};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result, io};

/// The weight that a tensor of the state belongs to, by the tensor's name.
pub(super) type WeightOf = fn(&str) -> &str;

/// The weight itself.
pub(super) fn itself(name: &str) -> &str {
    name
}

/// What follows the first dot: `exp_avg.NAME`.
pub(super) fn after_dot(name: &str) -> &str {
    name.split_once('.').map_or(name, |(_, weight)| weight)
}

/// Whole tensors, where they are to be written; `None` on the other ranks, which call this too.
pub(super) fn gathered(
    shards: Option<&ParameterShards>,
    state: Vec<(String, Tensor)>,
    weight_of: WeightOf,
) -> Result<Option<Vec<(String, Tensor)>>> {
    match shards {
        None => Ok(Some(state)),
        Some(shards) => Ok(shards.gather(state, weight_of)?),
    }
}

/// A file's tensors in the order of `targets`, or of what is whole in the file, this rank's parts.
pub(super) fn read(
    shards: Option<&ParameterShards>,
    path: &Path,
    targets: &[(String, Tensor)],
    weight_of: WeightOf,
) -> Result<Vec<Tensor>> {
    let Some(shards) = shards else {
        return io::read_matching(path, targets);
    };
    let expected = targets
        .iter()
        .map(|(name, part)| {
            // Takes no memory.
            let one = Tensor::f_zeros([1], (part.kind(), Device::Cpu))?;
            let one = one.f_reshape(vec![1; part.dim()])?;
            let whole = one.f_expand(shards.whole_shape(weight_of(name), part), false)?;
            Ok((name.clone(), whole))
        })
        .collect::<Result<Vec<_>>>()?;
    // Other stages' are in the file, too.
    let others = shards.stage().is_some();
    io::read_each(path, &expected, others, |name, whole| {
        Ok(shards.part_of(weight_of(name), whole)?)
    })
}

/// Lets all ranks that have the model together go on, or none: fails everywhere if `own` is an error
/// somewhere.
pub(super) fn agree<T>(
    shards: Option<&ParameterShards>,
    device: Device,
    own: Result<T>,
) -> Result<T> {
    let Some(shards) = shards else { return own };
    let failed = f32::from(u8::from(own.is_err()));
    let failures = Tensor::f_full([1], f64::from(failed), (Kind::Float, device))?;
    let heard = shards.all_reduce(&failures, Reduction::Sum);
    let own = own?;
    heard?;
    let failures = f64::try_from(failures.f_reshape([])?)?;
    match failures > 0.0 {
        true => Err(Error::ModelRankFailed),
        false => Ok(own),
    }
}
