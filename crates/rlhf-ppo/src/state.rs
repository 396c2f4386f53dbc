//! Saving a trainer and going on with it.

use std::path::Path;

use rlhf_core::{DataCursor, Error as CoreError, Policy};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::constraints::ConstraintState;
use crate::{Critic, Error, PpoTrainer, Result, RunningMoments};

const STATE_FILE: &str = "ppo.json";

/// `ppo.json`. Random numbers need no state: they are drawn from streams named by these counters.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    config: Value,
    steps_done: u64,
    completions_done: u64,
    kl_coef: f64,
    score_moments: RunningMoments,
    constraints: Vec<ConstraintState>,
    pretraining: Option<DataCursor>,
    cursor: Option<DataCursor>,
}

impl<P: Policy, V: Critic<P>> PpoTrainer<P, V> {
    /// Writes everything that the rest of the run depends on into `dir`: the trainable weights of
    /// policy and critics, the optimiser, the schedule, the KL coefficient, the scale of the scores,
    /// the multipliers of constraints, the place in the data and in the random numbers. Reference,
    /// reward and the constraints' models do not change, and are not written.
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
            steps_done: self.steps_done,
            completions_done: self.completions_done,
            kl_coef: self.kl.kl_coef(),
            score_moments: self.moments,
            constraints: self.constraints.states(),
            pretraining: self.pretraining.as_ref().map(|data| data.cursor.clone()),
            cursor: self.cursor.clone(),
        };
        let text = serde_json::to_string_pretty(&state).map_err(|e| corrupt(&path, &e))?;
        Ok(std::fs::write(&path, text).map_err(CoreError::io("writing", &path))?)
    }

    /// Restores bit for bit what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::ConfigMismatch`] if it was saved under other options, and the usual errors of
    /// files that are missing, damaged or of another model. Nothing is changed then.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(CoreError::io("reading", &path))?;
        let state: State = serde_json::from_str(&text).map_err(|e| corrupt(&path, &e))?;
        let current = config_json(&self.config, &path)?;
        if let Some((field, saved, current)) = first_difference(&state.config, &current) {
            return Err(Error::ConfigMismatch {
                path,
                field,
                saved,
                current,
            });
        }
        let mismatch = |field: &str, saved: String, current: String| Error::ConfigMismatch {
            path: path.clone(),
            field: field.to_string(),
            saved,
            current,
        };
        if let Some((saved, current)) = self.constraints.difference(&state.constraints) {
            return Err(mismatch("constraints", saved, current));
        }
        match (&state.pretraining, &self.pretraining) {
            (None, None) => {}
            (Some(cursor), Some(pretraining)) => pretraining.check(cursor)?,
            (saved, current) => {
                let show = |data: bool| if data { "some" } else { "none" }.to_string();
                let (saved, current) = (show(saved.is_some()), show(current.is_some()));
                return Err(mismatch("pretraining texts", saved, current));
            }
        }
        self.updater.load(dir)?;
        if let (Some(pretraining), Some(cursor)) = (&mut self.pretraining, state.pretraining) {
            pretraining.cursor = cursor;
        }
        self.moments = state.score_moments;
        self.constraints.restore(state.constraints);
        self.steps_done = state.steps_done;
        self.completions_done = state.completions_done;
        self.kl.restore(state.kl_coef);
        self.cursor = state.cursor;
        Ok(())
    }
}

/// The options that the course of a run depends on.
pub(crate) fn config_json(config: &impl Serialize, path: &Path) -> Result<Value> {
    let mut json = serde_json::to_value(config).map_err(|e| corrupt(path, &e))?;
    if let Some(fields) = json.as_object_mut() {
        // The updater checks its own.
        fields.remove("update");
    }
    Ok(json)
}

/// The first field that differs, with both values.
pub(crate) fn first_difference(saved: &Value, current: &Value) -> Option<(String, String, String)> {
    let empty = serde_json::Map::new();
    let (saved, current) = (
        saved.as_object().unwrap_or(&empty),
        current.as_object().unwrap_or(&empty),
    );
    let show = |value: Option<&Value>| value.unwrap_or(&Value::Null).to_string();
    saved
        .keys()
        .chain(current.keys())
        .find(|field| saved.get(*field) != current.get(*field))
        .map(|field| {
            (
                field.clone(),
                show(saved.get(field)),
                show(current.get(field)),
            )
        })
}

pub(crate) fn corrupt(path: &Path, error: &serde_json::Error) -> CoreError {
    CoreError::Corrupt {
        path: path.to_path_buf(),
        reason: error.to_string(),
    }
}
