//! Processes arranged for several kinds of parallelism at once.

use super::ProcessGroup;
use crate::{Error, Result};

/// How many processes there are along each direction; their product is the size of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshShape {
    /// Copies of the model, each of which sees other data.
    pub data: usize,
    /// Stages that a model's layers are cut into.
    pub pipeline: usize,
    /// Parts that every layer is cut into.
    pub tensor: usize,
}

/// A process's place in a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coordinates {
    /// Which copy of the model.
    pub data: usize,
    /// Which stage.
    pub pipeline: usize,
    /// Which part of the layers.
    pub tensor: usize,
}

impl MeshShape {
    /// Number of processes.
    pub fn size(self) -> usize {
        self.data * self.pipeline * self.tensor
    }

    /// The place of a rank. Neighbours are parts of the same layers, which talk most and so should
    /// share a machine; next come copies of the same stage; stages are furthest apart, as in
    /// Megatron-LM: `rank = tensor + T · (data + D · pipeline)`.
    ///
    /// ```
    /// use rlhf_scale::distributed::{Coordinates, MeshShape};
    /// let shape = MeshShape { data: 2, pipeline: 2, tensor: 2 };
    /// assert_eq!(shape.place(5), Coordinates { data: 0, pipeline: 1, tensor: 1 });
    /// assert_eq!(shape.rank(shape.place(5)), 5);
    /// ```
    pub fn place(self, rank: usize) -> Coordinates {
        Coordinates {
            tensor: rank % self.tensor,
            data: rank / self.tensor % self.data,
            pipeline: rank / self.tensor / self.data,
        }
    }

    /// The rank at a place: the inverse of [`place`](Self::place).
    pub fn rank(self, place: Coordinates) -> usize {
        place.tensor + self.tensor * (place.data + self.data * place.pipeline)
    }
}

/// The groups that a process belongs to in a mesh.
#[derive(Debug, Clone)]
pub struct Mesh {
    shape: MeshShape,
    place: Coordinates,
    world: ProcessGroup,
    data: ProcessGroup,
    pipeline: ProcessGroup,
    tensor: ProcessGroup,
    model: ProcessGroup,
}

impl Mesh {
    /// Cuts `world` into groups. All of its members call it.
    ///
    /// # Errors
    /// [`Error::InvalidOperation`] unless the shape's size is the group's; those of
    /// [`ProcessGroup::subgroup`].
    pub fn new(world: &ProcessGroup, shape: MeshShape) -> Result<Self> {
        if shape.size() != world.size() {
            return Err(Error::InvalidOperation {
                operation: "mesh",
                reason: format!(
                    "{shape:?} is for {} ranks, not {}",
                    shape.size(),
                    world.size()
                ),
            });
        }
        let place = shape.place(world.rank());
        let along = |keep: fn(Coordinates, Coordinates) -> bool| {
            let members: Vec<usize> = (0..shape.size())
                .filter(|rank| keep(shape.place(*rank), place))
                .collect();
            world.subgroup(&members)
        };
        Ok(Self {
            shape,
            place,
            world: world.clone(),
            data: along(|a, b| (a.pipeline, a.tensor) == (b.pipeline, b.tensor))?,
            pipeline: along(|a, b| (a.data, a.tensor) == (b.data, b.tensor))?,
            tensor: along(|a, b| (a.data, a.pipeline) == (b.data, b.pipeline))?,
            model: along(|a, b| a.data == b.data)?,
        })
    }

    /// The shape.
    pub fn shape(&self) -> MeshShape {
        self.shape
    }

    /// This process's place.
    pub fn place(&self) -> Coordinates {
        self.place
    }

    /// All processes.
    pub fn world(&self) -> &ProcessGroup {
        &self.world
    }

    /// Those with the same weights, and other data.
    pub fn data(&self) -> &ProcessGroup {
        &self.data
    }

    /// The stages of this copy, in order.
    pub fn pipeline(&self) -> &ProcessGroup {
        &self.pipeline
    }

    /// The parts of this stage's layers.
    pub fn tensor(&self) -> &ProcessGroup {
        &self.tensor
    }

    /// All processes of this copy of the model: its stages and their parts.
    pub fn model(&self) -> &ProcessGroup {
        &self.model
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_a_place_of_its_own() {
        let shape = MeshShape {
            data: 3,
            pipeline: 2,
            tensor: 4,
        };
        for rank in 0..shape.size() {
            assert_eq!(shape.rank(shape.place(rank)), rank);
        }
        let near = [0, 1].map(|rank| shape.place(rank));
        assert_eq!(
            (near[0].data, near[0].pipeline),
            (near[1].data, near[1].pipeline)
        );
    }

    #[test]
    fn a_shape_of_another_size_is_refused() {
        let shape = MeshShape {
            data: 2,
            pipeline: 1,
            tensor: 1,
        };
        assert!(Mesh::new(&ProcessGroup::alone(), shape).is_err());
        let alone = MeshShape { data: 1, ..shape };
        assert!(Mesh::new(&ProcessGroup::alone(), alone).is_ok());
    }
}
