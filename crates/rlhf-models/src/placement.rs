//! Where the parts of a model are: its layers split over ranks, its blocks spread over stages.

use std::sync::Arc;

use rlhf_core::{Cuts, ParameterShards, Reduction, gather_parts, gather_stages};
use tch::{Device, Tensor};

use crate::pipeline_parallel::Stage;
use crate::{Error, PipelineParallel, Result, TensorParallel};

/// Where a model's parts are: on one rank alone by default.
///
/// A rank of a mesh has a part of the layers of a stage: ranks that share a stage are in one tensor
/// group, and those with the same part of their stages' layers in one pipeline group.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    /// The ranks that each layer is split over.
    pub tensor: Option<TensorParallel>,
    /// The stages that the blocks are spread over.
    pub pipeline: Option<PipelineParallel>,
}

impl From<&TensorParallel> for Placement {
    fn from(ranks: &TensorParallel) -> Self {
        Self {
            tensor: Some(ranks.clone()),
            pipeline: None,
        }
    }
}

impl From<&PipelineParallel> for Placement {
    fn from(stages: &PipelineParallel) -> Self {
        Self {
            tensor: None,
            pipeline: Some(stages.clone()),
        }
    }
}

impl From<&Placement> for Placement {
    fn from(placement: &Placement) -> Self {
        placement.clone()
    }
}

impl Placement {
    /// Whether a rank other than this has any part of the model.
    pub(crate) fn is_split(&self) -> bool {
        self.tensor.is_some() || self.pipeline.is_some()
    }

    /// The whole weights on the first rank of the first stage, by name; `None` elsewhere. Every rank
    /// calls it.
    pub(crate) fn gather_all(
        &self,
        parts: Vec<(String, Tensor)>,
        cuts: &Cuts,
        device: Device,
    ) -> Result<Option<Vec<(String, Tensor)>>> {
        let of_stage = match &self.tensor {
            None => Some(parts),
            Some(ranks) => {
                let cut = |name: &str, _: &Tensor| cuts.get(name).copied();
                gather_parts(ranks.group().as_ref(), parts, cut)?
            }
        };
        Ok(match (of_stage, &self.pipeline) {
            (Some(weights), Some(stages)) => gather_stages(stages.group.as_ref(), weights, device)?,
            (weights, _) => weights,
        })
    }

    /// Waits for all ranks. Where the one that writes failed the others fail, too.
    pub(crate) fn agree(&self, written: Result<()>, device: Device) -> Result<()> {
        let failed = if written.is_err() { 1.0f32 } else { 0.0 };
        let flag = Tensor::from_slice(&[failed]).f_to_device(device)?;
        let tensor = self.tensor.as_ref().map(TensorParallel::group);
        let pipeline = self.pipeline.as_ref().map(|stages| &stages.group);
        for group in tensor.into_iter().chain(pipeline) {
            group.all_reduce(&flag, Reduction::Max)?;
        }
        written?;
        match f64::try_from(flag.f_reshape([] as [i64; 0])?)? > 0.0 {
            true => Err(Error::NotWritten),
            false => Ok(()),
        }
    }

    /// Where the trainable weights are, of which these are cut.
    pub(crate) fn shards(
        &self,
        cuts: Cuts,
        (stage, device): (Option<&Stage>, Device),
    ) -> Option<ParameterShards> {
        let stage = stage.map(|stage| stage.described(device));
        match (&self.tensor, stage) {
            (None, None) => None,
            (Some(ranks), None) => Some(ParameterShards::new(Arc::clone(ranks.group()), cuts)),
            (None, Some(stage)) => Some(ParameterShards::of_stage(stage)),
            (Some(ranks), Some(stage)) => {
                let shards = ParameterShards::new(Arc::clone(ranks.group()), cuts);
                Some(shards.in_stage(stage))
            }
        }
    }
}
