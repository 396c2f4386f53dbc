//! Saving a trainer and going on with it.

use std::path::Path;

use rlhf_core::{DataCursor, Error as CoreError, Policy};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::trainer::GrpoTrainer;
use crate::constraints::ConstraintState;
use crate::state::{config_json, corrupt, first_difference};
use crate::{Error, Result};

const STATE_FILE: &str = "grpo.json";

/// `grpo.json`. Random numbers need no state: they are drawn from streams named by these counters.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    config: Value,
    /// Names and weights of the rewards.
    rewards: Vec<(String, f64)>,
    #[serde(default)] // of a time before GRPO had any
    constraints: Vec<ConstraintState>,
    steps_done: u64,
    completions_done: u64,
    cursor: Option<DataCursor>,
}

impl<P: Policy> GrpoTrainer<P> {
    /// Writes everything that the rest of the run depends on into `dir`: the trainable weights,
    /// the optimiser, the schedule, the multipliers of constraints, the place in the data and in the random numbers. Reference,
    /// rewards and the constraints' models do not change, and are not written.
    ///
    /// A kill in the midst of it leaves a mixture: see [`CheckpointStore`](rlhf_core::CheckpointStore), or
    /// [`train_with_checkpoints`](Self::train_with_checkpoints).
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.updater.save(dir)?;
        let path = dir.join(STATE_FILE);
        let state = State {
            config: config_json(&self.config, &path)?,
            rewards: self.reward_weights(),
            constraints: self.constraints.states(),
            steps_done: self.steps_done,
            completions_done: self.completions_done,
            cursor: self.cursor.clone(),
        };
        let text = serde_json::to_string_pretty(&state).map_err(|e| corrupt(&path, &e))?;
        Ok(std::fs::write(&path, text).map_err(CoreError::io("writing", &path))?)
    }

    /// Restores bit for bit what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::ConfigMismatch`] if it was saved under other options or with other rewards
    /// or constraints, and
    /// the usual errors of files that are missing, damaged or of another model. Nothing is changed
    /// then.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(CoreError::io("reading", &path))?;
        let state: State = serde_json::from_str(&text).map_err(|e| corrupt(&path, &e))?;
        let current = config_json(&self.config, &path)?;
        let mut difference = first_difference(&state.config, &current);
        let rewards = self.reward_weights();
        if state.rewards != rewards {
            let show = |rewards: &[(String, f64)]| format!("{rewards:?}");
            difference = difference.or(Some((
                "rewards".to_string(),
                show(&state.rewards),
                show(&rewards),
            )));
        }
        let constraints = self.constraints.difference(&state.constraints);
        difference = difference.or_else(|| {
            constraints.map(|(saved, current)| ("constraints".to_string(), saved, current))
        });
        if let Some((field, saved, current)) = difference {
            return Err(Error::ConfigMismatch {
                path,
                field,
                saved,
                current,
            });
        }
        self.updater.load(dir)?;
        self.constraints.restore(state.constraints);
        self.steps_done = state.steps_done;
        self.completions_done = state.completions_done;
        self.cursor = state.cursor;
        Ok(())
    }

    fn reward_weights(&self) -> Vec<(String, f64)> {
        let weight = |r: &super::trainer::WeightedReward| (r.name.clone(), r.weight);
        self.rewards.iter().map(weight).collect()
    }
}
