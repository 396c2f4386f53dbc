//! Saving an updater and going on with it.

use std::path::Path;

use rlhf_core::{Error as CoreError, ParameterShards};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Updater;
use crate::{Error, LossScaler, Result, io};

const PARAMETERS_FILE: &str = "parameters.safetensors";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const EMA_FILE: &str = "ema.safetensors";
const STATE_FILE: &str = "updater.json";

/// `updater.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    step: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_scaler: Option<LossScaler>,
    /// Which part of a model on several ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    part: Option<String>,
    config: Value,
}

impl Updater {
    /// Writes what the rest of a run depends on to `dir`, which is made if need be:
    /// `parameters.safetensors`, `optimizer.safetensors`, `ema.safetensors` where weights are
    /// averaged, and `updater.json` with the step, the loss scale and the configuration.
    ///
    /// Each file is replaced atomically; for all of them together use a
    /// [`CheckpointStore`](rlhf_core::CheckpointStore), which moves a whole folder into place.
    ///
    /// Of a model on several ranks ([`Updater::of`]) each rank saves what it has, into a folder of its
    /// own, which the rank with the same part of as many loads.
    ///
    /// Of several processes that train together all call it, and the first writes. The files do not
    /// tell how many there were, nor what each had a part of: any number of processes can
    /// [load](Self::load) them.
    ///
    /// # Errors
    /// If a file cannot be written, or [`Error::EmaApplied`] while averages stand in for the
    /// weights.
    pub fn save(&self, dir: &Path) -> Result<()> {
        if let Some(ema) = &self.ema {
            ema.check_not_applied()?;
        }
        // What all processes do together comes before what may fail in one.
        let spread = match &self.reduction {
            Some(reduction) if reduction.is_sharded() => {
                Some(reduction.whole_state(&self.optimizer, &self.params)?)
            }
            _ => None,
        };
        std::fs::create_dir_all(dir).map_err(CoreError::io("creating", dir))?;
        if !self.replicas.is_first() {
            return Ok(());
        }
        io::save_tensors(&dir.join(PARAMETERS_FILE), &self.params)?;
        match spread {
            Some(state) => io::save_tensors(&dir.join(OPTIMIZER_FILE), &state)?,
            None => self.optimizer.save(&dir.join(OPTIMIZER_FILE))?,
        }
        if let Some(ema) = &self.ema {
            ema.save(&dir.join(EMA_FILE))?;
        }
        let path = dir.join(STATE_FILE);
        let state = State {
            step: self.step,
            loss_scaler: self.scaler.clone(),
            part: self.part(),
            config: self.config_json(&path)?,
        };
        let text = serde_json::to_string_pretty(&state).map_err(|error| corrupt(&path, error))?;
        io::write_atomically(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
                .map_err(|error| CoreError::io("writing", &path)(error).into())
        })
    }

    /// Restores bit for bit what [`Updater::save`] wrote: parameters, moments, master copies,
    /// averages, loss scale, step.
    ///
    /// # Errors
    /// [`Error::ConfigMismatch`] if the state was saved under another configuration,
    /// [`Error::TensorFile`] if its tensors are not those of this updater, and the usual errors of
    /// files that are missing or damaged. Nothing is changed then.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(CoreError::io("reading", &path))?;
        let state: State = serde_json::from_str(&text).map_err(|error| corrupt(&path, error))?;
        let current = self.config_json(&path)?;
        if let Some((field, saved, current)) = first_difference("", &state.config, &current) {
            return Err(Error::ConfigMismatch {
                path,
                field,
                saved,
                current,
            });
        }
        if state.part != self.part() {
            let whole = || "all of the model".to_string();
            return Err(Error::ConfigMismatch {
                path,
                field: "part".into(),
                saved: state.part.unwrap_or_else(whole),
                current: self.part().unwrap_or_else(whole),
            });
        }
        let scaler = state.loss_scaler.and_then(LossScaler::restored);
        if scaler.is_some() != self.scaler.is_some() {
            return Err(corrupt(&path, "no usable loss_scaler"));
        }
        let spread = self.reduction.as_ref().filter(|r| r.is_sharded());
        let optimizer_state = match spread {
            Some(reduction) => reduction.expected_state(&self.params)?,
            None => self.optimizer.state(),
        };
        let params = io::read_matching(&dir.join(PARAMETERS_FILE), &self.params)?;
        let moments = io::read_matching(&dir.join(OPTIMIZER_FILE), &optimizer_state)?;
        if let Some(ema) = &mut self.ema {
            let averages = ema.read(&dir.join(EMA_FILE))?;
            ema.restore(&averages)?;
        }
        io::copy_into(&self.params, &params)?;
        match spread {
            Some(reduction) => {
                reduction.restore_state(&self.optimizer, &moments, &self.params)?;
            }
            None => io::copy_into(&optimizer_state, &moments)?,
        }
        self.scaler = scaler;
        self.step = state.step;
        Ok(())
    }

    fn part(&self) -> Option<String> {
        self.shards.as_ref().map(ParameterShards::place)
    }

    fn config_json(&self, path: &Path) -> Result<Value> {
        serde_json::to_value(&self.config).map_err(|error| corrupt(path, error))
    }
}

fn corrupt(path: &Path, reason: impl ToString) -> Error {
    CoreError::Corrupt {
        path: path.to_path_buf(),
        reason: reason.to_string(),
    }
    .into()
}

/// Path and values of the first field in which two JSON documents differ.
fn first_difference(
    path: &str,
    saved: &Value,
    current: &Value,
) -> Option<(String, String, String)> {
    let (Some(saved_fields), Some(fields)) = (saved.as_object(), current.as_object()) else {
        return (saved != current)
            .then(|| (path.to_string(), saved.to_string(), current.to_string()));
    };
    let absent = Value::Null;
    let extra = saved_fields.keys().filter(|key| !fields.contains_key(*key));
    fields.keys().chain(extra).find_map(|key| {
        let path = match path {
            "" => key.clone(),
            prefix => format!("{prefix}.{key}"),
        };
        let saved = saved_fields.get(key).unwrap_or(&absent);
        first_difference(&path, saved, fields.get(key).unwrap_or(&absent))
    })
}
