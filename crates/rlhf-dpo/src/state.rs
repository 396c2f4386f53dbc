//! What a checkpoint holds beside the updater's files.

use std::fs;
use std::path::Path;

use rlhf_core::Error as CoreError;
use rlhf_scale::io::{load_tensors_into, save_tensors};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::Result;
use crate::shift::RunningMean;

const STATE_FILE: &str = "preference.json";
const REFERENCE_FILE: &str = "reference.safetensors";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    reward_shift: RunningMean,
    reference_follows: bool,
}

/// Writes the running mean, and the weights of a reference that changes.
pub(crate) fn save(
    dir: &Path,
    shift: RunningMean,
    reference: Option<&[(String, Tensor)]>,
) -> Result<()> {
    let path = dir.join(STATE_FILE);
    let state = State {
        reward_shift: shift,
        reference_follows: reference.is_some(),
    };
    let json = serde_json::to_vec_pretty(&state)
        .map_err(|error| CoreError::io("writing", &path)(error.into()))?;
    fs::write(&path, json).map_err(CoreError::io("writing", &path))?;
    if let Some(weights) = reference {
        save_tensors(&dir.join(REFERENCE_FILE), weights)?;
    }
    Ok(())
}

/// What was read and has not been taken over yet.
pub(crate) struct Loaded {
    shift: RunningMean,
    /// Live weights, and what they are to be.
    reference: Vec<(Tensor, Tensor)>,
}

/// Reads what [`save`] wrote; changes nothing.
pub(crate) fn load(dir: &Path, reference: Option<&[(String, Tensor)]>) -> Result<Loaded> {
    let path = dir.join(STATE_FILE);
    let text = fs::read_to_string(&path).map_err(CoreError::io("reading", &path))?;
    let state: State = serde_json::from_str(&text).map_err(|error| CoreError::Corrupt {
        path: path.clone(),
        reason: error.to_string(),
    })?;
    if state.reference_follows != reference.is_some() {
        let reason = "the checkpoint is of a run whose reference was synchronised, or this one is";
        let value = reference.is_some();
        return Err(CoreError::config("sync", value, reason).into());
    }
    let mut pairs = Vec::new();
    if let Some(weights) = reference {
        let _no_grad = tch::no_grad_guard();
        let copies: Vec<_> = weights
            .iter()
            .map(|(name, weight)| Ok((name.clone(), weight.f_empty_like()?)))
            .collect::<Result<_, tch::TchError>>()
            .map_err(CoreError::from)?;
        load_tensors_into(&dir.join(REFERENCE_FILE), &copies)?;
        let live = weights.iter().map(|(_, weight)| weight.shallow_clone());
        pairs = live.zip(copies.into_iter().map(|(_, copy)| copy)).collect();
    }
    Ok(Loaded {
        shift: state.reward_shift,
        reference: pairs,
    })
}

impl Loaded {
    /// Takes it over.
    pub(crate) fn apply(self) -> Result<RunningMean> {
        let _no_grad = tch::no_grad_guard();
        for (mut live, copy) in self.reference {
            live.f_copy_(&copy).map_err(CoreError::from)?;
        }
        Ok(self.shift)
    }
}
