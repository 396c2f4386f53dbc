//! Access to a model's trainable weights.

use tch::Tensor;

/// A model whose weights can be trained.
pub trait Parameters {
    /// The trainable weights, sorted by name.
    ///
    /// The tensors alias the live weights ([`Tensor::shallow_clone`]): what an optimiser writes
    /// into them is what the next forward pass uses. Each weight appears once; a weight that is
    /// tied to another goes under one name. Names are stable from run to run, because optimiser
    /// states and checkpoints are keyed by them.
    fn named_parameters(&self) -> Vec<(String, Tensor)>;
}

impl<P: Parameters + ?Sized> Parameters for &P {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        (**self).named_parameters()
    }
}

impl<P: Parameters + ?Sized> Parameters for Box<P> {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        (**self).named_parameters()
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
