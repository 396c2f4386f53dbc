//! The loop over steps.

use std::ops::ControlFlow;
use std::sync::Arc;

use rlhf_core::{
    CheckpointConfig, CheckpointStore, DataCursor, DataOrder, Event, Observer, Policy, notify,
};

use crate::{Critic, PpoTrainer, Result};

impl<P: Policy, V: Critic<P>> PpoTrainer<P, V> {
    /// Trains until `steps` steps are done, those that a loaded trainer had behind it included.
    ///
    /// Each step takes the next `batch_size` of the prompts, which every epoch visits in an order
    /// of its own. Observers are told after each step, in phase `"ppo"`, and may end the run.
    ///
    /// # Errors
    /// No prompts; other prompts than a loaded trainer was trained on; those of
    /// [`step`](Self::step) and of the observers. What was done up to then stays.
    pub fn train(
        &mut self,
        prompts: &[Arc<[i64]>],
        steps: u64,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<()> {
        while self.steps_done < steps {
            if self.train_step(prompts, steps, observers)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// [`train`](Self::train), with a checkpoint every so many steps and at the end, and going on
    /// from the newest that is there: a run that was killed, and is started again in the same
    /// way, ends with the same weights as one that was left alone.
    ///
    /// For a metrics file that is whole too, call [`resume`](Self::resume) first and start a
    /// [`JsonlObserver`](rlhf_core::JsonlObserver) from the step it returns.
    ///
    /// # Errors
    /// Those of [`train`](Self::train), of [`save`](Self::save) and [`load`](Self::load);
    /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig) if `checkpoints.every` is 0.
    pub fn train_with_checkpoints(
        &mut self,
        prompts: &[Arc<[i64]>],
        steps: u64,
        observers: &mut [Box<dyn Observer + '_>],
        checkpoints: &CheckpointConfig,
    ) -> Result<()> {
        if checkpoints.every == 0 {
            let reason = "at least 1 is needed";
            return Err(rlhf_core::Error::config("checkpoints.every", 0, reason).into());
        }
        let store = CheckpointStore::open(&checkpoints.dir, checkpoints.keep)?;
        self.resume(&store)?;
        while self.steps_done < steps {
            // Observers are told before the checkpoint is written: a resumed run may repeat what
            // they were told, but never leaves a step out.
            let stop = self.train_step(prompts, steps, observers)?.is_break();
            let last = stop || self.steps_done == steps;
            if last || self.steps_done.is_multiple_of(checkpoints.every) {
                store.save(self.steps_done, |dir| self.save(dir))?;
            }
            if stop {
                break;
            }
        }
        Ok(())
    }

    fn train_step(
        &mut self,
        prompts: &[Arc<[i64]>],
        steps: u64,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<ControlFlow<()>> {
        // Works on a copy of the cursor, so that a step that fails skips no prompt.
        let mut cursor = match &self.cursor {
            Some(cursor) => cursor.clone(),
            None => DataCursor::new(self.config.seed, prompts.len(), DataOrder::Shuffled)?,
        };
        cursor.check_items(prompts.len())?;
        let batch: Vec<_> = cursor
            .next_full_batch(self.config.batch_size)
            .into_iter()
            .map(|i| prompts[i].clone())
            .collect();
        let stats = self.step(&batch)?;
        self.cursor = Some(cursor);
        Ok(notify(
            observers,
            &Event {
                step: self.steps_done,
                total_steps: Some(steps),
                phase: "ppo",
                stats: &stats,
            },
        )?)
    }
}
