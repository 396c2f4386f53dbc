//! Parts of a tensor, and the tensor of its parts.

use tch::{Device, Tensor};

use crate::{Collective, Result};

/// How a tensor is cut into the parts of the ranks.
///
/// A dimension consists of `blocks` of equal size; each rank has its share of every block. Where ranks do
/// not divide a block, the last ones have less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The dimension, from 0.
    pub dim: i64,
    /// What it consists of: query, key and value side by side are 3.
    pub blocks: i64,
}

impl Cut {
    /// Rows.
    pub fn vocabulary() -> Self {
        Self { dim: 0, blocks: 1 }
    }

    /// First element and number of them of a rank's share of each block.
    fn share(self, size: i64, rank: usize, ranks: usize) -> (i64, i64) {
        let block = size / self.blocks;
        let share = (block + ranks as i64 - 1) / ranks as i64;
        let first = (rank as i64 * share).min(block);
        (first, share.min(block - first))
    }

    /// Elements of the cut dimension that a rank has, of `size`.
    pub fn len(self, size: i64, rank: usize, ranks: usize) -> i64 {
        self.blocks * self.share(size, rank, ranks).1
    }

    /// The shape of a rank's part.
    pub fn shape(self, whole: &[i64], rank: usize, ranks: usize) -> Vec<i64> {
        let mut shape = whole.to_vec();
        if let Some(size) = shape.get_mut(self.dim as usize) {
            *size = self.len(*size, rank, ranks);
        }
        shape
    }

    /// A copy of a rank's part in memory of its own; the rest of `whole` is not read.
    ///
    /// # Errors
    /// libtorch's (out of memory).
    pub fn take(self, whole: &Tensor, rank: usize, ranks: usize) -> Result<Tensor> {
        let shape = self.shape(&whole.size(), rank, ranks);
        let part = Tensor::f_empty(shape.as_slice(), (whole.kind(), whole.device()))?;
        for (in_whole, in_part) in self.pieces(whole, &part, rank, ranks)? {
            { in_part }.f_copy_(&in_whole)?;
        }
        Ok(part)
    }

    /// Puts a rank's part into its places; the two may be on different devices.
    ///
    /// # Errors
    /// libtorch's.
    pub fn put(self, whole: &Tensor, part: &Tensor, rank: usize, ranks: usize) -> Result<()> {
        for (in_whole, in_part) in self.pieces(whole, part, rank, ranks)? {
            { in_whole }.f_copy_(&in_part)?;
        }
        Ok(())
    }

    /// The whole, on the CPU of the first rank, of which each rank of the group has a part; `size` is
    /// that of the cut dimension. Every rank calls it, in the same order; the others get `None`.
    ///
    /// # Errors
    /// Those of the group; libtorch's.
    pub fn gather(
        self,
        part: &Tensor,
        size: i64,
        group: &dyn Collective,
    ) -> Result<Option<Tensor>> {
        let ranks = group.size();
        let part = part.f_detach()?.f_contiguous()?;
        if group.rank() > 0 {
            group.send(&part, 0)?;
            return Ok(None);
        }
        let mut shape = part.size();
        let dim = self.dim as usize;
        shape[dim] = size;
        let whole = Tensor::f_empty(shape.as_slice(), (part.kind(), Device::Cpu))?;
        self.put(&whole, &part, 0, ranks)?;
        for rank in 1..ranks {
            shape[dim] = self.len(size, rank, ranks);
            let other = Tensor::f_empty(shape.as_slice(), (part.kind(), part.device()))?;
            group.receive(&other, rank)?;
            self.put(&whole, &other, rank, ranks)?;
        }
        Ok(Some(whole))
    }

    /// Views of the same elements in the whole and in a rank's part.
    fn pieces(
        self,
        whole: &Tensor,
        part: &Tensor,
        rank: usize,
        ranks: usize,
    ) -> Result<Vec<(Tensor, Tensor)>> {
        let size = whole.size()[self.dim as usize];
        let (first, count) = self.share(size, rank, ranks);
        (0..self.blocks)
            .map(|block| {
                let start = block * (size / self.blocks) + first;
                Ok((
                    whole.f_narrow(self.dim, start, count)?,
                    part.f_narrow(self.dim, block * count, count)?,
                ))
            })
            .collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tch::Kind;

    fn numbers(shape: [i64; 2]) -> Tensor {
        Tensor::arange(shape[0] * shape[1], (Kind::Float, Device::Cpu)).view(shape)
    }

    #[test]
    fn parts_make_the_whole_again() {
        for (shape, cut, ranks) in [
            ([12, 4], Cut { dim: 0, blocks: 1 }, 4),
            ([12, 4], Cut { dim: 0, blocks: 3 }, 2),
            ([4, 12], Cut { dim: 1, blocks: 3 }, 4),
            ([4, 6], Cut { dim: 1, blocks: 1 }, 2),
            // The last rank has less.
            ([11, 2], Cut::vocabulary(), 4),
            ([10, 2], Cut::vocabulary(), 3),
        ] {
            let whole = numbers(shape);
            let again = whole.full_like(-1.0);
            for rank in 0..ranks {
                let part = cut.take(&whole, rank, ranks).unwrap();
                assert_eq!(part.size(), cut.shape(&shape, rank, ranks));
                cut.put(&again, &part, rank, ranks).unwrap();
            }
            assert!(again.equal(&whole), "{cut:?} {ranks}");
        }
    }

    #[test]
    fn a_rank_has_its_share_of_every_block() {
        let cut = Cut { dim: 0, blocks: 3 };
        let part = cut.take(&numbers([12, 1]), 1, 2).unwrap();
        let values = Vec::<f32>::try_from(part.view(-1)).unwrap();
        assert_eq!(values, [2.0, 3.0, 6.0, 7.0, 10.0, 11.0]);
    }
}
