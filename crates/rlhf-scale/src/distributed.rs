//! Training on several processes, on libtorch's own c10d: Gloo between CPUs, NCCL between GPUs.
//!
//! A program becomes one of many by its environment, which torchrun, SLURM or Kubernetes set as
//! for any PyTorch job, and [`ProcessGroup::from_env`] reads. [`Spawn`] starts such processes on
//! one machine. A rank written in Python may be in the same group
//! (`torch.distributed.init_process_group("gloo")`).
//!
//! [`Mesh`] cuts the processes into groups for data, tensor and pipeline parallelism.
//!
//! # When something goes wrong
//! Every operation ends: in a result, or within its time limit
//! ([`GroupOptions::limit`]) and the few seconds that it takes to find out who is missing, in an
//! error that names ranks. Each process shows a sign of life at the rendezvous twice a second; who
//! shows none for three seconds while others wait for it is *gone* ([`Error::RanksLost`]), whether
//! it was killed, stopped, or has lost its network. After such an error no group of the run can be
//! used ([`Error::GroupBroken`]): end the program, and start it again from its last checkpoint,
//! on fewer ranks if need be.
//!
//! [`Error::RanksLost`]: crate::Error::RanksLost
//! [`Error::GroupBroken`]: crate::Error::GroupBroken

mod collective;
pub mod cost;
mod group;
pub(crate) mod layout;
mod liveness;
mod mesh;
mod pending;
pub(crate) mod reduction;
mod rendezvous;
mod shards;
mod spawn;
mod traffic;
mod world;

pub use group::{ProcessGroup, ReduceOp};
pub use mesh::{Coordinates, Mesh, MeshShape};
pub use pending::{Pending, PendingShard};
pub use reduction::{BucketTrace, OverlapTrace};
pub use rendezvous::{Backend, GroupOptions, Rendezvous, StoreHost};
pub use spawn::{ProcessEnd, Running, Spawn, SpawnReport};
pub use traffic::{Operation, OperationTraffic, Traffic};
pub use world::{DataParallel, Sharding, World};
