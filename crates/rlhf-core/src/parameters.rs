//! Access to a model's trainable weights.

use tch::Tensor;

use crate::ParameterShards;

/// A model whose weights can be trained.
pub trait Parameters {
    /// The trainable weights, sorted by name.
    ///
    /// The tensors alias the live weights ([`Tensor::shallow_clone`]): what an optimiser writes
    /// into them is what the next forward pass uses. Each weight appears once; a weight that is
    /// tied to another goes under one name. Names are stable from run to run, because optimiser
    /// states and checkpoints are keyed by them.
    fn named_parameters(&self) -> Vec<(String, Tensor)>;

    /// How the weights lie on several ranks, where a rank has only a part of the model. The gradient
    /// norm of an update then counts what the other ranks have.
    fn parameter_shards(&self) -> Option<ParameterShards> {
        None
    }
}

impl<P: Parameters + ?Sized> Parameters for &P {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        (**self).named_parameters()
    }

    fn parameter_shards(&self) -> Option<ParameterShards> {
        (**self).parameter_shards()
    }
}

impl<P: Parameters + ?Sized> Parameters for Box<P> {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        (**self).named_parameters()
    }

    fn parameter_shards(&self) -> Option<ParameterShards> {
        (**self).parameter_shards()
    }
}

/// Several parts trained together: names are prefixed by the part's own, `policy.…`, `value.…`.
///
/// A weight that two parts share (a value head on the policy's trunk) is listed once, under the
/// first part that names it.
pub fn joined_parameters(parts: &[(&str, &dyn Parameters)]) -> Vec<(String, Tensor)> {
    let mut seen = std::collections::HashSet::new();
    let mut joined: Vec<_> = parts
        .iter()
        .flat_map(|(prefix, part)| {
            part.named_parameters()
                .into_iter()
                .map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
        })
        .filter(|(_, tensor)| seen.insert(tensor.data_ptr() as usize))
        .collect();
    joined.sort_by(|a, b| a.0.cmp(&b.0));
    joined
}

/// The [`ParameterShards`] of [`joined_parameters`], of parts that lie on the same ranks; a part that
/// is not split is on all of them.
pub fn joined_shards(parts: &[(&str, &dyn Parameters)]) -> Option<ParameterShards> {
    let (mut split, mut whole) = (Vec::new(), Vec::new());
    for (prefix, part) in parts {
        match part.parameter_shards() {
            Some(shards) => split.push(shards.prefixed(prefix)),
            None => {
                let names = part.named_parameters().into_iter();
                whole.extend(names.map(|(name, _)| format!("{prefix}.{name}")));
            }
        }
    }
    let joined = split.into_iter().reduce(ParameterShards::and)?;
    Some(joined.with_whole(whole))
}
