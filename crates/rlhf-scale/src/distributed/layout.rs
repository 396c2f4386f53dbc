//! Parameters in flat buckets, and the part of each that a rank answers for.

use tch::{Kind, Tensor};

use crate::Result;

/// Buckets of neighbouring parameters of one kind. Each is a row of numbers that is cut into as
/// many equal parts as there are ranks, the last one filled up with zeros.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) buckets: Vec<Bucket>,
    /// What this rank answers for, in the order of the parameters.
    pub(crate) pieces: Vec<Piece>,
}

#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    pub(crate) members: Vec<Member>,
    /// Of the parameters.
    pub(crate) kind: Kind,
    /// Numbers of a rank's part.
    pub(crate) part: i64,
}

/// Where a parameter lies in its bucket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member {
    pub(crate) param: usize,
    pub(crate) start: i64,
    pub(crate) length: i64,
}

/// A stretch of a parameter, in the order of its storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) param: usize,
    /// Where it begins in the parameter.
    pub(crate) from: i64,
    pub(crate) length: i64,
    pub(crate) bucket: usize,
    /// Where it begins in the rank's part of the bucket.
    pub(crate) at: i64,
}

impl Layout {
    /// Of parameters with these numbers of elements and kinds, in buckets of about `bucket_bytes`
    /// of what is stepped.
    pub(crate) fn new(
        params: &[(i64, Kind)],
        rank: usize,
        size: usize,
        bucket_bytes: usize,
    ) -> Self {
        let mut buckets: Vec<Bucket> = Vec::new();
        let mut lengths: Vec<i64> = Vec::new();
        for (param, &(length, kind)) in params.iter().enumerate() {
            let most = (bucket_bytes / stepped_kind(kind).elt_size_in_bytes()) as i64;
            let fits = match (buckets.last(), lengths.last()) {
                (Some(bucket), Some(used)) => bucket.kind == kind && used + length <= most,
                _ => false,
            };
            if !fits {
                let (members, part) = (Vec::new(), 0);
                buckets.push(Bucket {
                    members,
                    kind,
                    part,
                });
                lengths.push(0);
            }
            if let (Some(bucket), Some(used)) = (buckets.last_mut(), lengths.last_mut()) {
                let start = *used;
                bucket.members.push(Member {
                    param,
                    start,
                    length,
                });
                *used += length;
            }
        }
        let size = size as i64;
        for (bucket, length) in buckets.iter_mut().zip(&lengths) {
            bucket.part = (length + size - 1) / size;
        }
        let pieces = pieces(&buckets, rank as i64);
        Self { buckets, pieces }
    }

    /// The pieces of a bucket.
    pub(crate) fn pieces_of(&self, bucket: usize) -> impl Iterator<Item = (usize, &Piece)> {
        let pieces = self.pieces.iter().enumerate();
        pieces.filter(move |(_, piece)| piece.bucket == bucket)
    }
}

/// The kind that a parameter is stepped in, and its gradients are summed in.
pub(crate) fn stepped_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        kind => kind,
    }
}

fn pieces(buckets: &[Bucket], rank: i64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (index, bucket) in buckets.iter().enumerate() {
        let own = rank * bucket.part..(rank + 1) * bucket.part;
        for member in &bucket.members {
            let start = own.start.max(member.start);
            let end = own.end.min(member.start + member.length);
            if start < end {
                pieces.push(Piece {
                    param: member.param,
                    from: start - member.start,
                    length: end - start,
                    bucket: index,
                    at: start - own.start,
                });
            }
        }
    }
    pieces
}

/// The numbers of `tensor` in the order in which those of `like`, a dense tensor of the same
/// shape, lie in memory: `[elements]`. A view where it can be one.
pub(crate) fn flat(tensor: &Tensor, like: &Tensor) -> Result<Tensor> {
    let tensor = tensor.f_detach()?;
    let count = tensor.numel() as i64;
    if tensor.stride() == like.stride() {
        return Ok(tensor.f_as_strided([count], [1], None)?);
    }
    let place = (tensor.kind(), tensor.device());
    let mut laid_out = Tensor::f_empty_strided(like.size(), like.stride(), place)?;
    laid_out.f_copy_(&tensor)?;
    Ok(laid_out.f_as_strided([count], [1], None)?)
}

/// The inverse of [`flat`]: a view of `row` as a tensor like `like`.
pub(crate) fn shaped(row: &Tensor, like: &Tensor) -> Result<Tensor> {
    Ok(row.f_as_strided(like.size(), like.stride(), None)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_ranks_pieces_cover_every_number_once() {
        let params = [
            (10, Kind::Float),
            (0, Kind::Float),
            (7, Kind::Float),
            (3, Kind::Double),
            (50, Kind::Float),
            (1, Kind::Float),
        ];
        for size in [1, 2, 3, 4, 7] {
            let mut seen: Vec<Vec<u32>> =
                params.iter().map(|(n, _)| vec![0; *n as usize]).collect();
            for rank in 0..size {
                let layout = Layout::new(&params, rank, size, 80);
                assert_eq!(layout.buckets.len(), 4, "{layout:?}");
                for piece in &layout.pieces {
                    let bucket = &layout.buckets[piece.bucket];
                    assert!(piece.at + piece.length <= bucket.part);
                    for place in piece.from..piece.from + piece.length {
                        seen[piece.param][place as usize] += 1;
                    }
                }
            }
            assert!(seen.iter().flatten().all(|times| *times == 1), "{size}");
        }
    }

    #[test]
    fn rows_follow_the_memory_of_the_parameter() {
        let weight = Tensor::arange(6, (Kind::Float, tch::Device::Cpu))
            .view([2, 3])
            .tr();
        let grad = weight.contiguous(); // other strides, the same numbers
        let row = flat(&grad, &weight).unwrap();
        assert_eq!(
            Vec::<f32>::try_from(&row).unwrap(),
            [0., 1., 2., 3., 4., 5.]
        );
        let back = shaped(&row.narrow(0, 0, 6), &weight).unwrap();
        assert!(back.equal(&weight));
    }
}
