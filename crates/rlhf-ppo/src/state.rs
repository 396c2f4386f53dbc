//! Saving a trainer and going on with it.

use std::path::Path;

use rlhf_core::{Checkpoint, CheckpointStore, DataCursor, Error as CoreError, Policy, ValueModel};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, PpoTrainer, Result};

const STATE_FILE: &str = "ppo.json";

/// `ppo.json`. Random numbers need no state: they are drawn from streams named by these counters.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    config: Value,
    steps_done: u64,
    completions_done: u64,
    kl_coef: f64,
    cursor: Option<DataCursor>,
}

impl<P: Policy, V: ValueModel> PpoTrainer<P, V> {
    /// Writes everything that the rest of the run depends on into `dir`: the trainable weights of
    /// policy and value model, the optimiser, the schedule, the KL coefficient, the place in the
    /// data and in the random numbers. Reference, reward and constraints do not change, and are
    /// not written.
    ///
    /// A kill in the midst of it leaves a mixture: see [`CheckpointStore`], or
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
        self.updater.load(dir)?;
        self.steps_done = state.steps_done;
        self.completions_done = state.completions_done;
        self.kl.restore(state.kl_coef);
        self.cursor = state.cursor;
        Ok(())
    }

    /// Loads the newest checkpoint of `store`, if it is further than this trainer. Returns the
    /// steps done.
    ///
    /// # Errors
    /// Those of [`CheckpointStore::latest`] and [`load`](Self::load).
    pub fn resume(&mut self, store: &CheckpointStore) -> Result<u64> {
        match store.latest()? {
            Some(Checkpoint { step, path }) if step > self.steps_done => self.load(&path)?,
            _ => {}
        }
        Ok(self.steps_done)
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
