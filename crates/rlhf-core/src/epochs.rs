//! Epochs over a dataset, with checkpoints, resumption and observers.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    CheckpointStore, DataCursor, DataOrder, Error, Event, Observer, Replicas, Result, Stats, notify,
};

/// Where the run stands, in every checkpoint beside the trainer's own files.
const PROGRESS_FILE: &str = "progress.json";

/// How [`train_epochs`] goes through the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EpochConfig {
    /// Times that the whole dataset is visited.
    pub epochs: u64,
    /// Items of a step; the last step of an epoch may have fewer.
    pub batch_size: usize,
    /// Ends the run after this many steps, whatever is left of the epochs.
    pub max_steps: Option<u64>,
    /// Order of the items within an epoch.
    pub order: DataOrder,
    /// Seed of the order.
    pub seed: u64,
    /// Where and how often the run is saved; `None`: never.
    pub checkpoints: Option<CheckpointConfig>,
}

impl Default for EpochConfig {
    /// One shuffled epoch in batches of 8 (the batch size of transformers' `TrainingArguments`),
    /// not saved.
    fn default() -> Self {
        Self {
            epochs: 1,
            batch_size: 8,
            max_steps: None,
            order: DataOrder::Shuffled,
            seed: 0,
            checkpoints: None,
        }
    }
}

/// Where and how often a run is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Folder of the checkpoints. A run that finds some there goes on from the latest.
    pub dir: PathBuf,
    /// Steps from one checkpoint to the next; the end of the run is saved too.
    pub every: u64,
    /// How many are kept.
    pub keep: usize,
}

impl EpochConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        let reason = "must be at least 1";
        if self.epochs == 0 {
            return Err(Error::config("epochs", self.epochs, reason));
        }
        if self.batch_size == 0 {
            return Err(Error::config("batch_size", self.batch_size, reason));
        }
        match &self.checkpoints {
            Some(checkpoints) if checkpoints.every == 0 => {
                Err(Error::config("checkpoints.every", 0, reason))
            }
            _ => Ok(()),
        }
    }

    /// Steps of a run over `items` items: what a learning-rate schedule needs to know.
    pub fn total_steps(&self, items: usize) -> u64 {
        let steps = self.epochs * items.div_ceil(self.batch_size.max(1)) as u64;
        steps.min(self.max_steps.unwrap_or(u64::MAX))
    }

    /// The step that a run with this config would go on from: 0 if nothing was saved. For
    /// [`JsonlObserver::resume`](crate::JsonlObserver::resume).
    ///
    /// # Errors
    /// Those of [`CheckpointStore`].
    pub fn resumed_step(&self) -> Result<u64> {
        let Some(config) = &self.checkpoints else {
            return Ok(0);
        };
        let latest = CheckpointStore::open(&config.dir, config.keep)?.latest()?;
        Ok(latest.map_or(0, |checkpoint| checkpoint.step))
    }
}

/// A trainer that learns from one batch of a dataset at a time: what [`train_epochs`] drives.
pub trait EpochTrainer {
    /// One item of the dataset.
    type Item: Clone;
    /// What can go wrong.
    type Error: From<Error> + std::fmt::Display;
    /// Name of the run's part in events: `"sft"`, `"reward"`, ….
    const PHASE: &'static str;

    /// One optimiser step on these items, at least one.
    ///
    /// # Errors
    /// The trainer's own. A step that fails must change nothing.
    fn step_on(&mut self, items: Vec<Self::Item>) -> Result<Stats, Self::Error>;

    /// Writes all that the next steps depend on into the folder `dir`.
    ///
    /// # Errors
    /// If it cannot be written.
    fn save_to(&self, dir: &Path) -> Result<(), Self::Error>;

    /// Restores bit for bit what [`save_to`](Self::save_to) wrote.
    ///
    /// # Errors
    /// If it cannot be read, or was written by a different trainer.
    fn load_from(&mut self, dir: &Path) -> Result<(), Self::Error>;
}

/// `progress.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Progress {
    step: u64,
    batch_size: usize,
    cursor: DataCursor,
}

