//! Ranks that compute one thing together, as the models and the update path see them.

use tch::Tensor;

use crate::Result;

/// A group of ranks that exchange tensors: processes of a c10d group, usually.
///
/// A model whose weights are split over ranks, and the update path that clips its gradients, ask no
/// more of a group than this. All ranks make the same calls in the same order; a group's calls may
/// come from any thread, one at a time.
pub trait Collective: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Puts the sum, or the largest, of all ranks' elements in the place of each; every rank gets the
    /// same bits.
    ///
    /// # Errors
    /// A rank that is gone or late; a tensor that is not contiguous.
    fn all_reduce(&self, tensor: &Tensor, reduction: Reduction) -> Result<()>;

    /// The tensors of all ranks, which have one shape and kind, in the order of the ranks.
    ///
    /// # Errors
    /// A rank that is gone or late.
    fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>>;

    /// Puts the elements of the rank `from` in the place of those of every other, which have the
    /// same shape and kind.
    ///
    /// # Errors
    /// A rank that is gone or late; a tensor that is not contiguous.
    fn broadcast(&self, tensor: &Tensor, from: usize) -> Result<()>;

    /// Sends a tensor to a rank. It may return before the tensor is there, and does not wait for
    /// the other to ask: two ranks may send to each other before either receives.
    ///
    /// # Errors
    /// A rank that is gone or late.
    fn send(&self, tensor: &Tensor, to: usize) -> Result<()>;

    /// Fills a contiguous tensor with the next one that a rank sends.
    ///
    /// # Errors
    /// A rank that is gone or late; a tensor of another size.
    fn receive(&self, tensor: &Tensor, from: usize) -> Result<()>;
}

/// What becomes of the elements of several ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}
