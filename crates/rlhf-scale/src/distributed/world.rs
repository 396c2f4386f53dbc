//! The run that this process takes part in.

use std::sync::{Arc, PoisonError, RwLock};

use rlhf_core::{Error as CoreError, Exchange, Replicas};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{GroupOptions, Mesh, ProcessGroup};
use crate::Result;

/// What each process of a data-parallel run keeps a part of, rather than a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharding {
    /// Nothing: gradients are summed everywhere while backward goes on, and every process steps
    /// all weights.
    #[default]
    Nothing,
    /// The moments of the optimiser, and the f32 masters of 16-bit weights ("ZeRO-1": Rajbhandari
    /// et al. 2020, arXiv 1910.02054). Gradients are summed everywhere, each process steps its part
    /// of the weights, and hands it to the others.
    Optimizer,
    /// The summed gradients as well ("ZeRO-2"): each process gets the sums of its part only. A
    /// process's own gradients are freed bucket by bucket as they are summed, after backward.
    Gradients,
}

/// How processes train together.
#[derive(Debug, Clone, PartialEq)]
pub struct DataParallel {
    /// How they talk.
    pub group: GroupOptions,
    /// What is kept in parts.
    pub sharding: Sharding,
    /// Gradients that travel together, in bytes.
    pub bucket_bytes: usize,
}

impl Default for DataParallel {
    /// Nothing sharded, buckets of the 25 MB of `DistributedDataParallel`.
    fn default() -> Self {
        Self {
            group: GroupOptions::default(),
            sharding: Sharding::Nothing,
            bucket_bytes: 25 << 20,
        }
    }
}

impl DataParallel {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the field and the values that are allowed.
    pub fn validate(&self) -> Result<()> {
        self.group.validate()?;
        match self.bucket_bytes {
            0..1024 => {
                let reason = "is below 1024 bytes";
                Err(CoreError::config("bucket_bytes", self.bucket_bytes, reason).into())
            }
            _ => Ok(()),
        }
    }
}

/// Makes every trainer of this process one of several that train together, for as long as it lives.
///
/// It is all that a program needs to become one of many: the trainers that are made while there is
/// a world split their batches over its processes, sum their gradients, spread their rollouts,
/// agree on their statistics, write their checkpoints once, and tell the observers of the first
/// process alone. Everything else is the same program: the same data, `batch_size` (that of all
/// processes together), seeds and steps everywhere. See [`Replicas`] for how work is dealt out.
///
/// Started without a launcher it is a world of one process, where nothing changes.
///
/// ```
/// use rlhf_scale::distributed::{DataParallel, World};
///
/// # fn main() -> Result<(), rlhf_scale::Error> {
/// let world = World::join(&DataParallel::default())?;
/// if world.is_first() {
///     println!("training on {} processes", world.group().size());
/// }
/// // … load data and models, make trainers, train …
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "the processes train together for as long as this lives"]
pub struct World {
    /// Those with other data.
    group: ProcessGroup,
    /// Whether this is the first of all.
    first: bool,
}

/// What updaters need to know of the world.
#[derive(Debug, Clone)]
pub(crate) struct Membership {
    pub(crate) group: ProcessGroup,
    pub(crate) options: DataParallel,
    pub(crate) replicas: Replicas,
}

static CURRENT: RwLock<Option<Membership>> = RwLock::new(None);

impl World {
    /// Joins the processes that a launcher started: see
    /// [`Rendezvous::from_env`](super::Rendezvous::from_env).
    ///
    /// # Errors
    /// Invalid options; those of [`ProcessGroup::from_env`].
    pub fn join(options: &DataParallel) -> Result<Self> {
        options.validate()?;
        let group = ProcessGroup::from_env(&options.group)?;
        Self::of(group, options)
    }

    /// A world of the members of `group`. It takes the place of one that there was.
    ///
    /// # Errors
    /// Invalid options.
    pub fn of(group: ProcessGroup, options: &DataParallel) -> Result<Self> {
        let first = group.rank() == 0;
        let replicas = Replicas::of(Arc::new(Gathering(group.clone())));
        Self::make(group, first, replicas, options)
    }

    /// The world of a mesh, whose models lie on several processes each: data is dealt out along the
    /// [data](Mesh::data) direction, and the first of all processes writes files, and tells
    /// observers. It takes the place of one that there was.
    ///
    /// # Errors
    /// Invalid options.
    pub fn on(mesh: &Mesh, options: &DataParallel) -> Result<Self> {
        let (group, run) = (mesh.data().clone(), mesh.world());
        let replicas = Replicas::of(Arc::new(Gathering(group.clone())));
        let replicas = replicas.in_run(Arc::new(Gathering(run.clone())));
        Self::make(group, run.rank() == 0, replicas, options)
    }

    fn make(
        group: ProcessGroup,
        first: bool,
        replicas: Replicas,
        options: &DataParallel,
    ) -> Result<Self> {
        options.validate()?;
        replicas.make_current();
        let membership = (group.size() > 1).then(|| Membership {
            group: group.clone(),
            options: options.clone(),
            replicas,
        });
        *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = membership;
        Ok(Self { group, first })
    }

    /// The processes that data is dealt out to.
    pub fn group(&self) -> &ProcessGroup {
        &self.group
    }

    /// Whether this is the process that prints.
    pub fn is_first(&self) -> bool {
        self.first
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let mut current = CURRENT.write().unwrap_or_else(PoisonError::into_inner);
        // Another world may have taken the place of this one.
        if current.as_ref().is_none_or(|c| c.group.is(&self.group)) {
            *current = None;
            Replicas::alone().make_current();
        }
    }
}

impl Membership {
    /// That of this process, if it is not alone.
    pub(crate) fn current() -> Option<Self> {
        CURRENT
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Messages of any length over all-gathers of equal ones.
struct Gathering(ProcessGroup);

impl Exchange for Gathering {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn all_gather(&self, own: &[u8]) -> rlhf_core::Result<Vec<Vec<u8>>> {
        Ok(gather_messages(&self.0, own)?)
    }
}

fn gather_messages(group: &ProcessGroup, own: &[u8]) -> Result<Vec<Vec<u8>>> {
    let length = Tensor::from(own.len() as i64).f_to_device(group.device())?;
    let lengths = group.all_gather(&length)?;
    let lengths = Vec::<i64>::try_from(lengths.f_to_device(tch::Device::Cpu)?)?;
    let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
    if longest == 0 {
        return Ok(vec![Vec::new(); lengths.len()]);
    }
    let mut padded = own.to_vec();
    padded.resize(longest, 0);
    let padded = Tensor::f_from_data_size(&padded, &[longest as i64], Kind::Uint8)?;
    let all = group.all_gather(&padded.f_to_device(group.device())?)?;
    let all = Vec::<u8>::try_from(all.f_to_device(tch::Device::Cpu)?.f_view(-1)?)?;
    let rows = all.chunks_exact(longest).zip(lengths);
    Ok(rows
        .map(|(row, length)| row[..length as usize].to_vec())
        .collect())
}
