//! The running mean of rewards that BCO subtracts.

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::Result;

/// Mean of all rewards seen so far.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunningMean {
    pub(crate) count: f64,
    pub(crate) mean: f64,
}

impl RunningMean {
    /// The mean with `rewards` (each `[B]`) among what was seen.
    pub(crate) fn with(self, rewards: &[&Tensor]) -> Result<Self> {
        let all = Tensor::f_cat(rewards, 0).and_then(|r| r.f_to_kind(Kind::Double));
        let sum = all.and_then(|all| all.f_sum(Kind::Double));
        let sum = f64::try_from(sum.map_err(CoreError::from)?).map_err(CoreError::from)?;
        let seen: usize = rewards.iter().map(|r| r.numel()).sum();
        let count = self.count + seen as f64;
        Ok(Self {
            count,
            mean: self.mean + (sum - self.mean * seen as f64) / count,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let batch = |x: &[f32]| Tensor::from_slice(x);
        let first = RunningMean::default().with(&[&batch(&[1.0, 2.0]), &batch(&[6.0])]);
        let first = first.unwrap();
        assert_eq!((first.count, first.mean), (3.0, 3.0));
        let second = first.with(&[&batch(&[7.0])]).unwrap();
        assert_eq!((second.count, second.mean), (4.0, 4.0));
    }
}
