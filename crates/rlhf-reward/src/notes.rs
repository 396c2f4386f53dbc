//! What a composite model has noted since it was last asked.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use rlhf_core::Stats;

/// Means of named numbers over all completions, for
/// [`RewardModel::take_report`](rlhf_core::RewardModel::take_report).
#[derive(Debug, Default)]
pub(crate) struct Notes(Mutex<BTreeMap<String, (f64, usize)>>);

impl Notes {
    pub(crate) fn add(&self, name: &str, values: &[f64]) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (sum, count) = notes.entry(name.to_string()).or_default();
        *sum += values.iter().sum::<f64>();
        *count += values.len();
    }

    pub(crate) fn take(&self) -> Stats {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *notes)
            .into_iter()
            .map(|(name, (sum, count))| (name, sum / count.max(1) as f64))
            .collect()
    }
}
