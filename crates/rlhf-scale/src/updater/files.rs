//! Saving an updater and going on with it.

use std::path::Path;

use rlhf_core::{Error as CoreError, ParameterShards};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::whole::{self, WeightOf, after_dot, itself};
use super::{Reduction, Updater};
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
    config: Value,
}

/// What was read, before anything of it is taken over.
struct Read {
    step: u64,
    scaler: Option<LossScaler>,
    params: Vec<Tensor>,
    moments: Vec<Tensor>,
    averages: Option<Vec<Tensor>>,
}

impl Updater {
    /// Writes what the rest of a run depends on to `dir`, which is made if need be:
    /// `parameters.safetensors`, `optimizer.safetensors`, `ema.safetensors` where weights are
    /// averaged, and `updater.json` with the step, the loss scale and the configuration.
    ///
    /// Each file is replaced atomically; for all of them together use a
    /// [`CheckpointStore`](rlhf_core::CheckpointStore), which moves a whole folder into place.
    ///
    /// Of several processes that train together, or have parts of the model ([`Updater::of`]), all
    /// call it, and the first writes; it needs memory for one whole file. The files do not tell how many
    /// there were, nor what each had a part of: any number of processes can [load](Self::load) them,
    /// with the model on as many ranks as they like.
    ///
    /// # Errors
    /// If a file cannot be written, or [`Error::EmaApplied`] while averages stand in for the
    /// weights.
    pub fn save(&self, dir: &Path) -> Result<()> {
        if let Some(ema) = &self.ema {
            ema.check_not_applied()?;
        }
        // What all processes do together comes before what may fail in one.
        let optimizer = match &self.reduction {
            Some(reduction) if reduction.is_sharded() => {
                reduction.whole_state(&self.optimizer, &self.params)?
            }
            _ => self.optimizer.state(),
        };
        let made = std::fs::create_dir_all(dir).map_err(CoreError::io("creating", dir));
        // The others have the same.
        if self.replicas.rank() > 0 {
            return Ok(made?);
        }
        let shards = self.shards.as_ref();
        let aliases = self.params.iter();
        let aliases = aliases.map(|(name, param)| (name.clone(), param.shallow_clone()));
        let mut states: Vec<(&str, _, WeightOf)> = vec![
            (PARAMETERS_FILE, aliases.collect(), itself),
            (OPTIMIZER_FILE, optimizer, after_dot),
        ];
        if let Some(ema) = &self.ema {
            states.push((EMA_FILE, ema.state(), after_dot));
        }
        let mut written = made.map_err(Error::from);
        for (file, state, weight_of) in states {
            // No rank waits for one that cannot write.
            if let Some(whole) = whole::gathered(shards, state, weight_of)? {
                written = written.and_then(|()| io::save_tensors(&dir.join(file), &whole));
            }
        }
        if shards.is_none_or(ParameterShards::is_first) {
            written = written.and_then(|()| self.write_state(dir));
        }
        whole::agree(shards, self.device(), written)
    }

    fn write_state(&self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let state = State {
            step: self.step,
            loss_scaler: self.scaler.clone(),
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
        let read = self.read(dir);
        let Read {
            step,
            scaler,
            params,
            moments,
            averages,
        } = whole::agree(self.shards.as_ref(), self.device(), read)?;
        if let (Some(ema), Some(averages)) = (&mut self.ema, averages) {
            ema.restore(&averages)?;
        }
        io::copy_into(&self.params, &params)?;
        match self.spread() {
            Some(reduction) => {
                reduction.restore_state(&self.optimizer, &moments, &self.params)?;
            }
            None => io::copy_into(&self.optimizer.state(), &moments)?,
        }
        self.scaler = scaler;
        self.step = step;
        Ok(())
    }

    /// What the files hold for this rank.
    fn read(&self, dir: &Path) -> Result<Read> {
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
        let scaler = state.loss_scaler.and_then(LossScaler::restored);
        if scaler.is_some() != self.scaler.is_some() {
            return Err(corrupt(&path, "no usable loss_scaler"));
        }
        let optimizer_state = match self.spread() {
            Some(reduction) => reduction.expected_state(&self.params)?,
            None => self.optimizer.state(),
        };
        let read = |file: &str, targets: &[(String, Tensor)], weight_of| {
            whole::read(self.shards.as_ref(), &dir.join(file), targets, weight_of)
        };
        let averages = self.ema.as_ref();
        Ok(Read {
            step: state.step,
            scaler,
            params: read(PARAMETERS_FILE, &self.params, itself)?,
            moments: read(OPTIMIZER_FILE, &optimizer_state, after_dot)?,
            averages: averages
                .map(|ema| read(EMA_FILE, &ema.state(), after_dot))
                .transpose()?,
        })
    }

    /// What the optimiser's state is spread by, over processes.
    fn spread(&self) -> Option<&Reduction> {
        self.reduction.as_ref().filter(|r| r.is_sharded())
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
