//! What implicit rewards say about a policy.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use rlhf_core::check_same_shape;

use crate::Result;

/// How far apart the implicit rewards of both sides are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RewardMetrics {
    /// Share of pairs whose chosen reward is strictly above the rejected one.
    pub accuracy: f64,
    /// Mean of chosen minus rejected reward.
    pub margin: f64,
    /// Mean reward of the chosen responses.
    pub chosen: f64,
    /// Mean reward of the rejected responses.
    pub rejected: f64,
}

/// Accuracy and means of the implicit rewards `β (log π − log π_ref)` of some pairs.
///
/// # Shapes
/// Both `[B]` f32, `B` at least 1.
///
/// # Errors
/// A shape mismatch.
pub fn reward_metrics(chosen: &Tensor, rejected: &Tensor) -> Result<RewardMetrics> {
    check_same_shape(("chosen", chosen), ("rejected", rejected))?;
    let above = chosen.gt_tensor(rejected).to_kind(Kind::Float);
    let [accuracy, chosen, rejected] = means([&above, chosen, rejected])?;
    Ok(RewardMetrics {
        accuracy,
        margin: chosen - rejected,
        chosen,
        rejected,
    })
}

/// Means of `[B]` tensors, in one transfer.
pub(crate) fn means<const N: usize>(tensors: [&Tensor; N]) -> rlhf_core::Result<[f64; N]> {
    let stacked = Tensor::stack(&tensors, 0).to_kind(Kind::Double);
    let means = stacked.mean_dim([1i64].as_slice(), false, Kind::Double);
    let mut out = [0.0; N];
    means
        .f_to_device(tch::Device::Cpu)?
        .f_copy_data(&mut out, N)?;
    Ok(out)
}