/// Trains on `data`, epoch after epoch, and returns the number of steps done.
///
/// Where several processes train together ([`Replicas::current`]) all of them call this with the same
/// data; `batch_size` is that of all of them, and the number of processes may be another when the
/// run is resumed.
///
/// Every step is told to the observers, which may end the run. Where the config names a folder
/// for checkpoints and there is one in it already, the run goes on from there: its end has the
/// same bytes as that of a run which was never interrupted.
///
/// # Errors
/// [`Error::Empty`] without data; [`Error::InvalidConfig`]; [`Error::LengthMismatch`] where a
/// checkpoint belongs to a dataset of another size; those of the trainer, the observers and the
/// checkpoints.
pub fn train_epochs<T: EpochTrainer>(
    trainer: &mut T,
    data: &[T::Item],
    config: &EpochConfig,
    observers: &mut [Box<dyn Observer + '_>],
) -> Result<u64, T::Error> {
    config.validate()?;
    let mut progress = Progress {
        step: 0,
        batch_size: config.batch_size,
        cursor: DataCursor::new(config.seed, data.len(), config.order)?,
    };
    let store = match &config.checkpoints {
        Some(checkpoints) => Some((
            CheckpointStore::open(&checkpoints.dir, checkpoints.keep)?,
            checkpoints.every,
        )),
        None => None,
    };
    if let Some((store, _)) = &store
        && let Some(checkpoint) = store.latest()?
    {
        progress = progress.resumed(&checkpoint.path)?;
        trainer.load_from(&checkpoint.path)?;
    }
    Replicas::current().check_same("checkpoints.dir", progress.step)?;

    let total_steps = config.total_steps(data.len());
    let mut saved_step = progress.step;
    let mut stopped = false;
    while progress.step < total_steps && !stopped {
        let mut cursor = progress.cursor.clone();
        let items = cursor.next_batch(config.batch_size);
        let items = items.into_iter().map(|i| data[i].clone()).collect();
        let stats = trainer.step_on(items)?;
        progress.cursor = cursor;
        progress.step += 1;
        let event = Event {
            step: progress.step,
            total_steps: Some(total_steps),
            phase: T::PHASE,
            stats: &stats,
        };
        stopped = notify(observers, &event)?.is_break();
        if let Some((store, every)) = &store
            && progress.step.is_multiple_of(*every)
        {
            save(store, trainer, &progress)?;
            saved_step = progress.step;
        }
    }
    if let Some((store, _)) = &store
        && saved_step != progress.step
    {
        save(store, trainer, &progress)?;
    }
    Ok(progress.step)
}

fn save<T: EpochTrainer>(
    store: &CheckpointStore,
    trainer: &T,
    progress: &Progress,
) -> Result<(), T::Error> {
    store.save(progress.step, |dir| -> Result<(), T::Error> {
        trainer.save_to(dir)?;
        let path = dir.join(PROGRESS_FILE);
        let json = serde_json::to_vec_pretty(progress)
            .map_err(|error| Error::io("writing", &path)(error.into()))?;
        fs::write(&path, json).map_err(Error::io("writing", &path))?;
        Ok(())
    })?;
    Ok(())
}

impl Progress {
    /// The progress in `dir`, of a run that began as `self` does.
    fn resumed(self, dir: &Path) -> Result<Self> {
        let path = dir.join(PROGRESS_FILE);
        let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
        let saved: Self = serde_json::from_str(&text).map_err(|error| Error::Corrupt {
            path,
            reason: error.to_string(),
        })?;
        self.cursor.check_continues(&saved.cursor)?;
        if saved.batch_size != self.batch_size {
            let reason = "the checkpoint is of a run with another batch size";
            return Err(Error::config("batch_size", self.batch_size, reason));
        }
        Ok(saved)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;

    /// Remembers what it was given; its state depends on the order.
    #[derive(Default, Debug, PartialEq)]
    struct Log(Vec<Vec<u32>>);

    impl EpochTrainer for Log {
        type Item = u32;
        type Error = Error;
        const PHASE: &'static str = "log";

        fn step_on(&mut self, items: Vec<u32>) -> Result<Stats> {
            if items.contains(&666) {
                return Err(Error::config("item", 666, "bad"));
            }
            self.0.push(items);
            Ok(Stats::new())
        }

        fn save_to(&self, dir: &Path) -> Result<()> {
            let json = serde_json::to_string(&self.0).unwrap();
            fs::write(dir.join("log.json"), json).map_err(Error::io("writing", dir))
        }

        fn load_from(&mut self, dir: &Path) -> Result<()> {
            let json = fs::read_to_string(dir.join("log.json")).unwrap();
            self.0 = serde_json::from_str(&json).unwrap();
            Ok(())
        }
    }

    const DATA: [u32; 7] = [10, 11, 12, 13, 14, 15, 16];

    fn config(dir: Option<&Path>) -> EpochConfig {
        EpochConfig {
            epochs: 2,
            batch_size: 3,
            seed: 5,
            checkpoints: dir.map(|dir| CheckpointConfig {
                dir: dir.into(),
                every: 2,
                keep: 1,
            }),
            ..EpochConfig::default()
        }
    }

    fn stop_after(step: u64) -> Vec<Box<dyn Observer>> {
        vec![Box::new(move |event: &Event<'_>| {
            assert_eq!((event.phase, event.total_steps), ("log", Some(6)));
            Ok(match event.step == step {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        })]
    }

    fn folder(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("rlhf-epochs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn an_interrupted_run_ends_like_an_uninterrupted_one() {
        let mut whole = Log::default();
        assert_eq!(
            train_epochs(&mut whole, &DATA, &config(None), &mut []).unwrap(),
            6
        );
        let sizes: Vec<usize> = whole.0.iter().map(Vec::len).collect();
        assert_eq!(sizes, [3, 3, 1, 3, 3, 1]);

        let dir = folder("resume");
        let config = config(Some(&dir));
        for (stop, done) in [(3, 3), (4, 4), (99, 6), (99, 6)] {
            let mut log = Log::default(); // a new process
            let steps = train_epochs(&mut log, &DATA, &config, &mut stop_after(stop)).unwrap();
            assert_eq!((steps, config.resumed_step().unwrap()), (done, done));
            assert_eq!(log.0, whole.0[..done as usize]);
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_checkpoint_of_another_run_is_refused() {
        let dir = folder("other");
        let config = config(Some(&dir));
        train_epochs(&mut Log::default(), &DATA, &config, &mut stop_after(2)).unwrap();
        let fails = |data: &[u32], config: &EpochConfig| {
            train_epochs(&mut Log::default(), data, config, &mut []).unwrap_err()
        };
        assert!(matches!(
            fails(&DATA[1..], &config),
            Error::LengthMismatch { .. }
        ));
        let seed = EpochConfig {
            seed: 6,
            ..config.clone()
        };
        let order = EpochConfig {
            order: DataOrder::Given,
            ..config.clone()
        };
        let size = EpochConfig {
            batch_size: 2,
            ..config.clone()
        };
        for other in [seed, order, size] {
            assert!(matches!(fails(&DATA, &other), Error::InvalidConfig { .. }));
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn wrong_configs_and_no_data_are_errors() {
        let run = |data: &[u32], config: EpochConfig| {
            train_epochs(&mut Log::default(), data, &config, &mut [])
        };
        assert!(matches!(run(&[], config(None)), Err(Error::Empty { .. })));
        for (epochs, batch_size) in [(0, 1), (1, 0)] {
            let config = EpochConfig {
                epochs,
                batch_size,
                ..EpochConfig::default()
            };
            assert!(matches!(
                run(&DATA, config),
                Err(Error::InvalidConfig { .. })
            ));
        }
        assert!(run(&[1, 666], config(None)).is_err());
        let limited = EpochConfig {
            max_steps: Some(2),
            ..config(None)
        };
        assert_eq!(run(&DATA, limited).unwrap(), 2);
    }
}
